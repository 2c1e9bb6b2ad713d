"""A local Ray: its workers write what score_stream writes, to the last digit, and nothing twice. Starting Ray
takes half a minute, so this is left to `make test-all`, where ray is installed."""

import json
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from concept_tda.concepts.concept import tensor_concept
from concept_tda.data.conversations import load_conversations
from concept_tda.foundation.errors import MissingExtraError
from concept_tda.influence.baselines import MeanLoss
from concept_tda.influence.scorers import GradDot, ScorerError, VectorFilter
from concept_tda.influence.streaming import PartScorer, score_on_ray, score_stream
from concept_tda.model.loading import load_model
from concept_tda.results.folders import ScoreFolder

from tiny import tiny_pair

RECORDS = [
    {"prompt": f"What is {i} and {i + 1}?", "response": "It is " + "so " * (i % 7) + f"{2 * i}.", "n": i}
    for i in range(50)
]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("CONCEPT_TDA_CACHE", str(tmp_path / "cache"))


def make():
    """On each worker: the model, and its scorers."""
    torch.set_num_threads(1)
    lm = load_model(tiny_pair("llama", n_layers=2, width=16, dtype=torch.float64))
    concept = tensor_concept(torch.randn(16, generator=torch.Generator().manual_seed(0)), 1, name="c", lm=lm)
    return [VectorFilter(lm, concept), GradDot(lm, load_conversations(RECORDS)[:3]), MeanLoss(lm)]


def table(records):
    import pyarrow as pa

    return pa.Table.from_pylist(records)


def test_a_worker_makes_its_scorers_once_and_no_part_twice(tmp_path):
    """What Ray does with a worker, without Ray."""
    made = []
    worker = PartScorer(lambda: made.append(1) or make(), tmp_path, token_budget=200)
    numbers = [worker(table(RECORDS[i : i + 16]))["part"][0].as_py() for i in range(0, 50, 16)]
    assert len(made) == 1 and len(set(numbers)) == 4
    files = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.parquet")}
    other = PartScorer(make, tmp_path, token_budget=200)  # another machine is dealt the same batch
    assert other(table(RECORDS[16:32]))["part"][0].as_py() == numbers[1]
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.parquet")} == files
    flipped = tmp_path / f"part-{numbers[1]}.parquet"
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    other(table(RECORDS[16:32]))
    assert flipped.stat().st_mtime_ns != files[flipped.name]  # it was made again
    with pytest.raises(ScorerError, match="of another run .*readouts differ"):
        PartScorer(lambda: make()[2:], tmp_path, token_budget=200)(table(RECORDS[16:32]))


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_the_extra_is_named(tmp_path):
    with pytest.raises(MissingExtraError, match=r"concept_tda\[ray\]"):
        score_on_ray(make, None, tmp_path)


@pytest.mark.slow
def test_a_local_ray_gives_the_stream_to_the_last_digit(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import a test
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    expected = score_stream(
        make(), RECORDS, tmp_path / "s", part_examples=16, token_budget=200, progress=False
    )
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        ds = ray.data.from_items(RECORDS, override_num_blocks=1)
        asked = dict(part_examples=16, token_budget=200, name="s", workers=1)
        found = score_on_ray(make, ds, tmp_path / "r", **asked)
        files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "r").glob("*.parquet")}
        again = score_on_ray(make, ds, tmp_path / "r", **asked)
        assert not ds.context.execution_options.preserve_order
    finally:
        ray.shutdown()
    for folder in (found, again, ScoreFolder(tmp_path / "r")):
        for method in expected.methods:
            assert np.array_equal(folder.scores(method), expected.scores(method))
            assert folder.top(5, method).ids == expected.top(5, method).ids
        assert not folder.verify() and folder.compare(expected).shape == (6, 6)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "r").glob("*.parquet")} == files
    assert found.drop(tmp_path / "kept.jsonl", count=3, method="GradDot") == 47
    kept = [json.loads(line) for line in (tmp_path / "kept.jsonl").open()]
    assert [one["n"] for one in kept] == [
        n for n in range(50) if n not in expected.top(3, "GradDot").rows.tolist()
    ]
