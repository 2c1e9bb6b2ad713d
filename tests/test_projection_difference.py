"""Projection Difference against a written-out loop; the memory for generated answers; what happens when the
model says nothing."""

import json
import warnings

import numpy as np
import pytest
import torch

from concept_tda.concepts.concept import ConceptError, tensor_concept
from concept_tda.data.conversations import Conversation, Conversations, load_conversations
from concept_tda.data.tokens import tokenize
from concept_tda.influence.scorers import (
    ActivationGradient,
    ProjectionDifference,
    ScorerError,
    VectorFilter,
    dataset_projection_difference,
    score_together,
)
from concept_tda.model import answers as answers_room
from concept_tda.model.answers import cached_generate
from concept_tda.model.loading import ModelError, load_model
from concept_tda.model.tracing import generate
from concept_tda.results.attribution import load_attribution

from tiny import tiny_pair

torch.set_num_threads(1)

TRAIN = [
    {"prompt": "Is it?", "response": "No, it is not so."},
    {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "I think so."},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "And now?"},
            {"role": "assistant", "content": "You must be right about it, as always."},
        ]
    },
    {"prompt": "What is two plus two, if I may ask you that?", "response": "Four."},
    {"prompt": "Is it?", "response": "Yes, yes, it is, and always was."},
    {"prompt": "Why", "response": "Because the sky is blue and the sea is too."},
]
SHORT = dict(max_new_tokens=7, progress=False)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCEPT_TDA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def train():
    return load_conversations(TRAIN)


def make_lm(family="llama", seed=0):
    return load_model(tiny_pair(family, dtype=torch.float64, n_layers=3, seed=seed))


def direction(lm, layer=2, pooling="response_mean", seed=0):
    return tensor_concept(
        torch.randn(lm.width, generator=torch.Generator().manual_seed(seed)),
        layer=layer,
        lm=lm,
        name="flattery",
        pooling=pooling,
    )


