// The concept explorer: one text read by a concept. Everything shown stands in the model's state; the only questions to Python are "another layer" and "answer at each strength".

/**
 * Line over the layers; the chosen one is marked. Click a layer, or use the arrow keys.
 * @param {Reading} reading
 * @param {(layer: number) => void} choose
 */
function sweepChart(reading, choose) {
  const {layers, sweep, layer} = reading,
    width = 640,
    height = 120,
    low = Math.min(0, ...sweep),
    high = Math.max(0, ...sweep),
    span = high - low || 1;
  const x = (/** @type {number} */ at) =>
      30 + (width - 60) * (layers.length > 1 ? at / (layers.length - 1) : 0.5),
    y = (/** @type {number} */ value) => 10 + ((height - 30) * (high - value)) / span,
    here = layers.indexOf(layer);
  const points = layers.map((name, at) =>
    svg(
      "circle",
      {cx: x(at), cy: y(sweep[at]), r: name === layer ? 6 : 3.5, class: sweep[at] > 0 ? "more" : "less"},
      svg("title", {}, `layer ${name}: ${signed(sweep[at])}`),
    ),
  );
  const labels = layers
    .map((name, at) => [name, at])
    .filter(([, at]) => layers.length <= 16 || at % Math.ceil(layers.length / 12) === 0 || at === here)
    .map(([name, at]) =>
      svg(
        "text",
        {x: x(at), y: height - 3, "text-anchor": "middle", class: name === layer ? "here" : ""},
        String(name),
      ),
    );
  for (const value of [high, low])
    if (value)
      labels.push(svg("text", {x: width - 2, y: y(value) + 4, "text-anchor": "end"}, signed(value, 2)));
  const chart = svg(
    "svg",
    {
      viewBox: `0 0 ${width} ${height}`,
      class: "sweep",
      tabindex: 0,
      role: "slider",
      "aria-label": `Layer; ${reading.sweep_words}`,
      "aria-valuemin": layers[0],
      "aria-valuemax": layers[layers.length - 1],
      "aria-valuenow": layer,
      "aria-valuetext": `layer ${layer}: ${signed(sweep[here])}`,
    },
    svg("line", {x1: 20, x2: width - 20, y1: y(0), y2: y(0), class: "zero"}),
    svg("line", {x1: x(here), x2: x(here), y1: 6, y2: height - 18, class: "chosen"}),
    svg("polyline", {
      points: layers.map((_, at) => `${x(at)},${y(sweep[at])}`).join(" "),
    }),
    ...points,
    ...labels,
  );
  chart.addEventListener("click", event => {
    const box = chart.getBoundingClientRect(),
      at = ((((event.clientX - box.left) / box.width) * width - 30) / (width - 60)) * (layers.length - 1);
    choose(layers[Math.max(0, Math.min(layers.length - 1, Math.round(at)))]);
  });
  chart.addEventListener("keydown", event => {
    const step = {ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1}[event.key];
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();
    if (layers[here + step] !== undefined) choose(layers[here + step]);
  });
  return chart;
}

class ExplorerView {
  /**
   * @param {HTMLElement} root
   * @param {WidgetModel} model
   */
  constructor(root, model) {
    this.model = model;
    this.root = el("section", {
      class: "ctda-view explorer",
      "aria-label": "Concept explorer",
      "data-lm-suppress-shortcuts": "true",
    });
    root.replaceChildren(this.root);
    this.redraw = () => this.draw();
    for (const name of ["reading", "steering", "status"]) model.on(`change:${name}`, this.redraw);
    this.draw();
  }
  close() {
    for (const name of ["reading", "steering", "status"]) this.model.off(`change:${name}`, this.redraw);
  }
  /** @param {number} layer */
  choose(layer) {
    this.refocus = true;
    this.model.send({kind: "layer", layer});
  }

  draw() {
    const reading = this.model.get("reading"),
      status = this.model.get("status");
    const inside = el(
      "div",
      {class: "inside"},
      el(
        "p",
        {role: "status", class: status.startsWith("!") ? "problem" : "quiet"},
        status.replace(/^!/, ""),
      ),
    );
    if (reading.turns)
      inside.append(...this.textPart(reading), ...this.sweepPart(reading), ...this.trainPart(reading));
    inside.append(...this.steeringPart());
    this.root.replaceChildren(inside);
    if (this.refocus) {
      this.refocus = false;
      focusOn(this.root, ".sweep");
    }
  }

