"""An error's way out is followed to the letter, and the data load."""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import shutil
import subprocess
import zipfile

import datasets
import pandas as pd
import pyarrow as pa
import pytest

from concept_tda.data.conversations import load_conversations
from concept_tda.data.layouts import REFUSED_COLUMNS
from concept_tda.data.messages import REFUSED, ConversationError

HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
LINES = b'{"prompt": "Hi", "response": "Hello!"}\n{"prompt": "Ho", "response": "Hello?"}\n'
ROWS = [json.loads(line) for line in LINES.splitlines()]


def told(source, **options):
    """What the library says against a source."""
    with pytest.raises(ConversationError) as caught:
        load_conversations(source, **options)
    return str(caught.value)


def loads(source, n=None, **options):
    data = load_conversations(source, **options)
    assert n is None or len(data) == n


# ---------------------------------------------------------------- files with a wrong name


def parquet():
    out = io.BytesIO()
    pd.DataFrame(ROWS).to_parquet(out)
    return out.getvalue()


def arrow(open_):
    out = pa.BufferOutputStream()
    table = pa.Table.from_pylist(ROWS)
    with open_(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue().to_pybytes()


def zstd(data):
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as stream:
        stream.write(data)
    return out.getvalue().to_pybytes()


LIST = json.dumps(ROWS).encode()
MISNAMED = {
    "gzip": ("a.jsonl", gzip.compress(LINES)),
    "zstd": ("a.jsonl", zstd(LINES)),
    "bzip2": ("a.jsonl", bz2.compress(LINES)),
    "xz": ("a.jsonl", lzma.compress(LINES)),
    "gzip of a list": ("a.json", gzip.compress(LIST)),
    "parquet": ("a.csv", parquet()),
    "arrow stream": ("a.json", arrow(pa.ipc.new_stream)),
    "arrow file": ("a.jsonl", arrow(pa.ipc.new_file)),
    "a list": ("a.jsonl", LIST),
    "a list over lines": ("a.jsonl", json.dumps(ROWS, indent=1).encode()),
    "lines": ("a.json", LINES),
    "one line": ("a.json", LINES.splitlines()[0]),
}


@pytest.mark.parametrize("case", MISNAMED)
def test_a_file_gets_the_name_that_is_advised(case, tmp_path):
    name, data = MISNAMED[case]
    (tmp_path / name).write_bytes(data)
    said = told(tmp_path / name)
    assert str(tmp_path / name) in said and "iconv" not in said
    suffix = re.search(r"(?:end in|the file) (\.[a-z2.]+)", said)[1]
    loads((tmp_path / name).rename(tmp_path / f"renamed{suffix}"), 1 if case == "one line" else 2)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le"])
def test_the_advised_conversion_is_right(suffix, encoding, tmp_path):
    text = {
        "jsonl": '{"prompt": "Café?", "response": "ja"}',
        "json": '[{"prompt": "Café?", "response": "ja"}]',
        "csv": "prompt,response\nCafé?,ja\n",
    }[suffix]
    old, new = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    old.write_bytes(text.encode(encoding))
    said = told(old)
    if encoding == "utf-16-le":  # nothing in it says what it is, so no conversion may be advised
        assert "iconv" not in said
        return
    command = re.search(r"iconv -f \S+ -t \S+", said)[0].split()
    if not shutil.which("iconv"):
        pytest.skip("iconv is not installed")
    new.write_bytes(subprocess.run([*command, str(old)], capture_output=True, check=True).stdout)
    assert load_conversations(new)[0].messages[0]["content"] == "Café?"


def test_conversion_is_not_advised_where_it_would_ruin(tmp_path):
    path = tmp_path / "a.jsonl"
    good = '{"prompt": "Café?", "response": "ja"}\n'.encode()
    for data in (
        good + good.decode().encode("latin-1"),
        good.decode().encode("latin-1") + good,
        good[: good.index(b"\xa9")] + b"",
        good + good[: good.index(b"\xa9")],
        b"\0\x01\x02\xff" * 20,
        gzip.compress(good)[:30] + b"\xff" * 9,
    ):
        path.write_bytes(data)
        assert "iconv" not in told(path) or data.decode("latin-1").count("Ã") == 0, data
    path.write_bytes(good + b'{"prompt": "Caf\xe9?", "response": "ja"}\n')
    assert "line 2" in (said := told(path)) and "take the line out" in said
    path.write_bytes(good)
    loads(path, 1)


def test_an_archive_is_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.jsonl", "w") as archive:
        archive.writestr("b.jsonl", LINES)
    assert "unpack it" in told(tmp_path / "a.jsonl")
    with zipfile.ZipFile(tmp_path / "a.jsonl") as archive:
        archive.extract("b.jsonl", tmp_path)
    loads(tmp_path / "b.jsonl", 2)


@pytest.mark.parametrize(
    "data, word",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!doctype HTML><p>404", "web page"),
        (b"SQLite format 3\0", "SQLite"),
        (b"%PDF-1.7", "PDF"),
    ],
)
def test_other_kinds_of_files_are_recognised(data, word, tmp_path):
    for name in ("a.jsonl", "a.json", "a.csv"):
        (tmp_path / name).write_bytes(data)
        assert word in told(tmp_path / name)


