"""Groups of examples: what is in them, what influence does in them, and what chance would do."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from scipy.stats import kstest

from concept_tda.data.conversations import load_conversations
from concept_tda.groups.groups import (
    GroupError,
    Groups,
    cluster_groups,
    column_groups,
    compare_groups,
    coverage_curve,
    drop_groups,
    family_groups,
    random_groups,
    score_groups,
    union_rows,
)
from concept_tda.groups.maps import map_places, training_map
from concept_tda.results.attribution import Attribution
from concept_tda.results.cards import QueryCard


def conversations(n=12, **columns):
    records = [{"prompt": f"question {i}", "response": f"answer {i}"} for i in range(n)]
    for name, values in columns.items():
        for record, value in zip(records, values):
            if value is not None:
                record[name] = value
    return load_conversations(records)


def attribution(data, scores, zero="gradient"):
    return Attribution(data, scores, QueryCard(method="any", behaviour="any", zero=zero))


def by_hand(data, sets):
    rows = [(row, column) for column, members in enumerate(sets.values()) for row in members]
    places = tuple(zip(*rows))
    members = csr_matrix((np.ones(len(rows), bool), places), (len(data), len(sets)))
    return Groups(data, list(sets), members, "hand")


def test_sums_are_the_sums_of_the_members():
    random = np.random.default_rng(0)
    data = conversations(40)
    scores = random.normal(size=40)
    sets = {f"g{i}": np.sort(random.choice(40, random.integers(1, 20), replace=False)) for i in range(15)}
    table = score_groups(by_hand(data, sets), attribution(data, scores), deals=50).table.set_index("group")
    positive = np.maximum(scores, 0)
    seen = set()
    assert table["sum"].is_monotonic_decreasing
    for name, row in table.iterrows():
        members = sets[name]
        assert row["examples"] == len(members)
        np.testing.assert_allclose(row["sum"], scores[members].sum())
        np.testing.assert_allclose(row["mean"], scores[members].mean())
        np.testing.assert_allclose(row["share"], positive[members].sum() / positive.sum())
        fresh = [i for i in members if i not in seen]
        assert row["new"] == len(fresh)
        np.testing.assert_allclose(row["new_sum"], scores[fresh].sum(), atol=1e-12)
        seen |= set(members.tolist())


def test_z_has_the_exact_moments_of_a_random_group():
    data, scores = conversations(9), np.array([5.0, -1, 2, 0, 0, 7, -3, 1, 4])
    from itertools import combinations

    sums = np.array([scores[list(rows)].sum() for rows in combinations(range(9), 4)])
    rows = [1, 5, 6, 8]
    z = score_groups(by_hand(data, {"g": rows}), attribution(data, scores), deals=1).table["z"][0]
    np.testing.assert_allclose(z, (scores[rows].sum() - sums.mean()) / sums.std())


def test_p_is_uniform_on_random_groups_and_small_on_a_planted_one():
    random = np.random.default_rng(1)
    data, scores = conversations(60), random.standard_cauchy(60)
    sets = {f"g{i}": random.choice(60, 12, replace=False) for i in range(200)}
    table = score_groups(by_hand(data, sets), attribution(data, scores), deals=999).table
    assert kstest(table["p"], "uniform").pvalue > 0.01
    assert (table["p_adjusted"] >= table["p"]).all() and (table["p_adjusted"] < 0.05).sum() <= 2
    top = np.argsort(-scores)[:8]
    planted = score_groups(by_hand(data, {"top": top} | sets), attribution(data, scores), deals=5000).table
    assert planted["group"][0] == "top" and planted["p"][0] < 0.001


def test_p_does_not_depend_on_the_other_groups_or_on_units():
    random = np.random.default_rng(2)
    data, scores = conversations(30), random.normal(size=30)
    sets = {f"g{i}": random.choice(30, 5 + i, replace=False) for i in range(5)}
    together = score_groups(by_hand(data, sets), attribution(data, scores), deals=300).table.set_index(
        "group"
    )
    alone = score_groups(by_hand(data, {"g3": sets["g3"]}), attribution(data, 1000 * scores), deals=300).table
    assert alone["p"][0] == together.loc["g3", "p"]
    np.testing.assert_allclose(alone["z"][0], together.loc["g3", "z"])


def test_scores_without_a_zero_are_standardised_and_the_table_says_so():
    data, scores = conversations(10), np.arange(10.0) + 100
    groups = by_hand(data, {"low": [0, 1, 2, 3, 4], "high": [8, 9]})
    for zero, standardised in (("gradient", False), ("projection", True), ("none", True)):
        found = score_groups(groups, attribution(data, scores, zero), deals=10)
        assert found.standardised == standardised and ("standardised" in repr(found)) == standardised
        assert found.table["group"][0] == ("high" if standardised else "low")
    forced = score_groups(groups, attribution(data, scores, "projection"), standardise=False, deals=10)
    assert forced.table["sum"][0] == scores[:5].sum()


def test_sums_are_taken_apart_by_label():
    data = conversations(8, kind=["a", "b"] * 4)
    scores = np.arange(8.0) + 1
    table = score_groups(
        by_hand(data, {"g": [0, 1, 2]}), attribution(data, scores), labels="kind", deals=10
    ).table
    assert table["sum of a"][0] == 1 + 3 and table["sum of b"][0] == 2


def test_the_union_rule_on_a_case_made_by_hand():
    data, scores = conversations(12), np.array([9.0, 8, 7, 6, 5, -9, -1, 0, 0, 0, 0, 0])
    groups = by_hand(data, {"first": [0, 1, 5], "second": [1, 2], "third": [3], "worst": [5, 6]})
    found = score_groups(groups, attribution(data, scores), deals=10)
    assert list(found.table["group"]) == ["second", "first", "third", "worst"]  # sums 15, 8, 6, -10
    for count, rows, taken in ((1, [1, 2], 1), (2, [1, 2], 1), (3, [0, 1, 2, 5], 2), (5, [0, 1, 2, 3, 5], 3)):
        found_rows, found_taken = union_rows(found, count=count)
        assert found_rows.tolist() == rows and len(found_taken) == taken
    kept = drop_groups(found, count=3)
    assert (
        kept.ids == [data.ids[i] for i in range(12) if i not in (0, 1, 2, 5)]
        and "2 highest groups" in kept.name
    )
    by_mean, _ = union_rows(found, count=2, order="mean")  # means 7.5, 2.7, 6
    assert by_mean.tolist() == [1, 2]
    with pytest.raises(GroupError, match="hold 5 examples, 6 were to be dropped"):
        union_rows(found, count=6)
    curve = coverage_curve(found, np.isin(np.arange(12), [0, 1, 2, 3]))
    assert curve["examples"].tolist() == [2, 4, 5, 6]
    np.testing.assert_allclose(curve["coverage"], [0.5, 0.75, 1, 1])
    np.testing.assert_allclose(curve["precision"], [1, 0.75, 0.8, 4 / 6])


def test_columns_families_and_clusters():
    data = conversations(9, topic=["tea", "tea", "oak", None, "oak", "oak", "fern", "tea", "fern"])
    groups = column_groups(data, "topic")
    assert groups.names == ["fern", "oak", "tea"] and groups.rows("oak").tolist() == [2, 4, 5]
    one = load_conversations(
        [
            {
                "prompt": "The very same question again?",
                "response": f"The very same answer it is, number {i // 3}.",
            }
            for i in range(6)
        ]
        + [{"prompt": "Quite another thing", "response": "Not at all like it."}]
    )
    assert family_groups(one).sizes.tolist() == [6] or sorted(family_groups(one).sizes) == [3, 3]
    vectors = np.repeat([[0.0, 1], [5, 0], [-5, 0.1]], 3, axis=0) + 0.01 * np.random.default_rng(0).normal(
        size=(9, 2)
    )
    for found in (cluster_groups(data, vectors, 3), cluster_groups(data, vectors, min_size=2, cosine=False)):
        assert sorted(tuple(found.rows(name)) for name in found.names) == [(0, 1, 2), (3, 4, 5), (6, 7, 8)]
    again = cluster_groups(data, csr_matrix(np.maximum(vectors, 0)), 2)
    assert len(again) == 2
    matched = random_groups(groups, seed=3)
    assert matched.sizes.tolist() == groups.sizes.tolist()
    assert (random_groups(groups, seed=3).members != matched.members).nnz == 0


def test_methods_are_compared_in_the_same_units():
    data = conversations(10, kind=["a", "b"] * 5)
    scores = np.arange(10.0)
    table = compare_groups(
        column_groups(data, "kind"),
        {"one": attribution(data, scores), "large": attribution(data, 1e6 * scores + 5e6)},
        deals=20,
    )
    np.testing.assert_allclose(table["one", "mean"], table["large", "mean"])


def test_bad_input_is_named():
    data = conversations(6, topic=["a", "b", "a", "b", "a", "b"], same=["x"] * 6)
    groups, scores = column_groups(data, "topic"), attribution(conversations(6), range(6))
    other = attribution(conversations(7), range(7))
    vectors = np.arange(12.0).reshape(6, 2)
    broken = vectors.copy()
    broken[4, 1] = np.nan
    found = score_groups(groups, scores, deals=5)
    for call, words in (
        (lambda: column_groups(data, "topik"), "no metadata column 'topik'; there are 'topic', 'same'"),
        (lambda: column_groups(data, "same"), "no group is left.*1 holds every example"),
        (lambda: groups.rows("c"), "no group 'c'"),
        (lambda: score_groups(groups, other), "these are other examples"),
        (lambda: score_groups(groups, scores.top(3)), "other examples|another order"),
        (lambda: score_groups(groups, scores.top(6)), "another order"),
        (lambda: score_groups(groups, scores, labels="none"), "labels='none'"),
        (lambda: score_groups(groups, scores, deals=0), "deals must be a whole number ≥ 1"),
        (lambda: cluster_groups(data, vectors, 7), "n=7 clusters of 6 examples"),
        (lambda: cluster_groups(data, vectors[:5], 2), "6 examples need a row each"),
        (lambda: cluster_groups(data, broken, 2), f"row 4, id {data.ids[4]}"),
        (lambda: cluster_groups(data, vectors, min_size=9), "choose 2 to 6"),
        (lambda: family_groups(data), "lower similarity="),
        (lambda: union_rows(found, count=2, order="size"), "order='size'"),
        (lambda: coverage_curve(found, np.zeros(6, bool)), "at least one of them True"),
        (lambda: compare_groups(groups, {}), "nothing to compare"),
        (lambda: Groups(data, ["a"], csr_matrix((6, 1), dtype=bool), "hand"), "has no examples"),
        (lambda: Groups(data, ["a"], csr_matrix((5, 1), dtype=bool), "hand"), "members have shape"),
        (
            lambda: by_hand(data, {"a": [0]}).__class__(
                data, ["a", "a"], csr_matrix(np.eye(6, 2) > 0), "hand"
            ),
            "two groups are called 'a'",
        ),
    ):
        with pytest.raises(GroupError, match=words):
            call()


def test_bars_are_the_table_and_its_parts():
    data = conversations(8, kind=["a", "b"] * 4)
    scores = np.array([3.0, -1, 2, 0, 1, -4, 0, 5])
    groups = by_hand(data, {"cost in $": [0, 1, 2], "$x$": [5, 6], "third": [3, 4], "fourth": [1, 7]})
    found = score_groups(groups, attribution(data, scores), labels="kind", deals=10)
    assert list(found.ordered("mean")["group"]) == ["fourth", "cost in $", "third", "$x$"]
    for by in ("sum", "mean"):
        table = found.ordered(by)
        parts = found.parts(table, by)
        assert list(parts.columns) == ["a", "b"]
        np.testing.assert_allclose(parts.sum(axis=1), table[by])
    assert list(found.parts(found.table, "z").columns) == ["z"]
    ax = found.plot(n=1).axes[0]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == [r"cost in \$  (3)", r"\$x\$  (2)"]
    assert "2 more" in [text.get_text() for text in ax.texts]
    widths = sorted(bar.get_width() for bar in ax.patches)
    np.testing.assert_allclose(widths, sorted([5, -1, 0, -4]))
    found.plot(n=1).savefig("/dev/null", format="png")  # no formula is read into a name
    assert len(found.plot("share").axes[0].get_yticks()) == 4
    for call, words in (
        (lambda: found.plot("size"), "by='size': groups are put in order by 'sum'"),
        (lambda: found.plot(n=0), "n=0: draw at least 1"),
    ):
        with pytest.raises(GroupError, match=words):
            call()


def test_a_map_keeps_the_two_widest_directions_and_every_point():
    random = np.random.default_rng(5)
    vectors = random.normal(size=(12, 4)) * [9.0, 0.1, 3, 0.1]
    places, carried = map_places(vectors)
    centred = vectors - vectors.mean(0)
    left, lengths, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs(places), np.abs(left * lengths)[:, :2])
    total = (centred**2).sum()
    np.testing.assert_allclose(carried, (places**2).sum(0) / total)
    np.testing.assert_allclose(map_places(csr_matrix(vectors))[0], places, atol=1e-9)
    data = conversations(12)
    figure = training_map(vectors, attribution(data, np.arange(12.0)))
    np.testing.assert_allclose(np.sort(figure.axes[0].collections[0].get_offsets(), 0), np.sort(places, 0))
    groups = by_hand(data, {"a": [0, 1, 2, 3], "b": [3, 4], "c": [9]})
    drawn = training_map(vectors, groups, most=2).axes[0].collections
    assert [len(points.get_offsets()) for points in drawn] == [7, 4, 1]  # 3 is in both and drawn once
    for wrong, words in (
        (lambda: training_map(vectors[:11], groups), "11 rows, the colours are of 12"),
        (lambda: training_map(vectors, groups, most=9), "most=9: from 1 to 8"),
        (lambda: map_places(np.ones((5, 3))), "all vectors are the same"),
        (lambda: map_places(np.ones((5, 1))), r"shape \[5, 1\]"),
        (lambda: map_places(np.diag([1, np.inf, 1])), "first is row 1"),
    ):
        with pytest.raises(GroupError, match=words):
            wrong()
