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

const ROW = 74, END = 50, EDGE = 10, NONE = 0, KEEP = 1, DROP = 2, MIDDLE = -1;
const KINDS = {score: Float64Array, z: Float64Array, percentile: Float32Array, similar: Float32Array, rank: Int32Array, length: Int32Array, row: Int32Array, facet: Int16Array};
const kindOf = name => KINDS[name.replace(/\d+$/, "")];

/** The words of a search: "a phrase" in quotes, -word for what must be absent. Lower case. */
function searchTerms(words) {
  return [...words.toLowerCase().matchAll(/(-?)(?:"([^"]*)"?|(\S+))/g)]
    .map(([, minus, phrase, word]) => ({absent: minus === "-", text: phrase ?? word})).filter(term => term.text);
}
const found = (text, terms) => terms.every(term => text.includes(term.text) !== term.absent);

/** A source that asks a notebook's kernel. The examples saved with the widget are there without one. */
function kernelSource(model) {
  const copies = new Map(), changed = new Set(), waiting = new Set();
  const {ask, close} = kernel(model, state => waiting.forEach(call => call(state)));
  const saved = new Map((model.get("saved") ?? []).map(example => [example.place, example]));
  const copied = (bytes, kind) => new kind(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength));
  let outstanding = 0;
  const notify = () => { if (!outstanding) changed.forEach(call => call()); };   // a state on its way back may be older than the last click
  for (const name of ["marks", "notes", "undoable"]) model.on(`change:${name}`, notify);
  const act = async (kind, values) => {
    outstanding += 1;
    try { return await ask(kind, values); } finally { outstanding -= 1; notify(); }
  };
  const some = async (kind, places, fromSaved) => {
    const missing = places.filter(place => !saved.has(place));
    const answers = missing.length ? (await ask(kind, {places: missing})).examples : [];
    const byPlace = new Map(answers.map(answer => [answer.place, answer]));
    return places.map(place => byPlace.get(place) ?? fromSaved(saved.get(place)));
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
    undo: () => act("undo"),
    export: path => ask("export", {path}),
    onChange: call => changed.add(call),
    onWaiting: call => waiting.add(call),
    close() { close(); for (const name of ["marks", "notes", "undoable"]) model.off(`change:${name}`, notify); },
  };
}

/** A source for a page without a kernel: everything is in `data`, as `embedded_browser` in Python writes it. */
function embeddedSource(data) {
  const copies = new Map(), n = data.table.n;
  const words = example => example.turns.map(turn => turn.text ?? turn.tokens.join("")).join("\n").toLowerCase();
  let texts = null;
  return {
    table: data.table,
    column(name) {
      if (!copies.has(name)) copies.set(name, kindOf(name).from(data.columns[name], value => value ?? NaN));
      return copies.get(name);
    },
    snippets: async places => places.map(place => snippetOf(data.examples[place])),
    examples: async places => places.map(place => ({...data.examples[place], place})),
    async search(query) {
      texts = texts ?? data.examples.map(words);
      const terms = searchTerms(query);
      return Int32Array.from(texts.keys()).filter(place => found(texts[place], terms));
    },
    groups: async () => Int32Array.from(data.groups),
    marks: () => new Uint8Array(n),
    notes: () => ({}),
    undoable: () => "",
    onChange() {}, onWaiting() {}, close() {},
  };
}

/** What the list shows of an example: the last question and the answer. */
function snippetOf(example) {
  const line = turn => turn ? (turn.text ?? turn.tokens.join("")).slice(0, 800).replace(/(<\|[^|]*\|>|<(start|end)_of_turn>)\s*(system|user|assistant|model)?\b/g, " ").replace(/\s+/g, " ").trim().slice(0, 240) : "";
  const last = wanted => [...example.turns].reverse().find(turn => turn.answer === wanted);
  return {prompt: line(last(false)), response: line(last(true))};
}

/** Which examples pass, in which order: all that is decided about numbers, apart from any drawing. */
class Selection {
  constructor(source) {
    this.source = source;
    this.table = source.table;
    this.n = source.table.n;
    this.groups = null;
    this.reset();
    Object.assign(this, {method: 0, order: "high", against: null, fold: this.n <= this.table.fold_up_to, opened: false});
  }
  /** Forget all filters. */
  reset() { Object.assign(this, {brush: null, words: "", hits: null, facets: this.table.facets.map(() => new Set()), decided: "all", lengths: [null, null], gap: 0}); }

  get scores() { return this.source.column(`score${this.method}`); }
  get filtered() { return this.brush || this.hits || this.facets.some(chosen => chosen.size) || this.decided !== "all" || this.lengths.some(end => end !== null) || this.gap > 0; }

  /** How far the chosen order ranks each example above the other method, in percentile points. */
  gaps() {
    const here = this.source.column(`percentile${this.method}`), there = this.source.column(`percentile${this.against}`);
    const sign = this.order === "above" ? 1 : -1;
    return Float64Array.from(here, (value, place) => sign * (value - there[place]));
  }

  /** 1 for each example that passes all filters; `without` leaves out one of them, to count what it could give. */
  passing(without = null) {
    const pass = new Uint8Array(this.n).fill(1), {column} = this.source;
    const only = test => { for (let place = 0; place < this.n; place++) if (pass[place] && !test(place)) pass[place] = 0; };
    if (this.brush && without !== "brush") { const [low, high] = this.brush, scores = this.scores; only(place => scores[place] >= low && scores[place] <= high); }
    if (this.hits) { const hit = new Uint8Array(this.n); this.hits.forEach(place => { hit[place] = 1; }); only(place => hit[place]); }
    this.facets.forEach((chosen, number) => {
      if (!chosen.size || without === number) return;
      const codes = column(`facet${number}`);
      only(place => chosen.has(codes[place]));
    });
    if (this.decided !== "all") {
      const marks = this.source.marks(), notes = this.source.notes(), wanted = {undecided: NONE, keep: KEEP, drop: DROP}[this.decided];
      only(this.decided === "noted" ? place => place in notes : place => marks[place] === wanted);
    }
    const [shortest, longest] = this.lengths;
    if (shortest !== null || longest !== null) { const lengths = column("length"); only(place => lengths[place] >= (shortest ?? 0) && lengths[place] <= (longest ?? Infinity)); }
    if (this.against !== null && this.gap > 0) { const gaps = this.gaps(); only(place => gaps[place] >= this.gap); }
    return pass;
  }

  /** Numbers to sort by, the largest first. */
  keys() {
    const {column} = this.source, flip = values => Float64Array.from(values, value => -value);
    if (this.against !== null) return this.gaps();
    switch (this.order) {
      case "low": return flip(this.scores);
      case "strong": return Float64Array.from(this.scores, Math.abs);
      case "similar": return column("similar");
      case "z": return column("z");
      case "long": return column("length");
      case "short": return flip(column("length"));
      case "file": return flip(column("row"));
      default: return this.scores;
    }
  }

