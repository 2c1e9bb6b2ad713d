// Examples × features as a heat map: what one step on each example does to each weight of a policy. Rows are drawn as they
// come into view, so a thousand examples scroll like ten.

const SHIFT_ROW = 28, // pixels
  CELL_WIDTHS = [18, 160],
  NUMBERS_FROM = 60, // a cell as wide as this shows its number
  HEAVY = 0.99; // beyond this quantile of the sizes cells have the full colour

/**
 * Numbers from a kernel (bytes), or out of a page (base64).
 * @param {DataView | string} given
 */
function float32(given) {
  if (typeof given === "string")
    return new Float32Array(Uint8Array.from(atob(given), one => one.charCodeAt(0)).buffer);
  return new Float32Array(given.buffer.slice(given.byteOffset, given.byteOffset + given.byteLength));
}

/** The shifts of all examples: in two parts each, and before ridge shares them out. */
class ShiftNumbers {
  /**
   * @param {ShiftTable} table
   * @param {DataView | string} given float32 [4, examples, features]: ΔW_X, ΔW_Y, UΔW_X, UΔW_Y
   */
  constructor(table, given) {
    this.table = table;
    this.n = table.scores.length;
    this.f = table.features.length;
    this.all = float32(given);
  }
  /**
   * @param {ShiftPart} part
   * @param {boolean} evidence UΔW instead of ΔW
   * @param {number} row
   * @param {number} feature
   */
  at(part, evidence, row, feature) {
    const size = this.n * this.f,
      place = (evidence ? 2 * size : 0) + row * this.f + feature;
    if (part === "features") return this.all[place];
    if (part === "behaviour") return this.all[place + size];
    return this.all[place] + this.all[place + size];
  }
  /**
   * Share of Σ|ΔW_j| outside the targets, the feature that moves most, and whether that one is outside.
   * @param {number} row
   * @param {(feature: number) => boolean} isTarget
   */
  interference(row, isTarget) {
    let whole = 0,
      off = 0,
      largest = 0,
      most = -1;
    for (let feature = 0; feature < this.f; feature++) {
      const size = Math.abs(this.at("both", false, row, feature));
      whole += size;
      if (!isTarget(feature)) off += size;
      if (size > most) [most, largest] = [size, feature];
    }
    return {off: whole > 0 ? off / whole : 0, largest, flag: whole > 0 && !isTarget(largest)};
  }
  /**
   * The size that gets the full colour, of one feature or of all.
   * @param {ShiftPart} part
   * @param {boolean} evidence
   * @param {number | null} only
   */
  limit(part, evidence, only = null) {
    const features = only === null ? [...Array(this.f).keys()] : [only];
    const sizes = features.flatMap(feature =>
      Array.from({length: this.n}, (_, row) => Math.abs(this.at(part, evidence, row, feature))),
    );
    sizes.sort((a, b) => a - b);
    return sizes[Math.ceil(HEAVY * (sizes.length - 1))] || (sizes.at(-1) ?? 0);
  }
}

/** The heat map. What it shows is handed to it; it tells which row or column somebody points at. */
class ShiftHeat {
  /** @type {number[]} */
  rows = [];
  /** @type {number | null} */
  row = null;
  column = 0;
  drawSoon = nextFrame(() => this.draw());
  cell = CELL_WIDTHS[0];

  /**
   * @param {ShiftTable} table
   * @param {ShiftHeatCalls} calls
   */
  constructor(table, calls) {
    this.table = table;
    this.calls = calls;
    this.id = `shifts-${Math.random().toString(36).slice(2)}`;
    this.head = el("div", {class: "heat-head", role: "row"});
    this.spacer = el("div", {class: "heat-rows", role: "presentation"});
    this.node = el(
      "div",
      {
        class: "heat",
        tabindex: "0",
        role: "grid",
        "aria-label": "Examples and features",
        "aria-rowcount": table.scores.length + 1,
        "aria-colcount": table.features.length + 1,
        onscroll: () => this.drawSoon(),
        onkeydown: event => this.key(event),
      },
      this.head,
      this.spacer,
    );
    new ResizeObserver(() => this.drawSoon()).observe(this.node);
  }

