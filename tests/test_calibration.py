"""Intervals that hold as often as they say, and predictions that come from retrainings."""

import numpy as np
import pytest
from scipy import stats

from concept_tda.data.conversations import load_conversations
from concept_tda.groups.reading import ReadingError, words_of_ends
from concept_tda.results.attribution import Attribution, load_attribution
from concept_tda.results.calibration import Calibration, combined, ensemble, foretold
from concept_tda.results.cards import Cost, QueryCard
from concept_tda.results.metrics import AttributionError, moderated_variances


def chats(n):
    return load_conversations([{"prompt": f"q {i}", "response": f"a {i}"} for i in range(n)])


def card(**more):
    return QueryCard(
        more.pop("method", "m"), "kindness", **dict(zero="gradient", effect=-1.0, unit="nats") | more
    )


def covered(n_trials, once):
    random = np.random.default_rng(0)
    return np.mean([once(random) for _ in range(n_trials)])


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_a_calibrated_interval_holds_the_next_retraining_as_often_as_it_says(level, counted):
    def once(random):
        x, sizes = random.normal(size=10), random.integers(3, 30, size=10)
        y = 0.3 - 2 * x + counted * 0.1 * sizes + random.normal(size=10) * 0.5
        new, size = random.normal(), random.integers(3, 30)
        line = Calibration.fit(x, y, sizes if counted else None)
        _, low, high = line.interval(new, size if counted else None, level=level)
        return low < 0.3 - 2 * new + counted * 0.1 * size + random.normal() * 0.5 < high

    assert abs(covered(5000, once) - level) < 0.02


@pytest.mark.parametrize("told", [True, False])
def test_variations_of_a_set_make_an_interval_no_narrower(told):
    family = np.repeat(np.arange(8), 5)

    def once(random):
        x, own = random.normal(size=8)[family], random.normal(size=8)[family]
        line = Calibration.fit(x, 1 - 2 * x + own, related=family if told else None)
        new = random.normal()
        _, low, high = line.interval(new, level=0.8)
        return low < 1 - 2 * new + random.normal() < high

    held = covered(3000, once)
    assert abs(held - 0.8) < 0.03 if told else held < 0.76


def test_a_set_given_five_times_counts_as_given_once():
    random = np.random.default_rng(0)
    x, y, sizes, family = (
        random.normal(size=8),
        random.normal(size=8),
        np.arange(2, 10),
        np.repeat(range(8), 5),
    )
    once = Calibration.fit(x, y, sizes)
    often = Calibration.fit(x[family], y[family], sizes[family], related=family)
    np.testing.assert_allclose(often.interval(0.3, 4), once.interval(0.3, 4), rtol=1e-9)


def test_where_no_sets_are_related_each_counts():
    random = np.random.default_rng(0)
    x, y, sizes = random.normal(size=9), random.normal(size=9), random.integers(2, 9, size=9)
    plain, alone = (Calibration.fit(x, y, sizes, related=one) for one in (None, np.arange(9)[::-1]))
    assert plain == alone and plain.independent == 9
    with pytest.raises(AttributionError, match="9 sets are variations of 3"):
        Calibration.fit(x, y, related=[0, 1, 2] * 3)
    with pytest.raises(AttributionError, match="related= takes a number or a name for each of the 9"):
        Calibration.fit(x, y, related=[0, 1, 2])
    named, numbered = (
        Calibration.fit(x, y, related=one) for one in (list("abcdabcde"), [0, 1, 2, 3] * 2 + [4])
    )
    assert named == numbered and named.independent == 5
    for what in ("foretold", "measured", "left_out="):
        given = {"foretold": x, "measured": y, "left_out=": sizes} | {what: ["many"] * 9}
        with pytest.raises(AttributionError, match=f"{what} takes numbers"):
            Calibration.fit(*given.values())


