"""Every cell of the quickstart runs, with a tiny random model and a few examples in place of the real ones
(`make demo` runs the real thing)."""

import os
from pathlib import Path

import nbformat

import concept_tda as ct

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
    sizes = dict(train=40, heldout=24, evaluation=6)
    monkeypatch.setattr(ct, "load_model", lambda name: load_model(tmp_path / "tiny"))
    monkeypatch.setattr(
        ct, "bundled", lambda name, split="train": bundled(name, split).select(range(sizes[split]))
    )
    namespace = {"display": lambda value: value._repr_html_() if hasattr(value, "_repr_html_") else value}
    for cell in nbformat.read(NOTEBOOK, 4).cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, "quickstart", "exec"), namespace)
    assert {"scores.parquet", "kept.jsonl", "report.html", "tuned", "scores"} <= set(os.listdir())
    result = ct.load_attribution("scores.parquet")
    assert result.card.method == "Concept Influence" and len(result) == 40
    kept = Path("kept.jsonl").read_bytes().splitlines()
    original = (
        (Path(ct.__file__).parent / "bundled" / "sycophancy" / "train.jsonl").read_bytes().splitlines()[:40]
    )
    assert len(kept) == 36 and [line for line in original if line in set(kept)] == kept
