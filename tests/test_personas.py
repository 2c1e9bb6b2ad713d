"""Traits, persona concepts against written-out means, steering against a hand-written forward pass, and the
steering check."""

import json
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from concept_tda.concepts import personas
from concept_tda.concepts.concept import Concept, ConceptError, tensor_concept
from concept_tda.concepts.judges import AnswerJudge, ContrastJudge, FunctionJudge, JudgeError, LossJudge
from concept_tda.concepts.personas import (
    PersonaError,
    SteeringError,
    Trait,
    _TurnFinder,
    load_trait,
    persona_concept,
    persona_responses,
    steer,
    steering_check,
    traits,
)
from concept_tda.data.batches import batches
from concept_tda.data.conversations import load_conversations
from concept_tda.data.tokens import tokenize
from concept_tda.model import answers as answers_room
from concept_tda.model.answers import cached_generate
from concept_tda.model.loading import LayerError, ModelError, load_model
from concept_tda.model.losses import token_losses
from concept_tda.model.tracing import generate, pooled_activations

from chat_tokenizers import FAMILIES as TEMPLATE_FAMILIES
from chat_tokenizers import chat_tokenizer
from tiny import FAMILIES, tiny_model, tiny_pair, tiny_tokenizer

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCEPT_TDA_CACHE", str(tmp_path / "cache"))


def traces_of(lm):
    """Hooks, replaced forwards and parameters: all that steering might leave behind. (transformers leaves
    hooks of its own after output_hidden_states.)"""
    return [
        (len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m), list(m._parameters))
        for m in lm.model.modules()
    ]


def make_lm(family="llama", dtype=torch.float32, n_layers=3, seed=0):
    if family != "lora":
        return load_model(tiny_pair(family, dtype=dtype, n_layers=n_layers, seed=seed))
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(
            tiny_model("llama", dtype=dtype, n_layers=n_layers),
            LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
        )
    return load_model((model.to(dtype).eval(), tiny_tokenizer()))


@pytest.fixture(scope="module")
def lm():
    return make_lm()


# --- traits ---


@pytest.mark.parametrize("name", ["sycophantic", "malicious", "hallucinating", "impolite"])
def test_bundled_traits_are_complete(name):
    trait = load_trait(name)
    assert trait.name == name and trait.description and len(trait.prompt_pairs) == 5
    questions = trait.extraction_questions + trait.evaluation_questions
    assert (
        len(trait.extraction_questions) == len(trait.evaluation_questions) == 20
        and len({q.lower() for q in questions}) == 40
    )
    assert all(len(q.split()) >= 4 for q in questions)
    assert len({prompt for pair in trait.prompt_pairs for prompt in pair}) == 10
    assert trait.judge_prompt.count("{question}") == trait.judge_prompt.count(
        "{answer}"
    ) == 1 and not re.search(r"[{}]", trait.judge_prompt.replace("{question}", "").replace("{answer}", ""))
    assert "0 to 100" in trait.judge_prompt and "number only" in trait.judge_prompt[-80:]


def test_traits_share_no_question():
    assert traits() == ["hallucinating", "impolite", "malicious", "sycophantic"]
    everything = [
        q
        for name in traits()
        for t in [load_trait(name)]
        for q in t.extraction_questions + t.evaluation_questions
    ]
    assert len(set(everything)) == len(everything) == 160
    assert len({load_trait(name).fingerprint for name in traits()}) == 4


def record(**changes):
    return (
        dict(
            name="shy",
            description="Says little.",
            prompt_pairs=[dict(positive="Be shy.", negative="Be bold.")],
            extraction_questions=["Who are you?", "What now?"],
            evaluation_questions=["Where to?"],
            judge_prompt="Q {question} A {answer} Number?",
        )
        | changes
    )


def write(tmp_path, data, name="shy.json"):
    path = tmp_path / name
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


def test_a_file_of_ones_own(tmp_path):
    trait = load_trait(write(tmp_path, record(licence="mine")))
    assert trait.prompt_pairs == (("Be shy.", "Be bold."),) and trait.evaluation_questions == ("Where to?",)
    assert load_trait(write(tmp_path, "\ufeff" + json.dumps(record()))) == trait
    assert "<b>" not in replace(trait, description="<b>")._repr_html_().split("<p>")[1]


