// The example browser: one view over a small data source, which is either a notebook's kernel or JSON in the page.
//
//   source.table                 names and sizes: methods, facets, query card, what can be done
//   source.column(name)          numbers of all examples, a typed array
//   source.snippets(places)      promise of [{prompt, response}] for the list
//   source.examples(places)      promise of [{place, row, id, turns, metadata}] to read
//   source.search(words)         promise of the places whose text holds all the words
//   source.groups()              promise of one group number for each example; near-duplicates share theirs
//   source.words(method)         promise of the words that tell a method's highest examples from its lowest
//   source.marks(), .notes(), .undoable()   decisions: 0 none, 1 keep, 2 drop; notes by place; what undo takes back
//   source.decide(…), .undo(), .export(path)   absent where nothing can be decided
//   source.askWords(place, words)   absent where nobody can be asked which data made some words of an answer
//   source.save(by), .ids(places)   in a page without a kernel: decisions as a file, ids to copy
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
  leading: Float64Array,
  half: Float64Array,
  move: Float64Array,
  spread: Float64Array,
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
 * A list that the page and Python share.
 * @param {WidgetModel} model
 * @param {string} name of the trait
 * @returns {SharedList}
 */
function sharedList(model, name) {
  /** @type {Set<() => void>} */
  const calls = new Set();
  const changed = () => calls.forEach(call => call());
  model.on(`change:${name}`, changed);
  return {
    get: () => model.get(name),
    set(values) {
      model.set(name, values);
      model.save_changes();
    },
    onChange: call => calls.add(call),
    close: () => model.off(`change:${name}`, changed),
  };
}

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
    words: async method => (await ask("ends", {method})).ends,
    marks: () => copied(model.get("marks"), Uint8Array),
    notes: () => model.get("notes"),
    undoable: () => model.get("undoable"),
    decide: values => act("decide", values),
    undo: () => act("undo", {}),
    export: path => ask("export", {path}),
    askWords: model.get("table").asks
      ? async (place, words) => (await ask("ask", {place, words})).asked
      : undefined,
    onChange: call => changed.add(call),
    onWaiting: call => waiting.add(call),
    close() {
      close();
      for (const name of ["marks", "notes", "undoable"]) model.off(`change:${name}`, notify);
    },
  };
}

const FRAMED = location.protocol === "about:"; // a notebook's frame has no address to hand on

/**
 * The end of a page's address that opens an example in it.
 * @param {{id: string}} example
 */
const exampleLink = example =>
  `#example=${encodeURIComponent(example.id.replace(/\p{Surrogate}/gu, "\ufffd"))}`;

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
  const nothing = {marks: () => new Uint8Array(n), notes: () => ({}), undoable: () => "", onChange() {}};
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
    words: data.words && (async method => /** @type {EndWords[]} */ (data.words)[method]),
    ids: places => places.map(place => data.examples[place].id),
    ...(data.review ? pageReview(data, data.review) : nothing),
    link: FRAMED ? undefined : place => exampleLink(data.examples[place]),
    onWaiting() {},
    close() {},
  };
}

/** The marks as the file of decisions spells them; their places are the numbers of the marks. */
const MARK_WORDS = ["", "keep", "drop"];

/**
 * Decisions in a page without a kernel, until they are saved as a file. `Review.load` in Python reads it, and so does
 * `concept-tda filter --decisions`.
 * @param {EmbeddedData} data
 * @param {object} head what the file says of the data, from `review_head` in Python
 */
function pageReview(data, head) {
  const marks = new Uint8Array(data.table.n),
    changed = new Set();
  /** @type {Record<number, string>} */
  const notes = {};
  /** @type {Record<number, {by: string, at: string, why: string}>} */
  const facts = {};
  /** @type {{action: string, rows: number[], at: string, why: string, undone?: boolean}[]} */
  const history = [];
  /** @type {{places: number[], marks: number[], notes: string[], facts: any[], entry: any}[]} */
  const before = [];
  let unsaved = false;
  const now = () => `${new Date().toISOString().slice(0, 19)}+00:00`;
  const rows = (/** @type {number[]} */ places) => places.map(place => Number(data.columns.row[place]));
  const tell = () => {
    unsaved = true;
    changed.forEach(call => call());
  };
  const put = (/** @type {any} */ store, /** @type {number} */ place, /** @type {any} */ value) => {
    if (value) store[place] = value;
    else delete store[place];
  };
  globalThis.addEventListener?.("beforeunload", event => {
    if (unsaved) event.preventDefault();
  });
  /** @param {Decision} decision */
  const words = ({mark, note}) =>
    [
      ...(mark === undefined ? [] : [["cleared", "kept", "dropped"][mark]]),
      ...(note === undefined ? [] : [note ? "noted" : "note removed"]),
    ].join(" and ");
  const counts = (/** @type {number[]} */ list) => `${list.length} example${list.length === 1 ? "" : "s"}`;
  return {
    marks: () => marks.slice(),
    notes: () => ({...notes}),
    undoable: () =>
      before.length ? `${before.at(-1)?.entry.action} ${counts(before.at(-1)?.places ?? [])}` : "",
    /** @param {Decision} decision */
    async decide(decision) {
      const {places, mark, note, why = "in the page"} = decision,
        at = now(),
        entry = {action: words(decision), rows: rows(places), at, why};
      before.push({
        places,
        entry,
        marks: places.map(place => marks[place]),
        notes: places.map(place => notes[place] ?? ""),
        facts: places.map(place => facts[place]),
      });
      history.push(entry);
      places.forEach(place => {
        if (mark !== undefined) marks[place] = mark;
        if (note !== undefined) put(notes, place, note);
        facts[place] = {by: "", at, why};
      });
      tell();
    },
    async undo() {
      const last = before.pop();
      if (!last) return;
      last.places.forEach((place, i) => {
        marks[place] = last.marks[i];
        put(notes, place, last.notes[i]);
        put(facts, place, last.facts[i]);
      });
      last.entry.undone = true;
      history.push({action: "undo", rows: rows(last.places), at: now(), why: `undid: ${last.entry.action}`});
      tell();
    },
    /**
     * The file of decisions as text.
     * @param {string} by
     */
    save(by) {
      const places = [...marks.keys()].filter(place => marks[place] || notes[place]),
        decisions = places.map(place => ({
          row: Number(data.columns.row[place]),
          id: data.examples[place].id,
          decision: MARK_WORDS[marks[place]],
          note: notes[place] ?? "",
          ...facts[place],
          by,
          score: data.columns.score0[place],
          rank: data.columns.rank0[place],
        }));
      unsaved = false;
      const told = history.map(entry => ({...entry, by}));
      return JSON.stringify({...head, written: now(), decisions, history: told}, null, 1);
    },
    onChange: (/** @type {() => void} */ call) => changed.add(call),
  };
}

/**
 * What the list shows of an example: the last question and the answer.
 * @param {Example} example
 */
function snippetOf(example) {
  /** @param {Turn | undefined} turn */
  const line = turn => (turn ? textOf(turn).slice(0, 800).replace(/\s+/g, " ").trim().slice(0, 240) : "");
  /** @param {boolean} wanted */
  const last = wanted => [...example.turns].reverse().find(turn => turn.answer === wanted);
  return {prompt: example.asked ?? line(last(false)), response: example.answered ?? line(last(true))};
}
