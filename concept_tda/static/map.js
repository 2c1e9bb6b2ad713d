// The map of a training set: every example a point, coloured by score, group or label; brush to select, decide about the selection.

const MOST_LISTED = 12, // selected examples that are listed with their words
  GREY = "rgba(128,128,128,.45)";

/** The whole view. */
class MapView {
  colour = 0;
  how = "";
  /** @type {Set<number>} */
  selected = new Set();
  /** @type {number | null} the example under the pointer */
  hovered = null;
  /** @type {number | null} the example that is read */
  read = null;
  /** @type {Map<number, Snippet>} */
  snippets = new Map();
  /** @type {number | undefined} */
  telling = undefined;
  listed = "";

  // The elements, which `build` makes.
  /** @type {HTMLElement} */
  root;
  /** @type {HTMLSelectElement} */
  colourPick;
  /** @type {HTMLButtonElement[]} */
  toolButtons;
  /** @type {HTMLElement} */
  legendBox;
  /** @type {HTMLElement} */
  reading;
  /** @type {HTMLElement} */
  told;
  /** @type {HTMLElement} */
  status;
  /** @type {HTMLElement} */
  actions;
  /** @type {HTMLElement} */
  waiting;
  /** @type {HTMLElement} */
  problem;
  /** @type {HTMLElement} */
  list;
  /** @type {HTMLTextAreaElement} */
  idBox;
  /** @type {HTMLElement} */
  copied;

  /**
   * @param {HTMLElement} root
   * @param {MapSource} source
   * @param {SharedList | null} shared the selection in Python, where there is one
   */
  constructor(root, source, shared = null) {
    this.source = source;
    this.table = source.table;
    this.shared = shared;
    this.marks = source.marks();
    this.canDecide = Boolean(source.decide);
    this.plot = new MapPlot(source.column("x"), source.column("y"), {
      onSelect: (places, mode, how) => this.brushed(places, mode, how),
      onHover: place => this.hover(place),
      onPoint: place => this.open(place),
    });
    this.build(root);
    this.selected = new Set(shared?.get() ?? []);
    source.onChange(() => this.decided());
    source.onWaiting(state => {
      this.waiting.textContent = state ? "Waiting for the kernel …" : "";
    });
    shared?.onChange(() => {
      this.selected = new Set(shared.get());
      this.how = "in Python";
      this.drawSelection();
    });
    this.recolour();
  }

  // ---- the parts ------------------------------------------------------------------------------------------------------------

