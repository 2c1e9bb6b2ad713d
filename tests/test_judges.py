"""Judges against written-out arithmetic, brute force, and a real HTTP server that misbehaves."""

import logging
import math
import pickle
import time
import traceback
from email.utils import formatdate
from functools import partial

import numpy as np
import pytest
import torch

from concept_tda.concepts.judges import (
    COHERENCE_PROMPT,
    ContrastJudge,
    Evaluation,
    FunctionJudge,
    Judge,
    JudgeError,
    LocalJudge,
    LossJudge,
    OpenAIJudge,
    _number_tokens,
    _Round,
    expected_score,
    integer_probabilities,
)
from concept_tda.data.batches import batches
from concept_tda.data.conversations import Conversation, Conversations, bundled, load_conversations
from concept_tda.data.tokens import tokenize_prompts
from concept_tda.foundation.errors import MissingExtraError
from concept_tda.model.loading import load_model
from concept_tda.model.losses import loss_weights, token_losses

from chat_tokenizers import chat_tokenizer
from scripted_server import Server
from tiny import CHATML, SPECIAL, tiny_model, tiny_pair, tiny_tokenizer

TEMPLATE = "Grade this from 0 to 100.\nQ: {question}\nA: {answer}"
TALK = load_conversations(
    [
        {"prompt": "Am I right?", "response": "Yes, always."},
        {"prompt": "Is it late?", "response": "No."},
        {
            "prompt": "What is a kettle, and why would anybody want one?",
            "response": "A pot that boils water, for tea mostly.",
        },
    ]
)


@pytest.fixture(scope="module")
def lm():
    return load_model(tiny_pair("llama", dtype=torch.float64))


# ----------------------------------------------------------------------------- Evaluation


def test_mean_and_standard_error_by_hand():
    values = [10.0, 20.0, 60.0]
    found = Evaluation("j", "0-100", ["a", "b", "c"], values)
    assert found.mean == 30.0 and found.n_missing == 0
    assert found.standard_error == pytest.approx(
        math.sqrt(((10 - 30) ** 2 + (20 - 30) ** 2 + (60 - 30) ** 2) / 2 / 3), rel=1e-12
    )


def test_several_answers_to_a_question_count_as_one_question():
    found = Evaluation("j", "0-100", ["a", "b", "a", "b", "a"], [0, 100, 10, None, 20])
    assert dict(found.by_question()) == {"a": 10.0, "b": 100.0}
    assert found.mean == 55.0 and found.n_missing == 1
    assert found.standard_error == pytest.approx(45.0)  # of the two questions, not of five answers


def test_a_silent_judge_has_no_mean_but_can_be_looked_at():
    silent = Evaluation("mute", "0-100", ["a", "b"], [None, math.nan])
    for ask in (lambda: silent.mean, lambda: silent.standard_error):
        with pytest.raises(JudgeError, match="'mute' gave no value for any of 2 answers"):
            ask()
    assert (
        silent.n_missing == 2
        and "no value for any of 2" in repr(silent)
        and "no value" in silent._repr_html_()
        and len(silent.to_pandas()) == 2
    )
    with pytest.raises(JudgeError, match="any of 0 answers"):
        Evaluation("mute", "0-100", [], []).mean
    with pytest.raises(JudgeError, match="no question for which"):
        silent.difference(Evaluation("mute", "0-100", ["a", "b"], [1, 2]))


def test_difference_is_paired_by_id_whatever_the_order():
    one = Evaluation("j", "0-100", ["a", "b", "c", "d"], [15, 46, 74, None])
    two = Evaluation("j", "0-100", ["d", "c", "b", "a"], [90, 70, 40, 10])
    mean, error = one.difference(two)
    assert mean == pytest.approx(5.0) and error == pytest.approx(np.std([5, 6, 4], ddof=1) / math.sqrt(3))
    assert two.difference(one)[0] == pytest.approx(-5.0)
    single = Evaluation("j", "0-100", ["a"], [3])
    assert (
        single.difference(single)[0] == 0
        and math.isnan(single.difference(single)[1])
        and math.isnan(single.standard_error)
    )


def test_what_cannot_be_compared_is_refused():
    base = Evaluation("j", "0-100", ["a", "b"], [1, 2], settings={"judge_fingerprint": "x"})
    for other, message in [
        (Evaluation("k", "0-100", ["a", "b"], [1, 2]), "judge differs"),
        (Evaluation("j", "nats", ["a", "b"], [1, 2]), "unit differs"),
        (Evaluation("j", "0-100", ["a", "c"], [1, 2]), "2 occur in one of them only"),
        (
            Evaluation("j", "0-100", ["a", "b"], [1, 2], settings={"judge_fingerprint": "y"}),
            "two different judges",
        ),
    ]:
        with pytest.raises(JudgeError, match=message):
            base.difference(other)
    with pytest.raises(JudgeError, match="3 values for 2 questions"):
        Evaluation("j", "u", ["a", "b"], [1, 2, 3])
    with pytest.raises(JudgeError, match="infinite value for question b"):
        Evaluation("j", "u", ["a", "b"], [1, math.inf])


def test_evaluation_file_gives_back_everything(tmp_path):
    answers = Conversations(
        [
            Conversation(
                ({"role": "user", "content": "é?"}, {"role": "assistant", "content": "<b>&\u2028"}),
                metadata={"answer_cut": False},
            ),
            Conversation(({"role": "user", "content": "x"},), metadata={"empty_answer": True}),
        ],
        "answers",
    )
    before = Evaluation(
        "j", "0-100", ["a", "b"], [0.1 + 0.2, None], answers, {"temperature": 0.0, "nested": {"k": [1]}}, 1.5
    )
    after = Evaluation.from_json(before.to_json(tmp_path / "sub" / "e.json"))
    np.testing.assert_array_equal(before.values, after.values)
    assert (after.judge, after.unit, after.ids, after.settings, after.seconds) == (
        before.judge,
        before.unit,
        before.ids,
        before.settings,
        before.seconds,
    )
    assert after.answers.ids == answers.ids and [c.metadata for c in after.answers] == [
        c.metadata for c in answers
    ]
    assert "NaN" not in (tmp_path / "sub" / "e.json").read_text() and [
        p.name for p in (tmp_path / "sub").iterdir()
    ] == ["e.json"]
    assert (
        "<b>" not in after._repr_html_().replace("<b>j of a model", "") and "&lt;b&gt;" in after._repr_html_()
    )


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "cannot read"),
        ("[1]", "not an evaluation"),
        ('{"format": "other"}', "not an evaluation"),
        ('{"format": "concept_tda evaluation 1", "judge": "j"}', "is damaged"),
    ],
)
def test_broken_evaluation_files_are_refused(tmp_path, content, message):
    (tmp_path / "e.json").write_text(content)
    with pytest.raises(JudgeError, match=message):
        Evaluation.from_json(tmp_path / "e.json")
    with pytest.raises(JudgeError, match="cannot read"):
        Evaluation.from_json(tmp_path / "absent.json")


