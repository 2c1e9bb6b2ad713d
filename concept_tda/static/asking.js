// Words of an answer that are selected, and the lines of Python that ask which data made them.

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

/** A part that appears when words of an answer are selected in an element. */
class AskingPart {
  /** @param {HTMLElement} reading where the answer stands */
  constructor(reading) {
    this.reading = reading;
    this.row = 0;
    this.node = el("div", {class: "asking", role: "status", hidden: true});
    for (const name of ["pointerup", "keyup"]) reading.addEventListener(name, () => this.look());
  }
  /** @param {number} row of the example that is read */
  set(row) {
    this.row = row;
    this.node.hidden = true;
    return this.node;
  }
  look() {
    const words = selectedWords(this.reading);
    if (!words) return;
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
    this.node.replaceChildren(
      el(
        "p",
        {},
        "Which data made ",
        el("q", {}, el("bdi", {}, words)),
        "? With the model as ",
        el("code", {}, "lm"),
        " and the training file as ",
        el("code", {}, "train"),
        ":",
      ),
      pre,
      el("button", {type: "button", onclick: copy}, "Copy the lines"),
      copied,
    );
    this.node.hidden = false;
  }
}
