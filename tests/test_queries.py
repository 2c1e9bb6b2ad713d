"""Do queries show the behaviour they stand for: the arithmetic of `query_expression`, and its warning."""

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu

from concept_tda.concepts.concept import ConceptError, tensor_concept
from concept_tda.data.conversations import load_conversations
from concept_tda.data.masks import MaskError, chosen_tokens
from concept_tda.influence.baselines import BM25, RepSim
from concept_tda.influence.neighbours import GradCos, TracIn
from concept_tda.influence.queries import (
    ConceptQuery,
    ContrastQuery,
    LossQuery,
    QueryExpression,
    TokenQuery,
    WeightedQuery,
    query_expression,
    within_questions,
)
from concept_tda.influence.scorers import (
    ConceptInfluence,
    Influence,
    InfluenceFunction,
    ScorerError,
    score_together,
)
from concept_tda.model.loading import LanguageModel
from concept_tda.model.losses import GradientError
from concept_tda.model.sites import resolve_sites
from concept_tda.model.tracing import pooled_activations

from tiny import double_norms, tiny_pair


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


@pytest.mark.filterwarnings("ignore:The query examples")
def test_examples_on_both_sides_are_noted_by_every_method_with_queries():
    lm = LanguageModel(*tiny_pair("llama"), "tiny")
    chats = load_conversations([{"prompt": f"Is {i} even?", "response": f"no, {i}"} for i in range(12)])
    concept = tensor_concept(torch.ones(lm.width), layer=1, lm=lm, name="all")
    train, apart, both = chats[:9], chats[9:], chats[7:]
    elsewhere = load_conversations([{"prompt": "Is it?", "response": "yes, it is"}])
    plain = dict(curvature="identity", sites="attention")
    makers = [
        lambda q: ConceptInfluence(lm, concept, q, **plain),
        lambda q: InfluenceFunction(lm, q, **plain),
        lambda q: InfluenceFunction(lm, elsewhere, neutral=q, **plain),
        lambda q: GradCos(lm, q),
        lambda q: TracIn([lm], q, learning_rates=[1.0]),
        lambda q: RepSim(lm, q, 1),
        lambda q: BM25(q),
    ]
    for make in makers:
        notes = [
            [note for note in score_together([make(q)], train, progress=False, lm=lm).popitem()[1].card.notes]
            for q in (apart, both)
        ]
        said = [[note for note in of_one if "query examples too" in note] for of_one in notes]
        assert said[0] == [] and len(said[1]) == 1 and said[1][0].startswith("2 of 9 examples"), make(
            both
        ).method


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


