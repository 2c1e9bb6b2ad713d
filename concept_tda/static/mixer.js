// The concept mixer: weights of several concepts, and at once the ranking of the training examples by their mixed direction.
// Scores are linear in the direction, so a table of one score for each example and concept is all that is needed.

const LISTED = 8, // examples at each end
  CANCELLED = 1e-9; // a mix this short beside its parts points nowhere

/**
 * Length of the mixed direction Σ w v, out of the cosines of the concepts.
 * @param {number[]} weights
 * @param {number[][]} gram
 */
function mixedLength(weights, gram) {
  let square = 0;
  weights.forEach((a, i) =>
    weights.forEach((b, j) => {
      square += a * b * gram[i][j];
    }),
  );
  const whole = weights.reduce((sum, weight) => sum + Math.abs(weight), 0),
    length = Math.sqrt(Math.max(0, square));
  return length > CANCELLED * whole ? length : 0;
}

/**
 * Scores of all examples for the mixed direction at unit length; null where it has none.
 * @param {number[]} weights
 * @param {number[][]} gram
 * @param {Column[]} columns one for each concept
 */
function mixedScores(weights, gram, columns) {
  const length = mixedLength(weights, gram);
  if (!length) return null;
  const scores = new Float64Array(columns[0].length);
  columns.forEach((column, number) => {
    const share = weights[number] / length;
    if (share) for (let place = 0; place < scores.length; place++) scores[place] += share * column[place];
  });
  return scores;
}

/**
 * Share of the examples that score lower, in percent, ties counted half.
 * @param {Float64Array} scores
 * @param {number[]} order places, the highest first
 */
function percentilesOf(scores, order) {
  const found = new Float64Array(scores.length);
  for (let from = 0; from < order.length;) {
    let to = from + 1;
    while (to < order.length && scores[order[to]] === scores[order[from]]) to += 1;
    const lower = order.length - to + (to - from) / 2;
    for (; from < to; from++) found[order[from]] = (100 * lower) / order.length;
  }
  return found;
}

class MixerView {
  /** @type {Map<number, Snippet>} */
  snippets = new Map();
  drawn = 0;
  higher = new Float64Array();

  /**
   * @param {HTMLElement} root
   * @param {MixerSource} source
   * @param {SharedWeights | null} shared the weights in Python, where there is one
   */
  constructor(root, source, shared = null) {
    this.source = source;
    this.table = source.table;
    this.shared = shared;
    /** @type {number[]} */
    this.weights = [...(shared?.get() ?? this.table.weights)];
    this.columns = this.table.names.map((_, number) => source.column(`score${number}`));
    this.waiting = el("span", {class: "waiting"});
    this.told = el("p", {role: "status"});
    this.lists = el("div", {class: "two"});
    this.sliders = this.table.names.map((name, number) => this.slider(name, number));
    this.root = el(
      "section",
      {class: "ctda-view mixer", "aria-label": "Concept mixer", "data-lm-suppress-shortcuts": "true"},
      el(
        "div",
        {class: "inside"},
        el("h4", {}, "Mix concepts, rank the training examples"),
        el("p", {class: "quiet"}, this.table.subtitle),
        el(
          "div",
          {class: "weights"},
          this.sliders.map(one => one.node),
        ),
        this.told,
        this.waiting,
        this.lists,
      ),
    );
    root.replaceChildren(this.root);
    source.onWaiting(state => {
      this.waiting.textContent = state ? "Waiting for the kernel …" : "";
    });
    shared?.onChange(() => {
      this.weights = [...shared.get()];
      this.sliders.forEach((one, number) => one.show(this.weights[number]));
      this.draw();
    });
    this.draw();
  }

  /**
   * @param {string} name
   * @param {number} number
   */
  slider(name, number) {
    const value = el("output", {class: "weight"});
    /** @type {HTMLInputElement} */
    const dial = el("input", {
      type: "range",
      class: "dial",
      min: -1,
      max: 1,
      step: 0.01,
      "aria-label": `Weight of ${name}`,
      oninput: () => this.turn(number, Number(dial.value)),
      onchange: () => this.shared?.set(this.weights),
    });
    const show = (/** @type {number} */ weight) => {
      dial.value = String(weight);
      value.textContent = weight ? signed(weight, 3) : "0";
    };
    const set = (/** @type {number[]} */ weights) => {
      this.weights = weights;
      this.sliders.forEach((one, at) => one.show(weights[at]));
      this.shared?.set(weights);
      this.draw();
    };
    const alone = el(
      "button",
      {
        type: "button",
        title: `Only ${name}`,
        onclick: () => set(this.weights.map((_, at) => Number(at === number))),
      },
      "alone",
    );
    show(this.weights[number]);
    return {node: el("div", {class: "part"}, el("bdi", {class: "name"}, name), dial, value, alone), show};
  }
  /**
   * @param {number} number
   * @param {number} weight
   */
  turn(number, weight) {
    this.weights = this.weights.map((old, at) => (at === number ? weight : old));
    this.sliders[number].show(weight);
    this.draw();
  }