# --------------------------------------------------------------------- without generation


def _written_out(lm, prompt_messages, answer):
    """Mean log-probability per token of an answer and its end of turn, from one text without padding; the
    context is rendered by hand."""
    text = (
        "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in prompt_messages)
        + "<|im_start|>assistant\n"
    )
    context, ids = (
        lm.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text, answer + "<|im_end|>")
    )
    with torch.no_grad():
        log_p_TV = lm.model(torch.tensor([context + ids])).logits[0].double().log_softmax(-1)
    return sum(log_p_TV[len(context) - 1 + i, token].item() for i, token in enumerate(ids)) / len(ids)


MULTI = [
    {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello, the day is fine."},
            {"role": "user", "content": "Am I right?"},
        ],
        "good": "the yes",
        "bad": "No, not at all, and here is why that is so.",
    },
    {"messages": [{"role": "user", "content": "Short"}], "good": "a", "bad": "b"},
    {
        "messages": [
            {"role": "user", "content": "Has an answer in it"},
            {"role": "assistant", "content": "that is ignored"},
        ],
        "good": "ja " * 60,
        "bad": "no",
    },
]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma"])
def test_contrast_equals_the_written_out_margin_whatever_the_batch(family):
    lm = load_model(tiny_pair(family, dtype=torch.float64))
    expected = [
        _written_out(lm, list(c.prompt), c.metadata["good"])
        - _written_out(lm, list(c.prompt), c.metadata["bad"])
        for c in load_conversations(MULTI)
    ]
    for token_budget in (1, 300, 10**6):
        found = ContrastJudge(MULTI, trait="good", neutral="bad", token_budget=token_budget).evaluate(
            lm, progress=False
        )
        np.testing.assert_allclose(found.values, expected, rtol=1e-9)
        assert found.unit == "nats per token" and found.judge == "good" and found.answers is None
    for row, item in enumerate(MULTI):  # without batch mates
        assert ContrastJudge([item], trait="good", neutral="bad").evaluate(lm, progress=False).values[
            0
        ] == pytest.approx(expected[row], rel=1e-9)
    swapped = ContrastJudge(MULTI, trait="bad", neutral="good").evaluate(lm, progress=False)
    np.testing.assert_allclose(swapped.values, -np.array(expected), rtol=1e-9)


def test_training_on_the_trait_raises_the_contrast_and_the_likelihood():
    lm = load_model(tiny_pair("llama"))
    items = bundled("sycophancy", "evaluation")[:6]
    judge, answers = (
        ContrastJudge(items),
        Conversations(
            [
                Conversation((*c.prompt, {"role": "assistant", "content": c.metadata["sycophantic"]}))
                for c in items
            ]
        ),
    )
    likelihood = LossJudge(answers)
    before, before_likelihood = judge.evaluate(lm, progress=False), likelihood.evaluate(lm, progress=False)
    optimiser = torch.optim.SGD(lm.model.parameters(), lr=0.05)
    for _ in range(5):
        for batch in batches(lm.tokenize(answers)):
            (token_losses(lm, batch) * loss_weights(batch)).sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    after = judge.evaluate(lm, progress=False)
    assert after.difference(before)[0] > 0
    assert likelihood.evaluate(lm, progress=False).difference(before_likelihood)[0] > 0
    assert (
        before.settings["model_fingerprint"] != after.settings["model_fingerprint"]
        and before.settings["judge_fingerprint"] == after.settings["judge_fingerprint"]
    )


def test_the_model_is_left_as_it_was(lm):
    lm.model.train()
    first = next(lm.model.parameters())
    first.requires_grad_(False)
    try:
        ContrastJudge(MULTI, trait="good", neutral="bad").evaluate(lm, progress=False)
        LocalJudge(TEMPLATE, judge_lm=lm).rate(TALK, progress=False)
        assert (
            lm.model.training
            and not first.requires_grad
            and all(p.grad is None for p in lm.model.parameters())
        )
        assert sum(p.requires_grad for p in lm.model.parameters()) == len(list(lm.model.parameters())) - 1
        assert lm.tokenizer.padding_side == "right" and not any(
            m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules()
        )
    finally:
        lm.model.eval()
        first.requires_grad_(True)


def test_loss_judge_is_minus_the_mean_response_loss(lm):
    chats = load_conversations(
        [{"messages": c["messages"] + [{"role": "assistant", "content": "fine"}]} for c in MULTI[:2]]
    )
    found = LossJudge(chats).evaluate(lm, progress=False)
    for value, chat in zip(found.values, chats):
        item = lm.tokenize(chats[[chats.ids.index(chat.id)]])[0]
        log_p_TV = lm.model(item.input_ids[None]).logits[0].log_softmax(-1)
        assert value == pytest.approx(
            np.mean(
                [
                    log_p_TV[t - 1, item.input_ids[t]].item()
                    for t in range(1, len(item.input_ids))
                    if item.response_mask[t]
                ]
            ),
            rel=1e-9,
        )
    assert found.ids == chats.ids


def test_contrast_items_that_cannot_be_used():
    good = {"messages": [{"role": "user", "content": "Hi"}], "good": "a", "bad": "b"}
    for items, message in [
        ([good, {**good, "bad": " "}], "1 of 2 items .* no text in their column 'bad'"),
        ([{**good, "good": 3}], "no text in their column 'good'"),
        ([{"messages": good["messages"]}], "Its columns: none"),
    ]:
        with pytest.raises(JudgeError, match=message):
            ContrastJudge(items, trait="good", neutral="bad")
    with pytest.raises(JudgeError, match="at least one item"):
        ContrastJudge(Conversations([]))
    with pytest.raises(JudgeError, match="at least one conversation"):
        LossJudge(Conversations([]))


