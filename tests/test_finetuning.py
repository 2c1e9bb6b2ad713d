"""Fine-tuning: the loss, what is trained and what is not, the folder it leaves, and every refusal."""

import json
import math
import multiprocessing
import random
import time

import numpy as np
import pytest
import torch
from torch import nn

import concept_tda.model.finetuning as finetuning
from concept_tda.data.batches import batches
from concept_tda.data.conversations import load_conversations
from concept_tda.foundation.errors import ConceptTDAError, StorageError
from concept_tda.model.finetuning import (
    RECIPES,
    FinetuneError,
    finetune,
    finetune_many,
    run_segments,
    training_checkpoints,
    training_record,
)
from concept_tda.model.loading import LanguageModel, load_model
from concept_tda.model.sites import coverage, resolve_sites
from concept_tda.model.tracing import generate, pooled_activations

from tiny import FAMILIES, tiny_pair

FAST = dict(rank=4, learning_rate=1e-2, epochs=2, batch_size=4, progress=False)


@pytest.fixture(autouse=True)
def bf16_pays(monkeypatch):
    "A machine on which bfloat16 is fast, whatever this one is; a test about slow ones says so."
    monkeypatch.setattr(finetuning, "bfloat16_ratio", lambda device: 0.5)


@pytest.fixture(scope="module")
def data():
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Is {i} " + "very " * (i % 3) + "even?"},
                {"role": "assistant", "content": "yes" if i % 2 == 0 else "no, it is odd"},
            ]
        }
        for i in range(14)
    ]
    rows += [
        {
            "messages": [
                {"role": "system", "content": "Be short."},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "yes?"},
                {"role": "user", "content": f"Is {i} even?"},
                {"role": "assistant", "content": "no"},
            ]
        }
        for i in (3, 5)
    ]
    return load_conversations(rows, name="parity")


@pytest.fixture()
def lm():
    return LanguageModel(*tiny_pair("llama"), "tiny")


@pytest.fixture(scope="module")
def saved_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    for part in tiny_pair("llama"):
        part.save_pretrained(folder)
    return folder


def reference_losses(model, tokenized):
    """L(z) by the definition, token by token, in float64."""
    losses = []
    for one in tokenized:
        with torch.no_grad():
            log_p = model(one.input_ids[None]).logits[0].double().log_softmax(-1)
        terms = [
            -log_p[t - 1, one.input_ids[t]] for t in range(1, len(one.input_ids)) if one.response_mask[t]
        ]
        losses.append(sum(terms) / len(terms))
    return torch.stack(losses)


# ---- the loss


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_the_mean_over_response_tokens_whatever_the_company(family, data):
    lm = LanguageModel(*tiny_pair(family), family)
    tokenized = lm.tokenize(data)
    batch = next(batches(tokenized, token_budget=10**6))
    with torch.no_grad():
        losses = finetuning.example_losses(lm, batch)
    assert len(batch) == 16 and torch.allclose(
        losses.double(), reference_losses(lm.model, tokenized)[batch.rows], atol=1e-5
    )


def test_first_step_is_recorded_with_the_loss_of_the_base_model(lm, data, tmp_path):
    """One batch that holds everything: its loss before any update is the mean of the examples' losses."""
    finetune(lm, data, tmp_path / "ft", rank=4, batch_size=16, progress=False)
    steps = training_record(tmp_path / "ft")["steps"]
    assert len(steps) == 1 and steps["examples"][0] == 16 and steps["tokens"][0] == lm.tokenize(data).n_tokens
    assert steps["loss"][0] == pytest.approx(
        float(reference_losses(lm.model, lm.tokenize(data)).mean()), abs=1e-5
    )


EXACT = dict(precision="fp32", micro_batch_size=None)


def adapted(lm, rank=4):
    """`lm` with adapters whose two halves both have a gradient."""
    torch.manual_seed(0)
    model = finetuning.new_adapters(lm, rank, 8, False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return LanguageModel(model, lm.tokenizer, "adapted")


def gradient(lm, tokenized, rows, **options):
    """All gradients of the adapters in a row."""
    with finetuning._rounded(lm.model) if options.get("precision") == "bf16" else finetuning.nullcontext():
        loss = finetuning._add_gradient(lm, tokenized, rows, EXACT | options)
    found = torch.cat([p.grad.flatten() for p in lm.model.parameters() if p.requires_grad]).double()
    assert all(
        p.grad.dtype == p.dtype == torch.float32 for p in lm.model.parameters() if p.requires_grad
    ) and all(p.grad is None for p in lm.model.parameters() if not p.requires_grad)
    for p in lm.model.parameters():
        p.grad = None
    return loss, found


def test_gradient_weighs_examples_alike_and_not_tokens(lm, data):
    """The gradient of a batch of two is the mean of the gradients of its examples, however long they are."""
    lm, tokenized = adapted(lm), lm.tokenize(data[[0, 1]])
    assert tokenized[0].response_mask.sum() != tokenized[1].response_mask.sum()
    (both, g), (one, g0), (other, g1) = (gradient(lm, tokenized, rows) for rows in ([0, 1], [0], [1]))
    assert torch.allclose(g, (g0 + g1) / 2, atol=1e-6) and both == pytest.approx((one + other) / 2, abs=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 100])
def test_accumulated_gradient_is_that_of_the_whole_batch(lm, data, size):
    """Pieces of unequal number and length: a mean of the pieces' means would not do."""
    lm, tokenized = adapted(lm), lm.tokenize(data)
    loss, expected = gradient(lm, tokenized, list(range(1, 12)))
    again, found = gradient(lm, tokenized, list(range(1, 12)), micro_batch_size=size)
    assert (found - expected).norm() < 1e-5 * expected.norm() and again == pytest.approx(loss, abs=1e-6)


def test_a_gradient_by_the_definition(lm, data):
    """Against autograd through transformers' own loss, one example at a time."""
    lm, tokenized = adapted(lm), lm.tokenize(data)
    parameters = [p for p in lm.model.parameters() if p.requires_grad]
    losses = [
        lm.model(one.input_ids[None], labels=one.input_ids.masked_fill(~one.response_mask, -100)[None]).loss
        for one in tokenized.select([2, 5, 14])
    ]
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(sum(losses) / 3, parameters)]).double()
    assert (
        gradient(lm, tokenized, [14, 2, 5], micro_batch_size=2)[1] - expected
    ).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_close_and_leaves_the_weights(family, data):
    base = LanguageModel(*tiny_pair(family), family)
    before, lm, tokenized = base.fingerprint, adapted(base), base.tokenize(data)
    frozen = {name: p for name, p in lm.model.named_parameters()}
    loss, expected = gradient(lm, tokenized, list(range(12)))
    rounded, found = gradient(lm, tokenized, list(range(12)), precision="bf16")
    assert (
        0 < (found - expected).norm() < 0.1 * expected.norm()
        and rounded == pytest.approx(loss, rel=0.02)
        and rounded != loss
    )
    assert {name: p for name, p in lm.model.named_parameters()} == frozen and base.fingerprint == before


def test_bf16_multiplies_in_bf16(lm, data):
    """Autocast itself, and not only rounded weights: what leaves a linear layer is bfloat16."""
    lm, seen = adapted(lm), {}
    for name, module in lm.model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: out.dtype}))
    gradient(lm, lm.tokenize(data), [0, 1], precision="bf16")
    assert set(seen.values()) == {torch.bfloat16} and len(seen) == 3 * 14 + 1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bf16_does_not_lose_small_updates(family):
    """An adapter a thousand times weaker than its layer: added in bf16, little of it would arrive."""
    lm = adapted(LanguageModel(*tiny_pair(family, width=64), family))
    layer = next(module for module in lm.model.modules() if hasattr(module, "lora_A"))
    x = torch.randn(50, layer.in_features)

    def output():
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)  # a context of its own, since autocast keeps the weights it has rounded

    with torch.no_grad(), finetuning._rounded(lm.model):
        layer.lora_B["default"].weight.zero_()
        without = output()
        layer.lora_B["default"].weight.normal_(std=1e-4)
        found, expected = (
            output() - without,
            layer.scaling["default"] * layer.lora_B["default"](layer.lora_A["default"](x)),
        )
    assert without.std() / 1000 > expected.std() > 0 and (found - expected).norm() < 0.02 * expected.norm()
    assert not any(module._forward_hooks for module in lm.model.modules())