  /** @param {HTMLElement} root */
  build(root) {
    const {table} = this;
    this.colourPick = el(
      "select",
      {
        "aria-label": "Colour by",
        onchange: () => {
          this.colour = Number(this.colourPick.value);
          this.recolour();
        },
      },
      this.colours.map((one, number) => el("option", {value: number}, one.name)),
    );
    this.toolButtons = /** @type {const} */ (["rectangle", "lasso"]).map(tool =>
      el(
        "button",
        {
          type: "button",
          "aria-pressed": String(tool === this.plot.tool),
          onclick: () => {
            this.plot.tool = tool;
            for (const button of this.toolButtons)
              button.setAttribute("aria-pressed", String(button.textContent === tool));
          },
        },
        tool,
      ),
    );
    this.legendBox = el("div", {class: "classes"});
    this.reading = el("div", {class: "map-reading", role: "region", "aria-label": "Example"});
    this.told = el("p", {class: "quiet told-line", role: "status"});
    this.status = el("span", {role: "status"});
    this.actions = el("span", {class: "actions"});
    this.waiting = el("span", {class: "waiting"});
    this.problem = el("p", {class: "problem", role: "alert", hidden: true});
    this.list = el("div", {class: "picked"});
    this.idBox = el("textarea", {rows: 5, readonly: true, "aria-label": "Ids of the selected examples"});
    this.copied = el("span", {class: "quiet", role: "status"});
    const brushes = el("span", {class: "actions", role: "group", "aria-label": "Brush"}, this.toolButtons);
    this.root = el(
      "section",
      {
        class: "ctda-view map",
        "aria-label": "Map of the training set",
        "data-lm-suppress-shortcuts": "true",
        onkeydown: event => this.anywhere(event),
      },
      el(
        "div",
        {class: "inside"},
        el("h3", {}, el("bdi", {}, table.title)),
        el("p", {class: "quiet"}, table.subtitle),
        el(
          "div",
          {class: "line"},
          el("label", {}, el("span", {class: "name"}, "Colour by "), this.colourPick),
          el("span", {class: "line"}, el("span", {class: "name"}, "Brush"), brushes),
        ),
        el(
          "div",
          {class: "map-panes"},
          el(
            "div",
            {class: "map-left"},
            el("div", {class: "quiet axis"}, `▲ ${table.axes[1]}`),
            this.plot.node,
            el("div", {class: "quiet axis across"}, `${table.axes[0]} ▶`),
            this.legendBox,
          ),
          el("div", {class: "map-right"}, this.told, this.reading),
        ),
        el("div", {class: "statusline"}, this.status, this.actions, this.waiting),
        this.problem,
        this.list,
        el("details", {class: "ids"}, el("summary", {}, "Ids of the selection"), this.idPart()),
        this.keys(),
      ),
    );
    root.replaceChildren(this.root);
    this.tellNothing();
  }
  idPart() {
    const copy = el("button", {type: "button", onclick: () => this.copy()}, "Copy");
    return el("div", {}, this.idBox, el("div", {class: "actions"}, copy, this.copied));
  }
  keys() {
    const decide = this.canDecide
      ? [
          ["d, k, c", "drop, keep, or neither: the selection, else the point with the ring"],
          ["z", "undo"],
        ]
      : [];
    return el(
      "details",
      {class: "help"},
      el("summary", {}, "Keys"),
      facts([
        ["drag", "select a stretch; with Shift add it, with Alt take it away"],
        ["arrows", "to the next point in that direction"],
        ["Shift + arrows", "stretch a rectangle from the point with the ring"],
        ["Space", "select or deselect the point with the ring"],
        ["Enter", "read its whole conversation"],
        ["Escape", "select nothing"],
        ...decide,
      ]),
    );
  }

  // ---- colours --------------------------------------------------------------------------------------------------------------

  /** The ways to colour; decisions are one of them where they can be taken. */
  get colours() {
    /** @type {MapColour} */
    const decisions = {
      name: "decision",
      kind: "classes",
      column: "",
      centre: 0,
      limit: 0,
      from: "",
      values: ["keep", "drop"],
      colours: ["#2a78dc", "#ee7014"],
    };
    return this.canDecide ? [...this.table.colours, decisions] : this.table.colours;
  }
  /**
   * The class of each point, -1 where it has none.
   * @param {MapColour} colour
   * @returns {ArrayLike<number>}
   */
  codes(colour) {
    return colour.column ? this.source.column(colour.column) : Array.from(this.marks, mark => mark - 1);
  }
  /**
   * The places of one class; of classes that overlap, all of its members.
   * @param {MapColour} colour
   * @param {number} number -1 for those in none that has a colour
   */
  membersOf(colour, number) {
    if (number >= 0 && colour.members) return colour.members[number];
    const coloured = colour.colours.length;
    return Array.from(this.codes(colour), (code, place) =>
      (code >= 0 && code < coloured ? code : -1) === number ? place : -1,
    ).filter(place => place >= 0);
  }

