"""What `benchmarks/truth.py` says of scores: each figure against a second way to get it."""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from concept_tda.data.conversations import load_conversations
from concept_tda.evidence.datamodels import related
from concept_tda.influence.queries import LossQuery
from concept_tda.influence.scorers import Influence
from concept_tda.model.loading import load_model
from concept_tda.model.sites import resolve_sites
from concept_tda.results.attribution import Attribution
from concept_tda.results.cards import QueryCard

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import truth

N = 40
CHATS = load_conversations([{"prompt": f"q {i}", "response": f"a {i}"} for i in range(N)])


def result(scores, **more):
    card = QueryCard("m", "kindness", **dict(zero="gradient") | more)
    return Attribution(CHATS, scores, card)


def pool_of(rows, measured):
    return pd.DataFrame(
        dict(rows=rows, n=[len(one) for one in rows], seeds=1, measured=measured, spread=np.nan)
    )


def drawn_sets(random, n=60):
    return [np.sort(random.permutation(N)[:10]) for _ in range(n)]


def test_sets_that_are_nearly_one_another_or_the_rest_of_one_another_are_one_group():
    random = np.random.default_rng(0)
    half = random.permutation(N)[:20]
    other, third = random.permutation(N)[:20], random.permutation(N)[:20]
    rows = [half, np.setdiff1d(np.arange(N), half), np.append(half[:18], other[:2]), other, third]
    assert abs(np.corrcoef(*(np.isin(np.arange(N), one) for one in (other, third)))[0, 1]) < 0.5
    groups = related(rows, N)
    assert groups[0] == groups[1] == groups[2]
    assert len({groups[0], groups[3], groups[4]}) == 3


def test_the_ceiling_is_what_the_true_effects_would_reach():
    random = np.random.default_rng(0)
    true = random.normal(size=100_000)
    measured = true + 0.7 * random.normal(size=len(true))
    assert truth.ceiling(measured, 0.49) == pytest.approx(np.corrcoef(true, measured)[0, 1], abs=0.005)
    assert truth.ceiling(measured[:10], 1e3) == 0  # all of it could be noise


def test_foretold_by_others_is_the_textbook_press_where_every_set_is_alone():
    random = np.random.default_rng(0)
    x = random.normal(size=15)
    y = 2 * x + random.normal(size=15)
    design = np.stack([np.ones(15), x], 1)
    hat = design @ np.linalg.inv(design.T @ design) @ design.T
    press = (((y - hat @ y) / (1 - np.diag(hat))) ** 2).sum()
    _, outside = truth.foretold_by_others(x, y, np.arange(15))
    assert outside == pytest.approx(1 - press / ((y - y.mean()) ** 2).sum(), rel=1e-12)


def test_what_only_repeats_itself_is_not_foretold():
    """Ten groups of six sets, measured alike within a group by something that the scores don't know."""
    alone, grouped = [], []
    for seed in range(60):
        random = np.random.default_rng(seed)
        groups = np.repeat(np.arange(10), 6)
        x = random.normal(size=10)[groups] + 0.1 * random.normal(size=60)
        y = random.normal(size=10)[groups] + 0.1 * random.normal(size=60)
        alone.append(truth.foretold_by_others(x, y, np.arange(60)))
        grouped.append(truth.foretold_by_others(x, y, groups))
    alone, grouped = np.mean(alone, 0), np.mean(grouped, 0)
    assert alone[1] > 0.02 > 0 > grouped[1]  # of R², where there is nothing to foretell
    assert grouped[0] < alone[0]


def test_weighted_correlations_are_those_of_repeated_rows():
    random = np.random.default_rng(0)
    x_MS, y_S, w_DS = random.normal(size=(3, 9)), random.normal(size=9), random.integers(1, 4, size=(5, 9))
    found = truth.weighted_correlations(x_MS, y_S, w_DS.astype(float))
    for d, weights in enumerate(w_DS):
        for m, row in enumerate(x_MS):
            expected = np.corrcoef(np.repeat(row, weights), np.repeat(y_S, weights))[0, 1]
            assert found[d, m] == pytest.approx(expected, rel=1e-10)


def test_a_variant_is_ahead_where_it_is_better_and_level_where_it_is_not():
    random = np.random.default_rng(0)
    measured = random.normal(size=80)
    noisy = lambda size: measured + size * random.normal(size=80)
    sums = dict(default=noisy(1.5), better=noisy(0.3), turned=-noisy(0.3), scaled=None)
    sums["scaled"] = 7 * sums["default"] - 3
    found = truth.against("default", sums, measured, np.arange(80), draws=500)
    assert found["better"]["r2"]["low"] > 0.2 and found["better"]["rank"]["low"] > 0.1
    assert found["turned"]["r2"]["high"] < 0 and found["turned"]["rank"]["high"] < 0
    for level in (found["default"], found["scaled"]):
        assert np.abs([level["r2"][end] for end in ("mean", "low", "high")]).max() < 1e-9


