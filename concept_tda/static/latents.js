// The latents of two models: a scatter with the noise floor, the brushed ones as a table, and the texts that fire one of them, in both models.

const LATENT_KINDS = [
    {name: "novel", colour: "#ee7014"},
    {name: "not beyond chance", colour: "#2a78dc"},
    {name: "dead", colour: "rgba(128,128,128,.45)"},
  ],
  MOST_LATENTS = 50; // lines of the table

/** The map's points and brush, over what further training alone gives. */
class LatentPlot extends MapPlot {
  /**
   * @param {LatentTable} table
   * @param {PlotCalls} calls
   */
  constructor(table, calls) {
    super(
      Float32Array.from(table.rows, row => row.x),
      Float32Array.from(table.rows, row => row.y),
      calls,
    );
    this.table = table;
    this.floor = svg("polygon", {class: "floor"});
    this.lines = table.lines.map(() => svg("line", {class: "floor"}));
    this.overlay.prepend(this.floor, ...this.lines);
    this.node.setAttribute(
      "aria-label",
      `${counted(table.rows.length, "latent")}. Arrow keys go from point to point, with Shift they stretch a rectangle, Space selects, Enter reads.`,
    );
  }
  /** @param {number} x */
  across01(x) {
    return MARGIN + x * (this.width - 2 * MARGIN);
  }
  /** @param {number} y */
  up01(y) {
    return MARGIN + (1 - y) * (this.height - 2 * MARGIN);
  }
  draw() {
    super.draw();
    const corners = this.table.contour.map(([x, y]) => `${this.across01(x)},${this.up01(y)}`);
    this.floor.setAttribute("points", corners.join(" "));
    this.table.lines.forEach(({axis, at}, number) => {
      const ends =
        axis === "x"
          ? {x1: this.across01(at), x2: this.across01(at), y1: 0, y2: this.height}
          : {x1: 0, x2: this.width, y1: this.up01(at), y2: this.up01(at)};
      for (const [name, value] of Object.entries(ends)) this.lines[number].setAttribute(name, String(value));
    });
  }
}

/** The whole view. */
class LatentView {
  /** @type {Set<number>} places in the table */
  selected = new Set();
  /** @type {number | null} the latent that is read */
  read = null;

  // The elements, which `build` makes.
  /** @type {HTMLElement} */
  root;
  /** @type {HTMLElement} */
  status;
  /** @type {HTMLElement} */
  list;
  /** @type {HTMLElement} */
  told;
  /** @type {HTMLElement} */
  reading;
  /** @type {HTMLElement} */
  token;

  /**
   * @param {HTMLElement} root
   * @param {{table: LatentTable, texts: Record<string, LatentText[]>}} data
   * @param {SharedList | null} shared the selection in Python, where there is one: numbers of latents
   */
  constructor(root, data, shared = null) {
    this.table = data.table;
    this.texts = data.texts;
    this.shared = shared;
    this.placeOf = new Map(this.table.rows.map((row, place) => [row.latent, place]));
    this.plot = new LatentPlot(this.table, {
      onSelect: (places, mode) => this.brushed(places, mode),
      onHover: place => this.hover(place),
      onPoint: place => this.open(place),
    });
    const {rows} = this.table;
    this.plot.order = rows.map((_, place) => place).sort((a, b) => rows[b].kind - rows[a].kind);
    this.plot.fill = place => LATENT_KINDS[rows[place].kind].colour;
    this.plot.marks = new Uint8Array(rows.length);
    this.build(root);
    this.take();
    shared?.onChange(() => this.take());
  }

  /** @param {HTMLElement} root */
  build(root) {
    const {table} = this;
    this.status = el("p", {class: "quiet", role: "status"});
    this.list = el("div", {class: "latent-list"});
    this.told = el("p", {class: "quiet told-line", role: "status"});
    this.token = el("p", {class: "quiet told-line"});
    this.reading = el("div", {
      class: "latent-reading",
      role: "region",
      "aria-label": "Texts that fire the latent",
    });
    this.root = el(
      "section",
      {
        class: "ctda-view latents",
        "aria-label": "Latents of two models",
        "data-lm-suppress-shortcuts": "true",
        onkeydown: event => this.key(event),
      },
      el(
        "div",
        {class: "inside"},
        el("h3", {}, el("bdi", {}, table.title)),
        el("p", {class: "quiet"}, table.subtitle),
        el(
          "div",
          {class: "map-panes"},
          el(
            "div",
            {class: "map-left"},
            el("div", {class: "quiet axis"}, `▲ ${table.axes[1]}`),
            this.plot.node,
            el("div", {class: "quiet axis across"}, `${table.axes[0]} ▶`),
            this.legend(),
          ),
          el("div", {class: "map-right"}, this.status, this.list),
        ),
        this.told,
        this.reading,
        this.token,
      ),
    );
    root.replaceChildren(this.root);
  }
  legend() {
    const kinds = LATENT_KINDS.map(({name, colour}, kind) => {
      const places = this.table.rows.flatMap((row, place) => (row.kind === kind ? [place] : [])),
        dot = el("span", {class: "dot", "aria-hidden": "true"});
      dot.style.background = colour;
      if (!places.length) return null;
      return el(
        "button",
        {
          type: "button",
          title: `Select these ${counted(places.length, "latent")}; with Shift add them`,
          onclick: event => this.brushed(places, event.shiftKey ? "add" : "replace"),
        },
        dot,
        name,
        el("span", {class: "quiet"}, ` ${whole(places.length)}`),
      );
    });
    return el("div", {class: "classes"}, kinds, el("p", {class: "quiet"}, this.table.floor));
  }

