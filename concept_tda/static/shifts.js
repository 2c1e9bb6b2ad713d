// What training examples do to a policy: its weights with their intervals, a heat map of examples and features, and one
// example taken apart beside its text.

/** @type {{by: ShiftOrder, name: string}[]} */
const SHIFT_ORDERS = [
  {by: "score", name: "score ΔW·W"},
  {by: "size", name: "size Σ|ΔW|"},
  {by: "off", name: "off-target share"},
  {by: "flag", name: "flag"},
  {by: "file", name: "place in the file"},
];
/** @type {{part: ShiftPart, name: string, words: string}[]} */
const SHIFT_PARTS = [
  {part: "both", name: "whole shift", words: ""},
  {part: "features", name: "by features (X)", words: "_X"},
  {part: "behaviour", name: "by behaviour (Y)", words: "_Y"},
];

const SHIFT_HELP =
  "ΔW is how far one step of gradient descent on the example's loss moves the weight of a feature, for each unit of learning rate: ΔW_X because the features of the prompts change, ΔW_Y because the behaviour does. The score ΔW·W is above 0 where the example strengthens the policy. Off target is the share of Σ|ΔW| on features that are not ticked; ⚑ marks an example whose largest shift is on one of them. UΔW is the shift before ridge shares it out among features that fire together: where ΔW and UΔW name different features, it is their correlation that speaks.";

/** Places from the largest to the smallest value; equal ones in the order of the file.
 * @param {number[]} values
 * @param {boolean} down
 */
function placesBy(values, down) {
  const places = values.map((_, place) => place);
  return places.sort((a, b) => (down ? values[b] - values[a] : values[a] - values[b]) || a - b);
}

/** A weight and its interval on a scale that all of them share.
 * @param {ShiftFeature} feature
 * @param {[number, number]} ends
 */
function weightMark(feature, [low, high]) {
  const x = (/** @type {number} */ value) => `${(100 * (value - low)) / (high - low)}%`;
  return svg(
    "svg",
    {class: "weight-mark", role: "img", "aria-label": weightWords(feature), width: "100%", height: 16},
    svg("line", {class: "zero", x1: x(0), x2: x(0), y1: 0, y2: 16}),
    svg("line", {class: "whisker", x1: x(feature.low), x2: x(feature.high), y1: 8, y2: 8}),
    svg("circle", {class: feature.weight > 0 ? "more" : "less", cx: x(feature.weight), cy: 8, r: 4}),
  );
}
/** @param {ShiftFeature} feature */
const weightWords = feature =>
  `weight ${signed(feature.weight, 3)}, 95 % ${signed(feature.low, 3)} to ${signed(feature.high, 3)}`;

class ShiftView {
  /** @type {{by: ShiftOrder | number, down: boolean}} */
  sort = {by: "score", down: true};
  /** @type {ShiftPart} */
  part = "both";
  evidence = false;
  perFeature = false;
  /** @type {Set<string>} names of the features that training was meant to move */
  targets = new Set();
  /** @type {number[]} */
  limits = [];
  /** @type {{off: number, largest: number, flag: boolean}[]} */
  moved = [];

  // The elements, which `build` makes.
  /** @type {HTMLElement} */
  root;
  /** @type {HTMLElement} */
  weights;
  /** @type {HTMLElement} */
  told;
  /** @type {HTMLElement} */
  legend;
  /** @type {HTMLElement} */
  reading;
  /** @type {HTMLSelectElement} */
  order;
  /** @type {HTMLButtonElement} */
  direction;

