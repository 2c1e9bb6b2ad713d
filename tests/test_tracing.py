"""The room `tracing`: activations equal the model's own, whatever the batching; answers that depend on
nothing but prompt and seed."""

import json
import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from concept_tda.data.batches import Batch, batches
from concept_tda.data.conversations import ConversationError, Conversations, load_conversations
from concept_tda.model import tracing
from concept_tda.model.loading import LayerError, ModelError, load_model
from concept_tda.model.tracing import (
    POOLINGS,
    TracingError,
    generate,
    layer_activations,
    pooled_activations,
    pooling_weights,
    token_activations,
)

from tiny import FAMILIES, tiny_model, tiny_pair, tiny_tokenizer

torch.set_num_threads(1)
ALL = FAMILIES + ("qwen3", "gemma2", "gemma3", "lora-llama", "lora-gpt2")


def make(family, dtype=torch.float32, n_layers=3):
    """A tiny LanguageModel of any family, with a LoRA adapter for "lora-…"."""
    if family.startswith("lora-"):
        lm = make(family.removeprefix("lora-"), dtype, n_layers)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(
                lm.model, LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=family == "lora-gpt2")
            )
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.1 * torch.randn_like(parameter))
        return load_model((model.eval(), lm.tokenizer))
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
        model = Gemma2ForCausalLM(
            Gemma2Config(**shape, query_pre_attn_scalar=4, sliding_window=16, attn_implementation="eager")
        )
    else:
        model = Gemma3ForCausalLM(Gemma3TextConfig(**shape, query_pre_attn_scalar=4, sliding_window=16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return load_model((model.to(dtype).eval(), tokenizer))


CHATS = load_conversations(
    [
        {"prompt": "Is 3 a big number?", "response": "No."},
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "the user"},
                {"role": "assistant", "content": "yes, the assistant"},
                {"role": "user", "content": "more?"},
                {"role": "assistant", "content": "no"},
            ]
        },
        {
            "prompt": "And a million, would you say that this is big?",
            "response": "Yes, a million is big, and a billion is bigger.",
        },
        {"prompt": "12", "response": "A dozen — not big.", "label": True},
    ]
)


def oracle(lm, data=CHATS):
    """[{layer: activations [T, d]}] by transformers alone: one conversation at a time, no padding; the last
    layer by a hook on the last block."""
    found = []
    for item in lm.tokenize(data):
        last = {}
        hook = lm.blocks[-1].register_forward_hook(
            lambda m, i, o: last.update(h=o[0] if isinstance(o, tuple) else o)
        )
        with torch.no_grad():
            hidden = lm.model(input_ids=item.input_ids[None], output_hidden_states=True).hidden_states
        hook.remove()
        found.append({layer: h[0] for layer, h in enumerate(hidden[:-1])} | {lm.n_layers: last["h"][0]})
    return found


def footprint(lm):
    """Everything about a model that tracing must leave alone."""
    return (
        [
            (
                type(m),
                m.training,
                m.__dict__.get("forward"),
                "__nnsight__" in m.__dict__,
                len(m._forward_hooks),
                len(m._forward_pre_hooks),
                len(m._backward_hooks),
            )
            for m in lm.model.modules()
        ],
        [(p.requires_grad, p.grad) for p in lm.model.parameters()],
        lm.tokenizer.padding_side,
        lm.tokenizer.pad_token,
        lm.model.config.use_cache,
        lm.model.generation_config.to_dict(),
    )


# ---- pooling -------------------------------------------------------------------------------------


def masks(*rows):
    """A Batch from texts: `.` token, `r` response token, `_` padding."""
    grid = [list(row) for row in rows]
    attention = torch.tensor([[c != "_" for c in row] for row in grid]).long()
    response = torch.tensor([[c == "r" for c in row] for row in grid])
    return Batch(torch.arange(10, 10 + len(rows)), torch.zeros_like(attention), attention, response)


def pooled_at(batch, pooling):
    """Positions with weight, per row; checks that the weights are a plain mean."""
    weights = pooling_weights(batch, pooling)
    assert weights.dtype == torch.float32 and weights.shape == batch.input_ids.shape
    torch.testing.assert_close(weights.sum(1), torch.ones(len(weights)))
    for row in weights:
        assert len(set(row[row > 0].tolist())) == 1 and (row >= 0).all()
    return [row.nonzero()[:, 0].tolist() for row in weights]


def test_pooling_weights():
    batch = masks("..rr.rrr", ".r..r___", "...r____")
    assert pooled_at(batch, "response_mean") == [[2, 3, 5, 6, 7], [1, 4], [3]]
    assert pooled_at(batch, "prompt_last") == [[4], [3], [2]]
    assert pooled_at(batch, "all_but_first") == [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4], [1, 2, 3]]


