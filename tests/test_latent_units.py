"""Latents of an SAE as units: against an SAE written into the model and differentiated by autograd."""

import numpy as np
import pytest
import torch

from concept_tda.data.batches import batches
from concept_tda.groups.sae import SAEError, SparseAutoencoder
from concept_tda.influence.gradients import check_sites
from concept_tda.influence.queries import LossQuery
from concept_tda.mechanisms.circuits import (
    CircuitError,
    CopyProbe,
    UnitEKFAC,
    UnitInfluence,
    random_sequences,
    repeated_sequences,
)
from concept_tda.mechanisms.latent_units import latent_units
from concept_tda.model.loading import load_model
from concept_tda.model.losses import loss_weights, token_losses
from concept_tda.model.sites import resolve_sites

from tiny import double_norms, tiny_pair

F, LATENTS = 14, [2, 9]


class Code(torch.nn.Module):
    """An SAE with both biases; `kind`: relu, topk (four latents a token), jump (a threshold)."""

    def __init__(self, width, kind="relu", shifted=True, dtype=torch.float64):
        super().__init__()
        random = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.nn.Parameter(torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype))

        self.kind, self.shifted = kind, shifted
        self.W_enc, self.W_dec = draw(width, F), draw(F, width)
        self.b_enc, self.b_dec = draw(F), draw(width)
        self.b_enc.data[LATENTS] += 4  # so that these fire often

    def encode(self, acts):
        pre = (acts - self.b_dec if self.shifted else acts) @ self.W_enc + self.b_enc
        if self.kind == "jump":
            return pre * (pre > 0.3)
        if self.kind == "topk":
            kept = torch.zeros_like(pre).scatter(-1, pre.topk(4, -1).indices, 1)
            return pre.relu() * kept
        return pre.relu()

    def decode(self, codes):
        return codes @ self.W_dec + self.b_dec


def opened(family, dtype=torch.float64):
    model, tokenizer = tiny_pair(family, dtype=dtype, attention="eager")
    return load_model((double_norms(model) if dtype == torch.float64 else model, tokenizer))


def with_error_node(lm, code, layer):
    """Hook: reconstruction plus error node, the whole SAE in the graph of its weights."""

    def after(block, args, output):
        h = output[0] if isinstance(output, tuple) else output
        said = code.decode(code.encode(h.detach()))
        new = said + (h - said.detach())
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return lm.blocks[layer - 1].register_forward_hook(after)


def autograd_rows(lm, code, layer, windows):
    """Gradient of each window's loss by read rows [N, n, d] and write rows [N, n, d] of LATENTS."""
    reads, writes = [], []
    hook = with_error_node(lm, code, layer)
    for batch in batches(lm.tokenize(windows), token_budget=1):
        loss = (token_losses(lm, batch) * loss_weights(batch, dtype=torch.float64)).sum()
        by_enc, by_dec = torch.autograd.grad(loss, [code.W_enc, code.W_dec])
        reads.append((int(batch.rows[0]), by_enc.T[LATENTS]))
        writes.append((int(batch.rows[0]), by_dec[LATENTS]))
    hook.remove()
    return [torch.stack([part for _, part in sorted(one, key=lambda pair: pair[0])])
            for one in (reads, writes)]  # fmt: skip


@pytest.mark.parametrize("family", ("llama", "gpt_neox"))
@pytest.mark.parametrize(("kind", "shifted"), (("relu", True), ("topk", True), ("jump", False)))
def test_gradients_of_examples_are_those_of_an_sae_in_the_model(family, kind, shifted):
    lm = opened(family)
    code = Code(lm.width, kind, shifted)
    sae, windows = SparseAutoencoder(code, 1, "random"), random_sequences(lm, 5, 9)
    reads, writes = autograd_rows(lm, code, 1, windows)
    assert all(one.abs().max() > 1e-4 for one in (reads, writes)), "the chosen latents fire"
    with latent_units(lm, sae, LATENTS) as latents:
        units = [unit for latent in latents for unit in latent.units]
        check_sites(lm, units, lm.tokenize(windows))
        firing = [row for row in range(len(windows)) if reads[row].any()]
        assert len(firing) > 1
        for row in firing:
            found = LossQuery(windows.select([row])).gradients(lm, units)  # minus the gradient of the loss
            for i, latent in enumerate(latents):
                torch.testing.assert_close(
                    -found[latent.read.name], reads[row, i : i + 1], rtol=1e-9, atol=1e-14
                )
                torch.testing.assert_close(
                    -found[latent.write.name], writes[row, i][:, None], rtol=1e-9, atol=1e-14
                )