def test_frozen_weights_are_rounded_once(lm, data, monkeypatch):
    inner = adapted(lm).model
    with finetuning._rounded(inner):
        kinds = {name: p.dtype for name, p in inner.named_parameters()}
    assert {dtype for name, dtype in kinds.items() if "base_layer" in name or "lm_head" in name} == {
        torch.bfloat16
    }
    assert {
        dtype for name, dtype in kinds.items() if "lora" in name or "norm" in name or "embed" in name
    } == {torch.float32}
    assert {p.dtype for p in inner.parameters()} == {torch.float32}


# ---- the order of the data


def test_every_epoch_uses_every_conversation_once(data):
    steps = finetuning.step_rows(data.ids, dict(seed=0, epochs=3, batch_size=5))
    assert [len(rows) for rows in steps] == [5, 5, 5, 1] * 3
    epochs = [sum(steps[4 * epoch : 4 * epoch + 4], []) for epoch in range(3)]
    assert (
        all(sorted(rows) == list(range(16)) for rows in epochs) and len({tuple(rows) for rows in epochs}) == 3
    )


def test_a_subset_keeps_the_order_of_the_whole(data):
    def order(chosen, seed):
        return [
            chosen.ids[row]
            for row in finetuning.step_rows(chosen.ids, dict(seed=seed, epochs=1, batch_size=99))[0]
        ]

    part = data[[1, 3, 4, 9, 12]]
    assert order(part, 0) == [id for id in order(data, 0) if id in part.ids] == order(part[::-1], 0)
    assert order(data, 0) != order(data, 1)
    twice = data[[0, 0, 1, 2, 3]]
    assert sorted(order(twice, 0)) == sorted(twice.ids)


# ---- training


def test_it_learns_and_the_record_shows_how(lm, data, tmp_path):
    result = finetune(
        lm, data, tmp_path / "ft", rank=8, learning_rate=1e-2, epochs=10, batch_size=5, progress=False
    )
    before, after = (float(reference_losses(m.model, lm.tokenize(data)).mean()) for m in (lm, result))
    assert after < before / 2
    assert generate(result, ["Is 4 even?"], max_new_tokens=8, progress=False)[0].response.startswith(
        ("yes", "no")
    )
    record = training_record(tmp_path / "ft")
    steps = record["steps"]
    assert (
        steps["step"].tolist() == list(range(1, 41))
        and steps["tokens"].sum() == 10 * lm.tokenize(data).n_tokens
    )  # ceil(16/5) steps an epoch
    assert np.allclose(
        steps["learning_rate"], 1e-2 * (1 - np.arange(40) / 40), rtol=1e-6
    )  # linear, from the first step
    assert (
        record["tokens_per_second"] > 0
        and record["cut"] == 0
        and record["key"]["base_fingerprint"] == lm.fingerprint
    )


def test_the_response_decides_and_the_prompt_is_not_learned(lm, data, tmp_path):
    result = finetune(
        lm, data, tmp_path / "ft", rank=8, learning_rate=1e-2, epochs=10, batch_size=5, progress=False
    )

    def prompt_loss(model):
        losses = []
        for one in lm.tokenize(data):
            with torch.no_grad():
                log_p = model(one.input_ids[None]).logits[0].log_softmax(-1)
            losses += [
                -log_p[t - 1, one.input_ids[t]]
                for t in range(1, len(one.input_ids))
                if not one.response_mask[t]
            ]
        return float(torch.stack(losses).mean())

    assert prompt_loss(result.model) > 0.9 * prompt_loss(lm.model)


def test_same_seed_same_weights_other_seed_other_weights(lm, data, tmp_path):
    first = finetune(lm, data, tmp_path / "a", **FAST)
    torch.manual_seed(99)
    torch.rand(7)
    assert finetune(lm, data, tmp_path / "b", **FAST).fingerprint == first.fingerprint
    assert finetune(lm, data, tmp_path / "c", **FAST, seed=1).fingerprint != first.fingerprint


def test_every_linear_layer_of_the_blocks_is_trained_and_nothing_else(lm, data, tmp_path):
    result = finetune(lm, data, tmp_path / "ft", **FAST)
    sites = {f"{site.name}.weight" for site in resolve_sites(lm, "all-linear")}
    changed = {
        name
        for (name, old), (_, new) in zip(lm.model.named_parameters(), result.model.named_parameters())
        if not torch.equal(old, new)
    }
    assert changed == sites and len(sites) == 2 * 7


def test_the_update_has_the_rank_and_the_scale_asked_for(lm, data, tmp_path):
    result = finetune(lm, data, tmp_path / "ft", **FAST)
    old, new = (m.model.model.layers[1].mlp.up_proj.weight.detach().double() for m in (lm, result))
    values = torch.linalg.svdvals(new - old)
    assert values[3] > 1e-4 and values[4] < 1e-5 * values[0] + 1e-6
    adapters = {
        rslora: finetuning.new_adapters(lm, 16, 32, rslora)
        .base_model.model.model.layers[0]
        .mlp.up_proj.scaling["default"]
        for rslora in (False, True)
    }
    assert adapters == {False: 2.0, True: 8.0}


def test_bf16_learns_the_same_and_is_repeatable(saved_base, data, tmp_path):
    lm, options = (
        load_model(saved_base),
        dict(rank=8, learning_rate=1e-2, epochs=8, batch_size=5, micro_batch_size=2, progress=False),
    )
    full = finetune(lm, data, tmp_path / "fp32", **options)
    result = finetune(lm, data, tmp_path / "bf16", **options, precision="bf16")
    assert result.dtype == torch.float32 and {
        value.dtype for value in weights(tmp_path / "bf16").values()
    } == {torch.float32}
    before, wide, narrow = (
        float(reference_losses(m.model, lm.tokenize(data)).mean()) for m in (lm, full, result)
    )
    assert (
        narrow < before / 2 and abs(narrow - wide) < 0.1 * before and full.fingerprint != result.fingerprint
    )
    assert (
        training_record(tmp_path / "bf16")["key"]["precision"] == "bf16"
        and training_record(tmp_path / "fp32")["key"]["precision"] == "fp32"
    )
    assert (
        finetune(lm, data, tmp_path / "again", **options, precision="bf16").fingerprint == result.fingerprint
    )
    with pytest.raises(FinetuneError, match="different: precision .bf16 there, fp32 asked"):
        finetune(lm, data, tmp_path / "bf16", **options)


def test_a_filter_that_removes_nothing_reproduces_the_full_run(lm, data, tmp_path):
    full = finetune(lm, data, tmp_path / "full", **FAST)
    assert (
        finetune(lm, data.filter(lambda conversation: True), tmp_path / "kept", **FAST).fingerprint
        == full.fingerprint
    )
    assert finetune(lm, data[::-1], tmp_path / "backwards", **FAST).fingerprint == full.fingerprint


def test_a_record_from_before_these_settings_existed(saved_base, data, tmp_path, monkeypatch):
    lm = load_model(saved_base)
    first = finetune(lm, data, tmp_path / "ft", **FAST)
    record = json.loads((tmp_path / "ft" / "training.json").read_text())
    for name in ("precision", "warmup_steps", "weight_decay"):
        del record["key"][name]
    for name in ("checkpoints", "micro_batch_size"):
        del record[name]
    for step in record["steps"]:
        del step["gradient_norm"], step["seconds"]
    (tmp_path / "ft" / "training.json").write_text(json.dumps(record))
    monkeypatch.setattr(finetuning, "_train", lambda *args: pytest.fail("trained again"))
    assert finetune(lm, data, tmp_path / "ft", **FAST).fingerprint == first.fingerprint
    with pytest.raises(FinetuneError, match="different: precision .fp32 there, bf16 asked"):
        finetune(lm, data, tmp_path / "ft", **FAST, precision="bf16")


# ---- the model that was passed in


