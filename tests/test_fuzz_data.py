"""Whatever becomes of a row or a file on its way here: it is read, or one of our own errors says where it
broke."""

import copy
import gzip
import io
import json
import random
import re
import warnings

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from concept_tda.data.conversations import Conversations, load_conversations
from concept_tda.foundation.errors import ConceptTDAError

TURNS = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "Is tea green?"},
    {
        "role": "assistant",
        "content": "Some is.",
        "reasoning_content": "It depends.",
        "weight": 1,
        "name": "Ada",
    },
    {"role": "user", "content": "Héllo 漢字 🙂?"},
    {"role": "assistant", "content": "Yes.", "train": False},
]
NODE = {"author": {"role": "user"}, "content": {"content_type": "text", "parts": ["Hi"]}}
ROWS = [
    {"messages": TURNS, "label": True, "score": 1.5},
    {
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}],
        "system": "Be kind.",
    },
    {"conversations": ["Hi", "Hello!"], "source": "lima"},
    {"prompt": "Hi", "response": "Hello!", "tags": ["a", "b"]},
    {"prompt": TURNS[1:2], "completion": TURNS[2:3]},
    {"instruction": "Sum up.", "input": "A text.", "output": "Short.", "history": [["Hat?", "Red."]]},
    {"instruction": "Sum up.", "context": "A text.", "response": "Short.", "category": "sum"},
    {"prompt": "Hi", "chosen": "Hello!", "rejected": "No."},
    {
        "prompt": {
            "role": "prompter",
            "text": "Tea?",
            "replies": [
                {"role": "assistant", "text": "Yes.", "replies": []},
                {"role": "assistant", "text": "No."},
            ],
        }
    },
    {
        "mapping": {"a": {"message": None, "parent": None}, "b": {"message": NODE, "parent": "a"}},
        "current_node": "b",
    },
    {"message_id": "1", "parent_id": None, "role": "prompter", "text": "Hi"},
]
ODD = [
    None,
    True,
    0,
    2.5,
    -1,
    10**30,
    float("nan"),
    float("inf"),
    "",
    " ",
    "\0",
    "\ud83d",
    "[",
    "[]",
    "{}",
    "a\nb",
    [],
    {},
    [[]],
    [None],
    {"a": {}},
    [{"role": "user"}],
    "\u2028",
    "assistant",
    b"x",
]


def places(value, path=()):
    """Every place inside a value, as a path of keys."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in inside for place in places(part, (*path, key)))]


def at(value, path):
    for key in path:
        value = value[key]
    return value


def mutated(draw, record):
    """The record with one of its fields gone, twice there, of another kind, renamed or nested."""
    record = copy.deepcopy(record)
    path = draw.choice(places(record)[1:] or [()])
    if not path:
        return draw.choice(ODD)
    parent, key, odd = at(record, path[:-1]), path[-1], draw.choice(ODD)
    kind = draw.randrange(7)
    if kind == 0:
        del parent[key]
    elif kind == 1:
        parent[key] = odd
    elif kind == 2:
        parent[key] = [parent[key]] * draw.choice([1, 2])
    elif kind == 3:
        parent[key] = {"content": parent[key]}
    elif kind == 4 and isinstance(parent, list):
        parent.append(parent[key])
    elif kind == 5 and isinstance(parent, list):
        parent.reverse()
    elif isinstance(parent, dict):
        parent[draw.choice(FIELDS)] = draw.choice([odd, parent[key]])
    return record


FIELDS = sorted(
    {str(path[-1]) for row in ROWS for path in places(row)[1:]}
    | {
        "thinking",
        "tools",
        "tool_calls",
        "mask",
        "images",
        "documents",
        "weight",
        "message_fields",
        "replies",
    }
)


def reads(source, **options):
    """Read it, write it, read columns back; only an error of ours may come out. Returns its text, if there
    was one."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            data = load_conversations(source, **options)
        except ConceptTDAError as err:
            str(err).encode()  # can be printed
            return str(err)
    again = Conversations.from_columns(data.to_columns(), data.name, data.layout)
    assert again.ids == data.ids and [c.messages for c in again] == [c.messages for c in data]
    repr(data), data._repr_html_(), data.to_pandas(), data.duplicates
    return None


