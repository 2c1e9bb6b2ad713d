"""Several processes give what one gives, to the last bit; a killed one costs nothing but its block."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from concept_tda.data.conversations import load_conversations
from concept_tda.foundation.processes import (
    ProcessError,
    by_first,
    in_processes,
    n_ranks,
    on_its_own,
    own_share,
    rank,
    wait_for_all,
)
from concept_tda.foundation.storage import BlockStore
from concept_tda.model.loading import ModelError, load_model

from tiny import tiny_pair

RECORDS = [
    {"prompt": f"What is {i} and {i + 1}?", "response": "It is " + "so " * (i % 7) + f"{2 * i}."}
    for i in range(150)
]


@pytest.fixture(autouse=True)
def found_by_others(monkeypatch, tmp_path):
    """The functions of this file can be called by other processes, which share a cache."""
    here = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("CONCEPT_TDA_CACHE", str(tmp_path / "cache"))


def setting():
    torch.set_num_threads(1)
    lm = load_model(tiny_pair("llama", n_layers=2, width=16, dtype=torch.float64))
    return lm, load_conversations(RECORDS)


def kill_one(folder, blocks):
    """Rank 1 kills itself once, before it writes its block of this number."""
    counted, write = [0], BlockStore.write

    def dying(store, name, arrays):
        counted[0] += 1
        mark = Path(folder) / f"killed at {counted[0]}"
        if rank() == 1 and counted[0] in blocks and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        write(store, name, arrays)

    BlockStore.write = dying


class TinySAE(torch.nn.Module):
    """What the library asks of an SAE."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.W_enc = torch.nn.Parameter(torch.randn(16, 24, generator=generator))
        self.W_dec = torch.nn.Parameter(torch.randn(24, 16, generator=generator))

    def encode(self, acts):
        return (acts @ self.W_enc).relu()


def everything(folder, blocks=()):
    """Each kind of work that is shared: arrays of what came out."""
    from concept_tda.concepts.concept import tensor_concept
    from concept_tda.groups.features import read_features
    from concept_tda.groups.sae import SparseAutoencoder
    from concept_tda.influence.atlas import build_atlas, build_index
    from concept_tda.influence.curvature import EKFAC
    from concept_tda.influence.scorers import ConceptInfluence, VectorFilter, score_together
    from concept_tda.influence.streaming import score_stream
    from concept_tda.model.answers import cached_generate

    if blocks:
        kill_one(folder, blocks)
    folder, (lm, train) = Path(folder), setting()
    direction = torch.randn(16, generator=torch.Generator().manual_seed(0))
    concept = tensor_concept(direction, 1, name="planted", lm=lm)
    quiet = dict(progress=False)
    fitted = EKFAC.fit(lm, train, layer=1, memory_budget=2**20, **quiet)
    scorers = [ConceptInfluence(lm, concept, train[:3], curvature=fitted), VectorFilter(lm, concept)]
    found = {
        f"{site} {name}": getattr(f, name).numpy()
        for site, f in fitted.factors.items()
        for name in ("Q_in", "Q_out", "eigenvalues")
    }
    for method, result in score_together(scorers, train, token_budget=200, tokens=True, **quiet).items():
        found |= {method: result.scores, f"{method} tokens": np.concatenate(result.token_scores)}
    streamed = score_stream(scorers, RECORDS, folder / "stream", part_examples=40, token_budget=200, **quiet)
    found |= {f"{method} streamed": streamed.scores(method) for method in streamed.methods}
    options = dict(token_budget=200, **quiet)
    atlas = build_atlas(lm, train[:2], train, 1, curvature=fitted, folder=folder / "atlas", **options)
    index = build_index(lm, train, folder=folder / "index", rank=4, sample=8, **options)
    found |= {"atlas": np.array(atlas.rows), "index": np.array(index.rows)}
    sae = SparseAutoencoder(TinySAE(), 1, "tiny")
    features = read_features(lm, sae, train, folder / "features", token_budget=200, **quiet)
    found |= {"features": features.max.toarray(), "places": features.token.toarray()}
    answered = cached_generate(
        lm, train[:70], max_new_tokens=4, batch_size=4, folder=folder / "answers", **quiet
    )
    return found | {"answers": np.array([c.text for c in answered])}


def same(one, other):
    assert one.keys() == other.keys() and len(one) > 8
    for name in one:
        assert np.array_equal(one[name], other[name]), name


def test_two_and_three_processes_one_of_them_killed_give_what_one_gives(tmp_path, monkeypatch):
    alone = everything(tmp_path / "1")
    for n, blocks in ((2, (9,)), (3, ())):
        monkeypatch.setenv("CONCEPT_TDA_CACHE", str(tmp_path / f"cache {n}"))
        (tmp_path / str(n)).mkdir()
        found = in_processes(everything, tmp_path / str(n), blocks, num_processes=n)
        same(alone, found)
        assert len(list((tmp_path / str(n)).glob("killed at *"))) == len(blocks)


def test_an_error_of_one_process_is_raised_here_and_not_tried_again(tmp_path):
    with pytest.raises(ModelError, match="no such model"):
        in_processes(fails_in_second, tmp_path, num_processes=2)
    assert len(list(tmp_path.glob("began *"))) <= 2


def fails_in_second(folder):
    (Path(folder) / f"began {os.getpid()}").touch()
    if rank() == 1:
        raise ModelError("no such model")
    wait_for_all()


def test_what_cannot_be_sent_is_refused():
    with pytest.raises(ProcessError, match="cannot be sent to another process"):
        in_processes(by_first, lambda: 1)
    with pytest.raises(ProcessError, match="at least 1"):
        in_processes(by_first, num_processes=0)


def test_shares_are_everything_once_and_damage_is_found(tmp_path, monkeypatch):
    store = BlockStore(tmp_path, {"job": 1})
    names = [f"{i:03d}" for i in range(11)]
    for name in names[:4]:
        store.write(name, {"x": np.arange(3)})
    path = next(store.folder.glob("002.*.block"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    done, mine = own_share(store, names)
    assert done == {"000", "001", "003"} and mine == ["002", *names[4:]]
    monkeypatch.setattr("concept_tda.foundation.processes.n_ranks", lambda: 3)
    monkeypatch.setattr("concept_tda.foundation.processes.by_first", lambda make: make())
    shares = []
    for number in range(3):
        monkeypatch.setattr("concept_tda.foundation.processes.rank", lambda: number)
        shares.append(own_share(store, names)[1])
    assert sorted(sum(shares, [])) == mine
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_on_its_own_a_process_is_the_only_one(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (rank(), n_ranks()) == (2, 4)
    with pytest.raises(ProcessError, match="one of 4 processes already"):
        in_processes(sum, [1])
    with on_its_own():
        assert (rank(), n_ranks()) == (0, 1)
        assert by_first(lambda: 5) == 5