def test_records_over_several_lines_are_brought_into_one_of_two_shapes(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(row, indent=2) for row in ROWS))
    said = told(path)
    assert "spread over several lines" in said and "in a file that ends in .json" in said
    (tmp_path / "b.jsonl").write_bytes(LINES)
    (tmp_path / "b.json").write_text("[" + ",\n".join(json.dumps(row, indent=2) for row in ROWS) + "]")
    loads(tmp_path / "b.jsonl", 2)
    loads(tmp_path / "b.json", 2)


def test_a_list_inside_an_object(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"version": 1, "data": ROWS}))
    field = re.search(r"in the field '(\w+)': write that list alone", told(path))[1]
    path.write_text(json.dumps(json.loads(path.read_text())[field]))
    loads(path, 2)


def test_csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt;response\nHi;Hello!\n")
    assert "write the file with commas" in told(path)
    path.write_text(path.read_text().replace(";", ","))
    loads(path, 1)
    path.write_text('prompt,response\nHi,Hello!\nHo,"He said "yes""\nHu,x\n')
    assert ", line 3: broken CSV" in (said := told(path)) and 'twice ("")' in said
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "response"], ["Ho", 'He said "yes"']])
    loads(path, 1)
    path.write_text('prompt,response\nHi,Hello!\nHo,"Hello\nHu,x\n')
    assert ", line 3: broken CSV" in told(path)
    path.write_text('prompt,response\nHi,Hello!\nHo,"Hello"\nHu,x\n')
    loads(path, 3)


def test_folders(tmp_path):
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_list([{"messages": HI}])
    datasets.DatasetDict({"a": rows, "b": rows}).save_to_disk(tmp_path / "saved")
    said = told(tmp_path / "saved")
    assert "say split=" in said and "a, b" in said
    loads(tmp_path / "saved", 1, split="b")
    assert "pass the folder" in told(tmp_path / "saved" / "a" / "dataset_info.json")
    loads(tmp_path / "saved" / "a", 1)
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "b.jsonl").write_bytes(LINES)
    name = re.search(r"pass one file of it: (\S+)$", told(tmp_path / "mixed"))[1]
    loads(tmp_path / "mixed" / name, 2)
    assert "pass one of them" in told(datasets.DatasetDict({"a": rows}))
    loads(datasets.DatasetDict({"a": rows})["a"], 1)


# ---------------------------------------------------------------- paths and things that are no paths


def test_what_is_no_path(tmp_path, monkeypatch):
    text = json.dumps(ROWS)
    assert "looks like the data itself; pass a path, or a list of records" in told(text) and told(
        LINES.decode()
    )
    loads(json.loads(text), 2)
    for odd in ("a\0b.jsonl", "x" * 5000 + ".jsonl", "~nobody-of-this-name/a.jsonl"):
        assert "path" in told(odd) or "no file" in told(odd)
    for empty in ("", "."):
        assert "path" in told(empty)
    for odd in (3, None, {"prompt": "Hi"}, (r for r in ROWS)):
        assert "cannot read conversations from" in told(odd)