  /**
   * @param {HTMLElement} root
   * @param {{table: ShiftTable, numbers: DataView | string, texts: ShiftText[]}} data
   * @param {SharedShifts | null} shared row and targets as Python has them
   */
  constructor(root, data, shared = null) {
    this.table = data.table;
    this.texts = data.texts;
    this.shared = shared;
    this.numbers = new ShiftNumbers(data.table, data.numbers);
    this.ranks = new Map(placesBy(this.table.scores, true).map((row, rank) => [row, rank + 1]));
    this.heat = new ShiftHeat(this.table, {
      value: (row, column) => this.numbers.at(this.part, this.evidence, row, column),
      limit: column => this.limits[this.perFeature ? column : 0],
      side: row => this.side(row),
      corner: () => this.corner(),
      sort: () => this.sort,
      isTarget: feature => this.isTarget(feature),
      onSort: by => this.sortBy(by),
      onHover: (row, column) => this.tell(row, column),
      onRow: (row, column) => this.open(row, column),
      onClick: () => {
        if (this.root.clientWidth < 900) this.reading.scrollIntoView({block: "nearest"});
      },
    });
    this.build(root);
    this.take();
    shared?.onChange(() => this.take());
  }

  /** @param {HTMLElement} root */
  build(root) {
    const {table} = this;
    this.weights = el("div", {class: "weights-of-policy"});
    this.told = el("p", {class: "quiet told-line", role: "status"});
    this.legend = el("div");
    this.reading = el("article", {
      class: "reading shift-reading",
      tabindex: "0",
      "aria-label": "The chosen example and its shifts",
    });
    this.root = el(
      "section",
      {
        class: "ctda-view shifts",
        "aria-label": "What examples do to a policy",
        "data-lm-suppress-shortcuts": "true",
      },
      el(
        "div",
        {class: "inside"},
        el("h3", {}, table.title),
        el("p", {class: "quiet"}, table.subtitle),
        el(
          "p",
          {class: `quality${table.weak ? " problem" : ""}`},
          el("b", {}, table.verdict),
          el("span", {class: "quiet"}, ` ${table.figures}`),
        ),
        this.weights,
        this.controls(),
        el(
          "div",
          {class: "shift-panes"},
          el("div", {class: "shift-left"}, this.legend, this.heat.node, this.told),
          this.reading,
        ),
        el(
          "details",
          {class: "quiet"},
          el("summary", {}, "Keys, and what the numbers are"),
          el("p", {}, SHIFT_HELP),
          el(
            "p",
            {},
            "In the heat map ↑ ↓ go from example to example, ← → from feature to feature, Page Up, Page Down, Home and End far; s sorts by the feature under the cursor, once more the other way round. Tab leads on to the example.",
          ),
        ),
      ),
    );
    root.replaceChildren(this.root);
  }
  controls() {
    this.order = el(
      "select",
      {"aria-label": "Order", onchange: () => this.sortBy(this.orderNamed(this.order.value), true)},
      ...SHIFT_ORDERS.map(({by, name}) => el("option", {value: by}, name)),
      ...this.table.features.map((feature, at) =>
        el("option", {value: String(at)}, `shift of ${feature.name}`),
      ),
    );
    this.direction = el("button", {type: "button", onclick: () => this.sortBy(this.sort.by)}, "");
    /** @type {HTMLSelectElement} */
    const part = el(
      "select",
      {
        "aria-label": "Part of the shift",
        onchange: () => {
          this.part = /** @type {ShiftPart} */ (part.value);
          this.update();
        },
      },
      ...SHIFT_PARTS.map(one => el("option", {value: one.part}, one.name)),
    );
    const tick = (/** @type {"evidence" | "perFeature"} */ name, /** @type {string} */ words) =>
      el(
        "label",
        {class: "tick"},
        el("input", {
          type: "checkbox",
          class: name,
          onchange: event => {
            this[name] = event.target.checked;
            this.update();
          },
        }),
        words,
      );
    return el(
      "div",
      {class: "line filters"},
      el("label", {}, el("span", {class: "name"}, "order "), this.order),
      this.direction,
      el("label", {}, el("span", {class: "name"}, "show "), part),
      tick("evidence", "UΔW, before features that fire together share it"),
      tick("perFeature", "a colour scale for each feature"),
    );
  }

  // ---- what is shown --------------------------------------------------------------------------------------------------------

