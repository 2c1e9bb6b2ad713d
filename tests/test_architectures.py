"""Scores on many architectures, adapters and layouts against plain autograd, in float64.

What is known of a model here is what its owner knows: nothing about how its layers are called. Each score is
compared with the derivative that autograd gives for the weights, one unpadded example at a time."""

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from concept_tda.concepts.concept import tensor_concept
from concept_tda.data.batches import batches
from concept_tda.data.conversations import load_conversations
from concept_tda.influence.curvature import EKFAC
from concept_tda.influence.doctor import doctor
from concept_tda.influence.engine import EngineError
from concept_tda.influence.gradients import by_example, check_sites, hidden_states, site_flows
from concept_tda.influence.neighbours import GradCos
from concept_tda.influence.planning import plan
from concept_tda.influence.queries import ConceptQuery, LossQuery
from concept_tda.influence.scorers import GradDot, Influence
from concept_tda.model.loading import SiteError, load_model
from concept_tda.model.sites import Site, coverage, resolve_sites

from tiny import tiny_tokenizer

SIZES = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=0,
    eos_token_id=2,
    pad_token_id=0,
)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2)
LATENT = dict(
    num_key_value_heads=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    moe_intermediate_size=16,
    first_k_dense_replace=1,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
)
ARCHITECTURES = {
    "Llama": {},
    "Mistral": dict(sliding_window=8),
    "Qwen2": {},
    "Qwen3": dict(head_dim=8),
    "Gemma": dict(head_dim=8),
    # in float64 its eager attention makes NaN of a padding row that sees padding only; the engine says so
    "Gemma2": dict(head_dim=8, sliding_window=256),
    "Gemma3": dict(head_dim=8, sliding_window=8),
    "Phi": {},
    "Phi3": {},
    "GPTNeoX": {},
    "GPT2": {},
    "OPT": dict(ffn_dim=24, word_embed_proj_dim=16),
    "Falcon": {},
    "StableLm": {},
    "Cohere": {},
    "Olmo2": {},
    "Granite": {},
    "Bloom": dict(n_head=4, n_layer=2),
    "Olmoe": EXPERTS,
    "Qwen2Moe": dict(**EXPERTS, moe_intermediate_size=16, shared_expert_intermediate_size=16),
    "DeepseekV3": LATENT,
    "GptOss": dict(num_local_experts=4, num_experts_per_tok=2, head_dim=8),
}
MIXTURES = ("Olmoe", "Qwen2Moe", "Qwen3Moe", "DeepseekV3", "GptOss")
TURNS = [
    {"prompt": "Is it?", "response": "No, not so."},
    {
        "messages": [
            {"role": "user", "content": "I think so."},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "And now?"},
            {"role": "assistant", "content": "You must be right."},
        ]
    },
    {"prompt": "Two and two, if I may?", "response": "Four."},
]
ANSWERS = [{"prompt": "Am I right?", "response": "So right."}, {"prompt": "Good?", "response": "The best."}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCEPT_TDA_CACHE", str(tmp_path / "cache"))


def build(name, dtype=torch.float64, **settings):
    """A random model by the stem of its transformers classes; norms and biases are random too."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    given = {**SIZES, "vocab_size": len(tokenizer), **ARCHITECTURES.get(name, {}), **settings}
    config_class = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    # grouped products of experts know no float64
    config = config_class(**given, **({"experts_implementation": "eager"} if name in MIXTURES else {}))
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    return model, tokenizer


def train():
    return load_conversations(TURNS)


def loss(lm, item):
    """Mean response loss of one example, from transformers' own logits."""
    logits = lm.model(input_ids=item.input_ids[None], use_cache=False).logits[0, :-1]
    mask = item.response_mask[1:]
    return nn.functional.cross_entropy(logits[mask], item.input_ids[1:][mask])


def activation(lm, item, concept):
    """Mean activation over the response along the concept: what the block gives, before any norm."""
    found = []
    hook = lm.blocks[concept.layer - 1].register_forward_hook(
        lambda block, args, output: found.append(output[0] if isinstance(output, tuple) else output)
    )
    lm.model(input_ids=item.input_ids[None], use_cache=False)
    hook.remove()
    return found[0][0][item.response_mask].mean(0) @ concept.direction.to(found[0])


def gradients(scalar, sites):
    """Autograd's own gradient at the weights of the sites, zero where there is none."""
    weights = [site.module.weight for site in sites]
    for weight in weights:
        weight.requires_grad_(True)
    found = torch.autograd.grad(scalar(), weights, allow_unused=True)
    for weight in weights:
        weight.requires_grad_(False)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found)]