def test_pooling_weights_with_padding_in_front():
    batch = masks("..rr.rrr", "___.r..r", "____...r")
    assert pooled_at(batch, "response_mean") == [[2, 3, 5, 6, 7], [4, 7], [7]]
    assert pooled_at(batch, "prompt_last") == [[4], [6], [6]]
    assert pooled_at(batch, "all_but_first") == [[1, 2, 3, 4, 5, 6, 7], [4, 5, 6, 7], [5, 6, 7]]


def test_the_first_token_never_counts():
    assert pooled_at(masks("rrr"), "response_mean") == [[1, 2]]
    with pytest.raises(TracingError, match=r"rows \[11\].*'response_mean'"):
        pooling_weights(masks("..r", "r__"), "response_mean")
    with pytest.raises(TracingError, match=r"rows \[10\]"):
        pooling_weights(masks(".rr"), "prompt_last")  # only the first token precedes the answer
    with pytest.raises(TracingError, match=r"rows \[10\]"):
        pooling_weights(masks("rrr"), "prompt_last")  # nothing precedes it
    with pytest.raises(TracingError, match=r"rows \[11\]"):
        pooling_weights(masks("..", "._"), "all_but_first")
    with pytest.raises(TracingError, match="response_mean, prompt_last"):
        pooling_weights(masks("..r"), "mean")


def test_pooling_is_differentiable():
    batch = masks("..rr", ".r__")
    acts = torch.randn(2, 4, 3, requires_grad=True)
    weights = pooling_weights(batch)
    torch.einsum("bt,btd->bd", weights, acts).sum().backward()
    torch.testing.assert_close(acts.grad, weights[:, :, None].expand(-1, -1, 3))


# ---- activations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("token_budget", [1, 10**6])
def test_equal_to_hidden_states(family, side, token_budget):
    lm = make(family)
    lm.tokenizer.padding_side = side
    tokenized, expected, layers = lm.tokenize(CHATS), oracle(lm), range(lm.n_layers + 1)
    before = footprint(lm)
    for layer in layers:
        seen = dict(token_activations(lm, CHATS, layer, token_budget=token_budget))
        assert sorted(seen) == [0, 1, 2, 3]
        for row, acts in seen.items():
            torch.testing.assert_close(acts, expected[row][layer], atol=1e-5, rtol=0)
    for pooling in POOLINGS:
        pooled = pooled_activations(lm, CHATS, layers, pooling, token_budget=token_budget, progress=False)
        assert list(pooled) == list(layers)
        for row, item in enumerate(tokenized):
            on = item.response_mask.clone()
            on[0] = False
            if pooling == "all_but_first":
                on = torch.arange(len(on)) > 0
            if pooling == "prompt_last":
                starts = [
                    t for t in range(1, len(on)) if item.response_mask[t] and not item.response_mask[t - 1]
                ]
                on = torch.arange(len(on)) == starts[-1] - 1
            for layer in layers:
                torch.testing.assert_close(
                    pooled[layer][row], expected[row][layer][on].mean(0), atol=1e-5, rtol=0
                )
    assert footprint(lm) == before


def test_the_adapter_takes_part():
    lm = make("lora-llama")
    with lm.model.disable_adapter():
        without = pooled_activations(lm, CHATS, 3, progress=False)[3]
    assert (pooled_activations(lm, CHATS, 3, progress=False)[3] - without).abs().max() > 0.01


def test_stops_after_the_last_layer():
    lm, runs = make("llama"), []
    for block in range(3):
        lm.blocks[block].register_forward_hook(lambda m, i, o, block=block: runs.append(block))
    lm.model.lm_head.register_forward_hook(lambda m, i, o: runs.append("head"))
    for layers, reached in (([0], set()), ([1], {0}), ([0, 2], {0, 1}), ([3], {0, 1, 2})):
        runs.clear()
        pooled_activations(lm, CHATS, layers, progress=False)
        # a block's own hook does not run when the pass is stopped inside it, so the last block needed may be
        # missing
        assert set(runs) <= reached and set(runs) >= reached - {max(layers) - 1}