  // ---- the selection --------------------------------------------------------------------------------------------------------

  /** Take the selection over from Python. */
  take() {
    const latents = this.shared?.get() ?? [];
    this.selected = new Set(latents.flatMap(latent => this.placeOf.get(latent) ?? []));
    this.drawSelection();
  }
  /**
   * @param {number[]} places
   * @param {BrushMode} mode
   */
  brushed(places, mode) {
    this.selected = brushedSelection(this.selected, places, mode);
    this.shared?.set([...this.selected].sort((a, b) => a - b).map(place => this.table.rows[place].latent));
    this.drawSelection();
  }
  drawSelection() {
    const chosen = [...this.selected].sort((a, b) => a - b),
      {rows} = this.table,
      listed = chosen.length ? chosen : rows.map((_, place) => place).filter(place => rows[place].kind < 2);
    this.plot.selected = this.selected;
    this.plot.drawSoon();
    const first = `the first ${whole(Math.min(MOST_LATENTS, listed.length))} by score`;
    this.status.textContent = chosen.length
      ? `${whole(chosen.length)} of ${counted(rows.length, "latent")} selected${chosen.length > MOST_LATENTS ? `; ${first}` : ""}`
      : `Drag over the points to select; listed are ${first}`;
    this.drawList(listed.slice(0, MOST_LATENTS));
  }
  /** @param {number[]} places */
  drawList(places) {
    const {columns, rows} = this.table;
    const lines = places.map(place => {
      const open = el(
        "button",
        {type: "button", class: "link", onclick: () => this.plot.moveTo(place)},
        String(rows[place].latent),
      );
      return el(
        "tr",
        {class: place === this.read ? "read" : ""},
        el("th", {scope: "row"}, open),
        rows[place].values.map(value => el("td", {}, value === null ? "–" : general(value, 3))),
      );
    });
    const head = el(
      "tr",
      {},
      ["latent", ...columns].map(name => el("th", {scope: "col"}, name)),
    );
    this.list.replaceChildren(el("table", {}, el("thead", {}, head), el("tbody", {}, lines)));
  }

  // ---- one latent -----------------------------------------------------------------------------------------------------------

  /** @param {number} place */
  words(place) {
    const {latent, kind, values} = this.table.rows[place];
    const parts = this.table.columns
      .map((name, at) => [name, values[at]])
      .filter(([, value]) => value !== null);
    return `Latent ${latent}, ${LATENT_KINDS[kind].name}: ${parts.map(([name, value]) => `${name} ${general(Number(value), 3)}`).join(" · ")}`;
  }
  /** @param {number | null} place */
  hover(place) {
    const shown = place ?? this.read;
    this.told.textContent = shown === null ? "" : this.words(shown);
  }
  /** @param {number} place */
  open(place) {
    this.read = place;
    this.hover(null);
    this.token.textContent = "";
    const texts = this.texts[String(this.table.rows[place].latent)] ?? [];
    const limit = Math.max(0, ...texts.flatMap(text => [...text.base, ...text.tuned]));
    this.reading.replaceChildren(
      ...(texts.length
        ? [...texts.map(text => this.pair(text, limit)), this.scale(limit)]
        : [el("p", {class: "quiet"}, "No texts were read for this latent.")]),
    );
    this.drawSelection();
  }
  /**
   * One text twice: as the latent fires in the base model, and in the fine-tuned one.
   * @param {LatentText} text
   * @param {number} limit
   */
  pair(text, limit) {
    const side = (/** @type {string} */ model, /** @type {number[]} */ codes) =>
      el(
        "div",
        {class: "turn"},
        el("div", {class: "role"}, `${model}: ${general(Math.max(0, ...codes), 3)} at most`),
        tokenText(text.tokens, codes, {limit, centre: 0, signed: true}, (token, value) => {
          this.token.textContent = `“${token}” in the ${model}: ${general(value, 4)}`;
        }),
      );
    return el(
      "div",
      {class: "firing"},
      el("p", {class: "quiet"}, "id ", el("code", {}, text.id)),
      el("div", {class: "both"}, side("base model", text.base), side("fine-tuned model", text.tuned)),
    );
  }
  /** @param {number} limit */
  scale(limit) {
    const steps = [0, 0.25, 0.5, 0.75, 1].map(step => {
      const box = el("span");
      box.style.background = ground(step, 1);
      return box;
    });
    return el(
      "p",
      {class: "legend quiet"},
      "How much it fires, on one scale for all texts: 0 ",
      el("span", {class: "swatches", "aria-hidden": "true"}, steps),
      ` ${general(limit, 3)}`,
    );
  }

  /** @param {any} event */
  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape") this.brushed([], "replace");
    else if (event.key === "Enter" && event.target === this.plot.node && this.plot.cursor !== null)
      this.open(this.plot.cursor);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }
}

/**
 * Draw the latents for data that stand as JSON in the page; works from a file, without a kernel.
 * @param {HTMLElement} root
 * @param {any} data
 */
function mountLatents(root, data) {
  return new LatentView(root, data);
}