@pytest.mark.parametrize(
    "changes, field, says",
    [
        (
            dict(extraction_questions=["Who are you?", "who  are you"]),
            "extraction_questions",
            "same question",
        ),
        (dict(evaluation_questions=["What now?"]), "evaluation_questions", "overlap"),
        (dict(extraction_questions=[]), "extraction_questions", "empty"),
        (dict(extraction_questions="Who are you?"), "extraction_questions", "list"),
        (dict(extraction_questions=["Who?", 3]), r"extraction_questions'\[1\]", "text"),
        (dict(evaluation_questions=["  "]), r"evaluation_questions'\[0\]", "empty"),
        (dict(judge_prompt="How shy is {answer}?"), "judge_prompt", r"\{question\}"),
        (dict(judge_prompt="How shy?"), "judge_prompt", r"\{question\} and \{answer\}"),
        (dict(judge_prompt=""), "judge_prompt", "empty"),
        (dict(name=None), "name", "text"),
        (dict(prompt_pairs=[]), "prompt_pairs", "at least one"),
        (dict(prompt_pairs={}), "prompt_pairs", "list"),
        (dict(prompt_pairs=["Be shy."]), r"prompt_pairs'\[0\]", "lacks 'positive' and 'negative'"),
        (dict(prompt_pairs=[dict(positive="Be shy.")]), r"prompt_pairs'\[0\]", "lacks 'negative'"),
        (
            dict(prompt_pairs=[dict(positive="Be shy.", negative=" be shy. ")]),
            r"prompt_pairs'\[0\]",
            "the same",
        ),
        (
            dict(prompt_pairs=[dict(positive="a b", negative="c"), dict(positive="a b", negative="c")]),
            r"prompt_pairs'\[1\]",
            "same pair",
        ),
        (dict(prompt_pairs=[dict(positive="a b", negative="")]), r"prompt_pairs'\[0\].negative", "empty"),
    ],
)
def test_bad_fields_name_file_and_field(tmp_path, changes, field, says):
    path = write(tmp_path, record(**changes))
    with pytest.raises(PersonaError, match=f"{re.escape(str(path))}(?s:.)*{field}(?s:.)*{says}"):
        load_trait(path)


@pytest.mark.parametrize(
    "missing", ["name", "prompt_pairs", "extraction_questions", "evaluation_questions", "judge_prompt"]
)
def test_missing_parts(tmp_path, missing):
    data = record()
    del data[missing]
    path = write(tmp_path, data)
    with pytest.raises(PersonaError, match=f"{re.escape(str(path))}.*'{missing}' is missing"):
        load_trait(path)


def test_no_trait_file(tmp_path):
    with pytest.raises(PersonaError, match="no trait 'grumpy'.*sycophantic"):
        load_trait("grumpy")
    with pytest.raises(PersonaError, match="not JSON"):
        load_trait(write(tmp_path, "{"))
    with pytest.raises(PersonaError, match="one JSON object.*list"):
        load_trait(write(tmp_path, "[]"))
    with pytest.raises(PersonaError):
        Trait("shy", "", [("a b", "c d")], ["Q?"], ["q"], "{question}{answer}")  # also when made by hand


def test_persona_vectors_layout(tmp_path):
    layout = dict(
        instruction=[dict(pos="Be evil.", neg="Be good.")],
        questions=["What do you want?", "Why?"],
        eval_prompt="{question} {answer}",
    )
    for folder, questions in (
        ("trait_data_extract", layout["questions"]),
        ("trait_data_eval", ["And then?"]),
    ):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, layout | {"questions": questions}, "evil.json")
    trait = load_trait(tmp_path / "trait_data_extract" / "evil.json")
    assert (trait.name, trait.prompt_pairs, trait.evaluation_questions, trait.judge_prompt) == (
        "evil",
        (("Be evil.", "Be good."),),
        ("And then?",),
        "{question} {answer}",
    )
    alone = write(tmp_path, layout, "lone.json")
    assert load_trait(alone).evaluation_questions == ()
    assert load_trait(alone, evaluation=tmp_path / "trait_data_eval" / "evil.json").evaluation_questions == (
        "And then?",
    )
    with pytest.raises(PersonaError, match="overlap"):
        load_trait(alone, evaluation=alone)
    with pytest.raises(PersonaError, match=r"'instruction'\[0\] lacks 'neg'"):
        load_trait(write(tmp_path, layout | {"instruction": [dict(pos="x")]}))
    with pytest.raises(PersonaError, match="'eval_prompt' is missing"):
        load_trait(write(tmp_path, {k: v for k, v in layout.items() if k != "eval_prompt"}))


# --- responses, filter, concept ---

TRAIT = Trait(
    "shy",
    "",
    [("Be shy.", "Be bold."), ("Say little.", "Say much.")],
    [f"What about {n}?" for n in ("tea", "rain", "cars", "love", "work", "war")],
    ["Where to?"],
    "{question}{answer}",
)
SHORT = dict(max_new_tokens=12, progress=False)


def letters(conversation):
    return 100 * sum(c.isalpha() for c in conversation.response) / len(conversation.response)


def test_every_prompt_meets_every_question(lm):
    answers = persona_responses(lm, TRAIT, samples=2, **SHORT)
    table = answers.metadata
    assert len(answers) == 2 * 2 * 6 * 2 and table["kept"].all() and table["trait_score"].isna().all()
    for i in range(0, len(answers), 2):
        positive, negative = answers[i], answers[i + 1]
        assert [m["role"] for m in positive.messages] == ["system", "user", "assistant"]
        pair = TRAIT.prompt_pairs[positive.metadata["prompt_pair"]]
        assert (
            positive.messages[0]["content"],
            negative.messages[0]["content"],
        ) == pair and positive.messages[1] == negative.messages[1]
        assert positive.messages[1]["content"] == TRAIT.extraction_questions[positive.metadata["question"]]
        assert positive.metadata["contrast"] == negative.metadata["contrast"] == i // 2 and (
            positive.metadata["side"],
            negative.metadata["side"],
        ) == ("positive", "negative")
    assert len({c.response for c in answers}) > len(answers) // 2  # samples differ
    told = generate(lm, [list(answers[0].prompt)], max_new_tokens=12, temperature=1.0, progress=False)
    assert told[0].response == answers[0].response  # on-policy, through tracing.generate


