// The example browser itself: list, text, filters and decisions, over a source (sources.js).

/** The whole view. */
class ExampleView {
  /** @type {number | null} the place, or MIDDLE, that the list stands on */
  cursor = null;
  /** @type {number | null} the place that is read */
  shown = null;
  /** @type {Map<number, Snippet>} */
  snippets = new Map();
  /** @type {Map<number, Example>} */
  examples = new Map();
  /** @type {Set<number>} */
  chosen = new Set();
  drawSoon = nextFrame(() => this.draw());
  /** @type {number | undefined} */
  searching = undefined;
  /** @type {number | undefined} */
  fetching = undefined;
  /** @type {View} */
  view;
  /** @type {Uint8Array} */
  marks;

  // The elements, which `build` makes.
  /** @type {HTMLElement} */
  root;
  /** @type {Histogram} */
  histogram;
  /** @type {Scatter | null} */
  scatter = null;
  /** @type {EndWordsPart | null} */
  words = null;
  /** @type {AskingPart} */
  asking;
  /** @type {HTMLInputElement} */
  search;
  /** @type {HTMLElement} */
  status;
  /** @type {HTMLElement} */
  waiting;
  /** @type {HTMLElement} */
  problem;
  /** @type {HTMLElement} */
  list;
  /** @type {HTMLElement} */
  spacer;
  /** @type {HTMLElement} */
  reading;
  /** @type {HTMLElement} */
  actions;
  /** @type {HTMLDetailsElement} */
  help;
  /** @type {HTMLElement} */
  title;
  /** @type {HTMLElement} */
  subtitle;
  /** @type {HTMLElement} */
  card;
  /** @type {HTMLElement} */
  sign;
  /** @type {HTMLElement} */
  countNote;
  /** @type {HTMLElement} */
  readingNote;
  /** @type {HTMLElement} */
  numbers;
  /** @type {HTMLElement} */
  numbersNote;
  /** @type {HTMLSelectElement} */
  methodPick;
  /** @type {HTMLSelectElement} */
  orderPick;
  /** @type {HTMLInputElement} */
  gapPick;
  /** @type {HTMLElement} */
  gapBox;
  /** @type {HTMLInputElement[]} */
  lengthPicks = [];
  /** @type {HTMLElement} */
  lengthNote;
  /** @type {HTMLInputElement} */
  foldPick;
  /** @type {HTMLSelectElement} */
  decidedPick;
  /** @type {HTMLElement} */
  facetBox;
  /** @type {HTMLElement} */
  toTop;
  /** @type {HTMLElement} */
  toBottom;
  /** @type {HTMLInputElement} */
  exportPath;
  /** @type {HTMLInputElement} */
  saver;
  /** @type {HTMLElement} */
  exported;

  /**
   * @param {HTMLElement} root
   * @param {Source} source
   */
  constructor(root, source) {
    this.source = source;
    this.table = source.table;
    this.select = new ExampleSelection(source);
    this.id = `ctda-${Math.random().toString(36).slice(2, 8)}`;
    this.canDecide = Boolean(source.decide);
    this.build(root);
    source.onChange(() => {
      this.marks = source.marks();
      this.update();
      this.showExample();
    });
    source.onWaiting(state => {
      this.waiting.hidden = !state;
    });
    this.marks = source.marks();
    this.update();
    this.cursor = this.view.rows[0] ?? null;
    this.draw();
    this.showExample();
    if (this.select.fold) this.loadGroups();
  }

  // ---- building -------------------------------------------------------------------------------------------------------------

  /** @param {HTMLElement} root */
  build(root) {
    const {table} = this;
    this.histogram = new Histogram(brush => {
      this.select.brush = brush;
      this.filtersChanged(true);
    });
    this.scatter =
      table.methods.length > 1
        ? new Scatter(this.source, {
            onPick: place => {
              this.reveal(place);
              if (this.root.clientWidth < 720) this.reading.scrollIntoView({block: "nearest"});
            },
            onChange: () => this.scatter?.set(this.select.method, this.view.pass),
          })
        : null;
    this.words = this.source.words
      ? new EndWordsPart(this.source, {
          onWord: word => this.searchFor(word),
          onFail: error => this.fail(error),
        })
      : null;
    this.search = el("input", {
      type: "search",
      placeholder: 'words, "a phrase", -without',
      "aria-label": "Search in prompts and responses",
      oninput: () => this.searchSoon(),
    });
    this.status = el("span", {role: "status", "aria-live": "polite"});
    this.waiting = el(
      "span",
      {class: "waiting", hidden: true},
      "Waiting for the kernel: it is busy, or this page has none.",
    );
    this.problem = el("p", {class: "problem", role: "alert", hidden: true});
    this.list = el("div", {
      class: "rows",
      id: this.id,
      role: "listbox",
      tabindex: "0",
      "aria-multiselectable": "true",
      "aria-label": "Examples",
      onscroll: () => this.drawSoon(),
      onkeydown: event => this.key(event),
    });
    this.spacer = el("div", {class: "spacer", role: "presentation"});
    this.list.append(this.spacer);
    this.reading = el("article", {class: "reading", "aria-label": "The chosen example"});
    this.asking = new AskingPart(this.reading, this.source, place => this.reveal(place));
    this.actions = el("div", {class: "actions"});
    this.help = this.buildHelp();
    this.root = el(
      "section",
      {
        class: "ctda-view",
        "aria-label": "Example browser",
        "data-lm-suppress-shortcuts": "true",
        "data-jp-suppress-context-menu": true,
        onkeydown: event => this.anywhere(event),
      },
      el(
        "div",
        {class: "inside"},
        this.buildHead(),
        this.histogram.node,
        this.buildControls(),
        this.problem,
        el("div", {class: "statusline"}, this.status, this.waiting, this.actions),
        el("div", {class: "panes"}, el("div", {class: "left"}, this.buildEnds(), this.list), this.reading),
        this.asking.answer,
        this.buildFoot(),
        this.help,
      ),
    );
    root.replaceChildren(this.root);
    new ResizeObserver(() => this.drawSoon()).observe(this.list);
  }