  /** Everything the drawing needs: places in order (folded, with a gap between the ends), and the counts. */
  view() {
    const pass = this.passing(), keys = this.keys(), all = [];
    for (let place = 0; place < this.n; place++) if (pass[place]) all.push(place);
    all.sort((a, b) => keys[b] - keys[a] || a - b);
    const {shown, members} = this.folded(all);
    const middle = !this.opened && shown.length > 2 * END + 20 && this.against === null && ["high", "low"].includes(this.order);
    const rows = middle ? [...shown.slice(0, END), MIDDLE, ...shown.slice(-END)] : shown;
    return {pass, all, rows, members, hidden: middle ? shown.length - 2 * END : 0, folded: all.length - shown.length};
  }

  /** The first of each group of near-duplicates in the given order, and whom it stands for. */
  folded(all) {
    if (!this.fold || !this.groups) return {shown: all, members: new Map()};
    const first = new Map(), members = new Map();
    for (const place of all) {
      const group = this.groups[place];
      if (!first.has(group)) first.set(group, place);
      else members.set(first.get(group), [...(members.get(first.get(group)) ?? []), place]);
    }
    return {shown: all.filter(place => first.get(this.groups[place]) === place), members};
  }

  /** The filters in words, for the record of a decision in bulk. */
  inWords() {
    const {methods, facets} = this.table, parts = [];
    if (this.brush) parts.push(`${methods[this.method].name} from ${general(this.brush[0])} to ${general(this.brush[1])}`);
    if (this.words) parts.push(`search ${this.words}`);
    this.facets.forEach((chosen, number) => { if (chosen.size) parts.push(`${facets[number].name}: ${[...chosen].map(code => facets[number].values[code]).join(" or ")}`); });
    if (this.decided !== "all") parts.push(this.decided);
    if (this.lengths.some(end => end !== null)) parts.push(`length from ${this.lengths[0] ?? 0} to ${this.lengths[1] ?? "any"} ${this.table.length_unit}`);
    if (this.against !== null && this.gap > 0) parts.push(`${methods[this.method].name} ${this.gap} percentile points ${this.order === "above" ? "above" : "below"} ${methods[this.against].name}`);
    return parts.join("; ") || "no filter";
  }
}

/** Histogram of all scores; the part that passes is in colour; a range can be brushed with pointer or arrow keys. */
class Histogram {
  constructor(onBrush) {
    this.onBrush = onBrush;
    this.bars = svg("svg", {role: "img", preserveAspectRatio: "none", height: 84});
    this.range = el("div", {class: "range", hidden: true});
    this.handles = [0, 1].map(side => el("button", {type: "button", class: "handle", role: "slider", "aria-label": side ? "Highest score shown" : "Lowest score shown", onkeydown: event => this.nudge(event, side)}));
    this.chart = el("div", {class: "chart", title: "Drag to show only a range of scores"}, this.bars, this.range, ...this.handles);
    this.ends = el("div", {class: "ends quiet"});
    this.node = el("div", {class: "histogram"}, this.chart, this.ends);
    this.chart.addEventListener("pointerdown", event => this.press(event));
    new ResizeObserver(() => this.values && this.draw()).observe(this.chart);
  }
  set(values, pass, brush, label, centre) { Object.assign(this, {values, pass, brush, label, centre}); this.draw(); }
  x(value) { return this.span ? (value - this.low) / this.span : .5; }
  value(x) { return x >= 1 ? this.high : this.low + this.span * Math.max(0, x); }

  draw() {
    const {values, pass} = this, width = this.chart.clientWidth || 600, bins = Math.max(20, Math.min(80, Math.floor(width / 9)));
    if (values !== this.measured) {
      this.measured = values;
      this.low = Infinity; this.high = -Infinity;
      for (const value of values) { if (value < this.low) this.low = value; if (value > this.high) this.high = value; }
      this.span = this.high - this.low;
    }
    const all = new Uint32Array(bins), some = new Uint32Array(bins);
    values.forEach((value, place) => { const bin = Math.min(bins - 1, Math.floor(bins * this.x(value))); all[bin] += 1; some[bin] += pass[place]; });
    const tallest = Math.max(...all), height = count => count ? Math.max(2, 78 * count / tallest) : 0;
    this.bars.setAttribute("viewBox", `0 0 ${width} 84`);
    this.bars.setAttribute("aria-label", `Histogram of ${whole(values.length)} ${this.label} from ${general(this.low)} to ${general(this.high)}`);
    const bar = (bin, count, kind) => svg("rect", {class: kind, x: (bin * width / bins + .5).toFixed(1), y: (84 - height(count)).toFixed(1), width: Math.max(1, width / bins - 1).toFixed(1), height: height(count).toFixed(1)});
    const drawn = [];
    for (let bin = 0; bin < bins; bin++) {
      if (all[bin]) drawn.push(bar(bin, all[bin], "all"));
      if (some[bin]) drawn.push(bar(bin, some[bin], this.centre === null ? "plain" : this.low + this.span * (bin + .5) / bins > this.centre ? "more" : "less"));
    }
    const {centre} = this, at = centre === null ? -1 : this.x(centre);
    if (at > 0 && at < 1) drawn.push(svg("line", {x1: at * width, x2: at * width, y1: 0, y2: 84, class: "zero"}));
    this.bars.replaceChildren(...drawn);
    const zero = at > .15 && at < .85 ? el("span", {class: "at-zero"}, centre === 0 ? "0" : `mean ${general(centre)}`) : null;
    if (zero) zero.style.insetInlineStart = `${100 * at}%`;
    this.ends.replaceChildren(el("span", {}, signed(this.low)), ...(zero ? [zero] : []), el("span", {}, signed(this.high)));
    this.drawBrush();
  }
  drawBrush() {
    const [from, to] = this.brush ?? [this.low, this.high];
    this.range.hidden = !this.brush;
    this.range.style.left = `${100 * this.x(from)}%`;
    this.range.style.width = `${100 * (this.x(to) - this.x(from))}%`;
    [from, to].forEach((value, side) => {
      const handle = this.handles[side];
      handle.style.left = `${100 * (this.span ? this.x(value) : side)}%`;
      handle.setAttribute("aria-valuemin", this.low);
      handle.setAttribute("aria-valuemax", this.high);
      handle.setAttribute("aria-valuenow", value);
      handle.setAttribute("aria-valuetext", general(value));
    });
  }
  change(from, to) {
    this.brush = from <= this.low && to >= this.high ? null : [from, to];
    this.drawBrush();
    this.onBrush(this.brush);
  }
  press(event) {
    if (event.button) return;
    const box = this.chart.getBoundingClientRect(), edge = x => x < 6 ? 0 : x > box.width - 6 ? box.width : x, at = moved => this.value(edge(moved.clientX - box.left) / box.width);
    const side = this.handles.indexOf(event.target), start = side < 0 ? at(event) : (this.brush ?? [this.low, this.high])[1 - side], from = event.clientX;
    let far = side >= 0;
    const move = moved => {
      far = far || Math.abs(moved.clientX - from) > 3;
      if (far) this.change(Math.min(start, at(moved)), Math.max(start, at(moved)));
    };
    const stop = () => {
      this.chart.removeEventListener("pointermove", move);
      if (!far && this.brush) this.change(this.low, this.high);   // a click without a drag takes the brush away
    };
    this.chart.setPointerCapture(event.pointerId);
    this.chart.addEventListener("pointermove", move);
    this.chart.addEventListener("pointerup", stop, {once: true});
    this.chart.addEventListener("pointercancel", stop, {once: true});
    if (side < 0) event.preventDefault();
  }
  nudge(event, side) {
    const step = {ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -10, PageUp: 10}[event.key];
    if (!step && event.key !== "Escape") return;
    event.preventDefault();
    event.stopPropagation();
    if (!step) return this.change(this.low, this.high);
    const ends = [...(this.brush ?? [this.low, this.high])];
    ends[side] = Math.max(this.low, Math.min(this.high, ends[side] + step * this.span / 100));
    if (ends[0] <= ends[1]) this.change(...ends);
  }
}

