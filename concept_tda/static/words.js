// Words that tell the highest examples of a ranking from the lowest, beyond chance. A word that is clicked is searched for.

/** The part that unfolds; words are asked for when it is opened. */
class EndWordsPart {
  method = 0;
  /** @type {Map<number, EndWords>} */
  known = new Map();

  /**
   * @param {Source} source
   * @param {{onWord: (word: string) => void, onFail: (error: any) => void}} calls
   */
  constructor(source, {onWord, onFail}) {
    this.source = source;
    this.onWord = onWord;
    this.onFail = onFail;
    this.box = el("div", {class: "end-words"});
    this.node = el(
      "details",
      {class: "words-part", ontoggle: () => this.load()},
      el("summary", {}, "Words of both ends"),
      this.box,
    );
  }

  /** @param {number} method */
  set(method) {
    if (method === this.method) return;
    this.method = method;
    this.load();
  }
  async load() {
    if (!this.node.open) return;
    const {method} = this;
    if (!this.known.has(method)) {
      this.box.setAttribute("aria-busy", "true");
      try {
        this.known.set(method, await /** @type {any} */ (this.source.words)(method));
      } catch (error) {
        return this.onFail(error);
      }
    }
    if (this.method === method) this.draw(/** @type {EndWords} */ (this.known.get(method)));
  }
  /** @param {EndWords} found */
  draw(found) {
    this.box.removeAttribute("aria-busy");
    const {centre} = this.source.table.methods[this.method];
    const side = (/** @type {string} */ title, /** @type {string} */ kind, /** @type {WordRow[]} */ rows) =>
      el(
        "div",
        {},
        el("p", {}, el("span", {class: centre === null ? "" : `key ${kind}`}, title)),
        rows.length
          ? wordChips(rows, ["at the top", "at the bottom"], word => this.onWord(word))
          : el("p", {class: "quiet"}, "No word is beyond chance."),
      );
    const any = found.highest.length + found.lowest.length > 0;
    this.box.replaceChildren(
      any
        ? el(
            "div",
            {class: "two"},
            side("in the highest", "more", found.highest),
            side("in the lowest", "less", found.lowest),
          )
        : "",
      el("p", {class: "quiet"}, found.words),
      any
        ? el(
            "p",
            {class: "quiet"},
            "Beside each word: in how many of the highest and of the lowest it occurs. A word says what these examples are about, not why they score as they do.",
          )
        : "",
    );
  }
}
