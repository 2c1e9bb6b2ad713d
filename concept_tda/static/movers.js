// Two results on the same examples: percentile by percentile as a scatter, the movers as a list, an example with the token scores of both.

const MOST_MOVERS = 50; // lines of the list

/** The map's points and brush over a diagonal, on which nothing has moved. */
class MoverPlot extends MapPlot {
  /**
   * @param {Column} across
   * @param {Column} up
   * @param {PlotCalls} calls
   */
  constructor(across, up, calls) {
    super(across, up, calls);
    this.diagonal = svg("line", {class: "diagonal"});
    this.overlay.prepend(this.diagonal);
    this.node.setAttribute(
      "aria-label",
      `${counted(across.length, "example")}. Arrow keys go from point to point, with Shift they stretch a rectangle, Space selects.`,
    );
  }
  draw() {
    super.draw();
    const ends = {x1: MARGIN, y1: this.height - MARGIN, x2: this.width - MARGIN, y2: MARGIN};
    for (const [name, value] of Object.entries(ends)) this.diagonal.setAttribute(name, String(value));
  }
}

/** The whole view. */
class MoverView {
  /** @type {Set<number>} places */
  selected = new Set();
  /** @type {number | null} the example that is read */
  read = null;
  /** @type {"up" | "down" | "both" | "selected" | "word"} which examples are listed */
  listed = "up";
  word = "";
  /** @type {number[]} */
  withWord = [];
  /** @type {Map<number, Snippet>} */
  snippets = new Map();

  // The elements, which `build` makes.
  /** @type {HTMLElement} */
  root;
  /** @type {HTMLElement} */
  tabs;
  /** @type {HTMLElement} */
  status;
  /** @type {HTMLElement} */
  list;
  /** @type {HTMLElement} */
  told;
  /** @type {HTMLElement} */
  reading;
  /** @type {HTMLElement} */
  problem;

  /**
   * @param {HTMLElement} root
   * @param {MoverSource} source
   * @param {SharedList | null} shared the selection in Python, where there is one
   */
  constructor(root, source, shared = null) {
    this.source = source;
    this.table = source.table;
    this.shared = shared;
    const share = (/** @type {string} */ name) =>
      Float32Array.from(source.column(name), value => value / 100);
    this.before = source.column("percentile0");
    this.after = source.column("percentile1");
    this.moves = source.column("move");
    this.plot = new MoverPlot(share("percentile0"), share("percentile1"), {
      onSelect: (places, mode) => this.brushed(places, mode),
      onHover: place => this.tell(place),
      onPoint: place => this.open(place),
    });
    const places = [...this.moves.keys()],
      far = Math.max(1, ...places.map(place => Math.abs(this.moves[place])));
    this.plot.order = places.sort((a, b) => Math.abs(this.moves[a]) - Math.abs(this.moves[b]));
    this.plot.fill = place => {
      const strength = Math.abs(this.moves[place]) / far,
        colour = this.moves[place] > 0 ? "238,112,20" : "42,120,220";
      return strength < 0.05
        ? "rgba(128,128,128,.4)"
        : `rgba(${colour},${(0.25 + 0.75 * strength).toFixed(2)})`;
    };
    this.plot.marks = new Uint8Array(places.length);
    this.build(root);
    this.take();
    shared?.onChange(() => this.take());
    const first = this.places()[0];
    if (first !== undefined) this.plot.moveTo(first);
  }

  /** @param {HTMLElement} root */
  build(root) {
    const {table} = this,
      [one, other] = table.results;
    this.tabs = el("div", {class: "classes", role: "group", "aria-label": "Which examples to list"});
    this.status = el("p", {class: "quiet", role: "status"});
    this.list = el("div", {class: "movers-list", "aria-label": "Examples that moved", role: "group"});
    this.told = el("p", {class: "quiet told-line", role: "status"});
    this.reading = el("div", {class: "mover-reading", role: "region", "aria-label": "The chosen example"});
    this.problem = el("p", {class: "problem", role: "alert", hidden: true});
    this.root = el(
      "section",
      {class: "ctda-view movers", "aria-label": table.title, "data-lm-suppress-shortcuts": "true"},
      el(
        "div",
        {class: "inside"},
        el("h3", {}, el("bdi", {}, table.title)),
        el("p", {class: "quiet"}, table.subtitle),
        this.problem,
        el(
          "div",
          {class: "map-panes"},
          el(
            "div",
            {class: "map-left"},
            el("div", {class: "quiet axis"}, "▲ percentile by ", el("bdi", {}, other.name)),
            this.plot.node,
            el("div", {class: "quiet axis across"}, "percentile by ", el("bdi", {}, one.name), " ▶"),
            el(
              "p",
              {class: "quiet"},
              el("span", {class: "key more"}, "orange"),
              " rose, ",
              el("span", {class: "key less"}, "blue"),
              " fell; on the dotted line nothing moved. Drag to select, click to read.",
            ),
            this.told,
          ),
          el("div", {class: "map-right"}, this.tabs, this.status, this.list),
        ),
        this.reading,
        this.wordPart(),
        this.differsPart(),
      ),
    );
    root.replaceChildren(this.root);
  }

