"""A model whose weights are in main memory or on disk until their layer is called gives what it gives
with them in place: fingerprint, forward scorers, every engine, curvature, adapters."""

import peft
import pytest
import torch
from accelerate import cpu_offload, disk_offload

import concept_tda.foundation.offloading as offloading
from concept_tda.concepts.concept import Concept
from concept_tda.data.batches import batches
from concept_tda.data.conversations import load_conversations
from concept_tda.foundation.offloading import away, fetched, lost, weights_of
from concept_tda.influence.baselines import MeanLoss, RepSim
from concept_tda.influence.curvature import EKFAC
from concept_tda.influence.engine import direction_readout, shared_pass
from concept_tda.influence.gradients import SiteGradients
from concept_tda.influence.scorers import ConceptInfluence, GradDot, InfluenceFunction, VectorFilter
from concept_tda.model.finetuning import FinetuneError, finetune
from concept_tda.model.loading import ModelError, load_model
from concept_tda.model.losses import loss_weights, token_losses
from concept_tda.model.sites import resolve_sites
from concept_tda.model.training import TrainingError, train

from tiny import tiny_pair

DATA = load_conversations(
    [
        {"prompt": f"Is it{' so' * (i % 4)}?", "response": "yes it is" if i % 2 else "no " * (i + 1)}
        for i in range(6)
    ]
)
QUERY = load_conversations([{"prompt": "Is it so?", "response": "no no"}])
ENDS = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
PLACES = {
    "one on disk": ENDS | {"model.layers.0": "cpu", "model.layers.1": "disk"},
    "all on disk": dict.fromkeys([*ENDS, "model.layers.0", "model.layers.1"], "disk"),
}


def saved(folder, family="llama", dtype=torch.float64):
    model, tokenizer = tiny_pair(family, dtype=dtype)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


def opened(kind, folder, dtype=torch.float64, family="llama"):
    """The same model twice: with its weights in place, and with them elsewhere."""
    place = saved(folder, family, dtype)
    plain = load_model(place, dtype=dtype, device="cpu")
    if kind in PLACES:
        return plain, load_model(
            place, dtype=dtype, device_map=PLACES[kind], offload_folder=folder / "offloaded"
        )
    model = load_model(place, dtype=dtype, device="cpu").model
    if kind == "in main memory":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, folder / "offloaded", execution_device=torch.device("cpu"))
    return plain, load_model((model, plain.tokenizer))


KINDS = [*PLACES, "in main memory", "in files of accelerate's own"]


@pytest.fixture(params=KINDS)
def pair(request, tmp_path):
    return opened(request.param, tmp_path)


def a_concept(lm, layer=1):
    generator = torch.Generator().manual_seed(3)
    return Concept("it", torch.randn(lm.width, generator=generator, dtype=torch.float64), layer)


def scores(lm, scorer, data=DATA):
    return torch.tensor(scorer(lm).score(data, progress=False).scores)


def test_it_is_the_same_model(pair):
    plain, far = pair
    assert away(far.model) and not away(plain.model) and not lost(far.model)
    assert far.fingerprint == plain.fingerprint and far.n_parameters == plain.n_parameters
    assert far.device == plain.device and far.dtype == plain.dtype
    flags = [p.requires_grad for p in far.model.parameters()]
    logits = []
    for lm in pair:
        with lm.undisturbed(), torch.no_grad():
            logits.append(lm.model(input_ids=torch.arange(9)[None]).logits)
    assert torch.equal(*logits)
    assert far.fingerprint == plain.fingerprint and [p.requires_grad for p in far.model.parameters()] == flags


@pytest.mark.parametrize(
    "scorer",
    [
        lambda lm: VectorFilter(lm, a_concept(lm)),
        lambda lm: RepSim(lm, QUERY, layer=1),
        MeanLoss,
        lambda lm: GradDot(lm, QUERY, sites="all-linear"),
        lambda lm: ConceptInfluence(lm, a_concept(lm, 2), QUERY, curvature="identity"),
    ],
)
def test_scorers(pair, scorer):
    expected, found = (scores(lm, scorer) for lm in pair)
    assert torch.equal(expected, found)


@pytest.mark.parametrize("engine", ["reverse", "stacked", "forward", "difference"])
def test_every_engine(pair, engine):
    found = []
    for lm in pair:
        sites = resolve_sites(lm, "attention")
        generator = torch.Generator().manual_seed(0)
        directions = {
            s.name: torch.randn(2, s.out_features, s.in_features, generator=generator, dtype=torch.float64)
            for s in sites
        }
        readout = direction_readout(sites, directions, engine)
        found.append(torch.as_tensor(shared_pass(lm, DATA, {"it": readout}, progress=False)["it"].scores))
    assert torch.allclose(*found, rtol=1e-12, atol=0)