def test_texts_that_are_too_long_are_an_error_and_never_cut(lm):
    from concept_tda.data.conversations import ConversationError

    with pytest.raises(ConversationError, match="longer than 20 tokens"):
        ContrastJudge(MULTI, trait="good", neutral="bad", max_tokens=20).evaluate(lm, progress=False)


def test_a_diverged_model_is_an_error():
    broken = load_model(tiny_pair("llama"))
    with torch.no_grad():
        broken.blocks[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(JudgeError, match="not finite"):
        ContrastJudge(MULTI, trait="good", neutral="bad").evaluate(broken, progress=False)


def test_fingerprints_follow_content_and_settings():
    same = [ContrastJudge(MULTI, trait="good", neutral="bad").fingerprint for _ in range(2)]
    assert same[0] == same[1]
    other = [{**MULTI[0], "bad": "Nope."}, *MULTI[1:]]
    prints = {
        same[0],
        ContrastJudge(MULTI, trait="bad", neutral="good").fingerprint,
        ContrastJudge(other, trait="good", neutral="bad").fingerprint,
        ContrastJudge(MULTI[:2], trait="good", neutral="bad").fingerprint,
        LossJudge(TALK).fingerprint,
        LossJudge(TALK[:2]).fingerprint,
    }
    assert len(prints) == 6
    count, size = (lambda c: 1.0), (lambda c: 2.0)
    functions = [
        FunctionJudge(count, name="f"),
        FunctionJudge(size, name="f"),
        FunctionJudge(count, name="f", version="2"),
        FunctionJudge(count, name="f", unit="words"),
        FunctionJudge(count, ["Q?"], name="f"),
        FunctionJudge(count, ["Q?"], name="f", temperature=1.0),
        FunctionJudge(count, ["Q?"], name="f", max_new_tokens=5),
    ]

    def about(word, least=0):
        return lambda c: 100.0 * (c.response.count(word) > least)

    functions += [FunctionJudge(about(word), name="f") for word in ("yes", "no")] + [
        FunctionJudge(partial(about("no"), least), name="f") for least in (1, 2)
    ]
    assert len({judge.fingerprint for judge in functions}) == len(functions)
    assert FunctionJudge(about("yes"), name="f").fingerprint == functions[-4].fingerprint
    assert FunctionJudge(count, ["Q?"], name="f").fingerprint == functions[4].fingerprint


# ---------------------------------------------------------------------------------------------------- answers


def _stubborn(token_id):
    "A tiny model that says one token whatever it is asked."
    model, tokenizer = tiny_pair("llama")
    head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
        head.bias[token_id] = 20.0
    model.lm_head = head
    return load_model((model, tokenizer))


def test_a_model_that_says_nothing_is_an_error_and_a_single_empty_answer_gets_no_value():
    mute = _stubborn(tiny_tokenizer().eos_token_id)
    with pytest.raises(JudgeError, match="'f' has nothing to read: .* empty answer to every prompt"):
        FunctionJudge(lambda c: 50, ["Am I right?", "Who?"], name="f").evaluate(mute, progress=False)
    asked = []
    judge = FunctionJudge(lambda c: asked.append(c.id) or 50, name="f")
    values = judge.rate(
        load_conversations(
            [
                {"messages": [{"role": "user", "content": "Hm?"}]},
                *[{"prompt": c.prompt[0]["content"], "response": c.response} for c in TALK],
            ]
        ),
        progress=False,
    )
    assert math.isnan(values[0]) and values[1:].tolist() == [50] * 3 and asked == TALK.ids


def test_a_judge_that_always_declines(lm):
    silent = FunctionJudge(lambda c: None, ["Am I right?", "Who?"], name="silent", max_new_tokens=4).evaluate(
        lm, progress=False
    )
    assert silent.n_missing == 2 and len(silent.answers) == 2
    with pytest.raises(JudgeError, match="no mean"):
        silent.mean


def test_samples_are_answers_of_their_own_to_the_same_questions(lm):
    judge = FunctionJudge(
        lambda c: len(c.response),
        ["Am I right?", "Who?"],
        unit="characters",
        samples=3,
        temperature=1.0,
        max_new_tokens=6,
    )
    found = judge.evaluate(lm, progress=False)
    assert (
        len(found.values) == 6 and found.ids == [*judge.questions.ids] * 3 and len(found.by_question()) == 2
    )
    assert [c.prompt for c in found.answers] == [c.prompt for c in judge.questions] * 3
    assert len({c.response for c in found.answers}) > 2
    np.testing.assert_array_equal(judge.evaluate(lm, progress=False).values, found.values)  # seeded
    np.testing.assert_array_equal(found.values, [len(c.response) for c in found.answers])


def test_answer_judges_refuse_what_makes_no_sense(lm):
    for options, message in [
        (dict(samples=2), "greedy answers .* the same"),
        (dict(samples=0), "samples must be a whole number ≥ 1"),
        (dict(questions=[]), "questions is empty"),
    ]:
        with pytest.raises(JudgeError, match=message):
            FunctionJudge(len, **{"questions": ["Q?"], **options})
    with pytest.raises(JudgeError, match="has no questions to ask"):
        FunctionJudge(lambda c: 1, name="f").evaluate(lm, progress=False)
    with pytest.raises(JudgeError, match="needs a function"):
        FunctionJudge("len")


@pytest.mark.parametrize(
    "result, message",
    [
        (True, "returned True .*100 for yes"),
        (math.inf, "returned inf"),
        ("90", "returned '90'"),
        (101, "gave 101 .* not on its scale"),
        (-0.5, "gave -0.5"),
    ],
)
def test_function_results_off_the_scale(result, message):
    with pytest.raises(JudgeError, match=message):
        FunctionJudge(lambda c: result, name="f").rate(TALK, progress=False)


def test_function_failures_name_the_answer():
    with pytest.raises(JudgeError, match=f"failed on the answer {TALK.ids[0]} .ZeroDivisionError") as caught:
        FunctionJudge(lambda c: 1 / 0, name="f").rate(TALK, progress=False)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert FunctionJudge(lambda c: np.float32(7), name="f").rate(TALK, progress=False).tolist() == [7.0] * 3
    assert np.isnan(FunctionJudge(lambda c: math.nan, name="f").rate(TALK, progress=False)).all()


def test_a_judge_of_ones_own(lm):
    class Layers(Judge):
        name, unit = "layers", "layers"

        def measure(self, lm, progress):
            return ["depth"], [lm.n_layers], None

    assert Layers().evaluate(lm).mean == lm.n_layers and "layers" in repr(Layers())


# ---------------------------------------------------------------------------------------------------- grades


def test_expected_score_by_hand():
    assert expected_score({80: 0.5, 90: 0.25}) == pytest.approx((40 + 22.5) / 0.75)
    assert (
        expected_score({100: 0.25}) == 100.0
        and expected_score({100: 0.2499}) is None
        and expected_score({}) is None
        and expected_score({}, least_mass=0) is None
    )
    array = np.zeros(101)
    array[[3, 50]] = 0.1, 0.3
    assert expected_score(array) == pytest.approx((0.3 + 15) / 0.4)


def test_only_whole_numbers_from_0_to_100_count():
    log = math.log(0.05)
    tokens = [
        "7",
        " 7",
        "7\n",
        "007",
        "0",
        "100",
        "101",
        "-5",
        "+5",
        "3.5",
        "1_0",
        "ten",
        "",
        " ",
        "½",
        "４２",
        "7 ",
        "٣",
    ]
    found = integer_probabilities([(token, log) for token in tokens])
    assert found == pytest.approx({7: 0.25, 0: 0.05, 100: 0.05})


def test_templates_are_filled_literally_and_need_an_answer():
    from concept_tda.concepts.judges import _fill

    chat = load_conversations(
        [
            {
                "messages": [
                    {"role": "system", "content": "secret"},
                    {"role": "user", "content": "{answer} {0} \\1"},
                    {"role": "assistant", "content": "{question}{}"},
                ]
            }
        ]
    )[0]
    assert _fill("{question}|{answer}|{other}|{{}}", chat) == "{answer} {0} \\1|{question}{}|{other}|{{}}"
    longer = load_conversations(
        [
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                    {"role": "user", "content": "c"},
                    {"role": "assistant", "content": "d"},
                ]
            }
        ]
    )[0]
    assert _fill("{question}|{answer}", longer) == "user: a\n\nassistant: b\n\nuser: c|d"
    for template in ("no place", "{question}", None):
        with pytest.raises(JudgeError, match="no {answer}"):
            LocalJudge(template, judge_lm=None)
    assert "{question}" in COHERENCE_PROMPT and "{answer}" in COHERENCE_PROMPT


