"""Whatever state a model comes in, its scores are those of a plain one, and it goes back in that state."""

import contextlib

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from concept_tda.concepts.concept import tensor_concept
from concept_tda.data.conversations import load_conversations
from concept_tda.data.messages import ConversationError
from concept_tda.influence.neighbours import GradCos, TracIn
from concept_tda.influence.scorers import (
    ActivationGradient,
    ConceptInfluence,
    GradDot,
    InfluenceFunction,
    ProjectionDifference,
    VectorFilter,
    score_together,
)
from concept_tda.model.loading import load_model

from tiny import tiny_model, tiny_pair, tiny_tokenizer

TRAIN = [
    {"prompt": "Is it?", "response": "yes"},
    {"prompt": "Is it so?", "response": "no, it is not"},
    {"prompt": "Is it so, or is it not so at all?", "response": "the sea is blue"},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCEPT_TDA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def train():
    return load_conversations(TRAIN)


def concept_of(lm):
    direction = torch.randn(lm.width, generator=torch.Generator().manual_seed(0))
    return tensor_concept(direction, layer=1, lm=lm, name="flattery")


def every_kind(lm, data):
    """Forward, generation, gradients to a layer, gradients of weights, curvature; one of each."""
    concept, queries = concept_of(lm), data[:1]
    return [
        VectorFilter(lm, concept),
        ProjectionDifference(lm, concept, max_new_tokens=4, progress=False),
        ActivationGradient(lm, concept),
        ConceptInfluence(lm, concept, queries, curvature="identity"),
        InfluenceFunction(lm, queries, sites="all-linear"),
        GradCos(lm, queries),
        TracIn([lm], queries, learning_rates=[1.0]),
    ]


def scores_of(lm, data):
    results = score_together(every_kind(lm, data), data, progress=False)
    return {method: result.scores for method, result in results.items()}


def expected_scores(data):
    return scores_of(load_model(tiny_pair("llama", dtype=torch.float64)), data)


def state(lm):
    """Everything a caller could find changed."""
    return {
        "mode": [module.training for module in lm.model.modules()],
        "hooks": [
            [len(hooks) for name, hooks in vars(module).items() if name.endswith("_hooks")]
            for module in lm.model.modules()
        ],
        "attributes": [sorted(vars(module)) for module in lm.model.modules()],
        "checkpointing": [getattr(m, "gradient_checkpointing", None) for m in lm.model.modules()],
        "compiled": [module._compiled_call_impl for module in lm.model.modules()],
        "frozen": [parameter.requires_grad for parameter in lm.model.parameters()],
        "gradients": [parameter.grad for parameter in lm.model.parameters()],
        "config": lm.model.config.to_dict(),
        "padding": (lm.tokenizer.padding_side, lm.tokenizer.pad_token),
        "gradient mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "weights": lm.fingerprint,
    }


def assert_right_and_as_found(lm, data, expected):
    before = state(lm)
    found = scores_of(lm, data)
    assert state(lm) == before
    for method, scores in expected.items():
        np.testing.assert_allclose(found[method], scores, rtol=1e-9, err_msg=method)


# --- what the caller left on ---


def with_dropout(share):
    """The tiny Llama with dropout in its attention, in training mode."""
    plain = tiny_model("llama", dtype=torch.float64)
    plain.config.attention_dropout = share
    model = LlamaForCausalLM(plain.config).to(torch.float64)
    model.load_state_dict(plain.state_dict())
    return model.train()


def test_train_mode_and_dropout_left_on(train):
    model, tokenizer = with_dropout(0.3), tiny_tokenizer()
    ids = torch.tensor([tokenizer("Is it so, or is it not so at all?").input_ids])
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, model(ids).logits)  # dropout really is on
    assert_right_and_as_found(load_model((model, tokenizer)), train, expected_scores(train))
    assert model.training and model.model.layers[0].self_attn.attention_dropout == 0.3


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_left_on(reentrant, train, monkeypatch):
    model, tokenizer = tiny_pair("llama", dtype=torch.float64)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    calls = []
    hook = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert len(calls) == 2  # the layer really ran twice
    hook.remove()
    model.zero_grad()
    assert_right_and_as_found(load_model((model, tokenizer)), train, expected_scores(train))
    assert model.is_gradient_checkpointing


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_caller_who_wants_no_gradients(mode, train):
    """`test_reasons.py` holds three methods to all digits; here is every kind, curvature included."""
    expected, lm = expected_scores(train), load_model(tiny_pair("llama", dtype=torch.float64))
    with mode():
        assert_right_and_as_found(lm, train, expected)


