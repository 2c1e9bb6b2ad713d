"""Nothing is lost: no writer replaces a file unasked, and none the file its content came from."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import concept_tda
from concept_tda.concepts.concept import tensor_concept
from concept_tda.data.conversations import load_conversations
from concept_tda.data.documents import load_documents
from concept_tda.data.masks import TokenMask
from concept_tda.data.preferences import load_preferences
from concept_tda.foundation.errors import StorageError
from concept_tda.results.attribution import Attribution
from concept_tda.results.cards import QueryCard
from concept_tda.views.report import write_report

from tiny import tiny_tokenizer

WRITERS = {"save", "to_json", "write", "export", "pack", "write_report", "export_activations", "export_query"}

OWN_FILES = {"crosscoders.py: _Kept.save", "storage.py: _Readable.write", "curvature.py: _Progress.write"}


def public_writers():
    """Everything in the package that writes what the user names, by its place."""
    for path in sorted(Path(concept_tda.__file__).parent.rglob("*.py")):
        module = ast.parse(path.read_text())
        for scope in ast.walk(module):
            if not isinstance(scope, (ast.Module, ast.ClassDef)):
                continue
            for one in scope.body:
                if isinstance(one, ast.FunctionDef) and one.name in WRITERS:
                    yield f"{path.name}: {getattr(scope, 'name', '')}.{one.name}", one.args


def test_whatever_writes_a_file_asks_before_it_replaces_one():
    without = {
        place
        for place, args in public_writers()
        if "overwrite" not in {arg.arg for arg in (*args.args, *args.kwonlyargs)}
    }
    assert len(list(public_writers())) >= 12 and without == OWN_FILES


def test_files_are_not_replaced_unasked_and_sources_never(tmp_path):
    source = tmp_path / "train.jsonl"
    lines = [
        json.dumps({"prompt": f"Is {i} one?", "chosen": f"Yes {i}.", "rejected": "No."}) for i in range(6)
    ]
    source.write_text("\n".join(lines))
    before = source.read_bytes()
    chats = load_conversations(source, answer="chosen")
    pairs = load_preferences(source)
    result = Attribution(chats, np.arange(6.0), QueryCard("Random", "nothing"))
    concept = tensor_concept(torch.ones(4), layer=1, name="any")
    kinds = {
        "chats.jsonl": chats.to_json,
        "pairs.jsonl": pairs.to_json,
        "scores.parquet": result.save,
        "concept.safetensors": concept.save,
        "mask.parquet": lambda path, **options: TokenMask(
            ["a"], [np.ones(2)], [np.ones(2, bool)], ["m"], None
        ).save(path, **options),
        "report.html": lambda path, **options: write_report(result, path, **options),
        "page.html": lambda path, **options: result.inspect().page().save(path, **options),
    }
    for name, write in kinds.items():
        path = tmp_path / name
        path.write_text("mine")
        with pytest.raises(StorageError, match=f"{name} exists already: .* say overwrite"):
            write(path)
        assert path.read_text() == "mine"
        write(path, overwrite=True)
        assert path.read_bytes() != b"mine"
    documents = load_documents(source, field="prompt", window=15)
    windows = documents.windows(tiny_tokenizer())
    made = [chats, chats[:2], chats.renamed("b"), chats.as_layout("messages"), result.drop(count=2)]
    made += [pairs, pairs.swap([0]), pairs[:2], pairs.chosen, pairs.as_layout("messages")]
    made += [documents, documents[:2], windows, windows[:2], windows[:2].as_documents()]
    for one in made:
        with pytest.raises(StorageError, match=r"train\.jsonl is the file this was made from"):
            one.to_json(source, overwrite=True)
    assert source.read_bytes() == before