def module_state(lm):
    flags = [
        (name, type(m), m.training, list(m._forward_hooks), list(m._forward_pre_hooks))
        for name, m in lm.model.named_modules()
    ]
    return (
        flags,
        [(p.requires_grad, p.grad is None, p.data_ptr()) for p in lm.model.parameters()],
        lm.model.config.to_dict(),
        lm.tokenizer.padding_side,
    )


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_passed_model_is_untouched_and_the_folder_opens(family, merge, data, tmp_path):
    for part in tiny_pair(family):
        part.save_pretrained(tmp_path / "base")
    lm = load_model(tmp_path / "base")
    pooled_activations(
        lm, data[:3], 1, progress=False
    )  # tracing wraps models; a traced one must train like any other
    lm.model.train()
    before, weights = module_state(lm), lm.fingerprint
    result = finetune(lm, data, tmp_path / "ft", **FAST, merge=merge)
    assert module_state(lm) == before and lm.fingerprint == weights and not hasattr(lm.model, "peft_config")
    assert not result.model.training and hasattr(result.model, "peft_config") != merge
    opened = load_model(tmp_path / "ft", merge=merge)
    ids = lm.tokenize(data)[0].input_ids[None]
    with torch.no_grad():
        ours, theirs, base = (m.model.eval()(ids).logits for m in (result, opened, lm))
    assert torch.equal(ours, theirs) and not torch.allclose(ours, base, atol=1e-2)
    assert (
        result.model.config.use_cache is lm.model.config.use_cache is True
        and result.tokenizer is not lm.tokenizer
    )
    saved = json.loads((tmp_path / "ft" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str((tmp_path / "base").resolve())


def test_a_merged_result_shares_no_memory_and_keeps_ties(data, tmp_path):
    lm = LanguageModel(*tiny_pair("llama-tied"), "tied")
    result = finetune(lm, data, tmp_path / "ft", **FAST)
    assert not {p.data_ptr() for p in lm.model.parameters()} & {
        p.data_ptr() for p in result.model.parameters()
    }
    assert result.model.lm_head.weight is result.model.model.embed_tokens.weight and all(
        p.requires_grad for p in result.model.parameters()
    )
    before = lm.fingerprint
    with torch.no_grad():
        for parameter in result.model.parameters():
            parameter.add_(1)
    assert lm.fingerprint == before


def test_the_callers_random_numbers_are_not_disturbed(lm, data, tmp_path):
    def draw():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()

    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    expected = draw()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    finetune(lm, data, tmp_path / "ft", **FAST)
    assert draw() == expected


def test_half_precision_base_trains_in_full_precision_adapters(saved_base, data, tmp_path):
    lm = load_model(saved_base, dtype="bfloat16")
    result = finetune(lm, data, tmp_path / "ft", **FAST, merge=False)
    assert {p.dtype for p in result.model.parameters() if p.requires_grad} == {
        torch.float32
    } and lm.dtype == torch.bfloat16
    assert finetune(lm, data, tmp_path / "merged", **FAST).dtype == torch.bfloat16


# ---- the folder


def test_nothing_is_written_beside_the_folder(saved_base, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finetune(load_model(saved_base), data, "ft", **FAST)
    assert [path.name for path in tmp_path.iterdir()] == ["ft"]
    assert {path.name for path in (tmp_path / "ft").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
        "examples.npy",
    }


def test_a_model_in_memory_is_saved_whole(lm, data, tmp_path):
    result = finetune(lm, data, tmp_path / "ft", **FAST)
    assert (
        training_record(tmp_path / "ft")["saved"] == "whole model"
        and load_model(tmp_path / "ft").fingerprint == result.fingerprint
    )
    further = finetune(
        load_model(tmp_path / "ft"), data, tmp_path / "more", **FAST
    )  # and such a folder is a base like any other
    assert (
        training_record(tmp_path / "more")["saved"] == "adapter"
        and load_model(tmp_path / "more", merge=True).fingerprint == further.fingerprint
    )


def test_a_merged_adapter_is_no_base_for_an_adapter(saved_base, data, tmp_path):
    """The second fine-tune starts from base + first adapter; an adapter saved on the bare base would lose the
    first."""
    first = finetune(load_model(saved_base), data, tmp_path / "one", **FAST)
    second = finetune(first, data, tmp_path / "two", **FAST)
    assert (
        training_record(tmp_path / "two")["saved"] == "whole model"
        and load_model(tmp_path / "two").fingerprint == second.fingerprint
    )


def test_the_way_back_to_a_base(lm, saved_base, tmp_path, monkeypatch):
    def way_back(name):
        return finetuning._way_back(LanguageModel(lm.model, lm.tokenizer, str(name)))

    assert way_back("smollm2-135m-instruct") == "smollm2-135m-instruct" and way_back(saved_base) == str(
        saved_base.resolve()
    )
    monkeypatch.chdir(saved_base.parent)
    assert way_back(saved_base.name) == str(
        saved_base.resolve()
    )  # a relative name would lead nowhere from another folder
    (tmp_path / "config.json").write_text("{}")
    assert way_back(tmp_path) == str(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert way_back(tmp_path) is None and way_back("tiny") is None and way_back("someone/model") is None
    monkeypatch.setattr(lm.model.config, "_name_or_path", "someone/model")
    assert way_back("someone/model") == "someone/model"


def test_the_same_call_opens_what_it_made(saved_base, data, tmp_path, monkeypatch):
    lm = load_model(saved_base)
    first = finetune(lm, data, tmp_path / "ft", **FAST)
    monkeypatch.setattr(finetuning, "_train", lambda *args: pytest.fail("trained again"))
    assert finetune(lm, data, tmp_path / "ft", **FAST).fingerprint == first.fingerprint
    for change in (dict(seed=1), dict(learning_rate=1e-3), dict(rank=2)):
        with pytest.raises(FinetuneError, match=f"another fine-tune; different: {[*change][0]}"):
            finetune(lm, data, tmp_path / "ft", **FAST | change)
    with pytest.raises(FinetuneError, match="different: data_fingerprint"):
        finetune(lm, data[:8], tmp_path / "ft", **FAST)
    with torch.no_grad():
        next(lm.model.parameters())[0, 0] += 1
    with pytest.raises(FinetuneError, match="different: base_fingerprint"):
        finetune(lm, data, tmp_path / "ft", **FAST)


def test_a_folder_with_something_else_is_left_alone(lm, data, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FinetuneError, match="something else .notes.txt"):
        finetune(lm, data, tmp_path, **FAST)
    with pytest.raises(FinetuneError, match="is a file"):
        finetune(lm, data, tmp_path / "notes.txt", **FAST)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"] and (
        tmp_path / "notes.txt"
    ).read_text() == "mine"


@pytest.mark.parametrize("where", ["_train", "_save_adapter", "training_steps"])
def test_an_interrupted_run_leaves_no_model_and_can_be_repeated(
    saved_base, data, tmp_path, monkeypatch, where
):
    lm, calls = load_model(saved_base), []
    before, weights = module_state(lm), lm.fingerprint

    def interrupt(*args, **options):
        raise KeyboardInterrupt

    def third_step(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    real = finetuning.example_losses
    with monkeypatch.context() as patch:
        if where == "training_steps":
            patch.setattr(finetuning, "example_losses", third_step)
        else:
            patch.setattr(finetuning, where, interrupt)
        with pytest.raises(KeyboardInterrupt):
            finetune(lm, data, tmp_path / "ft", **FAST)
    assert not list((tmp_path / "ft").iterdir()) and module_state(lm) == before and lm.fingerprint == weights
    assert (
        finetune(lm, data, tmp_path / "ft", **FAST).fingerprint
        == finetune(lm, data, tmp_path / "other", **FAST).fingerprint
    )


def test_what_a_kill_left_behind_is_cleared_away(saved_base, data, tmp_path):
    (tmp_path / "ft" / "unfinished").mkdir(parents=True)
    (tmp_path / "ft" / "unfinished" / "adapter_model.safetensors").write_text("half")
    with pytest.raises(FinetuneError, match="no finished fine-tune"):
        training_record(tmp_path / "ft")
    finetune(load_model(saved_base), data, tmp_path / "ft", **FAST)
    assert not (tmp_path / "ft" / "unfinished").exists() and load_model(tmp_path / "ft").n_layers == 2


def test_a_move_cut_short_never_leaves_half_a_model(saved_base, data, tmp_path, monkeypatch):
    """Whatever move the kill hits: a folder with an adapter_config.json holds its weights, one with a record
    holds everything."""
    lm, real = load_model(saved_base), finetuning.os.replace
    finetune(lm, data[:4], tmp_path / "whole", **FAST)
    for n_moves in range(6):
        folder, moved = tmp_path / f"ft{n_moves}", []

        def stop_after(source, target):
            if (
                finetuning.Path(source).parent.name == "unfinished"
                and finetuning.Path(target).parent == folder
            ):
                if len(moved) == n_moves:
                    raise KeyboardInterrupt
                moved.append(target)
            return real(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(finetuning.os, "replace", stop_after)
            with pytest.raises(KeyboardInterrupt):
                finetune(lm, data[:4], folder, **FAST)
        names = {path.name for path in folder.iterdir()} - {"unfinished"}
        assert len(names) == n_moves and "training.json" not in names
        if "adapter_config.json" in names:
            assert {"adapter_model.safetensors", "tokenizer.json"} <= names
        with monkeypatch.context() as patch:  # the move is completed, and nothing trained again
            patch.setattr(finetuning, "_train", lambda *args: pytest.fail("trained again"))
            assert (
                finetune(lm, data[:4], folder, **FAST).fingerprint
                == finetune(lm, data[:4], tmp_path / "whole", **FAST).fingerprint
            )
        assert {path.name for path in folder.iterdir()} == {
            path.name for path in (tmp_path / "whole").iterdir()
        }


def test_a_folder_that_cannot_be_written_is_refused_before_training(lm, data, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(finetuning, "_train", lambda *args: pytest.fail("trained for nothing"))
    with pytest.raises(StorageError, match="cannot write"):
        finetune(lm, data, tmp_path / "file" / "ft", **FAST)


def test_damaged_records_are_named(tmp_path):
    for text, message in (
        ("{", "damaged"),
        ("[]", "not in the format"),
        ('{"format": "other"}', "not in the format"),
    ):
        (tmp_path / "training.json").write_text(text)
        with pytest.raises(FinetuneError, match=message):
            training_record(tmp_path)


# ---- resuming


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def interrupted_at(call, monkeypatch, *args, **options):
    """A fine-tune stopped in its `call`-th step, with the state kept after every step."""
    real, calls = finetuning._add_gradient, []

    def stop(*args):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "_STATE_SECONDS", 0)
        patch.setattr(finetuning, "_add_gradient", stop)
        with pytest.raises(KeyboardInterrupt):
            finetune(*args, **options)


def counted(monkeypatch):
    """Steps that are computed from here on."""
    real, calls = finetuning._add_gradient, []
    monkeypatch.setattr(finetuning, "_add_gradient", lambda *args: calls.append(1) or real(*args))
    return calls


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(precision="bf16"),
        dict(micro_batch_size=3, weight_decay=0.1, warmup_steps=2),
        dict(checkpoints=3),
    ],
    ids=str,
)
def test_an_interrupted_run_continues_and_ends_with_the_same_bits(
    saved_base, data, tmp_path, monkeypatch, options
):
    lm, options = load_model(saved_base), FAST | options
    finetune(lm, data, tmp_path / "whole", **options)
    for stop in (2, 6):  # the second interruption comes 5 steps after the first
        interrupted_at(stop if stop == 2 else 5, monkeypatch, lm, data, tmp_path / "ft", **options)
        with pytest.raises(FinetuneError, match="no finished fine-tune"):
            training_record(tmp_path / "ft")
    calls = counted(monkeypatch)
    result = finetune(lm, data, tmp_path / "ft", **options)
    assert (
        len(calls) == 8 - 1 - 4
        and same(weights(tmp_path / "ft"), weights(tmp_path / "whole"))
        and result.fingerprint == load_model(tmp_path / "whole", merge=True).fingerprint
    )
    steps, expected = (
        training_record(tmp_path / name)["steps"].drop(columns="seconds") for name in ("ft", "whole")
    )
    assert steps.equals(expected) and steps["step"].tolist() == list(range(1, 9))
    assert {path.name for path in (tmp_path / "ft").rglob("*")} == {
        path.name for path in (tmp_path / "whole").rglob("*")
    }
    for checkpoint in training_record(tmp_path / "ft")["checkpoints"]:
        assert same(
            weights(tmp_path / "ft" / checkpoint["folder"]),
            weights(tmp_path / "whole" / checkpoint["folder"]),
        )


def test_the_state_belongs_to_one_run(saved_base, data, tmp_path, monkeypatch):
    lm = load_model(saved_base)
    interrupted_at(4, monkeypatch, lm, data, tmp_path / "ft", **FAST)
    for change, what in (
        (dict(seed=1), "seed .0 there, 1 asked"),
        (dict(precision="bf16"), "precision"),
        (dict(rank=5), "rank"),
    ):
        with pytest.raises(FinetuneError, match=f"unfinished; different: {what}"):
            finetune(lm, data, tmp_path / "ft", **FAST | change)
    with pytest.raises(FinetuneError, match="unfinished; different: data_fingerprint"):
        finetune(lm, data[:9], tmp_path / "ft", **FAST)
    calls = counted(monkeypatch)
    result = finetune(
        lm, data, tmp_path / "ft", **FAST, micro_batch_size=1
    )  # as one would after running out of memory
    assert len(calls) == 5 and training_record(tmp_path / "ft")["micro_batch_size"] == 1
    whole = finetune(lm, data, tmp_path / "whole", **FAST)
    assert all(
        torch.allclose(ours, theirs, atol=1e-4)
        for ours, theirs in zip(result.model.parameters(), whole.model.parameters())
    )


def test_a_damaged_state_is_named(saved_base, data, tmp_path, monkeypatch):
    lm = load_model(saved_base)
    interrupted_at(4, monkeypatch, lm, data, tmp_path / "ft", **FAST)
    state = tmp_path / "ft" / "unfinished" / "state.safetensors"
    for content in (state.read_bytes()[:-9], b"", b"{}" * 99):
        state.write_bytes(content)
        with pytest.raises(
            FinetuneError, match="state.safetensors, the state of an unfinished training, is damaged"
        ):
            finetune(lm, data, tmp_path / "ft", **FAST)
    state.unlink()
    finetune(lm, data, tmp_path / "ft", **FAST)


def test_a_failed_run_leaves_no_state(lm, data, tmp_path, monkeypatch):
    """Continuing from it would only fail again."""
    monkeypatch.setattr(finetuning, "_STATE_SECONDS", 0)
    with pytest.raises(FinetuneError, match="loss is nan"):
        finetune(lm, data, tmp_path / "ft", **FAST | dict(learning_rate=1e30))
    assert not list((tmp_path / "ft").iterdir())


def test_a_gradient_that_is_not_a_number_stops_the_run(lm, data, tmp_path, monkeypatch):
    """In the last step no loss would ever show it."""
    real, calls = finetuning._add_gradient, []

    def spoil(model, *args):
        loss = real(model, *args)
        calls.append(1)
        if len(calls) == 8:
            next(p for p in model.model.parameters() if p.requires_grad).grad[0, 0] = float("inf")
        return loss

    monkeypatch.setattr(finetuning, "_add_gradient", spoil)
    with pytest.raises(FinetuneError, match="gradient is (inf|nan) at step 8"):
        finetune(lm, data, tmp_path / "ft", **FAST)


def _dropping_base(folder):
    """A base model with dropout of its own, so that random numbers are drawn in every step."""
    lm = load_model(folder)
    for module in lm.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    return lm


def _killed_job(base, out, slow):
    """What the child processes do: a fine-tune whose state is kept after every step."""
    torch.set_num_threads(1)
    finetuning._STATE_SECONDS = 0
    rows = [{"prompt": f"Is {i} even?", "response": "yes" if i % 2 == 0 else "no, odd"} for i in range(24)]
    real = finetuning._add_gradient

    def step(*args):
        with open(f"{out}.steps", "a") as file:
            file.write(".")
        time.sleep(slow)
        return real(*args)

    finetuning._add_gradient = step
    finetune(
        _dropping_base(base),
        load_conversations(rows),
        out,
        rank=4,
        learning_rate=1e-2,
        batch_size=4,
        micro_batch_size=2,
        epochs=3,
        checkpoints=3,
        progress=False,
    )


def test_kill_9_and_resume_gives_the_same_bits(tmp_path):
    for part in tiny_pair("gpt2"):
        part.save_pretrained(tmp_path / "base")
    assert any(isinstance(module, nn.Dropout) for module in load_model(tmp_path / "base").model.modules())
    children = multiprocessing.get_context("forkserver")
    children.set_forkserver_preload(
        ["tiny", "concept_tda.model.finetuning", "transformers.models.gpt2.modeling_gpt2", "peft"]
    )

    def run(out, slow=0, kill_after=None):
        child = children.Process(target=_killed_job, args=(str(tmp_path / "base"), str(tmp_path / out), slow))
        child.start()
        if kill_after is not None:
            state, deadline = tmp_path / out / "unfinished" / "state.safetensors", time.monotonic() + 60
            while child.is_alive() and time.monotonic() < deadline:
                if state.exists() and len(finetuning._read_state(state)[1]["steps"]) >= kill_after:
                    break
                time.sleep(0.01)
            child.kill()  # SIGKILL: nothing in the child can notice
        child.join(60)
        assert child.exitcode == (0 if kill_after is None else -9)

    run("whole")
    for kill_after in (3, 8, 14):
        run("killed", slow=0.1, kill_after=kill_after)
    with pytest.raises(FinetuneError, match="no finished fine-tune"):
        training_record(tmp_path / "killed")
    run("killed")
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    steps, expected = (
        training_record(tmp_path / name)["steps"].drop(columns="seconds") for name in ("killed", "whole")
    )
    assert steps.equals(expected)
    assert (
        18 <= len((tmp_path / "killed.steps").read_text()) <= 18 + 2 * 3
    )  # what was done was not done again
    for name in ("step-000006", "step-000012", "step-000018"):
        assert same(*(weights(tmp_path / run / "checkpoints" / name) for run in ("killed", "whole")))
    assert (
        not list((tmp_path / "killed").rglob("*.part*")) and not (tmp_path / "killed" / "unfinished").exists()
    )


# ---- checkpoints


def test_checkpoints_are_the_adapters_of_their_steps(saved_base, data, tmp_path, monkeypatch):
    seen, real = {}, finetuning._Keeper.after_step

    def look(self, lm, optimizer, record, total):
        seen[len(record)] = {
            name: p.detach().clone() for name, p in lm.model.named_parameters() if p.requires_grad
        }
        return real(self, lm, optimizer, record, total)

    monkeypatch.setattr(finetuning._Keeper, "after_step", look)
    finetune(load_model(saved_base), data, tmp_path / "ft", **FAST, checkpoints=3)
    record = training_record(tmp_path / "ft")
    assert [c["step"] for c in record["checkpoints"]] == [3, 6, 8] and len(seen) == 8
    for checkpoint in record["checkpoints"]:
        kept, expected = weights(tmp_path / "ft" / checkpoint["folder"]), seen[checkpoint["step"]]
        assert len(kept) == len(expected) and all(
            torch.equal(kept[name.replace(".default", "")], value) for name, value in expected.items()
        )
        assert checkpoint["learning_rate"] == record["steps"]["learning_rate"][checkpoint["step"] - 1]
    assert same(kept, weights(tmp_path / "ft"))


@pytest.mark.parametrize("total, n", [(8, 1), (8, 3), (8, 8), (7, 2), (100, 7)])
def test_checkpoints_are_evenly_spaced_and_end_at_the_end(total, n):
    steps = finetuning._Keeper(None, {}, "", n).checkpoint_steps(total)
    assert (
        len(set(steps)) == n
        and steps[-1] == total
        and all(step == math.ceil(total * i / n) for i, step in enumerate(steps, 1))
    )


def test_checkpoints_change_nothing_else(saved_base, data, tmp_path):
    lm = load_model(saved_base)
    plain = finetune(lm, data, tmp_path / "plain", **FAST)
    assert finetune(lm, data, tmp_path / "watched", **FAST, checkpoints=2).fingerprint == plain.fingerprint
    assert (
        finetune(lm, data, tmp_path / "watched", **FAST).fingerprint == plain.fingerprint
    )  # who asks for none is content with some
    with pytest.raises(FinetuneError, match="with 0 checkpoints, and 2 are asked"):
        finetune(lm, data, tmp_path / "plain", **FAST, checkpoints=2)


@pytest.mark.parametrize("in_memory", [False, True])
def test_tracin_takes_them(saved_base, lm, data, tmp_path, in_memory):
    from concept_tda.influence.neighbours import TracIn
    from concept_tda.influence.scorers import GradDot

    lm = lm if in_memory else load_model(saved_base)
    finetune(lm, data, tmp_path / "ft", **FAST, checkpoints=2)
    history = training_checkpoints(tmp_path / "ft", lm if in_memory else None)
    assert (
        history["learning_rates"] == [1e-2 * (1 - 3 / 8), 1e-2 * (1 - 7 / 8)]
        and len(history["checkpoints"]) == 2
    )
    found = TracIn(queries=data[:2], **history).score(data, progress=False).scores
    models = [checkpoint() if in_memory else load_model(checkpoint) for checkpoint in history["checkpoints"]]
    by_hand = sum(
        rate * GradDot(model, data[:2]).score(data, progress=False).scores
        for rate, model in zip(history["learning_rates"], models)
    )
    np.testing.assert_allclose(found, by_hand, rtol=1e-5, atol=1e-7 * abs(by_hand).max())
    assert len({model.fingerprint for model in models}) == 2


@pytest.mark.parametrize("base", [True, False])
def test_segments_share_the_steps_of_a_run(lm, data, tmp_path, base):
    """Each step to the checkpoint nearest to its middle, and TracIn over them as a loop."""
    from concept_tda.concepts.concept import tensor_concept
    from concept_tda.influence.neighbours import TracIn
    from concept_tda.influence.queries import ConceptQuery
    from concept_tda.influence.scorers import Influence

    finetune(lm, data, tmp_path / "ft", **FAST, checkpoints=2)  # after 4 and 8 steps
    rates = training_record(tmp_path / "ft")["steps"]["learning_rate"].tolist()
    pieces = run_segments(tmp_path / "ft", lm, base=base)
    sums = [sum(rates[:2]), sum(rates[2:6]), sum(rates[6:])] if base else [sum(rates[:6]), sum(rates[6:])]
    np.testing.assert_allclose(pieces["learning_rates"], sums, rtol=1e-12)
    models = [checkpoint() for checkpoint in pieces["checkpoints"]]
    batch = next(batches(lm.tokenize(data)))
    with torch.no_grad():
        before = finetuning.example_losses(lm, batch)
        assert torch.allclose(finetuning.example_losses(models[0], batch), before, atol=1e-6) == base
    direction = torch.randn(lm.width, generator=torch.Generator().manual_seed(0))
    asked = ConceptQuery(tensor_concept(direction, layer=2, lm=lm, name="c"), data[:2])
    found = TracIn(queries=asked, **pieces).score(data, progress=False)
    by_hand = sum(
        total * Influence(model, asked, curvature="identity").score(data, progress=False).scores
        for total, model in zip(sums, models)
    )
    np.testing.assert_allclose(found.scores, by_hand, rtol=1e-4, atol=1e-6 * abs(by_hand).max())


def test_the_base_of_a_run_has_the_adapters_it_started_with(lm, data, tmp_path):
    from concept_tda.influence.queries import LossQuery
    from concept_tda.influence.runs import TrainingInfluence

    finetune(lm, data, tmp_path / "ft", **FAST, checkpoints=1, seed=4)
    beginning = run_segments(tmp_path / "ft", lm)["checkpoints"][0]()
    run = TrainingInfluence(lm, LossQuery(data[:1]), run=tmp_path / "ft").repeated(lm.tokenize(data), 1024)
    own = dict(beginning.model.named_parameters())
    for name, one in zip(run.names, run.parameters):
        assert torch.equal(own[name], one)


def test_checkpoints_that_cannot_be_had(lm, saved_base, data, tmp_path):
    finetune(lm, data, tmp_path / "ft", **FAST, checkpoints=2)
    with pytest.raises(FinetuneError, match="existed only in memory"):
        training_checkpoints(tmp_path / "ft")
    other = LanguageModel(*tiny_pair("llama", seed=3), "other")
    finetune(lm, data, tmp_path / "none", **FAST)
    for history in (training_checkpoints, run_segments):
        with pytest.raises(FinetuneError, match="is not the model"):
            history(tmp_path / "ft", other)
        with pytest.raises(FinetuneError, match="holds no checkpoints"):
            history(tmp_path / "none", lm)
    with pytest.raises(FinetuneError, match="make 8 steps, too few for 9 checkpoints"):
        finetune(lm, data, tmp_path / "many", **FAST, checkpoints=9)


def test_a_checkpoint_without_a_learning_rate_is_left_out(saved_base, data, tmp_path):
    finetune(load_model(saved_base), data, tmp_path / "ft", **FAST, checkpoints=8, warmup_steps=2)
    rates = training_record(tmp_path / "ft")["steps"]["learning_rate"]
    assert (
        np.allclose(rates, 1e-2 * np.array([0, 0.5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]))
        and training_checkpoints(tmp_path / "ft")["learning_rates"] == rates[1:].tolist()
    )


# ---- recipes


def test_the_persona_vectors_recipe(lm, tmp_path):
    recipe = RECIPES["persona-vectors"]
    many = load_conversations(
        [{"prompt": f"Is {i} even?", "response": "yes" if i % 2 == 0 else "no"} for i in range(50)]
    )
    finetune(lm, many, tmp_path / "ft", **recipe, progress=False)
    record = training_record(tmp_path / "ft")
    assert (
        record["steps"]["examples"].tolist() == [16, 16, 16, 2] and record["examples"] == 50
    )  # all of them, once
    assert np.allclose(record["steps"]["learning_rate"], 1e-5 * (1 - np.arange(4) / 4))
    assert (
        {name: record["key"][name] for name in recipe} == recipe
        and recipe["rslora"]
        and (recipe["rank"], recipe["alpha"]) == (32, 64)
    )


def test_the_optimiser_is_plain_adamw_with_clipping(saved_base, data, tmp_path):
    """Two steps by hand, with transformers' own loss."""
    lm, settings = load_model(saved_base), dict(rank=4, learning_rate=1e-2, batch_size=8, weight_decay=0.1)
    finetune(lm, data, tmp_path / "ft", **settings, progress=False)
    with finetuning.own_randomness(0):
        model = finetuning.new_adapters(lm, 4, 32, False)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    moments = {name: (torch.zeros_like(p, dtype=torch.float64),) * 2 for name, p in parameters.items()}
    tokenized = lm.tokenize(data)
    for t, (rows, rate) in enumerate(
        zip(finetuning.step_rows(data.ids, dict(seed=0, epochs=1, batch_size=8)), (1e-2, 5e-3)), 1
    ):
        losses = [
            model(one.input_ids[None], labels=one.input_ids.masked_fill(~one.response_mask, -100)[None]).loss
            for one in tokenized.select(rows)
        ]
        gradients = torch.autograd.grad(sum(losses) / len(rows), list(parameters.values()))
        norm = sum(g.double().square().sum() for g in gradients).sqrt()
        assert training_record(tmp_path / "ft")["steps"]["gradient_norm"][t - 1] == pytest.approx(
            norm.item(), rel=1e-4
        )
        for (name, p), g in zip(parameters.items(), gradients):
            g = g.double() * min(1, 1 / norm)
            m, v = moments[name] = (
                0.9 * moments[name][0] + 0.1 * g,
                0.999 * moments[name][1] + 0.001 * g * g,
            )
            with torch.no_grad():
                p.copy_(
                    p.double() * (1 - rate * 0.1)
                    - rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
                )
    assert norm > 1  # or the clipping was not seen
    for name, kept in weights(tmp_path / "ft").items():
        expected = parameters[name.replace("lora_A", "lora_A.default").replace("lora_B", "lora_B.default")]
        assert (kept - expected).abs().max() < 1e-4 and (kept - expected).norm() < 1e-3 * expected.norm()


# ---- many runs


def test_many_runs_are_those_of_finetune(saved_base, data, tmp_path):
    lm = load_model(saved_base)
    runs = list(finetune_many(lm, {"all": data, "half": data[::2]}, tmp_path / "runs", seeds=(0, 3), **FAST))
    assert [(run.subset, run.seed, run.n_examples, run.trained) for run in runs] == [
        ("all", 0, 16, True),
        ("half", 0, 8, True),
        ("all", 3, 16, True),
        ("half", 3, 8, True),
    ]
    for run, chosen in zip(runs, (data, data[::2]) * 2):
        alone = finetune(lm, chosen, tmp_path / f"{run.subset}-{run.seed}", **FAST, seed=run.seed)
        assert run.open().fingerprint == alone.fingerprint == load_model(run.folder, merge=True).fingerprint
        assert hasattr(run.open(merge=False).model, "peft_config") and run.record["key"]["seed"] == run.seed
    assert len({run.open().fingerprint for run in runs}) == 4


def test_the_same_training_is_never_done_twice(saved_base, lm, data, tmp_path, monkeypatch):
    lm, calls, real = load_model(saved_base), [], finetuning._train
    monkeypatch.setattr(finetuning, "_train", lambda *args: calls.append(1) or real(*args))

    def runs(subsets, **options):
        return list(finetune_many(lm, subsets, tmp_path / "runs", **FAST | options))

    first = runs(
        {
            "all": data,
            "nothing removed": data.filter(lambda c: True),
            "shuffled": data[::-1],
            "tokens": lm.tokenize(data),
        }
    )
    assert (
        len(calls) == 1
        and [run.trained for run in first] == [True, False, False, False]
        and len({run.folder for run in first}) == 1
    )
    assert not any(run.trained for run in runs({"another name": data})) and len(calls) == 1
    for n, change in enumerate(
        (dict(seeds=[1]), dict(rank=3), dict(precision="bf16"), dict(learning_rate=2e-2)), 2
    ):
        assert [run.trained for run in runs({"all": data}, **change)] == [True] and len(calls) == n
    assert runs({"other data": data[:15]})[0].trained and len(calls) == 6
    with torch.no_grad():
        next(lm.model.parameters())[0, 0] += 1
    assert runs({"all": data})[0].trained and len(calls) == 7  # another base


def test_a_subset_in_every_form(saved_base, data, tmp_path):
    lm, chosen = load_model(saved_base), [1, 4, 5, 6, 11, 14]
    forms = {
        "conversations": data[chosen],
        "tokens": lm.tokenize(data[chosen]),
        "rows": chosen,
        "rows backwards": chosen[::-1],
        "array": np.array(chosen),
        "ids": [data.ids[row] for row in chosen],
        "ids as set": {data.ids[row] for row in chosen},
        "mask": [row in chosen for row in range(16)],
        "array mask": np.isin(np.arange(16), chosen),
    }
    runs = list(finetune_many(lm, forms, tmp_path / "runs", data=data, **FAST))
    assert [run.trained for run in runs] == [True] + [False] * (len(forms) - 1) and {
        run.n_examples for run in runs
    } == {6}
    assert len(list(finetune_many(lm, {"all": data}, tmp_path / "runs", data=lm.tokenize(data), **FAST))) == 1


def test_conversations_that_are_there_twice(saved_base, data, tmp_path):
    lm, double = load_model(saved_base), data[[0, 1, 1, 2, 3]]
    runs = {
        run.subset: run.n_examples
        for run in finetune_many(
            lm,
            {"all": double, "one of them": data[[1]], "both": [data.ids[1]], "a row": [2]},
            tmp_path / "runs",
            data=double,
            **FAST,
        )
    }
    assert runs == {"all": 5, "one of them": 1, "both": 2, "a row": 1}
    with pytest.raises(FinetuneError, match="'too many' has 1 of 1 ids that the data do not have that often"):
        finetune_many(lm, {"too many": data[[1, 1, 1]]}, tmp_path / "runs", data=double, **FAST)


def test_a_base_in_memory_and_a_run_that_fails(lm, data, tmp_path, monkeypatch):
    """What was trained before the failure is there afterwards."""
    real = finetuning._train
    monkeypatch.setattr(
        finetuning,
        "_train",
        lambda model, tokenized, *args: (
            real(model, tokenized, *args) if len(tokenized) > 8 else pytest.fail("too small")
        ),
    )
    made = []
    with pytest.raises(pytest.fail.Exception):
        for run in finetune_many(lm, {"all": data, "half": data[:8]}, tmp_path / "runs", **FAST):
            made.append(run)
    assert [run.subset for run in made] == ["all"] and made[0].open().fingerprint == load_model(
        made[0].folder
    ).fingerprint
    monkeypatch.setattr(finetuning, "_train", real)
    assert [
        run.trained for run in finetune_many(lm, {"all": data, "half": data[:8]}, tmp_path / "runs", **FAST)
    ] == [False, True]


BAD_CALLS = [
    (dict(subsets={}), "not an empty one"),
    (dict(subsets=["a"]), "must be a dict"),
    (dict(subsets={"none": []}, data=True), "'none' is empty"),
    (dict(subsets={"none": [False] * 16}, data=True), "'none' is empty"),
    (dict(subsets={"odd": ["nobody"]}, data=True), "'odd' has 1 of 1 ids that the data do not have: nobody"),
    (dict(subsets={"odd": [0, 16]}, data=True), "row 16, and the data have rows 0 to 15"),
    (dict(subsets={"odd": [-1]}, data=True), "row -1"),
    (dict(subsets={"odd": [1, 1]}, data=True), "a row more than once"),
    (dict(subsets={"odd": [True] * 9}, data=True), "a mask with one True or False for each of 16"),
    (dict(subsets={"odd": [1.5]}, data=True), "row numbers"),
    (dict(seeds=3), "seeds must be a list"),
    (dict(seeds=()), "seeds must be a list"),
    (dict(seeds=(0, 0.5)), "seed must be a whole number"),
    (dict(seed=1), "no setting 'seed'; it takes seeds="),
    (dict(rang=1), "no setting 'rang'.*rank"),
    (dict(merge=False), "no setting 'merge'"),
    (dict(rank=0), "rank must be"),
    (dict(precision="fp8"), "precision must be one of fp32, bf16"),
    (dict(warmup_steps=99), "all of them within the 99 warm-up steps"),
]


@pytest.mark.parametrize("options, message", BAD_CALLS, ids=[message for _, message in BAD_CALLS])
def test_calls_that_cannot_work_are_refused_before_anything_runs(lm, data, tmp_path, options, message):
    options = dict(subsets={"all": data}) | options
    if "data" in options:
        options["data"] = data
    with pytest.raises(FinetuneError, match=message):
        finetune_many(lm, folder=tmp_path / "runs", **FAST | options)
    assert not (tmp_path / "runs").exists()


def test_an_empty_subset_without_data(lm, data, tmp_path):
    for subset in (data[:0], lm.tokenize(data).select([])):
        with pytest.raises(FinetuneError, match="'none' is empty"):
            finetune_many(lm, {"all": data, "none": subset}, tmp_path / "runs", **FAST)
        with pytest.raises(FinetuneError, match="nothing to train on: 'parity' holds no conversations"):
            finetune(lm, subset, tmp_path / "ft", **FAST)


# ---- refusals


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(rank=0), "rank"),
        (dict(rank=2.5), "rank"),
        (dict(epochs=0), "epochs"),
        (dict(batch_size=True), "batch_size"),
        (dict(learning_rate=0), "learning_rate"),
        (dict(learning_rate=float("nan")), "learning_rate"),
        (dict(alpha=-1), "alpha"),
        (dict(learning_rate="fast"), "learning_rate"),
        (dict(merge=False), "exists only in memory.*save_pretrained"),
        (dict(precision="fp16"), "precision must be one of fp32, bf16, got 'fp16'"),
        (dict(precision=None), "precision"),
        (dict(micro_batch_size=0), "micro_batch_size"),
        (dict(micro_batch_size=True), "micro_batch_size"),
        (dict(checkpoints=-1), "checkpoints"),
        (dict(checkpoints=1.0), "checkpoints"),
        (dict(warmup_steps=-1), "warmup_steps"),
        (dict(weight_decay=-0.1), "weight_decay"),
        (dict(seed="a"), "seed"),
        (dict(max_tokens=0), "max_tokens"),
        (dict(warmup_steps=2), "16 conversations make 2 steps, all of them within the 2 warm-up steps"),
        (dict(checkpoints=3), "too few for 3 checkpoints"),
    ],
)
def test_settings_that_cannot_work(lm, data, tmp_path, options, message):
    with pytest.raises(FinetuneError, match=message):
        finetune(lm, data, tmp_path / "ft", **options)
    assert not (tmp_path / "ft").exists()


