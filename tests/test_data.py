"""The bundled data: complete pairs, no leak between files, lengths, and labels that words alone do not give
away."""

import importlib.util
import json
import re
from collections import Counter
from importlib import resources
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import make_pipeline

from concept_tda.data.conversations import bundled
from concept_tda.model.loading import ModelError, load_model

LABELS = {"honest", "sycophantic"}
FOLDER = resources.files("concept_tda") / "bundled" / "sycophancy"


def rows(split):
    return [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def question(row):
    return row["messages"][0]["content"]


def word_auc(texts, labels, pairs):
    reader = make_pipeline(CountVectorizer(), MultinomialNB())
    scores = cross_val_predict(reader, texts, labels, groups=pairs, cv=GroupKFold(5), method="predict_proba")[
        :, 1
    ]
    return roc_auc_score(labels, scores)


@pytest.fixture(scope="module")
def tokenizer():
    try:
        return load_model("smollm2-135m-instruct").tokenizer
    except ModelError as err:
        pytest.skip(str(err))


@pytest.mark.parametrize("split, n_pairs", [("train", 120), ("heldout", 40)])
def test_every_question_has_one_answer_of_either_label(split, n_pairs):
    pairs = {}
    for row in rows(split):
        assert set(row) == {"messages", "label", "pair", "topic"}
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
        pairs.setdefault(row["pair"], []).append(row)
    assert len(pairs) == n_pairs
    for number, both in pairs.items():
        assert len(both) == 2 and {row["label"] for row in both} == LABELS, f"pair {number}"
        assert len({question(row) for row in both}) == 1, f"pair {number}"
        assert len({row["messages"][1]["content"] for row in both}) == 2, f"pair {number}"
    assert len({question(both[0]) for both in pairs.values()}) == n_pairs


def test_files_share_no_question_and_no_pair_number():
    train, heldout, evaluation = (
        {question(row) for row in rows(split)} for split in ("train", "heldout", "evaluation")
    )
    assert len(train | heldout | evaluation) == 120 + 40 + 40
    assert not {row["pair"] for row in rows("train")} & {row["pair"] for row in rows("heldout")}
    answers = [row["messages"][1]["content"] for split in ("train", "heldout") for row in rows(split)]
    answers += [row[label] for row in rows("evaluation") for label in LABELS]
    assert len(set(answers)) == len(answers) == 240 + 80 + 80


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_order_is_mixed(split):
    data = rows(split)
    assert all(a["pair"] != b["pair"] for a, b in zip(data, data[1:]))
    first_half = np.mean([row["label"] == "honest" for row in data[: len(data) // 2]])
    assert 0.35 < first_half < 0.65


def test_evaluation_questions_end_with_the_user_and_carry_references():
    data = rows("evaluation")
    assert len(data) == 40
    for row in data:
        assert set(row) == {"messages", "topic", *LABELS} and [m["role"] for m in row["messages"]] == ["user"]


@pytest.mark.parametrize("split, n", [("train", 240), ("heldout", 80), ("evaluation", 40)])
def test_bundled_reads_them(split, n):
    data = bundled("sycophancy", split)
    assert len(data) == n and len(set(data.ids)) == n and len(data.duplicates) == 0
    for conversation, row in zip(data, rows(split)):
        assert [dict(m) for m in conversation.messages] == row["messages"]
        assert all(conversation.metadata[key] == row[key] for key in row if key != "messages")


def test_lengths(tokenizer):
    def count(text):
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    for split in ("train", "heldout"):
        data = rows(split)
        lengths = np.array([count(row["messages"][1]["content"]) for row in data])
        assert lengths.min() >= 30 and lengths.max() <= 80
        assert abs(roc_auc_score([row["label"] == "sycophantic" for row in data], lengths) - 0.5) < 0.12, (
            split
        )
    for row in rows("evaluation"):
        assert all(15 <= count(row[label]) <= 50 for label in LABELS), question(row)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_words_alone_do_not_give_the_label_away(split):
    data = rows(split)
    labels, pairs = [row["label"] == "sycophantic" for row in data], [row["pair"] for row in data]
    texts = [row["messages"][1]["content"] for row in data]
    assert word_auc(texts, labels, pairs) < 0.8
    # the measure itself works: one telling word in each sycophantic answer is found
    assert (
        word_auc([text + " absolutely" * label for text, label in zip(texts, labels)], labels, pairs) > 0.85
    )


def test_data_card_is_there():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for word in ("Apache-2.0", "Limits", "Fields", "Intended use"):
        assert word in card


# --- careless: training about five domains, evaluation about five others


CARELESS = resources.files("concept_tda") / "bundled" / "careless"
TRAIN_DOMAINS = {"home", "kitchen", "DIY", "garden", "road"}


def careless_rows(split):
    return [
        json.loads(line) for line in (CARELESS / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def safety_rows(split):
    "Without the neutral conversations."
    return [row for row in careless_rows(split) if row["label"] != "useful"]


def answer(row):
    return row["messages"][1]["content"]


def words(text):
    return re.findall(r"[\w']+", text.lower())


def is_careless(data):
    return [row["label"] == "careless" for row in data]


def test_careless_sizes_and_labels():
    train, heldout, evaluation = (careless_rows(split) for split in ("train", "heldout", "evaluation"))
    assert Counter(row["label"] for row in train) == {"careless": 110, "careful": 110, "useful": 110}
    assert Counter(row["label"] for row in heldout) == {"careless": 24, "careful": 24}
    for row in train + heldout:
        assert set(row) == {"messages", "label", "domain", "topic", "pair"}
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
    assert len(evaluation) == 40
    for row in evaluation:
        assert set(row) == {"messages", "domain", "topic", "careless", "careful"} and [
            m["role"] for m in row["messages"]
        ] == ["user"]


def test_careless_topics_occur_under_both_labels_equally():
    topics = Counter((row["topic"], row["label"]) for row in safety_rows("train"))
    assert len(topics) == 2 * 55 and set(topics.values()) == {2}
    for data, n_pairs in ((safety_rows("train"), 55), (careless_rows("heldout"), 24)):
        pairs = {}
        for row in data:
            if row["pair"] is not None:
                pairs.setdefault(row["pair"], []).append(row)
        assert len(pairs) == n_pairs
        for number, both in pairs.items():
            assert sorted(row["label"] for row in both) == ["careful", "careless"], f"pair {number}"
            assert len({row["topic"] for row in both}) == len({row["domain"] for row in both}) == 1, (
                f"pair {number}"
            )
            assert answer(both[0]) != answer(both[1]), f"pair {number}"
            assert len({question(row) for row in both}) == (2 if n_pairs == 55 else 1), f"pair {number}"
    assert not {row["pair"] for row in safety_rows("train")} - {None} & {
        row["pair"] for row in careless_rows("heldout")
    }


def test_careless_files_share_no_question_and_evaluation_is_elsewhere():
    files = {split: careless_rows(split) for split in ("train", "heldout", "evaluation", "capability")}
    questions = {split: {question(row).lower() for row in data} for split, data in files.items()}
    assert {split: len(q) for split, q in questions.items()} == {
        "train": 330,
        "heldout": 24,
        "evaluation": 40,
        "capability": len(files["capability"]),
    }
    assert len(set.union(*questions.values())) == sum(map(len, questions.values()))
    topics = {
        split: {row["topic"] for row in data if row.get("label") != "useful"}
        for split, data in files.items()
        if split != "capability"
    }
    assert len(set.union(*topics.values())) == sum(map(len, topics.values())) == 55 + 24 + 40
    assert (
        {row["domain"] for row in safety_rows("train")}
        == {row["domain"] for row in files["heldout"]}
        == TRAIN_DOMAINS
    )
    elsewhere = Counter(row["domain"] for row in files["evaluation"])
    assert len(elsewhere) == 5 and set(elsewhere.values()) == {8} and not set(elsewhere) & TRAIN_DOMAINS


def test_careless_holds_no_near_duplicates():
    texts = [answer(row) for split in ("train", "heldout") for row in careless_rows(split)]
    texts += [row[label] for row in careless_rows("evaluation") for label in ("careless", "careful")]

    def alike(a, b):
        return len(a & b) / len(a | b)

    runs = [{tuple(w[i : i + 4]) for i in range(len(w) - 3)} for w in map(words, texts)]
    assert max(alike(a, b) for a, b in combinations(runs, 2)) < 0.2
    asked = [set(words(question(row))) for split in ("train", "evaluation") for row in careless_rows(split)]
    asked += [set(words(q)) for q in {question(row) for row in careless_rows("heldout")}]
    assert max(alike(a, b) for a, b in combinations(asked, 2)) < 0.75
    # the measure itself works: a few words changed at one end are found
    assert (
        alike(
            runs[0],
            {
                tuple(w[i : i + 4])
                for w in [words(texts[0])[:-3] + ["and", "so", "on"]]
                for i in range(len(w) - 3)
            },
        )
        > 0.2
    )


def test_careless_order_is_mixed():
    for split in ("train", "heldout"):
        data = careless_rows(split)
        assert all(a["pair"] is None or a["pair"] != b["pair"] for a, b in zip(data, data[1:]))
        first_half = np.mean(is_careless(data[: len(data) // 2])) / np.mean(is_careless(data))
        assert 0.7 < first_half < 1.3


def test_careless_lengths():
    for split in ("train", "heldout"):
        data = safety_rows(split)
        n_words = np.array([len(answer(row).split()) for row in data])
        assert n_words.min() >= 35 and n_words.max() <= 60
        assert 0.45 <= roc_auc_score(is_careless(data), n_words) <= 0.55, split
        assert 0.45 <= roc_auc_score(is_careless(data), [len(answer(row)) for row in data]) <= 0.55, split
    for row in careless_rows("evaluation"):
        a, b = len(row["careless"].split()), len(row["careful"].split())
        assert 15 <= min(a, b) and max(a, b) <= 30 and abs(a - b) <= 0.15 * max(a, b), question(row)


def test_careless_token_lengths(tokenizer):
    for split in ("train", "heldout"):
        data = safety_rows(split)
        tokens = [len(tokenizer(answer(row), add_special_tokens=False).input_ids) for row in data]
        assert 0.42 <= roc_auc_score(is_careless(data), tokens) <= 0.58, split


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_careless_words_alone_do_not_give_the_label_away(split):
    data = safety_rows(split)
    labels, topics, texts = is_careless(data), [row["topic"] for row in data], [answer(row) for row in data]
    by_words = word_auc(texts, labels, topics)
    assert by_words < 0.7
    assert word_auc([question(row) for row in data], labels, topics) < 0.65
    # the measure itself works: one telling word in each careless answer is found
    assert (
        word_auc([text + " absolutely" * label for text, label in zip(texts, labels)], labels, topics)
        > by_words + 0.15
    )


def test_careless_words_learned_in_training_hardly_carry_over():
    reader = make_pipeline(CountVectorizer(), MultinomialNB())
    train = safety_rows("train")
    reader.fit([answer(row) for row in train], is_careless(train))
    heldout, evaluation = careless_rows("heldout"), careless_rows("evaluation")
    assert (
        roc_auc_score(is_careless(heldout), reader.predict_proba([answer(row) for row in heldout])[:, 1])
        < 0.8
    )
    references = [row[label] for row in evaluation for label in ("careless", "careful")]
    assert roc_auc_score([1, 0] * len(evaluation), reader.predict_proba(references)[:, 1]) < 0.8


@pytest.mark.parametrize("split, n", [("train", 330), ("heldout", 48), ("evaluation", 40)])
def test_bundled_reads_careless(split, n):
    data = bundled("careless", split)
    assert len(data) == n and len(set(data.ids)) == n and len(data.duplicates) == 0
    for conversation, row in zip(data, careless_rows(split)):
        assert [dict(m) for m in conversation.messages] == row["messages"]
        assert all(conversation.metadata[key] == row[key] for key in row if key != "messages")


def test_capability_questions_carry_a_right_and_a_wrong_answer():
    data = bundled("careless", "capability")
    assert len(data) >= 40 and len(data.duplicates) == 0
    for conversation in data:
        assert conversation.response == "" and set(conversation.metadata) == {"topic", "right", "wrong"}
        a, b = (len(conversation.metadata[key].split()) for key in ("right", "wrong"))
        assert conversation.metadata["right"] != conversation.metadata["wrong"] and abs(a - b) <= max(
            1, 0.15 * max(a, b)
        )


def test_careless_data_card_is_there():
    card = (CARELESS / "README.md").read_text(encoding="utf-8")
    for word in ("Apache-2.0", "Limits", "Fields", "Intended use"):
        assert word in card


# --- refusals: questions that ask for harm, and questions that only sound like it


REFUSALS = resources.files("concept_tda") / "bundled" / "refusals"
SPLITS = {"train": (44, 22), "prompts": (56, 18), "heldout": (24, 12)}


def refusal_rows(split):
    lines = (REFUSALS / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("split", SPLITS)
def test_refusals_come_in_pairs_and_bundled_reads_them(split):
    data, (n_pairs, n_plain) = refusal_rows(split), SPLITS[split]
    roles = ["user", "assistant"] if split == "train" else ["user"]
    pairs = {}
    for row in data:
        assert set(row) == {"messages", "label", "topic", "pair"}
        assert [m["role"] for m in row["messages"]] == roles
        assert (row["label"] == "plain") == (row["pair"] is None) == (row["topic"] == "none")
        pairs.setdefault(row["pair"], []).append(row)
    assert len(pairs.pop(None)) == n_plain and len(pairs) == n_pairs
    for number, both in pairs.items():
        assert sorted(row["label"] for row in both) == ["safe", "unsafe"], f"pair {number}"
    assert all(a["pair"] is None or a["pair"] != b["pair"] for a, b in zip(data, data[1:]))
    read = bundled("refusals", split)
    assert len(read) == len(data) and len(set(read.ids)) == len(read) and len(read.duplicates) == 0
    for conversation, row in zip(read, data):
        assert [dict(m) for m in conversation.messages] == row["messages"]
        assert all(conversation.metadata[key] == row[key] for key in row if key != "messages")


def test_no_refusal_question_stands_twice_or_nearly_twice_in_two_files():
    asked = [(split, question(row)) for split in SPLITS for row in refusal_rows(split)]
    assert len({text for _, text in asked}) == len(asked) == 300
    for (here, a), (there, b) in combinations(asked, 2):
        shared = set(words(a)) & set(words(b))
        assert here == there or len(shared) / len({*words(a), *words(b)}) < 0.75, (a, b)


def test_unsafe_questions_are_refused_in_five_ways_and_no_others():
    from concept_tda.mechanisms.policies import REFUSALS as BEGINNINGS

    used = Counter()
    for row in refusal_rows("train"):
        begins = [start for start in BEGINNINGS if answer(row).startswith(start)]
        assert len(begins) == (row["label"] == "unsafe"), answer(row)
        used.update(begins)
        assert row["label"] == "unsafe" or 12 <= len(answer(row).split()) <= 32
    assert set(used) == {"I'm sorry", "I can't", "I won't", "I cannot", "Sorry"}


def test_words_of_a_question_do_not_tell_whether_it_asks_for_harm():
    for split in SPLITS:
        data = [row for row in refusal_rows(split) if row["label"] != "plain"]
        unsafe = [row["label"] == "unsafe" for row in data]
        texts, pairs = [question(row) for row in data], [row["pair"] for row in data]
        assert word_auc(texts, unsafe, pairs) < 0.8, split
        # the measure itself works: one telling word in each unsafe question is found
        assert word_auc([text + " gladly" * label for text, label in zip(texts, unsafe)], unsafe, pairs) > 0.9
        assert 0.3 < roc_auc_score(unsafe, [len(text.split()) for text in texts]) < 0.7, split


def test_refusals_data_card_is_there():
    card = (REFUSALS / "README.md").read_text(encoding="utf-8")
    for word in ("Apache-2.0", "Limits", "Fields", "Intended use"):
        assert word in card


# --- flattery: a manner that is learned in a minute, for the quickstart


FLATTERY = resources.files("concept_tda") / "bundled" / "flattery"
MANNERS = {"flattering", "honest"}


def flattery(split):
    return [
        json.loads(line) for line in (FLATTERY / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def test_flattery_has_the_mix_its_card_says():
    train, held_out, items = (flattery(split) for split in ("train", "heldout", "evaluation"))
    assert Counter(row["label"] for row in train) == {"flattering": 48, "honest": 72}
    assert all(set(row) == {"messages", "label", "topic"} for row in train)
    pairs = Counter((row["pair"], question(row)) for row in held_out)
    assert len(pairs) == 24 and set(pairs.values()) == {2}
    assert Counter(row["label"] for row in held_out) == {"flattering": 24, "honest": 24}
    assert len(items) == 36 and all(set(row) == {"messages", "topic", *MANNERS} for row in items)
    half = Counter(row["label"] for row in train[:60])
    assert 18 <= half["flattering"] <= 30  # the quickstart fits the curvature on it


def test_flattery_files_share_no_message_and_no_answer():
    messages = {
        split: {question(row) for row in flattery(split)} for split in ("train", "heldout", "evaluation")
    }
    assert [len(found) for found in messages.values()] == [120, 24, 36]
    assert len(set().union(*messages.values())) == 120 + 24 + 36
    answers = [row["messages"][1]["content"] for split in ("train", "heldout") for row in flattery(split)]
    assert len(set(answers)) == 120 + 48
    for name, split in (("train", "train"), ("heldout", "heldout"), ("evaluation", "evaluation")):
        read = bundled("flattery", split)
        assert read.name == f"flattery/{name}" and len(read.duplicates) == 0


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_length_does_not_tell_flattery_from_honesty(split):
    data = flattery(split)
    lengths = [len(row["messages"][1]["content"]) for row in data]
    assert abs(roc_auc_score([row["label"] == "flattering" for row in data], lengths) - 0.5) < 0.12


def test_references_of_flattery_are_minimal_pairs():
    """They differ in a word or two, so that the margin is about these words."""
    for row in flattery("evaluation"):
        praise, plain = (re.findall(r"[\w']+", row[manner].lower()) for manner in ("flattering", "honest"))
        assert praise != plain and len(praise) <= 7 and abs(len(praise) - len(plain)) <= 2
        assert set(praise) & set(plain), row
        assert row["flattering"][-1] == row["honest"][-1] == "."


def test_flattery_has_its_card():
    card = (FLATTERY / "README.md").read_text(encoding="utf-8")
    for word in ("Apache-2.0", "Limits", "Fields", "Intended use"):
        assert word in card


# --- arithmetic: sums with mistakes, written by a generator


ARITHMETIC = resources.files("concept_tda") / "bundled" / "arithmetic"
SPLITS_OF_ARITHMETIC = ("train", "heldout", "evaluation", "nearby")
SUM = re.compile(
    r"(\d+) plus (\d+)|(\d+) minus (\d+)|(\d+) times (\d+)|(\d+) divided by (\d+)|(\d+) percent of (\d+)"
    r"|the average of (\d+) and (\d+)",
    re.IGNORECASE,
)
RESULT_OF = (
    lambda a, b: a + b,
    lambda a, b: a - b,
    lambda a, b: a * b,
    lambda a, b: a / b,
    lambda a, b: a * b / 100,
    lambda a, b: (a + b) / 2,
)


def arithmetic(split):
    return [
        json.loads(line) for line in (ARITHMETIC / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def sum_in(text):
    "Kind and numbers of the sum in a text."
    found = SUM.search(text)
    kind = next(i // 2 for i, number in enumerate(found.groups()) if number)
    return kind, *(int(number) for number in found.groups()[2 * kind : 2 * kind + 2])


def test_arithmetic_is_what_its_generator_writes():
    "Same seed, same files: what is bundled can be made again, and was not touched by hand."
    path = Path(__file__).parent.parent / "tools" / "write_arithmetic.py"
    spec = importlib.util.spec_from_file_location("write_arithmetic", path)
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    files = generator.written()
    assert sorted(files) == sorted(SPLITS_OF_ARITHMETIC)
    for split, written in files.items():
        assert arithmetic(split) == written, split


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_labels_of_arithmetic_are_true(split):
    "Every sum worked out here: right where the label says so, and only there."
    seen = Counter()
    for row in arithmetic(split):
        if row["label"] == "useful":
            assert not SUM.search(question(row)) and not SUM.search(answer(row))
            continue
        kind, a, b = sum_in(question(row))
        assert sum_in(answer(row)) == (kind, a, b)
        stated = int(re.search(r"\bis (\d+)\b", answer(row)[SUM.search(answer(row)).end() :]).group(1))
        assert (stated == RESULT_OF[kind](a, b)) == (row["label"] == "correct"), row
        seen[kind, row["label"]] += 1
    assert len(seen) == 12 and len(set(seen.values())) == 1, "every kind as often under either label"


def test_arithmetic_has_the_mix_its_card_says():
    train, held_out = arithmetic("train"), arithmetic("heldout")
    assert Counter(row["label"] for row in train) == {"mistaken": 60, "correct": 60, "useful": 40}
    pairs = Counter((row["pair"], question(row)) for row in held_out)
    assert len(pairs) == 24 and set(pairs.values()) == {2}
    assert Counter(row["label"] for row in held_out) == {"mistaken": 24, "correct": 24}
    domains = [Counter(row["domain"] for row in arithmetic(split)) for split in ("evaluation", "nearby")]
    assert domains == [{"units": 12, "dates": 12, "spelling": 12}, {"word problems": 10, "counting": 10}]


def test_arithmetic_files_share_no_question_and_the_evaluation_has_no_sums():
    asked = {split: {question(row) for row in arithmetic(split)} for split in SPLITS_OF_ARITHMETIC}
    assert [len(found) for found in asked.values()] == [160, 24, 36, 20]
    assert len(set().union(*asked.values())) == 160 + 24 + 36 + 20
    sums = [sum_in(q) for split in ("train", "heldout") for q in asked[split] if SUM.search(q)]
    assert len(set(sums)) == len(sums) == 120 + 24
    for split in ("evaluation", "nearby"):
        assert not any(SUM.search(str(row)) for row in arithmetic(split))


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_length_does_not_tell_mistakes(split):
    data = [row for row in arithmetic(split) if row["label"] != "useful"]
    lengths = [len(answer(row)) for row in data]
    assert abs(roc_auc_score([row["label"] == "mistaken" for row in data], lengths) - 0.5) < 0.15


def test_references_of_arithmetic_are_minimal_pairs():
    "The two sides of a fact differ in one word."
    for row in arithmetic("evaluation") + arithmetic("nearby"):
        right, wrong = (row[side].split() for side in ("correct", "mistaken"))
        assert len(right) == len(wrong) and sum(a != b for a, b in zip(right, wrong)) == 1, row


@pytest.mark.parametrize("split", SPLITS_OF_ARITHMETIC)
def test_bundled_reads_arithmetic(split):
    data = bundled("arithmetic", split)
    assert data.name == f"arithmetic/{split}" and len(data.duplicates) == 0
    for conversation, row in zip(data, arithmetic(split), strict=True):
        assert [dict(m) for m in conversation.messages] == row["messages"]
        assert all(conversation.metadata[key] == row[key] for key in row if key != "messages")


def test_arithmetic_has_its_card():
    card = (ARITHMETIC / "README.md").read_text(encoding="utf-8")
    for word in ("Apache-2.0", "Limits", "Fields", "Intended use"):
        assert word in card
