"""The example browsers in committed notebooks, drawn by the scripts as they are now. A run of an hour is not
repeated because a button moved: the data in each page stays to the letter, only the code around it is new.

    python tools/redraw_browsers.py                  # all notebooks
    python tools/redraw_browsers.py nbs/tutorials/quickstart.ipynb

Then `python tools/browser_picture.py`, which photographs the quickstart's."""

import html
import json
import re
import sys
from pathlib import Path

from finish_site import FRAME, ROOT

from concept_tda.views.browser import BROWSER_SCRIPTS, offline_page

HEIGHT = re.compile(r"height:(\d+)px")
DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


def redrawn(frame: re.Match) -> str:
    """A frame with its data and the scripts of today."""
    data = DATA.search(html.unescape(frame[2]))
    if data is None:  # some other page in such a frame
        return frame[0]
    height = int(HEIGHT.search(frame[1])[1])
    return offline_page(
        "Example browser", BROWSER_SCRIPTS, "mountEmbedded", data[1], height, ""
    )._repr_html_()


def redraw(notebook: dict) -> int:
    """Draw the browsers of a notebook anew. How many have changed."""
    changed = 0
    for output in (output for cell in notebook["cells"] for output in cell.get("outputs", [])):
        shown = "".join(output.get("data", {}).get("text/html", ""))
        new = FRAME.sub(redrawn, shown)
        if new != shown:
            output["data"]["text/html"] = new.splitlines(keepends=True)
            changed += 1
    return changed


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:] or sorted((ROOT / "nbs").rglob("*.ipynb"))):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        if changed := redraw(notebook):
            path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            print(f"{path}: {changed} browsers drawn anew")