  recolour() {
    const colour = this.colours[this.colour],
      {plot} = this,
      n = this.table.n;
    const byScore = this.source.column("score0"),
      {centre, limit} = this.table.colours[0];
    plot.order = Array.from({length: n}, (_, place) => place);
    plot.order.sort((a, b) => Math.abs(byScore[a] - centre) - Math.abs(byScore[b] - centre)); // the strongest on top
    if (colour.kind === "score") {
      const style = getComputedStyle(this.root),
        more = style.getPropertyValue("--more"),
        less = style.getPropertyValue("--less");
      plot.fill = place => {
        const away = byScore[place] - centre;
        return `rgba(${away > 0 ? more : less},${Math.min(1, Math.abs(away) / limit).toFixed(3)})`;
      };
      this.drawScale(colour);
    } else {
      const codes = this.codes(colour);
      plot.fill = place => colour.colours[codes[place]] ?? GREY;
      this.drawClasses(colour);
    }
    this.drawSelection();
  }
  /** @param {MapColour} colour */
  drawScale({name, centre, limit, from}) {
    const bar = el("span", {class: "bar", "aria-hidden": "true"});
    this.legendBox.replaceChildren(
      el(
        "p",
        {class: "quiet"},
        el("bdi", {}, name),
        `, raw score: ${signed(centre - limit, 3)} or less `,
        bar,
        ` ${signed(centre + limit, 3)} or more; pale at ${from}. ${this.markWords}`,
      ),
    );
  }
  get markWords() {
    return this.marks.some(Boolean) ? "✕ is dropped, ✓ is kept." : "";
  }
  /** @param {MapColour} colour */
  drawClasses(colour) {
    const entry = (/** @type {string} */ name, /** @type {number} */ number) => {
      const places = this.membersOf(colour, number),
        box = el("span", {class: "dot", "aria-hidden": "true"});
      box.style.background = colour.colours[number] ?? GREY;
      if (!places.length) return null;
      return el(
        "button",
        {
          type: "button",
          title: `Select these ${whole(places.length)} examples; with Shift add them`,
          onclick: event =>
            this.brushed(places, event.shiftKey ? "add" : "replace", `${colour.name}: ${name}`),
        },
        box,
        el("bdi", {}, name),
        el("span", {class: "quiet"}, ` ${whole(places.length)}`),
      );
    };
    const rest = colour.values.length > colour.colours.length ? "others" : "none of these";
    const entries = [
      ...colour.values.slice(0, colour.colours.length).map(entry),
      entry(colour.column ? rest : "undecided", -1),
    ];
    const overlap = colour.members
      ? "A point in several has the colour of the first of them; a click selects all of its examples. "
      : "";
    this.legendBox.replaceChildren(
      ...entries.filter(part => part !== null),
      el("p", {class: "quiet"}, overlap + this.markWords),
    );
  }

  // ---- the selection --------------------------------------------------------------------------------------------------------