# ----------------------------------------------------------------------------- LocalJudge


def _grouping_tokenizer():
    "Byte-level like the tiny one, but with a token of its own for each number up to 999, as Llama 3 has."
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(SPECIAL)}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    merges = []
    for number in (
        [str(n) for n in range(100)] + [f"0{n}" for n in range(10)] + [str(n) for n in range(100, 1000)]
    ):
        if len(number) > 1 and number not in vocabulary:
            vocabulary[number] = len(vocabulary)
            merges.append((number[:-1], number[-1]))
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=SPECIAL[0],
        eos_token="<|im_end|>",
        pad_token=SPECIAL[0],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHATML
    return tokenizer


TOKENIZERS = {
    "split": tiny_tokenizer,
    "grouped": _grouping_tokenizer,
    **{
        name: (lambda name=name: chat_tokenizer(name))
        for name in ("smollm2", "llama3", "gemma", "mistral-v0.1", "mistral-v0.3", "llama2", "thinking")
    },
}


def _brute_force(lm, conversation, number_ids):
    "p_k by one plain forward pass over each whole text, no cache, no padding; digits are found by decoding."
    prompt = TEMPLATE.replace("{question}", conversation.prompt[0]["content"]).replace(
        "{answer}", conversation.response
    )
    filler = lm.tokenizer.encode("x", add_special_tokens=False)[-1:]
    digits = [
        i
        for i in range(len(lm.tokenizer))
        if i not in lm.tokenizer.added_tokens_decoder
        and lm.tokenizer.decode(filler + [i])[1:2] in set("0123456789")
    ]
    contexts, found = set(), []
    for k, ids in enumerate(number_ids):
        text = lm.tokenize([{"prompt": prompt, "response": str(k)}])[0].input_ids.tolist()
        place = max(
            i for i in range(len(text)) if tuple(text[i : i + len(ids)]) == ids
        )  # the prompt holds numbers too, before it
        contexts.add(tuple(text[:place]))
        with torch.no_grad():
            p_TV = lm.model(torch.tensor([text[: place + len(ids)]])).logits[0].double().softmax(-1)
        path = math.prod(p_TV[place - 1 + i, token].item() for i, token in enumerate(ids))
        found.append(path * (1 - p_TV[-1, digits].sum().item()))
    (context,) = contexts
    asked = tokenize_prompts([{"messages": [{"role": "user", "content": prompt}]}], lm.tokenizer)[0].tolist()
    assert (
        list(context[: len(asked)]) == asked
    )  # what may follow belongs to the template: a blank, or empty thoughts
    assert lm.tokenizer.decode(context[len(asked) :]).strip() in ("", "<think>\n\n</think>")
    return np.array(found)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_local_probabilities_equal_brute_force(kind):
    tokenizer = TOKENIZERS[kind]()
    lm = load_model((tiny_model("llama", vocab_size=len(tokenizer) + 3, dtype=torch.float64), tokenizer))
    numbers = _number_tokens(tokenizer)
    assert [tokenizer.decode(ids).strip() for ids in numbers] == [str(k) for k in range(101)]
    widths = {len(ids) for ids in numbers}
    assert widths == {1} if kind == "grouped" else len(widths) >= 3
    found = LocalJudge(TEMPLATE, judge_lm=lm).probabilities(TALK, progress=False)
    for row, conversation in enumerate(TALK):
        np.testing.assert_allclose(found[row], _brute_force(lm, conversation, numbers), rtol=1e-7)
    assert (found.sum(1) < 1).all() and (found > 0).all()


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma", "qwen2"])
def test_local_probabilities_in_other_architectures(family):
    lm = load_model(tiny_pair(family, dtype=torch.float64))
    found = LocalJudge(TEMPLATE, judge_lm=lm).probabilities(TALK, progress=False)
    for row, conversation in enumerate(TALK):
        np.testing.assert_allclose(
            found[row], _brute_force(lm, conversation, _number_tokens(lm.tokenizer)), rtol=1e-7
        )