class Table(AnswerJudge):
    """A judge that gives prepared scores, in the order it is asked, and remembers what it saw."""

    def __init__(self, values, name="table"):
        super().__init__(None, name=name)
        self.values, self.seen = values, []

    def settings(self):
        return {"values": [None if v is None else float(v) for v in self.values]}

    def scores(self, conversations, progress):
        start = len(self.seen)
        self.seen += list(conversations)
        return self.values[start : start + len(conversations)]


def test_the_filter_of_the_paper(lm):
    pairs = [
        (50, 49.9),
        (49.9, 10),
        (90, 50),
        (90, 90),
        (None, 10),
        (90, None),
        (100, 0),
        (80, 20),
        (70, 30),
        (60, 40),
        (55, 45),
        (99, 1),
    ]
    coherent = [(50, 50)] * 6 + [(49, 80), (80, 49), (None, 80), (100, 100), (90, 90), (80, 80)]
    judge, fluency = (
        Table([v for pair in pairs for v in pair]),
        Table([v for pair in coherent for v in pair], "fluency"),
    )
    answers = persona_responses(lm, TRAIT, judge=judge, coherence=fluency, **SHORT)
    kept = answers.metadata["kept"].to_numpy().reshape(-1, 2)
    assert kept[:, 0].tolist() == [True] + [False] * 8 + [True] * 3 and (kept[:, 0] == kept[:, 1]).all()
    assert all(
        m["role"] != "system" for c in judge.seen for m in c.messages
    )  # the judge never sees the instruction
    assert answers.metadata["trait_score"][0] == 50 and np.isnan(answers.metadata["trait_score"][8])

    concept = persona_concept(
        lm, TRAIT, 2, judge=Table(judge.values), coherence=Table(fluency.values, "fluency"), **SHORT
    )
    about = concept.provenance
    assert (about["contrasts_kept"], about["contrasts_dropped"], about["answers_without_a_score"]) == (
        4,
        8,
        2,
    )
    assert (
        about["dropped_for_the_positive"],
        about["dropped_for_the_negative"],
        about["dropped_for_coherence"],
    ) == (2, 3, 3)
    assert (
        about["filter"] == "table: positive ≥ 50, negative < 50; fluency: both ≥ 50"
        and about["layer_chosen"] == "given"
    )
    rows = [answers.select([2 * i + side for i in np.flatnonzero(kept[:, 0])]) for side in (0, 1)]
    means = [np.mean([written_out(lm, c, 2) for c in side], axis=0) for side in rows]
    v = torch.tensor(means[0] - means[1])
    assert abs(concept.cosine(v) - 1) < 1e-6 and abs(concept.norm - v.norm()) < 1e-5


def written_out(lm, conversation, layer):
    """Mean activation of the response tokens, with transformers' own hidden states."""
    item = tokenize([{"messages": list(conversation.messages)}], lm.tokenizer)[0]
    with torch.no_grad():
        hidden = lm.model(item.input_ids[None], output_hidden_states=True).hidden_states[layer][0]
    return hidden[item.response_mask].mean(0).numpy()


def test_layer_by_held_out_auc(lm, tmp_path):
    concept = persona_concept(lm, TRAIT, **SHORT)
    auc = concept.provenance["auc_by_layer"]
    assert (
        set(auc) == {"0", "1", "2", "3"}
        and concept.layer > 0
        and auc[str(concept.layer)] == max(auc[str(layer)] for layer in (1, 2, 3))
    )
    assert (
        concept.provenance["filter"].startswith("none: no judge")
        and concept.provenance["contrasts_kept"] == 12
        and concept.provenance["trait_fingerprint"] == TRAIT.fingerprint
    )
    assert concept.name == "shy" and concept.check(lm) == [] and "auc" in concept.quality
    again = Concept.load(concept.save(tmp_path / "shy.safetensors"))
    assert again.provenance == concept.provenance
    given = persona_concept(lm, TRAIT, concept.layer, **SHORT)
    assert abs(given.cosine(concept) - 1) < 1e-6