/** Every example as a point: the shown method's score across, as in the histogram above it, another method's rank or score up. A click chooses the example. */
class Scatter {
  constructor(source, {onPick, onChange}) {
    Object.assign(this, {source, onPick, other: null, up: "rank", shown: null});
    const option = (value, words) => el("option", {value}, words);
    this.otherPick = el("select", {"aria-label": "Method to compare with", onchange: () => { this.other = Number(this.otherPick.value); onChange(); }});
    this.upPick = el("select", {"aria-label": "Rank or score of the other method", onchange: () => { this.up = this.upPick.value; onChange(); }}, option("rank", "rank"), option("score", "score"));
    this.across = el("span", {class: "quiet grow-text"});
    this.canvas = el("canvas", {role: "img"});
    this.spot = el("span", {class: "spot", "aria-hidden": "true", hidden: true});
    this.plot = el("div", {class: "plot", onclick: event => this.pick(event), onpointermove: event => this.hover(event), onpointerleave: () => this.tell(null)}, this.canvas, this.spot);
    this.top = el("span", {});
    this.bottom = el("span", {});
    this.readout = el("span", {class: "told", dir: "auto"});
    this.node = el("details", {class: "scatter", ontoggle: () => this.drawSoon()}, el("summary", {}, "Two methods, example by example"),
      el("div", {class: "line"}, el("label", {}, el("span", {class: "name"}, "Up "), this.upPick), el("label", {}, el("span", {class: "name"}, "by "), this.otherPick), this.across),
      el("div", {class: "quiet"}, this.top), this.plot, el("div", {class: "quiet under"}, this.bottom, this.readout));
    new ResizeObserver(() => this.drawSoon()).observe(this.plot);
  }

  /** What to draw; another method is taken where the one beside is the one shown. */
  set(method, pass) {
    Object.assign(this, {method, pass});
    const {methods} = this.source.table;
    if (this.other === null || this.other === method) this.other = method === 0 ? 1 : 0;
    this.otherPick.replaceChildren(...methods.flatMap((one, number) => number === method ? [] : [el("option", {value: number}, one.name)]));
    this.otherPick.value = String(this.other);
    const column = name => this.source.column(name), ends = values => values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
    this.acrossValues = column(`score${method}`);
    this.upValues = column(`${this.up}${this.other}`);
    [this.left, this.right] = ends(this.acrossValues);
    [this.low, this.high] = ends(this.upValues);
    const name = methods[this.other].name, number = value => this.up === "rank" ? `rank ${whole(value)}` : signed(value);
    this.across.replaceChildren("Across: score by ", el("bdi", {}, methods[method].name), ". Click a point to read it; by keyboard, take an order “where methods disagree”.");
    this.top.replaceChildren("▲ ", el("bdi", {}, name), ` ${number(this.up === "rank" ? this.low : this.high)}`);
    this.bottom.replaceChildren("▼ ", el("bdi", {}, name), ` ${number(this.up === "rank" ? this.high : this.low)}`);
    this.canvas.setAttribute("aria-label", `Scatter of ${counted(this.acrossValues.length, "example")}: score by ${methods[method].name} across, ${this.up} by ${name} up`);
    this.drawSoon();
  }

  x(place) { const share = this.right > this.left ? (this.acrossValues[place] - this.left) / (this.right - this.left) : .5; return Math.max(this.radius, Math.min(this.width - this.radius, share * this.width)); }
  y(place) {
    const share = this.high > this.low ? (this.upValues[place] - this.low) / (this.high - this.low) : .5;
    return EDGE + (this.up === "rank" ? share : 1 - share) * (this.height - 2 * EDGE);
  }

  drawSoon() { this.frame = this.frame ?? requestAnimationFrame(() => { this.frame = null; this.draw(); }); }
  draw() {
    this.width = this.plot.clientWidth;
    this.height = this.plot.clientHeight;
    if (!this.width || !this.acrossValues) return;
    const dots = window.devicePixelRatio || 1, pen = this.canvas.getContext("2d"), n = this.acrossValues.length, style = getComputedStyle(this.plot);
    this.radius = n <= 500 ? 3.5 : n <= 3000 ? 2.5 : 1.5;
    this.canvas.width = Math.round(this.width * dots);
    this.canvas.height = Math.round(this.height * dots);
    pen.scale(dots, dots);
    const solid = n <= 500 ? .85 : .6, colours = {more: `rgba(${style.getPropertyValue("--more")},${solid})`, less: `rgba(${style.getPropertyValue("--less")},${solid})`};
    const point = place => {
      const x = this.x(place), y = this.y(place), r = this.radius;
      if (n > 2000) return pen.fillRect(x - r, y - r, 2 * r, 2 * r);   // circles of 10,000 points are slow, and too small to tell from squares
      pen.beginPath();
      pen.arc(x, y, r, 0, 2 * Math.PI);
      pen.fill();
    };
    pen.fillStyle = "rgba(128,128,128,.35)";   // reads on light and on dark ground
    const {centre} = this.source.table.methods[this.method], middle = centre ?? -Infinity;
    if (this.left < middle && this.right > middle) pen.fillRect(this.width * (middle - this.left) / (this.right - this.left), 0, 1, this.height);
    for (let place = 0; place < n; place++) if (!this.pass[place]) point(place);
    for (const sign of ["less", "more"]) {
      pen.fillStyle = centre === null ? "rgb(128,128,128)" : colours[sign];
      for (let place = 0; place < n; place++) if (this.pass[place] && this.acrossValues[place] > middle === (sign === "more")) point(place);
    }
    this.mark(this.shown);
  }