  /** All that is said of the method whose ranks are shown; one without a sign has no colours to explain. */
  drawSign() {
    const {table, select} = this,
      method = table.methods[select.method];
    const key =
      method.zero === "gradient"
        ? [
            el("span", {class: "key more"}, "orange"),
            " above zero, ",
            el("span", {class: "key less"}, "blue"),
            " below. ",
          ]
        : method.centre !== null
          ? [
              el("span", {class: "key more"}, "orange"),
              " above the mean, ",
              el("span", {class: "key less"}, "blue"),
              " below. ",
            ]
          : [];
    this.title.textContent = `${method.name}: ${method.behaviour}`;
    this.subtitle.textContent = method.subtitle;
    this.card.replaceChildren(facts(method.card));
    this.countNote.textContent = method.counted;
    this.countNote.hidden = !method.counted;
    this.readingNote.textContent = `${method.detected} ${table.note}`.trim();
    this.root.setAttribute("aria-label", `Example browser: ${this.title.textContent}`);
    this.sign.replaceChildren(el("bdi", {}, method.reading), " ", ...key);
    const words = `${method.unit_words} ${method.sink_words}`.trim();
    this.numbersNote.textContent = words;
    this.numbers.hidden = !words;
  }
  /**
   * "more", "less" or, without a sign, "plain".
   * @param {number} score
   */
  side(score) {
    const {centre} = this.table.methods[this.select.method];
    return centre === null ? "plain" : score > centre ? "more" : "less";
  }
  /**
   * The number that leads, with its unit: the behaviour's own, multiples of the null, or spreads; empty for a method whose
   * scores are only an order.
   * @param {number} place
   */
  distance(place, method = this.select.method) {
    const value = this.source.column(`leading${method}`)[place];
    return Number.isNaN(value) ? "" : `${signed(value, 3)} ${this.table.methods[method].unit}`;
  }
  /**
   * The raw score, for titles; with the effect in its own unit where a share of a gap leads.
   * @param {number} place
   */
  raw(place, method = this.select.method) {
    const score = this.source.column(`score${method}`)[place],
      {raw} = this.table.methods[method];
    return `raw score ${signed(score, 6)}${raw ? `, ${signed(raw[0] * score)} ${raw[1]}` : ""}`;
  }
  /**
   * The interval of a score as a whisker, on one axis for all examples with the centre in its middle.
   * @param {number} place
   */
  whisker(place, method = this.select.method) {
    const {reach, unit} = this.table.methods[method];
    if (reach === null) return null;
    const value = this.source.column(`leading${method}`)[place],
      half = this.source.column(`half${method}`)[place],
      at = (/** @type {number} */ x) => 50 + (50 * x) / reach;
    if (Number.isNaN(value) || Number.isNaN(half)) return null;
    const words = `95 % interval ${signed(value - half, 3)} to ${signed(value + half, 3)} ${unit}`,
      range = el("span", {class: "range"}),
      dot = el("span", {class: "dot"});
    range.style.left = `${at(value - half)}%`;
    range.style.width = `${at(value + half) - at(value - half)}%`;
    dot.style.left = `${at(value)}%`;
    return el("span", {class: "whisker", role: "img", "aria-label": words, title: words}, range, dot);
  }

  buildHead() {
    this.title = el("bdi", {});
    this.subtitle = el("bdi", {});
    this.sign = el("p", {class: "sign"});
    this.countNote = el("p", {class: "count-note"});
    this.readingNote = el("p", {class: "reading-note"});
    this.card = el("div", {});
    this.numbersNote = el("p", {class: "numbers-note"});
    this.numbers = el("details", {}, el("summary", {}, "How to read the numbers"), this.numbersNote);
    return el(
      "header",
      {},
      el("h3", {}, this.title),
      el("p", {class: "quiet"}, this.subtitle),
      this.sign,
      this.countNote,
      this.readingNote,
      el(
        "div",
        {class: "folds"},
        this.numbers,
        el("details", {}, el("summary", {}, "Query card: what was computed"), this.card),
      ),
    );
  }

