"""What people have on their disks: every layout and format, a message's fields, and advice that holds."""

import bz2
import gzip
import json
import lzma
import re
import sys

import datasets
import pandas as pd
import pyarrow as pa
import pytest

from concept_tda.data.conversations import Conversation, Conversations, load_conversations
from concept_tda.data.files import arrow_reader
from concept_tda.data.layouts import LAYOUTS, REFUSED_COLUMNS
from concept_tda.data.messages import REFUSED, ConversationError

HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]


def said(conversation):
    return [m["content"] for m in conversation.messages]


def thinking(**fields):
    return [HI[0], {**HI[1], **fields}]


def jsonl(path, *records):
    path.write_text(
        "".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in records),
        encoding="utf-8",
    )
    return path


def written(data, path):
    return [
        json.loads(line)
        for line in data.to_json(path, overwrite=True).read_text(encoding="utf-8").splitlines()
    ]


# ---------------------------------------------------------------- fields of a message


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking", "thought"])
def test_a_thought_is_passed_on_and_changes_the_id(name):
    [c] = load_conversations([thinking(**{name: "Be polite."})])
    assert c.messages[1] == {**HI[1], "reasoning_content": "Be polite."} and c.metadata == {}
    assert c.id != Conversation(tuple(HI)).id == load_conversations([thinking(**{name: ""})])[0].id
    assert c.id != load_conversations([thinking(thought="Be rude.")])[0].id
    assert c.id == load_conversations([thinking(reasoning="Be polite.", thinking="Be polite.")])[0].id
    assert "Be polite." in c._repr_html_()


@pytest.mark.parametrize("name", ["train", "trainable", "training", "loss", "weight"])
def test_a_flag_is_passed_on_as_train(name):
    plain = Conversation(tuple(HI)).id
    for no in (0, 0.0, False):
        [c] = load_conversations([thinking(**{name: no})])
        assert (
            c.messages[1] == {**HI[1], "train": False}
            and c.id != plain
            and "not trained on" in c._repr_html_()
        )
    for yes in (1, 1.0, True, None):
        [c] = load_conversations([thinking(**{name: yes})])
        assert c.messages == tuple(HI) and c.id == plain
    for odd in (0.5, 2, -1, "yes", "0", [0]):
        with pytest.raises(ConversationError, match=rf"messages\[1\].{name}': is .*trained on"):
            load_conversations([thinking(**{name: odd})])
    with pytest.raises(ConversationError, match=rf"messages\[0\].{name}': only answers are trained on"):
        load_conversations([[{**HI[0], name: 1}, HI[1]]])
    assert load_conversations([[{**HI[0], name: 0}, HI[1]]])[0].id == plain


def test_names_are_passed_on():
    [c] = load_conversations([[{**HI[0], "name": "Ada"}, HI[1]]])
    assert c.messages[0]["name"] == "Ada" and c.id != Conversation(tuple(HI)).id and "Ada" in c._repr_html_()


@pytest.mark.parametrize(
    "message, error",
    [
        ({"reasoning": "a", "thinking": "b"}, "reasoning and thinking hold different thoughts"),
        ({"train": True, "weight": 0}, "train and weight say different things"),
        ({"thinking": ["a"]}, r"messages\[1\].thinking': is a list, expected the thought as text"),
        ({"name": 3}, r"messages\[1\].name': is a number"),
        ({"thinking": "\ud83d"}, "half of a surrogate pair"),
        (
            {"content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": "b"}]},
            r"messages\[1\].content\[1\]': is a part of type 'image_url'",
        ),
        ({"role": "tool"}, "the role 'tool' belongs to a tool call"),
    ],
)
def test_what_contradicts_itself_or_is_no_text_is_refused(message, error):
    with pytest.raises(ConversationError, match=error):
        load_conversations([thinking(**message)])
    with pytest.raises(
        ConversationError,
        match=r"messages\[0\].thought': a user message cannot hold a "
        r"thought",
    ):
        load_conversations([[{**HI[0], "thought": "hm"}, HI[1]]])


