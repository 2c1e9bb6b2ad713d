"""'It opened' is not 'it is the model': what is missing, unplaced, renamed or of another shape is refused or
mended, never guessed."""

import json
import random
import shutil
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from concept_tda.data.conversations import load_conversations
from concept_tda.foundation.errors import ConceptTDAError
from concept_tda.influence.baselines import MeanLoss
from concept_tda.model.loading import ModelError, load_model

from tiny import tiny_model, tiny_pair, tiny_tokenizer

DATA = [{"prompt": f"Is it{' so' * i}?", "response": "yes it is" if i % 2 else "no"} for i in range(3)]


def losses(lm):
    return MeanLoss(lm).score(load_conversations(DATA), progress=False).scores.round(5).tolist()


@pytest.fixture
def folder(tmp_path):
    model, tokenizer = tiny_pair("llama")
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def adapter(folder, tmp_path):
    """An adapter with weights that matter, its folder, and the losses of the adapted model."""
    return save_adapter(folder, tmp_path / "adapter")


def save_adapter(base, place, **settings):
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings}
    adapted = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**settings)
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) / 4)
    adapted.eval().save_pretrained(place)
    return place, losses(load_model((adapted, tiny_tokenizer())))


def change(file, edit):
    """Rewrite a safetensors file; `edit` takes and gives the tensors by name."""
    save_file(edit(load_file(file)), file, metadata={"format": "pt"})


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model.", "model.language_model."])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_wrappers_prefix_is_taken_off_and_said(folder, prefix, sharded, tmp_path):
    right = losses(load_model(folder))
    if sharded:
        model = tiny_model("llama")
        shutil.rmtree(folder)
        model.save_pretrained(folder, max_shard_size="20KB")
        tiny_tokenizer().save_pretrained(folder)
        assert len(list(folder.glob("*.safetensors"))) > 1
    for file in folder.glob("*.safetensors"):
        change(file, lambda weights: {prefix + name: w for name, w in weights.items()})
    index = folder / "model.safetensors.index.json"
    if sharded:
        record = json.loads(index.read_text())
        record["weight_map"] = {prefix + name: file for name, file in record["weight_map"].items()}
        index.write_text(json.dumps(record))
    with pytest.warns(UserWarning, match="begin with"):
        lm = load_model(folder)
    assert losses(lm) == right and prefix in lm.placement[0]


def test_weights_that_are_missing_or_unplaced_are_named(folder):
    file, whole = folder / "model.safetensors", load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for edit, message in (
        (
            lambda w: {k: v for k, v in w.items() if k != name},
            f"1 weights of the model are not in its files .*{name}",
        ),
        (
            lambda w: {k: v for k, v in w.items() if "layers.1" not in k},
            "9 weights of the model are not in its files",
        ),
        (
            lambda w: {**w, "model.layers.2.mlp.up_proj.weight": w[name].clone()},
            "1 weights in its files belong to no layer .*layers.2",
        ),
        (lambda w: {k.replace("up_proj", "upp_proj"): v for k, v in w.items()}, "upp_proj"),
        (lambda w: {**w, name: w[name][:5].clone()}, "shape|size"),
    ):
        save_file(edit(dict(whole)), file, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=message):
            load_model(folder)
    save_file(whole, file, metadata={"format": "pt"})
    assert "all 21 weights" in load_model(folder).placement[0]


@pytest.mark.parametrize(
    "kind, message",
    [
        ("LlamaModel", "embedding, reward or classification"),
        ("LlamaForSequenceClassification", "embedding, reward or classification"),
    ],
)
def test_models_of_another_kind_are_refused(kind, message, tmp_path):
    config = tiny_model("llama").config
    getattr(transformers, kind)(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(ModelError, match="lm_head.weight.*causal language model"):
        load_model(tmp_path)  # it claims to be one


def test_tied_weights_may_be_absent(tmp_path):
    for family in ("llama-tied", "gpt2", "gemma"):
        model, tokenizer = tiny_pair(family)
        for part in (model, tokenizer):
            part.save_pretrained(tmp_path / family)
        assert losses(load_model(tmp_path / family)) == losses(load_model((model, tokenizer)))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": "all-linear"},
        {"trainable_token_indices": [3, 5]},
    ],
)
@pytest.mark.parametrize("merge", [False, True])
def test_adapters_of_every_kind_are_placed(folder, settings, merge, tmp_path):
    place, right = save_adapter(folder, tmp_path / "adapter", **settings)
    lm = load_model(place, merge=merge)
    assert torch.allclose(torch.tensor(losses(lm)), torch.tensor(right), atol=2e-5)
    assert "adapter weights" in lm.placement[1]