  buildControls() {
    const {table} = this,
      option = (/** @type {string | number} */ value, /** @type {string} */ words, chosen = false) => {
        const node = el("option", {value}, words);
        node.selected = chosen;
        return node;
      };
    this.methodPick = el(
      "select",
      {"aria-label": "Method", onchange: () => this.pickMethod(Number(this.methodPick.value))},
      table.methods.map((method, number) => option(number, method.name, number === 0)),
    );
    this.orderPick = el("select", {
      "aria-label": "Order",
      onchange: () => this.pickOrder(this.orderPick.value),
    });
    this.fillOrders();
    this.gapPick = el("input", {
      type: "number",
      min: 0,
      max: 100,
      step: 5,
      value: "0",
      "aria-label": "Smallest difference in percentile points",
      oninput: () => {
        this.select.gap = Number(this.gapPick.value) || 0;
        this.filtersChanged();
      },
    });
    this.gapBox = el("label", {hidden: true}, "by at least ", this.gapPick, " percentile points");
    const ends = [0, 1].map(side =>
      el("input", {
        type: "number",
        min: 0,
        placeholder: side ? whole(table.lengths[1]) : whole(table.lengths[0]),
        "aria-label": side ? "Longest" : "Shortest",
        oninput: event => {
          this.select.lengths[side] = event.target.value === "" ? null : Number(event.target.value);
          this.filtersChanged();
        },
      }),
    );
    this.lengthPicks = ends;
    this.foldPick = el("input", {
      type: "checkbox",
      checked: this.select.fold,
      onchange: () => {
        this.select.fold = this.foldPick.checked;
        this.select.fold ? this.loadGroups() : this.filtersChanged();
      },
    });
    this.decidedPick = el(
      "select",
      {
        "aria-label": "Decisions",
        onchange: () => {
          this.select.decided = this.decidedPick.value;
          this.filtersChanged();
        },
      },
      [
        ["all", "all decisions"],
        ["undecided", "undecided"],
        ["drop", "dropped"],
        ["keep", "kept"],
        ["noted", "with a note"],
      ].map(([value, words]) => option(value, words)),
    );
    this.facetBox = el("div", {class: "facets"});
    this.lengthNote = el("span", {class: "quiet"});
    const filters = el(
      "details",
      {class: "filters"},
      el("summary", {}, "Filters: labels, metadata, length"),
      el(
        "p",
        {},
        el("label", {}, `length in ${table.length_unit} from `, ends[0]),
        el("label", {}, " to ", ends[1]),
        " ",
        this.lengthNote,
      ),
      this.facetBox,
    );
    return el(
      "div",
      {class: "controls"},
      el(
        "div",
        {class: "line"},
        el("label", {class: "grow"}, el("span", {class: "name"}, "Search "), this.search),
        table.methods.length > 1
          ? el("label", {}, el("span", {class: "name"}, "Method "), this.methodPick)
          : null,
        el("label", {}, el("span", {class: "name"}, "Order "), this.orderPick),
        this.gapBox,
        this.canDecide ? el("label", {}, el("span", {class: "name"}, "Show "), this.decidedPick) : null,
        el("label", {class: "tick"}, this.foldPick, " fold near-duplicates"),
      ),
      el("div", {class: "folds"}, filters, this.scatter?.node ?? "", this.words?.node ?? ""),
    );
  }

  /** Where in the list the cursor stands; -1 where it does not. */
  get at() {
    return this.cursor === null ? -1 : this.view.rows.indexOf(this.cursor);
  }

  /** Straight to either end of the list. */
  buildEnds() {
    this.toTop = el("button", {type: "button", onclick: () => this.moveTo(0)});
    this.toBottom = el("button", {type: "button", onclick: () => this.moveTo(this.view.rows.length - 1)});
    return el("div", {class: "both-ends"}, this.toTop, this.toBottom);
  }

  fillOrders() {
    const {table, select} = this,
      here = table.methods[select.method].name;
    const option = (/** @type {string | number} */ value, /** @type {string} */ words) => {
      const node = el("option", {value}, words);
      node.selected = value === this.orderValue();
      return node;
    };
    const plain = [
      ["high", "highest score first"],
      ["low", "lowest score first"],
      ["strong", "strongest either way"],
      ["similar", "high for its length"],
      ...(table.methods[select.method].null ? [["null", "highest above the null first"]] : []),
      ["long", "longest first"],
      ["short", "shortest first"],
      ["file", "as in the file"],
    ];
    const groups = [
      el(
        "optgroup",
        {label: "by this method"},
        plain.map(([value, words]) => option(value, words)),
      ),
    ];
    const others = table.methods
      .map((method, number) => [method.name, number])
      .filter(([, number]) => number !== select.method);
    if (others.length)
      groups.push(
        el(
          "optgroup",
          {label: "where methods disagree"},
          others.flatMap(([name, number]) => [
            option(`above-${number}`, `high for ${here}, low for ${name}`),
            option(`below-${number}`, `low for ${here}, high for ${name}`),
          ]),
        ),
      );
    this.orderPick.replaceChildren(...groups);
  }
  orderValue() {
    return this.select.against === null ? this.select.order : `${this.select.order}-${this.select.against}`;
  }

  buildFoot() {
    if (!this.canDecide) return null;
    if (this.source.save) return this.buildSave();
    this.exportPath = el("input", {
      value: this.table.export_path,
      "aria-label": "File to write",
      spellcheck: "false",
    });
    this.exported = el("p", {class: "quiet", role: "status"});
    return el(
      "footer",
      {},
      el("label", {}, "Write the data set without what was dropped to ", this.exportPath),
      el("button", {type: "button", onclick: () => this.exportNow()}, "Export"),
      this.exported,
    );
  }

  /** What a page without a kernel has in the place of an export: decisions as a file, and ids to copy. */
  buildSave() {
    this.saver = el("input", {value: "", placeholder: "your name", "aria-label": "Your name"});
    this.exported = el("p", {class: "quiet", role: "status"});
    return el(
      "footer",
      {class: "saving"},
      el("label", {}, "Decided by ", this.saver),
      el("button", {type: "button", onclick: () => this.saveNow()}, "Save decisions.json"),
      el(
        "button",
        {type: "button", onclick: () => this.copyIds(this.placesMarked(DROP))},
        "Copy ids of what was dropped",
      ),
      this.exported,
    );
  }
  /** @param {number} mark */
  placesMarked(mark) {
    return [...this.marks.keys()].filter(place => this.marks[place] === mark);
  }
  saveNow() {
    const text = this.source.save?.(this.saver.value.trim() || "a reader of the page") ?? "",
      link = el("a", {download: "decisions.json"});
    link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
    this.exported.textContent =
      "Saved as decisions.json. The training file without what was dropped: concept-tda filter RESULT --decisions decisions.json";
  }
  /** @param {number[]} places */
  async copyIds(places) {
    const ids = this.source.ids?.(places) ?? [];
    try {
      await navigator.clipboard.writeText(ids.join("\n"));
      this.exported.textContent = `${counted(ids.length, "id")} copied.`;
    } catch {
      this.exported.textContent = ids.length
        ? `Copy them from here: ${ids.join(" ")}`
        : "Nothing is dropped yet.";
    }
  }

