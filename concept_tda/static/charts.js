// The two charts of the browser: the histogram with its brush, and two methods against each other.

/**
 * The smallest and the largest value.
 * @param {Column} values
 * @returns {[number, number]}
 */
function endsOf(values) {
  let low = Infinity,
    high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return [low, high];
}

/**
 * The share of a distribution that lies below a value, from its quantiles at equal steps.
 * @param {number[]} quantiles lowest to highest
 * @param {number} value
 */
function shareBelow(quantiles, value) {
  const last = quantiles.length - 1;
  if (value <= quantiles[0]) return 0;
  if (value >= quantiles[last]) return 1;
  let low = 0,
    high = last;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (quantiles[middle] <= value) low = middle;
    else high = middle;
  }
  const gap = quantiles[high] - quantiles[low];
  return (low + (gap > 0 ? (value - quantiles[low]) / gap : 0)) / last;
}

/** Histogram of all scores; the part that passes is in colour; a range can be brushed with pointer or arrow keys. */
class Histogram {
  /** @type {Column} */
  values = new Float64Array();
  /** @type {Column | null} the values whose ends are known */
  measured = null;
  /** @type {Uint8Array} */
  pass = new Uint8Array();
  /** @type {[number, number] | null} */
  brush = null;
  label = "";
  /** @type {number | null} */
  centre = null;
  /** @type {Method | null} */
  method = null;
  low = 0;
  high = 0;
  span = 0;

  /** @param {(brush: [number, number] | null) => void} onBrush */
  constructor(onBrush) {
    this.onBrush = onBrush;
    this.bars = svg("svg", {role: "img", preserveAspectRatio: "none", height: 84});
    this.range = el("div", {class: "range", hidden: true});
    this.handles = [0, 1].map(side =>
      el("button", {
        type: "button",
        class: "handle",
        role: "slider",
        "aria-label": side ? "Highest score shown" : "Lowest score shown",
        onkeydown: event => this.nudge(event, side),
      }),
    );
    this.chart = el(
      "div",
      {class: "chart", title: "Drag to show only a range of scores"},
      this.bars,
      this.range,
      ...this.handles,
    );
    this.ends = el("div", {class: "ends quiet"});
    this.line = el("div", {class: "null-words quiet", hidden: true});
    this.node = el("div", {class: "histogram"}, this.chart, this.ends, this.line);
    this.chart.addEventListener("pointerdown", event => this.press(event));
    new ResizeObserver(() => this.values.length && this.draw()).observe(this.chart);
  }
  /**
   * @param {Column} values
   * @param {Uint8Array} pass
   * @param {[number, number] | null} brush
   * @param {string} label
   * @param {Method} method
   */
  set(values, pass, brush, label, method) {
    Object.assign(this, {values, pass, brush, label, method, centre: method.centre});
    const told = method.null ? `Line: where ${method.null.words} put the examples.` : "";
    this.line.textContent = told;
    this.line.hidden = !told;
    this.draw();
  }
  /** @param {number} value */
  x(value) {
    return this.span ? (value - this.low) / this.span : 0.5;
  }
  /** @param {number} x */
  value(x) {
    return x >= 1 ? this.high : this.low + this.span * Math.max(0, x);
  }