  wordPart() {
    const {words} = this.table;
    const side = (/** @type {string} */ title, /** @type {string} */ kind, /** @type {WordRow[]} */ rows) =>
      el(
        "div",
        {},
        el("p", {}, el("span", {class: `key ${kind}`}, title)),
        rows.length
          ? wordChips(rows, ["that rose most", "that fell most"], word => this.pickWord(word))
          : el("p", {class: "quiet"}, "No word is beyond chance."),
      );
    const any = words.highest.length + words.lowest.length > 0;
    return el(
      "details",
      {class: "words-part", open: any},
      el("summary", {}, "Words that movers share"),
      any
        ? el(
            "div",
            {class: "two"},
            side("in those that rose", "more", words.highest),
            side("in those that fell", "less", words.lowest),
          )
        : null,
      el("p", {class: "quiet"}, words.words),
    );
  }
  differsPart() {
    const {differs, results} = this.table;
    const head = ["", results[0].name, results[1].name].map(name =>
      el("th", {scope: "col"}, el("bdi", {}, name)),
    );
    return el(
      "details",
      {class: "differs", open: differs.length > 0 && differs.length <= 8},
      el(
        "summary",
        {},
        `What the two query cards say differently: ${counted(differs.length, "entry", "entries")}`,
      ),
      el(
        "div",
        {class: "wide"},
        el(
          "table",
          {class: "facts"},
          el("thead", {}, el("tr", {}, head)),
          el(
            "tbody",
            {},
            differs.map(([field, one, other]) =>
              el(
                "tr",
                {},
                el("th", {scope: "row"}, field),
                el("td", {}, el("bdi", {}, one)),
                el("td", {}, el("bdi", {}, other)),
              ),
            ),
          ),
        ),
      ),
    );
  }

  // ---- the list -------------------------------------------------------------------------------------------------------------

  /** The places of the list, in its order. */
  places() {
    const {moves, before, after} = this,
      all = [...moves.keys()],
      largest = (/** @type {number[]} */ places) =>
        places.sort((a, b) => Math.abs(moves[b]) - Math.abs(moves[a]));
    if (this.listed === "selected") return largest([...this.selected]);
    if (this.listed === "word") return largest([...this.withWord]);
    if (this.listed === "both")
      return all.sort((a, b) => Math.min(before[b], after[b]) - Math.min(before[a], after[a]));
    const up = this.listed === "up";
    return largest(all.filter(place => (up ? moves[place] > 0 : moves[place] < 0)));
  }
  /** @param {MoverView["listed"]} listed */
  show(listed) {
    this.listed = listed;
    this.list.scrollTop = 0;
    this.drawList();
  }
  /** @param {string} word */
  async pickWord(word) {
    try {
      this.withWord = [...(await this.source.search(`"${word}"`))];
    } catch (error) {
      return this.fail(error);
    }
    this.word = word;
    this.show("word");
  }
  /** @param {any} error */
  fail(error) {
    this.problem.textContent = error.message;
    this.problem.hidden = false;
  }

  drawTabs() {
    /** @type {[MoverView["listed"], string][]} */
    const names = [
      ["up", "rose most"],
      ["down", "fell most"],
      ["both", "high in both"],
    ];
    if (this.selected.size) names.push(["selected", `${whole(this.selected.size)} selected`]);
    if (this.word) names.push(["word", `with “${this.word}”`]);
    this.tabs.replaceChildren(
      ...names.map(([listed, words]) =>
        el(
          "button",
          {
            type: "button",
            "aria-pressed": String(this.listed === listed),
            onclick: () => this.show(listed),
          },
          words,
        ),
      ),
    );
  }
  async drawList() {
    const {listed} = this,
      places = this.places(),
      shown = places.slice(0, MOST_MOVERS);
    this.drawTabs();
    this.status.textContent =
      places.length > MOST_MOVERS
        ? `The first ${whole(MOST_MOVERS)} of ${counted(places.length, "example")}`
        : counted(places.length, "example");
    const missing = shown.filter(place => !this.snippets.has(place));
    this.drawLines(shown);
    if (!missing.length) return;
    try {
      (await this.source.snippets(missing)).forEach((one, at) => this.snippets.set(missing[at], one));
    } catch (error) {
      return this.fail(error);
    }
    if (listed === this.listed) this.drawLines(shown);
  }
  /** @param {number[]} places */
  drawLines(places) {
    const inside = this.list.contains(document.activeElement);
    this.list.replaceChildren(
      ...places.map(place => {
        const said = this.snippets.get(place);
        return el(
          "button",
          {
            type: "button",
            class: "mover",
            "data-place": place,
            "aria-current": place === this.read ? "true" : undefined,
            onclick: () => this.plot.moveTo(place),
          },
          this.movePart(place),
          el("span", {class: "quiet asked", dir: "auto"}, said?.prompt ?? "…"),
          el("span", {class: "answered", dir: "auto"}, said?.response ?? ""),
        );
      }),
    );
    if (inside) focusOn(this.list, '[aria-current="true"]');
  }
  /** @param {number} place */
  movePart(place) {
    const {column} = this.source,
      move = this.moves[place];
    return el(
      "span",
      {},
      el(
        "span",
        {class: `move ${move > 0 ? "up" : "down"}`},
        `${move > 0 ? "▲" : "▼"} ${signed(Math.round(move), 3)} points`,
      ),
      el("span", {class: "quiet"}, ` #${whole(column("rank0")[place])} → #${whole(column("rank1")[place])}`),
    );
  }