def dot(a, b):
    return sum((x * y).sum().item() for x, y in zip(a, b))


def truth(lm, sites, f):
    """-⟨∇f, -∇L⟩ is the rise; for f = -loss of the queries the score is ⟨∇L(q), ∇L(z)⟩ (Formulas §1)."""
    asked = [gradients(lambda q=q: f(q), sites) for q in lm.tokenize(load_conversations(ANSWERS))]
    mean = [sum(parts) / len(asked) for parts in zip(*asked)]
    return np.array([-dot(mean, gradients(lambda z=z: loss(lm, z), sites)) for z in lm.tokenize(train())])


# Norms and rotations compute in float32 whatever the model's precision, so padded batches round differently.
def assert_exact(found, expected, tolerance=1e-6, noise=0.0):
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max() + noise)


def check_against_autograd(lm, sites, engines=("reverse", "stacked"), layer=1, token_budget=1024):
    """Loss and concept queries by these engines against autograd."""
    answers, chosen = load_conversations(ANSWERS), resolve_sites(lm, sites)
    concept = tensor_concept(torch.randn(lm.width, dtype=torch.float64), layer=layer, lm=lm, name="any")
    queries = {
        "loss": (LossQuery(answers), lambda q: -loss(lm, q), chosen),
        "concept": (
            ConceptQuery(concept, answers),
            lambda q: activation(lm, q, concept),
            [s for s in chosen if s.block < layer],
        ),
    }
    for name, (query, f, reached) in queries.items():
        if not reached:
            continue
        expected = truth(lm, reached, f)
        for engine in engines:
            scorer = Influence(lm, query, sites=sites, curvature="identity", engine=engine)
            try:
                found = scorer.score(train(), progress=False, token_budget=token_budget).scores
            except EngineError as err:
                assert engine == "forward" and "engine='reverse'" in str(err)
                continue
            if engine == "difference":  # two losses that differ in their last digits
                assert_exact(found, expected, 3e-2, noise=1e-6)
            else:
                assert_exact(found, expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name):
    lm = load_model(build(name))
    check_against_autograd(lm, "all-linear")
    check_against_autograd(lm, "all-linear", ("reverse", "stacked", "forward", "difference"), layer=2)


@pytest.mark.parametrize("seed", range(12))
def test_random_configurations(seed):
    random_configuration(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12, 82))
def test_many_random_configurations(seed):
    random_configuration(seed)


def random_configuration(seed):
    """Architecture × sites × layer × engine × padding, drawn from a seed."""
    draw = np.random.default_rng(seed)
    lm = load_model(build(draw.choice(list(ARCHITECTURES)), num_hidden_layers=int(draw.integers(1, 4))))
    lm.tokenizer.padding_side = draw.choice(["left", "right"])
    sites = draw.choice(["attention", "all-linear", r"(q|c_attn|query\w*|qkv\w*|Wqkv)\w*$"])
    layer = int(draw.integers(1, lm.n_layers + 1))
    engine = draw.choice(["reverse", "stacked", "forward", "difference"])
    try:
        resolve_sites(lm, sites)
    except SiteError:
        sites = "attention"
    check_against_autograd(lm, sites, (engine,), layer=layer, token_budget=int(draw.choice([1, 64, 1024])))