@pytest.mark.parametrize("wrong", [95, 1.0, 0, -0.5, float("nan")])
def test_a_level_that_is_none_is_refused_wherever_one_is_asked_for(wrong):
    random, data = np.random.default_rng(0), chats(40)
    scores = random.normal(size=(40, 3))
    plain = Attribution(data, scores.mean(1), card())
    runs = ensemble([Attribution(data, one, card()) for one in scores.T])
    line = Calibration.fit(random.normal(size=9), random.normal(size=9))
    asked = {
        "interval": lambda: line.interval(0.3, level=wrong),
        "calibrated": lambda: plain.predict(drop=0.25, calibration=line, level=wrong),
        "replicates": lambda: runs.predict(drop=0.25, level=wrong),
        "plain": lambda: plain.predict(drop=0.25, level=wrong),
        "scores": lambda: runs.intervals(level=wrong),
        "chance": lambda: plain.with_null(random.normal(size=(40, 20))).above_chance(false_share=wrong),
        "words": lambda: words_of_ends([one.text for one in data], scores[:, 0], level=wrong),
    }
    for call in asked.values():
        with pytest.raises((AttributionError, ReadingError), match="is not between 0 and 1"):
            call()


def test_a_prediction_is_of_some_examples_and_says_where_nothing_was_measured():
    random, data = np.random.default_rng(0), chats(40)
    scores = Attribution(data, random.normal(size=40), card())
    line = Calibration.fit(random.normal(size=9), random.normal(size=9), np.arange(4, 13), of=scores)
    for nothing in ([], np.zeros(40, bool), list(range(40)), data.ids):
        for more in ({}, {"calibration": line}):
            with pytest.raises(
                AttributionError, match="at least one is left out, and at least one is trained on"
            ):
                scores.predict(drop=nothing, **more)
    words = {n: str(scores.predict(drop=list(range(n)), calibration=line)) for n in (3, 4, 12, 13)}
    assert [n for n, said in words.items() if f"{n} examples are beyond these sizes" in said] == [3, 13]


def test_the_line_is_that_of_scipy():
    random = np.random.default_rng(0)
    x, y = random.normal(size=12), random.normal(size=12)
    line, ours = stats.linregress(x, y), Calibration.fit(x, y)
    np.testing.assert_allclose(
        [ours.slope, ours.intercept, ours.r2], [line.slope, line.intercept, line.rvalue**2], rtol=1e-12
    )


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_with_the_numbers_left_out_it_is_least_squares_in_any_unit_of_the_scores(scale):
    random = np.random.default_rng(0)
    x, y, sizes = random.normal(size=14) + 5, random.normal(size=14), random.integers(2, 40, size=14)
    ours = Calibration.fit(x * scale, y, sizes)
    z = np.column_stack([np.ones(14), x, sizes])
    found, (squares,), *_ = np.linalg.lstsq(z, y, rcond=None)
    np.testing.assert_allclose(
        [ours.intercept, ours.slope * scale, ours.per_example], found, rtol=1e-9, atol=1e-12
    )
    at = np.array([1, 4.2, 17])
    change, low, high = ours.interval(4.2 * scale, 17, level=0.9)
    wide = (squares / 11 * (1 + at @ np.linalg.inv(z.T @ z) @ at)) ** 0.5 * stats.t.ppf(0.95, 11)
    np.testing.assert_allclose([change, high - change, change - low], [at @ found, wide, wide], rtol=1e-8)
    assert ours.r2 == pytest.approx(1 - squares / ((y - y.mean()) ** 2).sum())
    assert ours.sizes == (sizes.min(), sizes.max())


def test_where_a_method_puts_its_zero_changes_no_prediction():
    random, data = np.random.default_rng(0), chats(40)
    scores = random.normal(size=40)
    sets = [random.permutation(40)[:size] for size in (4, 10, 20) for _ in range(4)]
    measured = [-scores[rows].sum() / 40 + random.normal() * 0.1 for rows in sets]
    sizes = [len(rows) for rows in sets]

    def said(offset):
        result = Attribution(data, scores + offset, card())
        line = Calibration.fit([foretold(result, rows) for rows in sets], measured, sizes, of=result)
        found = result.predict(drop=0.25, calibration=line)
        return found.change, found.low, found.high

    np.testing.assert_allclose(said(3.0), said(0.0), rtol=1e-9)
    np.testing.assert_allclose(said(-50.0), said(0.0), rtol=1e-7)