  /** Put the ring around an example's point. */
  mark(place) {
    this.shown = place;
    this.spot.hidden = place === null || place === MIDDLE || !this.width;
    if (this.spot.hidden) return;
    this.spot.style.left = `${this.x(place)}px`;
    this.spot.style.top = `${this.y(place)}px`;
  }

  /** The example nearest to the pointer among those that pass the filters, or null. */
  nearest(event, reach = 14) {
    if (!this.width) return null;
    const box = this.plot.getBoundingClientRect(), x = event.clientX - box.left - this.plot.clientLeft, y = event.clientY - box.top - this.plot.clientTop;
    let best = null, least = reach * reach;
    for (let place = 0; place < this.acrossValues.length; place++) {
      if (!this.pass[place]) continue;
      const far = (this.x(place) - x) ** 2 + (this.y(place) - y) ** 2;
      if (far < least) { best = place; least = far; }
    }
    return best;
  }
  pick(event) { const place = this.nearest(event); if (place !== null) this.onPick(place); }
  hover(event) {
    const place = this.nearest(event);
    this.plot.classList.toggle("on-point", place !== null);
    this.tell(place);
  }
  tell(place) {
    if (place === this.told) return;
    this.told = place;
    clearTimeout(this.telling);
    if (place === null) return this.readout.replaceChildren();
    const {column} = this.source, words = `row ${whole(column("row")[place])} · ${signed(this.acrossValues[place])} (rank ${whole(column(`rank${this.method}`)[place])}) · other: ${signed(column(`score${this.other}`)[place])} (rank ${whole(column(`rank${this.other}`)[place])})`;
    this.readout.replaceChildren(words);
    this.telling = setTimeout(async () => {
      try { const [{response}] = await this.source.snippets([place]); if (this.told === place) this.readout.append(" · ", el("bdi", {}, response)); } catch { /* a kernel that is gone: the numbers stay */ }
    }, 80);
  }
}

/** The whole view. */
class ExampleView {
  constructor(root, source) {
    this.source = source;
    this.table = source.table;
    this.select = new Selection(source);
    this.id = `ctda-${Math.random().toString(36).slice(2, 8)}`;
    this.snippets = new Map();
    this.examples = new Map();
    this.chosen = new Set();
    this.cursor = null;
    this.canDecide = Boolean(source.decide);
    this.build(root);
    source.onChange(() => { this.marks = source.marks(); this.update(); this.showExample(); });
    source.onWaiting(state => { this.waiting.hidden = !state; });
    this.marks = source.marks();
    this.update();
    this.cursor = this.view.rows[0] ?? null;
    this.draw();
    this.showExample();
    if (this.select.fold) this.loadGroups();
  }

  // ---- building -------------------------------------------------------------------------------------------------------------

  build(root) {
    const {table} = this;
    this.histogram = new Histogram(brush => { this.select.brush = brush; this.filtersChanged(true); });
    this.scatter = table.methods.length > 1 ? new Scatter(this.source, {onPick: place => { this.reveal(place); if (this.root.clientWidth < 720) this.reading.scrollIntoView({block: "nearest"}); }, onChange: () => this.scatter.set(this.select.method, this.view.pass)}) : null;
    this.search = el("input", {type: "search", placeholder: "words, \"a phrase\", -without", "aria-label": "Search in prompts and responses", oninput: () => this.searchSoon()});
    this.status = el("span", {role: "status", "aria-live": "polite"});
    this.waiting = el("span", {class: "waiting", hidden: true}, "Waiting for the kernel: it is busy, or this page has none.");
    this.problem = el("p", {class: "problem", role: "alert", hidden: true});
    this.list = el("div", {class: "rows", id: this.id, role: "listbox", tabindex: "0", "aria-multiselectable": "true", "aria-label": "Examples", onscroll: () => this.drawSoon(), onkeydown: event => this.key(event)});
    this.spacer = el("div", {class: "spacer", role: "presentation"});
    this.list.append(this.spacer);
    this.reading = el("article", {class: "reading", "aria-label": "The chosen example"});
    this.actions = el("div", {class: "actions"});
    this.help = this.buildHelp();
    this.root = el("section", {class: "ctda-view", "aria-label": `Example browser: ${table.title}`, "data-lm-suppress-shortcuts": "true", "data-jp-suppress-context-menu": true, onkeydown: event => this.anywhere(event)},
      el("div", {class: "inside"}, this.buildHead(), this.histogram.node, this.buildControls(), this.problem,
        this.scatter?.node ?? "", el("div", {class: "statusline"}, this.status, this.waiting, this.actions),
        el("div", {class: "panes"}, el("div", {class: "left"}, this.buildEnds(), this.list), this.reading), this.buildFoot(), this.help));
    root.replaceChildren(this.root);
    new ResizeObserver(() => this.drawSoon()).observe(this.list);
  }

  /** What the sign of the shown method's scores means; a method without one has no colours to explain. */
  drawSign() {
    const {table, select} = this, method = table.methods[select.method];
    const key = method.zero === "gradient" ? [el("span", {class: "key more"}, "orange"), " above zero, ", el("span", {class: "key less"}, "blue"), " below. "]
      : method.centre !== null ? [el("span", {class: "key more"}, "orange"), " above the mean, ", el("span", {class: "key less"}, "blue"), " below. "] : [];
    this.sign.replaceChildren(el("bdi", {}, method.name), ": ", el("bdi", {}, method.reading), " ", ...key);
  }
  /** "more", "less" or, without a sign, "plain". */
  side(score) {
    const {centre} = this.table.methods[this.select.method];
    return centre === null ? "plain" : score > centre ? "more" : "less";
  }
  /** The distance from the centre in spreads, or the raw score where there is no centre. */
  distance(score, method = this.select.method) {
    const {centre, spread} = this.table.methods[method];
    return centre === null || spread === null ? general(score) : `${signed((score - centre) / spread, 3)} spreads`;
  }

  buildHead() {
    const {table} = this;
    this.sign = el("p", {class: "sign"});
    return el("header", {}, el("h3", {}, el("bdi", {}, table.title)), el("p", {class: "quiet"}, el("bdi", {}, table.subtitle)),
      this.sign, el("p", {class: "reading-note"}, table.reading),
      el("details", {}, el("summary", {}, "Query card: what was computed"), facts(table.card)));
  }