  // ---- the selection --------------------------------------------------------------------------------------------------------

  /** Take the selection over from Python. */
  take() {
    this.selected = new Set(this.shared?.get() ?? []);
    if (this.selected.size) this.listed = "selected";
    else if (this.listed === "selected") this.listed = "up";
    this.drawSelection();
  }
  /**
   * @param {number[]} places
   * @param {BrushMode} mode
   */
  brushed(places, mode) {
    this.selected = brushedSelection(this.selected, places, mode);
    this.shared?.set([...this.selected].sort((a, b) => a - b));
    this.listed = this.selected.size ? "selected" : this.listed === "selected" ? "up" : this.listed;
    this.drawSelection();
  }
  drawSelection() {
    this.plot.selected = this.selected;
    this.plot.drawSoon();
    this.drawList();
  }

  // ---- one example ----------------------------------------------------------------------------------------------------------

  /** @param {number | null} place */
  tell(place) {
    const shown = place ?? this.read;
    if (shown === null) return;
    const {column} = this.source;
    this.told.replaceChildren(
      `Row ${whole(column("row")[shown])}: `,
      this.movePart(shown),
      ` · ${percent(this.before[shown])} → ${percent(this.after[shown])}`,
    );
  }
  /** @param {number} place */
  async open(place) {
    this.read = place;
    this.tell(null);
    this.list.querySelectorAll(".mover").forEach(line => {
      if (line.getAttribute("data-place") === String(place)) line.setAttribute("aria-current", "true");
      else line.removeAttribute("aria-current");
    });
    let example;
    try {
      [example] = /** @type {any[]} */ (await this.source.examples([place]));
    } catch (error) {
      return this.fail(error);
    }
    if (this.read !== place) return;
    const readout = el("p", {class: "quiet readout", role: "status"}, "Point at a token to read its score.");
    this.reading.replaceChildren(
      el(
        "p",
        {class: "quiet"},
        `Row ${whole(this.source.column("row")[place])} · `,
        this.movePart(place),
        " · id ",
        el("code", {}, example.id),
      ),
      readout,
      el(
        "div",
        {class: "both"},
        this.side(0, place, example.turns, readout),
        this.side(1, place, example.other, readout),
      ),
    );
  }
  /**
   * An example as one of the results colours it.
   * @param {number} number
   * @param {number} place
   * @param {Turn[]} turns
   * @param {HTMLElement} readout
   */
  side(number, place, turns, readout) {
    const result = this.table.results[number],
      rank = whole(this.source.column(`rank${number}`)[place]);
    const tell = (/** @type {string} */ text, /** @type {number} */ value) =>
      readout.replaceChildren(
        el("bdi", {class: "token"}, JSON.stringify(text)),
        " ",
        el("b", {}, signed(value, 5)),
        " by ",
        el("bdi", {}, result.name),
      );
    const coloured = turns.some(turn => turn.scores);
    return el(
      "div",
      {},
      el("h4", {}, el("bdi", {}, result.name), ` · rank ${rank} of ${whole(this.table.n_total)}`),
      el("p", {class: "quiet"}, result.reading),
      coloured
        ? legend(result, "token scores")
        : el(
            "p",
            {class: "quiet"},
            result.tokens
              ? "The token scores of this example did not fit into the page."
              : "This method gives no token scores.",
          ),
      el("div", {class: "conversation"}, conversation(turns, result, tell)),
    );
  }
}

/**
 * Draw two results for data that stand as JSON in the page; works from a file, without a kernel.
 * @param {HTMLElement} root
 * @param {any} data
 */
function mountMovers(root, data) {
  return new MoverView(root, /** @type {any} */ (embeddedSource(data)));
}
