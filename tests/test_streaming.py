"""Streams: parts score as the whole does; what is lost is made again; what cannot be streamed is refused."""

import gzip
import io
import json
import tarfile

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import concept_tda.influence.streaming as streaming
from concept_tda.concepts.concept import tensor_concept
from concept_tda.data.conversations import load_conversations
from concept_tda.influence.baselines import BM25, MeanLoss
from concept_tda.influence.scorers import GradDot, InfluenceFunction, ScorerError, VectorFilter
from concept_tda.influence.streaming import score_stream, stream_records
from concept_tda.model.loading import load_model
from concept_tda.results.folders import ScoreFolder
from concept_tda.results.metrics import AttributionError

from tiny import tiny_pair

RECORDS = [
    {"prompt": f"What is {i} and {i + 1}?", "response": "It is " + "so " * (i % 7) + f"{2 * i}.", "n": i}
    for i in range(50)
]


@pytest.fixture(scope="module")
def lm():
    torch.set_num_threads(1)
    return load_model(tiny_pair("llama", n_layers=2, width=16, dtype=torch.float64))


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("CONCEPT_TDA_CACHE", str(tmp_path / "cache"))


def scorers(lm):
    concept = tensor_concept(torch.randn(16, generator=torch.Generator().manual_seed(0)), 1, name="c", lm=lm)
    return [VectorFilter(lm, concept), GradDot(lm, load_conversations(RECORDS)[:3]), MeanLoss(lm)]


def stream(lm, folder, source=RECORDS, **options):
    options = dict(part_examples=16, token_budget=200, progress=False) | options
    return score_stream(scorers(lm), source, folder, **options)


def test_the_scores_of_parts_are_those_of_the_whole(lm, tmp_path):
    found = stream(lm, tmp_path / "s")
    for scorer in scorers(lm):
        whole = scorer.score(load_conversations(RECORDS), progress=False)
        assert np.allclose(found.scores(whole.card.method), whole.scores, rtol=1e-9, atol=1e-12)
        for mine, theirs in (
            (found.top(50, scorer.method), whole.top(50)),
            (found.bottom(9, scorer.method), whole.bottom(9)),
        ):
            assert mine.ids == theirs.ids and np.array_equal(mine.rows, theirs.rows)
            assert np.array_equal(mine.ranks, theirs.ranks)
            assert np.allclose(mine.percentiles, theirs.percentiles)
            assert np.allclose(mine.distances, theirs.distances, equal_nan=True)
        assert mine.conversations[0].metadata == theirs.conversations[0].metadata
    assert repr(found) == "ScoreFolder(s: 50 examples in 4 parts; Vector Filter, GradDot, Loss)"
    for n in (0, -1, 2.5, True):
        with pytest.raises(AttributionError, match="at least one example"):
            found.top(n, "GradDot")
    table = found.compare()
    assert table.shape == (3, 3) and np.allclose(np.diag(table), 1)


def test_a_stream_that_dies_goes_on_where_it_was(lm, tmp_path, monkeypatch):
    expected = stream(lm, tmp_path / "whole")
    made, score = [], streaming._score_part

    def dying(folder, number, *rest):
        if number == 2 and len(made) == 2:
            raise KeyboardInterrupt
        made.append(number)
        score(folder, number, *rest)

    monkeypatch.setattr(streaming, "_score_part", dying)
    with pytest.raises(KeyboardInterrupt):
        stream(lm, tmp_path / "cut")
    with pytest.raises(AttributionError, match="no finished folder"):
        ScoreFolder(tmp_path / "cut")
    made.append("again")
    found = stream(lm, tmp_path / "cut")
    assert made == [0, 1, "again", 2, 3]
    assert [part["checksum"] for part in found.manifest["parts"]] == [
        part["checksum"] for part in expected.manifest["parts"]
    ]