  buildControls() {
    const {table} = this, option = (value, words, chosen = false) => { const node = el("option", {value}, words); node.selected = chosen; return node; };
    const others = table.methods.map((method, number) => [method.name, number]);
    this.methodPick = el("select", {"aria-label": "Method", onchange: () => this.pickMethod(Number(this.methodPick.value))}, others.map(([name, number]) => option(number, name, number === 0)));
    this.orderPick = el("select", {"aria-label": "Order", onchange: () => this.pickOrder(this.orderPick.value)});
    this.fillOrders();
    this.gapPick = el("input", {type: "number", min: 0, max: 100, step: 5, value: "0", "aria-label": "Smallest difference in percentile points", oninput: () => { this.select.gap = Number(this.gapPick.value) || 0; this.filtersChanged(); }});
    this.gapBox = el("label", {hidden: true}, "by at least ", this.gapPick, " percentile points");
    const ends = [0, 1].map(side => el("input", {type: "number", min: 0, placeholder: side ? whole(table.lengths[1]) : whole(table.lengths[0]), "aria-label": side ? "Longest" : "Shortest",
      oninput: event => { this.select.lengths[side] = event.target.value === "" ? null : Number(event.target.value); this.filtersChanged(); }}));
    this.lengthPicks = ends;
    this.foldPick = el("input", {type: "checkbox", checked: this.select.fold, onchange: () => { this.select.fold = this.foldPick.checked; this.select.fold ? this.loadGroups() : this.filtersChanged(); }});
    this.decidedPick = el("select", {"aria-label": "Decisions", onchange: () => { this.select.decided = this.decidedPick.value; this.filtersChanged(); }},
      [["all", "all decisions"], ["undecided", "undecided"], ["drop", "dropped"], ["keep", "kept"], ["noted", "with a note"]].map(([value, words]) => option(value, words)));
    this.facetBox = el("div", {class: "facets"});
    this.lengthNote = el("span", {class: "quiet"});
    const filters = el("details", {class: "filters"}, el("summary", {}, "Filters: labels, metadata, length"),
      el("p", {}, el("label", {}, `length in ${table.length_unit} from `, ends[0]), el("label", {}, " to ", ends[1]), " ", this.lengthNote),
      this.facetBox);
    filters.open = table.facets.length > 0 && table.n_open_facets > 0;
    return el("div", {class: "controls"},
      el("div", {class: "line"}, el("label", {class: "grow"}, el("span", {class: "name"}, "Search "), this.search),
        table.methods.length > 1 ? el("label", {}, el("span", {class: "name"}, "Method "), this.methodPick) : null,
        el("label", {}, el("span", {class: "name"}, "Order "), this.orderPick), this.gapBox,
        this.canDecide ? el("label", {}, el("span", {class: "name"}, "Show "), this.decidedPick) : null,
        el("label", {class: "tick"}, this.foldPick, " fold near-duplicates")), filters);
  }

  /** Straight to either end of the list. */
  buildEnds() {
    this.toTop = el("button", {type: "button", onclick: () => this.moveTo(0)});
    this.toBottom = el("button", {type: "button", onclick: () => this.moveTo(this.view.rows.length - 1)});
    return el("div", {class: "both-ends"}, this.toTop, this.toBottom);
  }

  fillOrders() {
    const {table, select} = this, here = table.methods[select.method].name;
    const option = (value, words) => { const node = el("option", {value}, words); node.selected = value === this.orderValue(); return node; };
    const plain = [["high", "highest score first"], ["low", "lowest score first"], ["strong", "strongest either way"], ["similar", "high for its length"],
      ...(table.has_z ? [["z", "highest z first"]] : []), ["long", "longest first"], ["short", "shortest first"], ["file", "as in the file"]];
    const groups = [el("optgroup", {label: "by this method"}, plain.map(pair => option(...pair)))];
    const others = table.methods.map((method, number) => [method.name, number]).filter(([, number]) => number !== select.method);
    if (others.length) groups.push(el("optgroup", {label: "where methods disagree"}, others.flatMap(([name, number]) =>
      [option(`above-${number}`, `high for ${here}, low for ${name}`), option(`below-${number}`, `low for ${here}, high for ${name}`)])));
    this.orderPick.replaceChildren(...groups);
  }
  orderValue() { return this.select.against === null ? this.select.order : `${this.select.order}-${this.select.against}`; }

  buildFoot() {
    if (!this.canDecide) return null;
    this.exportPath = el("input", {value: this.table.export_path, "aria-label": "File to write", spellcheck: "false"});
    this.exported = el("p", {class: "quiet", role: "status"});
    return el("footer", {}, el("label", {}, "Write the data set without what was dropped to ", this.exportPath),
      el("button", {type: "button", onclick: () => this.exportNow()}, "Export"), this.exported);
  }

  buildHelp() {
    const keys = [["↑ ↓", "move"], ["Page up, Page down, Home, End", "move far"], ["/", "search"], ...(this.canDecide ? [["d", "drop"], ["k", "keep"], ["c", "clear the decision"], ["n", "write a note"], ["x", "select, for decisions in bulk"],
      ["Shift + ↑ ↓", "select as you move"], ["z", "undo"]] : []), ["← →", "in a text with token scores: read token by token"], ["Esc", "back to the list, or clear the selection"]];
    return el("details", {class: "help"}, el("summary", {}, "Keys"), facts(keys));
  }

  // ---- state ----------------------------------------------------------------------------------------------------------------

  pickMethod(method) {
    const {select} = this;
    select.method = method;
    select.brush = null;
    if (select.against === method) Object.assign(select, {against: null, order: "high", gap: 0});
    if ((select.order === "similar" || select.order === "z") && method !== 0) select.order = "high";
    this.fillOrders();
    this.filtersChanged();
  }
  pickOrder(value) {
    const [order, against] = value.split("-"), {select} = this;
    Object.assign(select, {order, against: against === undefined ? null : Number(against)});
    if (select.against === null) { select.gap = 0; this.gapPick.value = "0"; }
    else this.scatter.other = select.against;
    if (order === "similar" || order === "z") { select.method = 0; this.methodPick.value = "0"; }
    this.filtersChanged();
    this.first();
  }
  first() { this.list.scrollTop = 0; this.moveTo(0, false); }

  searchSoon() {
    clearTimeout(this.searching);
    this.searching = setTimeout(() => this.runSearch(), 120);
  }
  async runSearch() {
    const words = this.search.value.trim();
    this.select.words = words;
    if (!searchTerms(words).length) this.select.hits = null;
    else {
      try { const hits = await this.source.search(words); if (this.select.words !== words) return; this.select.hits = hits; }
      catch (error) { return this.fail(error); }
    }
    this.filtersChanged();
  }
  async loadGroups() {
    try { this.select.groups = this.select.groups ?? await this.source.groups(); } catch (error) { return this.fail(error); }
    this.update();
    this.showExample();
  }
  fail(error) { this.problem.textContent = error.message; this.problem.hidden = false; }

  filtersChanged(brushing = false) {
    this.update(brushing);
    if (!this.view.rows.includes(this.cursor)) { this.cursor = this.view.rows[0] ?? null; this.list.scrollTop = 0; this.draw(); this.showExample(); }
  }
  clearFilters() {
    this.select.reset();
    this.search.value = "";
    this.gapPick.value = "0";
    this.decidedPick.value = "all";
    this.lengthPicks.forEach(pick => { pick.value = ""; });
    this.filtersChanged();
  }