  buildHelp() {
    const keys = [
      ["↑ ↓", "move"],
      ["Page up, Page down, Home, End", "move far"],
      ["/", "search"],
      ...(this.canDecide
        ? [
            ["d", "drop, and on to the next row"],
            ["k", "keep, and on to the next row"],
            ["c", "clear the decision"],
            ["n", "write a note"],
            ["x", "select, for decisions in bulk"],
            ["Shift + ↑ ↓", "select as you move"],
            ["z", "undo"],
          ]
        : []),
      ["← →", "in a text with token scores: read token by token"],
      [
        "Select words of an answer",
        this.source.askWords ? "ask which data made them" : "ask which data made them: the lines of Python",
      ],
      ["Esc", "back to the list, or clear the selection"],
    ];
    return el("details", {class: "help"}, el("summary", {}, "Keys"), facts(keys));
  }

  // ---- state ----------------------------------------------------------------------------------------------------------------

  /** @param {number} method */
  pickMethod(method) {
    const {select} = this;
    select.method = method;
    select.brush = null;
    if (select.against === method) Object.assign(select, {against: null, order: "high", gap: 0});
    this.shown = null; // the same text in this method's colours
    const known =
      select.order === "similar" ? method === 0 : select.order !== "null" || this.table.methods[method].null;
    if (!known) select.order = "high";
    this.fillOrders();
    this.filtersChanged();
    if (this.shown === null) this.showExample();
  }
  /** @param {string} value */
  pickOrder(value) {
    const [order, against] = value.split("-"),
      {select} = this;
    Object.assign(select, {order, against: against === undefined ? null : Number(against)});
    if (select.against === null) {
      select.gap = 0;
      this.gapPick.value = "0";
    } else if (this.scatter) this.scatter.other = select.against;
    if (order === "similar") {
      this.methodPick.value = "0";
      this.pickMethod(0);
    }
    this.filtersChanged();
    this.first();
  }
  first() {
    this.list.scrollTop = 0;
    this.moveTo(0, false);
  }

  /** @param {string} word */
  searchFor(word) {
    this.search.value = word;
    this.runSearch();
    this.search.focus();
  }
  searchSoon() {
    clearTimeout(this.searching);
    this.searching = setTimeout(() => this.runSearch(), 120);
  }
  async runSearch() {
    const words = this.search.value.trim();
    this.select.words = words;
    if (!searchTerms(words).length) this.select.hits = null;
    else {
      try {
        const hits = await this.source.search(words);
        if (this.select.words !== words) return;
        this.select.hits = hits;
      } catch (error) {
        return this.fail(error);
      }
    }
    this.filtersChanged();
  }
  async loadGroups() {
    try {
      this.select.groups = this.select.groups ?? (await this.source.groups());
    } catch (error) {
      return this.fail(error);
    }
    this.update();
    this.showExample();
  }
  /** @param {any} error */
  fail(error) {
    this.problem.textContent = error.message;
    this.problem.hidden = false;
  }

  filtersChanged(brushing = false) {
    this.update(brushing);
    if (this.at < 0) {
      this.cursor = this.view.rows[0] ?? null;
      this.list.scrollTop = 0;
      this.draw();
      this.showExample();
    }
  }
  clearFilters() {
    this.select.reset();
    this.search.value = "";
    this.gapPick.value = "0";
    this.decidedPick.value = "all";
    this.lengthPicks.forEach(pick => {
      pick.value = "";
    });
    this.filtersChanged();
  }

  /** Work out anew what passes, and draw everything but the example. */
  update(brushing = false) {
    const {select, table} = this;
    this.view = select.view();
    this.gapBox.hidden = select.against === null;
    if (!brushing)
      this.histogram.set(
        select.scores,
        this.view.pass,
        select.brush,
        `scores of ${table.methods[select.method].name}`,
        table.methods[select.method],
      );
    else {
      this.histogram.pass = this.view.pass;
      this.histogram.draw();
    }
    this.scatter?.set(select.method, this.view.pass);
    this.words?.set(select.method);
    this.drawSign();
    this.drawFacets();
    this.drawStatus();
    this.draw();
  }

  drawStatus() {
    const {view, select, table} = this,
      n = view.all.length;
    const decided = [
      [DROP, "dropped"],
      [KEEP, "kept"],
    ]
      .map(([mark, word]) => ({count: this.marks.filter(value => value === mark).length, word}))
      .filter(({count}) => count)
      .map(({count, word}) => `${whole(count)} ${word}`);
    this.status.textContent = [
      select.filtered ? `${whole(n)} of ${counted(table.n, "example")} shown` : counted(table.n, "example"),
      view.folded ? `${whole(view.folded)} near-duplicates folded` : "",
      ...decided,
    ]
      .filter(Boolean)
      .join(" · ");
    this.lengthNote.textContent = `Score and length agree with Spearman ${signed(table.methods[select.method].length_spearman ?? NaN, 2)}.`;
    const button = (/** @type {string} */ words, /** @type {() => void} */ act, more = {}) =>
        el("button", {type: "button", onclick: act, ...more}, words),
      parts = [];
    if (select.filtered) parts.push(button("Clear filters", () => this.clearFilters()));
    if (this.canDecide) {
      const places = this.chosen.size ? [...this.chosen] : select.filtered ? view.all : [];
      if (places.length) {
        const what = this.chosen.size
          ? `${whole(places.length)} selected`
          : `all ${whole(places.length)} shown`;
        parts.push(
          el(
            "span",
            {class: "bulk", role: "group", "aria-label": `Decide about ${what}`},
            el("span", {class: "quiet"}, `${what}: `),
            button("Drop", () => this.decide(places, DROP, this.bulkReason(places)), {class: "drop"}),
            button("Keep", () => this.decide(places, KEEP, this.bulkReason(places)), {class: "keep"}),
            button("Clear", () => this.decide(places, NONE, this.bulkReason(places))),
            button("Note…", () => this.bulkNote(places)),
            this.source.save ? button("Copy ids", () => this.copyIds(places)) : null,
          ),
        );
      }
      if (this.chosen.size)
        parts.push(
          button("Select none", () => {
            this.chosen.clear();
            this.update();
          }),
        );
      const undoable = this.source.undoable();
      if (undoable) parts.push(button(`Undo: ${undoable}`, () => this.undo()));
    }
    this.actions.replaceChildren(...parts);
    const ends =
      select.against !== null
        ? ["largest difference", "smallest"]
        : /** @type {Record<string, string[]>} */ ({
            high: ["highest", "lowest"],
            low: ["lowest", "highest"],
            strong: ["strongest", "weakest"],
            similar: ["highest for its length", "lowest"],
            null: ["highest above the null", "lowest"],
            long: ["longest", "shortest"],
            short: ["shortest", "longest"],
            file: ["first row", "last row"],
          })[select.order];
    this.toTop.textContent = `▲ ${ends[0]}`;
    this.toBottom.textContent = `▼ ${ends[1]}`;
  }
  /** @param {number[]} places */
  bulkReason(places) {
    return this.chosen.size
      ? `one of ${counted(places.length, "example")} selected by hand`
      : `one of all ${whole(places.length)} shown by: ${this.select.inWords()}`;
  }