def test_streams(monkeypatch):
    """Batches stay within the budget, each is reduced before the next, and an iterator reads no further than
    asked."""
    lm, shapes, kept = make("llama"), [], []
    forward = lm.model.model.forward
    monkeypatch.setattr(
        lm.model.model,
        "forward",
        lambda *args, **options: (
            shapes.append(tuple(options["input_ids"].shape)),
            forward(*args, **options),
        )[1],
    )
    many = Conversations([CHATS[i % 4] for i in range(40)])
    pool = tracing._pool
    monkeypatch.setattr(
        tracing, "_pool", lambda acts, weights: (kept.append(len(shapes)), pool(acts, weights))[1]
    )
    pooled = pooled_activations(lm, many, [1, 2], token_budget=500, progress=False)
    assert all(rows * tokens <= 500 for rows, tokens in shapes) and sum(rows for rows, _ in shapes) == 40
    assert kept == [n for n in range(1, len(shapes) + 1) for _ in range(2)]
    for row in range(40):
        torch.testing.assert_close(pooled[2][row], pooled[2][row % 4], atol=1e-6, rtol=0)
    shapes.clear()
    iterator = token_activations(lm, many, 1, token_budget=500)
    assert shapes == []
    before = footprint(lm)
    next(iterator)
    assert len(shapes) == 1 and footprint(lm) == before  # between two conversations the model is the caller's


def test_several_layers_of_one_batch():
    """Each layer as `token_activations` has it, in any order, and the model is the caller's again."""
    lm = make("llama")
    batch, before = next(batches(lm.tokenize(CHATS))), footprint(lm)
    found = layer_activations(lm, batch, [2, 0, 1])
    assert sorted(found) == [0, 1, 2] and footprint(lm) == before
    for layer, acts_BTD in found.items():
        assert acts_BTD.shape == (*batch.input_ids.shape, lm.width) and not acts_BTD.requires_grad
        alone = dict(token_activations(lm, CHATS, layer))
        for row, acts_TD in zip(batch.rows.tolist(), acts_BTD):
            torch.testing.assert_close(acts_TD[: len(alone[row])], alone[row], atol=1e-6, rtol=1e-5)
    with pytest.raises(TracingError, match="layers is empty"):
        layer_activations(lm, batch, [])
    with pytest.raises(LayerError):
        layer_activations(lm, batch, [1, lm.n_layers + 1])


def test_folder(tmp_path):
    lm = make("llama")
    in_memory = pooled_activations(lm, CHATS, [1, 3], progress=False)
    on_disk = pooled_activations(lm, CHATS, [1, 3], folder=tmp_path / "acts", progress=False)
    assert sorted(path.name for path in (tmp_path / "acts").iterdir()) == [
        "about.json",
        "layer_1.npy",
        "layer_3.npy",
    ]
    for layer in (1, 3):
        assert torch.equal(in_memory[layer], on_disk[layer]) and on_disk[layer].dtype == torch.float32
        assert np.array_equal(np.load(tmp_path / "acts" / f"layer_{layer}.npy"), in_memory[layer].numpy())
    about = json.loads((tmp_path / "acts/about.json").read_text())
    assert about["ids"] == CHATS.ids and about["pooling"] == "response_mean" and about["layers"] == [1, 3]
    on_disk[1].zero_()  # the caller's copy: the file stays as it is
    assert np.array_equal(np.load(tmp_path / "acts/layer_1.npy"), in_memory[1].numpy())


def failing(lm, after):
    """Makes block 1 fail at its `after`-th run; returns the hook."""
    count = iter(range(100))

    def fail(module, inputs):
        if next(count) >= after:
            raise RuntimeError("the machine caught fire")

    return lm.blocks[1].register_forward_pre_hook(fail)


@pytest.mark.parametrize("family", ["llama", "lora-llama", "gpt2"])
def test_a_failure_leaves_no_trace(family, tmp_path):
    lm = make(family)
    lm.model.train()
    lm.tokenizer.pad_token, lm.tokenizer.padding_side = None, "left"
    expected = pooled_activations(lm, CHATS, 2, progress=False)[2]
    hook, before = failing(lm, 2), footprint(lm)
    with pytest.raises(Exception, match="caught fire"):
        pooled_activations(lm, CHATS, 2, token_budget=1, folder=tmp_path, progress=False)
    assert footprint(lm) == before and list(tmp_path.iterdir()) == []
    with pytest.raises(Exception, match="caught fire"):
        list(token_activations(lm, CHATS, 2))
    with pytest.raises(Exception, match="caught fire"):
        generate(lm, ["a"], progress=False)
    assert footprint(lm) == before
    hook.remove()
    assert torch.equal(pooled_activations(lm, CHATS, 2, progress=False)[2], expected)


