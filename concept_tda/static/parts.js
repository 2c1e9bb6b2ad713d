// Shared by the views of concept_tda. Whatever comes from the data becomes a text node or a number; no markup is ever parsed.

/**
 * An element; strings among the children become text nodes, missing children are skipped.
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {Attributes} [attributes] values, and handlers under names such as `onclick`
 * @param {...Child} children
 */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (typeof value === "function") node.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked") Object.assign(node, {[name]: value});
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  const shown = /** @type {Child[]} */ (children).flat();
  const left = shown.filter(child => child !== undefined && child !== null && child !== false);
  node.append(.../** @type {(Node | string)[]} */ (left));
  return node;
}

/**
 * An SVG element with attributes that are ours.
 * @template {keyof SVGElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {Record<string, string | number>} [attributes]
 * @param {...(Node | string)} children
 */
function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, String(value));
  node.append(...children);
  return node;
}

/**
 * Python's format(x, "g"): significant digits, an exponent only where it is short.
 * @param {number} x
 */
function general(x, digits = 4) {
  if (!Number.isFinite(x)) return "–";
  if (x === 0) return "0";
  const exponent = Number(x.toExponential(digits - 1).split("e")[1]);
  if (exponent < -4 || exponent >= digits)
    return x
      .toExponential(digits - 1)
      .replace(/\.?0+e/, "e")
      .replace(/e([+-])(\d)$/, "e$10$2");
  const text = x.toFixed(Math.max(0, digits - 1 - exponent));
  return text.includes(".") ? text.replace(/\.?0+$/, "") : text;
}
const signed = (/** @type {number} */ x, digits = 4) =>
  (x >= 0 ? "+" : "") + general(x, digits).replace("-", "−");
const whole = (/** @type {number} */ n) => n.toLocaleString("en");
const counted = (/** @type {number} */ n, /** @type {string} */ one, many = one + "s") =>
  `${whole(n)} ${n === 1 ? one : many}`;
const percent = (/** @type {number} */ p) => `${(Math.floor(10 * p) / 10).toFixed(1)} %`; // rounded down: nothing is higher than 100.0 % of its file

/** A colour scale: a number is its limit around zero; without a sign there is one colour, by size. */
/** @type {(scale: number | Scale) => Scale} */
const scaleOf = scale => (typeof scale === "number" ? {limit: scale, centre: 0, signed: true} : scale);

/**
 * Ground of a value on a scale: orange above its centre, blue below, none near it; grey where there is no sign.
 * @param {number} value
 * @param {number | Scale} given
 */
function ground(value, given) {
  const {limit, centre, signed: hasSign} = scaleOf(given),
    away = value - centre;
  if (centre && value === 0) return ""; // an exact 0 does not count
  const strength = limit > 0 ? Math.min(1, Math.abs(away) / limit) : 0;
  if (!(strength > 0.05)) return "";
  return hasSign
    ? `rgba(var(--${away > 0 ? "more" : "less"}),${(0.7 * strength).toFixed(3)})`
    : `rgba(128,128,128,${(0.7 * strength).toFixed(3)})`;
}

/**
 * The colour scale with both ends in numbers.
 * @param {number | Scale} given
 * @param {string} what
 */
function legend(given, what, more = "") {
  const scale = scaleOf(given),
    {limit, centre} = scale;
  const steps = scale.signed ? [-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1] : [0, 0.25, 0.5, 0.75, 1];
  const low = scale.signed ? `${signed(centre - limit, 2)} or less` : "0",
    size = scale.signed ? "" : ", of either sign";
  const middle = centre ? ` Coloured around the tokens' mean, ${signed(centre, 2)}.` : "";
  return el(
    "p",
    {class: "legend quiet"},
    `${what}: ${low} `,
    el(
      "span",
      {class: "swatches", "aria-hidden": "true"},
      ...steps.map(step => {
        const box = el("span");
        box.style.background = ground(step, {limit: 1, centre: 0, signed: scale.signed});
        return box;
      }),
    ),
    ` ${scale.signed ? signed(centre + limit, 2) : general(limit, 2)} or more${size}.${middle}${more}`,
  );
}