  drawFacets() {
    const {table, select} = this,
      top = this.source.column("percentile0");
    const boxes = table.facets.map((facet, number) => {
      const codes = this.source.column(`facet${number}`),
        pass = select.passing(number),
        counts = new Uint32Array(facet.values.length),
        high = new Uint32Array(facet.values.length),
        total = new Uint32Array(facet.values.length);
      codes.forEach((code, place) => {
        if (code >= 0) {
          total[code] += 1;
          high[code] += Number(top[place] >= 90);
          if (pass[place]) counts[code] += 1;
        }
      });
      return el(
        "fieldset",
        {},
        el("legend", {}, el("bdi", {}, facet.name)),
        facet.values.map((value, code) => {
          const share = total[code] ? high[code] / total[code] : 0,
            bar = el("span", {
              class: "share",
              title: `${whole(high[code])} of ${whole(total[code])} are in the highest tenth by ${table.methods[0].name}`,
            });
          bar.style.setProperty("--share", `${Math.min(100, 100 * share).toFixed(0)}%`);
          return el(
            "label",
            {class: counts[code] ? "" : "empty"},
            el("input", {
              type: "checkbox",
              checked: select.facets[number].has(code),
              "data-facet": number,
              "data-code": code,
              onchange: event => {
                event.target.checked ? select.facets[number].add(code) : select.facets[number].delete(code);
                this.filtersChanged();
                focusOn(this.root, `input[data-facet="${number}"][data-code="${code}"]`);
              },
            }),
            el("bdi", {class: "value"}, value),
            el("span", {class: "quiet count"}, whole(counts[code])),
            bar,
          );
        }),
      );
    });
    this.facetBox.replaceChildren(
      ...boxes,
      ...(boxes.length
        ? [
            el(
              "p",
              {class: "quiet"},
              "Beside each value: how many examples, and (bar) the share of them in the highest tenth; chance is one tenth, the tick.",
            ),
          ]
        : []),
    );
  }

  // ---- the list -------------------------------------------------------------------------------------------------------------

  draw() {
    const {rows} = this.view,
      height = this.list.clientHeight || 480;
    this.spacer.style.height = `${rows.length * ROW}px`;
    const from = Math.max(0, Math.floor(this.list.scrollTop / ROW) - 3),
      to = Math.min(rows.length, Math.ceil((this.list.scrollTop + height) / ROW) + 3);
    const drawn = [],
      missing = [];
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
    if (this.cursor !== null && this.spacer.querySelector(".current"))
      this.list.setAttribute("aria-activedescendant", `${this.id}-${this.cursor}`);
    else this.list.removeAttribute("aria-activedescendant");
    if (missing.length) this.fetchSnippets(missing);
  }

  /** @param {number[]} places */
  fetchSnippets(places) {
    clearTimeout(this.fetching);
    this.fetching = setTimeout(async () => {
      const wanted = places.filter(place => !this.snippets.has(place));
      try {
        (await this.source.snippets(wanted)).forEach((snippet, i) => this.snippets.set(wanted[i], snippet));
      } catch (error) {
        return this.fail(error);
      }
      this.draw();
    }, 20);
  }

  /** @param {number} at */
  gapRow(at) {
    return el(
      "div",
      {
        class: `row middle${this.cursor === MIDDLE ? " current" : ""}`,
        role: "option",
        "aria-selected": "false",
        "aria-setsize": this.view.rows.length,
        "aria-posinset": at + 1,
        onclick: () => this.openMiddle(),
      },
      `↕ ${whole(this.view.hidden)} more between the two ends: click to list them`,
    );
  }
  openMiddle() {
    this.select.opened = true;
    this.update();
    this.list.focus({preventScroll: true});
  }