@pytest.mark.parametrize("merge", [False, True])
def test_adapters_that_do_not_fit_are_refused(folder, adapter, merge, tmp_path):
    place, right = adapter
    file = place / "adapter_model.safetensors"
    whole = load_file(file)
    assert losses(load_model(place, merge=merge)) == pytest.approx(right, abs=2e-5)
    first = next(iter(whole))
    for edit in (
        lambda w: {
            k.replace("model.model.layers", "model.model.language_model.layers"): v for k, v in w.items()
        },
        lambda w: {k.replace("layers.1.", "layers.7."): v for k, v in w.items()},
        lambda w: {k: v for k, v in w.items() if k != first},
        lambda w: {**w, first.replace("layers.0", "layers.9"): w[first].clone()},
        lambda w: {},
    ):
        save_file({k: v.contiguous() for k, v in edit(dict(whole)).items()}, file, metadata={"format": "pt"})
        with pytest.raises(ModelError, match="adapter"):
            load_model(place, merge=merge)
    save_file(whole, file, metadata={"format": "pt"})
    deeper = tmp_path / "deeper"
    for part in (tiny_model("llama", n_layers=4), tiny_tokenizer()):
        part.save_pretrained(deeper)
    with pytest.raises(ModelError, match="8 of the model's adapter weights are not in the file"):
        load_model(deeper, adapter=place, merge=merge)
    wider = tmp_path / "wider"
    for part in (tiny_model("llama", width=32), tiny_tokenizer()):
        part.save_pretrained(wider)
    with pytest.raises(ModelError):
        load_model(wider, adapter=place, merge=merge)


def test_a_tokenizer_that_outgrew_the_embedding_is_refused_and_both_ways_out_work(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|place|>", "<|time|>"])
    tokenizer.save_pretrained(folder)
    model = tiny_model("llama")
    rows = model.get_input_embeddings().num_embeddings
    for source in (folder, (model, tokenizer)):
        with pytest.raises(
            ModelError,
            match=(
                rf"'<\|place\|>' with id {rows}, .*rows 0 to "
                rf"{rows - 1}.*resize_token_embeddings\({rows + 2}\)"
            ),
        ):
            load_model(source)
    load_model((model, tiny_tokenizer()))
    model.resize_token_embeddings(rows + 2)
    load_model((model, tokenizer))


def vision_language(depth):
    torch.manual_seed(0)
    text = dict(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
        rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
    )
    vision = dict(depth=depth, embed_dim=16, hidden_size=32, num_heads=2, patch_size=14)
    return transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
    ).eval()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_text_blocks_are_found_whatever_the_depth_of_the_vision_tower(depth, tmp_path):
    model = vision_language(depth)
    assert "language_model" in load_model((model, tiny_tokenizer())).blocks_path
    for part in (model, tiny_tokenizer()):
        part.save_pretrained(tmp_path)
    lm = load_model(tmp_path)
    assert "language_model" in lm.blocks_path and losses(lm) == losses(load_model((model, tiny_tokenizer())))


