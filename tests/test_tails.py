"""Shares and overlaps against counts by hand, formulas and simulated chance."""

import numpy as np
import pytest
import torch
from scipy.stats import hypergeom, spearmanr

from concept_tda.data.documents import token_windows
from concept_tda.mechanisms.circuits import CircuitError
from concept_tda.mechanisms.tails import plot_shared, plot_tail, shared_tops, tail_curve, top_share
from concept_tda.results.attribution import Attribution
from concept_tda.results.cards import QueryCard

WINDOWS = token_windows(torch.arange(400).reshape(100, 4))


def result(values, windows=WINDOWS):
    return Attribution(windows, np.asarray(values, float), QueryCard("by hand", "nothing", zero="none"))


def test_shares_are_sums_over_the_top_of_their_own_side():
    scores = np.random.default_rng(0).normal(0.3, 1, 500)
    high, low, size = np.sort(scores)[::-1], np.sort(scores), np.sort(np.abs(scores))[::-1]
    for fraction in (0.01, 0.1, 0.3):
        n = round(fraction * 500)
        assert top_share(scores, fraction) == pytest.approx(high[:n].sum() / scores[scores > 0].sum())
        assert top_share(scores, fraction, "lowering") == pytest.approx(
            low[:n].sum() / scores[scores < 0].sum()
        )
        assert top_share(scores, fraction, "either") == pytest.approx(size[:n].sum() / np.abs(scores).sum())
    assert top_share(scores, 1.0) == top_share(-scores, 1.0, "lowering") == 1
    assert top_share(scores, 0.9) == 1, "nobody else is above zero"


def test_sign_and_scale():
    scores = np.random.default_rng(1).standard_t(3, 300)
    curve, turned, scaled = tail_curve(scores), tail_curve(-scores), tail_curve(7 * scores)
    np.testing.assert_allclose(curve["raising"], turned["lowering"])
    np.testing.assert_allclose(curve["lowering, normal"], turned["raising, normal"])
    np.testing.assert_allclose(curve.to_numpy(), scaled.to_numpy())
    shares = curve.drop(columns="fraction")
    assert (shares.diff().dropna() >= -1e-12).all(axis=None) and (shares.iloc[-1] == 1).all()
    assert (shares.ge(curve.fraction - 1e-9, axis=0)).all(axis=None), "a top never holds less than its share"


def test_normal_line_is_that_of_normal_numbers():
    drawn = np.random.default_rng(2).normal(0.5, 2, 200_000)
    line = tail_curve(drawn, (0.05, 0.1, 0.5))
    for side in ("raising", "lowering", "either"):
        np.testing.assert_allclose(line[side], line[f"{side}, normal"], atol=0.01)


def test_one_sided_scores_have_no_curve_of_the_other_side():
    curve = tail_curve(np.arange(1, 11))
    assert "lowering" not in curve and curve.raising[0] == pytest.approx(10 / 55)
    assert len(plot_tail(np.arange(1, 11)).axes[0].lines) == 3  # even, raising, and its bell curve
    rare = tail_curve(np.r_[np.full(99, -1.0), 0.1])
    assert rare.raising[0] == 1 and "raising, normal" not in rare


def test_tops_in_common_by_hand_and_by_chance():
    base = np.arange(100.0)
    moved = np.roll(base, 5)  # 5 of the top ten leave it
    pairs = shared_tops({"a": result(base), "b": result(moved), "c": result(-base)})
    ab, ac = pairs.iloc[0], pairs.iloc[1]
    tops = [set(np.argsort(-values)[:10]) for values in (base, moved)]
    assert ab.shared == len(tops[0] & tops[1]) and ab["Jaccard"] == len(tops[0] & tops[1]) / len(
        tops[0] | tops[1]
    )
    assert ac.shared == 0 and ac["Spearman"] == -1
    assert ab["by chance"] == 1 and ab["Jaccard by chance"] == pytest.approx(1 / 19)
    chance = hypergeom(100, 10, 10)
    assert ab.z == pytest.approx((ab.shared - chance.mean()) / chance.std())
    assert ab["Spearman"] == pytest.approx(spearmanr(base, moved)[0])
    low = shared_tops({"a": result(base), "c": result(-base)}, lowest=True)
    assert low.shared[0] == 0
    same = shared_tops({"a": result(base), "b": result(base**3)}, lowest=True)
    assert same.shared[0] == 10 and same["Jaccard"][0] == 1


def test_matrix_has_each_pair_twice():
    random = np.random.default_rng(0)
    pairs = shared_tops({name: result(random.normal(size=100)) for name in "abc"})
    shown = plot_shared(pairs).axes[0].images[0].get_array()
    assert shown.shape == (3, 3) and shown[0, 2] == shown[2, 0] == pairs["Jaccard"][1]
    assert np.ma.getmaskarray(np.ma.masked_invalid(shown)).diagonal().all()


def test_errors_say_what_to_do():
    base, two = result(np.arange(100.0)), np.random.default_rng(0).normal(size=(100, 2))
    other = result(np.arange(50.0), token_windows(torch.arange(200).reshape(50, 4)))
    double = Attribution(WINDOWS, two, QueryCard("two", "nothing", zero="none"), queries=["p", "q"])
    cases = [
        (lambda: top_share(double), "one finite number for each"),
        (lambda: top_share([1.0, np.nan]), "finite"),
        (lambda: top_share([-1.0, -2.0]), "no example has influence that is raising"),
        (lambda: top_share([1.0], side="top"), "there are 'raising'"),
        (lambda: top_share([1.0, 2.0], 1.5), "is 3"),
        (lambda: shared_tops({"a": base}), "two or more"),
        (lambda: shared_tops({"a": base, "b": other}), "'b' ranks other examples than 'a'"),
        (lambda: shared_tops({"a": base, "b": double}), "'b' has 2 queries"),
        (lambda: shared_tops({"a": base, "b": base}, 1.0), "takes some and leaves some"),
    ]
    for act, message in cases:
        with pytest.raises(CircuitError, match=message):
            act()