# some tokens of an answer -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact():
    """A model in float64, two answers, a concept, sites."""
    model, tokenizer = tiny_pair("llama", n_layers=3)
    lm = LanguageModel(model.double(), tokenizer, "tiny")
    answers = load_conversations(
        [
            {"prompt": "Am I right?", "response": "You are so right."},
            {"prompt": "Is it good?", "response": "It is the best I have seen, the best!"},
        ]
    )
    direction = torch.randn(lm.width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    concept = tensor_concept(direction, layer=2, lm=lm, name="flattery")
    return lm, answers, concept, resolve_sites(lm, "mlp")


def responses(data):
    return [np.flatnonzero(item.response_mask.numpy()).tolist() for item in data]


@pytest.mark.parametrize("kind", ["concept", "loss"])
def test_single_tokens_add_up_to_the_whole_in_value_gradient_and_score(exact, kind):
    lm, answers, concept, sites = exact
    query = ConceptQuery(concept, answers) if kind == "concept" else LossQuery(answers)
    data = lm.tokenize(answers)
    single = [[[place], []] for place in responses(data)[0]] + [[[], [place]] for place in responses(data)[1]]
    parts = [TokenQuery(query, chosen_tokens(data, places)) for places in single]
    assert len({part.fingerprint for part in parts} | {query.fingerprint}) == len(parts) + 1
    assert sum(part.value(lm) for part in parts) == pytest.approx(query.value(lm), rel=1e-9)
    whole = query.gradients(lm, sites[:2])
    added = {name: 0 for name in whole}
    for part in parts:
        for name, gradient in part.gradients(lm, sites[:2]).items():
            added[name] = added[name] + gradient
    for name, gradient in whole.items():
        torch.testing.assert_close(added[name], gradient, rtol=1e-4, atol=1e-7)
    half = [places[::2] for places in responses(data)]
    rest = [places[1::2] for places in responses(data)]
    scores = [
        Influence(lm, asked, curvature="identity").score(answers, progress=False).scores
        for asked in (query, *(TokenQuery(query, chosen_tokens(data, places)) for places in (half, rest)))
    ]
    np.testing.assert_allclose(scores[1] + scores[2], scores[0], rtol=1e-6)
    assert not np.allclose(scores[1], scores[2])


def test_a_tokens_share_is_its_log_probability_and_its_activation_by_hand(exact):
    lm, answers, concept, _ = exact
    data = lm.tokenize(answers)
    place, n = responses(data)[1][3], len(responses(data)[1])
    mask = chosen_tokens(data, [[], [place]])
    with torch.no_grad():
        out = lm.model(data[1].input_ids[None], output_hidden_states=True)
    log_probability = out.logits[0, place - 1].log_softmax(-1)[data[1].input_ids[place]].item()
    assert TokenQuery(LossQuery(answers), mask).value(lm) == pytest.approx(log_probability / n / 2, rel=1e-9)
    along = (out.hidden_states[2][0, place] @ concept.direction.double()).item()
    found = TokenQuery(ConceptQuery(concept, answers), mask)
    assert found.value(lm) == pytest.approx(along / n / 2, rel=1e-6)
    assert found.name == f"flattery, 1 of {sum(map(len, responses(data)))} tokens"


def test_a_phrase_is_found_in_every_answer_and_only_there(exact):
    lm, answers, concept, _ = exact
    data = lm.tokenize(answers)
    mask = chosen_tokens(data, "the best")
    said = ["".join(np.array(data.tokens(row))[mask.weights[row] > 0]) for row in range(2)]
    assert said[0] == "" and said[1].count("the best") == 2
    with pytest.raises(MaskError, match="no answer"):
        chosen_tokens(data, "Is it good")  # stands in a prompt
    with pytest.raises(MaskError, match="no response token at place 0"):
        chosen_tokens(data, [[0], []])
    for wrong in ("", [[], []], [[]]):
        with pytest.raises(MaskError):
            chosen_tokens(data, wrong)
    other = lm.tokenize(load_conversations([{"prompt": "Who?", "response": "I."}]))
    with pytest.raises(MaskError, match="knows nothing"):
        TokenQuery(LossQuery(answers), chosen_tokens(other, "I")).value(lm)
    at_prompt = ConceptQuery(concept, answers, pooling="prompt_last")
    for query in (at_prompt, ContrastQuery(LossQuery(answers), LossQuery(answers))):
        with pytest.raises(GradientError):
            TokenQuery(query, mask)


def in_float64():
    model, tokenizer = tiny_pair("llama", dtype=torch.float64)
    return LanguageModel(double_norms(model), tokenizer, "tiny")


def answers_of_a_judge():
    said = {
        "Is it?": ("yes indeed", "no", "it is not"),
        "Was it?": ("never", "so it was"),
        "Will it?": ("it will",),
    }
    pairs = [(question, answer) for question, answers in said.items() for answer in answers]
    answers = load_conversations([{"prompt": q, "response": a} for q, a in pairs])
    return answers, np.array([90.0, 20, 40, 10, 60, 77])


def test_weights_within_a_question_are_a_written_out_loop():
    answers, scores = answers_of_a_judge()
    expected = []
    for one, score in zip(answers, scores):
        same = [other for answer, other in zip(answers, scores) if answer.prompt == one.prompt]
        expected.append(score - sum(same) / len(same))
    np.testing.assert_allclose(within_questions(answers, scores), expected, atol=1e-12)
    order = np.array([5, 2, 0, 4, 1, 3])
    shuffled = within_questions(answers.select(order), scores[order])
    np.testing.assert_allclose(shuffled, np.array(expected)[order], atol=1e-12)


@pytest.mark.parametrize("pooling", ["response_mean", "prompt_last", None])
def test_a_weighted_query_is_linear_in_its_weights(pooling):
    lm = in_float64()
    answers, scores = answers_of_a_judge()
    weights, sites = within_questions(answers, scores), resolve_sites(lm, "attention")
    concept = tensor_concept(torch.ones(lm.width), layer=2, lm=lm, name="c")
    kind = lambda some: LossQuery(some) if pooling is None else ConceptQuery(concept, some, pooling=pooling)
    query = WeightedQuery(kind(answers), weights)
    shares = weights / np.abs(weights).sum()
    alone = [kind(answers.select([row])) for row in range(6)]
    assert query.value(lm) == pytest.approx(sum(w * q.value(lm) for w, q in zip(shares, alone)), rel=1e-6)
    each = [q.gradients(lm, sites) for q in alone]
    for name, found in query.gradients(lm, sites).items():
        by_hand = sum(w * one[name] for w, one in zip(shares, each))
        torch.testing.assert_close(found, by_hand, rtol=1e-5, atol=1e-9)
    same, plain = WeightedQuery(kind(answers), np.full(6, 3.0)), kind(answers)
    assert same.value(lm) == pytest.approx(plain.value(lm), rel=1e-6)
    assert len({q.fingerprint for q in (same, query, plain)}) == 3


@pytest.mark.filterwarnings("ignore:The query examples show less")
def test_scorers_take_weights_whole_and_in_parts():
    lm = in_float64()
    answers, scores = answers_of_a_judge()
    weights = within_questions(answers, scores)
    train = load_conversations([{"prompt": f"Is {i}?", "response": "it is so"} for i in range(5)])
    concept = tensor_concept(torch.ones(lm.width), layer=2, lm=lm, name="c")
    ask = lambda **more: ConceptInfluence(lm, concept, answers, curvature="identity", **more)
    whole = ask(query_weights=weights).score(train, progress=False)
    parts = ask(query_weights=weights, query_parts=2).score(train, progress=False)
    np.testing.assert_allclose(parts.scores, whole.scores, rtol=1e-6)
    assert "weighted from -30 to +40" in whole.card.behaviour
    one_by_one = [
        ConceptInfluence(lm, concept, answers.select([row]), curvature="identity").score(
            train, progress=False
        )
        for row in range(6)
    ]
    by_hand = sum(w * one.scores for w, one in zip(weights / np.abs(weights).sum(), one_by_one))
    np.testing.assert_allclose(whole.scores, by_hand, rtol=1e-5)
    losses = InfluenceFunction(lm, answers, curvature="identity", query_weights=weights)
    assert not np.allclose(losses.score(train, progress=False).scores, whole.scores)
    for more in ({}, dict(neutral=train[:2])):
        with pytest.raises(ScorerError, match="the queries have weights"):
            ask(query_weights=weights, **more).score(train, progress=False, null=5)
    # answers without a weight are not asked, whole or one by one
    twice = answers.select(np.r_[np.arange(6), np.arange(6)])
    losses = InfluenceFunction(lm, twice, curvature="identity", query_weights=np.r_[weights, weights])
    signed = losses.score(train, progress=False, null=6)
    assert len(losses.query.examples) == 10 and signed.null is not None


def test_weights_that_are_none_are_refused():
    answers, scores = answers_of_a_judge()
    for wrong in (scores[:3], np.zeros(6), [np.nan] * 6, [[1.0] * 6]):
        with pytest.raises(GradientError, match="one finite number for each"):
            WeightedQuery(LossQuery(answers), wrong)
    contrast = ContrastQuery(LossQuery(answers), LossQuery(answers))
    with pytest.raises(GradientError, match="no mean over one set"):
        WeightedQuery(contrast, scores)