  /** Take row and targets over from Python. */
  take() {
    const given = this.shared?.get() ?? {row: this.table.row ?? -1, targets: this.table.targets ?? []};
    this.targets = new Set(given.targets);
    this.update();
    if (given.row >= 0 && given.row !== this.heat.row)
      this.heat.moveTo(this.heat.rows.indexOf(given.row), this.heat.column);
  }
  /** @param {number} feature */
  isTarget(feature) {
    return this.targets.has(this.table.features[feature].name);
  }
  /** Everything anew, after a choice. */
  update() {
    const {numbers, table} = this;
    this.moved = table.scores.map((_, row) => numbers.interference(row, at => this.isTarget(at)));
    this.limits = this.perFeature
      ? table.features.map((_, at) => numbers.limit(this.part, this.evidence, at))
      : [numbers.limit(this.part, this.evidence)];
    this.order.value = String(this.sort.by);
    this.direction.textContent = this.sort.down ? "largest first ▼" : "smallest first ▲";
    this.drawWeights();
    this.heat.show(this.ordered());
    this.drawLegend();
    this.drawReading();
  }
  /** @param {string} value */
  orderNamed(value) {
    return SHIFT_ORDERS.find(one => one.by === value)?.by ?? Number(value);
  }
  /**
   * By this; once more, the other way round.
   * @param {ShiftOrder | number} by
   */
  sortBy(by, anew = false) {
    this.sort = {by, down: anew || by !== this.sort.by ? by !== "file" : !this.sort.down};
    this.update();
  }
  ordered() {
    const {by, down} = this.sort,
      {scores, features} = this.table;
    if (by === "score") return placesBy(scores, down);
    if (by === "off")
      return placesBy(
        this.moved.map(one => one.off),
        down,
      );
    if (by === "flag")
      return placesBy(
        this.moved.map(one => (one.flag ? 1 + one.off : 0)),
        down,
      );
    if (by === "file")
      return placesBy(
        scores.map((_, row) => row),
        down,
      );
    if (by !== "size")
      return placesBy(
        scores.map((_, row) => this.numbers.at(this.part, this.evidence, row, by)),
        down,
      );
    const size = (/** @type {number} */ row) =>
      features.reduce((sum, _, at) => sum + Math.abs(this.numbers.at("both", false, row, at)), 0);
    return placesBy(
      scores.map((_, row) => size(row)),
      down,
    );
  }
  /** What the cells are, in a formula. */
  formula() {
    const {words} = SHIFT_PARTS.find(one => one.part === this.part) ?? SHIFT_PARTS[0];
    return `${this.evidence ? "U" : ""}ΔW${words}`;
  }

  // ---- the policy -----------------------------------------------------------------------------------------------------------

  drawWeights() {
    const {features} = this.table,
      low = Math.min(0, ...features.map(feature => feature.low)),
      high = Math.max(0, ...features.map(feature => feature.high)),
      margin = 0.04 * (high - low) || 1;
    const line = (/** @type {ShiftFeature} */ feature, /** @type {number} */ at) =>
      el(
        "li",
        {title: `${feature.name}: ${weightWords(feature)}`},
        el(
          "label",
          {class: "feature"},
          el("input", {
            type: "checkbox",
            checked: this.isTarget(at),
            onchange: event => {
              if (event.target.checked) this.targets.add(feature.name);
              else this.targets.delete(feature.name);
              this.shared?.set("targets", [...this.targets]);
              this.update();
              /** @type {HTMLElement | undefined} */ (this.weights.querySelectorAll("input")[at])?.focus();
            },
          }),
          el("bdi", {}, feature.name),
        ),
        weightMark(feature, [low - margin, high + margin]),
        el("span", {class: "number"}, signed(feature.weight, 3)),
        el("span", {class: "number quiet"}, `${signed(feature.low, 2)} … ${signed(feature.high, 2)}`),
      );
    const told = this.targets.size
      ? `${counted(this.targets.size, "feature")} ticked as meant to move; ${counted(this.moved.filter(one => one.flag).length, "example")} of ${whole(this.moved.length)} move another feature most.`
      : "Tick the features that training was meant to move, and each example is held against them.";
    const scrolled = this.weights.querySelector("ol")?.scrollTop ?? 0;
    this.weights.replaceChildren(
      el(
        "p",
        {class: "quiet"},
        `Weights of the policy with 95 % intervals from the bootstrap over prompts. ${told}`,
      ),
      el("ol", {}, ...features.map(line)),
    );
    this.weights.querySelector("ol")?.scrollTo(0, scrolled);
  }