  /** @param {number} at */
  exampleRow(at) {
    const place = this.view.rows[at],
      {select, table} = this,
      score = select.scores[place],
      {column} = this.source,
      snippet = this.snippets.get(place);
    const others = table.methods
      .map((method, number) => ({method, number}))
      .filter(({number}) => number !== select.method);
    const same = this.view.members.get(place)?.length ?? 0,
      mark = this.marks[place];
    const box = this.canDecide
      ? el(
          "span",
          {
            class: "box",
            "aria-hidden": "true",
            onclick: event => {
              event.stopPropagation();
              this.toggle(place, event.shiftKey);
            },
          },
          this.chosen.has(place) ? "☑" : "☐",
        )
      : null;
    const tag =
      mark === DROP
        ? el("span", {class: "tag drop"}, "✕ drop")
        : mark === KEEP
          ? el("span", {class: "tag keep"}, "✓ keep")
          : null;
    const labelled =
      table.has_labels && column("facet0")[place] === 0
        ? el("span", {class: "tag label", title: "labelled example"}, "labelled")
        : null;
    const first = el(
      "div",
      {class: "numbers"},
      box,
      el(
        "span",
        {class: `score ${this.side(score)}`, title: this.raw(place)},
        percent(column(`percentile${select.method}`)[place]),
      ),
      el("span", {class: "quiet distance", title: this.raw(place)}, this.distance(place)),
      this.whisker(place),
      el("span", {class: "quiet"}, `#${whole(column(`rank${select.method}`)[place])}`),
      tag,
      labelled,
      same ? el("span", {class: "tag"}, `+${whole(same)} alike`) : null,
      place in this.source.notes() ? el("span", {class: "tag"}, "✎ note") : null,
      ...others.slice(0, 4).map(({method, number}) =>
        el(
          "span",
          {
            class: `quiet other${number === select.against ? " against" : ""}`,
            title: `rank by ${method.name}`,
          },
          el("bdi", {}, method.short),
          ` #${whole(column(`rank${number}`)[place])}`,
        ),
      ),
    );
    return el(
      "div",
      {
        class: `row${place === this.cursor ? " current" : ""}${mark === DROP ? " dropped" : ""}`,
        role: "option",
        "aria-selected": String(this.chosen.has(place)),
        "aria-setsize": this.view.rows.length,
        "aria-posinset": at + 1,
        "aria-current": place === this.cursor ? "true" : undefined,
        onclick: event => this.click(at, event),
      },
      first,
      el("div", {class: "prompt quiet", dir: "auto"}, snippet ? snippet.prompt : "…"),
      el("div", {class: "response", dir: "auto"}, snippet ? snippet.response : ""),
    );
  }

  /**
   * @param {number} at
   * @param {any} event
   */
  click(at, event) {
    const place = this.view.rows[at];
    if (event.shiftKey && this.cursor !== null && this.canDecide)
      this.chooseRange(this.view.rows.indexOf(this.cursor), at);
    if ((event.ctrlKey || event.metaKey) && this.canDecide) return this.toggle(place);
    this.moveTo(at, false);
    this.list.focus({preventScroll: true});
    if (this.root.clientWidth < 720) this.reading.scrollIntoView({block: "nearest"});
  }
  /**
   * @param {number} a
   * @param {number} b
   */
  chooseRange(a, b) {
    if (a < 0) return;
    for (let at = Math.min(a, b); at <= Math.max(a, b); at++)
      if (this.view.rows[at] !== MIDDLE) this.chosen.add(this.view.rows[at]);
    this.drawStatus();
  }
  /** @param {number} place */
  toggle(place, range = false) {
    if (range && this.cursor !== null)
      this.chooseRange(this.view.rows.indexOf(this.cursor), this.view.rows.indexOf(place));
    else if (this.chosen.has(place)) this.chosen.delete(place);
    else this.chosen.add(place);
    this.drawStatus();
    this.draw();
  }

  /** @param {number} at */
  moveTo(at, scroll = true) {
    const {rows} = this.view;
    if (!rows.length) return;
    at = Math.max(0, Math.min(rows.length - 1, at));
    this.cursor = rows[at];
    if (scroll) {
      const top = at * ROW,
        {scrollTop, clientHeight} = this.list;
      if (top < scrollTop) this.list.scrollTop = top;
      else if (top + ROW > scrollTop + clientHeight) this.list.scrollTop = top + ROW - clientHeight;
    }
    this.draw();
    this.showExample();
  }

  /** @param {any} event */
  key(event) {
    const {rows} = this.view,
      {at} = this,
      page = Math.max(1, Math.floor(this.list.clientHeight / ROW) - 1);
    /** @type {Record<string, number>} */
    const steps = {
      ArrowDown: at + 1,
      ArrowUp: at - 1,
      PageDown: at + page,
      PageUp: at - page,
      Home: 0,
      End: rows.length - 1,
    };
    const to = steps[event.key];
    if (to !== undefined && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      if (event.shiftKey && this.canDecide) this.chooseRange(at, Math.max(0, Math.min(rows.length - 1, to)));
      this.moveTo(to);
    } else if (event.key === "Enter" && this.cursor === MIDDLE) {
      event.preventDefault();
      this.openMiddle();
    }
  }

  /**
   * Keys that work wherever the focus is, except while writing.
   * @param {any} event
   */
  anywhere(event) {
    const writing = event.target.matches("input:not([type=checkbox]), textarea, select");
    if (event.key === "Escape") {
      if (!writing && this.chosen.size) {
        this.chosen.clear();
        this.drawStatus();
        this.draw();
      }
      this.list.focus();
      return event.stopPropagation();
    }
    if (writing || event.ctrlKey || event.metaKey || event.altKey) return;
    const here = this.cursor === MIDDLE || this.cursor === null ? [] : [this.cursor],
      one = this.canDecide && here.length;
    /** @type {Record<string, false | 0 | (() => unknown)>} */
    const acts = {
      "/": () => this.search.focus(),
      "?": () => {
        this.help.open = !this.help.open;
      },
      d: one && (() => this.decideHere(DROP)),
      k: one && (() => this.decideHere(KEEP)),
      c: one && (() => this.decideHere(NONE)),
      x: one && (() => this.toggle(here[0])),
      n: one && (() => this.reading.querySelector("textarea")?.focus()),
      z: this.canDecide && (() => this.undo()),
    };
    const act = acts[event.key];
    if (!act) return;
    event.preventDefault();
    event.stopPropagation();
    act();
  }