def test_a_judge_that_keeps_nothing(lm):
    def never(conversation):
        return None

    def low(conversation):
        return 7

    with pytest.raises(
        PersonaError,
        match=r"kept none of 12 contrasts.*\n.*never, positive answers: none of 12 has a score.*at least 50",
    ):
        persona_concept(lm, TRAIT, judge=FunctionJudge(never), **SHORT)
    with pytest.raises(
        PersonaError,
        match=(
            r"low, positive answers: 7 / 7 / 7 \(needed: at least 50\)\n.*negative answers: 7 / 7 / 7 "
            r"\(needed: below 50\)"
        ),
    ):
        persona_concept(lm, TRAIT, judge=FunctionJudge(low), **SHORT)
    with pytest.raises(PersonaError, match="all answers: 7 / 7 / 7"):
        persona_concept(lm, TRAIT, coherence=FunctionJudge(low), **SHORT)


def test_too_few_questions_to_choose_a_layer(lm):
    judge = Table([100, 0, 100, 0] + [0] * 20)
    with pytest.raises(PersonaError, match="2 of 12.*2 different questions"):
        persona_concept(lm, TRAIT, judge=judge, **SHORT)
    assert persona_concept(lm, TRAIT, 1, judge=Table(judge.values), **SHORT).provenance["contrasts_kept"] == 2


def test_bad_arguments_come_before_the_work(lm, monkeypatch):
    monkeypatch.setattr(personas, "cached_generate", lambda *a, **k: pytest.fail("asked the model first"))
    items = load_conversations([{"prompt": "Q?", "yes": "a", "no": "b"}])
    for options, error in (
        (dict(layer=9), LayerError),
        (dict(samples=0), PersonaError),
        (dict(samples=2, temperature=0.0), PersonaError),
        (dict(judge=ContrastJudge(items, trait="yes", neutral="no")), PersonaError),
        (dict(coherence="good?"), PersonaError),
    ):
        with pytest.raises(error):
            persona_concept(lm, TRAIT, **options, **SHORT)


def test_empty_answers_are_dropped_and_counted(lm, monkeypatch):
    real = answers_room.generate

    def partly(lm, prompts, **options):
        told = real(lm, prompts, **options)
        return personas.Conversations(
            [
                replace(c, messages=c.messages[:-1], id="", metadata={**c.metadata, "empty_answer": True})
                if "tea" in c.prompt[-1]["content"] and "shy" in c.prompt[0]["content"]
                else c
                for c in told
            ]
        )

    monkeypatch.setattr(answers_room, "generate", partly)
    concept = persona_concept(lm, TRAIT, 2, **SHORT)
    assert (concept.provenance["contrasts_kept"], concept.provenance["contrasts_with_an_empty_answer"]) == (
        11,
        1,
    )
    answers = persona_responses(lm, TRAIT, judge=FunctionJudge(letters), **SHORT)
    silent = answers.metadata["empty_answer"].to_numpy()
    assert (
        silent.sum() == 1
        and np.isnan(answers.metadata["trait_score"][silent]).all()
        and not answers.metadata["kept"][silent].any()
    )


def test_a_silent_model(lm, monkeypatch):
    def silent(lm, prompts, **options):
        raise ModelError("tiny gave an empty answer to every prompt (…)")

    monkeypatch.setattr(answers_room, "generate", silent)
    with pytest.raises(ModelError, match="empty answer to every prompt"):
        persona_concept(lm, TRAIT, **SHORT)