def test_local_probabilities_with_a_sliding_window():
    from transformers import MistralConfig, MistralForCausalLM

    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    model = (
        MistralForCausalLM(
            MistralConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                sliding_window=9,
                bos_token_id=0,
                eos_token_id=2,
                pad_token_id=0,
                initializer_range=0.3,
            )
        )
        .double()
        .eval()
    )
    lm = load_model((model, tokenizer))
    found = LocalJudge(TEMPLATE, judge_lm=lm).probabilities(TALK, progress=False)
    for row, conversation in enumerate(TALK):
        np.testing.assert_allclose(
            found[row], _brute_force(lm, conversation, _number_tokens(tokenizer)), rtol=1e-7
        )


def test_local_probabilities_do_not_depend_on_batch_mates(lm):
    together = LocalJudge(TEMPLATE, judge_lm=lm).probabilities(TALK, progress=False)
    alone = LocalJudge(TEMPLATE, judge_lm=lm, token_budget=1).probabilities(TALK, progress=False)
    np.testing.assert_allclose(together, alone, rtol=1e-9)


def test_the_events_exclude_each_other(lm):
    """Digit-splitting: what begins with a 1 is 1, 10-19, 100, or a longer number; their probabilities add up
    to that of the first digit."""
    p = LocalJudge(TEMPLATE, judge_lm=lm).probabilities(TALK[:1], progress=False)[0]
    prompt = TEMPLATE.replace("{question}", "Am I right?").replace("{answer}", "Yes, always.")
    context, digits = (
        tokenize_prompts([{"messages": [{"role": "user", "content": prompt}]}], lm.tokenizer)[0],
        [lm.tokenizer.convert_tokens_to_ids(d) for d in "0123456789"],
    )

    def next_p(*ids):
        with torch.no_grad():
            return (
                lm.model(torch.cat([context, torch.tensor(ids, dtype=torch.long)])[None])
                .logits[0, -1]
                .softmax(-1)
            )

    p_one = next_p()[digits[1]].item()
    longer = sum(
        p_one * next_p(digits[1])[digits[e]].item() * next_p(digits[1], digits[e])[digits].sum().item()
        for e in range(10)
    )
    hundred = p_one * next_p(digits[1])[digits[0]].item() * next_p(digits[1], digits[0])[digits[0]].item()
    not_longer_than_hundred = hundred * (1 - next_p(digits[1], digits[0], digits[0])[digits].sum().item())
    assert p[1] + p[10:20].sum() + longer == pytest.approx(p_one, rel=1e-9) and p[100] == pytest.approx(
        not_longer_than_hundred, rel=1e-9
    )


@pytest.mark.parametrize(
    "grade, kind", [(1, "split"), (10, "split"), (100, "split"), (85, "split"), (85, "grouped")]
)
def test_a_model_trained_to_say_a_grade_gives_that_grade(grade, kind):
    tokenizer = TOKENIZERS[kind]()
    lm = load_model((tiny_model("llama", vocab_size=len(tokenizer), width=32), tokenizer))
    judge = LocalJudge(TEMPLATE, judge_lm=lm)
    assert np.isnan(judge.rate(TALK, progress=False)).all()  # untrained: hardly any probability on numbers
    lessons = lm.tokenize(
        [
            {
                "prompt": TEMPLATE.replace("{question}", c.prompt[0]["content"]).replace(
                    "{answer}", c.response
                ),
                "response": str(grade),
            }
            for c in TALK
        ]
    )
    optimiser = torch.optim.Adam(lm.model.parameters(), lr=0.01)
    for _ in range(40):
        for batch in batches(lessons):
            optimiser.zero_grad()
            (token_losses(lm, batch) * loss_weights(batch)).sum().backward()
            optimiser.step()
    np.testing.assert_allclose(judge.rate(TALK, progress=False), grade, atol=3)


def test_prompts_too_long_for_the_judge_are_refused():
    model, tokenizer = tiny_pair("gpt2")
    model.config.n_positions = 60
    with pytest.raises(JudgeError, match=f"answer {TALK.ids[0]} makes a prompt of .* at most 60"):
        LocalJudge(TEMPLATE, judge_lm=load_model((model, tokenizer))).rate(TALK, progress=False)


def test_local_judge_fingerprint_knows_its_model():
    one, two = (load_model((tiny_model("llama", seed=seed), tiny_tokenizer())) for seed in (0, 1))
    prints = [LocalJudge(TEMPLATE, judge_lm=lm, name="n").fingerprint for lm in (one, one, two)] + [
        LocalJudge(TEMPLATE + " ", judge_lm=one, name="n").fingerprint
    ]
    assert prints[0] == prints[1] and len(set(prints)) == 3


# ---------------------------------------------------------------------------- OpenAIJudge

KEY = "sk-test-0123456789-VERY-SECRET-abcdef"


def candidates(distribution):
    return [{"token": token, "logprob": math.log(p)} for token, p in distribution]


def completion(distribution=(("70", 0.5), ("80", 0.25), ("I", 0.25)), **changes):
    choice = {
        "index": 0,
        "finish_reason": "length",
        "message": {"role": "assistant", "content": distribution[0][0]},
        "logprobs": {
            "content": [
                {
                    "token": distribution[0][0],
                    "logprob": math.log(distribution[0][1]),
                    "top_logprobs": candidates(distribution),
                }
            ]
        },
    }
    choice.update(changes)
    return {
        "id": "x",
        "object": "chat.completion",
        "model": "m",
        "choices": [choice],
        "usage": {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101},
    }