  /** @param {number[]} rows places of the examples, in their order */
  show(rows) {
    this.rows = rows;
    this.node.scrollTop = 0;
    this.draw();
  }
  draw() {
    const {features} = this.table,
      side = parseFloat(getComputedStyle(this.node).getPropertyValue("--side")) || 160,
      room = (this.node.clientWidth - side) / features.length,
      [least, most] = CELL_WIDTHS;
    this.cell = Math.floor(Math.max(least, Math.min(most, room)));
    this.node.style.setProperty("--cell", `${this.cell}px`);
    this.node.classList.toggle("roomy", this.cell >= NUMBERS_FROM);
    const width = `${side + this.cell * features.length}px`;
    this.head.style.width = this.spacer.style.width = width;
    this.drawHead();
    this.drawRows();
  }
  drawHead() {
    const {features} = this.table,
      sort = this.calls.sort();
    const heads = features.map((feature, at) =>
      el(
        "button",
        {
          type: "button",
          tabindex: "-1",
          role: "columnheader",
          class: `heat-name${this.calls.isTarget(at) ? " target" : ""}${at === this.column ? " at" : ""}`,
          title: `${feature.name}: weight ${signed(feature.weight)}, 95 % ${signed(feature.low)} to ${signed(feature.high)}. Click to sort by its shift`,
          "aria-sort": sort.by === at ? (sort.down ? "descending" : "ascending") : undefined,
          onclick: () => this.calls.onSort(at),
        },
        el("bdi", {class: "words"}, feature.name),
        el("span", {class: "mark", "aria-hidden": "true"}, sort.by === at ? (sort.down ? "▼" : "▲") : ""),
      ),
    );
    this.head.replaceChildren(
      el("div", {class: "heat-side corner", role: "columnheader"}, this.calls.corner()),
      ...heads,
    );
  }
  drawRows() {
    const {rows} = this,
      top = Math.max(0, this.node.scrollTop),
      height = this.node.clientHeight || 480;
    this.spacer.style.height = `${rows.length * SHIFT_ROW}px`;
    const from = Math.max(0, Math.floor(top / SHIFT_ROW) - 4),
      to = Math.min(rows.length, Math.ceil((top + height) / SHIFT_ROW) + 4);
    this.spacer.replaceChildren(...rows.slice(from, to).map((row, at) => this.rowNode(row, from + at)));
    if (this.spacer.querySelector(".current"))
      this.node.setAttribute("aria-activedescendant", `${this.id}-${this.row}`);
    else this.node.removeAttribute("aria-activedescendant");
  }
  /**
   * @param {number} row
   * @param {number} at
   */
  rowNode(row, at) {
    const here = row === this.row;
    const cells = this.table.features.map((feature, column) => {
      const value = this.calls.value(row, column);
      const cell = el(
        "div",
        {
          class: `heat-cell${here && column === this.column ? " at" : ""}`,
          role: "gridcell",
          title: `${feature.name}: ${signed(value)}`,
          "aria-label": `${feature.name}: ${signed(value)}`,
        },
        this.cell >= NUMBERS_FROM ? signed(value, 2) : "",
      );
      cell.style.background = ground(value, this.calls.limit(column));
      cell.dataset.at = String(column);
      return cell;
    });
    const node = el(
      "div",
      {
        class: `heat-row${here ? " current" : ""}`,
        id: `${this.id}-${row}`,
        role: "row",
        "aria-rowindex": at + 2,
        "aria-selected": String(here),
        onclick: event => {
          const {at: column} = event.target.dataset;
          this.moveTo(at, column === undefined ? this.column : Number(column), false);
          this.node.focus({preventScroll: true});
          this.calls.onClick();
        },
        onpointerover: event => this.calls.onHover(row, Number(event.target.dataset.at ?? this.column)),
        onpointerleave: () => this.calls.onHover(null, 0),
      },
      el("div", {class: "heat-side", role: "rowheader"}, this.calls.side(row)),
      ...cells,
    );
    node.style.top = `${at * SHIFT_ROW}px`;
    return node;
  }

  /**
   * Put the cursor on a row of the list and a column.
   * @param {number} at
   * @param {number} column
   */
  moveTo(at, column, scroll = true) {
    if (!this.rows.length) return;
    at = Math.max(0, Math.min(this.rows.length - 1, at));
    this.row = this.rows[at];
    this.column = Math.max(0, Math.min(this.table.features.length - 1, column));
    if (scroll) {
      const {node} = this,
        head = this.head.offsetHeight,
        side = this.head.firstElementChild?.clientWidth ?? 0,
        top = at * SHIFT_ROW,
        left = this.column * this.cell;
      node.scrollTop = Math.min(top, Math.max(node.scrollTop, top + SHIFT_ROW + head - node.clientHeight));
      node.scrollLeft = Math.min(left, Math.max(node.scrollLeft, left + this.cell + side - node.clientWidth));
    }
    this.drawHead();
    this.drawRows();
    this.calls.onRow(this.row, this.column);
  }
  /** @param {any} event */
  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target !== this.node) return;
    const at = this.row === null ? -1 : this.rows.indexOf(this.row),
      page = Math.max(1, Math.floor(this.node.clientHeight / SHIFT_ROW) - 3),
      {column} = this;
    /** @type {Record<string, [number, number]>} */
    const steps = {
      ArrowDown: [at + 1, column],
      ArrowUp: [at - 1, column],
      ArrowRight: [at, column + 1],
      ArrowLeft: [at, column - 1],
      PageDown: [at + page, column],
      PageUp: [at - page, column],
      Home: [0, column],
      End: [this.rows.length - 1, column],
    };
    if (event.key in steps) this.moveTo(...steps[event.key]);
    else if (event.key === "s") this.calls.onSort(column);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }
}