@pytest.mark.parametrize("name", REFUSED)
def test_every_refused_field_is_refused_by_name_unless_it_is_empty(name):
    for value in ([{"a": 1}], "x", 1):
        with pytest.raises(ConversationError, match=rf"row 0: field 'messages\[1\].{name}': \w+"):
            load_conversations([thinking(**{name: value})])
        with pytest.raises(ConversationError, match=rf"field 'conversations\[0\].{name}'"):
            load_conversations([{"conversations": [{"from": "human", "value": "Hi", name: value}]}])
    for value in (None, [], "", {}, "[]"):
        assert load_conversations([thinking(**{name: value})])[0].messages == tuple(HI)


@pytest.mark.parametrize("name", REFUSED_COLUMNS)
def test_every_refused_column_is_refused_by_name_unless_it_is_empty(name, tmp_path):
    for layout in (
        {"messages": HI},
        {"conversations": ["Hi", "Hello!"]},
        {"prompt": HI[:1], "response": "Hello!"},
    ):
        for value in ([{"a": 1}], "x", {"enable": True}):
            with pytest.raises(ConversationError, match=rf"row 0: field '{name}': \w+"):
                load_conversations([{**layout, name: value}])
        for value in (None, [], "", {}, "[]"):
            [c] = load_conversations([{**layout, name: value}])
            assert c.messages == tuple(HI) and c.metadata == {name: value}


def test_weights_of_records():
    assert load_conversations([{"messages": HI, "weight": 1.0}])[0].metadata == {"weight": 1.0}
    for weight in (0, 0.5, 2):
        with pytest.raises(ConversationError, match="field 'weight': every record counts once"):
            load_conversations([{"messages": HI, "weight": weight}])


def test_other_fields_of_messages_are_kept_and_shown(tmp_path):
    record = {
        "messages": [{**HI[0], "timestamp": 3}, {**HI[1], "votes": {"up": 2}, "note": ""}],
        "source": "a",
    }
    path = jsonl(tmp_path / "a.jsonl", record)
    data = load_conversations(path)
    assert data[0].messages == tuple(HI) and data[0].id == Conversation(tuple(HI)).id
    assert data[0].metadata == {"source": "a", "message_fields": [{"timestamp": 3}, {"votes": {"up": 2}}]}
    assert (
        "message_fields" in repr(data)
        and data.to_json(tmp_path / "b.jsonl").read_bytes() == path.read_bytes()
    )
    with pytest.raises(ConversationError, match="field 'message_fields'.*rename"):
        load_conversations([{**record, "message_fields": 1}])


def test_one_part_of_text_is_that_text(tmp_path):
    path = jsonl(
        tmp_path / "a.jsonl",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, HI[1]]},
    )
    data = load_conversations(path)
    assert (
        data[0].messages == tuple(HI) and data.to_json(tmp_path / "b.jsonl").read_bytes() == path.read_bytes()
    )


def test_a_conversation_takes_nothing_it_would_drop():
    with pytest.raises(
        ConversationError, match="found: role, content, votes. Put other fields into the metadata"
    ):
        Conversation(({**HI[0], "votes": 1},))
    with pytest.raises(ConversationError, match="holds role, content"):
        Conversation(({"role": "user"},))
    assert Conversation(
        ({**HI[0], "name": ""}, {**HI[1], "train": True, "reasoning_content": ""})
    ).messages == tuple(HI)


# ---------------------------------------------------------------- layouts