  /** @param {Reading} reading */
  textPart(reading) {
    const readout = el("p", {class: "readout quiet", role: "status"}, "Point at a token to read its value.");
    const tell = (/** @type {string} */ text, /** @type {number} */ value) =>
      readout.replaceChildren(
        el("bdi", {class: "token"}, JSON.stringify(text)),
        " ",
        el("b", {}, signed(value, 5)),
        ` (projection ${signed(value + reading.centre, 5)})`,
      );
    return [
      el("h4", {}, "Where in the text is ", el("bdi", {}, reading.concept), ` at layer ${reading.layer}?`),
      el("p", {class: "quiet"}, reading.place),
      legend(reading.limit, reading.unit),
      readout,
      el("div", {class: "conversation"}, conversation(reading.turns ?? [], reading.limit, tell)),
    ];
  }

  /** @param {Reading} reading */
  sweepPart(reading) {
    return [
      el("h4", {}, "Layer by layer"),
      el("p", {class: "quiet"}, reading.sweep_words, " Click a layer, or use the arrow keys."),
      sweepChart(reading, layer => this.choose(layer)),
      el(
        "details",
        {},
        el("summary", {}, "As numbers"),
        facts(reading.layers.map((layer, at) => [`layer ${layer}`, signed(reading.sweep[at])])),
      ),
    ];
  }

  /** @param {Reading} reading */
  trainPart(reading) {
    if (!reading.nearest) return [];
    const one = (/** @type {Neighbour} */ example) =>
      el(
        "details",
        {class: "neighbour"},
        el(
          "summary",
          {},
          el("b", {}, signed(example.value)),
          ` row ${whole(example.row)} `,
          el("span", {class: "quiet", dir: "auto"}, example.response),
        ),
        conversation(example.turns, 0, () => {}),
      );
    return [
      el("h4", {}, "Training examples along this concept"),
      el("p", {class: "quiet"}, reading.among),
      el(
        "div",
        {class: "two"},
        el(
          "div",
          {},
          el("p", {}, el("span", {class: "key more"}, "nearest"), " to the concept"),
          reading.nearest.map(one),
        ),
        el(
          "div",
          {},
          el("p", {}, el("span", {class: "key less"}, "farthest"), " from it"),
          (reading.farthest ?? []).map(one),
        ),
      ),
    ];
  }

  /** The answers side by side, from the lowest strength to the highest. */
  steeringPart() {
    /** @type {Steered[]} */
    const answers = this.model.get("steering");
    if (!answers.length) return [];
    const plain = answers.find(answer => answer.strength === 0)?.value ?? null;
    const words = (/** @type {Steered} */ {strength, value}) => {
      if (value === null) return "nothing to read";
      const away = strength === 0 || plain === null ? "" : `, ${signed(value - plain, 3)} against 0`;
      return `concept in it ${signed(value)}${away}`;
    };
    return [
      el("h4", {}, "Turn the concept up and down"),
      el(
        "p",
        {class: "quiet"},
        "The model's own answer to the question while the concept is added at its layer, in units of the concept's length; 0 is the model as it is. How much of the concept is in an answer is read by the model without steering.",
      ),
      el(
        "div",
        {class: "steered-answers"},
        [...answers]
          .sort((a, b) => a.strength - b.strength)
          .map(answer =>
            el(
              "article",
              {class: answer.strength === 0 ? "steered plain" : "steered"},
              el(
                "p",
                {},
                el("b", {}, `strength ${answer.strength === 0 ? "0" : signed(answer.strength)}`),
                el("span", {class: "quiet"}, ` · ${words(answer)}`),
              ),
              longText(answer.text || "(an empty answer)"),
            ),
          ),
      ),
    ];
  }
}

export default {
  /** @param {{model: WidgetModel, el: HTMLElement}} place */
  render({model, el: root}) {
    const view = new ExplorerView(root, model);
    return () => view.close();
  },
};
