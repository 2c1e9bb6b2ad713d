"""kill -9 at random moments: fitting, scoring, indexing, harvesting activations and training a crosscoder
continue and end with the numbers of an uninterrupted run."""

import multiprocessing
import os
import random
import time
from pathlib import Path

import numpy as np
import pytest

from tiny import tiny_pair

KILLS = 7  # of each kind, 28 in all


def _setting():
    import torch

    from concept_tda.data.conversations import load_conversations
    from concept_tda.model.loading import load_model

    torch.set_num_threads(1)
    lm = load_model(tiny_pair("llama", n_layers=4, width=32))
    train = load_conversations(
        [
            {"prompt": f"What is {i} and {i + 1}?", "response": "It is " + "so " * (i % 7) + f"{2 * i}."}
            for i in range(150)
        ]
    )
    return lm, train


def _fit(out):
    import concept_tda.influence.curvature as curvature

    lm, train = _setting()
    keep = curvature._Progress.__init__
    curvature._Progress.__init__ = lambda self, store: keep(self, store, every=0.05)
    fitted = curvature.EKFAC.fit(lm, train, progress=False, memory_budget=2**20, cache=False)
    np.savez(
        out,
        **{
            f"{site}|{name}": getattr(f, name)
            for site, f in fitted.factors.items()
            for name in ("Q_in", "Q_out", "eigenvalues")
        },
    )


def _score(out):
    from concept_tda.influence.baselines import MeanLoss
    from concept_tda.influence.scorers import GradDot, score_together

    lm, train = _setting()
    results = score_together(
        [GradDot(lm, train[:2]), MeanLoss(lm)], train, token_budget=60, tokens=True, progress=False
    )
    np.savez(
        out,
        *[r.scores for r in results.values()],
        *[np.concatenate(r.token_scores) for r in results.values()],
    )


def _index(out):
    from concept_tda.influence.atlas import build_index

    lm, train = _setting()
    index = build_index(
        lm, train, folder=Path(out).with_suffix(""), rank=4, sample=8, token_budget=60, progress=False
    )
    np.savez(out, rows=np.array(index.rows))


def _crosscoder(out):
    from concept_tda.concepts.crosscoders import (
        TENSORS,
        CrosscoderRecipe,
        paired_activations,
        train_crosscoder,
    )
    from concept_tda.model.loading import load_model

    lm, train = _setting()
    models = {"base": lm, "tuned": load_model(tiny_pair("llama", n_layers=4, width=32, seed=1))}
    folder = Path(out).with_suffix("")
    pairs = paired_activations(models, train, 2, folder / "pairs", block_tokens=300, progress=False)
    recipe = CrosscoderRecipe(latents=128, k=4, tokens=60_000, batch=200)
    found = train_crosscoder(pairs, recipe, folder=folder / "run", checkpoint_every=0.01, progress=False)
    assert not (folder / "run" / "checkpoint.pt").exists()
    np.savez(out, threshold=found.threshold, **{name: getattr(found, name).numpy() for name in TENSORS})


def _start(job, out, cache):
    os.environ["CONCEPT_TDA_CACHE"] = str(cache)
    globals()[job](str(out))


def _children():
    """A server that has imported everything and run nothing: its forks start at once, and autograd works in
    them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "tiny",
            "concept_tda.influence.atlas",
            "concept_tda.influence.baselines",
            "concept_tda.concepts.crosscoders",
            "transformers.models.llama.modeling_llama",
            "peft",
        ]
    )
    return context


@pytest.mark.parametrize("job", ["_fit", "_score", "_index", "_crosscoder"])
def test_a_killed_job_ends_with_the_same_numbers(job, tmp_path):
    children = _children()

    def run(out, cache, limit=None):
        child = children.Process(target=_start, args=(job, out, cache))
        start = time.monotonic()
        child.start()
        child.join(limit)
        killed = child.is_alive()
        if killed:
            child.kill()
        child.join()
        assert killed or child.exitcode == 0
        return killed, time.monotonic() - start

    run(tmp_path / "warm.npz", tmp_path / "warm")
    _, seconds = run(tmp_path / "whole.npz", tmp_path / "whole")
    whole, moments, kills = np.load(tmp_path / "whole.npz"), random.Random(0), 0
    for kill in range(KILLS):
        out, cache = tmp_path / f"killed-{kill}.npz", tmp_path / f"cache-{kill}"
        kills += run(out, cache, limit=seconds * moments.uniform(0.2, 0.9))[0]
        run(out, cache)
        ended = np.load(out)
        assert set(whole) == set(ended)
        for name in whole:
            np.testing.assert_array_equal(whole[name], ended[name])
        left = [path for folder in (cache, out.with_suffix("")) for path in folder.rglob("*.part*")]
        assert not left, "half-written files stayed behind"
    assert kills >= KILLS // 2
