"""What a built site needs to be searched from a folder: its index as a script, since file:// may not fetch.

python tools/finish_site.py _docs"""

import sys
from pathlib import Path


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


if __name__ == "__main__":
    write_index(Path(sys.argv[1] if len(sys.argv) > 1 else "_docs"))