def test_every_flipped_byte_of_a_part_is_found(lm, tmp_path):
    found = stream(lm, tmp_path / "s")
    path = tmp_path / "s" / "part-000001.parquet"
    content = path.read_bytes()
    for place in range(0, len(content), len(content) // 40):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(bytes(damaged))
        assert found.verify() == [path.name]
    manifest = tmp_path / "s" / "_manifest.json"
    manifest.write_text(manifest.read_text().replace('"rows": 50', '"rows": 51'))
    with pytest.raises(AttributionError, match="changed after it was written"):
        ScoreFolder(tmp_path / "s")


def test_another_stream_or_question_is_not_written_over(lm, tmp_path):
    stream(lm, tmp_path / "s")
    with pytest.raises(ScorerError, match=r"part 0 of another run \(records differ\)"):
        stream(lm, tmp_path / "s", RECORDS[1:])
    with pytest.raises(ScorerError, match=r"another run \(token_budget differ\)"):
        stream(lm, tmp_path / "s", token_budget=300)
    with pytest.raises(ScorerError, match=r"another run \(readouts differ\)"):
        score_stream([MeanLoss(lm)], RECORDS, tmp_path / "s", part_examples=16, token_budget=200)


def test_what_needs_more_than_its_own_example_is_refused(lm, tmp_path):
    queries = load_conversations(RECORDS)[:2]
    with pytest.raises(ScorerError, match="BM25 needs more than an example"):
        score_stream([BM25(queries)], RECORDS, tmp_path)
    with pytest.raises(ScorerError, match="fitted on each part anew"):
        score_stream([InfluenceFunction(lm, queries)], RECORDS, tmp_path)
    with pytest.raises(ScorerError, match="at least one scorer"):
        score_stream([], RECORDS, tmp_path)
    with pytest.raises(ScorerError, match="no records"):
        score_stream([MeanLoss(lm)], iter(()), tmp_path)


def test_records_come_out_of_every_kind_of_file(tmp_path):
    lines = "\n".join(json.dumps(record) for record in RECORDS).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    pd.DataFrame(RECORDS).to_parquet(tmp_path / "c.parquet")
    with tarfile.open(tmp_path / "d.tar", "w") as archive:
        for i, record in enumerate(RECORDS):
            data = json.dumps(record).encode()
            about = tarfile.TarInfo(f"{i:06d}.json")
            about.size = len(data)
            archive.addfile(about, io.BytesIO(data))
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "d.tar"):
        assert list(stream_records(tmp_path / name)) == RECORDS
    assert len(list(stream_records(tmp_path))) == 4 * len(RECORDS)
    with pytest.raises(ScorerError, match="a piece at a time"):
        stream_records(tmp_path / "absent.csv")
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n{"a"')
    with pytest.raises(ScorerError, match=r"a\.jsonl, line 2: broken JSON"):
        list(stream_records(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "response": "b", "prompt": "c"}\n')
    with pytest.raises(ScorerError, match="line 1: two fields of one object are called 'prompt'"):
        list(stream_records(tmp_path / "a.jsonl"))  # as when the file is loaded whole
    (tmp_path / "rest.csv").write_text("prompt,response\na,b\n")
    (tmp_path / "README.md").write_text("no data")
    for source in (tmp_path, [tmp_path / "c.parquet", tmp_path / "rest.csv"]):
        with pytest.raises(ScorerError, match=r"rest\.csv: cannot be read a piece at a time"):
            stream_records(source)


def shard(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return path.read_bytes()


def test_a_damaged_file_of_the_source_is_no_shorter_stream(tmp_path):
    """tarfile takes a broken header for the end of the archive: the rest of a shard would be lost unseen."""
    members = {f"{i:03d}.json": json.dumps(record).encode() for i, record in enumerate(RECORDS[:4])}
    path = tmp_path / "a.tar"
    content = shard(path, members)
    assert list(stream_records(path)) == RECORDS[:4]
    for place in (1024 + 3, 2048 + 150, 3 * 1024 + 100):  # heads of the second to the fourth member
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ScorerError, match=rf"a.tar is damaged .*byte {place // 1024 * 1024}"):
            list(stream_records(path))
    for length in (0, 300, 1024, 1024 + 600, 3 * 1024):
        path.write_bytes(content[:length])
        with pytest.raises(ScorerError, match="a.tar is damaged or ends too early"):
            list(stream_records(path))
    lines = "\n".join(map(json.dumps, RECORDS)).encode()
    packed = gzip.compress(lines, mtime=0)
    for place in range(12, len(packed), len(packed) // 12):
        (tmp_path / "b.jsonl.gz").write_bytes(
            packed[:place] + bytes([packed[place] ^ 1]) + packed[place + 1 :]
        )
        with pytest.raises(ScorerError, match=r"b\.jsonl\.gz(, line| is damaged)"):
            list(stream_records(tmp_path / "b.jsonl.gz"))
    (tmp_path / "b.jsonl.gz").write_bytes(packed[:-20])
    with pytest.raises(ScorerError, match=r"b\.jsonl\.gz is damaged"):
        list(stream_records(tmp_path / "b.jsonl.gz"))
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "c.parquet", write_page_checksum=True)
    content = (tmp_path / "c.parquet").read_bytes()
    for place in range(4, len(content), len(content) // 15):
        (tmp_path / "c.parquet").write_bytes(
            content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        )
        try:
            assert list(stream_records(tmp_path / "c.parquet")) == RECORDS  # what no column holds
        except ScorerError as err:
            assert "c.parquet is damaged" in str(err)


def test_what_a_shard_holds_beside_its_examples_is_not_left_out_unseen(tmp_path):
    shard(tmp_path / "a.tar", {"0.json": b'{"prompt": "a", "response": "b"}', "0.jpg": b"..."})
    with pytest.raises(ScorerError, match=r"a\.tar, 0\.jpg: would be left out"):
        list(stream_records(tmp_path / "a.tar"))


@pytest.mark.parametrize("package", ["pandas", "polars", "duckdb"])
def test_a_folder_is_a_table_to_others(lm, tmp_path, package):
    """The lines of the page, read by the packages themselves."""
    other, folder = pytest.importorskip(package), stream(lm, tmp_path / "s").folder
    score, one = "score GradDot", ScoreFolder(tmp_path / "s")
    if package == "pandas":
        table = other.read_parquet(folder, columns=["id", "row", score]).nlargest(10, score)
    elif package == "polars":
        lazy = other.scan_parquet(f"{folder}/*.parquet").select("id", "row", score)
        table = lazy.top_k(10, by=score).collect().to_pandas()
    else:
        asked = f"""select id, row, "{score}" from '{folder}/*.parquet' order by "{score}" desc limit 10"""
        table = other.sql(asked).df()
    top = one.top(10, "GradDot")
    assert table["id"].tolist() == top.ids and table["row"].tolist() == top.rows.tolist()
    assert table[score].tolist() == top.scores.tolist()


def test_a_streamed_data_set_is_read_as_it_comes(lm, tmp_path):
    datasets = pytest.importorskip("datasets")
    given = datasets.Dataset.from_list(RECORDS).to_iterable_dataset()
    assert np.array_equal(
        stream(lm, tmp_path / "a", given).scores(MeanLoss.method),
        stream(lm, tmp_path / "b").scores(MeanLoss.method),
    )


def test_dropping_leaves_the_other_records_in_order(lm, tmp_path):
    found = stream(lm, tmp_path / "s")
    whole = scorers(lm)[0].score(load_conversations(RECORDS), progress=False)
    for how in (dict(fraction=0.1), dict(count=7, lowest=True), dict(threshold=float(whole.scores.mean()))):
        found.drop(tmp_path / "kept.jsonl", method="Vector Filter", overwrite=True, **how)
        kept = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
        assert load_conversations(kept).ids == whole.drop(**how).ids
        assert all(record in RECORDS for record in kept)
