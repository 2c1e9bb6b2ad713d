"""Queries, the shared pass and the influence scorers against float64 autograd, on every architecture."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy

from concept_tda.concepts.concept import ConceptError, tensor_concept
from concept_tda.data.conversations import load_conversations
from concept_tda.influence.curvature import EKFAC, CurvatureError
from concept_tda.influence.engine import (
    ActivationGradientReadout,
    DirectionReadout,
    shared_pass,
)
from concept_tda.influence.queries import ConceptQuery, LossQuery
from concept_tda.influence.scorers import (
    ActivationGradient,
    ConceptInfluence,
    GradDot,
    Influence,
    InfluenceFunction,
    ScorerError,
    VectorFilter,
    score_together,
)
from concept_tda.model.loading import LayerError, SiteError, load_model
from concept_tda.model.losses import GradientError
from concept_tda.model.sites import resolve_sites
from concept_tda.results.metrics import AttributionError

from tiny import FAMILIES, tiny_model, tiny_pair, tiny_tokenizer

TRAIN = [
    {"prompt": "Is it?", "response": "No, it is not so."},
    {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "I think so."},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "And now?"},
            {"role": "assistant", "content": "You must be right about it, as always."},
        ]
    },
    {"prompt": "What is two plus two, if I may ask you that?", "response": "Four."},
    {"prompt": "Why", "response": "Because the sky is blue and the sea is too."},
]
ANSWERS = [
    {"prompt": "Am I right?", "response": "So right, always."},
    {"prompt": "Is it good, do you think so?", "response": "The best."},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCEPT_TDA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def train():
    return load_conversations(TRAIN)


@pytest.fixture
def answers():
    return load_conversations(ANSWERS)


def make_lm(family="llama", **options):
    if family != "lora":
        return load_model(tiny_pair(family, dtype=torch.float64, **options))
    model = get_peft_model(
        tiny_model("llama", dtype=torch.float64, **options),
        LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
    )
    return load_model((model.double(), tiny_tokenizer()))


def direction(lm, layer, seed=0, name="flattery"):
    return tensor_concept(
        torch.randn(lm.width, generator=torch.Generator().manual_seed(seed)), layer=layer, lm=lm, name=name
    )


# --- the oracle: plain autograd, one unpadded example at a time, transformers' own hidden states and logits
# ---


def plain_forward(lm, example):
    return lm.model(input_ids=example.input_ids[None], output_hidden_states=True)


def plain_loss(lm, example):
    mask = example.response_mask[1:]
    return cross_entropy(plain_forward(lm, example).logits[0, :-1][mask], example.input_ids[1:][mask])


def plain_activation(lm, example, concept):
    hidden = plain_forward(lm, example).hidden_states[concept.layer][0]
    return hidden[example.response_mask].mean(0) @ concept.direction.to(hidden)


def plain_gradients(scalar, sites):
    for site in sites:
        site.module.weight.requires_grad_(True)
    found = torch.autograd.grad(scalar(), [site.module.weight for site in sites], allow_unused=True)
    return {
        site.name: (
            torch.zeros(site.out_features, site.in_features, dtype=torch.float64)
            if g is None
            else g.T
            if g.shape != (site.out_features, site.in_features)
            or not isinstance(site.module, torch.nn.Linear)
            else g
        )
        for site, g in zip(sites, found)
    }


def inner(a, b):
    return sum((a[name] * b[name]).sum() for name in a).item()


@pytest.mark.parametrize("family", [*FAMILIES, "lora"])
@pytest.mark.parametrize("pattern", ["attention", "mlp", "all-linear"])
def test_influence_equals_autograd(family, pattern, train, answers):
    lm = make_lm(family, n_layers=3)
    if family == "lora" and pattern == "mlp":
        pattern = "lora"
    concept, data, questions = direction(lm, 2), lm.tokenize(train), lm.tokenize(answers)
    queries = {
        "concept": (
            ConceptQuery(concept, answers),
            lambda: sum(plain_activation(lm, q, concept) for q in questions) / len(questions),
        ),
        "loss": (LossQuery(answers), lambda: -sum(plain_loss(lm, q) for q in questions) / len(questions)),
    }
    sites = resolve_sites(lm, pattern)
    assert sites
    for name, (query, scalar) in queries.items():
        gradient = plain_gradients(scalar, sites)
        ours = query.gradients(lm, sites)
        # transformers' norms work in float32 inside a float64 model, and padding changes the shapes they see
        for site in gradient:
            torch.testing.assert_close(
                ours[site], gradient[site], rtol=1e-5, atol=1e-6 * gradient[site].abs().max().item() + 1e-12
            )
        expected = [-inner(gradient, plain_gradients(lambda: plain_loss(lm, z), sites)) for z in data]
        scores = Influence(lm, query, sites=pattern, curvature="identity").score(train, progress=False).scores
        np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6 * max(map(abs, expected)))
        assert np.abs(scores).max() > 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_nothing_above_the_layer_has_a_gradient(family, answers):
    lm = make_lm(family, n_layers=4)
    gradients = ConceptQuery(direction(lm, 2), answers).gradients(lm, resolve_sites(lm, "all-linear"))
    for site in resolve_sites(lm, "all-linear"):
        assert gradients[site.name].any() == (site.block < 2), site.name
    assert {
        site.block for site in ConceptInfluence(lm, direction(lm, 2), answers, curvature="identity").sites
    } == {0, 1}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_vector_methods_equal_autograd(family, train):
    lm = make_lm(family, n_layers=3)
    concept, data = direction(lm, 2), lm.tokenize(train)
    results = score_together(
        [VectorFilter(lm, concept), ActivationGradient(lm, concept)], train, progress=False
    )
    for row, example in enumerate(data):
        assert results["Vector Filter"].scores[row] == pytest.approx(
            plain_activation(lm, example, concept).item(), rel=1e-6
        )
        # shift the activation of every response token by u and differentiate the loss in u
        shift = torch.zeros(lm.width, dtype=torch.float64, requires_grad=True)
        hook = lm.blocks[concept.layer - 1].register_forward_hook(
            lambda block, args, out: out + example.response_mask[:, None] * shift
        )
        (gradient,) = torch.autograd.grad(plain_loss(lm, example), shift)
        hook.remove()
        assert results["Activation Gradient"].scores[row] == pytest.approx(
            -(gradient @ concept.direction.double()).item(), rel=1e-6
        )


def test_with_curvature_the_engine_is_still_the_inner_product(train, answers):
    lm = make_lm(n_layers=3)
    curvature = EKFAC.fit(lm, train, "attention", layer=2, progress=False)
    query = ConceptQuery(direction(lm, 2), answers)
    sites = resolve_sites(lm, "attention", layer=2)
    preconditioned = curvature.precondition(query.gradients(lm, sites))
    expected = [
        -inner(preconditioned, plain_gradients(lambda: plain_loss(lm, z), sites)) for z in lm.tokenize(train)
    ]
    scores = (
        ConceptInfluence(lm, query.concept, answers, curvature=curvature).score(train, progress=False).scores
    )
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    default = ConceptInfluence(lm, query.concept, answers).score(train, progress=False)
    np.testing.assert_allclose(default.scores, scores, rtol=1e-8)
    assert default.card.curvature == "EK-FAC" and "0.1" in default.card.damping and default.card.n_sites == 8


# --- invariances ---


def everything(lm, answers):
    concept = direction(lm, 1)
    return [
        VectorFilter(lm, concept),
        ActivationGradient(lm, concept),
        ConceptInfluence(lm, concept, answers, curvature="identity"),
        GradDot(lm, answers),
    ]


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt_neox", "gpt2"])
def test_scores_do_not_depend_on_batch_mates_order_or_padding(family, train, answers):
    lm = load_model(tiny_pair(family))  # float32, as users run it
    reference = score_together(everything(lm, answers), train, progress=False, token_budget=1)
    order = [2, 0, 3, 1]
    lm.tokenizer.padding_side = "left"
    for method, result in score_together(
        everything(lm, answers), train.select(order), progress=False, token_budget=4096
    ).items():
        expected = reference[method].scores
        np.testing.assert_allclose(
            result.scores, expected[order], atol=1e-5 * np.abs(expected).max(), rtol=1e-5
        )
    assert lm.tokenizer.padding_side == "left"


def test_together_is_the_same_as_alone(train, answers):
    lm = make_lm()
    together = score_together(everything(lm, answers), train, progress=False)
    for scorer in everything(lm, answers):
        np.testing.assert_allclose(
            scorer.score(train, progress=False).scores, together[scorer.method].scores, rtol=1e-10
        )


def test_token_scores_sum_to_the_example(train, answers):
    lm = load_model(tiny_pair("llama"))
    for result in score_together(everything(lm, answers), train, tokens=True, progress=False).values():
        for row, (score, tokens, names) in enumerate(zip(result.scores, result.token_scores, result.tokens)):
            assert len(tokens) == len(names) == lm.tokenize(train).lengths[row]
            assert np.sum(tokens, dtype=float) == pytest.approx(score, rel=1e-4, abs=1e-6)


def test_many_directions_at_once(train):
    lm = make_lm()
    sites = resolve_sites(lm, "attention")
    stacked = {s.name: torch.randn(3, s.out_features, s.in_features, dtype=torch.float64) for s in sites}
    together = shared_pass(lm, train, {"d": DirectionReadout(sites, stacked)}, progress=False)["d"].scores
    for query in range(3):
        alone = shared_pass(
            lm,
            train,
            {"d": DirectionReadout(sites, {name: d[query] for name, d in stacked.items()})},
            progress=False,
        )["d"].scores
        np.testing.assert_allclose(together[:, query], alone[:, 0])


@pytest.mark.parametrize(
    "scorer",
    [
        lambda lm, concept, answers: ConceptInfluence(
            lm, concept, answers, sites="all-linear", curvature="identity"
        ),
        lambda lm, concept, answers: GradDot(lm, answers, sites="all-linear"),
    ],
)
def test_one_step_on_the_top_example_raises_the_behaviour(scorer, train, answers):
    lm = make_lm()
    scorer = scorer(lm, direction(lm, 1), answers)
    result = scorer.score(train, progress=False)
    step, before, changes = 1e-5, scorer.query.value(lm), []
    for example in lm.tokenize(train):
        gradient = plain_gradients(lambda: plain_loss(lm, example), scorer.sites)
        with torch.no_grad():
            for site in scorer.sites:
                site.module.weight -= step * gradient[site.name]
        changes.append((scorer.query.value(lm) - before) / step)
        with torch.no_grad():
            for site in scorer.sites:
                site.module.weight += step * gradient[site.name]
    np.testing.assert_allclose(result.scores, changes, rtol=1e-2, atol=1e-3 * np.abs(changes).max())
    assert changes[int(result.scores.argmax())] == max(changes) > 0


def test_activation_gradient_sign():
    """A step of the activations against the loss gradient moves them along +v for a positive score, by
    construction of Eq. 12."""
    lm = make_lm()
    train = load_conversations(TRAIN)
    readout = shared_pass(
        lm,
        train,
        {"g": ActivationGradientReadout(1, torch.eye(lm.width, dtype=torch.float64))},
        progress=False,
    )["g"]
    for row, example in enumerate(lm.tokenize(train)):
        shift = torch.tensor(1e-6 * readout.scores[row] / np.linalg.norm(readout.scores[row]))
        before = plain_loss(lm, example).item()
        hook = lm.blocks[0].register_forward_hook(
            lambda block, args, out: out + example.response_mask[:, None] * shift
        )
        after = plain_loss(lm, example).item()
        hook.remove()
        assert after < before


# --- the model is left as it was ---


def test_the_model_is_left_clean(train, answers):
    lm = make_lm("lora")
    lm.model.train()
    flags = {name: p.requires_grad for name, p in lm.model.named_parameters()}
    weights = lm.fingerprint
    side, pad = lm.tokenizer.padding_side, lm.tokenizer.pad_token
    score_together(
        [*everything(lm, answers), InfluenceFunction(lm, answers, sites="lora")], train, progress=False
    )
    assert lm.model.training and lm.fingerprint == weights
    assert {name: p.requires_grad for name, p in lm.model.named_parameters()} == flags
    assert all(p.grad is None for p in lm.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in lm.model.modules())
    assert (lm.tokenizer.padding_side, lm.tokenizer.pad_token) == (side, pad)


def test_the_model_is_left_clean_after_an_error(train, answers):
    lm = make_lm()
    with torch.no_grad():
        lm.blocks[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(GradientError, match="not finite"):
        GradDot(lm, answers).score(train, progress=False)
    with torch.no_grad():
        lm.blocks[1].mlp.down_proj.weight[0, 0] = 0
    with pytest.raises(CurvatureError, match="not finite"):
        with torch.no_grad():
            lm.model.lm_head.weight[0, 0] = float("nan")
        EKFAC.fit(lm, train, progress=False)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())
    assert all(p.requires_grad for p in lm.model.parameters()) and all(
        p.grad is None for p in lm.model.parameters()
    )


# --- a kill loses no finished block ---


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [1, 3])
def test_an_interrupted_run_continues(after, train, answers, monkeypatch):
    import concept_tda.influence.engine as directional

    lm = make_lm()
    expected = score_together(everything(lm, answers), train, progress=False, token_budget=1)
    real, calls = directional.run_batch, []

    def dies(*args):
        calls.append(1)
        if len(calls) == after + 1:
            raise Killed
        return real(*args)

    monkeypatch.setattr(directional, "run_batch", dies)
    with pytest.raises(Killed):
        score_together(everything(lm, answers), train, progress=False, token_budget=1)
    calls.clear()
    monkeypatch.setattr(directional, "run_batch", lambda *args: (calls.append(1), real(*args))[1])
    again = score_together(everything(lm, answers), train, progress=False, token_budget=1)
    assert len(calls) == len(train) - after
    for method, result in again.items():
        np.testing.assert_array_equal(result.scores, expected[method].scores)
        assert any("interrupted" in note for note in result.card.notes)


def test_blocks_of_other_data_models_and_questions_are_not_reused(train, answers, monkeypatch):
    import concept_tda.influence.engine as directional

    lm, real, done = make_lm(), directional.run_batch, []

    def dies(*args):
        if done:
            raise Killed
        done.append(1)
        return real(*args)

    monkeypatch.setattr(directional, "run_batch", dies)
    with pytest.raises(Killed):
        GradDot(lm, answers).score(train, progress=False, token_budget=1)
    monkeypatch.setattr(directional, "run_batch", real)
    for note in (
        GradDot(lm, answers[:1]).score(train, progress=False, token_budget=1).card.notes,
        GradDot(lm, answers).score(train[1:], progress=False, token_budget=1).card.notes,
        GradDot(make_lm(seed=1), answers).score(train, progress=False, token_budget=1).card.notes,
    ):
        assert not any("interrupted" in line for line in note)
    assert any(
        "1 of 4 examples were scored by an earlier, interrupted run" in line
        for line in GradDot(lm, answers).score(train, progress=False, token_budget=1).card.notes
    )


# --- bad input ---


def test_errors(train, answers):
    lm, other = make_lm(n_layers=3), make_lm(n_layers=3, seed=1)
    with pytest.raises(LayerError):
        VectorFilter(lm, direction(make_lm(n_layers=5), 5))
    with pytest.raises(ConceptError):
        VectorFilter(lm, direction(make_lm(width=32), 1))
    with pytest.raises(ConceptError):
        ConceptInfluence(lm, direction(other, 1), answers)
    with pytest.raises(SiteError):
        GradDot(lm, answers, sites="no_such_layer")
    with pytest.raises(SiteError):
        ConceptInfluence(lm, direction(lm, 0), answers)
    with pytest.raises(CurvatureError, match="EKFAC.fit"):
        InfluenceFunction(lm, answers, curvature="kfac")
    with pytest.raises(CurvatureError, match="whose weights differ"):
        InfluenceFunction(lm, answers, curvature=EKFAC.fit(other, train, progress=False)).score(
            train, progress=False
        )
    with pytest.raises(CurvatureError, match="knows nothing of"):
        InfluenceFunction(lm, answers, sites="mlp", curvature=EKFAC.fit(lm, train, progress=False)).score(
            train, progress=False
        )
    with pytest.raises(ScorerError, match="share a name"):
        score_together([GradDot(lm, answers), GradDot(lm, answers[:1])], train)
    with pytest.raises(ScorerError, match="one model"):
        score_together([GradDot(lm, answers), VectorFilter(other, direction(other, 1))], train)
    with pytest.raises(GradientError, match="reaches none"):
        ConceptQuery(direction(lm, 1), answers).gradients(lm, resolve_sites(lm, r"layers\.2\."))


def test_all_zero_scores_are_an_error(train, answers):
    lm = make_lm()
    with torch.no_grad():
        lm.model.lm_head.weight.zero_()  # every loss gradient below the head is zero
    with pytest.raises((AttributionError, GradientError), match="every score is exactly 0|zero everywhere"):
        ActivationGradient(lm, direction(lm, 1)).score(train, progress=False)


def test_cut_examples_are_on_the_card(train, answers):
    lm = make_lm()
    longest = max(lm.tokenize(train).lengths)
    result = VectorFilter(lm, direction(lm, 1)).score(train, max_tokens=int(longest) - 1, progress=False)
    assert any("longer than" in note for note in result.card.notes)


def test_gradients_after_nnsight_was_used(train, answers):
    """nnsight replaces Tensor.backward by something that reads the source line it is called from; ours must
    not depend on it."""
    from pathlib import Path

    from concept_tda.foundation.storage import __file__ as storage
    from concept_tda.model.tracing import pooled_activations

    lm = make_lm()
    before = GradDot(lm, answers).score(train, progress=False).scores
    pooled_activations(lm, train, 1, progress=False)
    np.testing.assert_array_equal(GradDot(lm, answers).score(train, progress=False).scores, before)
    callers = [
        path.name
        for path in Path(storage).parent.glob("*.py")
        if any(
            ".backward()" in line and not line.lstrip().startswith(("#", '"'))
            for line in path.read_text().splitlines()
        )
    ]
    assert not callers, "use torch.autograd.backward(x) instead of x.backward()"
