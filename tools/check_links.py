"""Checks every internal link of a built site: the page is there, and so is the place on the page.

    python tools/check_links.py _docs

Exit 1 with one line per broken link. Links to other sites are not followed."""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The links and the anchors of one page."""

    def __init__(self, file: Path):
        super().__init__(convert_charrefs=True)
        self.links, self.anchors = [], set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        """Note the places that can be linked to, and the links."""
        found = dict(attributes)
        for key in ("id", "name"):
            if found.get(key):
                self.anchors.add(found[key])
        for key in ("href", "src"):
            if key in found and not (tag == "a" and found.get("role") in ("button", "navigation")):
                self.links.append((self.getpos()[0], found[key] or ""))


def broken_links(site: Path) -> list[str]:
    """`page:line: link: what is wrong` for every internal link that leads nowhere."""
    site = site.resolve()
    pages = {file: Page(file) for file in sorted(site.rglob("*.html"))}
    if not pages:
        return [f"{site}: no pages"]
    problems = []
    for file, page in pages.items():
        for line, link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or link in ("", "#"):
                continue
            path = unquote(parts.path)
            target = (
                file
                if not path
                else (site / path.lstrip("/") if path.startswith("/") else file.parent / path).resolve()
            )
            if target.is_dir():
                target /= "index.html"
            where = f"{file.relative_to(site)}:{line}: {link}"
            if site not in target.parents:
                problems.append(f"{where}: leads out of the site")
            elif not target.exists():
                problems.append(f"{where}: no such page")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                problems.append(f"{where}: no such place on that page")
    return problems


def main(folder: str) -> int:
    """Print every broken link and a count; 1 if there are any."""
    problems = broken_links(Path(folder))
    for problem in problems:
        print(problem, file=sys.stderr)
    count = len(list(Path(folder).rglob("*.html")))
    print(f"{count} pages, {len(problems)} broken links")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "_docs"))