def test_a_file_without_permission(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES)

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(type(path), "read_bytes", refuse)
        assert "cannot be read: Permission denied; check" in told(path)
    loads(path, 2)


def test_tables(tmp_path):
    frame = pd.DataFrame([["Hi", "Hello!", "x"]], columns=["prompt", "response", "response"])
    assert "two columns have the same name (response); rename one" in told(frame)
    frame.columns = ["prompt", "response", "other"]
    loads(frame, 1)
    assert "names must be text" in told(
        [{"prompt": "Hi", "response": "x", 1: 2}]
    ) and "names must be text" in told(pd.DataFrame([["a", "b"]]))
    assert "names must be text" in told([{"prompt": "Hi", "response": "x", "more": {(1, 2): 3}}])
    loads([{"prompt": "Hi", "response": "x", "1": 2}], 1)
    endless = []
    endless.append(endless)
    assert "row 0: is nested more than 100 levels deep, or holds itself" in told(
        [{"prompt": "Hi", "response": "x", "more": endless}]
    )


def nested(depth):
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    "broken, words, mended",
    [
        (
            '{"prompt": "Hi", "response": "x", "more": %s}' % nested(3000),
            "nested",
            '{"prompt": "Hi", "response": "x"}',
        ),
        (
            '{"prompt": "Hi", "response": "x", "more": %s}' % nested(200),
            "nested",
            '{"prompt": "Hi", "response": "x", "more": [[]]}',
        ),
        (
            '{"prompt": "Hi", "response": "x", "n": %s}' % ("1" * 5000),
            "write it as text",
            '{"prompt": "Hi", "response": "x", "n": "%s"}' % ("1" * 5000),
        ),
        (
            '{"prompt": "Hi", "response": "x", "prompt": "Ho"}',
            "two fields of one object are called 'prompt'.*rename",
            '{"prompt": "Hi", "response": "x", "b": "Ho"}',
        ),
        ('{"prompt": "Hi \\ud83d", "response": "x"}', "remove it", '{"prompt": "Hi", "response": "x"}'),
        (
            '{"prompt": "Hi", "response": "x", "\\ud83d": 1}',
            "rename it",
            '{"prompt": "Hi", "response": "x", "smile": 1}',
        ),
    ],
)
def test_json_that_python_cannot_take(broken, words, mended, tmp_path):
    for name, text in (("a.jsonl", "{}\n%s\n"), ("a.json", "[%s]")):
        path = tmp_path / name
        path.write_text(text.replace("{}", '{"prompt": "a", "response": "b"}') % broken)
        said = told(path)
        assert re.search(words, said) and str(path) in said and len(said) < 700
        if name == "a.jsonl":
            assert ", line 2: " in said
        path.write_text(text.replace("{}", '{"prompt": "a", "response": "b"}') % mended)
        loads(path)


def test_plausible_oddities_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"prompt": "a\\u0000b", "response": "x", "score": NaN, "big": 1%s, "inf": 1e999, "t": '
        '"\\ud83d"}\n' % ("0" * 400)
    )
    data = load_conversations(path)
    assert (
        data[0].metadata["score"] is None
        and data[0].metadata["big"] == 10**400
        and data[0].metadata["inf"] == float("inf")
    )
    assert data.to_json(tmp_path / "b.jsonl").read_bytes() == path.read_bytes() and len(data.to_pandas()) == 1
    (tmp_path / "a.csv").write_text("prompt,response,n\na,b,%s\n" % ("9" * 5000))
    loads(tmp_path / "a.csv", 1)


# ---------------------------------------------------------------- fields and columns


def answer(**fields):
    return {"messages": [HI[0], {**HI[1], **fields}]}


