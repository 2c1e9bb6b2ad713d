// What the scripts in concept_tda/static hand each other. Only the type checker reads this file.

type Handler = (event: any) => unknown;
type Attributes = Record<string, string | number | boolean | null | undefined | Handler>;
type Child = Node | string | number | false | null | undefined | readonly Child[];

/** How token scores are coloured. */
interface Scale {
  limit: number; // distance from the centre that gets the full colour
  centre: number;
  signed: boolean; // false: one colour, by size
}

/** What is told of the token under the pointer. */
type Tell = (text: string, value: number) => void;

/** One turn of a conversation: text, or tokens with a score each. */
interface Turn {
  role: string;
  answer: boolean;
  text?: string;
  tokens?: string[];
  scores?: number[];
  sink?: boolean; // the first token is the attention sink and has a score
}

/** A score by kind of token; the amounts add up to the total. */
interface Parts {
  parts: [string, number][];
  total: number;
  unit: string;
  sink_words: string;
}

/** What chance gives. */
interface Chance {
  words: string;
  quantiles: number[]; // distances from the centre at equal steps of the distribution
}

interface Snippet {
  prompt: string;
  response: string;
}

interface Example {
  place: number;
  id: string;
  turns: Turn[];
  metadata: [string, string][];
  asked?: string; // the last question on one line, where the turns are stretches of tokens
  answered?: string; // likewise the answer
  parts?: Parts; // absent where the whole score lies on one kind of token
  others?: Record<number, OtherTokens>; // by the number of a method that scores tokens too
}

/** Another method's token scores of an example: for the same stretches, or its own stretches. */
interface OtherTokens {
  scores?: number[][];
  turns?: Turn[];
  sink: boolean;
  parts?: Parts;
}

interface Method {
  name: string;
  short: string;
  reading: string; // what a score above the centre means
  unit_words: string; // what one of `unit` is; empty where there is none
  zero: string; // what the zero means: "gradient", "projection", "none", "not recorded"
  centre: number | null;
  spread: number | null;
  unit: string; // of the number that leads; empty where there is none
  kind: string; // "effect", "null", "spread" or "none"
  null: Chance | null;
  reach: number | null; // how far the intervals go from the centre, in `unit`; null without intervals
  raw: [number, string] | null; // what a score is multiplied by to be an effect in this unit, where a share leads
  counted: string; // how many examples stand out; empty where that is not known
  length_spearman: number | null;
  behaviour: string; // what was asked
  subtitle: string;
  detected: string; // how well it finds the labels; empty without labels
  card: [string, string][];
  sink_words: string; // what the first tokens carry; empty where nothing
  scale: Scale | null; // of its token scores; null where it has none
}

/** An example by some words of an answer, and by the result that is shown: two numbers each. */
interface AskedRow {
  place: number;
  percentile: [number, number];
  distance: [string, string];
  rank: [number, number];
  raw: [number, number];
}

/** Which data made some words, beside the result that is shown. */
interface AskedWords {
  name: string; // of the method that was asked
  here: string; // of the one that is shown
  reading: string;
  agreement: number | null; // Spearman
  ends: {title: string; sides: [AskedRow[], AskedRow[]]}[];
}

/** Names and sizes, as `browser_table` in Python writes them. */
interface Table {
  n: number;
  n_total: number;
  note: string; // what had to give way in a page without a kernel; empty where nothing
  methods: Method[];
  facets: {name: string; values: string[]}[];
  has_labels: boolean;
  length_unit: string;
  lengths: [number, number];
  fold_up_to: number;
  export_path: string;
  asks?: boolean; // whether the kernel answers which data made some words
}

type Column = Float64Array | Float32Array | Int32Array | Int16Array;

interface Decision {
  places: number[];
  mark?: number;
  note?: string;
  why: string;
}

