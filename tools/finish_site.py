"""What a built site needs beyond its pages: its index as a script, to be searched from a folder, since
file:// may not fetch; the example browser as the quickstart left it, where a page has its picture; and
lines of code as elements, so that the end of a long one hangs below its beginning.

python tools/finish_site.py _docs"""

import html
import json
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "nbs" / "tutorials" / "quickstart.ipynb"
FRAME = re.compile(r'<iframe title="Example browser"[^>]*? style="([^"]*)" srcdoc="([^"]*)"></iframe>')
CODE = re.compile(r'(<code class="sourceCode[^"]*">)(.*?)(</code>)', re.DOTALL)
PICTURE = re.compile(r'<img\b[^>]*\bsrc="[^"]*\bexample_browser\.png"[^>]*>')


def write_index(site: Path) -> Path:
    """`search_index.js` beside `search.json`; nbs/site.html loads it where the page comes from a file."""
    index = (site / "search.json").read_text(encoding="utf-8").strip()
    script = site / "search_index.js"
    # a line separator inside a string is valid JSON
    script.write_text(
        f"window.searchIndex = {index.replace(chr(0x2028), ' ').replace(chr(0x2029), ' ')};\n",
        encoding="utf-8",
    )
    return script


def browser_of(notebook: Path) -> tuple[str, str]:
    """The frame's style and the whole page of the example browser that an executed notebook shows."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    shown = [
        found
        for cell in cells
        for output in cell.get("outputs", [])
        for found in FRAME.findall("".join(output.get("data", {}).get("text/html", "")))
    ]
    if len(shown) != 1:
        raise SystemExit(
            f"{notebook} shows {len(shown)} example browsers; the site's pages open with its one"
        )
    return shown[0][0], html.unescape(shown[0][1])


def place_browser(site: Path, notebook: Path = QUICKSTART) -> list[Path]:
    """Write the notebook's browser as `example_browser.html`, and put it where pages have its picture. These
    pages."""
    style, page = browser_of(notebook)
    target = site / "example_browser.html"
    target.write_text(page, encoding="utf-8")
    opened = []
    for file in sorted(site.rglob("*.html")):
        text = file.read_text(encoding="utf-8")
        if file == target or not PICTURE.search(text):
            continue
        place = os.path.relpath(target, file.parent)
        frame = (
            f'<iframe title="Example browser" sandbox="allow-scripts" style="{style}" src="{place}"></iframe>'
        )
        file.write_text(PICTURE.sub(lambda _, frame=frame: frame, text), encoding="utf-8")
        opened.append(file)
    return opened


def mark_lines(code: str) -> str:
    """Highlighted code with an element around each line; a string over several lines stays in one piece. (The
    real quarto does this itself.)"""
    whole = lambda line: line.strip() and line.count("<span") == line.count("</span>")
    return "\n".join(
        f'<span class="code-line">{line}</span>' if whole(line) else line for line in code.split("\n")
    )


def hang_lines(site: Path) -> None:
    """`mark_lines` on every page; nbs/styles.css says how far they hang."""
    for file in site.rglob("*.html"):
        text = file.read_text(encoding="utf-8")
        marked = CODE.sub(lambda found: found[1] + mark_lines(found[2]) + found[3], text)
        if marked != text and "code-line" not in text:
            file.write_text(marked, encoding="utf-8")


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "_docs")
    write_index(folder)
    place_browser(folder)
    hang_lines(folder)