  // ---- decisions ------------------------------------------------------------------------------------------------------------

  /** @param {number} mark */
  decideHere(mark) {
    if (this.chosen.size) return this.decide([...this.chosen], mark, this.bulkReason([...this.chosen]));
    if (this.cursor === null) return;
    const place = this.cursor,
      next = this.view.rows[this.at + 1];
    this.decide([place], mark, "one by one");
    if (mark !== NONE && next !== undefined) this.moveTo(this.view.rows.indexOf(next));
  }
  /**
   * @param {number[]} places
   * @param {number} mark
   * @param {string} why
   */
  async decide(places, mark, why) {
    places.forEach(place => {
      this.marks[place] = mark;
      this.chosen.delete(place);
    }); // shown at once; the kernel's answer settles it
    this.draw();
    this.drawMarks();
    try {
      await this.source.decide?.({places, mark, why});
    } catch (error) {
      this.fail(error);
    }
    this.marks = this.source.marks();
    this.update();
    this.drawMarks();
  }
  /**
   * @param {number[]} places
   * @param {string} text
   * @param {string} why
   */
  async note(places, text, why) {
    try {
      await this.source.decide?.({places, note: text, why});
    } catch (error) {
      this.fail(error);
    }
    this.update();
  }
  /** @param {number[]} places */
  bulkNote(places) {
    const box = el("textarea", {rows: 2, "aria-label": "Note for all of them"});
    const done = () => this.note(places, box.value, this.bulkReason(places));
    this.actions.replaceChildren(
      el("label", {class: "grow"}, `Note for ${counted(places.length, "example")} `, box),
      el("button", {type: "button", onclick: done}, "Write"),
      el("button", {type: "button", onclick: () => this.drawStatus()}, "Cancel"),
    );
    box.focus();
  }
  async undo() {
    if (!this.source.undoable()) return;
    const before = this.marks;
    try {
      await this.source.undo?.();
    } catch (error) {
      return this.fail(error);
    }
    this.marks = this.source.marks();
    this.update();
    const changed = [...this.marks.keys()].filter(place => this.marks[place] !== before[place]);
    if (changed.length === 1 && this.view.rows.includes(changed[0]))
      this.moveTo(this.view.rows.indexOf(changed[0]));
    else this.showExample();
  }
  async exportNow() {
    this.exported.textContent = "";
    try {
      this.exported.textContent = (await this.source.export?.(this.exportPath.value))?.words ?? "";
    } catch (error) {
      this.exported.textContent = /** @type {Error} */ (error).message;
    }
  }

  // ---- the example ----------------------------------------------------------------------------------------------------------

  async showExample() {
    const place = this.cursor;
    if (place === null || place === MIDDLE) {
      this.shown = null;
      this.reading.replaceChildren(
        el(
          "p",
          {class: "quiet"},
          place === null
            ? "Nothing to read: no example passes the filters."
            : `${whole(this.view.hidden)} examples lie between the two ends.`,
        ),
      );
      return;
    }
    let example = this.examples.get(place);
    if (!example) {
      this.reading.setAttribute("aria-busy", "true");
      try {
        [example] = await this.source.examples([place]);
      } catch (error) {
        return this.fail(error);
      }
      this.examples.set(place, example);
      if (this.examples.size > 200) this.examples.delete([...this.examples.keys()][0]);
      if (this.cursor !== place) return; // the reader has moved on
    }
    this.reading.removeAttribute("aria-busy");
    const writing = this.shown === place && this.reading.querySelector("textarea") === document.activeElement;
    if (writing) return this.drawMarks();
    if (this.shown !== place) this.reading.scrollTop = 0;
    this.shown = place;
    this.reading.replaceChildren(...this.exampleParts(place, example));
    this.drawMarks();
  }

  /**
   * An example's turns with the token scores of the method whose ranks are shown, and the parts of its score; without
   * scores where that method has none.
   * @param {Example} example
   * @returns {{turns: Turn[], parts?: Parts}}
   */
  drawn(example) {
    const {method} = this.select;
    if (method === 0) return example;
    const other = example.others?.[method],
      plain = example.turns.map(turn => ({role: turn.role, answer: turn.answer, text: textOf(turn)}));
    if (!other) return {turns: plain};
    const {parts, scores, sink} = other;
    if (!scores) return {turns: other.turns ?? plain, parts};
    return {
      parts,
      turns: example.turns.map((turn, i) => ({...turn, scores: scores[i], sink: sink && i === 0})),
    };
  }

