// The example browser: one view over a small data source, which is either a notebook's kernel or JSON in the page.
//
//   source.table                 names and sizes: methods, facets, query card, what can be done
//   source.column(name)          numbers of all examples, a typed array
//   source.snippets(places)      promise of [{prompt, response}] for the list
//   source.examples(places)      promise of [{place, row, id, turns, metadata}] to read
//   source.search(words)         promise of the places whose text holds all the words
//   source.groups()              promise of one group number for each example; near-duplicates share theirs
//   source.marks(), .notes(), .undoable()   decisions: 0 none, 1 keep, 2 drop; notes by place; what undo takes back
//   source.decide(…), .undo(), .export(path)   absent where nothing can be decided
//   source.onChange(call), .onWaiting(call), .close()
//
// A "place" is an example's position in the result; its row is its line in the training file.

const ROW = 74,
  END = 50,
  EDGE = 10,
  NONE = 0,
  KEEP = 1,
  DROP = 2,
  MIDDLE = -1;
const KINDS = {
  score: Float64Array,
  z: Float64Array,
  percentile: Float32Array,
  similar: Float32Array,
  rank: Int32Array,
  length: Int32Array,
  row: Int32Array,
  facet: Int16Array,
  class: Int16Array,
  x: Float32Array,
  y: Float32Array,
};
/** The text of a turn, out of its tokens where it has them.
 * @param {Turn} turn
 */
function textOf(turn) {
  return turn.text ?? (turn.tokens ?? []).join("");
}

/** @param {string} name such as `score1` */
const kindOf = name => KINDS[/** @type {keyof KINDS} */ (name.replace(/\d+$/, ""))];

/**
 * The words of a search: "a phrase" in quotes, -word for what must be absent. Lower case.
 * @param {string} words
 */
function searchTerms(words) {
  return [...words.toLowerCase().matchAll(/(-?)(?:"([^"]*)"?|(\S+))/g)]
    .map(([, minus, phrase, word]) => ({absent: minus === "-", text: phrase ?? word}))
    .filter(term => term.text);
}
/** @type {(text: string, terms: {absent: boolean, text: string}[]) => boolean} */
const found = (text, terms) => terms.every(term => text.includes(term.text) !== term.absent);

/**
 * A source that asks a notebook's kernel. The examples saved with the widget are there without one.
 * @param {WidgetModel} model
 * @returns {Source}
 */
function kernelSource(model) {
  const copies = new Map(),
    changed = new Set(),
    waiting = new Set();
  const {ask, close} = kernel(model, state => waiting.forEach(call => call(state)));
  /** @type {Example[]} */
  const kept = model.get("saved") ?? [];
  const saved = new Map(kept.map(example => [example.place, example]));
  /** @type {(bytes: DataView, kind: any) => any} */
  const copied = (bytes, kind) =>
    new kind(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength));
  let outstanding = 0;
  const notify = () => {
    if (!outstanding) changed.forEach(call => call());
  }; // a state on its way back may be older than the last click
  for (const name of ["marks", "notes", "undoable"]) model.on(`change:${name}`, notify);
  const act = async (/** @type {string} */ kind, /** @type {object} */ values) => {
    outstanding += 1;
    try {
      return await ask(kind, values);
    } finally {
      outstanding -= 1;
      notify();
    }
  };
  /** @type {(kind: string, places: number[], fromSaved: (example: Example) => any) => Promise<any[]>} */
  const some = async (kind, places, fromSaved) => {
    const missing = places.filter(place => !saved.has(place));
    /** @type {{place: number}[]} */
    const answers = missing.length ? (await ask(kind, {places: missing})).examples : [];
    const byPlace = new Map(answers.map(answer => [answer.place, answer]));
    return places.map(place => byPlace.get(place) ?? fromSaved(/** @type {Example} */ (saved.get(place))));
  };
  return {
    table: model.get("table"),
    column(name) {
      if (!copies.has(name)) copies.set(name, copied(model.get("columns")[name], kindOf(name)));
      return copies.get(name);
    },
    snippets: places => some("snippets", places, snippetOf),
    examples: places => some("examples", places, example => example),
    search: async words => copied((await ask("search", {words})).buffers[0], Int32Array),
    async groups() {
      const known = model.get("groups");
      return copied(known.byteLength ? known : (await ask("groups")).buffers[0], Int32Array);
    },
    marks: () => copied(model.get("marks"), Uint8Array),
    notes: () => model.get("notes"),
    undoable: () => model.get("undoable"),
    decide: values => act("decide", values),
    undo: () => act("undo", {}),
    export: path => ask("export", {path}),
    onChange: call => changed.add(call),
    onWaiting: call => waiting.add(call),
    close() {
      close();
      for (const name of ["marks", "notes", "undoable"]) model.off(`change:${name}`, notify);
    },
  };
}

/**
 * A source for a page without a kernel: everything is in `data`, as `embedded_browser` in Python writes it.
 * @param {EmbeddedData} data
 * @returns {Source}
 */
function embeddedSource(data) {
  const copies = new Map(),
    n = data.table.n;
  /** @param {Example} example */
  const words = example => example.turns.map(textOf).join("\n").toLowerCase();
  /** @type {string[] | null} */
  let texts = null;
  return {
    table: data.table,
    column(name) {
      if (!copies.has(name))
        copies.set(name, kindOf(name).from(data.columns[name].map(value => value ?? NaN)));
      return copies.get(name);
    },
    snippets: async places => places.map(place => snippetOf(data.examples[place])),
    examples: async places => places.map(place => ({...data.examples[place], place})),
    async search(query) {
      const all = (texts = texts ?? data.examples.map(words)),
        terms = searchTerms(query);
      return Int32Array.from(all.keys()).filter(place => found(all[place], terms));
    },
    groups: async () => Int32Array.from(data.groups),
    marks: () => new Uint8Array(n),
    notes: () => ({}),
    undoable: () => "",
    onChange() {},
    onWaiting() {},
    close() {},
  };
}

/**
 * What the list shows of an example: the last question and the answer.
 * @param {Example} example
 */
function snippetOf(example) {
  /** @param {Turn | undefined} turn */
  const line = turn =>
    turn
      ? textOf(turn)
          .slice(0, 800)
          .replace(/(<\|[^|]*\|>|<(start|end)_of_turn>)\s*(system|user|assistant|model)?\b/g, " ")
          .replace(/\s+/g, " ")
          .trim()
          .slice(0, 240)
      : "";
  /** @param {boolean} wanted */
  const last = wanted => [...example.turns].reverse().find(turn => turn.answer === wanted);
  return {prompt: line(last(false)), response: line(last(true))};
}
