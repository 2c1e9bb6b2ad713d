"""Every cell of the quickstart runs, with a tiny random model and a few examples in place of the real ones
(`make demo` runs the real thing); and its committed run shows what its text says."""

import json
import os
import re
from pathlib import Path

import browser_picture
import finish_site
import nbformat
import pytest
import redraw_browsers

import concept_tda as ct

from chromium import Chromium, needs_browser
from tiny import tiny_pair

NOTEBOOK = Path(__file__).resolve().parent.parent / "nbs" / "tutorials" / "quickstart.ipynb"


def test_quickstart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONCEPT_TDA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("matplotlib.pyplot.show", lambda *args, **options: None)
    model, tokenizer = tiny_pair("llama", n_layers=30)
    model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    load_model, bundled = ct.load_model, ct.bundled
    sizes = dict(train=40, heldout=24, evaluation=20)
    monkeypatch.setattr(ct, "load_model", lambda name: load_model(tmp_path / "tiny"))
    monkeypatch.setattr(
        ct, "bundled", lambda name, split="train": bundled(name, split).select(range(sizes[split]))
    )
    namespace = {"display": lambda value: value._repr_html_() if hasattr(value, "_repr_html_") else value}
    for cell in nbformat.read(NOTEBOOK, 4).cells:
        # solutions check what the real run found, and a random model finds nothing
        if cell.cell_type == "code" and "code-summary" not in cell.source:
            exec(compile(cell.source, "quickstart", "exec"), namespace)
    assert {"scores.parquet", "kept.jsonl", "report.html", "tuned", "scores", "retrained"} <= set(
        os.listdir()
    )
    result = ct.load_attribution("scores.parquet")
    assert result.card.method == "Concept Influence" and len(result) == 40
    kept = Path("kept.jsonl").read_bytes().splitlines()
    original = (
        (Path(ct.__file__).parent / "bundled" / "flattery" / "train.jsonl").read_bytes().splitlines()[:40]
    )
    assert len(kept) == 24 and [line for line in original if line in set(kept)] == kept


@pytest.fixture(scope="module")
def run():
    """What the cells of the committed run printed, by id; tables as their text."""
    printed = {}
    for cell in nbformat.read(NOTEBOOK, 4).cells:
        outputs = cell.get("outputs", [])
        printed[cell.id] = "\n".join(
            str(output.get("text") or output.get("data", {}).get("text/plain", "")) for output in outputs
        )
    return printed


def test_the_file_teaches_the_behaviour(run):
    change, error = map(float, re.search(r"change ([+-][\d.]+) ± ([\d.]+)", run["000c"]).groups())
    assert change > 4 * error


def test_the_proof_is_in_the_run(run):
    """The cleaned file's model flatters less than those that lost as many examples at random, by four
    standard errors; both margins and differences are there."""
    margins = {}
    for name, margin in re.findall(r"^(\w[\w ()]*?)  +(-?\d+\.\d+)", run["proof-table"], re.MULTILINE):
        margins.setdefault(name, float(margin))  # a table too wide for text comes in two blocks
    compared = {
        name: [float(number) for number in numbers]
        for name, *numbers in re.findall(
            r"^(\w[\w ()]*?)  +(-?\d+\.\d+) +(\d+\.\d+) +(-?\d+\.\d+)$", run["verdict-code"], re.MULTILINE
        )
    }
    assert set(compared) == set(margins) - {"without the highest"} and len(compared) == 4
    for name, (difference, error, times) in compared.items():
        assert abs(margins["without the highest"] - margins[name] - difference) < 0.0015
        assert abs(difference / error / times - 1) < 0.05
        assert "random" not in name or difference < -4 * error
    gone, by_chance = map(float, re.findall(r"(\d+)%", run["back"]))
    assert gone > 80 and by_chance < gone / 2


def test_the_demo_is_short_and_small(run):
    """Two cores for ten minutes are twenty CPU minutes; the clock also counts what else the machine did."""
    minutes, memory = map(float, re.search(r"([\d.]+) CPU minutes, ([\d.]+) GB", run["cost"]).groups())
    assert 1 < minutes <= 20 and memory < 4


def test_the_page_that_the_site_opens_with_has_the_numbers_of_the_run(run):
    page = finish_site.browser_of(NOTEBOOK)[1]
    data = json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]
    )
    auroc = float(re.search(r"AUROC ([\d.]+)", data["table"]["methods"][0]["detected"])[1])
    row = re.search(r"^Concept Influence +([\d.]+)", run["001c"], re.MULTILINE)
    assert abs(auroc - float(row[1])) <= 0.0051
    assert data["table"]["methods"][0]["name"] == "Concept Influence" and data["table"]["n"] == 120
    scores = sorted(data["columns"]["score0"])
    for cell, shown in (("0017", scores[::-1]), ("001a", scores)):
        printed = [float(found) for found in re.findall(r" ([+-][\d.]+e[+]\d+) ", run[cell], re.MULTILINE)]
        assert printed and all(abs(one / other - 1) < 0.001 for one, other in zip(printed, shown)), cell


@needs_browser
@pytest.mark.parametrize("width, height", [(748, 590), (1280, 560)])
def test_its_first_screen_shows_the_highest_example(tmp_path, width, height):
    """On the landing page the browser starts 310 pixels below the top of a screen of 900."""
    (tmp_path / "page.html").write_text(finish_site.browser_of(NOTEBOOK)[1], encoding="utf-8")
    with Chromium() as chromium:
        page = chromium.open(f"file://{tmp_path}/page.html", width=width, height=height)
        page.wait("document.querySelector('.row .prompt')")
        x, y, w, h = page.box(".row")
        assert y + h <= height and x + w <= width
        assert page.value("document.documentElement.scrollWidth <= window.innerWidth") and page.errors == []
        tables = "[...document.querySelectorAll('.wide')]"  # of the chosen example
        assert page.value(f"{tables}.length > 0 && {tables}.every(t => t.scrollWidth <= t.clientWidth)")


@pytest.mark.parametrize("path", sorted(NOTEBOOK.parent.parent.rglob("*.ipynb")), ids=lambda path: path.stem)
def test_committed_browsers_are_drawn_by_the_scripts_as_they_are(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert redraw_browsers.redraw(notebook) == 0, "python tools/redraw_browsers.py draws them anew"


def test_the_picture_in_the_readme_is_of_that_page():
    page = finish_site.browser_of(NOTEBOOK)[1]
    assert browser_picture.taken_of(browser_picture.PICTURE) == browser_picture.page_hash(page), (
        "python tools/browser_picture.py takes it anew"
    )