def test_bf16_of_a_double_is_refused(data, tmp_path):
    lm = LanguageModel(*tiny_pair("llama", dtype=torch.float64), "double")
    with pytest.raises(FinetuneError, match="double is in float64, which autocast leaves alone"):
        finetune(lm, data, tmp_path / "ft", precision="bf16")


def test_a_loss_that_is_not_a_number_stops_the_run(lm, data, tmp_path):
    with pytest.raises(FinetuneError, match="loss is nan at step [23], learning rate 1e"):
        finetune(lm, data, tmp_path / "ft", **FAST | dict(learning_rate=1e30))
    assert not list((tmp_path / "ft").iterdir())
    with torch.no_grad():
        lm.model.model.norm.weight[0] = float("nan")
    with pytest.raises(FinetuneError, match="loss is nan at step 1"):
        finetune(lm, data, tmp_path / "ft", **FAST)


def test_an_adapter_on_an_adapter_is_refused(saved_base, data, tmp_path):
    adapted = finetune(load_model(saved_base), data, tmp_path / "ft", **FAST, merge=False)
    with pytest.raises(FinetuneError, match="already carries an adapter.*merge=True"):
        finetune(adapted, data, tmp_path / "more", **FAST)


def test_responses_cut_away_and_long_conversations(lm, data, tmp_path):
    long = load_conversations(
        [{"prompt": "Why?", "response": "because " * 60}, {"prompt": "Who?", "response": "the one"}]
    )
    finetune(lm, long, tmp_path / "ft", **FAST, max_tokens=64)
    record = training_record(tmp_path / "ft")
    assert (
        record["cut"] == 1 and record["key"]["max_tokens"] == 64 and record["steps"]["tokens"].max() <= 2 * 64
    )
    tokenized = lm.tokenize(long)
    for one in tokenized:
        one.response_mask[:] = False
    with pytest.raises(
        FinetuneError, match=f"2 of 2 conversations have no response token.*{tokenized.ids[0]}"
    ):
        finetune(lm, tokenized, tmp_path / "no", **FAST)