const SPECIAL = /^\s*(<\|.*\|>|<\/?s>|<(bos|eos|pad|(start|end)_of_turn)>|\[\/?INST\])\s*$/; // template tokens, drawn pale
const MOST_TOKENS = 4000,
  MOST_CHARACTERS = 20000; // drawn at once; a button draws the next ones

/**
 * Text in stretches: a turn of a million characters is drawn piece by piece, on demand.
 * @param {string} text
 */
function longText(text) {
  const node = el("div", {class: "text", dir: "auto"});
  let at = 0;
  const more = () => {
    let end = Math.min(text.length, at + MOST_CHARACTERS);
    if (end < text.length && /[\ud800-\udbff]/.test(text[end - 1])) end += 1; // never between the halves of a character
    node.append(text.slice(at, end));
    at = end;
    if (at < text.length)
      node.append(button(`show the next of ${whole(text.length - at)} more characters`, more));
  };
  const button = (/** @type {string} */ words, /** @type {() => void} */ act) =>
    el(
      "button",
      {
        type: "button",
        class: "more",
        onclick: event => {
          event.target.remove();
          act();
        },
      },
      words,
    );
  more();
  return node;
}

/**
 * Tokens on coloured ground. `tell(text, value)` is called with the token under the pointer or the token cursor. The
 * attention sink, if the first of them is one, has a frame and no colour.
 * @param {string[]} tokens
 * @param {number[]} scores
 * @param {number | Scale} limit
 * @param {Tell} tell
 */
function tokenText(tokens, scores, limit, tell, sink = false) {
  const node = el("div", {
    class: "text tokens",
    dir: "auto",
    tabindex: "0",
    role: "group",
    "aria-label": "Tokens; left and right arrow keys read their values",
  });
  let drawn = 0,
    cursor = -1;
  /** @type {HTMLElement[]} */
  const spans = [];
  const more = () => {
    const end = Math.min(tokens.length, drawn + MOST_TOKENS);
    const part = document.createDocumentFragment();
    for (; drawn < end; drawn++) {
      const span = el("span", SPECIAL.test(tokens[drawn]) ? {class: "special"} : {}, tokens[drawn]);
      span.title = signed(scores[drawn], 4);
      span.dataset.at = String(drawn);
      const isSink = sink && drawn === 0,
        colour = isSink ? "" : ground(scores[drawn], limit);
      if (colour) span.style.background = colour;
      if (isSink) {
        span.classList.add("sink");
        span.title += ", the attention sink: not coloured";
      }
      spans.push(span);
      part.append(span);
    }
    node.append(part);
    if (drawn < tokens.length)
      node.append(
        el(
          "button",
          {
            type: "button",
            class: "more",
            onclick: event => {
              event.target.remove();
              more();
            },
          },
          `show the next of ${whole(tokens.length - drawn)} more tokens`,
        ),
      );
  };
  const point = (/** @type {number} */ at) => {
    if (spans[cursor]) spans[cursor].classList.remove("at");
    cursor = at;
    spans[cursor].classList.add("at");
    tell(tokens[cursor], scores[cursor]);
  };
  node.addEventListener("pointerover", event => {
    const {at} = /** @type {HTMLElement} */ (event.target).dataset;
    if (at !== undefined) point(Number(at));
  });
  node.addEventListener("keydown", event => {
    const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
    if (!step || event.target !== node) return;
    const at = Math.max(0, Math.min(spans.length - 1, cursor + step));
    point(at);
    spans[at].scrollIntoView({block: "nearest"});
    event.preventDefault();
    event.stopPropagation();
  });
  more();
  return node;
}

/**
 * A conversation turn by turn, prompt and response apart.
 * @param {Turn[]} turns
 * @param {number | Scale} limit
 * @param {Tell} tell
 */
function conversation(turns, limit, tell) {
  return turns.map(turn =>
    el(
      "div",
      {class: `turn ${turn.answer ? "answer" : "question"}`},
      el("div", {class: "role"}, el("bdi", {}, turn.role)),
      turn.scores
        ? tokenText(turn.tokens ?? [], turn.scores, limit, tell, turn.sink)
        : longText(turn.text ?? ""),
    ),
  );
}