  draw() {
    const {values, pass} = this,
      width = this.chart.clientWidth || 600,
      bins = Math.max(20, Math.min(80, Math.floor(width / 9)));
    if (values !== this.measured) {
      this.measured = values;
      [this.low, this.high] = endsOf(values);
      this.span = this.high - this.low;
    }
    const all = new Uint32Array(bins),
      some = new Uint32Array(bins);
    values.forEach((value, place) => {
      const bin = Math.min(bins - 1, Math.floor(bins * this.x(value)));
      all[bin] += 1;
      some[bin] += pass[place];
    });
    const tallest = Math.max(...all),
      height = (/** @type {number} */ count) => (count ? Math.max(2, (78 * count) / tallest) : 0);
    this.bars.setAttribute("viewBox", `0 0 ${width} 84`);
    this.bars.setAttribute(
      "aria-label",
      `Histogram of ${whole(values.length)} ${this.label} from ${general(this.low)} to ${general(this.high)}`,
    );
    const bar = (/** @type {number} */ bin, /** @type {number} */ count, /** @type {string} */ kind) =>
      svg("rect", {
        class: kind,
        x: ((bin * width) / bins + 0.5).toFixed(1),
        y: (84 - height(count)).toFixed(1),
        width: Math.max(1, width / bins - 1).toFixed(1),
        height: height(count).toFixed(1),
      });
    const drawn = [];
    for (let bin = 0; bin < bins; bin++) {
      if (all[bin]) drawn.push(bar(bin, all[bin], "all"));
      if (some[bin])
        drawn.push(
          bar(
            bin,
            some[bin],
            this.centre === null
              ? "plain"
              : this.low + (this.span * (bin + 0.5)) / bins > this.centre
                ? "more"
                : "less",
          ),
        );
    }
    const {centre} = this,
      at = centre === null ? -1 : this.x(centre);
    if (at > 0 && at < 1)
      drawn.push(svg("line", {x1: at * width, x2: at * width, y1: 0, y2: 84, class: "zero"}));
    if (this.method?.null && centre !== null)
      drawn.push(this.nullLine(this.method.null, centre, bins, width, height));
    this.bars.replaceChildren(...drawn);
    const zero =
      at > 0.15 && at < 0.85
        ? el(
            "span",
            {class: "at-zero", title: `score ${general(centre ?? 0)}`},
            centre ? "mean of the file" : "0",
          )
        : null;
    if (zero) zero.style.insetInlineStart = `${100 * at}%`;
    this.ends.replaceChildren(
      el("span", {title: `score ${signed(this.low, 6)}`}, this.away(this.low)),
      ...(zero ? [zero] : []),
      el("span", {title: `score ${signed(this.high, 6)}`}, this.away(this.high)),
    );
    this.drawBrush();
  }
  /**
   * A score as its distance from the centre in spreads; as it is where there is no centre.
   * @param {number} value
   */
  away(value) {
    const {centre, spread} = this.method ?? {centre: null, spread: null};
    return centre === null || spread === null
      ? signed(value)
      : `${signed((value - centre) / spread, 3)} spreads`;
  }
  /**
   * What the null puts into each bin, as a line of steps over the bars.
   * @param {Chance} chance
   * @param {number} centre
   * @param {number} bins
   * @param {number} width
   * @param {(count: number) => number} height
   */
  nullLine({quantiles}, centre, bins, width, height) {
    const n = this.values.length,
      below = (/** @type {number} */ bin) =>
        shareBelow(quantiles, this.low + (this.span * bin) / bins - centre);
    let path = "M0 84";
    for (let bin = 0; bin < bins; bin++) {
      const up = Math.min(82, height(n * (below(bin + 1) - below(bin))));
      path += `V${(84 - up).toFixed(1)}H${(((bin + 1) * width) / bins).toFixed(1)}`;
    }
    return svg("path", {class: "null", d: `${path}V84`});
  }
  drawBrush() {
    const [from, to] = this.brush ?? [this.low, this.high];
    this.range.hidden = !this.brush;
    this.range.style.left = `${100 * this.x(from)}%`;
    this.range.style.width = `${100 * (this.x(to) - this.x(from))}%`;
    [from, to].forEach((value, side) => {
      const handle = this.handles[side];
      handle.style.left = `${100 * (this.span ? this.x(value) : side)}%`;
      handle.setAttribute("aria-valuemin", String(this.low));
      handle.setAttribute("aria-valuemax", String(this.high));
      handle.setAttribute("aria-valuenow", String(value));
      handle.setAttribute("aria-valuetext", general(value));
    });
  }
  /**
   * @param {number} from
   * @param {number} to
   */
  change(from, to) {
    this.brush = from <= this.low && to >= this.high ? null : [from, to];
    this.drawBrush();
    this.onBrush(this.brush);
  }
  /** @param {any} event */
  press(event) {
    if (event.button) return;
    const box = this.chart.getBoundingClientRect(),
      edge = (/** @type {number} */ x) => (x < 6 ? 0 : x > box.width - 6 ? box.width : x),
      at = (/** @type {PointerEvent} */ moved) => this.value(edge(moved.clientX - box.left) / box.width);
    const side = this.handles.indexOf(event.target),
      start = side < 0 ? at(event) : (this.brush ?? [this.low, this.high])[1 - side],
      from = event.clientX;
    let far = side >= 0;
    const move = (/** @type {PointerEvent} */ moved) => {
      far = far || Math.abs(moved.clientX - from) > 3;
      if (far) this.change(Math.min(start, at(moved)), Math.max(start, at(moved)));
    };
    const stop = () => {
      this.chart.removeEventListener("pointermove", move);
      if (!far && this.brush) this.change(this.low, this.high); // a click without a drag takes the brush away
    };
    this.chart.setPointerCapture(event.pointerId);
    this.chart.addEventListener("pointermove", move);
    this.chart.addEventListener("pointerup", stop, {once: true});
    this.chart.addEventListener("pointercancel", stop, {once: true});
    if (side < 0) event.preventDefault();
  }
  /**
   * @param {any} event
   * @param {number} side
   */
  nudge(event, side) {
    const steps = {ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -10, PageUp: 10};
    const step = steps[/** @type {keyof steps} */ (event.key)];
    if (!step && event.key !== "Escape") return;
    event.preventDefault();
    event.stopPropagation();
    if (!step) return this.change(this.low, this.high);
    const ends = [...(this.brush ?? [this.low, this.high])];
    ends[side] = Math.max(this.low, Math.min(this.high, ends[side] + (step * this.span) / 100));
    if (ends[0] <= ends[1]) this.change(ends[0], ends[1]);
  }
}

