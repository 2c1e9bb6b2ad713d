/** The map of a report. Its texts are those of the browser on the same page; other points have numbers only. */
const mapPlace = document.getElementById("map"),
  pageData = document.getElementById("data");
if (mapPlace && pageData) {
  const page = JSON.parse(pageData.textContent ?? ""),
    /** @type {ReportMap} */
    map = page.map;
  const missing = {turns: [{role: "", answer: true, text: "(its text is not in this page)"}], metadata: []};
  const examples = Array.from({length: map.table.n}, () => missing);
  map.places.forEach((place, at) => {
    examples[place] = page.examples[at];
  });
  mountMap(mapPlace, {table: map.table, columns: map.columns, examples, groups: []});
}
