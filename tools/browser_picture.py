"""The picture of the example browser that README.md shows: the page in the quickstart's committed run,
photographed. The file remembers of which page; tests/test_quickstart.py compares.

python tools/browser_picture.py        # after the quickstart was run anew; needs Chromium"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from finish_site import QUICKSTART, ROOT, browser_of
from PIL import Image
from PIL.PngImagePlugin import PngInfo

PICTURE = ROOT / "nbs" / "images" / "example_browser.png"
SIZE = (1280, 940)


def page_hash(page: str) -> str:
    """By which the picture knows its page."""
    return hashlib.sha256(page.encode()).hexdigest()[:16]


def taken_of(picture: Path) -> str:
    """The hash of the page that a picture shows; empty where it does not say."""
    with Image.open(picture) as image:
        return image.info.get("page", "")


def photograph(page: str, picture: Path) -> None:
    """Open the page in Chromium and keep what it shows."""
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    if chromium is None:
        raise SystemExit(f"there is none of {', '.join(names)} here")
    with tempfile.TemporaryDirectory() as folder:
        file, shot = Path(folder, "page.html"), Path(folder, "shot.png")
        file.write_text(page, encoding="utf-8")
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={folder}/profile", f"--window-size={SIZE[0]},{SIZE[1]}"]
        command += ["--virtual-time-budget=10000", f"--screenshot={shot}", file.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        about = PngInfo()
        about.add_text("page", page_hash(page))
        with Image.open(shot) as image:
            image.convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(
                picture, pnginfo=about, optimize=True
            )


if __name__ == "__main__":
    photograph(browser_of(QUICKSTART)[1], Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE)