/** Every example as a point: the shown method's score across, as in the histogram above it, another method's rank or score up. A click chooses the example. */
class Scatter {
  /** @type {number | null} the other method */
  other = null;
  up = "rank";
  /** @type {number | null} the example with the ring */
  shown = null;
  /** @type {number | null} the example whose words are shown */
  told = null;
  method = 0;
  /** @type {Uint8Array} */
  pass = new Uint8Array();
  /** @type {Column} */
  acrossValues = new Float64Array();
  /** @type {Column} */
  upValues = new Float64Array();
  left = 0;
  right = 0;
  low = 0;
  high = 0;
  width = 0;
  height = 0;
  radius = 1;
  drawSoon = nextFrame(() => this.draw());
  /** @type {number | undefined} */
  telling = undefined;

  /**
   * @param {Source} source
   * @param {{onPick: (place: number) => void, onChange: () => void}} calls
   */
  constructor(source, {onPick, onChange}) {
    this.source = source;
    this.onPick = onPick;
    const option = (/** @type {string | number} */ value, /** @type {string} */ words) =>
      el("option", {value}, words);
    this.otherPick = el("select", {
      "aria-label": "Method to compare with",
      onchange: () => {
        this.other = Number(this.otherPick.value);
        onChange();
      },
    });
    this.upPick = el(
      "select",
      {
        "aria-label": "Rank or score of the other method",
        onchange: () => {
          this.up = this.upPick.value;
          onChange();
        },
      },
      option("rank", "rank"),
      option("score", "score"),
    );
    this.across = el("span", {class: "quiet grow-text"});
    this.canvas = el("canvas", {role: "img"});
    this.spot = el("span", {class: "spot", "aria-hidden": "true", hidden: true});
    this.plot = el(
      "div",
      {
        class: "plot",
        onclick: event => this.pick(event),
        onpointermove: event => this.hover(event),
        onpointerleave: () => this.tell(null),
      },
      this.canvas,
      this.spot,
    );
    this.top = el("span", {});
    this.bottom = el("span", {});
    this.readout = el("span", {class: "told", dir: "auto"});
    this.node = el(
      "details",
      {class: "scatter", ontoggle: () => this.drawSoon()},
      el("summary", {}, "Two methods, example by example"),
      el(
        "div",
        {class: "line"},
        el("label", {}, el("span", {class: "name"}, "Up "), this.upPick),
        el("label", {}, el("span", {class: "name"}, "by "), this.otherPick),
        this.across,
      ),
      el("div", {class: "quiet"}, this.top),
      this.plot,
      el("div", {class: "quiet under"}, this.bottom, this.readout),
    );
    new ResizeObserver(() => this.drawSoon()).observe(this.plot);
  }

  /**
   * What to draw; another method is taken where the one beside is the one shown.
   * @param {number} method
   * @param {Uint8Array} pass
   */
  set(method, pass) {
    Object.assign(this, {method, pass});
    const {methods} = this.source.table;
    if (this.other === null || this.other === method) this.other = method === 0 ? 1 : 0;
    this.otherPick.replaceChildren(
      ...methods.flatMap((one, number) =>
        number === method ? [] : [el("option", {value: number}, one.name)],
      ),
    );
    this.otherPick.value = String(this.other);
    const {column} = this.source;
    this.acrossValues = column(`score${method}`);
    this.upValues = column(`${this.up}${this.other}`);
    [this.left, this.right] = endsOf(this.acrossValues);
    [this.low, this.high] = endsOf(this.upValues);
    const name = methods[this.other].name,
      number = (/** @type {number} */ value) => (this.up === "rank" ? `rank ${whole(value)}` : signed(value));
    this.across.replaceChildren(
      "Across: score by ",
      el("bdi", {}, methods[method].name),
      ". Click a point to read it; by keyboard, take an order “where methods disagree”.",
    );
    this.top.replaceChildren(
      "▲ ",
      el("bdi", {}, name),
      ` ${number(this.up === "rank" ? this.low : this.high)}`,
    );
    this.bottom.replaceChildren(
      "▼ ",
      el("bdi", {}, name),
      ` ${number(this.up === "rank" ? this.high : this.low)}`,
    );
    this.canvas.setAttribute(
      "aria-label",
      `Scatter of ${counted(this.acrossValues.length, "example")}: score by ${methods[method].name} across, ${this.up} by ${name} up`,
    );
    this.drawSoon();
  }