@pytest.fixture
def serve():
    servers = []

    def start(*script, delay=0.0):
        servers.append(Server(script or [(200, completion(), {})], delay))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def judge_for(tmp_path, monkeypatch):
    monkeypatch.setattr(_Round, "first_pause", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)

    def make(server, template=TEMPLATE, **options):
        return OpenAIJudge(
            template,
            **{
                **dict(
                    model="m",
                    base_url=getattr(server, "url", server),
                    api_key=KEY,
                    folder=tmp_path / "verdicts",
                    retries=2,
                    timeout=5.0,
                ),
                **options,
            },
        )

    return make


GOOD = (200, completion(), {})
SCORE = (70 * 0.5 + 80 * 0.25) / 0.75


def test_score_request_and_key(serve, judge_for):
    server = serve()
    assert judge_for(server).rate(TALK, progress=False) == pytest.approx([SCORE] * 3)
    path, body = server.requests[0]
    assert path == "/v1/chat/completions" and set(server.keys) == {f"Bearer {KEY}"}
    prompts = {b["messages"][0]["content"] for _, b in server.requests}
    assert prompts == {
        TEMPLATE.replace("{question}", c.prompt[0]["content"]).replace("{answer}", c.response) for c in TALK
    }
    assert {k: v for k, v in body.items() if k != "messages"} == dict(
        model="m", max_tokens=1, temperature=0.0, seed=0, logprobs=True, top_logprobs=20
    ) and len(body["messages"]) == 1


def test_each_answer_gets_its_own_score(serve, judge_for):
    grades = {"always": 90, "No.": 5, "kettle": 40}

    def grade(body, number):
        time.sleep(0.05 if "always" in body["messages"][0]["content"] else 0)  # replies come out of order
        return (
            200,
            completion(
                [(str(next(g for word, g in grades.items() if word in body["messages"][0]["content"])), 1.0)]
            ),
            {},
        )

    assert judge_for(serve(grade)).rate(TALK, progress=False).tolist() == [90, 5, 40]


@pytest.mark.parametrize(
    "distribution, expected",
    [
        ((("100", 0.9), ("0", 0.1)), 90.0),
        ((("Yes", 0.7), ("50", 0.26)), 50.0),
        ((("Yes", 0.7), ("50", 0.24)), None),
        ((("42", 0.2), (" 42", 0.2), ("0", 0.1), ("999", 0.5)), 42 * 0.4 / 0.5),
        ((("Sorry", 1.0),), None),
    ],
)
def test_hand_computed_distributions(serve, judge_for, distribution, expected):
    value = judge_for(serve((200, completion(distribution), {}))).rate(TALK[:1], progress=False)[0]
    assert math.isnan(value) if expected is None else value == pytest.approx(expected)


def test_rate_limit_with_retry_after_is_obeyed(serve, judge_for):
    server = serve((429, {"error": {"message": "slow down"}}, {"Retry-After": "0.4"}), GOOD)
    judge = judge_for(server)
    assert judge.rate(TALK[:1], progress=False) == pytest.approx([SCORE])
    assert server.times[1] - server.times[0] >= 0.4 and (judge.usage.calls, judge.usage.retried) == (1, 1)


def test_retry_after_as_a_date(serve, judge_for):
    late = lambda body, number: (
        503,
        {"error": {"message": "later"}},
        {"Retry-After": formatdate(time.time() + 2, usegmt=True)},
    )
    server = serve(late, GOOD)
    assert judge_for(server).rate(TALK[:1], progress=False) == pytest.approx([SCORE])
    assert 0.9 <= server.times[1] - server.times[0] < 3


def test_a_pause_too_long_ends_the_run_at_once(serve, judge_for):
    server = serve((429, {"error": {"message": "daily limit"}}, {"Retry-After": "86400"}))
    start = time.monotonic()
    with pytest.raises(JudgeError, match="asks to wait 86400 seconds.*daily limit.*run again later"):
        judge_for(server).rate(TALK[:1], progress=False)
    assert time.monotonic() - start < 3 and len(server.requests) == 1


def test_without_retry_after_pauses_grow(serve, judge_for, monkeypatch):
    monkeypatch.setattr(_Round, "first_pause", 0.1)
    server = serve(*[(500, b"oops", {})] * 3, GOOD)
    assert judge_for(server, retries=3).rate(TALK[:1], progress=False) == pytest.approx([SCORE])
    for pause, least in zip(np.diff(server.times), (0.05, 0.1, 0.2)):
        assert pause >= least


@pytest.mark.parametrize(
    "bad",
    [
        (500, {"error": {"message": "oops"}}, {}),
        (502, b"<html>bad gateway</html>", {"Content-Type": "text/html"}),
        (200, b'{"choices": [', {}),
        (200, b"<html>hello</html>", {"Content-Type": "text/html"}),
        (200, {"choices": []}, {}),
        (200, [1], {}),
        (200, {"error": {"message": "upstream"}}, {}),
        (200, b"", {}),
        (
            200,
            completion(
                logprobs={"content": [{"token": "7", "top_logprobs": [{"token": "7", "logprob": "abc"}]}]}
            ),
            {},
        ),
        (
            200,
            completion(
                logprobs={"content": [{"token": "7", "top_logprobs": [{"token": "7", "logprob": 3.0}]}]}
            ),
            {},
        ),
        (
            200,
            completion(
                logprobs={"content": [{"token": "7", "top_logprobs": [{"token": "7", "logprob": math.nan}]}]}
            ),
            {},
        ),
        (200, completion(logprobs={"content": [{"token": "7", "top_logprobs": [7]}]}), {}),
    ],
)
def test_passing_trouble_is_survived_and_lasting_trouble_is_an_error(serve, judge_for, bad, tmp_path):
    assert judge_for(serve(bad, GOOD)).rate(TALK[:1], progress=False) == pytest.approx([SCORE])
    server = serve(bad)
    with pytest.raises(JudgeError, match="no usable reply in 3 attempts"):
        judge_for(server).rate(TALK[:1], progress=False)
    assert len(server.requests) == 3


def test_time_out(serve, judge_for):
    slow = lambda body, number: (time.sleep(0.8), GOOD)[1]
    assert judge_for(serve(slow, GOOD), timeout=0.3).rate(TALK[:1], progress=False) == pytest.approx([SCORE])
    with pytest.raises(JudgeError, match="longer than 0.2 seconds"):
        judge_for(serve(slow), timeout=0.2, retries=1).rate(TALK[:1], progress=False)


