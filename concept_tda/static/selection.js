// Which examples of the browser pass its filters, and in which order; numbers only, nothing is drawn here.

/** Which examples pass, in which order: all that is decided about numbers, apart from any drawing. */
class ExampleSelection {
  /** @type {[number, number] | null} scores between these two */
  brush = null;
  words = "";
  /** @type {Int32Array | null} places that hold the words */
  hits = null;
  /** @type {Set<number>[]} codes that are ticked, by facet */
  facets = [];
  decided = "all";
  /** @type {[number | null, number | null]} */
  lengths = [null, null];
  /** Smallest difference between two methods, in percentile points. */
  gap = 0;
  method = 0;
  order = "high";
  /** @type {number | null} the method to differ from */
  against = null;
  /** The middle of the list is open. */
  opened = false;
  /** @type {Int32Array | null} near-duplicates, once they are known */
  groups = null;

  /** @param {Source} source */
  constructor(source) {
    this.source = source;
    this.table = source.table;
    this.n = source.table.n;
    this.fold = this.n <= this.table.fold_up_to;
    this.reset();
  }
  /** Forget all filters. */
  reset() {
    this.brush = this.hits = null;
    this.words = "";
    this.facets = this.table.facets.map(() => new Set());
    this.decided = "all";
    this.lengths = [null, null];
    this.gap = 0;
  }

  get scores() {
    return this.source.column(`score${this.method}`);
  }
  get filtered() {
    return (
      this.brush ||
      this.hits ||
      this.facets.some(chosen => chosen.size) ||
      this.decided !== "all" ||
      this.lengths.some(end => end !== null) ||
      this.gap > 0
    );
  }

  /** How far the chosen order ranks each example above the other method, in percentile points. */
  gaps() {
    const here = this.source.column(`percentile${this.method}`),
      there = this.source.column(`percentile${this.against}`);
    const sign = this.order === "above" ? 1 : -1;
    return Float64Array.from(here, (value, place) => sign * (value - there[place]));
  }

  /**
   * 1 for each example that passes all filters.
   * @param {number | "brush" | null} without leaves out one of them, to count what it could give
   */
  passing(without = null) {
    const pass = new Uint8Array(this.n).fill(1),
      {column} = this.source;
    const only = (/** @type {(place: number) => unknown} */ test) => {
      for (let place = 0; place < this.n; place++) if (pass[place] && !test(place)) pass[place] = 0;
    };
    if (this.brush && without !== "brush") {
      const [low, high] = this.brush,
        scores = this.scores;
      only((/** @type {number} */ place) => scores[place] >= low && scores[place] <= high);
    }
    if (this.hits) {
      const hit = new Uint8Array(this.n);
      this.hits.forEach(place => {
        hit[place] = 1;
      });
      only((/** @type {number} */ place) => hit[place]);
    }
    this.facets.forEach((chosen, number) => {
      if (!chosen.size || without === number) return;
      const codes = column(`facet${number}`);
      only((/** @type {number} */ place) => chosen.has(codes[place]));
    });
    if (this.decided !== "all") {
      const marks = this.source.marks(),
        notes = this.source.notes(),
        wanted = {undecided: NONE, keep: KEEP, drop: DROP}[this.decided];
      only(
        this.decided === "noted"
          ? (/** @type {number} */ place) => place in notes
          : (/** @type {number} */ place) => marks[place] === wanted,
      );
    }
    const [shortest, longest] = this.lengths;
    if (shortest !== null || longest !== null) {
      const lengths = column("length");
      only(
        (/** @type {number} */ place) =>
          lengths[place] >= (shortest ?? 0) && lengths[place] <= (longest ?? Infinity),
      );
    }
    if (this.against !== null && this.gap > 0) {
      const gaps = this.gaps();
      only((/** @type {number} */ place) => gaps[place] >= this.gap);
    }
    return pass;
  }

  /** Numbers to sort by, the largest first. */
  keys() {
    const {column} = this.source,
      flip = (/** @type {Column} */ values) => Float64Array.from(values, value => -value);
    if (this.against !== null) return this.gaps();
    switch (this.order) {
      case "low":
        return flip(this.scores);
      case "strong":
        return Float64Array.from(this.scores, Math.abs);
      case "similar":
        return column("similar");
      case "null":
        return column(`leading${this.method}`);
      case "long":
        return column("length");
      case "short":
        return flip(column("length"));
      case "file":
        return flip(column("row"));
      default:
        return this.scores;
    }
  }

  /**
   * Everything the drawing needs: places in order (folded, with a gap between the ends), and the counts.
   * @returns {View}
   */
  view() {
    const pass = this.passing(),
      keys = this.keys(),
      all = [];
    for (let place = 0; place < this.n; place++) if (pass[place]) all.push(place);
    all.sort((a, b) => keys[b] - keys[a] || a - b);
    const {shown, members} = this.folded(all);
    const middle =
      !this.opened &&
      shown.length > 2 * END + 20 &&
      this.against === null &&
      ["high", "low"].includes(this.order);
    const rows = middle ? [...shown.slice(0, END), MIDDLE, ...shown.slice(-END)] : shown;
    return {
      pass,
      all,
      rows,
      members,
      hidden: middle ? shown.length - 2 * END : 0,
      folded: all.length - shown.length,
    };
  }

  /**
   * The first of each group of near-duplicates in the given order, and whom it stands for.
   * @param {number[]} all
   */
  folded(all) {
    const {groups} = this;
    if (!this.fold || !groups) return {shown: all, members: new Map()};
    const first = new Map(),
      members = new Map();
    for (const place of all) {
      const group = groups[place];
      if (!first.has(group)) first.set(group, place);
      else members.set(first.get(group), [...(members.get(first.get(group)) ?? []), place]);
    }
    return {
      shown: all.filter(place => first.get(groups[place]) === place),
      members,
    };
  }

  /** The filters in words, for the record of a decision in bulk. */
  inWords() {
    const {methods, facets} = this.table,
      parts = [];
    if (this.brush)
      parts.push(`${methods[this.method].name} from ${general(this.brush[0])} to ${general(this.brush[1])}`);
    if (this.words) parts.push(`search ${this.words}`);
    this.facets.forEach((chosen, number) => {
      if (chosen.size)
        parts.push(
          `${facets[number].name}: ${[...chosen].map(code => facets[number].values[code]).join(" or ")}`,
        );
    });
    if (this.decided !== "all") parts.push(this.decided);
    if (this.lengths.some(end => end !== null))
      parts.push(
        `length from ${this.lengths[0] ?? 0} to ${this.lengths[1] ?? "any"} ${this.table.length_unit}`,
      );
    if (this.against !== null && this.gap > 0)
      parts.push(
        `${methods[this.method].name} ${this.gap} percentile points ${this.order === "above" ? "above" : "below"} ${methods[this.against].name}`,
      );
    return parts.join("; ") || "no filter";
  }
}
