"""Files that are whole or absent, blocks that are believed only if they are what was written, and what
happens when the disk or the memory is full."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from concept_tda.data.conversations import load_conversations
from concept_tda.foundation import storage
from concept_tda.foundation.errors import MissingExtraError, StorageError, require
from concept_tda.foundation.storage import BlockStore, atomic_file, cache_folder, code_version, fingerprint
from concept_tda.influence.curvature import EKFAC
from concept_tda.influence.engine import LossReadout, shared_pass
from concept_tda.influence.scorers import GradDot
from concept_tda.model.loading import load_model
from concept_tda.model.losses import GradientError

from tiny import tiny_pair


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCEPT_TDA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def train():
    return load_conversations(
        [
            {"prompt": f"Is {i} even?", "response": "Yes." if i % 2 == 0 else "No, it is not."}
            for i in range(8)
        ]
    )


def test_fingerprints():
    assert (
        fingerprint(torch.zeros(2, 3))
        != fingerprint(torch.zeros(3, 2))
        != fingerprint(torch.zeros(3, 2, dtype=torch.float64))
    )
    assert fingerprint(torch.arange(6).view(2, 3).T) == fingerprint(torch.arange(6).view(2, 3).T.contiguous())
    assert (
        fingerprint([1, [2]]) != fingerprint([[1], 2])
        and fingerprint("é") == fingerprint("é")
        and fingerprint("\ud800")
    )
    with pytest.raises(TypeError, match="no fingerprint"):
        fingerprint(object())
    assert code_version().startswith("0.") and "+" in code_version()


@pytest.mark.parametrize(
    "number, words",
    [(errno.ENOSPC, "disk is full"), (errno.EACCES, "no permission"), (errno.EROFS, "read-only")],
)
def test_what_the_disk_says(tmp_path, monkeypatch, number, words):
    (tmp_path / "kept").write_text("old")

    def fails(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(storage.os, "replace", fails)
    with pytest.raises(StorageError, match=words):
        with atomic_file(tmp_path / "kept") as part:
            part.write_text("new")
    assert (tmp_path / "kept").read_text() == "old" and [f.name for f in tmp_path.iterdir()] == ["kept"]


def test_a_file_in_the_way(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        with atomic_file(tmp_path / "file" / "below"):
            pass
    monkeypatch.setenv("CONCEPT_TDA_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="CONCEPT_TDA_CACHE"):
        cache_folder("runs")


def test_extras():
    with pytest.raises(MissingExtraError, match=r"concept_tda\[sae\]"):
        require("no_such_package_at_all", "sae")


def test_blocks(tmp_path):
    store = BlockStore(tmp_path, dict(a=1))
    store.write("x", {"v": np.arange(3)})
    assert store.names() == {"x"} and store.verify() == []
    path = next(store.folder.glob("*.block"))
    for position in range(0, path.stat().st_size, 7):
        whole = path.read_bytes()
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        assert store.verify() == ["x"]
        with pytest.raises(StorageError, match="damaged"):
            store.read("x")
        path.write_bytes(whole)
    with pytest.raises(StorageError, match="no block"):
        store.read("y")
    store.clear()
    assert not Path(store.folder).exists()


def test_a_full_disk_during_scoring_loses_nothing(train, monkeypatch):
    lm = load_model(tiny_pair("llama"))
    expected = GradDot(lm, train[:2]).score(train, token_budget=1, progress=False).scores
    write, written = BlockStore.write, []

    def fills_up(self, name, arrays):
        if len(written) == 3:
            raise StorageError("cannot write: the disk is full")
        written.append(name)
        write(self, name, arrays)

    monkeypatch.setattr(BlockStore, "write", fills_up)
    with pytest.raises(StorageError, match="disk is full"):
        GradDot(lm, train[:2]).score(train, token_budget=1, progress=False)
    monkeypatch.setattr(BlockStore, "write", write)
    result = GradDot(lm, train[:2]).score(train, token_budget=1, progress=False)
    np.testing.assert_array_equal(result.scores, expected)
    assert any("3 of 8" in note for note in result.card.notes)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to "
            "allocate 4 bytes"
        ),
    ],
)
def test_out_of_memory_names_the_batch_and_the_setting(train, monkeypatch, error):
    import concept_tda.influence.engine as directional

    lm = load_model(tiny_pair("llama"))

    def fails(*args):
        raise error

    monkeypatch.setattr(directional, "run_batch", fails)
    with pytest.raises(GradientError, match=r"8 examples × \d+ tokens.*token_budget \(now 1024\)"):
        GradDot(lm, train[:2]).score(train, progress=False)
    assert not any(m._forward_hooks for m in lm.model.modules())


def test_an_overflowing_example_is_named(train):
    lm = load_model(tiny_pair("llama", dtype=torch.bfloat16))
    with torch.no_grad():
        lm.blocks[0].mlp.down_proj.weight.fill_(3e38)
    with pytest.raises(GradientError, match="not finite.*float32") as caught:
        shared_pass(lm, train, {"loss": LossReadout()}, progress=False)
    assert any(i in str(caught.value) for i in train.ids)
    with pytest.raises(Exception, match="not finite"):
        EKFAC.fit(lm, train, progress=False)