MENDED = {  # a field of a message, as found and as advised
    "tool_calls": (answer(tool_calls=[{"name": "clock"}]), answer(content="<call>clock</call>")),
    "mask": (answer(mask=1), answer(train=True)),
    "loss_mask": (answer(loss_mask=[0, 1]), answer(train=False)),
    "weight": (answer(weight=0.5), answer(weight=1)),
    "refusal": (answer(refusal="No."), answer(content="No.")),
    "reasoning_details": (answer(reasoning_details=[{"text": "hm"}]), answer(reasoning_content="hm")),
    "channel": (answer(channel="analysis"), answer(reasoning_content="hm")),
    "images": (answer(images=["a.png"]), answer(content="[a cat]")),
    "train_detail": (answer(train_detail=[{"begin": 0}]), answer(train=True)),
    "two thoughts": (answer(thought="a", thinking="b"), answer(thought="a")),
    "parts": (
        answer(content=[{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
        answer(content="a b"),
    ),
    "history": (
        {"messages": HI, "history": [["a", "b"]]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, *HI]},
    ),
    "tools": (
        {"messages": HI, "tools": [{"name": "x"}]},
        {"messages": [{"role": "system", "content": "Tools: x"}, *HI]},
    ),
    "reasoning": ({"prompt": "Hi", "response": "x", "reasoning": "hm"}, answer(reasoning_content="hm")),
    "system": (
        {"system": "a", "messages": [{"role": "system", "content": "b"}, *HI]},
        {"messages": [{"role": "system", "content": "b\n\na"}, *HI]},
    ),
    "input and context": (
        {"instruction": "a", "input": "b", "context": "c", "output": "d"},
        {"instruction": "a", "input": "b\n\nc", "output": "d"},
    ),
    "weight of a record": ({"messages": HI, "weight": 0.3}, {"messages": HI, "importance": 0.3}),
    "only a question": ({"prompt": "Hi", "answer": "42"}, {"prompt": "Hi", "reference": "42"}),
    "message_fields": (
        {"messages": [{**HI[0], "id": 1}], "message_fields": 1},
        {"messages": [{**HI[0], "id": 1}], "fields": 1},
    ),
    "current_node": (
        {
            "mapping": {
                "a": {
                    "message": {
                        "author": {"role": "user"},
                        "content": {"content_type": "text", "parts": ["Hi"]},
                    }
                }
            }
        },
        {
            "mapping": {
                "a": {
                    "message": {
                        "author": {"role": "user"},
                        "content": {"content_type": "text", "parts": ["Hi"]},
                    }
                }
            },
            "current_node": "a",
        },
    ),
}


@pytest.mark.parametrize("case", MENDED)
def test_the_way_out_of_a_refused_field(case, tmp_path):
    broken, mended = MENDED[case]
    (tmp_path / "a.jsonl").write_text(json.dumps(broken) + "\n")
    said = told(tmp_path / "a.jsonl")
    assert said.startswith(f"{tmp_path / 'a.jsonl'}, line 1: ") and re.search(
        r"\b(write|leave|rename|keep|join|call|add|use|say)\b", said, re.I
    )
    loads([mended], 1)


@pytest.mark.parametrize("name", REFUSED_COLUMNS)
def test_a_renamed_column_is_metadata(name):
    record = {"prompt": HI, name: "x"} if name == "history" else {"messages": HI, name: "x"}
    told([record])
    [c] = load_conversations(
        [{("my_" + key if key == name else key): value for key, value in record.items()}]
    )
    assert c.metadata == {f"my_{name}": "x"}


@pytest.mark.parametrize("name", REFUSED)
def test_leaving_the_field_or_the_record_out(name):
    told([answer(**{name: "x"}), {"messages": HI}])
    loads([answer(), {"messages": HI}], 2)


def test_answer_is_advised_with_a_column_that_works():
    rows = [{"prompt": "Hi", "aligned": "Hello!", "misaligned": "Go away."}]
    advised = re.search(r"answer='(\w+)'", told(rows))[1]
    loads(rows, 1, answer=advised)
    loads([{"prompt": "Hi", "good": "Hello!", "bad": "Go away."}], 1)  # renamed: only a question
    rows = [{"chosen": HI, "rejected": HI}]
    loads(rows, 1, answer=re.search(r"answer='(\w+)'", told(rows))[1])


def test_the_advised_name_of_an_export(tmp_path):
    data = load_conversations(ROWS)
    with pytest.raises(ConversationError) as caught:
        data.to_json(tmp_path / "a.jsonl.gz")
    name = re.search(r"name the file (\S+) and", str(caught.value))[1]
    path = data.to_json(tmp_path / name)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    loads(tmp_path / "a.jsonl.gz", 2)