@pytest.mark.parametrize("family", ("llama", "gpt_neox", "gpt2"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
def test_the_model_says_the_same_bits_and_is_left_as_found(family, dtype):
    lm = opened(family, dtype)
    sae = SparseAutoencoder(Code(lm.width, dtype=torch.float32), 2, "random")
    ids = torch.arange(5, 25).view(2, 10)
    before, fingerprint, hooks = lm.model(ids).logits, lm.fingerprint, len(lm.blocks[1]._forward_hooks)
    names = [name for name, _ in lm.model.named_parameters()]
    with latent_units(lm, sae, [0, 3]):
        assert torch.equal(lm.model(ids).logits, before)
        assert lm.fingerprint != fingerprint
        with pytest.raises(CircuitError, match="already"), latent_units(lm, sae, [1]):
            pass
    with pytest.raises(ZeroDivisionError), latent_units(lm, sae, [0]):
        raise ZeroDivisionError
    assert torch.equal(lm.model(ids).logits, before) and lm.fingerprint == fingerprint
    assert names == [name for name, _ in lm.model.named_parameters()]
    assert len(lm.blocks[1]._forward_hooks) == hooks


def test_gradients_of_the_models_own_weights_stay():
    lm = opened("llama")
    windows = random_sequences(lm, 3, 8)
    sites = resolve_sites(lm, "attention")
    before = LossQuery(windows).gradients(lm, sites)
    with latent_units(lm, SparseAutoencoder(Code(lm.width), 1, "random"), LATENTS):
        after = LossQuery(windows).gradients(lm, sites)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_curvature_of_a_latent_is_the_dense_construction():
    lm = opened("gpt_neox")
    code, windows = Code(lm.width), random_sequences(lm, 30, 7)
    reads, writes = autograd_rows(lm, code, 1, windows)
    n = 6  # learned tokens of a window; gradients are of the mean over them
    with latent_units(lm, SparseAutoencoder(code, 1, "random"), LATENTS) as latents:
        latent = latents[1]
        curvature = UnitEKFAC.fit(lm, windows, latent.units, labels="empirical", progress=False, cache=False)
    for unit, rows in ((latent.read, reads[:, 1]), (latent.write, writes[:, 1])):
        fisher = torch.einsum("na,nb->ab", rows * n, rows * n) / (30 * n)
        factors = curvature.factors[unit.name]
        U = torch.kron(factors.Q_out, factors.Q_in)
        torch.testing.assert_close(U @ U.T, torch.eye(lm.width, dtype=torch.float64), rtol=1e-8, atol=1e-10)
        eigenvalues = (U.T @ fisher @ U).diagonal().view(unit.weight.shape)
        torch.testing.assert_close(factors.eigenvalues, eigenvalues, rtol=1e-7, atol=1e-14)
        G = torch.randn(unit.weight.shape, dtype=torch.float64)
        damping = max(0.1 * eigenvalues.mean().item(), 1e-5)
        solved = U @ ((U.T @ G.flatten()) / (eigenvalues.flatten() + damping))
        found = curvature.precondition({unit.name: G})[unit.name]
        assert (found.flatten() - solved).norm() < 1e-7 * solved.norm()


@pytest.mark.parametrize("family", ("llama", "gpt_neox"))
def test_engines_agree_and_a_step_raises_the_probe_as_predicted(family):
    lm = opened(family)
    windows, probe = random_sequences(lm, 6, 8, seed=3), CopyProbe(repeated_sequences(lm, 3, 4))
    with latent_units(lm, SparseAutoencoder(Code(lm.width), 1, "random"), LATENTS) as latents:
        units = [unit for latent in latents for unit in latent.units]
        scores = {
            engine: UnitInfluence(lm, probe, units, curvature="identity", engine=engine)
            .score(windows, progress=False)
            .scores
            for engine in ("reverse", "stacked", "forward", "difference")
        }
        for engine, rel in (("stacked", 1e-6), ("forward", 1e-6), ("difference", 1e-2)):
            size = np.abs(scores["reverse"]).max()
            assert scores[engine] == pytest.approx(scores["reverse"], rel=rel, abs=rel * size)
        top = int(scores["reverse"].argmax())
        step, before, size = LossQuery(windows.select([top])).gradients(lm, units), probe.value(lm), 1e-5
        with torch.no_grad():
            for i, latent in enumerate(latents):
                latent.read.parts[0].site.module.weight[i] += size * step[latent.read.name][0]
                latent.write.parts[0].site.module.weight[:, i] += size * step[latent.write.name][:, 0]
        change = (probe.value(lm) - before) / size
    assert change > 0 and change == pytest.approx(scores["reverse"][top], rel=1e-2)


def test_what_cannot_be_asked_is_refused():
    lm = opened("llama")
    for sae, asked, error, said in (
        (SparseAutoencoder(Code(lm.width), 1, "x"), [F], CircuitError, "0 to 13"),
        (SparseAutoencoder(Code(lm.width), 1, "x"), [1, 1], CircuitError, "different"),
        (SparseAutoencoder(Code(lm.width), 0, "x"), [1], CircuitError, "layer 0"),
        (SparseAutoencoder(Code(lm.width + 1), 1, "x"), [1], SAEError, "width"),
    ):
        with pytest.raises(error, match=said), latent_units(lm, sae, asked):
            pass
    scaled = Code(lm.width)
    plain = scaled.encode
    scaled.encode = lambda acts: plain(acts / acts.norm(dim=-1, keepdim=True))
    with (
        pytest.raises(CircuitError, match="not linear"),
        latent_units(lm, SparseAutoencoder(scaled, 1, "scaled"), [1]),
    ):
        pass