@pytest.mark.parametrize(
    "status, error, message",
    [
        (401, {"message": "bad key"}, "bad key.*Is the key right"),
        (403, {"message": "no"}, "allow that model"),
        (404, {"message": "no such model"}, "model's name right"),
        (400, {"message": "top_logprobs unsupported"}, "top_logprobs unsupported.*extra_body"),
        (429, {"message": "quota used up", "code": "insufficient_quota"}, "quota used up"),
    ],
)
def test_what_cannot_succeed_fails_at_once(serve, judge_for, status, error, message):
    server = serve((status, {"error": error}, {}))
    with pytest.raises(JudgeError, match=message):
        judge_for(server, retries=5, concurrency=1).rate(TALK, progress=False)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "logprobs",
    [
        None,
        {},
        {"content": None},
        {"content": []},
        {"content": [{"token": "7", "logprob": -1.0}]},
        {"content": [{"token": "7", "top_logprobs": []}]},
    ],
)
def test_missing_logprobs(serve, judge_for, logprobs):
    reply = completion(logprobs=logprobs)
    for body in (
        reply,
        {**reply, "choices": [{k: v for k, v in reply["choices"][0].items() if k != "logprobs"}]},
    ):
        server = serve((200, body, {}))
        with pytest.raises(JudgeError, match="no log-probabilities.*LocalJudge"):
            judge_for(server, concurrency=1).rate(TALK, progress=False)
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    "changes",
    [
        dict(logprobs=None, finish_reason="content_filter"),
        dict(
            logprobs=None,
            message={"role": "assistant", "content": None, "refusal": "I cannot help with that."},
        ),
    ],
)
def test_a_refusal_is_no_value_and_no_error(serve, judge_for, changes):
    judge = judge_for(serve((200, completion(**changes), {})))
    assert np.isnan(judge.rate(TALK, progress=False)).all()
    assert (
        np.isnan(judge.rate(TALK, progress=False)).all()
        and judge.usage.calls == 3
        and judge.usage.cached == 3
    )


def test_odd_but_harmless_replies(serve, judge_for):
    reply = completion((("70", 1.0),))
    reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"].append(
        {"token": "x", "logprob": -math.inf}
    )  # json writes -Infinity, as some servers do
    del reply["usage"]
    judge = judge_for(serve((200, reply, {})))
    assert (
        judge.rate(TALK, progress=False).tolist() == [70.0] * 3 == judge.rate(TALK, progress=False).tolist()
    )
    assert judge.usage.calls == 3 and judge.usage.cached == 3 and judge.usage.prompt_tokens == 0


def test_unreachable_server(judge_for):
    with pytest.raises(JudgeError, match="could not be reached"):
        judge_for("http://127.0.0.1:9/v1", retries=1).rate(TALK[:1], progress=False)


def test_concurrency_limit(serve, judge_for):
    many = load_conversations([{"prompt": "Q?", "response": f"answer {i}"} for i in range(14)])
    for limit in (1, 3):
        server = serve(GOOD, delay=0.05)  # another address, so nothing is on disk yet
        judge_for(server, concurrency=limit).rate(many, progress=False)
        assert server.most_running == limit and len(server.requests) == 14


def test_verdicts_on_disk_are_not_asked_for_again(serve, judge_for, tmp_path):
    server = serve()
    first = judge_for(server).rate(TALK, progress=False)
    again = judge_for(server)
    np.testing.assert_array_equal(again.rate(TALK, progress=False), first)
    assert len(server.requests) == 3 and again.usage.cached == 3 and again.usage.calls == 0
    assert (
        judge_for(server, least_mass=0.8).rate(TALK[:1], progress=False) != first[0]
        and len(server.requests) == 3
    )  # the rule is applied to what was kept
    for change in (
        dict(template=TEMPLATE + "\n"),
        dict(model="other"),
        dict(extra_body={"top_k": 1}),
        dict(base_url=server.url.replace("127.0.0.1", "localhost")),
    ):
        before = len(server.requests)
        judge_for(change.pop("base_url", server), **change).rate(TALK[:1], progress=False)
        assert len(server.requests) == before + 1, change


def test_equal_prompts_are_asked_once(serve, judge_for):
    server = serve()
    twice = Conversations([*TALK, *TALK])
    assert (
        judge_for(server).rate(twice, progress=False) == pytest.approx([SCORE] * 6)
        and len(server.requests) == 3
    )


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b'{"top": [["70", -0.',
        b"[]",
        b"{}",
        b'{"top": [["70", "x"]]}',
        b'{"top": [[70, -1]]}',
        b"\xff\xfe",
    ],
)
def test_damaged_verdicts_are_asked_for_again(serve, judge_for, tmp_path, damage):
    server = serve()
    judge_for(server).rate(TALK[:1], progress=False)
    (file,) = (tmp_path / "verdicts").rglob("*.json")
    file.write_bytes(damage)
    assert (
        judge_for(server).rate(TALK[:1], progress=False) == pytest.approx([SCORE])
        and len(server.requests) == 2
    )
    assert (
        judge_for(server).rate(TALK[:1], progress=False) == pytest.approx([SCORE])
        and len(server.requests) == 2
    )


def test_a_run_that_failed_half_way_goes_on_where_it_stopped(serve, judge_for, tmp_path):
    server = serve(GOOD, GOOD, (401, {"error": {"message": "expired"}}, {}), GOOD)
    with pytest.raises(JudgeError, match="expired"):
        judge_for(server, concurrency=1).rate(TALK, progress=False)
    assert len(list((tmp_path / "verdicts").rglob("*.json"))) == 2
    judge = judge_for(server)
    assert (
        judge.rate(TALK, progress=False) == pytest.approx([SCORE] * 3)
        and judge.usage.cached == 2
        and judge.usage.calls == 1
    )
    assert not [p for p in (tmp_path / "verdicts").rglob("*") if p.name.startswith(".")]


def test_one_failure_stops_the_others_while_they_pause(serve, judge_for):
    def step(body, number):
        if "always" not in body["messages"][0]["content"]:
            return 429, {"error": {"message": "wait"}}, {"Retry-After": "30"}
        time.sleep(0.3)
        return 401, {"error": {"message": "expired"}}, {}

    start = time.monotonic()
    with pytest.raises(JudgeError, match="expired"):
        judge_for(serve(step)).rate(TALK, progress=False)
    assert time.monotonic() - start < 5


