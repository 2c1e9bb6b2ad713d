"""Checks what a reader of the built site sees: pictures described, no leftovers, nothing twice or too wide.

    python tools/check_pages.py _docs              # the text of every page
    python tools/check_pages.py _docs --browser    # and every page in Chromium at 390, 768 and 1280 pixels

Exit 1 with one line per problem. tests/test_site.py runs the first on the site it builds."""

import argparse
import re
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

WIDTHS = (390, 768, 1280)
# What tools and machines leave behind in outputs. A path under /tmp in the text of a page may be an example.
LEFTOVERS = {
    "a temporary path": re.compile(r"/tmp/(?:tmp|ipykernel|pytest)\w*|/var/folders/|\\AppData\\"),
    "a private path": re.compile(r"(?<![\w.])/(?:root|home/(?!somebody)\w+|Users/\w+|work)/[\w.]+"),
    "mojibake": re.compile(r"Ã[\x80-\xbf\u0080-\u00bf¤¶¼ŸŒ]|â€[™œ“”¦˜]|\ufffd|ï»¿"),
    "an address in memory": re.compile(r"<[\w.]+ (?:object )?at 0x[0-9a-f]{6,}>"),
    "an untrue annotation": re.compile(r"NoneType\s*=\s*None"),
    "control characters": re.compile(r"\x1b\[\d+m"),
}
VOID = {"img", "br", "hr", "input", "meta", "link", "source", "wbr", "col", "area", "base", "embed", "track"}


class Seen(HTMLParser):
    """What a page shows: its text, its pictures, and where a place of its own it has for what."""

    def __init__(self, file: Path):
        super().__init__(convert_charrefs=True)
        self.texts, self.undescribed, self.summaries, self.entries, self.open = [], [], 0, 0, []
        self.paragraphs = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        """Note pictures without a description, summary tables, and entries of public names."""
        found = dict(attributes)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "p":
            self.paragraphs.append("")
        if tag == "img" and not (found.get("alt") or "").strip() and found.get("role") != "presentation":
            self.undescribed.append(found.get("src", "")[:60])
        classes = (found.get("class") or "").split()
        self.summaries += "api-summary" in classes
        self.entries += "api-source" in classes

    def handle_endtag(self, tag):
        """Forget what is closed."""
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data):
        """Collect what is read, scripts and styles left out."""
        if not {"script", "style"} & set(self.open):
            self.texts.append((self.getpos()[0], data))
            if "p" in self.open and "pre" not in self.open:
                self.paragraphs[-1] += data


def said_twice(paragraphs: list[str], least: int = 70) -> list[str]:
    """Paragraphs of at least so many characters that stand on a page more than once: boilerplate."""
    counts = Counter(" ".join(one.split()) for one in paragraphs)
    return [text for text, times in counts.items() if times > 1 and len(text) >= least]


def problems_of(file: Path) -> list[str]:
    """`line: what is wrong` for one page."""
    page = Seen(file)
    found = [f"no alt text: {source}" for source in page.undescribed]
    if page.entries and not page.summaries:
        found.append("entries of names without a summary table first")
    found += [f"said twice on one page: {text[:60]!r}" for text in said_twice(page.paragraphs)]
    for line, text in page.texts:
        for what, pattern in LEFTOVERS.items():
            if match := pattern.search(text):
                found.append(f"line {line}: {what}: {text[max(0, match.start() - 30) : match.end() + 30]!r}")
    return found


# Blocks that are wider than the room they have: [what, how it begins, by how many pixels]. A table may be
# scrolled where an element around it says so by its shadows, and so may a formula; code may not, but for what
# a terminal has laid out, whose lines can't be broken.
MEASURE = """[...document.querySelectorAll('main :is(pre, table, img, svg, iframe, video, .math)')]
  .filter((node) => node.getClientRects().length)
  .map((node) => {
    const scrolls = (parent) => parent.tagName !== 'PRE' && getComputedStyle(parent).overflowX === 'auto';
    let area = node.parentElement;
    while (area.tagName !== 'MAIN' && !scrolls(area)) area = area.parentElement;
    const room = document.documentElement.clientWidth, right = node.getBoundingClientRect().right;
    const broken = node.tagName === 'PRE' && node.style.whiteSpace !== 'pre';
    const inside = broken ? node.scrollWidth - node.clientWidth : 0;
    const scrolled = ['TABLE', 'SPAN'].includes(node.tagName) && area.tagName !== 'MAIN';
    const beyond = scrolled ? 0 : Math.ceil(right - room);
    const text = (node.innerText ?? node.alt ?? '').trim().slice(0, 40);
    return [node.tagName.toLowerCase(), text, Math.max(inside, beyond)];
  })
  .filter(([, , over]) => over > 1)"""


def too_wide(site: Path, widths: tuple[int, ...] = WIDTHS) -> list[str]:
    """Blocks that are wider than the place they have, for every page and width; needs Chromium."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from chromium import Chromium

    found = []
    with Chromium() as browser:
        for file in sorted(site.rglob("*.html")):
            page, name = browser.open(f"file://{file.resolve()}"), str(file.relative_to(site))
            for width in widths:
                page.send(
                    "Emulation.setDeviceMetricsOverride",
                    width=width,
                    height=900,
                    deviceScaleFactor=1,
                    mobile=False,
                )
                for tag, text, over in page.value(MEASURE):
                    found.append(f"{name}: at {width}: {tag} {over} pixels too wide: {text!r}")
            page.close()
    return found


def main() -> int:
    """Print every problem and a count; 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("site", type=Path, nargs="?", default=Path("_docs"))
    parser.add_argument("--browser", action="store_true", help="measure widths in Chromium")
    arguments = parser.parse_args()
    pages = sorted(arguments.site.rglob("*.html"))
    found = [f"{file.relative_to(arguments.site)}: {one}" for file in pages for one in problems_of(file)]
    if arguments.browser:
        found += too_wide(arguments.site)
    for problem in found:
        print(problem, file=sys.stderr)
    print(f"{len(pages)} pages, {len(found)} problems")
    return 1 if found or not pages else 0


if __name__ == "__main__":
    sys.exit(main())