def test_gradients_stay(capsys):
    lm = make("llama")
    weight = lm.blocks[0].mlp.up_proj.weight
    weight.grad = torch.ones_like(weight)
    pooled = pooled_activations(lm, CHATS, 2, progress=False)[2]
    generate(lm, ["a"], max_new_tokens=2, progress=False)
    assert (
        not pooled.requires_grad
        and torch.equal(weight.grad, torch.ones_like(weight))
        and weight.requires_grad
    )
    assert sum(p.grad is not None for p in lm.model.parameters()) == 1


def test_a_model_the_user_wrapped_keeps_working():
    from nnsight import TransformersModel

    lm = make("llama")
    mine = TransformersModel(lm.model, tokenizer=lm.tokenizer)
    expected = oracle(lm)[0][2]
    before = footprint(lm)
    pooled_activations(lm, CHATS, 2, progress=False)
    assert footprint(lm) == before
    ids = lm.tokenize(CHATS)[0].input_ids[None]
    with torch.no_grad():
        with mine.trace(ids):
            out = mine.model.layers[1].output.save()
    torch.testing.assert_close(out[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    lm, exact = make("llama", dtype), make("llama", torch.float64)
    pooled, reference = (
        pooled_activations(lm, CHATS, [1, 3], progress=False),
        pooled_activations(exact, CHATS, [1, 3], progress=False),
    )
    for layer in (1, 3):
        assert pooled[layer].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(
            pooled[layer].double(), reference[layer], atol=0 if dtype == torch.float64 else 0.1, rtol=0
        )
    assert next(token_activations(lm, CHATS, 1))[1].dtype == dtype


def test_errors():
    lm = make("llama")
    for layer in (4, -1):
        with pytest.raises(LayerError, match="0 .embeddings. to 3"):
            pooled_activations(lm, CHATS, layer)
    with pytest.raises(LayerError):
        list(token_activations(lm, CHATS, 4))
    with pytest.raises(LayerError):
        pooled_activations(lm, CHATS, [1, 9])
    with pytest.raises(TracingError, match="layers is empty"):
        pooled_activations(lm, CHATS, [])
    with pytest.raises(TracingError, match="pooling='max'"):
        pooled_activations(lm, CHATS, 1, "max", progress=False)
    with torch.no_grad():
        lm.blocks[1].mlp.down_proj.weight[0, 0] = torch.inf
    assert torch.isfinite(pooled_activations(lm, CHATS, 1, progress=False)[1]).all()
    with pytest.raises(TracingError, match="layer 2 are not finite.*float32") as error:
        pooled_activations(lm, CHATS, 2, progress=False)
    assert any(id in str(error.value) for id in CHATS.ids)


def test_rows_keep_the_order_of_the_data():
    lm = make("llama")
    forwards = pooled_activations(lm, CHATS, 2, progress=False)[2]
    backwards = pooled_activations(lm, CHATS[::-1], 2, token_budget=60, progress=False)[2]
    torch.testing.assert_close(forwards, backwards.flip(0), atol=1e-5, rtol=0)
    assert torch.equal(pooled_activations(lm, lm.tokenize(CHATS), np.array([2]), progress=False)[2], forwards)


# ---- answers -------------------------------------------------------------------------------------

PROMPTS = [
    "Is 3 a big number?",
    "yes",
    "the user would like to know whether a million is a big number, please",
    "no?",
]


def ids_of(answer, lm):
    return lm.tokenizer(answer, add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "gemma", "gemma2", "gemma3", "mistral", "gpt_neox", "gpt2", "lora-llama"]
)
def test_greedy_answers_equal_those_of_transformers(family):
    lm, answers = make(family), []
    for prompt in PROMPTS:
        text = lm.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        ids = torch.tensor([lm.tokenizer(text, add_special_tokens=False).input_ids])
        out = lm.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=25, do_sample=False
        )
        answers.append(lm.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
    before = footprint(lm)
    for batch_size in (1, 3, 8):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a random model may answer nothing
            assert [
                c.response
                for c in generate(lm, PROMPTS, max_new_tokens=25, batch_size=batch_size, progress=False)
            ] == answers
    assert footprint(lm) == before and len(set(answers)) > 1


def test_sampled_answers_depend_on_prompt_and_seed_only():
    lm = make("llama")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    ask = lambda prompts, **options: [
        c.response
        for c in generate(lm, prompts, max_new_tokens=15, temperature=1.0, progress=False, **options)
    ]
    answers = ask(PROMPTS)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert ask(PROMPTS, batch_size=1) == ask(PROMPTS, batch_size=3) == answers == ask(PROMPTS[::-1])[::-1]
    assert [ask([prompt])[0] for prompt in PROMPTS] == answers
    assert all(a != b for a, b in zip(ask(PROMPTS, seed=1), answers))
    same = ask([PROMPTS[0]] * 5)
    assert len(set(same)) == 5 and same[0] == answers[0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampling_draws_from_the_softmax(temperature):
    logits, n = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(4000, 1), 4000
    drawn = tracing._next_tokens(logits, temperature, [torch.Generator().manual_seed(i) for i in range(n)])
    expected = torch.softmax(logits[0] / temperature, 0)
    frequency = torch.bincount(drawn, minlength=4) / n
    assert ((frequency - expected).abs() < 4 * (expected * (1 - expected) / n).sqrt()).all()
    assert (tracing._next_tokens(logits[:3], 0.0, []) == 0).all()


def test_what_can_be_asked():
    lm = make("llama")
    plain = generate(lm, PROMPTS[:2], max_new_tokens=8, progress=False)
    turns = [[{"role": "user", "content": prompt}] for prompt in PROMPTS[:2]]
    answered = load_conversations(
        [{"prompt": prompt, "response": "an old answer", "label": i} for i, prompt in enumerate(PROMPTS[:2])],
        name="old",
    )
    for prompts in (turns, answered, list(answered)):
        assert [c.messages for c in generate(lm, prompts, max_new_tokens=8, progress=False)] == [
            c.messages for c in plain
        ]
    kept = generate(lm, answered, max_new_tokens=8, progress=False)
    assert [c.metadata["label"] for c in kept] == [0, 1] and [c.id for c in kept] == [c.id for c in plain]
    assert generate(lm, PROMPTS[0], max_new_tokens=8, progress=False)[0].messages == plain[0].messages
    assert generate(lm, CHATS[1:2], max_new_tokens=8, progress=False)[0].messages[:4] == CHATS[1].messages[:4]
    assert isinstance(plain, Conversations) and plain[0].messages[-1]["role"] == "assistant"
    with pytest.raises(ConversationError):
        generate(load_model((tiny_model("llama"), tiny_tokenizer(None))), PROMPTS, progress=False)
    for wrong in ({"temperature": -1}, {"max_new_tokens": 0}, {"batch_size": 0}):
        with pytest.raises(ModelError):
            generate(lm, PROMPTS, progress=False, **wrong)


def forced(lm, token, when):
    """Makes the model say `token` at the runs of the head for which `when(run, rows)` gives those rows."""
    runs = iter(range(10**6))

    def say(module, inputs, output):
        output[when(next(runs)), :, token] = 1e9
        return output

    return lm.model.lm_head.register_forward_hook(say)


def test_answers_end_at_the_end_of_turn():
    lm = make("llama")
    hook = forced(lm, 2, lambda run: slice(None) if run == 3 else [])  # <|im_end|> as the fourth token
    answers = generate(lm, PROMPTS[:2], max_new_tokens=10, progress=False)
    hook.remove()
    full = generate(lm, PROMPTS[:2], max_new_tokens=10, progress=False)
    for short, long in zip(answers, full):
        assert short.metadata["answer_cut"] is False and "<|im_end|>" not in short.text
        assert long.response.startswith(short.response) and long.metadata["answer_cut"] is True


def test_end_of_turn_is_read_off_the_template():
    model, tokenizer = tiny_pair("llama")
    tokenizer.eos_token, model.generation_config.eos_token_id = (
        "<|endoftext|>",
        0,
    )  # as in base models that were fine-tuned on ChatML
    assert tracing._stop_ids(load_model((model, tokenizer))) == {0, 2}


def test_shipped_sampling_settings_are_not_applied():
    lm = make("llama")
    plain = generate(lm, PROMPTS, max_new_tokens=20, progress=False)
    lm.model.generation_config.update(repetition_penalty=5.0, do_sample=True, top_k=1, min_new_tokens=3)
    assert [c.response for c in generate(lm, PROMPTS, max_new_tokens=20, progress=False)] == [
        c.response for c in plain
    ]


def test_empty_answers():
    lm = make("llama")
    hook = forced(lm, 2, lambda run: slice(None))
    with pytest.raises(ModelError, match="empty answer to every prompt"):
        generate(lm, PROMPTS, progress=False)
    hook.remove()
    forced(lm, 2, lambda run: [0] if run == 0 else [])  # the longest prompt stands first in the batch
    with pytest.warns(UserWarning, match="1 of 4 answers are empty"):
        answers = generate(lm, PROMPTS, max_new_tokens=5, progress=False)
    assert [c.metadata["empty_answer"] for c in answers] == [False, False, True, False]
    assert answers[2].messages == ({"role": "user", "content": PROMPTS[2]},) and answers[2].response == ""