NODE = {"author": {"role": "user"}, "content": {"content_type": "text", "parts": ["Hi"]}, "weight": 1.0}
EXPORT = {
    "title": "A greeting",
    "current_node": "d",
    "mapping": {
        "root": {"message": None, "parent": None},
        "a": {
            "message": {"author": {"role": "system"}, "content": {"content_type": "text", "parts": [""]}},
            "parent": "root",
        },
        "b": {"message": NODE, "parent": "a"},
        "c": {
            "message": {
                "author": {"role": "assistant"},
                "content": {"content_type": "text", "parts": ["Yo."]},
            },
            "parent": "b",
        },
        "d": {
            "message": {
                "author": {"role": "assistant"},
                "content": {"content_type": "text", "parts": ["Hello!"]},
            },
            "parent": "b",
        },
    },
}
TREE = {
    "message_tree_id": "t",
    "prompt": {
        "role": "prompter",
        "text": "Hi",
        "lang": "en",
        "replies": [
            {
                "role": "assistant",
                "text": "Hello!",
                "replies": [{"role": "prompter", "text": "How?", "replies": []}],
            },
            {"role": "assistant", "text": "Yo.", "replies": []},
        ],
    },
}
MESSAGES = [
    {"message_id": "a", "parent_id": None, "role": "prompter", "text": "Hi", "rank": None},
    {"message_id": "c", "parent_id": "b", "role": "prompter", "text": "How?", "rank": None},
    {"message_id": "b", "parent_id": "a", "role": "assistant", "text": "Hello!", "rank": 0},
    {"message_id": "d", "parent_id": "a", "role": "assistant", "text": "Yo.", "rank": 1},
]
CHATS = {
    "alpaca with history": (
        {
            "instruction": "And shoes?",
            "input": "Brown ones.",
            "output": "No.",
            "history": [["Hat?", "Yes."], ["Coat?", "Yes."]],
        },
        ["Hat?", "Yes.", "Coat?", "Yes.", "And shoes?\n\nBrown ones.", "No."],
    ),
    "history of a prompt": (
        {"prompt": "And shoes?", "response": "No.", "history": [["Hat?", "Yes."]]},
        ["Hat?", "Yes.", "And shoes?", "No."],
    ),
    "history as JSON text": (
        {"prompt": "And shoes?", "response": "No.", "history": '[["Hat?", "Yes."]]'},
        ["Hat?", "Yes.", "And shoes?", "No."],
    ),
    "history with a system prompt": (
        {"system": "Be kind.", "instruction": "b", "output": "c", "history": [["x", "y"]]},
        ["Be kind.", "x", "y", "b", "c"],
    ),
    "dolly": (
        {"instruction": "Sum up.", "context": "A text.", "response": "Short.", "category": "sum"},
        ["Sum up.\n\nA text.", "Short."],
    ),
    "lima": ({"conversations": ["Hi", "Hello!", "How?"], "source": "x"}, ["Hi", "Hello!", "How?"]),
    "chatgpt": (EXPORT, ["Hi", "Hello!"]),
    "system_prompt": (
        {"system_prompt": "Be kind.", "prompt": "Hi", "response": "Hello!"},
        ["Be kind.", "Hi", "Hello!"],
    ),
}


@pytest.mark.parametrize("case", CHATS)
def test_layouts(case, tmp_path):
    record, expected = CHATS[case]
    path = jsonl(tmp_path / "a.jsonl", record)
    data = load_conversations(path)
    assert said(data[0]) == expected and len(data) == 1
    assert data.to_json(tmp_path / "b.jsonl").read_bytes() == path.read_bytes()
    from_list = load_conversations([record])
    assert from_list.ids == data.ids and written(from_list, tmp_path / "c.jsonl") == [record]
    rebuilt = Conversations.from_columns(from_list.to_columns())
    assert list(rebuilt) == list(from_list) and written(rebuilt, tmp_path / "d.jsonl") == [record]


def test_an_export_of_chatgpt_shows_what_was_not_read():
    [c] = load_conversations([EXPORT])
    assert c.metadata == {"title": "A greeting", "other_messages": 2}