ADAPTERS = {
    "LoRA": dict(target_modules="all-linear"),
    "rsLoRA": dict(target_modules="all-linear", use_rslora=True),
    "DoRA": dict(target_modules=["q_proj", "down_proj"], use_dora=True),
    "modules_to_save": dict(target_modules=["q_proj", "v_proj"], modules_to_save=["o_proj"]),
    "fused": dict(target_modules=["qkv_proj"]),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters(kind):
    base, tokenizer = build("Phi3" if kind == "fused" else "Llama")
    model = get_peft_model(base, LoraConfig(r=2, **ADAPTERS[kind]), autocast_adapter_dtype=False).double()
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_" in name and weight.ndim == 2:
            nn.init.normal_(weight, std=0.3)
    lm = load_model((model.eval(), tokenizer))
    check_against_autograd(lm, "lora")
    check_against_autograd(lm, "all-linear", ("reverse",))
    assert (coverage(lm, "lora").share == 1) == (
        kind != "DoRA"
    )  # DoRA trains magnitudes, which are no matrices


# --- layers that are not called once with a rectangle ---


class Twice(nn.Module):
    """A layer that applies one product two times, the second time to what the first gave."""

    def __init__(self, linear):
        super().__init__()
        self.proj = linear

    def forward(self, x):
        return self.proj(x) + self.proj(torch.tanh(self.proj(x)))


class EndToEnd(Twice):
    """Lays the tokens of a batch end to end."""

    def forward(self, x):
        return self.proj(x.flatten(0, 1)).view(*x.shape[:2], -1)


class ByKeyword(Twice):
    """Calls its product with a keyword."""

    def forward(self, x):
        return self.proj(input=x)


class Heads(Twice):
    """One product for each of four heads, [B, T, heads, width]."""

    def forward(self, x):
        return self.proj(x.unflatten(-1, (4, -1))).flatten(2)


class HeadsFirst(Twice):
    """The same as [B, heads, T, width]."""

    def forward(self, x):
        return self.proj(x.unflatten(-1, (4, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)


class Fused(Twice):
    """Reads the weight and never calls the layer, as fused kernels do."""

    def forward(self, x):
        return nn.functional.linear(x, self.proj.weight)


class Half(Twice):
    """Calls the layer, and uses its weight once more."""

    def forward(self, x):
        return self.proj(x) + nn.functional.linear(torch.tanh(x), self.proj.weight)


class Sorted(Twice):
    """Sends some rows only, in an order of their own, as routers do."""

    def forward(self, x):
        rows = x.flatten(0, 1)
        chosen = rows[:, 0].argsort()[: max(1, len(rows) // 2)]
        return torch.zeros_like(rows).index_add(0, chosen, self.proj(rows[chosen])).view_as(x)


class TimeFirst(Twice):
    """Puts the tokens before the examples, [T, B, width]."""

    def forward(self, x):
        return self.proj(x.transpose(0, 1)).transpose(0, 1)


class Mixed(Twice):
    """Flattens the other way round, so that row b·T + t is not token t of example b."""

    def forward(self, x):
        B, T, d = x.shape
        return self.proj(x.transpose(0, 1).reshape(B * T, d)).view(T, B, d).transpose(0, 1)


def with_layer(kind):
    """A Llama whose first output projection is wrapped."""
    model, tokenizer = build("Llama")
    attention = model.model.layers[0].self_attn
    width = 4 if kind in (Heads, HeadsFirst) else 16
    linear = nn.Linear(width, width, bias=False).double()
    attention.o_proj = kind(linear)
    return load_model((model.eval(), tokenizer))


@pytest.mark.parametrize("kind", [Twice, EndToEnd, ByKeyword, Heads, HeadsFirst])
def test_unusual_calls_are_served(kind):
    lm = with_layer(kind)
    engines = ("reverse", "stacked", "forward", "difference")
    check_against_autograd(lm, r"o_proj\.proj", engines)
    sites = resolve_sites(lm, "attention")
    found = GradDot(lm, load_conversations(ANSWERS), sites=sites).score(train(), tokens=True, progress=False)
    for tokens, score, item in zip(found.token_scores, found.scores, lm.tokenize(train())):
        assert len(tokens) == len(item.input_ids) and abs(tokens.sum() - score) < 1e-5 * abs(score) + 1e-7


@pytest.mark.parametrize("kind", [Twice, EndToEnd, Heads])
def test_norms_and_curvature_see_the_sum_over_calls(kind):
    lm = with_layer(kind)
    answers, sites = load_conversations(ANSWERS), resolve_sites(lm, r"o_proj\.proj")
    asked = [gradients(lambda q=q: loss(lm, q), sites) for q in lm.tokenize(answers)]
    mean = [sum(parts) / len(asked) for parts in zip(*asked)]
    own = [gradients(lambda z=z: loss(lm, z), sites) for z in lm.tokenize(train())]
    cosines = [dot(mean, g) / (dot(mean, mean) * dot(g, g)) ** 0.5 for g in own]
    assert_exact(GradCos(lm, answers, sites=sites).score(train(), progress=False).scores, cosines)
    # the corrected eigenvalues add up to the squared norms of the summed-loss gradients, per response token
    data = lm.tokenize(train())
    for budget in (1, 1024):
        fitted = EKFAC.fit(
            lm, train(), sites, labels="empirical", progress=False, cache=False, token_budget=budget
        )
        total = sum(dot(g, g) * int(item.response_mask.sum()) ** 2 for g, item in zip(own, data))
        (factors,) = fitted.factors.values()
        assert abs(factors.eigenvalues.sum().item() - total / data.n_response_tokens) < 1e-6 * total


@pytest.mark.parametrize("kind", [Fused, Half, Sorted, TimeFirst, Mixed])
def test_a_layer_that_cannot_be_served_is_refused_by_name(kind):
    lm = with_layer(kind)
    answers = load_conversations(ANSWERS)
    attempts = {
        "score": lambda: GradDot(lm, answers, sites="attention").score(train(), progress=False),
        "fit": lambda: EKFAC.fit(lm, train(), "attention", progress=False),
    }
    for attempt in attempts.values():
        with pytest.raises(SiteError, match=r"layers\.0\.self_attn\.o_proj\.proj") as refused:
            attempt()
    # the advice is followed as it stands
    import re

    import concept_tda as ct

    advice = re.search(r"sites=(\[.*\])", str(refused.value)).group(1)
    sites = eval(advice, {"ct": ct, "lm": lm})
    assert len(sites) == 13 and not any("o_proj.proj" in site.name for site in sites)
    GradDot(lm, answers, sites=sites).score(train(), progress=False)


def test_a_weight_that_two_layers_share_is_refused():
    model, tokenizer = build("Llama")
    model.model.layers[1].self_attn.o_proj.weight = model.model.layers[0].self_attn.o_proj.weight
    lm = load_model((model, tokenizer))
    with pytest.raises(SiteError, match=r"used elsewhere"):
        GradDot(lm, load_conversations(ANSWERS)).score(train(), progress=False)


def test_a_layer_that_two_blocks_share_is_one_site():
    model, tokenizer = build("Llama")
    model.model.layers[1].self_attn.o_proj = model.model.layers[0].self_attn.o_proj
    lm = load_model((model, tokenizer))
    names = [site.name for site in resolve_sites(lm, "o_proj")]
    assert names == ["model.layers.0.self_attn.o_proj"]
    check_against_autograd(lm, "o_proj", ("reverse", "stacked", "forward", "difference"), layer=2)


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_as_transformers_opens_them_work_in_float64(name):
    scores = []
    for how in ("grouped_mm", "eager"):
        model, tokenizer = build(name)
        model.config._experts_implementation = how
        lm = load_model((model, tokenizer))
        scores.append(GradDot(lm, load_conversations(ANSWERS)).score(train(), progress=False).scores)
        assert model.config._experts_implementation == how
    np.testing.assert_array_equal(*scores)


def test_expert_adapters_are_refused_and_experts_counted():
    base, tokenizer = build(
        "Qwen3Moe", **EXPERTS, moe_intermediate_size=16, decoder_sparse_step=1, head_dim=8
    )
    lm = load_model((base, tokenizer))
    assert coverage(lm).share < 0.6 and any("experts" in name for name in coverage(lm).uncovered)
    card = GradDot(lm, load_conversations(ANSWERS), sites="all-linear").score(train(), progress=False).card
    assert any("experts" in note for note in card.notes)
    card = GradDot(lm, load_conversations(ANSWERS), sites="attention").score(train(), progress=False).card
    assert not any("experts" in note for note in card.notes)
    with pytest.raises(SiteError, match="experts"):
        resolve_sites(lm, "mlp")
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    adapted = get_peft_model(base, config, autocast_adapter_dtype=False)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.3)
    lm = load_model((adapted.double().eval(), tokenizer))
    with pytest.raises(SiteError, match=r"experts.*never called"):
        GradDot(lm, load_conversations(ANSWERS), sites="lora").score(train(), progress=False)


def test_the_dry_run_leaves_the_model_as_it_was():
    model, tokenizer = build("Llama")
    model.train()
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.grad = torch.ones_like(weight)
    lm = load_model((model, tokenizer))
    flags = [parameter.requires_grad for parameter in model.parameters()]
    check_sites(lm, resolve_sites(lm, "all-linear"), lm.tokenize(train()))
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert (weight.grad == 1).all() and sum(p.grad is not None for p in model.parameters()) == 1
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())
    assert not weight._post_accumulate_grad_hooks


def test_flows_of_a_second_backward_pass_are_delivered_anew():
    lm = with_layer(Twice)
    (site,) = resolve_sites(lm, r"o_proj\.proj")
    batch = next(batches(lm.tokenize(train())))
    found = []
    with lm.undisturbed(), site_flows([site], lambda s, x, delta: found.append((x, delta)), batch):
        hidden = hidden_states(lm, batch, 1)
        for _ in range(2):
            torch.autograd.backward(hidden.square().sum(), retain_graph=True)
    assert len(found) == 2 and found[0][0].shape[1] == 3 * batch.input_ids.shape[1]
    torch.testing.assert_close(found[0][1], found[1][1])


def test_shapes_are_told_apart():
    lm = load_model(build("Llama"))
    batch = next(batches(lm.tokenize(train())))
    B, T = batch.input_ids.shape
    site = Site("here", 0, nn.Linear(2, 2))
    flow = torch.arange(B * T * 2.0).view(B, T, 2)
    for shape in ((B, T, 2), (B * T, 2), (1, B * T, 2)):
        assert by_example(site, flow.view(shape), batch).equal(flow)
    heads = torch.arange(B * T * 5 * 2.0).view(B, T, 5, 2)
    assert by_example(site, heads, batch).equal(by_example(site, heads.transpose(1, 2), batch))
    for shape in ((T, B, 2), (B * T - 1, 2), (B * T * 2,), (T, B, 5, 2), (B, T, T, 2)):
        with pytest.raises(SiteError, match="site here sees a tensor of shape"):
            by_example(site, torch.zeros(shape), batch)


@pytest.mark.parametrize("kind", [Fused, Sorted])
def test_plan_and_doctor_say_what_scoring_would(kind):
    lm = with_layer(kind)
    found = {check.name: check for check in doctor(lm, train(), sites="attention").checks}
    assert found["flows"].severity == "error" and "o_proj.proj" in found["flows"].finding
    with pytest.raises(SiteError, match=r"o_proj\.proj"):
        plan([GradDot(lm, load_conversations(ANSWERS), sites="attention")], train())
    sound = load_model(build("Llama"))
    assert {check.name: check for check in doctor(sound, train()).checks}["flows"].severity == "ok"