def test_numbers_left_out_count_only_where_they_can_be_told_from_the_rest():
    x, y = np.arange(8.0) ** 2, np.arange(8.0)
    assert Calibration.fit(x, y, [5] * 8).per_example is None
    assert Calibration.fit(x[:5], y[:5], [1, 2, 3, 4, 6]).per_example is None
    assert Calibration.fit([1.0, 2, 3, 4, 6, 7], y[:6], [1, 2, 3, 4, 6, 7]).per_example is None
    assert Calibration.fit([3.0, 5, 7, 9, 13, 15], y[:6], [1, 2, 3, 4, 6, 7]).per_example is None
    counted = Calibration.fit(x, y, [1, 2, 3, 4, 5, 6, 7, 9])
    assert counted.per_example is not None
    with pytest.raises(AttributionError, match="say left_out="):
        counted.interval(1.0)
    assert Calibration.fit(x, y).interval(1.0) == Calibration.fit(x, y, [5] * 8).interval(1.0, 99)
    for wrong in ([1, 2], [0] * 8, [1.5] * 8, [np.nan] * 8):
        with pytest.raises(AttributionError, match="left_out= takes a whole number from 1"):
            Calibration.fit(x, y, wrong)


def test_a_sum_over_replicates_has_their_interval_and_a_score_its_own():
    def once(random, rows=np.arange(5)):
        true = np.linspace(-1, 1, 30)
        shared = random.normal(size=6)  # the errors of two examples go together
        replicates = true[:, None] + shared * 0.5 + random.normal(size=(30, 6)) * 0.2
        result = Attribution(chats30, replicates.mean(1), card(), replicates=replicates)
        sums, (low, high) = result.predict(drop=rows), result.intervals()
        return sums.low < -true[rows].sum() < sums.high, low[3] < true[3] < high[3]

    chats30 = chats(30)
    both = np.mean([once(np.random.default_rng(trial)) for trial in range(500)], axis=0)
    assert (abs(both - 0.95) < 0.035).all(), both


@pytest.mark.parametrize("prior", [4, 30])
def test_moderated_variances_cover_and_find_the_prior(prior):
    random = np.random.default_rng(1)
    true = prior / random.chisquare(prior, 20_000)
    replicates = random.normal(size=(20_000, 4)) * true[:, None] ** 0.5
    variances, freedom = moderated_variances(replicates)
    inside = abs(replicates.mean(1)) < stats.t.ppf(0.95, freedom) * (variances / 4) ** 0.5
    assert abs(inside.mean() - 0.9) < 0.01 and abs(freedom - 3 - prior) < 0.35 * prior
    assert abs(variances - true).mean() < abs(replicates.var(1, ddof=1) - true).mean()


def test_what_is_above_chance_is_mostly_there_for_a_reason():
    random, real = np.random.default_rng(2), np.arange(200) < 40
    size = random.uniform(0.5, 5, 200)  # long examples score high in any direction
    null = random.normal(size=(200, 20)) * size[:, None]
    scores = random.normal(size=200) * size + real * 6 * size
    result = Attribution(chats(200), scores, card())
    found = result.with_null(null).above_chance()
    hits = real[found.rows].sum()
    assert hits > 35 and len(found) - hits <= 6
    assert (np.diff(found.scores) <= 0).all()
    with pytest.raises(AttributionError, match="with_null"):
        result.above_chance()
    nothing = Attribution(result.conversations, random.normal(size=200) * size, card())
    assert len(nothing.with_null(null).above_chance()) <= 3


def test_an_ensemble_is_the_mean_in_any_order_and_says_what_it_is(tmp_path):
    random, data = np.random.default_rng(3), chats(20)
    copies = [Attribution(data, random.normal(size=20), card()) for _ in range(3)]
    mean = ensemble([copies[0], copies[1].select(np.arange(20)[::-1]), copies[2]])
    np.testing.assert_allclose(mean.scores, np.mean([one.scores for one in copies], 0))
    assert load_attribution(mean.save(tmp_path / "m.parquet")) == mean
    assert (mean.top(4).replicates == mean.replicates[np.argsort(-mean.scores)[:4]]).all()
    other = Attribution(data, random.normal(size=20), card(effect=-2.0))
    with pytest.raises(AttributionError, match="different units"):
        ensemble([copies[0], other])
    with pytest.raises(AttributionError, match="of one method"):
        ensemble([copies[0], Attribution(data, other.scores, card(method="n"))])