def test_two_equal_variants_are_told_apart_as_seldom_as_the_interval_says():
    told = 0
    for seed in range(150):
        random = np.random.default_rng(seed)
        measured = random.normal(size=60)
        sums = {name: measured + random.normal(size=60) for name in "ab"}
        ahead = truth.against("a", sums, measured, np.arange(60), draws=300)["b"]["r2"]
        told += not ahead["low"] < 0 < ahead["high"]
    assert told / 150 < 0.1


def test_only_scores_in_the_judges_unit_are_held_against_it_without_a_line():
    random = np.random.default_rng(0)
    scores, rows = random.normal(size=N), drawn_sets(random)
    pool = pool_of(rows, [-scores[one].sum() for one in rows])
    say = lambda scores, unit: truth.verdict(
        result(scores, effect=-1.0, unit=unit), scores > 0, pool, [], np.arange(60), "nats"
    )
    exact, half = say(scores, "nats"), say(scores / 2, "nats")
    assert exact["r2_uncalibrated"] == pytest.approx(1) and exact["slope"] == pytest.approx(1)
    assert half["r2"] == pytest.approx(1) and half["slope"] == pytest.approx(2)
    error = np.array(pool["measured"]) / 2
    expected = 1 - (error**2).sum() / ((pool["measured"] - pool["measured"].mean()) ** 2).sum()
    assert half["r2_uncalibrated"] == pytest.approx(expected)
    assert "r2_uncalibrated" not in say(scores, "activation")


def test_a_group_keeps_what_is_there_and_goes_on_with_the_rest(tmp_path, capsys):
    scores = truth.Scores(truth.SETS[0], tmp_path, tmp_path)
    asked = []

    def computed(done):
        for name in "abc":
            if name not in done:
                asked.append(name)
                if name == "b" and asked.count("b") == 1:
                    raise KeyboardInterrupt  # killed
                yield {name: result(np.arange(N) + ord(name))}, {}

    with pytest.raises(KeyboardInterrupt):
        scores.kept("try", computed)
    assert list(json.loads(scores.file("try").read_text())["group"]) == ["a"]
    found = scores.kept("try", computed)
    assert asked == ["a", "b", "b", "c"] and list(found["group"]) == ["a", "b", "c"] and found["finished"]
    again = truth.as_result(CHATS, **found["group"]["c"])
    np.testing.assert_array_equal(again.scores, np.arange(N) + ord("c"))
    scores.kept("try", computed)
    assert asked == ["a", "b", "b", "c"]


def test_the_mean_of_the_seeds_is_their_mean_and_has_an_interval():
    random = np.random.default_rng(0)
    kept = {
        f"Training Influence, seed {seed}": result(random.normal(size=N), effect=-1.0, unit="nats")
        for seed in range(3)
    }
    each = [one.scores for one in kept.values()]
    truth.with_means(kept)
    mean = kept["Training Influence, 3 seeds"]
    np.testing.assert_allclose(mean.scores, np.mean(each, 0))
    assert mean.predict(drop=[0, 1]).low < mean.predict(drop=[0, 1]).high


def test_a_query_asked_once_gives_every_scorer_the_same_gradients(tiny_lm):
    lm, asked = load_model(tiny_lm), []
    query, sites = LossQuery(CHATS[:3]), resolve_sites(lm, "attention")
    computed = query.gradients
    query.gradients = lambda *args: asked.append(args) or computed(*args)
    kept = truth.once(query)
    scores = [
        Influence(lm, kept, curvature="identity", method=name).score(CHATS, progress=False).scores
        for name in "ab"
    ]
    np.testing.assert_array_equal(*scores)
    assert len(asked) == 1
    first, second = (kept.gradients(lm, sites, 512) for _ in range(2))
    assert len(asked) == 2 and all(torch.equal(first[name], second[name]) for name in first)
    assert first[sites[0].name].data_ptr() != second[sites[0].name].data_ptr()


def test_beyond_the_number_left_out_only_the_examples_count():
    random = np.random.default_rng(0)
    rows = [random.permutation(N)[: random.integers(4, 30)] for _ in range(50)]
    left, scores = np.array([len(one) for one in rows]), random.normal(size=N)
    sums = np.array([scores[one].sum() for one in rows])
    measured = sums + 3 * left + random.normal(size=50)
    design = np.column_stack([np.ones(50), left, sums])
    rest = lambda columns: ((measured - columns @ np.linalg.lstsq(columns, measured)[0]) ** 2).sum()
    expected = 1 - rest(design) / rest(design[:, :2])  # the textbook's partial R²
    assert truth.partial_r2(sums, measured, left) == pytest.approx(expected, rel=1e-9)
    assert truth.partial_r2(sums + 7 * left, measured, left) == pytest.approx(expected, rel=1e-9)
    assert truth.partial_r2(2.0 * left, measured, left) == 0