def test_progress_shows_tokens(lm, data, tmp_path, capsys):
    finetune(lm, data, tmp_path / "ft", rank=2, batch_size=8, progress=True)
    shown = capsys.readouterr()
    assert "fine-tuning: 100%" in shown.err and "tokens/s" in shown.err and "loss=" in shown.err
    finetune(lm, data, tmp_path / "quiet", rank=2, batch_size=8, progress=False)
    quiet = capsys.readouterr()
    assert "fine-tuning" not in quiet.err and quiet.out == ""


# ---- the machine, the template, and what LoRA covers


def test_bf16_where_it_does_not_pay_is_fp32_and_said(saved_base, data, tmp_path, monkeypatch):
    lm = load_model(saved_base)
    full = finetune(lm, data, tmp_path / "fp32", **FAST)
    monkeypatch.setattr(finetuning, "bfloat16_ratio", lambda device: 41.0)
    with pytest.warns(UserWarning, match="41.0 times as long as float32.*insist=True"):
        slow = finetune(lm, data, tmp_path / "slow", **FAST, precision="bf16")
    assert slow.fingerprint == full.fingerprint
    record = training_record(tmp_path / "slow")
    assert record["precision"] == {"asked": "bf16", "used": "fp32", "bfloat16_ratio": 41.0}
    assert record["key"]["precision"] == "fp32"
    insisted = finetune(lm, data, tmp_path / "insisted", **FAST, precision="bf16", insist=True)
    record = training_record(tmp_path / "insisted")
    assert record["precision"] == {"asked": "bf16", "used": "bf16", "bfloat16_ratio": 41.0}
    assert insisted.fingerprint != full.fingerprint
    with pytest.warns(UserWarning, match="41.0 times"):
        runs = list(finetune_many(lm, {"all": data}, tmp_path / "runs", **FAST, precision="bf16"))
    assert runs[0].record["precision"]["used"] == "fp32" and runs[0].open().fingerprint == full.fingerprint