def test_the_null_of_an_ensemble_is_a_bound_and_above_chance_counts_both_noises(tmp_path):
    random, data, true = np.random.default_rng(5), chats(80), np.where(np.arange(80) < 12, 6.0, 0.0)
    directions = random.normal(
        size=(80, 40)
    )  # what random directions share over the runs, and what they don't
    runs = []
    for scale in (1.0, 1.0, 1.0):
        scores = true + random.normal(size=80) * scale
        null = directions + random.normal(size=(80, 40)) * 0.3
        runs.append(Attribution(data, scores, card()).with_null(null, seed=0))
    mean = ensemble([runs[0], runs[1].select(np.arange(80)[::-1]), runs[2]])
    own = [np.sqrt((one.scores / one.times_null) ** 2) for one in runs]  # spreads of the nulls
    np.testing.assert_allclose(np.abs(mean.scores / mean.times_null), np.mean(own, 0), rtol=1e-9)
    found = set(mean.above_chance().rows)
    assert len(found & set(range(12))) >= 10 and len(found - set(range(12))) <= 1
    noisy = [
        Attribution(data, true + sign * 40.0, card()).with_null(directions) for sign in (-1, 0, 1)
    ]  # the same mean, by runs that contradict each other
    assert len(ensemble(noisy).above_chance()) == 0 < len(noisy[1].above_chance())
    assert load_attribution(mean.save(tmp_path / "m.parquet")).above_chance().ids == mean.above_chance().ids
    without = Attribution(data, true, card())
    assert ensemble([runs[0], without]).null is None
    halved = ensemble([runs[0], runs[0]], standardise=True)
    np.testing.assert_allclose(halved.times_null, runs[0].times_null, rtol=1e-9)


def test_predictions_say_what_they_rest_on():
    data, scores = chats(8), np.arange(8.0)
    result = Attribution(data, scores, card())
    assert "not calibrated" in str(result.predict(drop=[7])) and result.predict(drop=[7]).low is None
    line = Calibration.fit([0, 1, 2, 3], [0, -1, -2, -3.5], judge="judge", unit="points", of=result)
    said = result.predict(drop=[7, 6], calibration=line)
    assert said.change == pytest.approx(line.intercept - 13 * line.slope)
    assert "points" in str(said) and "4 retrained sets" in str(said) and said.low < said.change < said.high
    with pytest.raises(AttributionError, match="method m there, other here"):
        Attribution(data, scores, card(method="other")).predict(drop=[7], calibration=line)
    with pytest.raises(AttributionError, match="four retrainings"):
        Calibration.fit([1, 1, 1, 1], [1, 2, 3, 4])


def test_a_projection_foretells_from_its_mean():
    data = chats(4)
    projection = Attribution(data, [10.0, 11, 12, 13], card(zero="projection", effect=None, unit=None))
    assert foretold(projection, [0, 3]) == 0 and foretold(projection, [3]) == pytest.approx(-1.5 / 4)
    plain = Attribution(data, [10.0, 11, 12, 13], card(effect=None, unit=None))
    assert foretold(plain, [3]) == -13 / 4
    old = Attribution(data, [10.0, 11, 12, 13], card(zero="not recorded", effect=None, unit=None))
    assert foretold(old, [0, 3]) == 0


def test_the_number_that_leads_has_the_interval_of_its_score_in_its_own_unit():
    def once(random, rows=np.arange(40)):
        true = np.linspace(-1, 1, 40)
        replicates = true[:, None] + random.normal(size=(40, 5)) * random.uniform(0.2, 0.4, 40)[:, None]
        data_card = card(effect=-2.0, gap=4.0)
        leading = Attribution(chats40, replicates.mean(1), data_card, replicates=replicates).leading
        return (abs(leading.values - true * 100 * 2 / 4) < leading.halves).mean()

    chats40 = chats(40)
    assert abs(covered(300, once) - 0.95) < 0.015


