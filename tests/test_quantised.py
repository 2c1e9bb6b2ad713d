"""A model whose linear layers are kept in 8 or 4 bits: passes are like any other, the reverse engine gives
autograd's own gradient of the adapter above them, and they are no sites themselves."""

import copy

import peft
import pytest
import torch
from torch import nn

from concept_tda.data.batches import batches
from concept_tda.data.conversations import load_conversations
from concept_tda.influence.baselines import MeanLoss
from concept_tda.influence.doctor import doctor
from concept_tda.influence.engine import direction_readout, shared_pass
from concept_tda.influence.scorers import GradDot
from concept_tda.model.loading import load_model
from concept_tda.model.losses import loss_weights, token_losses
from concept_tda.model.sites import SiteError, resolve_sites

from tiny import tiny_pair

DATA = load_conversations(
    [
        {"prompt": f"Is it{' so' * (i % 4)}?", "response": "yes it is" if i % 2 else "no " * (i + 1)}
        for i in range(6)
    ]
)
QUERY = load_conversations([{"prompt": "Is it so?", "response": "no no"}])


def in_blocks(module, name):
    return isinstance(module, nn.Linear) and "layers" in name


def torchao(bits):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    config = (
        Int8WeightOnlyConfig()
        if bits == 8
        else IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    )

    def quantise(model):
        quantize_(model, config, in_blocks)

    return quantise


@pytest.fixture(params=[8, 4], ids="{} bits".format)
def quantised(request):
    """A quantised model, and the same with an adapter whose factors are both random."""
    quantise = torchao(request.param)
    model, tokenizer = tiny_pair("llama", width=64)
    plain = load_model((copy.deepcopy(model), tokenizer))
    quantise(model)
    bare = load_model((model, tokenizer))
    losses = [MeanLoss(lm).score(DATA, progress=False).scores for lm in (plain, bare)]
    fingerprints = bare.fingerprint, plain.fingerprint
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) / 8)
    return load_model((adapted, tokenizer)), losses, fingerprints


def directions_of(sites, n=2):
    generator = torch.Generator().manual_seed(1)
    return {s.name: torch.randn(n, s.out_features, s.in_features, generator=generator) for s in sites}


def autograds(lm, sites, directions):
    """-⟨q, ∇L(z)⟩ of every example by itself, by autograd with respect to the adapter's weights."""
    data, found = lm.tokenize(DATA), torch.zeros(len(DATA), 2)
    weights = [site.module.weight.requires_grad_() for site in sites]
    for row in range(len(data)):
        batch = next(batches(data, rows=[row]))
        loss = (token_losses(lm, batch) * loss_weights(batch)).sum()
        for site, gradient in zip(sites, torch.autograd.grad(loss, weights)):
            found[row] -= (directions[site.name] * gradient).sum((1, 2))
    return found


@pytest.mark.parametrize("engine", ["reverse", "stacked", "forward"])
def test_the_engine_gives_autograds_gradient_of_the_adapter(quantised, engine):
    lm, _, _ = quantised
    sites = resolve_sites(lm, "lora")
    directions = directions_of(sites)
    expected = autograds(lm, sites, directions)
    for token_budget in (1, 1024):  # one at a time, and padded together
        readouts = {"it": direction_readout(sites, directions, engine)}
        found = shared_pass(lm, DATA, readouts, token_budget=token_budget, progress=False)["it"].scores
        assert torch.allclose(
            torch.tensor(found).float(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max()
        )


def test_what_is_quantised_is_close_to_what_it_was_and_another_model(quantised):
    lm, (plain, bare), (quantised_print, plain_print) = quantised
    assert abs(plain - bare).max() < 0.2 * abs(plain).max() and (plain != bare).any()
    assert quantised_print != plain_print and len(
        GradDot(lm, QUERY, sites="lora").score(DATA, progress=False).scores
    )


def test_the_fingerprint_hears_every_part(quantised):
    """It is the same after a pass, and another one with other scales."""
    lm, _, _ = quantised
    before = lm.fingerprint
    MeanLoss(lm).score(DATA, progress=False)
    assert lm.fingerprint == before
    weight = lm.model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").weight
    weight.scale.mul_(2)
    assert lm.fingerprint != before


def test_quantised_layers_are_no_sites_and_the_way_out_is_named(quantised):
    lm, _, _ = quantised
    with pytest.raises(SiteError, match='quantised weight .*LoRA adapter .*sites="lora"'):
        resolve_sites(lm, "attention")
    with pytest.raises(SiteError, match="quantised weight"):
        GradDot(lm, QUERY).score(DATA, progress=False)
    assert "finite" in str(doctor(lm, DATA))


def test_quantised_while_it_is_opened(tmp_path):
    torchao(8)
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    for part in tiny_pair("llama", width=64):
        part.save_pretrained(tmp_path)
    lm = load_model(tmp_path, quantization=TorchAoConfig(Int8WeightOnlyConfig()))
    plain = load_model(tmp_path, device="cpu")
    with pytest.raises(SiteError, match="quantised weight"):
        resolve_sites(lm)
    found = [MeanLoss(one).score(DATA, progress=False).scores for one in (lm, plain)]
    assert abs(found[0] - found[1]).max() < 0.05 * abs(found[1]).max() and lm.fingerprint != plain.fingerprint