def check_rows(seed, tmp_path):
    draw = random.Random(seed)
    records = [draw.choice(ROWS) for _ in range(draw.randint(1, 3))]
    for _ in range(draw.randint(1, 3)):
        row = draw.randrange(len(records))
        records[row] = mutated(draw, records[row])
    options = {"answer": draw.choice(["chosen", "response", "messages"])} if draw.random() < 0.2 else {}
    said = reads(records, **options)
    assert said is None or re.match(r"list, row \d+: ", said), said
    texts = [json.dumps(r, default=str, ensure_ascii=draw.random() < 0.5) for r in records]
    path = tmp_path / "a.jsonl"
    path.write_bytes("\n".join(texts).encode("utf-8", "surrogatepass"))
    said = reads(path, **options)
    assert said is None or re.match(rf"{re.escape(str(path))}(, line \d+)?: ", said), said
    if said is None and not any("replies" in t or "message_id" in t for t in texts):
        data = load_conversations(path, **options)
        assert data.to_json(tmp_path / "out.jsonl", overwrite=True).read_bytes() == path.read_bytes()
    path = tmp_path / "a.json"
    path.write_bytes(("[" + ",".join(texts) + "]").encode("utf-8", "surrogatepass"))
    said = reads(path, **options)
    assert said is None or re.match(rf"{re.escape(str(path))}, (line|record) \d+: ", said), said


def files():
    """Small valid files of every format, as (name, bytes)."""
    plain = [
        {"prompt": "Hé?", "response": "Ja. 🙂", "n": 1},
        {"prompt": 'Tea, "green"?', "response": "No.", "n": 2},
    ]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in plain).encode()
    table, listed, csv = (
        io.BytesIO(),
        json.dumps(plain, indent=1).encode(),
        pd.DataFrame(plain).to_csv(index=False).encode(),
    )
    pd.DataFrame(plain).to_parquet(table)
    import pyarrow as pa

    stream = pa.BufferOutputStream()
    arrow = pa.Table.from_pylist([{"messages": TURNS[1:2], "n": 1}])
    with pa.ipc.new_stream(stream, arrow.schema) as writer:
        writer.write_table(arrow)
    packed = pa.BufferOutputStream()
    with pa.CompressedOutputStream(packed, "zstd") as out:
        out.write(lines)
    return [
        ("a.jsonl", lines),
        ("a.json", listed),
        ("a.csv", csv),
        ("a.parquet", table.getvalue()),
        ("a.arrow", stream.getvalue().to_pybytes()),
        ("a.jsonl.gz", gzip.compress(lines)),
        ("a.csv.gz", gzip.compress(csv)),
        ("a.jsonl.zst", packed.getvalue().to_pybytes()),
    ]


FILES = files()


def check_file(seed, tmp_path):
    draw = random.Random(seed)
    name, data = draw.choice(FILES)
    data = bytearray(data)
    kind = draw.randrange(5)
    if kind == 0:
        data = data[: draw.randrange(len(data))]
    if kind == 1:
        data[draw.randrange(len(data))] = draw.randrange(256)
    if kind == 2:
        data[draw.randrange(len(data)) :] = data[: draw.randrange(len(data))]
    if kind == 3:
        data[:0] = draw.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\n", b"[", b"\0", b"{", b'"'])
    if kind == 4:
        name = draw.choice(FILES)[0]
    path = tmp_path / name
    path.write_bytes(bytes(data))
    said = reads(path)
    assert said is None or re.match(rf"{re.escape(str(path))}(, (line|row|record) \d+)?: ", said), said
    if said and "iconv" in said:
        assert name in ("a.jsonl", "a.json", "a.csv"), said


def test_untouched_rows_and_files_are_read(tmp_path):
    for row in ROWS:
        assert reads([row], answer="chosen" if "chosen" in row else None) is None, row
    for name, data in FILES:
        (tmp_path / name).write_bytes(data)
        assert reads(tmp_path / name) is None, name


@pytest.mark.parametrize("seed", range(12))
def test_mutated_rows(seed, tmp_path):
    for i in range(120):
        check_rows(1000 * seed + i, tmp_path)


@pytest.mark.parametrize("seed", range(8))
def test_mutated_files(seed, tmp_path):
    for i in range(150):
        check_file(1000 * seed + i, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 120))
def test_mutated_rows_and_files_for_longer(seed, tmp_path):
    for i in range(500):
        check_rows(1000 * seed + i, tmp_path)
    for i in range(500):
        check_file(1000 * seed + i, tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.dictionaries(st.sampled_from(FIELDS) | st.integers(), JSON, max_size=5) | JSON, max_size=3)
)
def test_any_values_under_the_names_that_are_known(records):
    said = reads([{**ROWS[0], **record} if isinstance(record, dict) else record for record in records])
    assert said is None or re.match(r"list(, row \d+)?: ", said), said