def test_influence_with_curvature(tmp_path):
    found = []
    for lm in opened("one on disk", tmp_path):
        curvature = EKFAC.fit(lm, DATA, sites="all-linear", labels="empirical", cache=False, progress=False)
        found.append(
            scores(lm, lambda lm: InfluenceFunction(lm, QUERY, sites="all-linear", curvature=curvature))
        )
    assert torch.allclose(*found, rtol=1e-9, atol=0)


def test_the_gradient_of_the_sites_is_autograds(tmp_path):
    plain, far = opened("all on disk", tmp_path)
    sites = resolve_sites(far, "all-linear")
    batch = next(batches(far.tokenize(DATA), token_budget=10**6))
    with far.undisturbed(), torch.enable_grad(), SiteGradients(sites) as gradients:
        (token_losses(far, batch) * loss_weights(batch, dtype=torch.float64)).sum().backward()
    weights = [plain.model.get_submodule(s.name).weight for s in sites]
    loss = (token_losses(plain, batch) * loss_weights(batch, dtype=torch.float64)).sum()
    for site, expected in zip(sites, torch.autograd.grad(loss, weights)):
        assert torch.allclose(gradients[site.name], expected, rtol=1e-10, atol=1e-14)


def test_a_backward_pass_fetches_and_does_not_keep(tmp_path, monkeypatch):
    """Between the two passes no note of the graph holds a weight: each is read from disk once more."""
    _, far = opened("all on disk", tmp_path)
    notes = []
    fetch = offloading._Note.fetch
    monkeypatch.setattr(offloading._Note, "fetch", lambda note: notes.append(note.name) or fetch(note))
    batch = next(batches(far.tokenize(DATA), token_budget=10**6))
    kept, sizes = [], {weight().shape for name, weight in weights_of(far.model).items() if "norm" not in name}
    with far.undisturbed(), torch.enable_grad():
        keep = offloading._Kept.keep
        monkeypatch.setattr(
            offloading._Kept, "keep", lambda own, tensor: kept.append(keep(own, tensor)) or kept[-1]
        )
        first = far.model.model.layers[0].self_attn.q_proj
        first.register_forward_hook(lambda module, args, output: output.requires_grad_())
        loss = token_losses(far, batch).sum()
        assert not notes
        loss.backward()
    matrices = [
        one for one in kept if isinstance(one, torch.Tensor) and one.shape in sizes | {s[::-1] for s in sizes}
    ]
    assert not matrices and len(notes) >= 2 * 7 - 3  # everything above the first projections, and the head


def test_float32_and_shared_embeddings(tmp_path):
    plain, far = opened("all on disk", tmp_path, torch.float32, "llama-tied")
    for _ in range(2):
        expected, found = (scores(lm, lambda lm: GradDot(lm, QUERY)) for lm in (plain, far))
        assert torch.equal(expected, found) and far.fingerprint == plain.fingerprint
        assert far.n_parameters == plain.n_parameters


def test_dtype_is_the_one_asked_for(tmp_path):
    place = saved(tmp_path, dtype=torch.float32)
    far = load_model(place, dtype="float64", device_map=PLACES["all on disk"])
    assert far.dtype == torch.float64 == fetched(far.blocks[0].mlp.up_proj).dtype
    assert torch.equal(
        scores(far, MeanLoss), scores(load_model(place, dtype="float64", device="cpu"), MeanLoss)
    )


@pytest.mark.parametrize("kind", PLACES)
def test_an_adapter_over_weights_that_are_elsewhere(kind, tmp_path):
    place = saved(tmp_path)
    adapted = peft.get_peft_model(
        load_model(place, dtype="float64", device="cpu").model,
        peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            weight.add_("lora_B" in name)
    adapted.save_pretrained(tmp_path / "adapter")
    options = dict(adapter=tmp_path / "adapter", dtype="float64")
    plain, far = (
        load_model(place, device="cpu", **options),
        load_model(place, device_map=PLACES[kind], **options),
    )
    assert far.fingerprint == plain.fingerprint and all("lora" not in name for name in away(far.model))
    for sites in "lora", "attention":
        expected, found = (scores(lm, lambda lm: GradDot(lm, QUERY, sites=sites)) for lm in (plain, far))
        assert torch.equal(expected, found)
    with pytest.raises(ModelError, match="merge=False"):
        load_model(place, merge=True, device_map=PLACES[kind], **options)


def test_what_cannot_be_done_is_refused(tmp_path):
    _, far = opened("one on disk", tmp_path)
    with pytest.raises(TrainingError, match="offloaded"):
        train(far, DATA, tmp_path / "run")
    with pytest.raises(FinetuneError, match="elsewhere .* without device_map"):
        finetune(far, DATA, tmp_path / "ft", progress=False)
    model, tokenizer = tiny_pair("llama")
    model.model.layers[1].to("meta")
    with pytest.raises(ModelError, match=r"hold no numbers \(the first: model\.layers\.1"):
        load_model((model, tokenizer))