  // ---- the heat map ---------------------------------------------------------------------------------------------------------

  corner() {
    const head = (/** @type {ShiftOrder} */ by, /** @type {string} */ name, /** @type {string} */ title) =>
      el(
        "button",
        {type: "button", class: `link ${by}`, tabindex: "-1", title, onclick: () => this.sortBy(by)},
        `${name}${this.sort.by === by ? (this.sort.down ? " ▼" : " ▲") : ""}`,
      );
    return [
      head("score", "ΔW·W", "Sort by the score: how far the example moves the policy along itself"),
      this.targets.size
        ? head("off", "off", "Sort by the share of the shift that lies outside the ticked features")
        : null,
      this.targets.size
        ? head("flag", "⚑", "Sort by the flag: the largest shift lies outside the ticked features")
        : null,
    ];
  }
  /** @param {number} row */
  side(row) {
    const score = this.table.scores[row],
      {off, flag, largest} = this.moved[row],
      lines = this.texts[row].turns.length ? snippetOf(/** @type {any} */ (this.texts[row])) : null;
    return [
      el(
        "span",
        {class: `score ${score > 0 ? "more" : score < 0 ? "less" : ""}`, title: `score ${signed(score, 6)}`},
        signed(score, 3),
      ),
      this.targets.size
        ? el(
            "span",
            {class: "off quiet", title: `${general(100 * off, 4)} % of the shift is off target`},
            `${Math.round(100 * off)} %`,
          )
        : null,
      this.targets.size
        ? el(
            "span",
            {class: "flag", title: flag ? `moves ${this.table.features[largest].name} most` : ""},
            flag ? "⚑" : "",
          )
        : null,
      el("bdi", {class: "snippet"}, lines ? `${lines.prompt} → ${lines.response}` : this.table.ids[row]),
    ];
  }
  /**
   * Say what stands in a cell.
   * @param {number | null} row
   * @param {number} column
   */
  tell(row, column) {
    const shown = row ?? this.heat.row;
    if (shown === null) {
      this.told.textContent = "";
      return;
    }
    const feature = row === null ? this.heat.column : column,
      at = (/** @type {ShiftPart} */ part) => signed(this.numbers.at(part, this.evidence, shown, feature)),
      name = this.evidence ? "UΔW" : "ΔW";
    this.told.textContent = `#${whole(this.ranks.get(shown) ?? 0)} by score, ${this.table.features[feature].name}: ${name} ${at("both")} = ${at("features")} by features, ${at("behaviour")} by behaviour`;
  }
  drawLegend() {
    const limit = this.limits[0] || 1;
    const scale = legend(limit, `${this.formula()}, ${this.table.unit}`);
    if (this.perFeature) {
      scale.replaceChildren(
        ...legend(1, `${this.formula()} over the 99th percentile of its feature's sizes`).childNodes,
      );
    }
    this.legend.replaceChildren(scale);
  }

  // ---- one example ----------------------------------------------------------------------------------------------------------