  /** @param {number} place */
  x(place) {
    const share =
      this.right > this.left ? (this.acrossValues[place] - this.left) / (this.right - this.left) : 0.5;
    return Math.max(this.radius, Math.min(this.width - this.radius, share * this.width));
  }
  /** @param {number} place */
  y(place) {
    const share = this.high > this.low ? (this.upValues[place] - this.low) / (this.high - this.low) : 0.5;
    return EDGE + (this.up === "rank" ? share : 1 - share) * (this.height - 2 * EDGE);
  }

  draw() {
    this.width = this.plot.clientWidth;
    this.height = this.plot.clientHeight;
    const pen = this.canvas.getContext("2d");
    if (!this.width || !this.acrossValues.length || !pen) return;
    const dots = window.devicePixelRatio || 1,
      n = this.acrossValues.length,
      style = getComputedStyle(this.plot);
    this.radius = n <= 500 ? 3.5 : n <= 3000 ? 2.5 : 1.5;
    this.canvas.width = Math.round(this.width * dots);
    this.canvas.height = Math.round(this.height * dots);
    pen.scale(dots, dots);
    const solid = n <= 500 ? 0.85 : 0.6,
      more = `rgba(${style.getPropertyValue("--more")},${solid})`,
      less = `rgba(${style.getPropertyValue("--less")},${solid})`;
    const point = (/** @type {number} */ place) => {
      const x = this.x(place),
        y = this.y(place),
        r = this.radius;
      if (n > 2000) return pen.fillRect(x - r, y - r, 2 * r, 2 * r); // circles of 10,000 points are slow, and too small to tell from squares
      pen.beginPath();
      pen.arc(x, y, r, 0, 2 * Math.PI);
      pen.fill();
    };
    pen.fillStyle = "rgba(128,128,128,.35)"; // reads on light and on dark ground
    const {centre} = this.source.table.methods[this.method],
      middle = centre ?? -Infinity;
    if (this.left < middle && this.right > middle)
      pen.fillRect((this.width * (middle - this.left)) / (this.right - this.left), 0, 1, this.height);
    for (let place = 0; place < n; place++) if (!this.pass[place]) point(place);
    for (const sign of ["less", "more"]) {
      pen.fillStyle = centre === null ? "rgb(128,128,128)" : sign === "more" ? more : less;
      for (let place = 0; place < n; place++)
        if (this.pass[place] && this.acrossValues[place] > middle === (sign === "more")) point(place);
    }
    this.mark(this.shown);
  }

  /**
   * Put the ring around an example's point.
   * @param {number | null} place
   */
  mark(place) {
    this.shown = place;
    this.spot.hidden = true;
    if (place === null || place === MIDDLE || !this.width) return;
    this.spot.hidden = false;
    this.spot.style.left = `${this.x(place)}px`;
    this.spot.style.top = `${this.y(place)}px`;
  }

  /**
   * The example nearest to the pointer among those that pass the filters, or null.
   * @param {any} event
   */
  nearest(event, reach = 14) {
    if (!this.width) return null;
    const box = this.plot.getBoundingClientRect(),
      x = event.clientX - box.left - this.plot.clientLeft,
      y = event.clientY - box.top - this.plot.clientTop;
    let best = null,
      least = reach * reach;
    for (let place = 0; place < this.acrossValues.length; place++) {
      if (!this.pass[place]) continue;
      const far = (this.x(place) - x) ** 2 + (this.y(place) - y) ** 2;
      if (far < least) {
        best = place;
        least = far;
      }
    }
    return best;
  }
  /** @param {any} event */
  pick(event) {
    const place = this.nearest(event);
    if (place !== null) this.onPick(place);
  }
  /** @param {any} event */
  hover(event) {
    const place = this.nearest(event);
    this.plot.classList.toggle("on-point", place !== null);
    this.tell(place);
  }
  /** @param {number | null} place */
  tell(place) {
    if (place === this.told) return;
    this.told = place;
    clearTimeout(this.telling);
    if (place === null) return this.readout.replaceChildren();
    const {column} = this.source,
      told = (/** @type {number} */ method) => {
        const value = column(`leading${method}`)[place],
          rank = `rank ${whole(column(`rank${method}`)[place])}`;
        return Number.isNaN(value)
          ? rank
          : `${signed(value, 3)} ${this.source.table.methods[method].unit} (${rank})`;
      },
      words = `row ${whole(column("row")[place])} · ${told(this.method)} · other: ${told(this.other ?? 0)}`;
    this.readout.replaceChildren(words);
    this.telling = setTimeout(async () => {
      try {
        const [{response}] = await this.source.snippets([place]);
        if (this.told === place) this.readout.append(" · ", el("bdi", {}, response));
      } catch {
        /* a kernel that is gone: the numbers stay */
      }
    }, 80);
  }
}