  /**
   * @param {number[]} places
   * @param {BrushMode} mode
   * @param {string} how
   */
  brushed(places, mode, how) {
    this.selected = brushedSelection(this.selected, places, mode);
    this.how = this.how && mode !== "replace" && this.how !== how ? `${this.how}, ${how}` : how;
    this.shared?.set([...this.selected].sort((a, b) => a - b));
    this.drawSelection();
  }
  /** Places of the selection, the highest score first. */
  get chosen() {
    const scores = this.source.column("score0");
    return [...this.selected].sort((a, b) => scores[b] - scores[a] || a - b);
  }
  drawSelection() {
    const {plot, chosen} = this,
      higher = this.source.column("percentile0");
    Object.assign(plot, {selected: this.selected, marks: this.marks});
    plot.drawSoon();
    const mean = (/** @type {ArrayLike<number>} */ values) =>
      Array.from(values).reduce((sum, value) => sum + value, 0) / values.length;
    this.status.textContent = chosen.length
      ? `${whole(chosen.length)} of ${whole(this.table.n)} selected; on average higher than ${percent(mean(chosen.map(place => higher[place])))} of the file`
      : `${counted(this.table.n, "example")}; drag over the map to select`;
    this.idBox.value = chosen.map(place => this.table.ids[place]).join("\n");
    this.copied.textContent = "";
    this.drawActions();
    this.drawList(chosen.slice(0, MOST_LISTED), chosen.length);
  }
  drawActions() {
    const n = this.selected.size,
      press = (/** @type {string} */ words, /** @type {() => unknown} */ act, kind = "") =>
        el("button", {type: "button", class: kind, onclick: act}, words);
    const undoable = this.source.undoable();
    this.actions.replaceChildren(
      ...[
        n && this.canDecide ? press("✕ Drop", () => this.decide(DROP), "drop") : null,
        n && this.canDecide ? press("✓ Keep", () => this.decide(KEEP), "keep") : null,
        n && this.canDecide ? press("Neither", () => this.decide(NONE)) : null,
        n ? press("Select nothing", () => this.brushed([], "replace", "")) : null,
        undoable && this.canDecide ? press(`Undo: ${undoable}`, () => this.undo(), "undo") : null,
      ].filter(part => part !== null),
    );
  }
  /**
   * The first selected examples in words.
   * @param {number[]} places
   * @param {number} total
   */
  async drawList(places, total) {
    const asked = places.join();
    this.listed = asked;
    if (!places.length) return this.list.replaceChildren();
    const higher = this.source.column("percentile0"),
      rows = this.source.column("row");
    const words = places.map(() => el("span", {class: "words", dir: "auto"}));
    const lines = places.map((place, at) =>
      el(
        "button",
        {type: "button", class: "one", onclick: () => this.plot.moveTo(place)},
        el("b", {title: this.raw(place)}, percent(higher[place])),
        el("span", {class: "quiet"}, ` ${this.distance(place)} row ${whole(rows[place])} `),
        words[at],
      ),
    );
    const more =
      total > places.length
        ? el("p", {class: "quiet"}, `The ${whole(places.length)} highest of ${whole(total)} selected.`)
        : null;
    this.list.replaceChildren(...lines, ...(more ? [more] : []));
    const found = await this.words(places);
    if (this.listed !== asked || !found) return;
    found.forEach((snippet, at) => {
      words[at].textContent = snippet.response;
    });
  }
  /**
   * Snippets, kept once they are known; null where nobody answers.
   * @param {number[]} places
   */
  async words(places) {
    const missing = places.filter(place => !this.snippets.has(place));
    try {
      const found = missing.length ? await this.source.snippets(missing) : [];
      found.forEach((snippet, at) => this.snippets.set(missing[at], snippet));
    } catch (error) {
      this.fail(error);
      return null;
    }
    return places.map(place => /** @type {Snippet} */ (this.snippets.get(place)));
  }
  async copy() {
    this.idBox.select();
    try {
      await navigator.clipboard.writeText(this.idBox.value);
      this.copied.textContent = `${counted(this.selected.size, "id")} copied`;
    } catch {
      this.copied.textContent = "They are marked: copy them with Ctrl+C"; // a frame may not use the clipboard
    }
  }

  // ---- decisions ------------------------------------------------------------------------------------------------------------

  /** @param {number} mark */
  async decide(mark) {
    const here = this.selected.size ? this.chosen : this.plot.cursor === null ? [] : [this.plot.cursor];
    if (!here.length) return;
    const why = this.selected.size
      ? `selected on the map (${this.how || "earlier"})`
      : "one by one on the map";
    try {
      await this.source.decide?.({places: here, mark, why});
      this.problem.hidden = true;
    } catch (error) {
      this.fail(error);
    }
    this.decided();
  }
  async undo() {
    try {
      if (this.source.undoable()) await this.source.undo?.();
    } catch (error) {
      this.fail(error);
    }
    this.decided();
  }
  /** Decisions have changed, here or elsewhere. */
  decided() {
    const focused = this.actions.contains(document.activeElement) ? document.activeElement?.className : null;
    this.marks = this.source.marks();
    this.recolour();
    if (this.read !== null) this.tell(this.read);
    if (focused) focusOn(this.actions, `button.${focused}`);
  }
  /** @param {unknown} error */
  fail(error) {
    this.problem.hidden = false;
    this.problem.textContent = /** @type {Error} */ (error).message;
  }

  // ---- the example ----------------------------------------------------------------------------------------------------------