  /** Work out anew what passes, and draw everything but the example. */
  update(brushing = false) {
    const {select, table} = this;
    this.view = select.view();
    this.gapBox.hidden = select.against === null;
    if (!brushing) this.histogram.set(select.scores, this.view.pass, select.brush, `scores of ${table.methods[select.method].name}`, table.methods[select.method].centre);
    else { this.histogram.pass = this.view.pass; this.histogram.draw(); }
    this.scatter?.set(select.method, this.view.pass);
    this.drawSign();
    this.drawFacets();
    this.drawStatus();
    this.draw();
  }

  drawStatus() {
    const {view, select, table} = this, n = view.all.length;
    const decided = [[DROP, "dropped"], [KEEP, "kept"]].map(([mark, word]) => [this.marks.reduce((sum, value) => sum + (value === mark), 0), word]).filter(([count]) => count).map(([count, word]) => `${whole(count)} ${word}`);
    this.status.textContent = [select.filtered ? `${whole(n)} of ${counted(table.n, "example")} shown` : counted(table.n, "example"), view.folded ? `${whole(view.folded)} near-duplicates folded` : "", ...decided].filter(Boolean).join(" · ");
    this.lengthNote.textContent = `Score and length agree with Spearman ${signed(table.methods[select.method].length_spearman, 2)}.`;
    const button = (words, act, more = {}) => el("button", {type: "button", onclick: act, ...more}, words), parts = [];
    if (select.filtered) parts.push(button("Clear filters", () => this.clearFilters()));
    if (this.canDecide) {
      const places = this.chosen.size ? [...this.chosen] : select.filtered ? view.all : [];
      if (places.length) {
        const what = this.chosen.size ? `${whole(places.length)} selected` : `all ${whole(places.length)} shown`;
        parts.push(el("span", {class: "bulk", role: "group", "aria-label": `Decide about ${what}`}, el("span", {class: "quiet"}, `${what}: `),
          button("Drop", () => this.decide(places, DROP, this.bulkReason(places)), {class: "drop"}), button("Keep", () => this.decide(places, KEEP, this.bulkReason(places)), {class: "keep"}),
          button("Clear", () => this.decide(places, NONE, this.bulkReason(places))), button("Note…", () => this.bulkNote(places))));
      }
      if (this.chosen.size) parts.push(button("Select none", () => { this.chosen.clear(); this.update(); }));
      const undoable = this.source.undoable();
      if (undoable) parts.push(button(`Undo: ${undoable}`, () => this.undo()));
    }
    this.actions.replaceChildren(...parts);
    const ends = select.against !== null ? ["largest difference", "smallest"] : {high: ["highest", "lowest"], low: ["lowest", "highest"], strong: ["strongest", "weakest"], similar: ["highest for its length", "lowest"], z: ["highest z", "lowest z"],
      long: ["longest", "shortest"], short: ["shortest", "longest"], file: ["first row", "last row"]}[select.order];
    this.toTop.textContent = `▲ ${ends[0]}`;
    this.toBottom.textContent = `▼ ${ends[1]}`;
  }
  bulkReason(places) { return this.chosen.size ? `one of ${counted(places.length, "example")} selected by hand` : `one of all ${whole(places.length)} shown by: ${this.select.inWords()}`; }

  drawFacets() {
    const {table, select} = this, top = this.source.column("percentile0");
    const boxes = table.facets.map((facet, number) => {
      const codes = this.source.column(`facet${number}`), pass = select.passing(number), counts = new Uint32Array(facet.values.length), high = new Uint32Array(facet.values.length), total = new Uint32Array(facet.values.length);
      codes.forEach((code, place) => { if (code >= 0) { total[code] += 1; high[code] += top[place] >= 90; if (pass[place]) counts[code] += 1; } });
      return el("fieldset", {}, el("legend", {}, el("bdi", {}, facet.name)), facet.values.map((value, code) => {
        const share = total[code] ? high[code] / total[code] : 0, bar = el("span", {class: "share", title: `${whole(high[code])} of ${whole(total[code])} are in the highest tenth by ${table.methods[0].name}`});
        bar.style.setProperty("--share", `${Math.min(100, 100 * share).toFixed(0)}%`);
        return el("label", {class: counts[code] ? "" : "empty"}, el("input", {type: "checkbox", checked: select.facets[number].has(code), "data-facet": number, "data-code": code,
          onchange: event => { event.target.checked ? select.facets[number].add(code) : select.facets[number].delete(code); this.filtersChanged(); this.root.querySelector(`input[data-facet="${number}"][data-code="${code}"]`)?.focus(); }}),
        el("bdi", {class: "value"}, value), el("span", {class: "quiet count"}, whole(counts[code])), bar);
      }));
    });
    this.facetBox.replaceChildren(...boxes, ...(boxes.length ? [el("p", {class: "quiet"}, "Beside each value: how many examples, and (bar) the share of them in the highest tenth; chance is one tenth, the tick.")] : []));
  }

  // ---- the list -------------------------------------------------------------------------------------------------------------

  drawSoon() { this.frame = this.frame ?? requestAnimationFrame(() => { this.frame = null; this.draw(); }); }

  draw() {
    const {rows} = this.view, height = this.list.clientHeight || 480;
    this.spacer.style.height = `${rows.length * ROW}px`;
    const from = Math.max(0, Math.floor(this.list.scrollTop / ROW) - 3), to = Math.min(rows.length, Math.ceil((this.list.scrollTop + height) / ROW) + 3);
    const drawn = [], missing = [];
    for (let at = from; at < to; at++) {
      const row = rows[at] === MIDDLE ? this.gapRow(at) : this.exampleRow(at);
      row.style.top = `${at * ROW}px`;
      row.id = `${this.id}-${rows[at]}`;
      if (rows[at] !== MIDDLE && !this.snippets.has(rows[at])) missing.push(rows[at]);
      drawn.push(row);
    }
    if (!rows.length) drawn.push(el("p", {class: "nothing quiet"}, "No example passes these filters."));
    this.spacer.replaceChildren(...drawn);
    this.scatter?.mark(this.cursor);
    if (this.cursor !== null && this.spacer.querySelector(".current")) this.list.setAttribute("aria-activedescendant", `${this.id}-${this.cursor}`);
    else this.list.removeAttribute("aria-activedescendant");
    if (missing.length) this.fetchSnippets(missing);
  }

  fetchSnippets(places) {
    clearTimeout(this.fetching);
    this.fetching = setTimeout(async () => {
      const wanted = places.filter(place => !this.snippets.has(place));
      try { (await this.source.snippets(wanted)).forEach((snippet, i) => this.snippets.set(wanted[i], snippet)); } catch (error) { return this.fail(error); }
      this.draw();
    }, 20);
  }