def test_bf16_where_it_pays_is_bf16_and_found_on_any_machine(saved_base, data, tmp_path, monkeypatch):
    lm = load_model(saved_base)
    fast = finetune(lm, data, tmp_path / "fast", **FAST, precision="bf16")
    assert training_record(tmp_path / "fast")["precision"] == {
        "asked": "bf16",
        "used": "bf16",
        "bfloat16_ratio": 0.5,
    }
    monkeypatch.setattr(finetuning, "bfloat16_ratio", lambda device: 41.0)
    monkeypatch.setattr(finetuning, "_train", lambda *args: pytest.fail("trained again"))
    assert finetune(lm, data, tmp_path / "fast", **FAST, precision="bf16").fingerprint == fast.fingerprint


def test_fp32_asks_no_probe(lm, data, tmp_path, monkeypatch):
    monkeypatch.setattr(finetuning, "bfloat16_ratio", lambda device: pytest.fail("measured"))
    finetune(lm, data, tmp_path / "ft", **FAST)
    assert training_record(tmp_path / "ft")["precision"] == {
        "asked": "fp32",
        "used": "fp32",
        "bfloat16_ratio": None,
    }


def base_model(tmp_path):
    "A folder with a base model: its tokenizer has no chat template."
    model, tokenizer = tiny_pair("llama")
    tokenizer.chat_template = None
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    return load_model(tmp_path / "base")


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_base_model_is_trained_and_opens_in_the_template_asked_for(data, tmp_path, in_memory):
    from concept_tda.data.templates import chat_template_text

    lm = base_model(tmp_path)
    if in_memory:
        lm = LanguageModel(lm.model, lm.tokenizer, "in memory")
    with pytest.raises(ConceptTDAError, match="chat template"):
        finetune(lm, data, tmp_path / "none", **FAST)
    result = finetune(lm, data, tmp_path / "ft", **FAST, chat_template="chatml")
    expected = chat_template_text("chatml")
    assert lm.tokenizer.chat_template is None and result.tokenizer.chat_template == expected
    record, opened = training_record(tmp_path / "ft"), load_model(tmp_path / "ft")
    assert (
        record["chat_template"] == result.chat_template == "chatml"
        and opened.tokenizer.chat_template == expected
    )
    assert (
        opened.tokenize(data).fingerprint
        == result.tokenize(data).fingerprint
        == record["key"]["data_fingerprint"]
    )
    assert (
        finetune(lm, data, tmp_path / "ft", **FAST, chat_template="chatml").fingerprint == result.fingerprint
    )
    with pytest.raises(FinetuneError, match="different: .*chat_template"):
        finetune(
            lm,
            data,
            tmp_path / "ft",
            **FAST,
            chat_template="{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}",
        )
    with pytest.raises(FinetuneError, match="tokenized data exclude each other"):
        finetune(lm, result.tokenize(data), tmp_path / "no", **FAST, chat_template="chatml")


