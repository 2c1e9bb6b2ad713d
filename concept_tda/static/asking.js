// Words of an answer that are selected, and the question which data made them: asked of the kernel where it can answer, and as
// lines of Python everywhere.

/**
 * The text selected within one answer of an element, or "" where nothing is, or where it is not in an answer.
 * @param {Element} root
 */
function selectedWords(root) {
  const chosen = document.getSelection();
  if (!chosen || chosen.isCollapsed || !chosen.anchorNode || !chosen.focusNode) return "";
  const answer = (/** @type {Node} */ node) =>
    (node instanceof Element ? node : node.parentElement)?.closest(".turn.answer .text") ?? null;
  const from = answer(chosen.anchorNode);
  if (!from || from !== answer(chosen.focusNode) || !root.contains(from)) return "";
  return chosen.toString().trim();
}

/**
 * Python that scores the training data by what it did to some words of one example's answer.
 * @param {number} row
 * @param {string} words
 */
const askingCode = (row, words) =>
  [
    "from concept_tda.data.masks import chosen_tokens",
    "from concept_tda.influence.queries import LossQuery, TokenQuery",
    "from concept_tda.influence.scorers import Influence",
    "",
    `answer = train.select([${row}])`,
    `words = chosen_tokens(lm.tokenize(answer), ${JSON.stringify(words)})`,
    "asked = Influence(lm, TokenQuery(LossQuery(answer), words)).score(train)",
    "asked.inspect()",
  ].join("\n");

/** A part that appears when words of an answer are selected in an element, and one that holds the answer. */
class AskingPart {
  /**
   * @param {HTMLElement} reading where the answer stands
   * @param {Pick<Source, "askWords" | "snippets">} source
   * @param {(place: number) => void} reveal go to an example
   */
  constructor(reading, source, reveal) {
    this.reading = reading;
    this.source = source;
    this.reveal = reveal;
    this.row = 0;
    this.place = 0;
    this.asked = 0;
    this.node = el("div", {class: "asking", role: "status", hidden: true});
    this.answer = el("section", {class: "asked", "aria-label": "Which data made these words", hidden: true});
    for (const name of ["pointerup", "keyup"])
      reading.addEventListener(name, event => {
        if (!this.node.contains(/** @type {Node} */ (event.target))) this.look(); // its own buttons must stay to be clicked
      });
  }
  /**
   * @param {number} row of the example that is read
   * @param {number} place
   */
  set(row, place) {
    this.row = row;
    this.place = place;
    this.node.hidden = true;
    return this.node;
  }
  look() {
    const words = selectedWords(this.reading);
    if (!words) return;
    const {askWords} = this.source,
      said = [el("q", {}, el("bdi", {}, words))];
    const press = askWords
      ? el("button", {type: "button", class: "ask", onclick: () => this.ask(words)}, "Score the file by them")
      : null;
    this.node.replaceChildren(
      el("p", {}, "Which data made ", ...said, "? ", press),
      askWords
        ? el("details", {}, el("summary", {}, "The same as lines of Python"), ...this.lines(words))
        : el("div", {}, ...this.lines(words)),
    );
    this.node.hidden = false;
  }
  /**
   * The lines of Python, and a button that copies them.
   * @param {string} words
   */
  lines(words) {
    const code = askingCode(this.row, words),
      copied = el("span", {class: "quiet"}),
      pre = el("pre", {}, code);
    const copy = async () => {
      try {
        await navigator.clipboard.writeText(code);
        copied.textContent = " Copied.";
      } catch {
        document.getSelection()?.selectAllChildren(pre); // a frame may not use the clipboard
        copied.textContent = " They are marked: copy them with Ctrl+C.";
      }
    };
    const names = [
      "With the model as ",
      el("code", {}, "lm"),
      " and the training file as ",
      el("code", {}, "train"),
      ":",
    ];
    return [
      el("p", {class: "quiet"}, ...names),
      pre,
      el("button", {type: "button", onclick: copy}, "Copy the lines"),
      copied,
    ];
  }

  /**
   * Ask the kernel.
   * @param {string} words
   */
  async ask(words) {
    const mine = ++this.asked,
      row = whole(this.row);
    this.tell(
      el(
        "p",
        {class: "quiet"},
        "Scoring the file by ",
        el("q", {}, el("bdi", {}, words)),
        ` of row ${row}. It takes as long as any scoring; the kernel is busy meanwhile.`,
      ),
    );
    try {
      const found = await /** @type {NonNullable<Source["askWords"]>} */ (this.source.askWords)(
        this.place,
        words,
      );
      if (mine === this.asked) await this.show(words, row, found);
    } catch (error) {
      if (mine === this.asked) this.tell(el("p", {class: "problem"}, /** @type {Error} */ (error).message));
    }
  }
  /** @param {...HTMLElement} parts */
  tell(...parts) {
    const close = el(
      "button",
      {
        type: "button",
        class: "close",
        onclick: () => {
          this.asked += 1;
          this.answer.hidden = true;
        },
      },
      "Close",
    );
    this.answer.replaceChildren(...parts, close);
    this.answer.hidden = false;
    this.answer.scrollIntoView({block: "nearest"});
  }
  /**
   * The examples at both ends by these words, beside those of the shown result.
   * @param {string} words
   * @param {string} row
   * @param {AskedWords} found
   */
  async show(words, row, found) {
    const places = [...new Set(found.ends.flatMap(end => end.sides.flat().map(one => one.place)))],
      texts = await this.source.snippets(places),
      snippets = new Map(places.map((place, at) => [place, texts[at]]));
    const names = [found.name, found.here];
    const line = (/** @type {AskedRow} */ one, /** @type {number} */ side) =>
      el(
        "button",
        {
          type: "button",
          class: "one",
          title: `raw score ${signed(one.raw[side], 6)}`,
          onclick: () => this.reveal(one.place),
        },
        el(
          "span",
          {class: "numbers"},
          el("b", {}, percent(one.percentile[side])),
          el(
            "span",
            {class: "quiet"},
            ` ${one.distance[side]} · #${whole(one.rank[1 - side])} by ${side ? "these words" : found.here}`,
          ),
        ),
        el("span", {class: "prompt quiet", dir: "auto"}, snippets.get(one.place)?.prompt ?? ""),
        el("span", {class: "response", dir: "auto"}, snippets.get(one.place)?.response ?? ""),
      );
    this.tell(
      el("h4", {}, "Which data made ", el("q", {}, el("bdi", {}, words)), ` of row ${row}`),
      el("p", {class: "quiet"}, el("bdi", {}, found.reading)),
      el(
        "p",
        {class: "quiet"},
        `The two orders agree with Spearman ${signed(found.agreement ?? NaN, 2)}. In Python the result is `,
        el("code", {}, "browser.asked[-1]"),
        ".",
      ),
      ...found.ends.map(end =>
        el(
          "div",
          {class: "beside"},
          end.sides.map((rows, side) =>
            el(
              "div",
              {class: side ? "here" : "words"},
              el(
                "p",
                {class: "name"},
                `${end.title} ${side ? "by" : "for these words, by"} `,
                el("bdi", {}, names[side]),
              ),
              rows.map(one => line(one, side)),
            ),
          ),
        ),
      ),
    );
  }
}