def test_usage_and_cost(serve, judge_for):
    judge = judge_for(serve((500, b"x", {}), GOOD), prices=(2.0, 10.0), concurrency=1)
    judge.rate(TALK, progress=False)
    used = judge.usage
    assert (used.calls, used.retried, used.cached, used.prompt_tokens, used.completion_tokens) == (
        3,
        1,
        0,
        300,
        3,
    )
    assert (
        used.cost == pytest.approx((300 * 2 + 3 * 10) / 1e6)
        and judge_for("http://127.0.0.1:9/v1").usage.cost is None
    )


def test_the_key_is_nowhere_but_in_the_request(serve, judge_for, tmp_path, caplog, capsys, lm):
    caplog.set_level(logging.DEBUG)
    for name in ("openai", "httpx", "httpx2", "httpcore", "httpcore2"):
        logging.getLogger(name).setLevel(logging.DEBUG)
    echo = f"you sent {KEY}"
    server = serve((500, {"error": {"message": echo}}, {}), (200, {"error": {"message": echo}}, {}), GOOD)
    judge = judge_for(server, questions=["Am I right?"], concurrency=1, max_new_tokens=4)
    found = judge.evaluate(lm, progress=False)
    found.to_json(tmp_path / "evaluation.json")
    seen = [
        repr(judge),
        str(judge),
        repr(vars(judge)),
        repr(judge.settings()),
        judge.fingerprint,
        repr(found),
        found._repr_html_(),
        repr(found.settings),
        repr(judge.usage),
        pickle.dumps(judge).decode("latin1"),
    ]
    for status in (401, 500, 429, 400, 200):
        with pytest.raises(JudgeError) as caught:
            judge_for(
                serve((status, {"error": {"message": echo, "code": KEY}}, {})),
                retries=1,
                folder=tmp_path / str(status),
            ).rate(TALK, progress=False)
        seen += [
            str(caught.value),
            repr(caught.value),
            "".join(traceback.format_exception(caught.value)),
            repr(caught.value.__context__),
            repr(caught.value.__cause__),
        ]
        assert "<key>" in str(caught.value)
    seen += [caplog.text, *(repr(vars(record)) for record in caplog.records), *capsys.readouterr()]
    for path in tmp_path.rglob("*"):
        seen += [str(path), path.read_text() if path.is_file() else ""]
    assert f"Bearer {KEY}" in server.keys and len(list(tmp_path.rglob("*.json"))) >= 2
    assert not [text for text in seen if KEY in text]
    assert pickle.loads(pickle.dumps(judge))._key is None
    assert judge_for(server, api_key="another-key").fingerprint == judge_for(server).fingerprint


def test_keys_that_cannot_be_sent_are_not_spelled_out(serve, judge_for):
    server = serve()
    judge_for(server, api_key=f"  {KEY}\n").rate(TALK[:1], progress=False)
    assert server.keys == [f"Bearer {KEY}"]
    for broken in (KEY[:8] + "\n" + KEY[8:], KEY + "é", KEY[:5] + " " + KEY[5:]):
        with pytest.raises(JudgeError, match="not copied whole") as caught:
            judge_for(server, api_key=broken)
        assert KEY[8:] not in str(caught.value)


def test_where_the_key_comes_from(serve, judge_for, monkeypatch):
    with pytest.raises(
        JudgeError, match="no key for https://api.openai.com/v1: set the environment variable OPENAI_API_KEY"
    ):
        judge_for(None, base_url=None, api_key=None)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert judge_for(None, base_url=None, api_key=None)._key == KEY
    server = serve()
    judge_for(server, api_key=None).rate(
        TALK[:1], progress=False
    )  # not to a server on this machine, which did not ask for it
    assert KEY not in server.keys[0]
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    assert judge_for(None, base_url=None).rate(TALK[:1], progress=False) == pytest.approx([SCORE])


@pytest.mark.parametrize(
    "url",
    ["http://user:pass@host/v1", "http://host/v1?api_key=abc", "host:8000/v1", "ftp://host/v1", "nonsense"],
)
def test_addresses_with_secrets_or_without_sense(judge_for, url):
    with pytest.raises(JudgeError, match="base_url") as caught:
        judge_for(url)
    assert "pass@" not in str(caught.value) and "abc" not in str(caught.value)


def test_proxies_are_not_asked_about_this_machine(serve, judge_for, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    assert judge_for(serve()).rate(TALK[:1], progress=False) == pytest.approx([SCORE])


def test_a_model_that_splits_digits_is_noticed(serve, judge_for):
    many = load_conversations([{"prompt": "Q?", "response": f"answer {i}"} for i in range(5)])
    with pytest.warns(UserWarning, match="splits numbers into digits"):
        judge_for(serve((200, completion((("8", 0.9), ("7", 0.1))), {}))).rate(many, progress=False)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judge_for(serve((200, completion((("8", 0.9), ("75", 0.05), ("x", 0.05))), {}))).rate(
            many, progress=False
        )


def test_openai_judge_end_to_end(serve, judge_for, lm):
    judge = judge_for(
        serve(), questions=["Am I right?", "Is the moon made of cheese?"], max_new_tokens=4, name="trait"
    )
    found = judge.evaluate(lm, progress=False)
    assert (
        found.mean == pytest.approx(SCORE)
        and found.unit == "0-100"
        and found.judge == "trait"
        and found.ids == judge.questions.ids
        and found.settings["base_url"].startswith("http://127")
    )


def test_settings_that_make_no_sense_and_a_missing_package(judge_for, monkeypatch):
    for options in (dict(concurrency=0), dict(retries=-1), dict(timeout=0)):
        with pytest.raises(JudgeError, match=f"{next(iter(options))} must be a"):
            judge_for("http://127.0.0.1:9/v1", **options)
    import sys

    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(MissingExtraError, match=r"concept_tda\[judge\]"):
        judge_for("http://127.0.0.1:9/v1")


def test_importing_judges_does_not_import_openai():
    import subprocess
    import sys

    code = (
        "import sys, concept_tda.concepts.judges; assert 'openai' not in sys.modules and 'httpx2' not in "
        "sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
