"""The null of the scorers: one pass along random directions, against scoring each direction by itself."""

import re
import warnings

import numpy as np
import pytest
import torch

from concept_tda.concepts.concept import tensor_concept
from concept_tda.data.conversations import load_conversations
from concept_tda.data.masks import chosen_tokens
from concept_tda.data.preferences import load_preferences
from concept_tda.influence.baselines import RandomDirection, ResponseLength
from concept_tda.influence.curvature import EKFAC
from concept_tda.influence.neighbours import RESIDUAL_FORMS, GradCos, ResidualChange, TracIn
from concept_tda.influence.pairs import load_pair_attribution, score_preferences
from concept_tda.influence.preconditioners import DataInf
from concept_tda.influence.queries import LossQuery, TokenQuery
from concept_tda.influence.scorers import (
    ActivationGradient,
    ConceptInfluence,
    GradDot,
    Influence,
    InfluenceFunction,
    ProjectionDifference,
    ScorerError,
    VectorFilter,
    null_directions,
    score_together,
    sign_flips,
)
from concept_tda.mechanisms.circuits import UnitInfluence, head
from concept_tda.model.loading import load_model
from concept_tda.model.sites import resolve_sites

from tiny import tiny_pair

WORDS = "red green blue hot cold dry wet loud calm old new big".split()
TRAIN = load_conversations(
    [
        {"prompt": f"is {a} {b}?", "response": f"{b} {a} yes" * (1 + i % 3)}
        for i, (a, b) in enumerate(zip(WORDS, WORDS[3:]))
    ]
)
QUERIES = load_conversations(
    [{"prompt": "is ice warm?", "response": r} for r in ("yes it is", "no, cold", "so")]
)


THINGS = "tea sky hat cat sea sun ice oak cup map".split()


def answered(words):
    return load_conversations(
        [{"prompt": f"is {thing} good?", "response": f"it is {word}"} for thing, word in zip(THINGS, words)]
    )


FINE, POOR = answered(["fine"] * 10), answered([f"poor {i}" for i in range(10)])


@pytest.fixture(scope="module")
def lm():
    return load_model(tiny_pair("llama", n_layers=3, dtype=torch.float64))