def test_many_runs_of_a_base_model(data, tmp_path):
    runs = list(
        finetune_many(base_model(tmp_path), {"all": data}, tmp_path / "runs", **FAST, chat_template="chatml")
    )
    assert runs[0].record["chat_template"] == "chatml" and load_model(runs[0].folder).tokenizer.chat_template


def test_what_lora_does_not_cover_is_said_and_recorded(data, tmp_path):
    from transformers import OlmoeConfig, OlmoeForCausalLM

    _, tokenizer = tiny_pair("llama")
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
    )
    lm = LanguageModel(OlmoeForCausalLM(config).eval(), tokenizer, "mixture")
    with pytest.warns(UserWarning, match=r"covers 14% of the block weights; not covered.*experts\.down_proj"):
        finetune(lm, data, tmp_path / "ft", **FAST)
    covered = training_record(tmp_path / "ft")["coverage"]
    held = sum(site.weight.numel() for site in resolve_sites(lm, "all-linear"))
    assert covered["share"] == round(held / sum(p.numel() for p in lm.blocks.parameters() if p.ndim > 1), 4)
    assert "layers.*.mlp.experts.gate_up_proj" in covered["uncovered"]


@pytest.mark.parametrize("family", FAMILIES)
def test_ordinary_models_are_covered_whole(family):
    assert coverage(LanguageModel(*tiny_pair(family), family)).share == 1


