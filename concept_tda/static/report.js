const browser = document.getElementById("browser"),
  data = document.getElementById("data");
if (browser && data) mountEmbedded(browser, JSON.parse(data.textContent ?? ""));

/** The plain lists of each method: the browser has them already, paper does not. */
const ends = /** @type {NodeListOf<HTMLDetailsElement>} */ (document.querySelectorAll(".ends"));
ends.forEach(one => {
  one.open = false;
});
addEventListener("beforeprint", () =>
  ends.forEach(one => {
    one.open = true;
  }),
);
