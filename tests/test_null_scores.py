"""The null of the scorers: one pass along random directions, against scoring each direction by itself."""

import warnings

import numpy as np
import pytest
import torch

from concept_tda.concepts.concept import tensor_concept
from concept_tda.data.conversations import load_conversations
from concept_tda.influence.baselines import RandomDirection, ResponseLength
from concept_tda.influence.curvature import EKFAC
from concept_tda.influence.scorers import (
    ActivationGradient,
    ConceptInfluence,
    InfluenceFunction,
    ProjectionDifference,
    ScorerError,
    VectorFilter,
    null_directions,
    score_together,
)
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
        "identity": lambda c: ConceptInfluence(lm, c, QUERIES, curvature="identity"),
        "ekfac": lambda c: ConceptInfluence(lm, c, QUERIES, curvature=ekfac),
    }


@pytest.mark.parametrize(
    "name", ["vector filter", "activation gradient", "projection difference", "identity", "ekfac"]
)
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