  gapRow(at) {
    return el("div", {class: `row middle${this.cursor === MIDDLE ? " current" : ""}`, role: "option", "aria-selected": "false", "aria-setsize": this.view.rows.length, "aria-posinset": at + 1, onclick: () => this.openMiddle()},
      `↕ ${whole(this.view.hidden)} more between the two ends: click to list them`);
  }
  openMiddle() { this.select.opened = true; this.update(); this.list.focus({preventScroll: true}); }

  exampleRow(at) {
    const place = this.view.rows[at], {select, table} = this, score = select.scores[place], {column} = this.source, snippet = this.snippets.get(place);
    const others = table.methods.map((method, number) => [method.short, number]).filter(([, number]) => number !== select.method);
    const same = this.view.members.get(place)?.length ?? 0, mark = this.marks[place];
    const box = this.canDecide ? el("span", {class: "box", "aria-hidden": "true", onclick: event => { event.stopPropagation(); this.toggle(place, event.shiftKey); }}, this.chosen.has(place) ? "☑" : "☐") : null;
    const tag = mark === DROP ? el("span", {class: "tag drop"}, "✕ drop") : mark === KEEP ? el("span", {class: "tag keep"}, "✓ keep") : null;
    const labelled = table.has_labels && column("facet0")[place] === 0 ? el("span", {class: "tag label", title: "labelled example"}, "labelled") : null;
    const first = el("div", {class: "numbers"}, box, el("span", {class: `score ${this.side(score)}`, title: `score ${signed(score, 6)}`}, percent(column(`percentile${select.method}`)[place])), el("span", {class: "quiet distance", title: `score ${signed(score, 6)}`}, this.distance(score)), el("span", {class: "quiet"}, `#${whole(column(`rank${select.method}`)[place])}`),
      table.has_z && select.method === 0 ? el("span", {class: "quiet"}, `z ${signed(column("z")[place], 2)}`) : null, tag, labelled,
      same ? el("span", {class: "tag"}, `+${whole(same)} alike`) : null, place in this.source.notes() ? el("span", {class: "tag"}, "✎ note") : null,
      ...others.slice(0, 4).map(([name, number]) => el("span", {class: `quiet other${number === select.against ? " against" : ""}`, title: `rank by ${table.methods[number].name}`}, el("bdi", {}, name), ` #${whole(column(`rank${number}`)[place])}`)));
    return el("div", {class: `row${place === this.cursor ? " current" : ""}${mark === DROP ? " dropped" : ""}`, role: "option", "aria-selected": String(this.chosen.has(place)), "aria-setsize": this.view.rows.length, "aria-posinset": at + 1,
      "aria-current": place === this.cursor ? "true" : undefined, onclick: event => this.click(at, event)}, first,
    el("div", {class: "prompt quiet", dir: "auto"}, snippet ? snippet.prompt : "…"), el("div", {class: "response", dir: "auto"}, snippet ? snippet.response : ""));
  }

  click(at, event) {
    const place = this.view.rows[at];
    if (event.shiftKey && this.cursor !== null && this.canDecide) this.chooseRange(this.view.rows.indexOf(this.cursor), at);
    if ((event.ctrlKey || event.metaKey) && this.canDecide) return this.toggle(place);
    this.moveTo(at, false);
    this.list.focus({preventScroll: true});
    if (this.root.clientWidth < 720) this.reading.scrollIntoView({block: "nearest"});
  }
  chooseRange(a, b) {
    if (a < 0) return;
    for (let at = Math.min(a, b); at <= Math.max(a, b); at++) if (this.view.rows[at] !== MIDDLE) this.chosen.add(this.view.rows[at]);
    this.drawStatus();
  }
  toggle(place, range = false) {
    if (range && this.cursor !== null) this.chooseRange(this.view.rows.indexOf(this.cursor), this.view.rows.indexOf(place));
    else if (this.chosen.has(place)) this.chosen.delete(place);
    else this.chosen.add(place);
    this.drawStatus();
    this.draw();
  }

  moveTo(at, scroll = true) {
    const {rows} = this.view;
    if (!rows.length) return;
    at = Math.max(0, Math.min(rows.length - 1, at));
    this.cursor = rows[at];
    if (scroll) {
      const top = at * ROW, {scrollTop, clientHeight} = this.list;
      if (top < scrollTop) this.list.scrollTop = top;
      else if (top + ROW > scrollTop + clientHeight) this.list.scrollTop = top + ROW - clientHeight;
    }
    this.draw();
    this.showExample();
  }

  key(event) {
    const {rows} = this.view, at = rows.indexOf(this.cursor), page = Math.max(1, Math.floor(this.list.clientHeight / ROW) - 1);
    const to = {ArrowDown: at + 1, ArrowUp: at - 1, PageDown: at + page, PageUp: at - page, Home: 0, End: rows.length - 1}[event.key];
    if (to !== undefined && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      if (event.shiftKey && this.canDecide) this.chooseRange(at, Math.max(0, Math.min(rows.length - 1, to)));
      this.moveTo(to);
    } else if (event.key === "Enter" && this.cursor === MIDDLE) { event.preventDefault(); this.openMiddle(); }
  }

  /** Keys that work wherever the focus is, except while writing. */
  anywhere(event) {
    const writing = event.target.matches("input:not([type=checkbox]), textarea, select");
    if (event.key === "Escape") { if (!writing && this.chosen.size) { this.chosen.clear(); this.drawStatus(); this.draw(); } this.list.focus(); return event.stopPropagation(); }
    if (writing || event.ctrlKey || event.metaKey || event.altKey) return;
    const here = this.cursor === MIDDLE || this.cursor === null ? [] : [this.cursor], one = this.canDecide && here.length;
    const act = {"/": () => this.search.focus(), "?": () => { this.help.open = !this.help.open; },
      d: one && (() => this.decideHere(DROP)), k: one && (() => this.decideHere(KEEP)), c: one && (() => this.decideHere(NONE)), x: one && (() => this.toggle(this.cursor)),
      n: one && (() => this.reading.querySelector("textarea")?.focus()), z: this.canDecide && (() => this.undo())}[event.key];
    if (!act) return;
    event.preventDefault();
    event.stopPropagation();
    act();
  }

  // ---- decisions ------------------------------------------------------------------------------------------------------------

