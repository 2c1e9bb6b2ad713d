const browser = document.getElementById("browser"),
  data = document.getElementById("data");
if (browser && data) mountEmbedded(browser, JSON.parse(data.textContent ?? ""));

/** The plain lists of each method: where this script runs, the browser has them already. */
const ends = /** @type {NodeListOf<HTMLDetailsElement>} */ (document.querySelectorAll(".ends"));
ends.forEach(one => {
  one.open = false;
});
