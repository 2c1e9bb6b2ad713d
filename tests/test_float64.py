"""A float64 model computes in float64: scores against plain autograd to 1e-11 (Formulas §1, §4)."""

import numpy as np
import pytest
import torch

from concept_tda.concepts.concept import Concept, contrastive_concept, random_concepts, tensor_concept
from concept_tda.data.conversations import load_conversations
from concept_tda.influence.scorers import (
    ActivationGradient,
    ConceptInfluence,
    GradDot,
    InfluenceFunction,
    VectorFilter,
)
from concept_tda.model.loading import load_model
from concept_tda.model.sites import resolve_sites
from concept_tda.model.tracing import pooled_activations

from tiny import tiny_pair

FAMILIES = ("llama", "gemma", "gpt_neox", "gpt2")
WORDS = "the sky is blue and you are right about it yes no maybe".split()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCEPT_TDA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def train():
    rng = np.random.default_rng(0)
    text = lambda n: " ".join(rng.choice(WORDS, n))
    return load_conversations(
        [{"prompt": text(rng.integers(1, 6)), "response": text(rng.integers(1, 7))} for _ in range(6)]
    )


def forward(lm, conversation, layer):
    """(mean response loss, hidden states [1, T, d] at a layer, response mask) by transformers alone, in
    float64."""
    [item] = lm.tokenize(load_conversations([{"messages": list(conversation.messages)}]))
    found = {}
    hook = lm.blocks[layer - 1].register_forward_hook(
        lambda block, args, output: found.update(h=output[0] if isinstance(output, tuple) else output)
    )
    logp = lm.model(input_ids=item.input_ids[None], use_cache=False).logits[0].log_softmax(-1)
    hook.remove()
    said = item.response_mask[1:]
    loss = -logp[:-1][said].gather(1, item.input_ids[1:][said][:, None]).mean()
    return loss, found["h"], item.response_mask


def pooled(hidden_BTd, mask):
    return hidden_BTd[0, 1:][mask[1:]].mean(0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_agrees_with_autograd_to_the_last_digits(family, train):
    lm, layer = load_model(tiny_pair(family, n_layers=3, dtype=torch.float64)), 2
    direction = torch.randn(lm.width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    concept = tensor_concept(direction, layer=layer, lm=lm, name="any")
    assert concept.direction.dtype == torch.float64
    unit, queries = direction / direction.norm(), train[:2]
    sites = resolve_sites(lm, "attention", layer=layer)
    everywhere = resolve_sites(lm, "attention")
    below, weights = [s.module.weight for s in sites], [s.module.weight for s in everywhere]
    for weight in lm.model.parameters():
        weight.requires_grad_(True)

    def gradient(value, of):
        return torch.autograd.grad(value, of, allow_unused=True, retain_graph=True)

    def dot(a, b):
        return sum((x * y).sum().item() for x, y in zip(a, b) if x is not None and y is not None)

    asked = [forward(lm, q, layer) for q in queries]
    concept_gradient = gradient(sum(unit @ pooled(h, mask) for _, h, mask in asked) / len(asked), below)
    loss_gradient = gradient(-sum(loss for loss, _, _ in asked) / len(asked), weights)
    expected = {name: [] for name in ("VF", "AG", "CI", "GD")}
    for c in train:
        loss, hidden, mask = forward(lm, c, layer)
        own_below, own = gradient(loss, below), gradient(loss, weights)
        (g_BTd,) = torch.autograd.grad(loss, hidden, retain_graph=True)
        expected["VF"].append((unit @ pooled(hidden, mask)).item())
        expected["AG"].append(-(g_BTd[0, 1:][mask[1:]] @ unit).sum().item())
        expected["CI"].append(-dot(concept_gradient, own_below))
        expected["GD"].append(-dot(loss_gradient, own))
    for weight in lm.model.parameters():
        weight.requires_grad_(False)
    scorers = {
        "VF": VectorFilter(lm, concept),
        "AG": ActivationGradient(lm, concept),
        "CI": ConceptInfluence(lm, concept, queries, curvature="identity"),
        "GD": InfluenceFunction(lm, queries, curvature="identity"),
    }
    for name, scorer in scorers.items():
        scores = scorer.score(train, progress=False).scores
        error = np.abs(scores - expected[name]).max() / np.abs(expected[name]).max()
        assert error < 1e-11, (name, error)
    np.testing.assert_allclose(GradDot(lm, queries).score(train, progress=False).scores, scores, rtol=1e-12)


def test_activations_concepts_and_their_files_keep_full_precision(train, tmp_path):
    lm = load_model(tiny_pair("llama", dtype=torch.float64))
    acts = pooled_activations(lm, train, [1], progress=False)[1]
    assert acts.dtype == torch.float64
    for row, c in enumerate(train):
        with torch.no_grad():
            _, hidden, mask = forward(lm, c, 1)
        assert (acts[row] - pooled(hidden, mask)).abs().max() < 1e-14
    kept = pooled_activations(lm, train, [1], folder=tmp_path / "acts", progress=False)[1]
    assert torch.equal(kept, acts)
    concept = contrastive_concept(lm, train[:3], train[3:], 1, name="any", held_out=0, progress=False)
    assert concept.direction.dtype == torch.float64 and abs(concept.direction.norm() - 1) < 1e-15
    again = Concept.load(concept.save(tmp_path / "any.safetensors"))
    assert again.direction.dtype == torch.float64 and torch.equal(again.direction, concept.direction)
    assert all(
        c.direction.dtype == torch.float64
        for c in random_concepts(lm, train, like=concept, n=2, progress=False)
    )


def test_a_float32_model_stays_in_float32(train):
    lm = load_model(tiny_pair("llama"))
    assert pooled_activations(lm, train, [1], progress=False)[1].dtype == torch.float32
    concept = contrastive_concept(lm, train[:3], train[3:], 1, name="any", held_out=0, progress=False)
    assert concept.direction.dtype == torch.float32
    assert tensor_concept([1.0] * lm.width, layer=1, lm=lm, name="any").direction.dtype == torch.float32
