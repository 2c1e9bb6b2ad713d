"""The engines for -⟨q, ∇L(z)⟩ against each other, and what each of them does to the model (Formulas §4)."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from concept_tda.data.batches import batches
from concept_tda.data.conversations import load_conversations
from concept_tda.influence.engine import (
    DifferenceReadout,
    DirectionReadout,
    EngineError,
    difference_adapters,
    direction_readout,
    shared_pass,
)
from concept_tda.influence.scorers import GradDot, InfluenceFunction
from concept_tda.model.loading import load_model
from concept_tda.model.losses import loss_weights, token_losses
from concept_tda.model.sites import resolve_sites

from tiny import tiny_pair

WORDS = "the sky is blue and you are right about it yes no maybe so what is two plus four".split()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCEPT_TDA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def train():
    rng = np.random.default_rng(0)
    text = lambda n: " ".join(rng.choice(WORDS, n))
    return load_conversations(
        [{"prompt": text(rng.integers(1, 6)), "response": text(rng.integers(1, 8))} for _ in range(24)]
    )


def random_directions(sites, n=1, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        s.name: torch.randn(n, s.out_features, s.in_features, generator=generator).to(dtype) for s in sites
    }


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("pattern", ["attention", "all-linear"])
def test_engines_agree(family, pattern, train):
    lm = load_model(tiny_pair(family, n_layers=3))  # float32: the tolerances are those of Formulas §4
    sites = resolve_sites(lm, pattern)
    directions = random_directions(sites, n=2)
    weights = lm.fingerprint
    scores = {
        engine: shared_pass(lm, train, {"s": direction_readout(sites, directions, engine)}, progress=False)[
            "s"
        ].scores
        for engine in ("reverse", "stacked", "forward", "difference")
    }
    assert lm.fingerprint == weights and not any(m._forward_hooks for m in lm.model.modules())
    size = np.abs(scores["reverse"]).max()
    for engine in ("stacked", "forward"):
        assert np.abs(scores[engine] - scores["reverse"]).max() / size < 1e-5, engine
    assert np.abs(scores["difference"] - scores["reverse"]).max() / size < 1e-2
    for query in range(2):
        assert spearmanr(scores["difference"][:, query], scores["reverse"][:, query]).statistic > 0.999


def test_tokens_of_each_engine_sum_to_the_score(train):
    lm = load_model(tiny_pair("llama"))
    sites = resolve_sites(lm, "attention")
    for engine in ("reverse", "forward", "difference"):
        result = shared_pass(
            lm,
            train,
            {"s": direction_readout(sites, random_directions(sites), engine)},
            tokens=True,
            progress=False,
        )["s"]
        np.testing.assert_allclose(
            [tokens.sum() for tokens in result.token_scores], result.scores[:, 0], rtol=1e-3, atol=1e-4
        )
        data = lm.tokenize(train)
        if engine != "reverse":  # blame falls on loss tokens only
            for tokens, example in zip(result.token_scores, data):
                assert not tokens[0][~example.response_mask.numpy()].any()


def test_difference_puts_the_weights_back_after_an_error(train, monkeypatch):
    import concept_tda.influence.engine as directional

    lm = load_model(tiny_pair("gpt2"))
    weights = {name: p.data_ptr() for name, p in lm.model.named_parameters()}
    sites = resolve_sites(lm, "attention")
    monkeypatch.setattr(directional, "token_losses", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        shared_pass(lm, train, {"s": DifferenceReadout(sites, random_directions(sites))}, progress=False)
    assert {name: p.data_ptr() for name, p in lm.model.named_parameters()} == weights


def test_adapters_give_the_difference(tmp_path, train):
    from peft import PeftModel

    lm = load_model(tiny_pair("llama", dtype=torch.float64))
    sites = resolve_sites(lm, "attention")
    q = {name: d[0].double() for name, d in random_directions(sites).items()}
    expected = shared_pass(lm, train, {"s": DirectionReadout(sites, q)}, progress=False)["s"].scores[:, 0]
    epsilon, kept = difference_adapters(sites, q, tmp_path, rank=16)
    assert kept == pytest.approx(1)  # the layers have no more than 16 dimensions
    assert difference_adapters(sites, q, tmp_path / "low", rank=2)[1] < 0.6
    losses = {}
    for name in ("plus", "minus"):
        model = load_model(
            (
                PeftModel.from_pretrained(
                    tiny_pair("llama", dtype=torch.float64)[0], tmp_path / name, autocast_adapter_dtype=False
                ).double(),
                lm.tokenizer,
            )
        )
        losses[name] = np.zeros(len(train))
        with torch.no_grad():
            for batch in batches(model.tokenize(train)):
                losses[name][batch.rows] = (token_losses(model, batch) * loss_weights(batch)).sum(1)
    np.testing.assert_allclose(
        (losses["minus"] - losses["plus"]) / (2 * epsilon),
        expected,
        rtol=5e-2,
        atol=5e-3 * np.abs(expected).max(),
    )


def test_the_choice_is_explained(train):
    lm = load_model(tiny_pair("llama"))
    sites = resolve_sites(lm, "attention")
    assert "reverse" in direction_readout(sites, random_directions(sites)).why
    assert "stacked" in direction_readout(sites, random_directions(sites, 64)).why
    assert "reverse" in direction_readout(sites, random_directions(sites, 64), tokens=True).why
    result = InfluenceFunction(lm, train[:2], curvature="identity", engine="forward").score(
        train, progress=False
    )
    assert any("forward engine" in note for note in result.card.notes)
    assert any(
        "reverse engine" in note for note in GradDot(lm, train[:2]).score(train, progress=False).card.notes
    )


def test_errors(train):
    lm = load_model(tiny_pair("llama"))
    sites = resolve_sites(lm, "attention")
    with pytest.raises(EngineError, match="unknown engine"):
        direction_readout(sites, random_directions(sites), "sideways")
    with pytest.raises(EngineError, match="GiB"):
        direction_readout(sites, random_directions(sites, 8), memory_budget=1000)
    with pytest.raises(EngineError, match="Conv1D"):
        gpt2 = resolve_sites(load_model(tiny_pair("gpt2")), "attention")
        difference_adapters(gpt2, {name: d[0] for name, d in random_directions(gpt2).items()}, "/nowhere")
    half = load_model(tiny_pair("llama", dtype=torch.bfloat16))
    sites = resolve_sites(half, "attention")
    with pytest.raises(EngineError, match="bfloat16"):
        shared_pass(
            half,
            train,
            {"s": direction_readout(sites, random_directions(sites), "difference")},
            progress=False,
        )
