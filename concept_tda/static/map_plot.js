// The drawing of the map: points on a canvas, a brush over them, the point nearest to the pointer. Numbers only, no texts.

const MARGIN = 14, // between the outermost points and the edge, in pixels
  REACH = 16, // a pointer this near to a point means it
  STRETCH = 0.04; // one key press stretches the brush by this share of the map

/**
 * Whether a point lies in a polygon: a ray from it crosses an odd number of edges.
 * @param {number} x
 * @param {number} y
 * @param {[number, number][]} corners
 */
function inPolygon(x, y, corners) {
  let inside = false;
  for (let here = 0, before = corners.length - 1; here < corners.length; before = here++) {
    const [x1, y1] = corners[here],
      [x0, y0] = corners[before];
    if (y1 > y !== y0 > y && x < x1 + ((x0 - x1) * (y - y1)) / (y0 - y1)) inside = !inside;
  }
  return inside;
}

/**
 * The four corners of a rectangle between two opposite ones.
 * @param {[number, number]} a
 * @param {[number, number]} b
 * @returns {[number, number][]}
 */
const rectangle = ([x0, y0], [x1, y1]) => [
  [x0, y0],
  [x1, y0],
  [x1, y1],
  [x0, y1],
];

/**
 * A selection after a brush: replaced, widened or narrowed.
 * @param {Set<number>} selected
 * @param {number[]} places
 * @param {BrushMode} mode
 */
function brushedSelection(selected, places, mode) {
  if (mode === "replace") return new Set(places);
  const brushed = new Set(selected);
  for (const place of places) {
    if (mode === "remove") brushed.delete(place);
    else brushed.add(place);
  }
  return brushed;
}

/** Points and a brush. Places lie between 0 and 1 on both axes, the second upwards. */
class MapPlot {
  /** @type {"rectangle" | "lasso"} */
  tool = "rectangle";
  /** @type {number | null} the example with the ring */
  cursor = null;
  /** @type {[number, number] | null} the free corner of a brush stretched by keys */
  corner = null;
  /** @type {Set<number>} */
  selected = new Set();
  /** @type {(place: number) => string} */
  fill = () => "rgb(128,128,128)";
  /** @type {number[]} places from the back to the front */
  order = [];
  /** @type {Uint8Array} */
  marks = new Uint8Array();
  width = 0;
  height = 0;
  radius = 3;
  drawSoon = nextFrame(() => this.draw());
  /** @type {number | null} */
  told = null;

  /**
   * @param {Column} across
   * @param {Column} up
   * @param {PlotCalls} calls
   */
  constructor(across, up, calls) {
    this.across = across;
    this.up = up;
    this.calls = calls;
    this.canvas = el("canvas", {"aria-hidden": "true"});
    this.outline = svg("polygon");
    this.overlay = svg("svg", {"aria-hidden": "true"}, this.outline);
    this.spot = el("span", {class: "spot", "aria-hidden": "true", hidden: true});
    this.node = el(
      "div",
      {
        class: "mapplot",
        tabindex: "0",
        role: "application",
        "aria-label": `Map of ${counted(across.length, "example")}. Arrow keys go from point to point, with Shift they stretch a rectangle, Space selects, Enter reads.`,
        onpointerdown: event => this.press(event),
        onpointermove: event => this.hover(event),
        onpointerleave: () => this.tell(null),
        onkeydown: event => this.key(event),
      },
      this.canvas,
      this.overlay,
      this.spot,
    );
    new ResizeObserver(() => this.drawSoon()).observe(this.node);
    this.theme = matchMedia("(prefers-color-scheme: dark)");
    this.theme.addEventListener("change", () => this.drawSoon());
  }

  /** @param {number} place */
  x(place) {
    return MARGIN + this.across[place] * (this.width - 2 * MARGIN);
  }
  /** @param {number} place */
  y(place) {
    return MARGIN + (1 - this.up[place]) * (this.height - 2 * MARGIN);
  }