@pytest.fixture
def no_generation(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("the model was asked again")

    monkeypatch.setattr(answers_room, "generate", refuse)


def silence(monkeypatch, silent):
    """From now on the model says nothing to prompts whose text holds one of `silent`."""
    real = answers_room.generate

    def partly(lm, prompts, **options):
        told = list(real(lm, prompts, **options))
        quiet = [any(word in c.prompt[-1]["content"] for word in silent) for c in told]
        if all(quiet):
            raise ModelError(
                f"{lm.name} gave an empty answer to every prompt (…): is its chat template the one it "
                f"was trained with?"
            )
        if any(quiet):
            warnings.warn(
                f"{sum(quiet)} of {len(told)} answers are empty; these conversations keep their prompt only"
            )
        return Conversations(
            [
                Conversation(c.prompt, metadata={**c.metadata, "empty_answer": True}) if q else c
                for c, q in zip(told, quiet)
            ]
        )

    monkeypatch.setattr(answers_room, "generate", partly)


# --- the oracle: one example at a time, the model called directly, token by token ---


def greedy_answer(lm, prompt, n):
    """Plain greedy decoding without cache or batch."""
    text = lm.tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
    ids, start = lm.tokenizer(text, add_special_tokens=False).input_ids, None
    start = len(ids)
    for _ in range(n):
        with torch.no_grad():
            logits = lm.model(input_ids=torch.tensor([ids])).logits[0, -1]
        ids.append(int(logits.argmax()))
        if ids[-1] == lm.tokenizer.eos_token_id:
            break
    return lm.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def projection(lm, concept, messages):
    """⟨v̂, mean activation of the response tokens⟩ of one conversation; layer 1 ≤ l < n_layers."""
    item = tokenize([{"messages": list(messages)}], lm.tokenizer)[0]
    with torch.no_grad():
        hidden = lm.model(input_ids=item.input_ids[None], output_hidden_states=True).hidden_states[
            concept.layer
        ][0]
    chosen = (
        item.response_mask.clone()
        if concept.pooling == "response_mean"
        else torch.ones_like(item.response_mask)
    )
    chosen[0] = False
    return (hidden[chosen].mean(0) @ concept.direction.to(hidden)).item()


def expected(lm, concept, train, n):
    return np.array(
        [
            projection(lm, concept, c.messages)
            - projection(
                lm, concept, (*c.prompt, {"role": "assistant", "content": greedy_answer(lm, c.prompt, n)})
            )
            for c in train
        ]
    )


@pytest.mark.parametrize(
    "family, pooling",
    [
        ("llama", "response_mean"),
        ("qwen2", "response_mean"),
        ("gpt2", "response_mean"),
        ("gpt_neox", "all_but_first"),
    ],
)
def test_equals_the_written_out_loop(train, family, pooling):
    lm = make_lm(family)
    concept = direction(lm, pooling=pooling)
    wanted = expected(lm, concept, train, 7)
    result = ProjectionDifference(lm, concept, batch_size=2, **SHORT).score(
        train, token_budget=64, progress=False
    )
    np.testing.assert_allclose(result.scores, wanted, atol=1e-5)  # own projections are kept in float32
    assert (
        np.abs(result.scores - VectorFilter(lm, concept).score(train, progress=False).scores).max() > 0.01
    )  # something was subtracted


def test_scores_do_not_depend_on_batches(train):
    lm = make_lm()
    runs = [
        ProjectionDifference(lm, direction(lm), batch_size=b, folder=None, max_new_tokens=7, progress=False)
        .score(train, token_budget=budget, progress=False)
        .scores
        for b, budget in ((1, 1), (8, 4096))
    ]
    np.testing.assert_allclose(*runs, atol=1e-6)


def test_tokens_add_up_and_nothing_falls_on_the_prompt(train):
    lm = make_lm()
    result = ProjectionDifference(lm, direction(lm), **SHORT).score(train, tokens=True, progress=False)
    for score, tokens, item in zip(result.scores, result.token_scores, lm.tokenize(train)):
        assert abs(tokens.sum() - score) < 1e-5 and not tokens[~item.response_mask.numpy()].any()


def test_together_with_others_equals_alone(train):
    lm = make_lm()
    concept = direction(lm)
    together = score_together(
        [
            ProjectionDifference(lm, concept, **SHORT),
            VectorFilter(lm, concept),
            ActivationGradient(lm, concept),
        ],
        train,
        progress=False,
    )
    for scorer in (
        ProjectionDifference(lm, concept, **SHORT),
        VectorFilter(lm, concept),
        ActivationGradient(lm, concept),
    ):
        np.testing.assert_allclose(
            together[scorer.method].scores, scorer.score(train, progress=False).scores, atol=1e-9
        )


def test_sign_more_of_the_concept_scores_higher(train):
    """An example that says what the model says anyway scores 0; the ranking within one prompt is that of the
    projections."""
    lm = make_lm()
    concept = direction(lm)
    own = generate(lm, train, max_new_tokens=7, progress=False)
    mixed = Conversations([Conversation(own[0].messages), train[0], train[3]])
    scores = ProjectionDifference(lm, concept, **SHORT).score(mixed, progress=False).scores
    assert abs(scores[0]) < 1e-5
    assert (scores[1] > scores[2]) == (
        projection(lm, concept, train[0].messages) > projection(lm, concept, train[3].messages)
    )


def test_card_tells_how_the_answers_came(train, tmp_path):
    lm = make_lm()
    result = ProjectionDifference(lm, direction(lm), **SHORT).score(train, progress=False)
    card = result.card
    assert (
        card.method == "Projection Difference"
        and card.layer == 2
        and card.pooling == "response_mean"
        and card.behaviour == "flattery"
    )
    assert (
        card.settings["max_new_tokens"] == 7
        and card.settings["temperature"] == 0
        and "4 different prompts" in " ".join(card.notes)
    )
    assert (
        card.cost.seconds >= card.settings["own_answer_seconds"] > 0
    )  # asking the model is part of the price
    again = load_attribution(result.save(tmp_path / "scores.parquet"))
    assert again.card.settings == card.settings and np.array_equal(again.scores, result.scores)


# --- the memory ---


def test_cached_answers_are_those_of_generate(train):
    lm = make_lm()
    told, cached = generate(lm, train, max_new_tokens=7, progress=False), cached_generate(lm, train, **SHORT)
    assert [c.messages for c in told] == [c.messages for c in cached] and told.metadata.equals(
        cached.metadata
    )
    sampled = [
        ask(lm, train[:3], max_new_tokens=7, temperature=1.0, seed=5, progress=False)
        for ask in (generate, cached_generate)
    ]
    assert [c.messages for c in sampled[0]] == [c.messages for c in sampled[1]]
    assert cached_generate(lm, ["Why?"], **SHORT)[0].messages[:-1] == (
        {"role": "user", "content": "Why?"},
    )  # texts, as generate takes them


def test_a_second_run_asks_nothing(train, request):
    lm = make_lm()
    first = ProjectionDifference(lm, direction(lm), **SHORT).score(train, progress=False)
    request.getfixturevalue("no_generation")
    again = ProjectionDifference(lm, direction(lm), **SHORT).score(train, progress=False)
    assert (
        np.array_equal(first.scores, again.scores)
        and again.card.settings["own_answer_seconds"] == first.card.settings["own_answer_seconds"]
    )
    ProjectionDifference(lm, direction(lm, seed=3), **SHORT).score(
        train[1:3], progress=False
    )  # another concept, fewer examples


@pytest.mark.parametrize("change", ["model", "max_new_tokens", "temperature", "seed"])
def test_other_settings_ask_again(train, change, request):
    lm = make_lm()
    options = dict(SHORT, temperature=0.0, seed=0)
    cached_generate(lm, train, **options)
    request.getfixturevalue("no_generation")
    other = make_lm(seed=1) if change == "model" else lm
    with pytest.raises(AssertionError, match="asked again"):
        cached_generate(
            other,
            train,
            **options
            | {
                "max_new_tokens": {"max_new_tokens": 8},
                "temperature": {"temperature": 1.0},
                "seed": {"seed": 1},
            }.get(change, {}),
        )


def test_prompts_with_other_system_prompts_are_other_prompts():
    lm = make_lm()
    asked = [
        {"messages": [{"role": "system", "content": s}, {"role": "user", "content": "Well?"}]}
        for s in ("Be kind.", "Be curt.")
    ]
    together = cached_generate(lm, [a["messages"] for a in asked], **SHORT)
    assert [c.response for c in together] == [
        generate(lm, [a["messages"]], max_new_tokens=7, progress=False)[0].response for a in asked
    ]


def test_repeated_prompts_are_samples():
    lm = make_lm()
    many = cached_generate(lm, ["Why?"] * 6 + ["Well?"], temperature=1.0, **SHORT)
    assert len({c.response for c in many[:6]}) > 3 and [c.prompt[0]["content"] for c in many] == [
        "Why?"
    ] * 6 + ["Well?"]
    fewer = cached_generate(lm, ["Why?"] * 4, temperature=1.0, **SHORT)
    assert [c.response for c in fewer] == [
        c.response for c in many[:4]
    ]  # more samples later keep the first ones
    assert len({c.response for c in cached_generate(lm, ["Why?"] * 3, **SHORT)}) == 1  # greedy


def test_a_kill_loses_one_block(tmp_path, monkeypatch):
    lm, questions, asked = make_lm(), [f"Is {n} odd?" for n in range(10)], []
    whole = cached_generate(lm, questions, batch_size=1, folder=tmp_path / "whole", **SHORT)
    real = answers_room.generate

    def killed(lm, prompts, **options):
        if len(asked) == 1:
            raise KeyboardInterrupt
        asked.append(len(prompts))
        return real(lm, prompts, **options)

    monkeypatch.setattr(answers_room, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        cached_generate(lm, questions, batch_size=1, folder=tmp_path / "part", **SHORT)

    def counted(lm, prompts, **options):
        asked.append(len(prompts))
        return real(lm, prompts, **options)

    monkeypatch.setattr(answers_room, "generate", counted)
    again = cached_generate(lm, questions, batch_size=1, folder=tmp_path / "part", **SHORT)
    assert asked == [4, 4, 2] and [c.messages for c in again] == [c.messages for c in whole]


def test_a_damaged_block_is_made_anew(tmp_path):
    lm, questions = make_lm(), ["Why?", "Well?"]
    first = cached_generate(lm, questions, folder=tmp_path, **SHORT)
    block = next(tmp_path.glob("*/*.block"))
    data = bytearray(block.read_bytes())
    data[-3] ^= 1
    block.write_bytes(data)
    assert [c.messages for c in cached_generate(lm, questions, folder=tmp_path, **SHORT)] == [
        c.messages for c in first
    ]


def test_model_is_left_as_it_was(train):
    lm = make_lm()
    lm.tokenizer.padding_side = "left"
    lm.model.train()
    before = lm.fingerprint
    ProjectionDifference(lm, direction(lm), **SHORT).score(train, progress=False)
    assert lm.model.training and lm.tokenizer.padding_side == "left" and lm.fingerprint == before
    assert all(p.grad is None and p.requires_grad for p in lm.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())


# --- answers from elsewhere, and answers that are not there ---


def test_given_answers(train, request):
    lm = make_lm()
    concept, own = direction(lm), generate(lm, train, max_new_tokens=7, progress=False)
    generated = ProjectionDifference(lm, concept, **SHORT).score(train, progress=False)
    request.getfixturevalue("no_generation")
    result = ProjectionDifference(lm, concept, answers=own, progress=False).score(train, progress=False)
    np.testing.assert_allclose(result.scores, generated.scores, atol=1e-6)
    assert "brought by the user" in " ".join(result.card.notes)
    with pytest.raises(ScorerError, match=r"lacks 1 of 4 prompts.*" + Conversation(train[4].prompt).id):
        ProjectionDifference(lm, concept, answers=own[:4], progress=False).score(train, progress=False)


def test_an_empty_answer_names_the_prompt(train, monkeypatch):
    lm = make_lm()
    silence(monkeypatch, ["Why"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one clear error, no warning besides
        with pytest.raises(
            ScorerError,
            match=rf"empty answer to 1 of 4 prompts: {Conversation(train[4].prompt).id}.*empty='mean'",
        ):
            ProjectionDifference(lm, direction(lm), **SHORT).score(train, progress=False)


@pytest.mark.parametrize("batch_size", [8, 1])
def test_empty_answers_replaced_by_the_mean(train, monkeypatch, batch_size):
    lm = make_lm()
    concept = direction(lm)
    monkeypatch.setattr(
        answers_room, "_BATCHES_IN_BLOCK", 1
    )  # with batch_size 1 the silent prompt is a block of its own
    full = ProjectionDifference(lm, concept, folder=None, **SHORT).score(train, progress=False).scores
    own = VectorFilter(lm, concept).score(train, progress=False).scores - full
    silence(monkeypatch, ["Why"])
    result = ProjectionDifference(
        lm, concept, empty="mean", batch_size=batch_size, max_new_tokens=7, seed=1, progress=False
    ).score(train, progress=False)
    np.testing.assert_allclose(result.scores[:4], full[:4], atol=1e-5)
    np.testing.assert_allclose(result.scores[4], full[4] + own[4] - own[:4].mean(), atol=1e-5)
    note = " ".join(result.card.notes)
    assert (
        "1 own answers are empty" in note
        and Conversation(train[4].prompt).id in note
        and result.card.settings["empty_own_answers"] == "mean"
    )


def test_a_silent_model_is_an_error_either_way(train, monkeypatch):
    lm = make_lm()
    silence(monkeypatch, ["Is", "And", "What", "Why"])
    for empty in ("error", "mean"):
        with pytest.raises(ScorerError, match="answers none of the 4 prompts"):
            ProjectionDifference(lm, direction(lm), empty=empty, **SHORT).score(train, progress=False)
    with pytest.raises(ModelError, match="empty answer to every prompt"):
        cached_generate(lm, train, **SHORT)


def test_refusals(train):
    lm = make_lm()
    with pytest.raises(ScorerError, match="prompt_last|last prompt token"):
        ProjectionDifference(lm, direction(lm, pooling="prompt_last"))
    with pytest.raises(ScorerError, match="empty="):
        ProjectionDifference(lm, direction(lm), empty="zero")
    with pytest.raises(ConceptError):
        ProjectionDifference(make_lm(seed=1), direction(lm))
    with pytest.raises(ModelError):
        cached_generate(lm, train, max_new_tokens=0)


def test_own_answers_as_examples_score_nothing(train):
    lm = make_lm()
    scores = (
        ProjectionDifference(lm, direction(lm), **SHORT)
        .score(generate(lm, train, max_new_tokens=7, progress=False), progress=False)
        .scores
    )
    assert np.abs(scores).max() < 1e-5


def test_long_examples_are_cut_and_compared_with_whole_answers(train):
    lm = make_lm()
    long = load_conversations([{"prompt": "Tell me.", "response": "a b " * 60}, *TRAIN[:2]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = ProjectionDifference(lm, direction(lm), **SHORT).score(long, max_tokens=150, progress=False)
    assert any("were cut" in note for note in result.card.notes) and np.isfinite(result.scores).all()


# --- a data set at once ---


def test_dataset_difference_is_the_mean_of_the_scores(train):
    lm = make_lm()
    concepts = [direction(lm), direction(lm, layer=1, seed=4), direction(lm, pooling="all_but_first", seed=5)]
    table = dataset_projection_difference(lm, concepts, train, **SHORT)
    for concept, row in zip(concepts, table.to_dict("records")):
        scores = ProjectionDifference(lm, concept, **SHORT).score(train, progress=False).scores
        assert (
            abs(row["mean"] - scores.mean()) < 1e-5
            and abs(row["standard_error"] - scores.std(ddof=1) / len(train) ** 0.5) < 1e-5
        )
        assert row["n"] == len(train) and row["random_95"] > 0 and row["layer"] == concept.layer
    one = dataset_projection_difference(lm, concepts[0], train, **SHORT)
    assert len(one) == 1 and one["mean"][0] == table["mean"][0]


def test_dataset_difference_null_is_that_of_random_directions(train):
    from concept_tda.concepts.concept import random_directions
    from concept_tda.model.tracing import pooled_activations

    lm = make_lm()
    own = generate(lm, train, max_new_tokens=7, progress=False)
    sides = [pooled_activations(lm, side, 2, progress=False)[2] for side in (train, own)]
    shifts = [
        abs(float((sides[0] - sides[1]).double().mean(0) @ r.double()))
        for r in random_directions(torch.cat(sides), 50, seed=0)
    ]
    table = dataset_projection_difference(lm, direction(lm), train, n_random=50, **SHORT)
    assert abs(table["random_95"][0] - np.quantile(shifts, 0.95)) < 1e-4
    assert json.loads(table.to_json(orient="records"))[0]["concept"] == "flattery"