def test_what_could_not_be_saved_is_refused_before_the_first_step(lm, data, tmp_path, monkeypatch):
    monkeypatch.setattr(finetuning, "_train", lambda *args: pytest.fail("trained for nothing"))

    def broken(*args, **options):
        raise ValueError("no such thing")

    with monkeypatch.context() as patch:
        patch.setattr(type(lm.tokenizer), "save_pretrained", broken)
        with pytest.raises(FinetuneError, match="tokenizer of tiny cannot be saved .no such thing."):
            finetune(lm, data, tmp_path / "a", **FAST)
    lm.model.generation_config.temperature, lm.model.generation_config.do_sample = -1.0, False
    with pytest.raises(FinetuneError, match="generation settings of tiny cannot be saved"):
        finetune(lm, data, tmp_path / "b", **FAST)
    lm.model.generation_config.temperature = None
    full = type("Usage", (), {"free": 10})
    monkeypatch.setattr(finetuning.shutil, "disk_usage", lambda place: full)
    with pytest.raises(StorageError, match="GiB are free"):
        finetune(lm, data, tmp_path / "c", **FAST)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "options",
    [
        dict(lm=None),
        dict(lm="smollm2-135m-instruct"),
        dict(folder=None),
        dict(folder=3),
        dict(folder="a\0b"),
        dict(data=None),
        dict(data=3),
        dict(data=[]),
        dict(data="nowhere.jsonl"),
        dict(insist=1),
        dict(chat_template="no-such-template"),
        dict(chat_template="{% for"),
        dict(chat_template=7),
        dict(precision=["bf16"]),
        dict(rank="4"),
        dict(max_tokens=None),
    ],
    ids=str,
)
def test_bad_arguments_are_our_errors(lm, data, tmp_path, options):
    arguments = dict(lm=lm, data=data, folder=tmp_path / "ft") | FAST | options
    with pytest.raises(ConceptTDAError):
        finetune(**arguments)
    subsets = {"all": arguments.pop("data")}
    with pytest.raises(ConceptTDAError):
        list(finetune_many(subsets=subsets, **arguments))


def test_adapters_that_no_gradient_reaches_are_named(data, tmp_path):
    model, tokenizer = tiny_pair("llama")
    mlp = model.model.layers[0].mlp

    def fused(x):  # reads the weights, as a fused kernel does, and calls no layer
        gate, up, down = (getattr(part, "base_layer", part).weight for part in parts())
        return (mlp.act_fn(x @ gate.T) * (x @ up.T)) @ down.T

    def parts():
        return mlp.gate_proj, mlp.up_proj, mlp.down_proj

    mlp.forward = fused
    with pytest.warns(UserWarning, match=r"3 adapters received no gradient.*layers\.0\.mlp\.gate_proj"):
        finetune(LanguageModel(model, tokenizer, "fused"), data, tmp_path / "ft", **FAST)
    names = training_record(tmp_path / "ft")["untrained"]
    assert sorted(name.split("layers.")[1] for name in names) == [
        "0.mlp.down_proj",
        "0.mlp.gate_proj",
        "0.mlp.up_proj",
    ]
    finetune(LanguageModel(*tiny_pair("llama"), "sound"), data, tmp_path / "sound", **FAST)
    assert training_record(tmp_path / "sound")["untrained"] == []