def test_trees_and_message_rows_give_the_same_threads(tmp_path):
    expected = [["Hi", "Hello!", "How?"], ["Hi", "Yo."]]
    tree, rows = load_conversations([TREE]), load_conversations(jsonl(tmp_path / "a.jsonl", *MESSAGES))
    assert [said(c) for c in tree] == [said(c) for c in rows] == expected and tree.ids == rows.ids
    assert tree[0].metadata == {"message_tree_id": "t", "message_fields": [{"lang": "en"}, {}, {}]}
    assert [m["rank"] for m in rows[1].metadata["message_fields"] if "rank" in m] == [1]
    for data in (tree, rows):  # a thread has no line of its own; it is written as what it is
        again = load_conversations(data.to_json(tmp_path / "b.jsonl", overwrite=True))
        assert again.ids == data.ids and [c.metadata for c in again] == [c.metadata for c in data]
    [with_system, _] = load_conversations([{**TREE, "system": "Be kind."}])
    assert said(with_system)[0] == "Be kind."


def test_message_rows_that_cannot_be_sorted_are_refused():
    a, c, b, d = MESSAGES
    for rows, error in (
        ([a, {**b, "parent_id": "z"}], "row 1: field 'parent_id': there is no message 'z'"),
        ([a, {**b, "message_id": "a"}], "row 1: field 'message_id': 'a' .*twice"),
        ([{**a, "parent_id": "b"}, b], "row 0: field 'parent_id': the messages form a circle"),
        ([a, {**b, "role": "robot"}], "row 1: .*unknown role 'robot'"),
        ([a, 3], "row 1: is a number"),
    ):
        with pytest.raises(ConversationError, match=error):
            load_conversations(rows)


PAIR = {"prompt": "Hi", "chosen": "Hello!", "rejected": "Go away."}
PREFERENCES = [
    (PAIR, "chosen", ["Hi", "Hello!"]),
    (PAIR, "rejected", ["Hi", "Go away."]),
    ({"prompt": "Hi", "aligned": "Hello!", "misaligned": "Go."}, "misaligned", ["Hi", "Go."]),
    ({"prompt": "Hi", "chosen": HI, "rejected": HI}, "chosen", ["Hi", "Hello!"]),
    ({"prompt": HI[:1], "chosen": HI[1:], "rejected": HI[1:]}, "chosen", ["Hi", "Hello!"]),
    (
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Hello!"},
            "rejected": {"from": "gpt", "value": "x"},
        },
        "chosen",
        ["Hi", "Hello!"],
    ),
    ({"instruction": "Hi", "input": "", "chosen": "Hello!", "rejected": "x"}, "chosen", ["Hi", "Hello!"]),
    ({"chosen": HI, "rejected": HI}, "chosen", ["Hi", "Hello!"]),
]


@pytest.mark.parametrize("record, answer, expected", PREFERENCES)
def test_preference_rows_need_to_know_which_answer(record, answer, expected, tmp_path):
    with pytest.raises(ConversationError, match="row 0: .*answer='"):
        load_conversations([record])
    data = load_conversations([record], answer=answer)
    assert said(data[0]) == expected and set(data[0].metadata) == set(record) - {
        "prompt",
        "conversations",
        "instruction",
        "input",
        answer,
    }
    assert written(data, tmp_path / "a.jsonl") == [record]


def test_answer_is_not_ignored():
    with pytest.raises(ConversationError, match="no column 'best' .*found: chosen, prompt, rejected"):
        load_conversations([PAIR], answer="best")
    with pytest.raises(ConversationError, match="ends with an answer already"):
        load_conversations([{"messages": HI, "chosen": HI}], answer="chosen")
    with pytest.raises(ConversationError, match="begins otherwise than 'prompt'"):
        load_conversations([{**PAIR, "prompt": "Ho", "chosen": HI}], answer="chosen")
    assert said(load_conversations([{"messages": HI, "chosen": HI, "rejected": HI}])[0]) == ["Hi", "Hello!"]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.fields)
def test_every_layout_of_the_table_reads_its_example(layout, tmp_path):
    records = layout.example if isinstance(layout.example, list) else [layout.example]
    options = {"answer": "chosen"} if "chosen" in records[0] else {}
    for source in (records, jsonl(tmp_path / "a.jsonl", *records)):
        [c] = load_conversations(source, **options)
        assert c.messages == tuple(HI)
    assert set(re.findall(r"\w+", layout.fields)) & set(records[0]), (
        "the table names the fields of its example"
    )