/** Where a browser gets everything from: a notebook's kernel, or JSON in the page. */
interface Source {
  table: Table;
  column(name: string): Column; // numbers of all examples
  snippets(places: number[]): Promise<Snippet[]>;
  examples(places: number[]): Promise<Example[]>;
  search(words: string): Promise<Int32Array>; // places whose text holds all the words
  groups(): Promise<Int32Array>; // a group number for each example; near-duplicates share theirs
  words?(method: number): Promise<EndWords>; // of a method's two ends; absent in views of something else
  marks(): Uint8Array; // decisions: 0 none, 1 keep, 2 drop
  notes(): Record<string, string>; // by place
  undoable(): string; // what undo takes back
  decide?(values: Decision): Promise<unknown>; // absent where nothing can be decided
  undo?(): Promise<unknown>;
  export?(path: string): Promise<{words: string}>;
  askWords?: (place: number, words: string) => Promise<AskedWords>;
  save?(by: string): string; // the file of decisions, of a page without a kernel
  ids?(places: number[]): string[];
  link?(place: number): string; // the end of the page's address that opens an example; absent in a notebook
  onChange(call: () => void): void;
  onWaiting(call: (state: boolean) => void): void;
  close(): void;
}

/** What `embedded_browser` in Python writes into a page. */
interface EmbeddedData {
  table: Table;
  columns: Record<string, (number | null)[]>;
  examples: Example[];
  groups: number[];
  words?: EndWords[]; // of each method's two ends
  review?: object; // what a file of decisions says of the data; absent where nothing can be decided
}

/** A word, its z, and in how many of the highest and of the lowest examples it occurs. */
type WordRow = [string, number, number, number];

/** Words that tell the highest examples from the lowest beyond chance; `words` says it in a sentence. */
interface EndWords {
  highest: WordRow[];
  lowest: WordRow[];
  words: string;
}

/** What the list is drawn from. */
interface View {
  pass: Uint8Array<ArrayBuffer>; // 1 for each example that passes the filters
  all: number[]; // their places, in order
  rows: number[]; // places of the rows of the list; MIDDLE for the gap between both ends
  members: Map<number, number[]>; // near-duplicates that a row stands for
  hidden: number;
  folded: number;
}

/** Answers of a kernel. */
interface Answer {
  reply: string;
  error?: string;
  examples: any[];
  ends: EndWords;
  words: string;
  buffers: DataView[];
}

/** The model of a widget, as notebooks give it. */
interface WidgetModel {
  get(name: string): any;
  send(message: object): void;
  set(name: string, value: unknown): void;
  save_changes(): void;
  on(name: string, call: (...values: any[]) => void): void;
  off(name: string, call: (...values: any[]) => void): void;
}

/** One text read by a concept, as `ConceptExplorer` in Python writes it. */
interface Reading {
  concept: string;
  layer: number;
  place: string;
  centre: number;
  unit: string;
  limit: number;
  turns?: Turn[];
  layers: number[];
  sweep: number[];
  sweep_words: string;
  among?: string;
  nearest?: Neighbour[];
  farthest?: Neighbour[];
}

interface Neighbour {
  row: number;
  value: number;
  turns: Turn[];
  response: string;
}

/** The model's answer while a concept is added. */
interface Steered {
  strength: number;
  text: string;
  value: number | null;
}

/** One way to colour the points of a map. */
interface MapColour {
  name: string;
  kind: "score" | "classes";
  column: string; // of numbers, or of the number of each point's class, -1 where it has none
  centre: number; // scores: neither orange nor blue
  limit: number; // scores: the distance from the centre that gets the full colour
  from: string; // scores: what the centre is, in words
  values: string[]; // classes: their names, those with a colour first
  colours: string[]; // classes: the colours of the first ones
  members?: number[][]; // classes that overlap: the places of each
}

/** Names and sizes of a map, as `map_table` in Python writes them. */
interface MapTable {
  n: number;
  n_total: number;
  title: string;
  subtitle: string;
  axes: [string, string];
  ids: string[];
  unit: string; // of the column leading0
  colours: MapColour[];
}

type MapSource = Omit<Source, "table"> & {table: MapTable};

/** How a stretch of the map changes what is selected. */
type BrushMode = "replace" | "add" | "remove";

/** A list as Python has it: a selection, or weights. */
interface SharedList {
  get(): number[];
  set(values: number[]): void;
  onChange(call: () => void): void;
  close(): void;
}