def test_a_part_has_the_intervals_of_the_whole_and_a_null_changes_none(tmp_path):
    random = np.random.default_rng(5)
    noisy = random.normal(size=(30, 4)) * random.uniform(0.1, 3, 30)[:, None]
    whole = Attribution(chats(30), noisy.mean(1), card(effect=None, unit=None), replicates=noisy)
    order = np.argsort(-whole.scores)[:7]
    for part, rows in ((whole.top(7), order), (whole.select([4, 2]), [4, 2])):
        np.testing.assert_array_equal(part.standard_errors, whole.standard_errors[rows])
        np.testing.assert_array_equal(part.intervals(), np.array(whole.intervals())[:, rows])
        np.testing.assert_array_equal(part.leading.halves, whole.leading.halves[rows])
    again = load_attribution(whole.save(tmp_path / "w.parquet"))
    np.testing.assert_array_equal(again.intervals(), whole.intervals())
    beside = whole.with_null(random.normal(size=(30, 50)))
    times = beside.leading
    ends = (whole.intervals()[1] - whole.centre) / np.abs(whole.intervals()[1] - whole.scores) * times.halves
    np.testing.assert_allclose(times.values + times.halves, ends)
    assert f"± {times.halves[order[0]]:.2f}" in times.text(order[0]) and times.number(order[0]) in repr(
        beside
    )


def test_a_count_ends_the_list_and_under_a_true_null_it_is_hardly_ever_above_zero():
    random, data = np.random.default_rng(6), chats(60)
    named = []
    for _ in range(200):
        size = random.uniform(0.5, 3, 60)
        plain = Attribution(data, random.normal(size=60) * size, card())
        named.append(len(plain.with_null(random.normal(size=(60, 40)) * size[:, None]).above_chance()) > 0)
    assert np.mean(named) < 0.08  # any at all, in one file of twenty
    shifted = Attribution(data, np.where(np.arange(60) < 12, 30.0, 0.1), card())
    beside = shifted.with_null(random.normal(size=(60, 40)))
    assert beside.chance_words.startswith("12 of 60 examples") and "more than 12" in beside.chance_words
    assert repr(beside).endswith(beside.chance_words) and "60 examples" in repr(beside)
    assert beside.top(5).chance_words == "" and shifted.chance_words == ""
    assert "No single example of 60" in shifted.with_null(random.normal(size=(60, 40)) * 999).chance_words
    noisy = shifted.scores[:, None] + random.normal(size=(60, 4)) * 0.5
    twelve = Attribution(data, noisy.mean(1) - 1, card(), replicates=noisy - 1).chance_words
    assert "12 of 60 examples lie above the centre and 4" in twelve


def test_a_share_of_the_gap_leads_and_the_raw_number_stays():
    result = Attribution(chats(3), [2.0, -1.0, 0.0], card(effect=-0.5, unit="nats", gap=4.0))
    plain = Attribution(chats(3), [2.0, -1.0, 0.0], card(effect=-0.5, unit="nats"))
    np.testing.assert_allclose(result.leading.values, [25, -12.5, 0])
    np.testing.assert_array_equal(result.effects, plain.effects)
    assert result.distance_words(0) == "+25 % of the gap" and result.raw_words(0) == "score 2, +1 nats"
    assert plain.distance_words(0) == "+1 nats" and plain.raw_words(0) == "score 2"
    for one in (result, plain):  # nobody has trained again yet, and whoever shows the number says so
        assert "not calibrated by retrainings" in one.unit_words and one.unit_words in repr(one)
    assert "-25.0% of the gap" in str(result.predict(drop=[0])) and "gap" not in str(plain.predict(drop=[0]))