  /**
   * @param {number} row
   * @param {number} column
   */
  open(row, column) {
    this.tell(row, column);
    if (this.shown !== row) this.reading.scrollTop = 0;
    this.drawReading();
    if (this.shared && this.shared.get().row !== row) this.shared.set("row", row);
  }
  /** @type {number | null} */
  shown = null;
  drawReading() {
    const {row} = this.heat,
      {table} = this;
    this.shown = row;
    if (row === null) {
      this.reading.replaceChildren(
        el(
          "p",
          {class: "quiet"},
          "Choose an example: its question and answer come here, and its shift taken apart.",
        ),
      );
      return;
    }
    const {turns, cut} = this.texts[row],
      {off, flag, largest} = this.moved[row],
      [byFeatures, byBehaviour] = table.parts[row];
    const against = this.targets.size
      ? `${Math.round(100 * off)} % of Σ|ΔW| is off target; the largest shift is of ${table.features[largest].name}${flag ? ", which was not meant to move ⚑" : ""}.`
      : `The largest shift is of ${table.features[largest].name}.`;
    this.reading.replaceChildren(
      el(
        "h4",
        {},
        `ΔW·W ${signed(table.scores[row])}`,
        el(
          "span",
          {class: "quiet"},
          `  #${whole(this.ranks.get(row) ?? 0)} of ${whole(table.scores.length)}`,
        ),
      ),
      el(
        "p",
        {class: "quiet parts"},
        `${signed(byFeatures)} by features and ${signed(byBehaviour)} by behaviour: more training on it ${table.scores[row] > 0 ? "strengthens" : "weakens"} the policy. ${against}`,
      ),
      el(
        "div",
        {class: "shift-text", tabindex: "0", role: "group", "aria-label": "Question and answer"},
        turns.length
          ? conversation(turns, 1, () => {})
          : el("p", {class: "quiet"}, `${table.ids[row]}: no single example, so there is no text.`),
        cut
          ? el("p", {class: "quiet"}, `${counted(cut, "more character")} of it left out of this view.`)
          : null,
      ),
      this.bars(row),
      el("p", {class: "quiet"}, "id ", el("code", {}, table.ids[row])),
    );
  }
  /**
   * The decomposition: two bars for each feature, and a line where they come together.
   * @param {number} row
   */
  bars(row) {
    const {features} = this.table,
      at = (/** @type {ShiftPart} */ part, /** @type {number} */ feature) =>
        this.numbers.at(part, this.evidence, row, feature),
      name = this.evidence ? "UΔW" : "ΔW",
      order = placesBy(
        features.map((_, feature) => Math.abs(at("both", feature))),
        true,
      );
    const parts = /** @type {const} */ (["features", "behaviour", "both"]),
      limit = Math.max(...order.flatMap(feature => parts.map(part => Math.abs(at(part, feature))))) || 1,
      x = (/** @type {number} */ value) => 50 + (49 * value) / limit;
    const bar = (/** @type {number} */ value, /** @type {number} */ y, /** @type {string} */ part) =>
      svg("rect", {
        class: `${part} ${value > 0 ? "more" : "less"}`,
        x: `${Math.min(50, x(value))}%`,
        width: `${Math.abs(x(value) - 50)}%`,
        y,
        height: 7,
      });
    const line = (/** @type {number} */ feature) => {
      const both = at("both", feature),
        off = this.targets.size && !this.isTarget(feature),
        words = `${name} ${signed(both)}: ${signed(at("features", feature))} by features, ${signed(at("behaviour", feature))} by behaviour`;
      return el(
        "li",
        {title: words},
        el(
          "span",
          {class: "feature"},
          el("bdi", {}, features[feature].name),
          off ? el("span", {class: "tag"}, "off target") : null,
        ),
        svg(
          "svg",
          {class: "shift-bar", role: "img", "aria-label": words, width: "100%", height: 18},
          bar(at("features", feature), 1, "features"),
          bar(at("behaviour", feature), 10, "behaviour"),
          svg("line", {class: "zero", x1: "50%", x2: "50%", y1: 0, y2: 18}),
          svg("line", {class: "both", x1: `${x(both)}%`, x2: `${x(both)}%`, y1: 0, y2: 18}),
        ),
        el("span", {class: "number"}, signed(both, 3)),
      );
    };
    return el(
      "div",
      {class: "shift-bars"},
      el(
        "p",
        {class: "quiet"},
        `${name} of each feature. Upper bar: by features (${name}_X); lower, pale: by behaviour (${name}_Y); the line is both together.${this.evidence ? " U undoes what ridge shares out among features that fire together." : ""}`,
      ),
      el("ol", {}, ...order.map(line)),
    );
  }
}

/**
 * Draw the shifts for data that stand as JSON in the page; works from a file, without a kernel.
 * @param {HTMLElement} root
 * @param {any} data
 */
function mountShifts(root, data) {
  return new ShiftView(root, data);
}