@pytest.fixture(scope="module")
def concept(lm):
    vector = torch.randn(lm.width, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return tensor_concept(vector, layer=2, lm=lm, name="a direction")


def of_each(lm, concept, make, draws=7):
    "Scores [N, K] of random directions, each scored as a concept of its own."
    directions, _ = null_directions(lm, lm.tokenize(TRAIN), concept, draws, 0)
    columns = []
    for direction in directions:
        one = tensor_concept(direction, layer=concept.layer, lm=lm, name="random", pooling=concept.pooling)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            columns.append(make(one).score(TRAIN, progress=False).scores)
    return np.stack(columns, axis=1)


def makers(lm, answers):
    data, sites = lm.tokenize(TRAIN), resolve_sites(lm, "attention", layer=2)
    ekfac = EKFAC.fit(lm, data, sites, progress=False)
    return {
        "vector filter": lambda c: VectorFilter(lm, c),
        "activation gradient": lambda c: ActivationGradient(lm, c),
        "projection difference": lambda c: ProjectionDifference(lm, c, answers=answers),
        "across_tokens": lambda c: ResidualChange(lm, c, form="across_tokens"),
        "within_token": lambda c: ResidualChange(lm, c, form="within_token"),
        "identity": lambda c: ConceptInfluence(lm, c, QUERIES, curvature="identity"),
        "ekfac": lambda c: ConceptInfluence(lm, c, QUERIES, curvature=ekfac),
    }


ALONG_A_CONCEPT = ["vector filter", "activation gradient", "projection difference", *RESIDUAL_FORMS]


@pytest.mark.parametrize("name", [*ALONG_A_CONCEPT, "identity", "ekfac"])
def test_the_null_of_the_pass_is_that_of_scoring_each_direction_alone(lm, concept, name):
    answers = load_conversations(
        [{"prompt": c.prompt[0]["content"], "response": f"own {i}"} for i, c in enumerate(TRAIN)]
    )
    make = makers(lm, answers)[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = make(concept).score(TRAIN, progress=False)
        found = make(concept).score(TRAIN, tokens=True, progress=False, null=7)
    assert np.allclose(found.scores, plain.scores, rtol=1e-9) and plain.null is None
    expected = plain.with_null(of_each(lm, concept, make), of=found.null.of, seed=0)
    # the model is so narrow that the sketch of Concept Influence is the whole gradient
    assert np.allclose(found.times_null, expected.times_null, rtol=1e-5)
    assert np.allclose(found.null.quantiles, expected.null.quantiles, rtol=1e-4, atol=1e-9)
    assert found.null.draws == 7 and "covariance of the data's activations" in found.null.of
    assert found.token_scores is not None and np.ndim(found.token_scores[0]) == 1


def test_every_method_along_a_concept_is_held_to_its_null(lm, concept):
    """A method that overrides what it reads of a concept, and not what its null reads, has another method's
    null. So none may be missing above, and none may have a `prepare` that reads another way than `along`."""

    def kinds(parent):
        return {parent}.union(*map(kinds, parent.__subclasses__()))

    tried = {type(makers(lm, None)[name](concept)) for name in ALONG_A_CONCEPT}
    own = {kind for kind in kinds(VectorFilter) if not kind.__name__.startswith("_")}
    assert own - {RandomDirection} == tried  # which is the Vector Filter of another concept
    assert "null" not in vars(RandomDirection) and "along" not in vars(RandomDirection)


def test_scored_together_each_method_has_its_own_null_and_baselines_have_none(lm, concept):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = score_together(
            [
                VectorFilter(lm, concept),
                ConceptInfluence(lm, concept, QUERIES, curvature="identity"),
                InfluenceFunction(lm, QUERIES, curvature="identity"),
                ResponseLength(),
                RandomDirection(lm, concept, TRAIN, progress=False),
            ],
            TRAIN,
            null=100,
            seed=3,
            progress=False,
        )
    with_null = {name for name, result in found.items() if result.null is not None}
    assert with_null == {"Vector Filter", "Concept Influence", "Random direction"}
    assert {found[name].null.seed for name in with_null} == {3}
    said = {
        name for name, one in found.items() if any("null=100 gave none" in note for note in one.card.notes)
    }
    assert said == {"Influence Function", "Length"}  # asked for in vain, and not without a word
    assert found["Length"].leading.kind == "none" and found["Influence Function"].leading.kind == "spread"
    alone = VectorFilter(lm, concept).score(TRAIN, null=100, progress=False)
    assert not np.allclose(alone.times_null, found["Vector Filter"].times_null)  # another seed, other draws
    assert np.allclose(alone.times_null, found["Vector Filter"].times_null, rtol=0.6, atol=0.6)


def test_chance_beside_chance_has_spread_one(lm, concept):
    times = []
    for seed in range(1, 13):
        scorer = RandomDirection(lm, concept, TRAIN, seed=seed, progress=False)
        times.append(scorer.score(TRAIN, null=200, progress=False).times_null)
    assert 0.7 < np.sqrt(np.mean(np.square(times))) < 1.4


def test_numbers_of_draws_that_give_no_spread_are_refused(lm, concept):
    for wrong in (1, 4, -5, True, "100", 2.5):
        with pytest.raises(ScorerError, match="at least 5"):
            VectorFilter(lm, concept).score(TRAIN, null=wrong, progress=False)


# losses -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loss_makers(lm):
    "Scorers of a loss by name, as functions of the rows of the query examples."
    data, sites = lm.tokenize(TRAIN), resolve_sites(lm, "attention")
    ekfac = EKFAC.fit(lm, data, sites, cache=False, progress=False)
    datainf = DataInf.fit(lm, data, sites, progress=False)
    units = head(lm, 1, 0).units
    words = chosen_tokens(lm.tokenize(FINE), "fine")
    at = lambda rows: (FINE.select(rows), POOR.select(rows))

    def some_words(rows):
        query = TokenQuery(LossQuery(FINE), words)
        return Influence(lm, query if len(rows) == 10 else query.part(rows), curvature=ekfac)

    return {
        "graddot": lambda rows: GradDot(lm, at(rows)[0]),
        "ekfac": lambda rows: InfluenceFunction(lm, at(rows)[0], curvature=ekfac),
        "margin": lambda rows: InfluenceFunction(lm, at(rows)[0], neutral=at(rows)[1], curvature=ekfac),
        "no sink": lambda rows: InfluenceFunction(lm, at(rows)[0], curvature=ekfac, first_token=False),
        "another curvature": lambda rows: InfluenceFunction(lm, at(rows)[0], curvature=datainf),
        "a unit": lambda rows: UnitInfluence(
            lm, LossQuery(at(rows)[0]), units, curvature="identity", reduction="sum"
        ),
        "chosen words": some_words,
    }


@pytest.mark.parametrize(
    "name", ["graddot", "ekfac", "margin", "no sink", "another curvature", "a unit", "chosen words"]
)
def test_the_null_of_a_loss_is_that_of_scoring_each_query_alone(loss_makers, name):
    make = loss_makers[name]
    plain = make(range(10)).score(TRAIN, progress=False)
    found = make(range(10)).score(TRAIN, progress=False, null=40)
    assert np.allclose(found.scores, plain.scores, rtol=1e-9) and plain.null is None
    alone = np.stack([make([row]).score(TRAIN, progress=False).scores for row in range(10)], axis=1)
    assert np.allclose(alone.mean(1), plain.scores, rtol=1e-4, atol=1e-6 * abs(plain.scores).max())
    order = np.random.default_rng(0).permutation(10)  # the parts are the examples in this order
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (10, 40))
    expected = plain.with_null(alone[:, order] @ signs / 10)
    assert np.allclose(found.times_null, expected.times_null, rtol=1e-5)
    assert np.allclose(found.draws, expected.draws, rtol=1e-4, atol=1e-6 * abs(expected.draws).max())
    what = "pairs of answers" if name == "margin" else "query examples"
    assert str(found.null) == f"40 sign flips of the 10 {what}"


def test_many_queries_are_cut_into_sixteen_parts_and_kept_parts_serve_as_they_are(lm):
    many = load_conversations(
        [{"prompt": f"is {i} odd?", "response": f"{i} is it, {'yes ' * (i % 4)}"} for i in range(37)]
    )
    found = GradDot(lm, many).score(TRAIN, progress=False, null=30)
    assert str(found.null) == "30 sign flips of 16 parts of the 37 query examples"
    parts = GradDot(lm, many, query_parts=16).score(TRAIN, progress=False, null=30)
    assert np.allclose(parts.times_null, found.times_null, rtol=1e-5)  # without a pass of their own
    sizes = np.array([len(one) for one in np.array_split(np.arange(37), 16)])
    exact = np.sqrt(((parts.replicates * sizes / 37) ** 2).sum(1))
    drawn = np.sqrt((found.draws**2).mean(1))
    assert np.allclose(drawn, exact, rtol=0.6)
    assert np.all(np.abs(found.scores) / exact <= 4 + 1e-9)  # the root of sixteen, for equal parts and these
    divided = GradDot(lm, many, query_parts=16, normalise="gradient").score(TRAIN, progress=False, null=30)
    assert np.allclose(divided.times_null, parts.times_null, rtol=1e-5)  # a length cancels


def test_under_a_true_null_percentiles_among_the_draws_are_uniform():
    rng, weights = np.random.default_rng(7), np.array([3, 2, 1, 1, 1, 1, 1, 1, 1, 2, 2, 1.0]) / 17
    for tails in (1.5, 3, 30):
        parts = rng.standard_t(tails, (4000, 12)) * rng.lognormal(0, 2, (4000, 1))
        below = (parts @ sign_flips(weights, 999, seed=3) < (parts @ weights)[:, None]).mean(1)
        counts = np.histogram(below, np.linspace(0, 1, 21))[0]
        chi2 = ((counts - 200) ** 2 / 200).sum()
        assert chi2 < 60, (tails, counts)  # of 19 degrees of freedom
        moved = parts + 1.2 * np.median(abs(parts), axis=1, keepdims=True)  # the queries agree
        above = (moved @ sign_flips(weights, 999, seed=3) < (moved @ weights)[:, None]).mean(1)
        assert (above > 0.95).mean() > 0.4


def test_sides_tossed_by_coin_give_uniform_percentiles_through_a_model(lm):
    """Which of a question's two answers shows the behaviour is tossed: whatever the model makes of them, the
    score is one of the draws. Fixed sides are no toss: all ten pairs differ in the same way."""
    fixed = GradDot(lm, FINE, neutral=POOR, query_parts=10).score(TRAIN, progress=False, null=400)
    order = np.random.default_rng(0).permutation(10)
    for toss in range(3):
        coins = np.random.default_rng(100 + toss).integers(0, 2, 10)
        shows = answered(["fine" if coin else f"poor {i}" for i, coin in enumerate(coins)])
        neutral = answered([f"poor {i}" if coin else "fine" for i, coin in enumerate(coins)])
        tossed = GradDot(lm, shows, neutral=neutral).score(TRAIN, progress=False).scores
        expected = fixed.replicates @ (2 * coins[order] - 1) / 10
        assert np.allclose(tossed, expected, rtol=1e-4, atol=1e-6 * abs(tossed).max())
    many = fixed.replicates @ np.random.default_rng(5).choice([-1, 1], (10, 4000)) / 10
    places = np.stack([(fixed.draws < one[:, None]).mean(1) for one in many.T])
    for of_example in places.T:  # tenths; ten pairs have 1,024 tosses, and 400 of them were drawn
        assert abs(np.histogram(of_example, np.linspace(0, 1, 11))[0] / 4000 - 0.1).max() < 0.06
    extreme = (fixed.draws < fixed.scores[:, None]).mean(1)
    assert ((extreme < 0.02) | (extreme > 0.98)).mean() > 0.5


@pytest.mark.parametrize(
    "make, why",
    [
        (lambda lm: GradDot(lm, FINE.select(range(7))), "takes 8 of them or more, here are 7"),
        (lambda lm: GradDot(lm, FINE, normalise="gradient"), "divided by a length.*query_parts=8"),
        (lambda lm: GradDot(lm, FINE, neutral=POOR.select(range(9))), "10 answers and 9 neutral ones"),
        (lambda lm: GradCos(lm, FINE), "divided by lengths"),
    ],
)
def test_a_loss_without_a_null_says_why_on_its_card(lm, make, why):
    result = make(lm).score(TRAIN, progress=False, null=100)
    assert result.null is None and result.leading.kind == "spread"
    note = next(note for note in result.card.notes if note.startswith("null=100 gave none"))
    assert re.search(why, note), note


@pytest.mark.parametrize("option", ["neutral", "pooling", "no sink"])
def test_the_null_of_a_concept_follows_what_is_asked_about_it(lm, concept, option):
    more = {
        "neutral": dict(neutral=POOR.select(range(3))),
        "pooling": dict(pooling="all_but_first"),
        "no sink": dict(first_token=False),
    }[option]
    make = lambda c: ConceptInfluence(lm, c, QUERIES, curvature="identity", **more)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = make(concept).score(TRAIN, progress=False, null=7)
    expected = found.with_null(of_each(lm, concept, make))
    assert np.allclose(found.times_null, expected.times_null, rtol=1e-5)


def test_a_normalised_concept_influence_has_no_null_and_says_so(lm, concept):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = ConceptInfluence(lm, concept, QUERIES, curvature="identity", normalise="gradient").score(
            TRAIN, progress=False, null=7
        )
    assert result.null is None and any("divided by a length" in note for note in result.card.notes)


# pairs --------------------------------------------------------------------------------------------

PAIRS = [
    {"prompt": f"is {a} {b}?", "chosen": f"{a} it is, very {b}", "rejected": f"no, {b}" * (1 + i % 2)}
    for i, (a, b) in enumerate(zip(WORDS, WORDS[2:]))
]


@pytest.mark.parametrize("name", ["vector filter", "activation gradient", "ekfac", "loss"])
def test_the_null_of_a_pair_is_chosen_minus_rejected_along_the_same_draw(lm, concept, tmp_path, name):
    pairs = load_preferences(PAIRS)
    both = load_conversations([*pairs.chosen, *pairs.rejected])
    scorer = (
        InfluenceFunction(lm, FINE, curvature="identity")
        if name == "loss"
        else makers(lm, None)[name](concept)
        if name != "ekfac"
        else ConceptInfluence(lm, concept, QUERIES, curvature="identity")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        single = scorer.score(both, progress=False, null=20)
        found = score_preferences(scorer, pairs, progress=False, null=20)
        without = score_preferences(scorer, pairs, progress=False)
    n = len(pairs)
    expected = without.with_null(single.draws[:n] - single.draws[n:])
    assert np.allclose(found.times_null, expected.times_null, rtol=1e-6) and without.null is None
    assert found.leading.kind == "null" and found.null.draws == 20 and found.null.of == single.null.of
    again = load_pair_attribution(found.save(tmp_path / "pairs.parquet"))
    assert again.null == found.null and np.array_equal(again.times_null, found.times_null)
    assert again.draws is None and again.pairs.rejected.ids == pairs.rejected.ids
    if name == "loss":  # its draws are the same for any order of the file
        turned = score_preferences(scorer, pairs.swap(range(n)), progress=False, null=20)
        assert np.allclose(turned.times_null, -found.times_null, rtol=1e-4)


def most_tokens_differentiated(lm, work):
    """Runs `work`; the largest number of tokens, padding and copies included, of a pass with a graph."""
    seen = []

    def look(module, args, kwargs):
        if torch.is_grad_enabled():
            seen.append(kwargs["input_ids"].numel())

    hook = lm.model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        work()
    finally:
        hook.remove()
    return max(seen)


@pytest.mark.parametrize("budget", [1, 150])
def test_no_pass_with_gradients_exceeds_the_budget_of_tokens(lm, concept, budget):
    """Neither those over the examples nor those over the queries, of the scores and of their null: whoever
    runs out of memory lowers `token_budget`, and it has to help everywhere."""
    many = load_conversations([{"prompt": f"is {word}?", "response": f"yes {word}"} for word in WORDS])
    scorers = [
        ConceptInfluence(lm, concept, many, curvature="identity"),
        ConceptInfluence(lm, concept, many, neutral=QUERIES, curvature="identity", method="Contrast"),
        InfluenceFunction(lm, many, curvature="identity"),
        InfluenceFunction(lm, FINE, neutral=POOR, curvature="identity", method="Margin"),
        GradCos(lm, many),
        TracIn([lm], many, learning_rates=[1.0]),
    ]
    longest = max(int(lm.tokenize(data).lengths.max()) for data in (TRAIN, many, QUERIES, FINE, POOR))

    def work():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            score_together(scorers, TRAIN, null=5, token_budget=budget, progress=False)

    assert most_tokens_differentiated(lm, work) <= max(budget, longest)
