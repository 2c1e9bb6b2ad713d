"""The bundled data: complete pairs, no leak between files, lengths, and labels that words alone do not give away."""

import json
from importlib import resources

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import make_pipeline

from concept_tda.conversations import bundled
from concept_tda.models import ModelError, load_model

LABELS = {"honest", "sycophantic"}
FOLDER = resources.files("concept_tda") / "data" / "sycophancy"


def rows(split):
    return [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def question(row):
    return row["messages"][0]["content"]


def word_auc(texts, labels, pairs):
    reader = make_pipeline(CountVectorizer(), MultinomialNB())
    scores = cross_val_predict(reader, texts, labels, groups=pairs, cv=GroupKFold(5), method="predict_proba")[:, 1]
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
    train, heldout, evaluation = ({question(row) for row in rows(split)} for split in ("train", "heldout", "evaluation"))
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
        assert abs(roc_auc_score([row["label"] == "sycophantic" for row in data], lengths) - 0.5) < 0.12, split
    for row in rows("evaluation"):
        assert all(15 <= count(row[label]) <= 50 for label in LABELS), question(row)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_words_alone_do_not_give_the_label_away(split):
    data = rows(split)
    labels, pairs = [row["label"] == "sycophantic" for row in data], [row["pair"] for row in data]
    texts = [row["messages"][1]["content"] for row in data]
    assert word_auc(texts, labels, pairs) < 0.8
    # the measure itself works: one telling word in each sycophantic answer is found
    assert word_auc([text + " absolutely" * label for text, label in zip(texts, labels)], labels, pairs) > 0.85


def test_data_card_is_there():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for word in ("Apache-2.0", "Limits", "Fields", "Intended use"):
        assert word in card