# ---------------------------------------------------------------- sources

RICH = {
    "messages": [
        {"role": "user", "content": "Hi", "id": "a"},
        {"role": "assistant", "content": "Hello!", "thinking": "Be kind.", "weight": 0},
    ],
    "n": 1,
}


def test_every_source_keeps_every_field(tmp_path):
    pd.DataFrame([RICH]).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps([RICH]))
    pd.DataFrame([{**RICH, "messages": json.dumps(RICH["messages"])}]).to_csv(tmp_path / "a.csv", index=False)
    expected = load_conversations(jsonl(tmp_path / "a.jsonl", RICH))
    assert expected[0].messages[1] == {
        "role": "assistant",
        "content": "Hello!",
        "reasoning_content": "Be kind.",
        "train": False,
    }
    for source in (
        tmp_path / "a.parquet",
        tmp_path / "a.json",
        tmp_path / "a.csv",
        pd.DataFrame([RICH]),
        datasets.Dataset.from_list([RICH]),
        [RICH],
    ):
        data = load_conversations(source)
        assert data.ids == expected.ids and data[0].metadata == {"n": 1, "message_fields": [{"id": "a"}, {}]}
        [record] = written(data, tmp_path / "out.jsonl")
        if isinstance(record["messages"], str):
            record["messages"] = json.loads(record["messages"])
        record["messages"] = [
            {key: value for key, value in m.items() if value is not None} for m in record["messages"]
        ]
        assert record == RICH, source
        assert load_conversations(tmp_path / "out.jsonl").ids == expected.ids


def test_a_changed_copy_is_written_as_it_is_now(tmp_path):
    from dataclasses import replace

    [c] = load_conversations([{"prompt": "Hi", "response": "Hello!", "label": "a"}])
    assert written(Conversations([replace(c, metadata={"label": "b"})]), tmp_path / "a.jsonl") == [
        {"messages": HI, "label": "b"}
    ]


def zstd(data):
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as stream:
        stream.write(data)
    return out.getvalue().to_pybytes()