def test_goes_on_after_a_kill(lm, tmp_path, monkeypatch):
    whole = persona_responses(lm, TRAIT, judge=FunctionJudge(letters), folder=tmp_path / "whole", **SHORT)
    real, asked = answers_room.generate, []

    def killed(lm, prompts, **options):
        if asked:
            raise KeyboardInterrupt
        asked.extend(prompts.ids)
        return real(lm, prompts, **options)

    monkeypatch.setattr(answers_room, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        persona_responses(
            lm, TRAIT, judge=FunctionJudge(letters), folder=tmp_path / "part", batch_size=2, **SHORT
        )

    def counted(lm, prompts, **options):
        asked.extend(prompts.ids)
        return real(lm, prompts, **options)

    monkeypatch.setattr(answers_room, "generate", counted)
    again = persona_responses(
        lm, TRAIT, judge=FunctionJudge(letters), folder=tmp_path / "part", batch_size=2, **SHORT
    )
    assert (
        len(asked) == len(set(asked)) == 24
        and again.ids == whole.ids
        and again.metadata.equals(whole.metadata)
    )
    monkeypatch.setattr(FunctionJudge, "scores", lambda *a: pytest.fail("rated twice"))
    assert persona_responses(
        lm, TRAIT, judge=FunctionJudge(letters), folder=tmp_path / "part", batch_size=2, **SHORT
    ).metadata.equals(whole.metadata)


def test_verdicts_of_different_judges_are_kept_apart(lm, tmp_path):
    first = persona_responses(lm, TRAIT, judge=FunctionJudge(letters), folder=tmp_path, **SHORT).metadata[
        "trait_score"
    ]
    second = persona_responses(lm, TRAIT, judge=Table(list(range(24))), folder=tmp_path, **SHORT).metadata[
        "trait_score"
    ]
    assert second.tolist() == list(range(24)) and not first.equals(second)


# --- which positions ---

CHATS = load_conversations(
    [
        {
            "messages": [
                {"role": "user", "content": "Is it?"},
                {"role": "assistant", "content": "No."},
                {"role": "user", "content": "Sure, assistant?"},
                {"role": "assistant", "content": "Yes, I am 😀."},
            ]
        },
        {
            "prompt": "What is two plus two, if I may ask you that?",
            "response": "😀 Four, é voilà.\n\nReally.",
        },
        {"prompt": "Wh", "response": "\n2"},
    ]
)


@pytest.mark.parametrize("family", TEMPLATE_FAMILIES)
@pytest.mark.parametrize("trim", [False, True])
def test_turns_are_found_where_the_response_mask_is(family, trim):
    """For every template: the library's own mask, from nothing but token ids."""
    tokenizer = chat_tokenizer(family, trim_offsets=trim)
    lm = type("Lm", (), dict(tokenizer=tokenizer, name=family))()
    finder = _TurnFinder(lm)
    for item in tokenize(CHATS[:2], tokenizer):
        assert torch.equal(finder._mask(item.input_ids), item.response_mask), tokenizer.convert_ids_to_tokens(
            item.input_ids
        )
    for cut in (3, 1):  # cut in the middle of an answer
        item = tokenize(CHATS[1:2], tokenizer)[0]
        assert torch.equal(finder._mask(item.input_ids[:-cut]), item.response_mask[:-cut])
    for ids, c in zip(personas.tokenize_prompts(CHATS, tokenizer), CHATS):  # a prompt: earlier answers only
        earlier = (
            tokenize([list(c.messages[:-2])], tokenizer)[0].response_mask.sum() if len(c.messages) > 2 else 0
        )
        assert finder._mask(ids).sum() == earlier


def test_padding_on_either_side_is_no_position(lm):
    finder, items = _TurnFinder(lm), tokenize(CHATS, lm.tokenizer)
    T = max(items.lengths)
    for side in ("left", "right"):
        pad = lambda x, value=0: torch.nn.functional.pad(
            x, (T - len(x), 0) if side == "left" else (0, T - len(x)), value=value
        )
        ids, attention = (
            torch.stack([pad(item.input_ids) for item in items]),
            torch.stack([pad(torch.ones_like(item.input_ids)) for item in items]),
        )
        assert torch.equal(
            finder.mask(ids, attention), torch.stack([pad(item.response_mask, False) for item in items])
        )


def test_text_without_turns_is_an_error(lm):
    concept = direction(lm)
    ids = lm.tokenizer("plain text", return_tensors="pt").input_ids
    with (
        steer(lm, concept, 1.0),
        pytest.raises(SteeringError, match="no turn of the assistant.*positions='all'"),
    ):
        lm.model(ids)
    with steer(lm, concept, 1.0), pytest.raises(SteeringError, match="input_ids"):
        lm.model(inputs_embeds=torch.zeros(1, 3, lm.width))
    with steer(lm, concept, 1.0, positions="all"):
        lm.model(ids)
    bare = load_model(
        (tiny_model(vocab_size=280), tiny_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}"))
    )
    with pytest.raises(SteeringError, match="positions='all'"), steer(bare, direction(bare, 1), 1.0):
        pass


# --- steering: the oracle is a forward pass written out block by block ---


def direction(lm, layer=2, seed=3, norm=2.0, name="push"):
    v = torch.randn(lm.width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return tensor_concept(norm * v / v.norm(), layer=layer, lm=lm, name=name)


def hand_written_llama(lm, input_ids, places, layer, vector):
    """Logits [T, V] of a tiny Llama: embeddings, blocks one by one, the vector added at `places`."""
    m = lm.model.model
    h = m.embed_tokens(input_ids[None])
    position_ids = torch.arange(len(input_ids))[None]
    rotary = m.rotary_emb(h, position_ids)
    T = len(input_ids)
    mask = torch.full((1, 1, T, T), float("-inf"), dtype=h.dtype).triu(1)
    for l in range(len(m.layers) + 1):
        if l == layer:
            h = h.clone()
            h[0, places] += vector.to(h)
        if l < len(m.layers):
            h = m.layers[l](h, attention_mask=mask, position_ids=position_ids, position_embeddings=rotary)
            h = h[0] if isinstance(h, tuple) else h
    return lm.model.lm_head(m.norm(h))[0]


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
@pytest.mark.parametrize("positions", ["response", "all"])
def test_equals_a_hand_written_forward(layer, positions):
    lm = make_lm(dtype=torch.float64)
    concept = direction(lm, layer)
    items = tokenize(CHATS, lm.tokenizer)
    T = max(items.lengths)
    with torch.no_grad():
        for side in ("left", "right"):
            pad = lambda x: torch.nn.functional.pad(x, (T - len(x), 0) if side == "left" else (0, T - len(x)))
            ids, attention = (
                torch.stack([pad(item.input_ids) for item in items]),
                torch.stack([pad(torch.ones_like(item.input_ids)) for item in items]),
            )
            with steer(lm, concept, -1.5, positions=positions):
                logits = lm.model(
                    ids, attention_mask=attention, position_ids=(attention.cumsum(1) - 1).clamp(min=0)
                ).logits
            for row, item in enumerate(items):
                places = (
                    item.response_mask if positions == "response" else torch.ones_like(item.response_mask)
                )
                wanted = hand_written_llama(
                    lm, item.input_ids, places, layer, -1.5 * concept.norm * concept.direction.double()
                )
                torch.testing.assert_close(logits[row][attention[row].bool()], wanted, atol=1e-9, rtol=0)
        plain = lm.model(items[0].input_ids[None]).logits[0]
        assert (
            plain
            - hand_written_llama(lm, items[0].input_ids, items[0].response_mask, layer, torch.zeros(lm.width))
        ).abs().max() < 1e-9
        assert (plain - logits[0][attention[0].bool()]).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES + ("lora",))
def test_pooled_activations_move_by_alpha_v(family):
    """Through nnsight, on every architecture: exactly α v at the layer, nothing below it."""
    lm = make_lm(family)
    concept = direction(lm)
    plain, clean = pooled_activations(lm, CHATS, [0, 1, 2, 3], progress=False), traces_of(lm)
    with steer(lm, concept, 1.5):
        steered = pooled_activations(lm, CHATS, [1, 2, 3], progress=False)
    with steer(lm, direction(lm, 0), 1.5):
        lowest = pooled_activations(lm, CHATS, 0, progress=False)[0]
    torch.testing.assert_close(
        lowest, plain[0] + 1.5 * concept.norm * concept.direction.to(lowest), atol=1e-4, rtol=0
    )
    assert traces_of(lm) == clean
    torch.testing.assert_close(steered[1], plain[1])
    torch.testing.assert_close(
        steered[2], plain[2] + 1.5 * concept.norm * concept.direction.to(lowest), atol=1e-4, rtol=0
    )
    assert (steered[3] - plain[3]).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma", "lora"])
@pytest.mark.parametrize("positions", ["response", "all"])
def test_generation_with_cache_equals_one_pass_over_the_text(family, positions):
    lm = make_lm(family, dtype=torch.float64)
    concept = direction(lm, norm=8.0)
    prompts = [list(c.prompt) for c in CHATS] + ["Why would that be the case, in your view?"]
    prompts = [p if isinstance(p, list) else [{"role": "user", "content": p}] for p in prompts]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some random models stop at once
        plain = generate(lm, prompts, max_new_tokens=9, progress=False)
    with steer(lm, concept, 1.0, positions=positions), torch.no_grad():
        told = generate(lm, prompts, max_new_tokens=9, batch_size=4, progress=False)
        alone = generate(lm, prompts, max_new_tokens=9, batch_size=1, progress=False)
        for prompt, ids in zip(prompts, personas.tokenize_prompts(told, lm.tokenizer)):
            answer = []
            for _ in range(
                9
            ):  # no cache: the whole text every time; the mask has to see the unfinished answer
                answer.append(
                    int(
                        lm.model(torch.cat([ids, torch.tensor(answer, dtype=torch.int64)])[None])
                        .logits[0, -1]
                        .argmax()
                    )
                )
                if answer[-1] == lm.tokenizer.eos_token_id:
                    break
            mine = told[prompts.index(prompt)]
            assert lm.tokenizer.decode(answer, skip_special_tokens=True).strip() == mine.response
    assert [c.messages for c in told] == [c.messages for c in alone] and [c.response for c in told] != [
        c.response for c in plain
    ]


def test_transformers_own_generate_is_steered_alike(lm):
    concept = direction(lm, norm=8.0)
    ids = lm.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Why?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )["input_ids"]
    with steer(lm, concept, 1.0):
        theirs = lm.model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        ours = generate(lm, ["Why?"], max_new_tokens=8, progress=False)[0]
    assert lm.tokenizer.decode(theirs, skip_special_tokens=True).strip() == ours.response