/** What the drawing of a map tells its view. */
interface PlotCalls {
  onSelect(places: number[], mode: BrushMode, how: string): void;
  onHover(place: number | null): void;
  onPoint(place: number): void;
}

/** What `write_report` in Python adds to a page's data for its map. */
interface ReportMap {
  table: MapTable;
  columns: Record<string, (number | null)[]>;
  places: number[]; // the place on the map of each example of the page
}

/** What a mixer is told, as `ConceptMixer` in Python writes it. */
interface MixerTable {
  n: number;
  names: string[];
  gram: number[][]; // cosines of the concepts
  weights: number[]; // to begin with
  subtitle: string;
  unit: string; // of the distances: "× null" where the column `spread` holds each example's null, or "spreads"
}

type MixerSource = Omit<Source, "table"> & {table: MixerTable};

/** The weights as Python has them. */
interface SharedWeights {
  get(): number[];
  set(weights: number[]): void;
  onChange(call: () => void): void;
}

/** One latent, as `latent_table` in Python writes it. */
interface LatentRow {
  latent: number;
  x: number; // between 0 and 1
  y: number;
  kind: 0 | 1 | 2; // novel, not beyond chance, dead
  values: (number | null)[]; // one for each column
}

/** The scatter and the table of latents; the highest score first, the dead last. */
interface LatentTable {
  title: string;
  subtitle: string;
  axes: [string, string];
  columns: string[];
  rows: LatentRow[];
  contour: [number, number][]; // corners of the noise floor, on the scale of x and y
  lines: {axis: "x" | "y"; at: number}[]; // below which a latent is beyond chance
  floor: string; // what contour and lines are, in words
}

/** A text on which a latent fires, with its codes in both models. */
interface LatentText {
  id: string;
  tokens: string[];
  base: number[];
  tuned: number[];
}

/** One of two results side by side; its scale colours tokens. */
interface MoverResult extends Scale {
  name: string;
  reading: string; // what a score above the centre means
  tokens: boolean; // whether it has token scores
}

/** Two results on the same examples, as `mover_table` in Python writes them. */
interface MoverTable {
  n: number;
  n_total: number;
  title: string;
  subtitle: string;
  results: [MoverResult, MoverResult];
  differs: [string, string, string][]; // field, what either card says
  words: EndWords; // of those that rose most and fell most
}

type MoverSource = Omit<Source, "table"> & {table: MoverTable};

/** Which part of a shift of a policy: ΔW, ΔW_X, ΔW_Y. */
type ShiftPart = "both" | "features" | "behaviour";

type ShiftOrder = "score" | "size" | "off" | "flag" | "file";

/** A feature of a policy with its weight and the weight's interval. */
interface ShiftFeature {
  name: string;
  weight: number;
  low: number;
  high: number;
}

/** What a page is told of shifts, as `shift_table` in Python writes it. */
interface ShiftTable {
  title: string;
  subtitle: string;
  verdict: string; // what the policy is worth
  figures: string;
  weak: boolean;
  unit: string;
  features: ShiftFeature[]; // the largest weight first
  ids: string[];
  scores: number[]; // ΔW·W of each example
  parts: [number, number][]; // of the score: by features, by behaviour
  targets?: string[]; // in a page: names of the features that training was meant to move
  row?: number; // in a page: the open example, -1 none
}

/** An example to read; `cut` characters were left out. */
interface ShiftText {
  turns: Turn[];
  cut: number;
}

/** Row and targets as Python has them. */
interface SharedShifts {
  get(): {row: number; targets: string[]};
  set(name: "row" | "targets", value: number | string[]): void;
  onChange(call: () => void): void;
}

/** What the heat map of shifts asks its view, and tells it. */
interface ShiftHeatCalls {
  value(row: number, column: number): number;
  limit(column: number): number;
  side(row: number): Child;
  corner(): Child;
  sort(): {by: ShiftOrder | number; down: boolean};
  isTarget(feature: number): boolean;
  onSort(by: number): void;
  onHover(row: number | null, column: number): void;
  onRow(row: number, column: number): void;
  onClick(): void;
}
