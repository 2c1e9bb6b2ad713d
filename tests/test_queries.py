"""Do queries show the behaviour they stand for: the arithmetic of `query_expression`, and its warning."""

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from concept_tda.concepts.concept import ConceptError, tensor_concept
from concept_tda.data.conversations import load_conversations
from concept_tda.influence.queries import QueryExpression, query_expression
from concept_tda.model.loading import LanguageModel
from concept_tda.model.losses import GradientError
from concept_tda.model.tracing import pooled_activations

from tiny import tiny_pair


def test_against_projections_by_hand():
    lm = LanguageModel(*tiny_pair("llama"), "tiny")
    train = load_conversations(
        [
            {"prompt": f"Is {i} even?", "response": "yes!" if i % 2 else "no, certainly not."}
            for i in range(12)
        ]
    )
    acts_ND = pooled_activations(lm, train, 1, progress=False)[1]
    concept = tensor_concept(acts_ND[1::2].mean(0) - acts_ND[::2].mean(0), layer=1, lm=lm, name="says yes")
    projections = (acts_ND.double() @ concept.direction.double()).numpy()
    found = query_expression(
        lm, concept, train[1::2], train, progress=False
    )  # no warning: an error otherwise
    assert (
        found.z
        == pytest.approx((projections[1::2].mean() - projections.mean()) / (projections.std() / np.sqrt(6)))
        and found.z > 2
    )
    assert found.auc == pytest.approx(
        mannwhitneyu(projections[1::2], projections).statistic / (6 * 12), abs=0.05
    )  # a query that is a training example ties with itself up to rounding
    with pytest.warns(UserWarning, match="6 queries DO NOT express 'says yes'"):
        silent = query_expression(lm, concept, train[::2], train, progress=False)
    assert silent.z == pytest.approx(-found.z) and not silent.expressed
    with pytest.raises(ConceptError):
        query_expression(
            LanguageModel(*tiny_pair("llama", seed=1), "other"), concept, train, train, progress=False
        )


def test_as_many_random_examples_are_not_expressive():
    train = np.random.default_rng(0).normal(size=1000)
    zs = [
        QueryExpression("c", train[np.random.default_rng(draw).permutation(1000)[:10]], train).z
        for draw in range(200)
    ]
    assert abs(np.mean(zs)) < 0.3 and 0.8 < np.std(zs) < 1.2


@pytest.mark.parametrize("train", [[0.5], [0.1, 0.1, 0.1]])
def test_without_a_spread_z_is_not_a_number_and_the_text_says_so(train):
    """One training example, or several with one projection: an error of numpy's before, now said."""
    for queries in ([0.9, 0.7], train):
        found = QueryExpression("c", np.array(queries), np.array(train))
        assert np.isnan(found.z) and not found.expressed  # and no warning of numpy's
        assert "can't be said to express 'c'" in repr(found) and "no spread to measure in" in repr(found)
    assert found.auc == 0.5


def test_one_training_example_warns_that_nothing_can_be_told():
    lm = LanguageModel(*tiny_pair("llama"), "tiny")
    data = load_conversations([{"prompt": "Is it?", "response": r} for r in ("yes", "no", "it is not")])
    acts_ND = pooled_activations(lm, data, 1, progress=False)[1]
    concept = tensor_concept(acts_ND[0] - acts_ND[1], layer=1, lm=lm, name="says yes")
    with pytest.warns(UserWarning, match="can't be said to express.*more training examples") as said:
        query_expression(lm, concept, data[:1], data[1:2], progress=False)
    assert len(said) == 1 and said[0].filename == __file__


def test_nothing_to_project_is_an_error_of_ours():
    lm = LanguageModel(*tiny_pair("llama"), "tiny")
    data = load_conversations([{"prompt": "Is it?", "response": r} for r in ("yes", "no")])
    acts_ND = pooled_activations(lm, data, 1, progress=False)[1]
    concept = tensor_concept(acts_ND[0] - acts_ND[1], layer=1, lm=lm, name="says yes")
    with pytest.raises(GradientError, match="'says yes' has no examples.*answers that show"):
        query_expression(lm, concept, data[[]], data, progress=False)
    with pytest.raises(GradientError, match="'says yes' has no examples.*training examples"):
        query_expression(lm, concept, data, data[[]], progress=False)
