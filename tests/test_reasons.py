"""Where nothing can be computed, the error says why."""

import warnings

import pytest
import torch

from concept_tda.concepts.concept import tensor_concept
from concept_tda.data.conversations import load_conversations
from concept_tda.influence.scorers import ConceptInfluence, GradDot, VectorFilter
from concept_tda.model.loading import load_model
from concept_tda.model.losses import GradientError
from concept_tda.model.tracing import generate, pooled_activations

from tiny import tiny_pair

TRAIN = [{"prompt": "Is it?", "response": "yes"}, {"prompt": "Is it so?", "response": "no, it is not"}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCEPT_TDA_CACHE", str(tmp_path / "cache"))


def test_an_empty_query_set_is_named():
    lm, train = load_model(tiny_pair("llama")), load_conversations(TRAIN)
    concept = tensor_concept(torch.ones(lm.width), layer=1, lm=lm, name="flattery")
    for scorer in (ConceptInfluence(lm, concept, train[[]], curvature="identity"), GradDot(lm, train[[]])):
        with pytest.raises(GradientError, match="has no examples"):
            scorer.score(train, progress=False)


def test_a_single_example_is_scored_and_the_card_says_what_could_not_be_told():
    lm, train = load_model(tiny_pair("llama")), load_conversations(TRAIN)
    concept = tensor_concept(torch.ones(lm.width), layer=1, lm=lm, name="flattery")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing is said to be weaker than what was not measured
        warnings.simplefilter("error", RuntimeWarning)  # numpy's division by zero
        result = ConceptInfluence(lm, concept, train[:1], curvature="identity").score(
            train[1:], progress=False
        )
    assert torch.isfinite(torch.tensor(result.scores)).all()
    assert any("can't be said to express 'flattery'" in note for note in result.card.notes)


def test_under_inference_mode_everything_gives_the_same_numbers():
    lm, train = load_model(tiny_pair("llama")), load_conversations(TRAIN)
    concept = tensor_concept(torch.ones(lm.width), layer=1, lm=lm, name="flattery")

    def everything():
        scorers = (
            VectorFilter(lm, concept),
            ConceptInfluence(lm, concept, train[:1], curvature="identity"),
            GradDot(lm, train[:1]),
        )
        scores = [scorer.score(train, progress=False).scores.tolist() for scorer in scorers]
        answers = [c.response for c in generate(lm, train, max_new_tokens=4, progress=False)]
        return scores, answers, pooled_activations(lm, train, 1, progress=False)[1].tolist()

    outside = everything()
    with torch.inference_mode():
        inside = everything()
    assert inside == outside
    with torch.no_grad():
        assert everything() == outside


def test_weights_made_under_inference_mode_are_named():
    with torch.inference_mode():
        lm = load_model(tiny_pair("llama"))
    with pytest.raises(GradientError, match="made under torch.inference_mode"):
        GradDot(lm, load_conversations(TRAIN)).score(TRAIN, progress=False)