def test_encoder_decoders_are_refused():
    config = transformers.T5Config(vocab_size=300, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    with pytest.raises(ModelError):
        load_model((transformers.T5ForConditionalGeneration(config), tiny_tokenizer()))


def test_chat_template_goes_on_a_copy_and_is_recorded(folder, tmp_path):
    bare = tiny_tokenizer(None)
    shutil.rmtree(folder)
    for part in (tiny_model("llama"), bare):
        part.save_pretrained(folder)
    with pytest.raises(ConceptTDAError, match=r"chat_template=…\) takes .*chatml"):
        losses(load_model(folder))
    lm = load_model(folder, chat_template="chatml")
    assert lm.chat_template == "chatml" and "chatml" in repr(lm) and len(losses(lm)) == 3
    model = tiny_model("llama")
    lm = load_model((model, bare), chat_template="plain")
    assert bare.chat_template is None and lm.chat_template == "plain"
    assert load_model(lm).chat_template == "plain"
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    assert load_model((model, bare), chat_template=tmp_path / "own.jinja").tokenizer.chat_template.startswith(
        "{% for"
    )
    with pytest.raises(ConceptTDAError, match="neither the name of a template"):
        load_model(folder, chat_template="chatlm")


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(device="cuda:9"), "cannot be used here"),
        (dict(device="tpu"), "cannot be used here"),
        (dict(device_map="somewhere"), "cannot open"),
        (dict(dtype="float7"), "not known"),
        (dict(attention="psychic"), "cannot open"),
    ],
)
def test_settings_that_mean_nothing_here(folder, options, message):
    with pytest.raises(ModelError, match=message):
        load_model(folder, **options)


# ---- faults of every kind: the same losses, or an error of ours ----------------------------------


def mutate(draw, folder):
    """One change to the files of a model or an adapter; what was done, in words."""
    file = draw.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    if file.suffix == ".safetensors" and draw.random() < 0.7:
        weights = load_file(file)
        name = draw.choice(sorted(weights))
        kind = draw.choice(["drop", "rename", "reshape", "double", "nothing"])
        if kind == "drop":
            del weights[name]
        elif kind == "rename":
            weights[name.replace(".", "_", 1)] = weights.pop(name)
        elif kind == "reshape":
            weights[name] = weights[name].flatten()[1:].contiguous()
        elif kind == "double":
            weights[name + ".extra"] = weights[name].clone()
        save_file(weights, file, metadata={"format": "pt"})
        return f"{file.name}: {kind} {name}"
    if file.suffix == ".json" and draw.random() < 0.6:
        value = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(value, dict) and value:
            key = draw.choice(sorted(value))
            value[key] = draw.choice([None, [], {}, "?", -1, 10**12, "\\ud83d", [[[]]], True])
            file.write_text(json.dumps(value))
            return f"{file.name}: {key} = {value[key]!r}"
    data = file.read_bytes()
    cut = draw.randrange(len(data))
    changed = (
        data[:cut] + b"\xff\x00" + data[cut + 2 :] if file.suffix == ".json" else data[:cut]
    )  # nobody sees a flipped bit of a weight
    file.write_bytes(draw.choice([data[:cut], changed, b"", b"[]", b"[" * 100_000]))
    return f"{file.name}: bytes from {cut}"


def try_mutations(seeds, folder, adapter_place, tmp_path, right):
    for seed in seeds:
        draw = random.Random(seed)
        target = draw.choice([folder, adapter_place])
        copy = tmp_path / "copy"
        shutil.copytree(target, copy)
        what = mutate(draw, copy)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = losses(load_model(copy))
        except ConceptTDAError as err:
            assert str(err).strip(), what
        else:
            harmless = any(
                word in what for word in ("config.json", "tokenizer", "generation", "README", "chat_template")
            )
            if not harmless:
                assert found == pytest.approx(right[target], abs=2e-5), (
                    f"seed {seed}: {what} changed the model unseen"
                )
        finally:
            shutil.rmtree(copy)


def test_faults_in_files_are_errors_of_ours(folder, adapter, tmp_path):
    place, adapted = adapter
    try_mutations(range(60), folder, place, tmp_path, {folder: losses(load_model(folder)), place: adapted})


@pytest.mark.slow
def test_faults_in_files_are_errors_of_ours_at_length(folder, adapter, tmp_path):
    place, adapted = adapter
    try_mutations(
        range(1000, 2500), folder, place, tmp_path, {folder: losses(load_model(folder)), place: adapted}
    )
