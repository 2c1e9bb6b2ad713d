"""Layouts out: what is written reads as the same chats, by this library and as the trainers read it, or is
refused with the place of the chat."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from concept_tda.data.conversations import Conversation, Conversations, load_conversations
from concept_tda.data.documents import load_documents
from concept_tda.data.layouts import WRITTEN
from concept_tda.data.messages import ConversationError
from concept_tda.data.preferences import load_preferences

HI = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"})
MANY = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)

words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
texts = words | st.sampled_from(["null", "[]", '["a"]', "{", "a\n\nb", "None", " x ", "[1", "user"])
answers = texts.filter(str.strip)
plain_words = st.text("abc é漢\n\"'{}[]", min_size=1, max_size=12).map("w{}".format)
odd_columns = st.sampled_from(
    ["system", "input", "context", "history", "output", "response", "completion", "prompt", "messages"]
    + ["conversations", "instruction", "chosen", "rejected", "text", "source", "mapping", "message_fields"]
)
values = st.none() | st.booleans() | st.integers(0, 3) | st.floats(allow_nan=False) | texts


@st.composite
def chats(draw, said=texts, answered=answers, flags=True, ends_with_answer=None, system=True):
    messages = []
    if system and draw(st.booleans()):
        messages.append({"role": "system", "content": draw(said)})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(said)})
        extra = {}
        if flags and draw(st.integers(0, 3)) == 0:
            extra = draw(st.sampled_from([{"train": False}, {"reasoning_content": "hm"}, {"name": "Ada"}]))
        messages.append({"role": "assistant", "content": draw(answered), **extra})
    if not (draw(st.booleans()) if ends_with_answer is None else ends_with_answer):
        messages.pop()
    return tuple(messages)


def told(text):
    """Role and content, as an Alpaca, ShareGPT or messages reader of a trainer takes them from a record."""
    return [(one.get("role") or ROLE[one["from"]], one.get("content") or one["value"]) for one in text]


ROLE = {"human": "user", "gpt": "assistant", "system": "system"}


def as_trainers_read(record, layout):
    """(prompt, {answer's column: messages}), after the documentation of TRL (conversational types), Axolotl
    (chat_template) and LLaMA-Factory (alpaca, sharegpt); a second reader, which shares nothing with ours."""
    pair = {"chosen", "rejected"} & record.keys() if "chosen" in record else set()
    if layout == "messages":
        return told(record["messages"]), {name: told([record[name]]) for name in pair}
    if layout == "sharegpt":
        return told(record["conversations"]), {name: told([record[name]]) for name in pair}
    if layout == "prompt-completion":
        names = pair or ({"completion"} & record.keys())
        return told(record["prompt"]), {name: told(record[name]) for name in names}
    question = "\n".join(filter(None, [record["instruction"], record["input"]]))
    system = [("system", record["system"])] if record.get("system") else []
    turns = [(("user", q), ("assistant", a)) for q, a in record.get("history") or []]
    prompt = system + [one for turn in turns for one in turn] + [("user", question)]
    return prompt, {name: [("assistant", record[name])] for name in (pair or {"output"})}


def relaid(chat, metadata, layout, path):
    """The record that is written and the chat that is read from it."""
    written = Conversations([Conversation(chat, metadata=metadata)], "x").as_layout(layout)
    written.to_json(path, overwrite=True)
    [record] = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    return record, load_conversations(path)[0]


@pytest.mark.parametrize("layout", WRITTEN)
def test_plain_chats_fit_and_read_the_same_here_and_elsewhere(layout, tmp_path):
    """No refusal is allowed here, so the test can't pass by refusing."""
    single = layout == "prompt-completion"  # earlier answers that count are another trainer's business

    @MANY
    @given(
        chats(plain_words, plain_words, flags=False, ends_with_answer=True),
        st.dictionaries(st.sampled_from(["source", "topic", "n"]), values, max_size=3),
    )
    def check(chat, metadata):
        if single:
            chat = tuple(
                {**one, "train": False} if one["role"] == "assistant" and place < len(chat) - 1 else one
                for place, one in enumerate(chat)
            )
        record, read = relaid(chat, metadata, layout, tmp_path / "a.jsonl")
        assert read.messages == chat and read.metadata == json.loads(json.dumps(metadata))
        prompt, said = as_trainers_read(record, layout)
        assert [*prompt, *(one for answer in said.values() for one in answer)] == [
            (one["role"], one["content"]) for one in chat
        ]

    check()


@pytest.mark.parametrize("layout", WRITTEN)
def test_any_chat_reads_the_same_or_is_refused_by_name(layout, tmp_path):
    @MANY
    @given(chats(), st.dictionaries(odd_columns, values, max_size=2))
    def check(chat, metadata):
        try:
            original = Conversation(chat, metadata=metadata)
            record, read = relaid(chat, metadata, layout, tmp_path / "a.jsonl")
        except ConversationError as err:
            assert f"x, row 0 ({original.id}): " in str(err)
            return
        assert read.messages == chat and read.id == original.id
        for name, value in metadata.items():  # an empty column may give way to the layout's own
            assert record.get(name) == value or value in (None, "[]", "null", "None", "{}") or name in record

    check()


@pytest.mark.parametrize("layout", WRITTEN)
def test_pairs_read_the_same_here_and_elsewhere(layout, tmp_path):
    @MANY
    @given(
        chats(plain_words, plain_words, flags=False, ends_with_answer=False),
        plain_words,
        plain_words,
        st.sampled_from([("chosen", "rejected"), ("better", "worse")]),
    )
    def check(prompt, better, worse, columns):
        prompt = list(prompt)
        if better == worse:
            return
        record = {"messages": prompt, **dict(zip(columns, (better, worse))), "rater": 3}
        pairs = load_preferences([record], chosen=columns[0], rejected=columns[1])
        written = pairs.as_layout(layout)
        assert written.ids == pairs.ids and written.columns == ("chosen", "rejected")
        written.to_json(tmp_path / "a.jsonl", overwrite=True)
        assert load_preferences(tmp_path / "a.jsonl").ids == pairs.ids
        [record] = [json.loads(line) for line in (tmp_path / "a.jsonl").open(encoding="utf-8")]
        asked, said = as_trainers_read(record, layout)
        assert asked == [(one["role"], one["content"]) for one in prompt] and record["rater"] == 3
        assert said == {"chosen": [("assistant", better)], "rejected": [("assistant", worse)]}
        assert not set(columns) - {"chosen", "rejected"} & record.keys()
        assert written.swap([0]).ids == pairs.swap([0]).ids

    check()


@pytest.mark.parametrize(
    "chat, layouts, error",
    [
        ((HI[0], {**HI[1], "reasoning_content": "hm"}), ("sharegpt", "alpaca"), "reasoning_content"),
        ((HI[0], {**HI[1], "train": False}), ("sharegpt", "alpaca", "prompt-completion"), "train"),
        (({**HI[0], "name": "Ada"}, HI[1]), ("sharegpt", "alpaca"), r"messages\[0\].name"),
        ((*HI, *HI), ("prompt-completion",), r"messages\[1\]': is an answer that is trained on"),
        (HI[:1], ("alpaca",), "ends with a question"),
        (({"role": "system", "content": "null"}, *HI), ("alpaca",), r"messages\[0\] would be"),
    ],
)
def test_what_has_no_place_is_refused_and_fits_elsewhere(chat, layouts, error, tmp_path):
    two = Conversations([Conversation(HI), Conversation(chat)], "x")
    for layout in WRITTEN:
        if layout not in layouts:
            assert two.as_layout(layout).ids == two.ids
            continue
        with pytest.raises(ConversationError, match=f"x, row 1 .*{error}"):
            two.as_layout(layout)


def test_thoughts_of_a_rejected_answer_are_not_lost():
    thought = {**HI[1], "content": "No.", "reasoning_content": "hm"}
    pairs = load_preferences([{"prompt": [HI[0]], "chosen": [HI[1]], "rejected": [thought]}])
    assert pairs.as_layout("messages").ids == pairs.ids
    with pytest.raises(ConversationError, match="reasoning_content"):
        pairs.as_layout("sharegpt")


def test_texts_that_are_no_chats_and_unknown_names(tmp_path):
    (tmp_path / "a.txt").write_text("Once.\n")
    with pytest.raises(ConversationError, match="no question before the answer"):
        load_documents(tmp_path / "a.txt").as_layout("messages")
    with pytest.raises(ConversationError, match="no layout 'trl' to write; there are: messages, "):
        load_conversations([{"messages": list(HI)}]).as_layout("trl")