# --- compiled models ---


class Backend:
    """A compiler that compiles nothing and counts how often its code runs."""

    def __init__(self):
        self.runs = 0

    def __call__(self, graph, inputs):
        def run(*args):
            self.runs += 1
            return graph.forward(*args)

        return run


def wrapped(model, backend):
    return torch.compile(model, backend=backend)


def in_place(model, backend):
    model.compile(backend=backend)
    return model


def forward_only(model, backend):
    model.forward = torch.compile(model.forward, backend=backend)
    return model


def layer_by_layer(model, backend):
    for layer in model.model.layers:
        layer.compile(backend=backend)
    return model


@pytest.mark.parametrize("compiled", [wrapped, in_place, forward_only, layer_by_layer])
@pytest.mark.parametrize("used_before", [True, False])
def test_a_compiled_model(compiled, used_before, train):
    """Compiled code does not call hooks hung in it later: gradients of some calls would be missing."""
    expected = expected_scores(train)
    plain, tokenizer = tiny_pair("llama", dtype=torch.float64)
    ids, backend = torch.tensor([tokenizer("Is it so?").input_ids]), Backend()
    with contextlib.ExitStack() as stack:
        stack.callback(torch._dynamo.reset)
        model = compiled(plain, backend)
        if used_before:
            with torch.no_grad():
                model(ids)
            assert backend.runs
        runs = backend.runs
        assert_right_and_as_found(load_model((model, tokenizer)), train, expected)
        assert backend.runs == runs  # read as it was written …
        with torch.no_grad():
            model(ids)
        assert backend.runs > runs  # … and compiled again for its owner


# --- the examples ---


def test_one_example(train):
    lm = load_model(tiny_pair("llama", dtype=torch.float64))
    concept, queries = concept_of(lm), train[1:]
    scorers = [
        VectorFilter(lm, concept),
        ConceptInfluence(lm, concept, queries, curvature="identity"),
        GradDot(lm, queries),
    ]
    among_others = score_together(scorers, train, progress=False)
    for method, result in score_together(scorers, train[:1], progress=False).items():
        assert len(result) == 1 and result.ranks.tolist() == [1]
        np.testing.assert_allclose(result.scores, among_others[method].scores[:1], rtol=1e-9)


def test_curvature_of_one_example(train):
    lm = load_model(tiny_pair("llama", dtype=torch.float64))
    result = InfluenceFunction(lm, train[1:]).score(train[:1], progress=False)
    assert np.isfinite(result.scores).all() and result.scores[0] != 0


def test_a_prompt_longer_than_max_tokens_is_named(train):
    lm = load_model(tiny_pair("llama"))
    data = load_conversations([*TRAIN, {"prompt": "why " * 60, "response": "yes"}])
    lm.model.train()
    before = state(lm)
    for scorer in every_kind(lm, train):
        with pytest.raises(ConversationError, match=f"no response tokens left.*{data.ids[3]}"):
            scorer.score(data, max_tokens=60, progress=False)
    assert state(lm) == before


def test_an_answer_cut_at_max_tokens_is_on_every_card(train):
    lm = load_model(tiny_pair("llama"))
    limit = int(max(lm.tokenize(train).lengths)) - 1
    for scorer in every_kind(lm, train):
        with pytest.warns(UserWarning, match="were cut"):
            result = scorer.score(train, max_tokens=limit, progress=False)
        assert any(f"longer than {limit} tokens and were cut there" in note for note in result.card.notes)


def test_equal_examples_have_equal_scores_in_whatever_batch():
    """In float32 the same text differs in its last digits from batch to batch; cuts would fall at random."""
    long = {"prompt": "Why", "response": "the sky is blue " * 9}
    data = load_conversations([{**row, "n": i} for i, row in enumerate([*TRAIN, TRAIN[0], long] * 4)])
    twins = [i for i, id in enumerate(data.ids) if id == data.ids[0]]
    lm = load_model(tiny_pair("llama"))
    cuts = {}
    for budget in (1, 60, 128, 700, 4096):
        results = score_together(every_kind(lm, data), data, progress=False, tokens=True, token_budget=budget)
        for method, result in results.items():
            assert len(twins) == 8 and len(set(result.scores)) == 4, (method, budget)
            assert len({tuple(result.token_scores[row]) for row in twins}) == 1
            kept = [c.metadata["n"] for c in result.drop(fraction=0.3)]
            assert cuts.setdefault(method, kept) == kept and len(kept) == 14
            order = np.argsort(-result.scores, kind="stable")  # ties by row
            assert kept == sorted(order[6:].tolist())