  /**
   * @param {number} place
   * @param {Example} example
   */
  exampleParts(place, example) {
    const {table, source} = this,
      {column} = source;
    const readout = el("p", {class: "readout quiet", role: "status"}, "Point at a token to read its score.");
    const tell = (/** @type {string} */ text, /** @type {number} */ value) => {
      readout.replaceChildren(
        el("bdi", {class: "token"}, JSON.stringify(text)),
        " ",
        el("b", {}, signed(value, 5)),
      );
    };
    const {turns, parts} = this.drawn(example),
      {name, scale} = table.methods[this.select.method];
    const head = ["method", "higher than", "distance", "rank"];
    const numbers = el(
      "div",
      {class: "wide"},
      el(
        "table",
        {class: "numbers"},
        el(
          "thead",
          {},
          el(
            "tr",
            {},
            head.map(name => el("th", {scope: "col"}, name)),
          ),
        ),
        el(
          "tbody",
          {},
          table.methods.map((method, number) =>
            el(
              "tr",
              {class: number === this.select.method ? "here" : ""},
              el("th", {scope: "row"}, el("bdi", {}, method.name)),
              this.strip(column(`percentile${number}`)[place], this.raw(place, number)),
              el(
                "td",
                {title: this.raw(place, number)},
                this.distance(place, number) || "–",
                this.whisker(place, number),
              ),
              el("td", {title: `of ${whole(table.n_total)}`}, whole(column(`rank${number}`)[place])),
            ),
          ),
        ),
      ),
    );
    const alike = this.alike(place);
    return [
      el("div", {class: "decide"}),
      el(
        "p",
        {class: "quiet"},
        `row ${whole(column("row")[place])} · ${whole(column("length")[place])} ${table.length_unit} · higher than ${percent(column("similar")[place])} of the examples of similar length · id `,
        el("code", {}, example.id),
        source.link ? " · " : null,
        source.link ? el("a", {href: source.link(place)}, "link to this example") : null,
      ),
      numbers,
      parts ? partsBar(parts, table.methods.length > 1 ? name : "") : null,
      this.scaleNote(turns, readout),
      el("div", {class: "conversation"}, conversation(turns, scale ?? 0, tell)),
      this.asking.set(Number(column("row")[place]), place),
      alike,
      example.metadata.length
        ? el(
            "details",
            {open: example.metadata.length <= 6},
            el("summary", {}, "Metadata"),
            facts(example.metadata),
          )
        : null,
    ].filter(part => part !== null);
  }
  /**
   * How the tokens are coloured, or why they are not.
   * @param {Turn[]} turns
   * @param {HTMLElement} readout
   */
  scaleNote(turns, readout) {
    const {methods} = this.table,
      {name, scale} = methods[this.select.method],
      some = methods.some(method => method.scale);
    if (scale && turns.some(turn => turn.scores)) {
      const whose = methods.length > 1 ? `token scores of ${name}` : "token scores";
      return el("div", {class: "scale"}, legend(scale, whose, " One scale for all examples."), readout);
    }
    if (scale) return el("p", {class: "quiet"}, "The token scores of this example are not in this page.");
    return some ? el("p", {class: "quiet"}, el("bdi", {}, name), " has no token scores.") : null;
  }
  /**
   * @param {number} value
   * @param {string} title
   */
  strip(value, title) {
    const dot = el("span"),
      bar = el("span", {class: "strip", "aria-hidden": "true"}, dot);
    dot.style.left = `${value}%`;
    return el("td", {class: "with-strip", title}, percent(value), bar);
  }
  /** @param {number} place */
  alike(place) {
    const {groups} = this.select;
    if (!groups) return null;
    /** @type {number[]} */
    const others = [];
    groups.forEach((group, other) => {
      if (group === groups[place] && other !== place) others.push(other);
    });
    if (!others.length) return null;
    const all = [place, ...others];
    return el(
      "details",
      {class: "alike"},
      el("summary", {}, `${counted(others.length, "near-duplicate")} of this example`),
      el(
        "ul",
        {},
        others
          .slice(0, 50)
          .map(other =>
            el(
              "li",
              {},
              el(
                "button",
                {type: "button", class: "link", onclick: () => this.reveal(other)},
                `row ${whole(this.source.column("row")[other])}`,
              ),
              ` ${percent(this.source.column(`percentile${this.select.method}`)[other])} ${this.distance(other)}`,
            ),
          ),
      ),
      this.canDecide
        ? el(
            "button",
            {
              type: "button",
              onclick: () => {
                all.forEach(one => this.chosen.add(one));
                this.drawStatus();
                this.draw();
              },
            },
            `Select all ${whole(all.length)}`,
          )
        : null,
    );
  }
  /**
   * Go to an example even where it is folded or between the ends.
   * @param {number} place
   */
  reveal(place) {
    if (!this.view.rows.includes(place)) {
      this.select.fold = this.foldPick.checked = false;
      this.select.opened = true;
      this.update();
    }
    if (!this.view.rows.includes(place)) this.clearFilters();
    this.moveTo(this.view.rows.indexOf(place));
  }

  drawMarks() {
    const box = this.reading.querySelector(".decide"),
      place = this.shown;
    if (!box || !this.canDecide || place === null || place === undefined) return;
    const mark = this.marks[place],
      press = (/** @type {number} */ value, /** @type {string} */ words, /** @type {string} */ kind) =>
        el(
          "button",
          {
            type: "button",
            class: kind,
            "aria-pressed": String(mark === value && value !== NONE),
            onclick: () => this.decide([place], mark === value ? NONE : value, "one by one"),
          },
          words,
        );
    if (box.querySelector("textarea") && document.activeElement === box.querySelector("textarea")) {
      box
        .querySelector(".presses")
        ?.replaceChildren(press(DROP, "✕ Drop", "drop"), press(KEEP, "✓ Keep", "keep"));
      return;
    }
    const focused = box.contains(document.activeElement) ? document.activeElement?.className : null;
    const area = el("textarea", {
      rows: 1,
      placeholder: "Note: why?",
      "aria-label": "Note on this example",
      value: this.source.notes()[place] ?? "",
    });
    area.addEventListener("change", () => this.note([place], area.value, "one by one"));
    area.addEventListener("keydown", event => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) area.blur();
    });
    box.replaceChildren(
      el("span", {class: "presses"}, press(DROP, "✕ Drop", "drop"), press(KEEP, "✓ Keep", "keep")),
      area,
    );
    if (focused) focusOn(box, `button.${focused}`);
  }
}

/**
 * Draw the browser for a data set that stands as JSON in the page; works from a file, without a kernel.
 * @param {HTMLElement} root
 * @param {EmbeddedData} data
 */
function mountEmbedded(root, data) {
  const view = new ExampleView(root, embeddedSource(data));
  const follow = () => {
    const place = data.examples.findIndex(example => exampleLink(example) === location.hash);
    if (place >= 0 && place !== view.cursor) view.reveal(place);
  };
  addEventListener("hashchange", follow);
  follow();
  return view;
}