  decideHere(mark) {
    if (this.chosen.size) return this.decide([...this.chosen], mark, this.bulkReason([...this.chosen]));
    this.decide([this.cursor], mark, "one by one");
  }
  async decide(places, mark, why) {
    places.forEach(place => { this.marks[place] = mark; this.chosen.delete(place); });   // shown at once; the kernel's answer settles it
    this.draw();
    this.drawMarks();
    try { await this.source.decide({places, mark, why}); } catch (error) { this.fail(error); }
    this.marks = this.source.marks();
    this.update();
    this.drawMarks();
  }
  async note(places, text, why) {
    try { await this.source.decide({places, note: text, why}); } catch (error) { this.fail(error); }
    this.update();
  }
  bulkNote(places) {
    const box = el("textarea", {rows: 2, "aria-label": "Note for all of them"});
    const done = () => this.note(places, box.value, this.bulkReason(places));
    this.actions.replaceChildren(el("label", {class: "grow"}, `Note for ${counted(places.length, "example")} `, box), el("button", {type: "button", onclick: done}, "Write"), el("button", {type: "button", onclick: () => this.drawStatus()}, "Cancel"));
    box.focus();
  }
  async undo() {
    if (!this.source.undoable()) return;
    try { await this.source.undo(); } catch (error) { return this.fail(error); }
    this.marks = this.source.marks();
    this.update();
    this.showExample();
  }
  async exportNow() {
    this.exported.textContent = "";
    try { this.exported.textContent = (await this.source.export(this.exportPath.value)).words; } catch (error) { this.exported.textContent = error.message; }
  }

  // ---- the example ----------------------------------------------------------------------------------------------------------

  async showExample() {
    const place = this.cursor;
    if (place === null || place === MIDDLE) { this.shown = null; this.reading.replaceChildren(el("p", {class: "quiet"}, place === null ? "Nothing to read: no example passes the filters." : `${whole(this.view.hidden)} examples lie between the two ends.`)); return; }
    let example = this.examples.get(place);
    if (!example) {
      this.reading.setAttribute("aria-busy", "true");
      try { [example] = await this.source.examples([place]); } catch (error) { return this.fail(error); }
      this.examples.set(place, example);
      if (this.examples.size > 200) this.examples.delete(this.examples.keys().next().value);
      if (this.cursor !== place) return;   // the reader has moved on
    }
    this.reading.removeAttribute("aria-busy");
    const writing = this.shown === place && this.reading.querySelector("textarea") === document.activeElement;
    if (writing) return this.drawMarks();
    if (this.shown !== place) this.reading.scrollTop = 0;
    this.shown = place;
    this.reading.replaceChildren(...this.exampleParts(place, example));
    this.drawMarks();
  }

  get tokenScale() { return {limit: this.table.limit, centre: this.table.token_centre, signed: this.table.token_signed}; }

  exampleParts(place, example) {
    const {table, source} = this, {column} = source;
    const readout = el("p", {class: "readout quiet", role: "status"}, "Point at a token to read its score.");
    const tell = (text, value) => { readout.replaceChildren(el("bdi", {class: "token"}, JSON.stringify(text)), " ", el("b", {}, signed(value, 5))); };
    const hasTokens = example.turns.some(turn => turn.scores);
    const head = ["method", "score", "rank", "higher than", ...(table.has_z ? ["z"] : [])];
    const numbers = el("div", {class: "wide"}, el("table", {class: "numbers"}, el("thead", {}, el("tr", {}, head.map(name => el("th", {scope: "col"}, name)))), el("tbody", {}, table.methods.map((method, number) =>
      el("tr", {class: number === this.select.method ? "here" : ""}, el("th", {scope: "row"}, el("bdi", {}, method.name)), el("td", {title: `score ${signed(column(`score${number}`)[place], 6)}`}, this.distance(column(`score${number}`)[place], number)), el("td", {}, `${whole(column(`rank${number}`)[place])} of ${whole(table.n_total)}`),
        this.strip(column(`percentile${number}`)[place]), table.has_z ? el("td", {}, number ? "–" : signed(column("z")[place], 3)) : null)))));
    const alike = this.alike(place);
    return [el("div", {class: "decide"}), el("p", {class: "quiet"}, `row ${whole(column("row")[place])} · ${whole(column("length")[place])} ${table.length_unit} · higher than ${percent(column("similar")[place])} of the examples of similar length · id `, el("code", {}, example.id)),
      numbers, hasTokens ? el("div", {class: "scale"}, legend(this.tokenScale, table.token_words, " One scale for all examples."), readout) : null,
      el("div", {class: "conversation"}, conversation(example.turns, this.tokenScale, tell)), alike,
      example.metadata.length ? el("details", {open: example.metadata.length <= 6}, el("summary", {}, "Metadata"), facts(example.metadata)) : null].filter(Boolean);
  }
  strip(value) {
    const bar = el("span", {class: "strip", "aria-hidden": "true"}, el("span"));
    bar.firstChild.style.left = `${value}%`;
    return el("td", {class: "with-strip"}, percent(value), bar);
  }
  alike(place) {
    const {groups} = this.select;
    if (!groups) return null;
    const others = [];
    groups.forEach((group, other) => { if (group === groups[place] && other !== place) others.push(other); });
    if (!others.length) return null;
    const all = [place, ...others], scores = this.select.scores;
    return el("details", {class: "alike"}, el("summary", {}, `${counted(others.length, "near-duplicate")} of this example`),
      el("ul", {}, others.slice(0, 50).map(other => el("li", {}, el("button", {type: "button", class: "link", onclick: () => this.reveal(other)}, `row ${whole(this.source.column("row")[other])}`), ` ${signed(scores[other])}`))),
      this.canDecide ? el("button", {type: "button", onclick: () => { all.forEach(one => this.chosen.add(one)); this.drawStatus(); this.draw(); }}, `Select all ${whole(all.length)}`) : null);
  }
  /** Go to an example even where it is folded or between the ends. */
  reveal(place) {
    if (!this.view.rows.includes(place)) { this.select.fold = this.foldPick.checked = false; this.select.opened = true; this.update(); }
    if (!this.view.rows.includes(place)) this.clearFilters();
    this.moveTo(this.view.rows.indexOf(place));
  }

  drawMarks() {
    const box = this.reading.querySelector(".decide"), place = this.shown;
    if (!box || !this.canDecide || place === null || place === undefined) return;
    const mark = this.marks[place], press = (value, words, kind) => el("button", {type: "button", class: kind, "aria-pressed": String(mark === value && value !== NONE), onclick: () => this.decide([place], mark === value ? NONE : value, "one by one")}, words);
    if (box.querySelector("textarea") && document.activeElement === box.querySelector("textarea")) { box.querySelector(".presses").replaceChildren(press(DROP, "✕ Drop", "drop"), press(KEEP, "✓ Keep", "keep")); return; }
    const focused = box.contains(document.activeElement) ? document.activeElement.className : null;
    const area = el("textarea", {rows: 1, placeholder: "Note: why?", "aria-label": "Note on this example", value: this.source.notes()[place] ?? ""});
    area.addEventListener("change", () => this.note([place], area.value, "one by one"));
    area.addEventListener("keydown", event => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) area.blur(); });
    box.replaceChildren(el("span", {class: "presses"}, press(DROP, "✕ Drop", "drop"), press(KEEP, "✓ Keep", "keep")), area);
    if (focused) box.querySelector(`button.${focused}`)?.focus();
  }
}

/** Draw the browser for a data set that stands as JSON in the page; works from a file, without a kernel. */
function mountEmbedded(root, data) { return new ExampleView(root, embeddedSource(data)); }