def test_near_duplicates_in_a_set_are_said_with_every_prediction():
    texts = ["the tide comes in at noon today", "the tide comes in at noon today!", "no boats", "none at all"]
    data = load_conversations([{"prompt": "when?", "response": text} for text in texts])
    result = Attribution(data, [3.0, 3.0, 2.0, 1.0], card())
    line = Calibration.fit([0, 1, 2, 3], [0, -1, -2, -3.5])
    for options in ({}, dict(calibration=line)):
        both, one, none = (result.predict(drop=rows, **options) for rows in ([0, 1], [0, 2], [2, 3]))
        assert "2 of the 2 have near-duplicates, 0 of them" in str(both)
        assert "1 of the 2 have near-duplicates, 1 of them" in str(one)
        assert none.caveat == "" and "near-duplicate" not in str(none)


def test_a_combination_is_the_mean_of_what_each_method_says_in_its_own_spread():
    random, data = np.random.default_rng(0), chats(30)
    shows, moves = random.normal(size=30), random.normal(size=30)
    one = Attribution(
        data, 1e4 + 300 * shows, card(method="shows", zero="projection", effect=None, unit=None)
    )
    other = Attribution(data, -2e-6 * moves + 7, card(method="moves", effect=-1.0))
    both = combined([one, other])
    spread = lambda x: (x - x.mean()) / x.std()
    np.testing.assert_allclose(both.scores, (spread(shows) - spread(moves)) / 2, atol=1e-9)
    np.testing.assert_allclose(combined([other, one]).scores, both.scores, atol=1e-12)
    moved = Attribution(data, one.scores * 5 - 3, one.card)  # neither zero nor unit of a part matters
    np.testing.assert_allclose(combined([moved, other]).scores, both.scores, atol=1e-9)
    assert (both.card.method, both.card.behaviour, both.card.effect) == ("shows and moves", "kindness", None)
    with pytest.raises(AttributionError, match="have no unit"):
        both.predict(drop=0.2)
    assert foretold(both, range(30)) == pytest.approx(0, abs=1e-12)  # read against its mean


def test_a_combination_follows_ids_and_keeps_what_it_was_made_from(tmp_path):
    random, data = np.random.default_rng(0), chats(12)
    one, other = (
        Attribution(data, random.normal(size=12), card(method=name, notes=[f"about {name}"])) for name in "ab"
    )
    order = random.permutation(12)
    turned = Attribution(data.select(order), other.scores[order], other.card)
    both = combined([one, turned])
    np.testing.assert_allclose(both.scores, combined([one, other]).scores)
    assert {"a: about a", "b: about b"} <= set(both.card.notes) and both.card.question
    assert combined([one, Attribution(data, other.scores, card(method="b", layer=3))]).card.question != (
        both.card.question
    )
    both.save(tmp_path / "both.parquet")
    np.testing.assert_array_equal(load_attribution(tmp_path / "both.parquet").scores, both.scores)


def test_a_combination_costs_what_its_parts_cost():
    costs = [Cost(2.0, 10), Cost(3.0, 10, 7)]
    parts = [
        Attribution(chats(6), np.arange(6.0), card(method=str(i), cost=one)) for i, one in enumerate(costs)
    ]
    cost = combined(parts).card.cost
    assert (cost.seconds, cost.tokens, cost.peak_memory) == (5.0, 20, 7)
    unknown = Attribution(chats(6), np.arange(6.0), card(method="unknown"))
    assert combined([parts[0], unknown]).card.cost is None
    plain = Attribution(chats(6), np.arange(6.0), card(method="plain", cost=costs[0]))
    assert combined([parts[0], plain]).card.cost.peak_memory is None


def test_what_cannot_be_combined_is_named():
    data = chats(6)
    one = Attribution(data, np.arange(6.0), card(method="one"))
    flat = Attribution(data, np.ones(6), card(method="flat"))
    for wrong, said in (
        ([], "nothing"),
        ([one], "ensemble"),
        ([one, one], "one, one"),
        ([one, flat], "flat gives"),
    ):
        with pytest.raises(AttributionError, match=said):
            combined(wrong)
    with pytest.raises(AttributionError):
        combined([one, Attribution(chats(7), np.arange(7.0), card(method="other"))])