  tellNothing() {
    this.told.textContent = "Point at an example to read its question and answer.";
    this.reading.replaceChildren();
  }
  /** @param {number} place */
  facts(place) {
    const {column} = this.source,
      mark = ["", " · kept", " · dropped"][this.marks[place]];
    const classes = this.table.colours
      .filter(colour => colour.kind === "classes")
      .map(colour => {
        const name = colour.values[column(colour.column)[place]];
        return name === undefined ? "" : ` · ${colour.name}: ${name}`;
      });
    const rank = `rank ${whole(column("rank0")[place])} of ${whole(this.table.n_total)}`,
      place_words = [`higher than ${percent(column("percentile0")[place])}`, this.distance(place)];
    return `row ${whole(column("row")[place])} · ${place_words.filter(Boolean).join(" · ")} (${rank})${classes.join("")}${mark} · ${this.raw(place)}`;
  }
  /**
   * The number that leads, with its unit; empty for scores that are only an order.
   * @param {number} place
   */
  distance(place) {
    const value = this.source.column("leading0")[place];
    return Number.isNaN(value) ? "" : `${signed(value, 3)} ${this.table.unit}`;
  }
  /** @param {number} place */
  raw(place) {
    return `raw score ${signed(this.source.column("score0")[place])}`;
  }
  /** @param {number} place */
  tell(place) {
    this.told.textContent = this.facts(place);
  }
  /** @param {number | null} place */
  hover(place) {
    this.hovered = place;
    clearTimeout(this.telling);
    if (place === null) {
      if (this.read === null) this.tellNothing();
      else this.open(this.read);
      return;
    }
    this.tell(place);
    this.telling = setTimeout(() => this.showWords(place), this.snippets.has(place) ? 0 : 60);
  }
  /** @param {number} place */
  async showWords(place) {
    const found = await this.words([place]);
    if (this.hovered !== place || !found) return;
    const {prompt, response} = found[0],
      turn = (/** @type {string} */ role, /** @type {string} */ text, /** @type {string} */ kind) =>
        el(
          "div",
          {class: `turn ${kind}`},
          el("div", {class: "role"}, role),
          el("div", {class: "text", dir: "auto"}, text),
        );
    this.reading.replaceChildren(turn("question", prompt, "question"), turn("answer", response, "answer"));
  }
  /**
   * Read an example in full.
   * @param {number} place
   */
  async open(place) {
    this.read = place;
    this.tell(place);
    let example;
    try {
      [example] = await this.source.examples([place]);
    } catch (error) {
      return this.fail(error);
    }
    if (this.read !== place || (this.hovered !== null && this.hovered !== place)) return;
    const turns = example.turns.map(turn => ({role: turn.role, answer: turn.answer, text: textOf(turn)}));
    this.reading.replaceChildren(
      ...conversation(turns, 0, () => {}),
      el("p", {class: "quiet"}, "id ", el("code", {}, this.table.ids[place])),
    );
    this.reading.scrollTop = 0;
  }

  /**
   * Keys that work wherever the focus is, except while writing.
   * @param {any} event
   */
  anywhere(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select, textarea")) return;
    /** @type {Record<string, false | (() => unknown)>} */
    const acts = {
      Escape: () => this.brushed([], "replace", ""),
      Enter:
        event.target === this.plot.node && (() => this.plot.cursor !== null && this.open(this.plot.cursor)),
      d: this.canDecide && (() => this.decide(DROP)),
      k: this.canDecide && (() => this.decide(KEEP)),
      c: this.canDecide && (() => this.decide(NONE)),
      z: this.canDecide && (() => this.undo()),
    };
    const act = acts[event.key];
    if (!act) return;
    event.preventDefault();
    event.stopPropagation();
    act();
  }
}

/**
 * Draw the map for data that stand as JSON in the page; works from a file, without a kernel.
 * @param {HTMLElement} root
 * @param {any} data
 */
function mountMap(root, data) {
  return new MapView(root, /** @type {any} */ (embeddedSource(data)));
}