@pytest.mark.parametrize(
    "suffix, pack", [(".gz", gzip.compress), (".zst", zstd), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_compressed_files(suffix, pack, tmp_path):
    lines = b'\xef\xbb\xbf{"prompt":"Caf\\u00e9",  "response":"ok"}\r\n\r\n{"prompt":"b","response":"c"}'
    for name, inside in (
        ("a.jsonl", lines),
        ("a.json", b'[{"prompt":"b","response":"c"}]'),
        ("a.csv", b"prompt,response\nb,c\n"),
    ):
        path = tmp_path / (name + suffix)
        path.write_bytes(pack(inside))
        data = load_conversations(path)
        assert data.name == "a" and said(data[-1]) == ["b", "c"]
        if name == "a.jsonl":
            assert data.to_json(tmp_path / "out.jsonl", overwrite=True).read_bytes() == lines
        path.write_bytes(pack(inside)[:-5])
        with pytest.raises(ConversationError, match=re.escape(f"{path}: cannot be unpacked as {suffix}")):
            load_conversations(path)
        path.write_bytes(b"")
        with pytest.raises(ConversationError, match="the file is empty"):
            load_conversations(path)
    with pytest.raises(ConversationError, match="written uncompressed; name the file out.jsonl"):
        data.to_json(tmp_path / f"out.jsonl{suffix}")


def test_zstd_in_several_frames_is_read_to_the_end(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(
        b"".join(zstd(b'{"prompt":"%d","response":"c"}\n' % i) for i in range(3))
    )
    assert len(load_conversations(tmp_path / "a.jsonl.zst")) == 3


def test_folders_of_datasets(tmp_path):
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_list([{"messages": HI, "n": i} for i in range(5)])
    rows.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "splits")
    one = load_conversations(tmp_path / "one")
    assert [c.metadata["n"] for c in one] == list(range(5)) and one.name == "one"
    assert (
        len(load_conversations(tmp_path / "splits")) == 5
        and len(load_conversations(str(tmp_path / "splits"), split="test")) == 1
    )
    with pytest.raises(ConversationError, match="has the splits train, test, and 'dev' was asked for"):
        load_conversations(tmp_path / "splits", split="dev")
    with pytest.raises(
        ConversationError, match="state.json belongs to a folder that datasets wrote; pass the folder"
    ):
        load_conversations(tmp_path / "one" / "state.json")
    [part] = sorted((tmp_path / "splits" / "test").glob("*.arrow"))
    assert len(load_conversations(part)) == 1
    with (
        pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file,
        pa.ipc.new_file(file, (table := pa.Table.from_pylist([{"messages": HI}])).schema) as out,
    ):
        out.write_table(table)
    assert len(load_conversations(tmp_path / "a.arrow")) == 1
    part.unlink()
    with pytest.raises(ConversationError, match="there is no file .*arrow"):
        load_conversations(tmp_path / "splits", split="test")


def test_folders_of_parquet_parts(tmp_path):
    for i in range(3):
        pd.DataFrame([{"messages": HI, "n": i}]).to_parquet(tmp_path / f"train-0000{i}-of-00003.parquet")
    assert [c.metadata["n"] for c in load_conversations(tmp_path)] == [0, 1, 2]
    with pytest.raises(ConversationError, match="holds parts of train, and the split 'test'"):
        load_conversations(tmp_path, split="test")
    (tmp_path / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(ConversationError, match="2 of 3 parts of 'train' are there"):
        load_conversations(tmp_path)


# ---------------------------------------------------------------- what stands beside a chat and is part of it

BESIDE = [
    ({"messages": HI[:1], "response": "Hello!"}, "field 'messages': no answer follows it.*answer='response'"),
    (
        {"conversations": ["Hi"], "output": "Hello!"},
        "field 'conversations': no answer follows it.*answer='output'",
    ),
    (
        {"prompt": "Sum up.", "input": "A text.", "response": "Short."},
        "field 'input': a prompt stands alone; join",
    ),
    ({"prompt": "Hi", "text": "Hi Hello!"}, "answer='text'"),
    ({"messages": HI, "train": False}, "field 'train': every record counts once"),
    ({"messages": HI, "weight": "0.3"}, "field 'weight': every record counts once"),
    ({"messages": HI, "mask": [0, 1]}, "field 'mask': mark the answers .* with train"),
    ({"messages": HI, "enable_thinking": False}, "field 'enable_thinking': settings of a template"),
    ({"messages": [HI[0], {**HI[1], "loss_weight": 0.3}]}, r"messages\[1\].loss_weight': is 0.3"),
]


@pytest.mark.parametrize("record, error", BESIDE)
def test_what_stands_beside_a_chat_is_no_metadata(record, error):
    with pytest.raises(ConversationError, match=error):
        load_conversations([record])


def test_what_says_nothing_new_beside_a_chat_is_metadata():
    for more in ({"train": True}, {"weight": "1.0"}, {"response": ""}, {"mask": None}, {"weight": "heavy"}):
        [c] = load_conversations([{"messages": HI, **more}])
        assert c.messages == tuple(HI) and c.metadata == more
    [c] = load_conversations([{"messages": HI[:1], "response": "Hello!"}], answer="response")
    assert c.messages == tuple(HI)


def test_message_rows_in_csv(tmp_path):
    pd.DataFrame(MESSAGES).to_csv(tmp_path / "a.csv", index=False)
    assert load_conversations(tmp_path / "a.csv").ids == load_conversations(MESSAGES).ids


def test_arrow_holds_none_of_pythons_bytes():
    """A thread of Arrow's that lets go of them while Python ends would abort the process."""
    data = bytes(range(100))
    before = sys.getrefcount(data)
    reader, holding = arrow_reader(data), pa.BufferReader(data)
    assert sys.getrefcount(data) == before + 1  # by `holding` alone
    assert reader.read() == holding.read() == data