  draw() {
    this.width = this.node.clientWidth;
    this.height = this.node.clientHeight;
    const pen = this.canvas.getContext("2d"),
      n = this.across.length;
    if (!this.width || !pen) return;
    const dots = window.devicePixelRatio || 1,
      ink = getComputedStyle(this.node).color;
    this.radius = n <= 400 ? 5 : n <= 2000 ? 3.5 : 2;
    this.canvas.width = Math.round(this.width * dots);
    this.canvas.height = Math.round(this.height * dots);
    pen.scale(dots, dots);
    const chosen = this.selected,
      front = this.order.filter(place => chosen.has(place)),
      back = chosen.size ? this.order.filter(place => !chosen.has(place)) : this.order;
    pen.globalAlpha = chosen.size ? 0.3 : 1;
    for (const place of back) this.point(pen, place, "rgba(128,128,128,.9)", ink);
    pen.globalAlpha = 1;
    for (const place of front) this.point(pen, place, ink, ink);
    this.ring();
  }
  /**
   * @param {CanvasRenderingContext2D} pen
   * @param {number} place
   * @param {string} edge
   * @param {string} ink
   */
  point(pen, place, edge, ink) {
    const x = this.x(place),
      y = this.y(place),
      r = this.radius,
      mark = this.marks[place];
    pen.fillStyle = this.fill(place);
    pen.strokeStyle = edge;
    pen.lineWidth = this.selected.has(place) ? 1.6 : 0.6;
    pen.beginPath();
    if (this.across.length > 2000) pen.rect(x - r, y - r, 2 * r, 2 * r);
    else pen.arc(x, y, r, 0, 2 * Math.PI);
    pen.fill();
    pen.stroke();
    if (!mark) return;
    pen.strokeStyle = ink;
    pen.lineWidth = 1.8;
    pen.beginPath();
    if (mark === DROP) {
      pen.moveTo(x - r, y - r);
      pen.lineTo(x + r, y + r);
      pen.moveTo(x - r, y + r);
      pen.lineTo(x + r, y - r);
    } else {
      pen.moveTo(x - r, y);
      pen.lineTo(x - r / 4, y + r);
      pen.lineTo(x + r, y - r);
    }
    pen.stroke();
  }
  ring() {
    this.spot.hidden = this.cursor === null || !this.width;
    if (this.cursor === null) return;
    this.spot.style.left = `${this.x(this.cursor)}px`;
    this.spot.style.top = `${this.y(this.cursor)}px`;
  }
  /** @param {[number, number][]} corners */
  sketch(corners) {
    this.outline.setAttribute("points", corners.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" "));
  }

  /**
   * Places of the points within a stretch of the map.
   * @param {[number, number][]} corners
   */
  inside(corners) {
    /** @type {number[]} */
    const places = [];
    for (let place = 0; place < this.across.length; place++)
      if (inPolygon(this.x(place), this.y(place), corners)) places.push(place);
    return places;
  }
  /**
   * The example nearest to a spot, or null where none is near.
   * @param {[number, number]} spot
   */
  nearest([x, y]) {
    let best = null,
      least = REACH * REACH;
    for (let place = 0; place < this.across.length; place++) {
      const far = (this.x(place) - x) ** 2 + (this.y(place) - y) ** 2;
      if (far < least) {
        best = place;
        least = far;
      }
    }
    return best;
  }
  /**
   * @param {PointerEvent} event
   * @returns {[number, number]}
   */
  at(event) {
    const box = this.node.getBoundingClientRect();
    return [event.clientX - box.left - this.node.clientLeft, event.clientY - box.top - this.node.clientTop];
  }

  /** @param {any} event */
  press(event) {
    if (event.button) return;
    const start = this.at(event),
      mode = event.shiftKey ? "add" : event.altKey ? "remove" : "replace";
    /** @type {[number, number][]} */
    let path = [start];
    const far = () => path.some(([x, y]) => Math.hypot(x - start[0], y - start[1]) > 4);
    const corners = () => (this.tool === "lasso" ? path : rectangle(start, path[path.length - 1]));
    const move = (/** @type {PointerEvent} */ moved) => {
      path.push(this.at(moved));
      if (far()) this.sketch(corners());
    };
    const stop = (/** @type {PointerEvent} */ ended) => {
      this.node.removeEventListener("pointermove", move);
      this.node.removeEventListener("pointerup", stop);
      this.node.removeEventListener("pointercancel", stop);
      this.sketch([]);
      if (ended.type === "pointercancel") return;
      path.push(this.at(ended));
      if (far()) return this.calls.onSelect(this.inside(corners()), mode, this.tool);
      const place = this.nearest(start);
      if (place === null) return this.calls.onSelect([], mode, "empty ground");
      if (mode !== "replace") return this.calls.onSelect([place], mode, "one by one");
      this.moveTo(place);
    };
    this.corner = null;
    this.node.setPointerCapture(event.pointerId);
    this.node.addEventListener("pointermove", move);
    this.node.addEventListener("pointerup", stop);
    this.node.addEventListener("pointercancel", stop);
    this.node.focus({preventScroll: true});
    event.preventDefault();
  }
  /** @param {any} event */
  hover(event) {
    if (event.buttons) return;
    const place = this.nearest(this.at(event));
    this.node.classList.toggle("on-point", place !== null);
    this.tell(place);
  }
  /** @param {number | null} place */
  tell(place) {
    if (place === this.told) return;
    this.told = place;
    this.calls.onHover(place);
  }
  /** @param {number} place */
  moveTo(place) {
    this.cursor = place;
    this.ring();
    this.calls.onPoint(place);
  }

  /** @param {any} event */
  key(event) {
    const ways = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]},
      way = ways[/** @type {keyof ways} */ (event.key)];
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (way) {
      if (event.shiftKey) this.stretch(way);
      else this.step(way);
    } else if (event.key === " " || event.key === "x") {
      const here = this.cursor;
      if (here === null) return;
      this.calls.onSelect([here], this.selected.has(here) ? "remove" : "add", "one by one");
    } else return;
    event.preventDefault();
    event.stopPropagation();
  }
  /**
   * Go to the nearest point in a direction.
   * @param {number[]} way
   */
  step([right, down]) {
    this.corner = null;
    this.sketch([]);
    if (this.cursor === null) return this.moveTo(this.order[this.order.length - 1] ?? 0);
    const x = this.x(this.cursor),
      y = this.y(this.cursor);
    let best = null,
      least = Infinity;
    for (let place = 0; place < this.across.length; place++) {
      const dx = this.x(place) - x,
        dy = this.y(place) - y,
        along = dx * right + dy * down,
        aside = Math.abs(dx * down) + Math.abs(dy * right);
      if (place === this.cursor || along <= 0 || aside > along) continue;
      if (along + aside < least) {
        best = place;
        least = along + aside;
      }
    }
    if (best !== null) this.moveTo(best);
  }
  /**
   * Stretch a rectangle from the point with the ring.
   * @param {number[]} way
   */
  stretch([right, down]) {
    if (this.cursor === null) return this.moveTo(this.order[this.order.length - 1] ?? 0);
    const x = this.x(this.cursor),
      y = this.y(this.cursor),
      [cx, cy] = this.corner ?? [x, y];
    /** @type {[number, number]} */
    const corner = [cx + right * STRETCH * this.width, cy + down * STRETCH * this.height];
    this.corner = corner;
    const around = rectangle(
      [Math.min(x, corner[0]) - 1, Math.min(y, corner[1]) - 1],
      [Math.max(x, corner[0]) + 1, Math.max(y, corner[1]) + 1],
    );
    this.sketch(around);
    this.calls.onSelect(this.inside(around), "replace", "rectangle");
  }
}