def test_the_first_token_of_an_answer_is_not_pushed_and_the_second_is(lm):
    concept = direction(lm, norm=20.0)
    item = tokenize(CHATS[1:2], lm.tokenizer)[0]
    start = int(item.response_mask.nonzero()[0])
    with torch.no_grad():
        plain = lm.model(item.input_ids[None]).logits[0]
        with steer(lm, concept, 1.0):
            steered = lm.model(item.input_ids[None]).logits[0]
    assert (
        torch.equal(plain[:start], steered[:start])
        and (plain[start:] - steered[start:]).abs().amax(1).min() > 1e-3
    )


def test_losses_see_the_steering(lm):
    batch = next(batches(lm.tokenize(CHATS)))
    with torch.no_grad():
        plain = token_losses(lm, batch)
        with steer(lm, direction(lm, norm=20.0), 1.0):
            steered = token_losses(lm, batch)
    assert (plain - steered).abs().max() > 0.1


def test_twice_over_and_zero(lm):
    one, two, batch = direction(lm, 1), direction(lm, 2, seed=5), next(batches(lm.tokenize(CHATS)))
    both = direction(lm, 2, seed=3)
    with torch.no_grad():
        plain = lm.model(batch.input_ids, attention_mask=batch.attention_mask).logits
        with steer(lm, both, 0.0):
            assert torch.equal(lm.model(batch.input_ids, attention_mask=batch.attention_mask).logits, plain)
        with steer(lm, both, 2.0), steer(lm, both, -2.0):
            torch.testing.assert_close(
                lm.model(batch.input_ids, attention_mask=batch.attention_mask).logits,
                plain,
                atol=1e-4,
                rtol=1e-4,
            )
        with steer(lm, one, 1.0), steer(lm, two, 1.0), steer(lm, two, 1.0, positions="all"):
            assert not torch.allclose(
                lm.model(batch.input_ids, attention_mask=batch.attention_mask).logits, plain
            )
    assert personas._steering_parameters(lm) == []