/**
 * A score by kind of token: a small bar, the figures, and what the first token carries.
 * @param {Parts} found
 * @param {string} whose the method, where there are several
 */
function partsBar({parts, total, unit, sink_words}, whose) {
  const all = parts.reduce((sum, [, amount]) => sum + Math.abs(amount), 0),
    bar = el("span", {class: "bar", "aria-hidden": "true"});
  for (const [kind, amount] of parts) {
    const piece = el("span", {title: `${kind} ${signed(amount, 3)}`});
    piece.style.width = `${(100 * Math.abs(amount)) / all}%`;
    piece.style.background = `rgba(var(--${amount > 0 ? "more" : "less"}),.8)`;
    bar.append(piece);
  }
  return el(
    "div",
    {class: "parts", role: "group", "aria-label": "The score by kind of token"},
    whose ? el("span", {class: "quiet"}, el("bdi", {}, whose), ": ") : null,
    bar,
    parts
      .filter(([, amount]) => amount)
      .map(([kind, amount]) => el("span", {class: "figure"}, `${kind} ${signed(amount, 3)}`)),
    el("b", {}, `= ${signed(total, 3)} ${unit}`.trim()),
    sink_words ? el("span", {class: "quiet"}, sink_words) : null,
  );
}

/** Two-column table of names and values. */
const facts = (/** @type {readonly (readonly unknown[])[]} */ pairs) =>
  el(
    "table",
    {class: "facts"},
    el(
      "tbody",
      {},
      pairs.map(([name, value]) =>
        el(
          "tr",
          {},
          el("th", {scope: "row"}, el("bdi", {}, String(name))),
          el("td", {}, el("bdi", {}, String(value))),
        ),
      ),
    ),
  );

/**
 * Questions to the kernel and their answers, matched by number; other views of the same model have other numbers.
 * @param {WidgetModel} model
 */
function kernel(model, onWaiting = (/** @type {boolean} */ state) => {}) {
  const me = Math.random().toString(36).slice(2);
  /** @type {Map<string, {resolve: (answer: any) => void, reject: (error: Error) => void, timer: number}>} */
  const open = new Map();
  let count = 0;
  const receive = (/** @type {Answer} */ message, /** @type {DataView[]} */ buffers) => {
    const question = open.get(message.reply);
    if (!question) return;
    open.delete(message.reply);
    clearTimeout(question.timer);
    if (!open.size) onWaiting(false);
    if (message.error) question.reject(new Error(message.error));
    else question.resolve({...message, buffers});
  };
  model.on("msg:custom", receive);
  return {
    ask: (/** @type {string} */ kind, values = {}) =>
      new Promise((resolve, reject) => {
        const number = `${me}-${++count}`;
        open.set(number, {resolve, reject, timer: setTimeout(() => onWaiting(true), 3000)});
        model.send({kind, number, ...values});
      }),
    close: () => model.off("msg:custom", receive),
  };
}

/**
 * Words as buttons, each with the numbers of examples of either end that have it.
 * @param {WordRow[]} rows
 * @param {[string, string]} ends what the two ends are called
 * @param {(word: string) => void} pick
 */
function wordChips(rows, [first, second], pick) {
  return el(
    "p",
    {class: "chips"},
    rows.map(([word, z, high, low]) =>
      el(
        "button",
        {
          type: "button",
          title: `z ${signed(z, 2)}: in ${whole(high)} of the examples ${first} and ${whole(low)} of those ${second}. Click to list those with it`,
          onclick: () => pick(word),
        },
        el("bdi", {}, word),
        el("span", {class: "quiet"}, ` ${whole(high)} : ${whole(low)}`),
      ),
    ),
  );
}

/**
 * A drawing put off to the next frame: asked for several times before that, it happens once.
 * @param {() => void} draw
 */
function nextFrame(draw) {
  /** @type {number | null} */
  let frame = null;
  return () => {
    frame ??= requestAnimationFrame(() => {
      frame = null;
      draw();
    });
  };
}

/**
 * Put the focus on what a selector finds, if anything.
 * @param {Element} root
 * @param {string} selector
 */
function focusOn(root, selector) {
  /** @type {HTMLElement | null} */ (root.querySelector(selector))?.focus();
}