  draw() {
    const {weights} = this,
      {gram, names} = this.table,
      scores = mixedScores(weights, gram, this.columns);
    this.drawn += 1;
    if (!scores) {
      this.told.textContent = weights.some(Boolean)
        ? "These weights cancel: the mixed direction has no length. Move one of them."
        : "All weights are 0: there is no direction. Move one of them.";
      return this.lists.replaceChildren();
    }
    const length = mixedLength(weights, gram);
    const cosines = names.map((_, i) => weights.reduce((sum, w, j) => sum + w * gram[i][j], 0) / length);
    this.told.replaceChildren(
      "Cosine of the mix with ",
      ...names.flatMap((name, at) => [
        at ? ", " : "",
        el("bdi", {}, name),
        " ",
        el("b", {}, signed(cosines[at], 2)),
      ]),
      `. ${whole(scores.filter(score => score > 0).length)} of ${counted(scores.length, "example")} raise it.`,
    );
    const order = Array.from(scores.keys()).sort((a, b) => scores[b] - scores[a] || a - b);
    const n = Math.min(LISTED, Math.floor(order.length / 2));
    this.higher = percentilesOf(scores, order);
    this.list(order.slice(0, n), order.slice(-n).reverse(), scores);
  }
  /**
   * Distance from zero: in multiples of the example's own null where there is one, else in spreads of all scores.
   * @param {Float64Array} scores
   * @returns {(place: number) => string}
   */
  distances(scores) {
    const nulls = this.table.unit === "× null" ? this.source.column("spread") : null,
      mean = scores.reduce((sum, score) => sum + score, 0) / scores.length,
      spread = Math.sqrt(scores.reduce((sum, score) => sum + (score - mean) ** 2, 0) / scores.length);
    return place => {
      const value = scores[place] / (nulls ? nulls[place] : spread);
      return Number.isFinite(value) ? `${signed(value, 3)} ${this.table.unit}` : "";
    };
  }
  /**
   * @param {number[]} highest
   * @param {number[]} lowest
   * @param {Float64Array} scores
   */
  async list(highest, lowest, scores) {
    const drawn = this.drawn,
      distance = this.distances(scores),
      /** @type {Map<number, HTMLElement>} */
      words = new Map();
    const one = (/** @type {number} */ place) => {
      const text = el("span", {class: "quiet", dir: "auto"}, this.snippets.get(place)?.response ?? "…");
      words.set(place, text);
      /** @type {HTMLDetailsElement} */
      const node = el(
        "details",
        {class: "neighbour", ontoggle: () => this.open(place, node)},
        el(
          "summary",
          {},
          el("b", {title: `raw score ${signed(scores[place], 6)}`}, percent(this.higher[place])),
          ` ${distance(place)} · row ${whole(this.source.column("row")[place])} `,
          text,
        ),
      );
      return node;
    };
    const end = (/** @type {string} */ kind, /** @type {string} */ words, /** @type {number[]} */ places) =>
      el("div", {}, el("p", {}, el("span", {class: `key ${kind}`}, words)), places.map(one));
    this.lists.replaceChildren(
      end("more", "highest influence on the mix", highest),
      end("less", "lowest", lowest),
    );
    const missing = [...words.keys()].filter(place => !this.snippets.has(place));
    if (!missing.length) return;
    try {
      const found = await this.source.snippets(missing);
      found.forEach((snippet, at) => this.snippets.set(missing[at], snippet));
    } catch {
      return; // a kernel that is gone: numbers and rows stay
    }
    if (this.drawn !== drawn) return; // the weights have moved on
    for (const place of missing)
      /** @type {HTMLElement} */ (words.get(place)).textContent = this.snippets.get(place)?.response ?? "";
  }
  /**
   * Read an example where it unfolds.
   * @param {number} place
   * @param {HTMLElement} node
   */
  async open(place, node) {
    if (node.querySelector(".turn")) return;
    try {
      const [example] = await this.source.examples([place]);
      const turns = example.turns.map(turn => ({role: turn.role, answer: turn.answer, text: textOf(turn)}));
      node.append(...conversation(turns, 0, () => {}));
    } catch (error) {
      node.append(el("p", {class: "problem"}, /** @type {Error} */ (error).message));
    }
  }
}

/**
 * Draw the mixer for data that stand as JSON in the page; works from a file, without a kernel.
 * @param {HTMLElement} root
 * @param {any} data
 */
function mountMixer(root, data) {
  return new MixerView(root, /** @type {any} */ (embeddedSource(data)));
}