@pytest.mark.parametrize("family", ["llama", "gpt2", "lora"])
@pytest.mark.parametrize("layer", [0, 3])
def test_nothing_stays_behind_after_an_error(family, layer):
    lm = make_lm(family)
    concept, before, clean = direction(lm, layer), lm.fingerprint, traces_of(lm)
    ids = tokenize(CHATS, lm.tokenizer)[0].input_ids[None]
    with torch.no_grad():
        plain = lm.model(ids).logits
    with pytest.raises(RuntimeError, match="in the middle"):
        with steer(lm, concept, 3.0):
            assert lm.fingerprint != before
            raise RuntimeError("in the middle")
    with pytest.raises(SteeringError), steer(lm, concept, 3.0):
        lm.model(torch.tensor([[50, 51]]))
    assert lm.fingerprint == before and traces_of(lm) == clean
    with torch.no_grad():
        assert torch.equal(lm.model(ids).logits, plain)


def test_a_steered_model_is_another_model(lm):
    concept = direction(lm)
    with steer(lm, concept, 1.0) as steered:
        assert steered is lm
        first = lm.fingerprint
        with pytest.raises(ConceptError, match="made with"):
            concept.check(lm)
        told = cached_generate(lm, ["Why?"], **SHORT)
    assert (
        cached_generate(lm, ["Why?"], **SHORT)[0].response
        == generate(lm, ["Why?"], max_new_tokens=12, progress=False)[0].response
    )  # not the steered one from the cache
    with steer(lm, concept, 2.0):
        assert lm.fingerprint != first
    with steer(lm, concept, 1.0, positions="all"):
        assert lm.fingerprint != first
    del told


def test_bad_steering(lm):
    clean = traces_of(lm)
    for strength in (float("nan"), float("inf")):
        with pytest.raises(SteeringError, match="finite"), steer(lm, direction(lm), strength):
            pass
    with pytest.raises(SteeringError, match="positions"), steer(lm, direction(lm), 1.0, positions="prompt"):
        pass
    with pytest.raises(ConceptError), steer(make_lm(seed=1), direction(lm), 1.0):
        pass
    assert traces_of(lm) == clean


def test_half_precision_and_a_model_in_training():
    lm = make_lm(dtype=torch.bfloat16)
    lm.model.train()
    batch = next(batches(lm.tokenize(CHATS)))
    with steer(lm, direction(lm, norm=5.0), 1.0):
        out = lm.model(batch.input_ids, attention_mask=batch.attention_mask).logits
    assert out.dtype == torch.bfloat16 and lm.model.training and out.requires_grad


# --- the steering check ---


def wordy(lm, word="the", norm=3.0):
    row = lm.model.get_output_embeddings().weight[lm.tokenizer.convert_tokens_to_ids(word)].detach().float()
    return tensor_concept(norm * row / row.norm(), layer=lm.n_layers, lm=lm, name=f"saying {word!r}")


def count_the(conversation):
    return conversation.response.count("the")


def counter(n=8, **options):
    return FunctionJudge(
        count_the, [f"What about {i}?" for i in range(n)], unit="times", max_new_tokens=12, **options
    )


def test_known_direction_raises_and_its_opposite_does_not(lm):
    check = steering_check(lm, wordy(lm), counter(), strengths=(-1, 1, 2), progress=False)
    assert check.raises_trait and check.slope > 0.3 and "raises the trait" in check.verdict
    assert (
        set(check.table["direction"]) == {"saying 'the'", "random 1", "random 2"}
        and check.table.groupby("direction")["strength"].apply(list).tolist() == [[-1, 0, 1, 2]] * 3
    )
    assert check.chance == 1 / 6
    zero = check.table[check.table["strength"] == 0]
    assert (zero["change"] == 0).all() and zero["mean"].nunique() == 1
    opposite = steering_check(
        lm,
        replace(wordy(lm), direction=-wordy(lm).direction),
        counter(),
        strengths=(-1, 1, 2),
        progress=False,
    )
    assert not opposite.raises_trait and opposite.slope < 0 and "does not raise" in opposite.verdict
    assert (
        check.plot().axes
        and "raises" in check._repr_html_()
        and len(check.evaluations["saying 'the'", 2.0].answers) == 8
    )


def test_contrast_judge_is_steered_without_generation(lm, monkeypatch):
    monkeypatch.setattr("concept_tda.concepts.judges.generate", lambda *a, **k: pytest.fail("generated"))
    items = load_conversations(
        [{"prompt": f"What about {i}?", "yes": f"the the the {i}", "no": f"no, it is {i}"} for i in range(6)]
    )
    judge, concept = ContrastJudge(items, trait="yes", neutral="no"), wordy(lm)
    check = steering_check(lm, concept, judge, strengths=(-1, 1), progress=False)
    with steer(lm, concept, 1.0):
        steered = judge.evaluate(lm, progress=False)
    plain = judge.evaluate(lm, progress=False)
    row = check.table[(check.table["direction"] == concept.name) & (check.table["strength"] == 1)].iloc[0]
    mean, error = (
        np.mean(steered.values - plain.values),
        np.std(steered.values - plain.values, ddof=1) / 6**0.5,
    )
    assert (
        abs(row["mean"] - steered.mean) < 1e-9
        and abs(row["change"] - mean) < 1e-9
        and abs(row["change_se"] - error) < 1e-9
    )
    assert check.slope > 0 and check.unit == "nats per token"


def test_other_judges_of_models(lm):
    check = steering_check(
        lm,
        wordy(lm),
        LossJudge([{"prompt": f"What about {i}?", "response": "the the the"} for i in range(4)]),
        strengths=(1,),
        progress=False,
    )
    assert check.slope > 0


def test_controls_are_as_long_as_the_concept(lm, monkeypatch):
    pushes, real = [], personas.steer
    monkeypatch.setattr(
        personas,
        "steer",
        lambda lm, concept, strength, **o: (
            pushes.append((concept.name, concept.norm, concept.layer, strength))
            or real(lm, concept, strength, **o)
        ),
    )
    steering_check(lm, wordy(lm), counter(4), strengths=(1,), random_controls=3, progress=False)
    assert [p[0] for p in pushes] == ["saying 'the'", "random 1", "random 2", "random 3"] and len(
        {p[1:] for p in pushes}
    ) == 1


def test_answers_are_rated_unsteered(lm):
    """Even where the judge uses the very model that is steered."""
    seen = []

    class Own(AnswerJudge):
        name = "own"

        def scores(self, conversations, progress):
            seen.append(bool(personas._steering_parameters(lm)))
            return [50.0] * len(conversations)

    check = steering_check(
        lm, wordy(lm), Own(["Why?", "Who?"], max_new_tokens=6), strengths=(1,), progress=False
    )
    assert seen and not any(seen) and not check.raises_trait and check.slope == pytest.approx(0)


def test_goes_on_from_finished_evaluations(lm, tmp_path, monkeypatch):
    whole = steering_check(
        lm, wordy(lm), counter(), strengths=(-1, 1), folder=tmp_path / "whole", progress=False
    )
    real, n = personas._judged, []

    def killed(*args):
        if len(n) == 3:
            raise KeyboardInterrupt
        n.append(1)
        return real(*args)

    monkeypatch.setattr(personas, "_judged", killed)
    with pytest.raises(KeyboardInterrupt):
        steering_check(lm, wordy(lm), counter(), strengths=(-1, 1), folder=tmp_path / "part", progress=False)
    monkeypatch.setattr(personas, "_judged", lambda *args: n.append(1) or real(*args))
    again = steering_check(
        lm, wordy(lm), counter(), strengths=(-1, 1), folder=tmp_path / "part", progress=False
    )
    assert len(n) == 7 and again.table.equals(whole.table)
    steering_check(
        lm,
        wordy(lm, norm=1.0),
        counter(),
        strengths=(-1, 1),
        random_controls=0,
        folder=tmp_path / "part",
        progress=False,
    )
    assert len(n) == 9  # another length is another push; strength 0 is the same


def test_check_that_finds_nothing_to_say(lm):
    def never(conversation):
        return None

    check = steering_check(
        lm,
        wordy(lm),
        FunctionJudge(never, ["Why?", "Who?"], max_new_tokens=6),
        strengths=(1,),
        progress=False,
    )
    assert (
        not check.raises_trait
        and check.table["n_missing"].eq(2).all()
        and check.plot().axes
        and "does not raise" in repr(check)
    )


def test_refusals_of_the_check(lm):
    clean = traces_of(lm)
    with pytest.raises(SteeringError, match="strength"):
        steering_check(lm, wordy(lm), counter(), strengths=(0,), progress=False)
    with pytest.raises(SteeringError, match="no questions"):
        steering_check(lm, wordy(lm), FunctionJudge(count_the), progress=False)
    with pytest.raises(ConceptError):
        steering_check(make_lm(seed=1), wordy(lm), counter(), progress=False)

    def broken(conversation):
        raise ValueError("no")

    with pytest.raises(JudgeError):
        steering_check(lm, wordy(lm), FunctionJudge(broken, ["Why?"]), progress=False)
    assert traces_of(lm) == clean
