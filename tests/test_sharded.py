"""A model whose weights are sharded over two processes by FSDP2 is scored like a whole one; what would make
the processes wait for each other for ever is refused."""

import os
from pathlib import Path

import pytest
import torch

from concept_tda.concepts.concept import Concept
from concept_tda.data.conversations import load_conversations
from concept_tda.foundation.processes import in_processes, wait_for_all
from concept_tda.influence.baselines import MeanLoss
from concept_tda.influence.curvature import EKFAC
from concept_tda.influence.engine import EngineError, direction_readout, shared_pass
from concept_tda.influence.scorers import ConceptInfluence, GradDot, VectorFilter, score_together
from concept_tda.model.loading import ModelError, load_model
from concept_tda.model.sites import resolve_sites
from concept_tda.model.training import TrainingError, train

from tiny import tiny_pair

DATA = load_conversations(
    [{"prompt": f"What is {i}?", "response": "It is " + "so " * (i % 5) + f"{i}."} for i in range(23)]
)
QUERY = DATA.select([0, 3])


@pytest.fixture(autouse=True)
def found_by_others(monkeypatch, tmp_path):
    here = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("CONCEPT_TDA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


def whole():
    torch.set_num_threads(1)
    return load_model(tiny_pair("llama-tied", dtype=torch.float64))


def scores(lm):
    """By activations, losses and gradients, in one pass of blocks that two processes cannot share evenly."""
    concept = Concept("it", torch.ones(lm.width, dtype=torch.float64), 1)
    scorers = [
        VectorFilter(lm, concept),
        MeanLoss(lm),
        GradDot(lm, QUERY, sites="all-linear"),
        ConceptInfluence(lm, Concept("it", concept.direction, 2), QUERY, curvature="identity"),
    ]
    together = score_together(scorers, DATA, progress=False, token_budget=200)
    together = {method: result.scores for method, result in together.items()}
    alone = VectorFilter(lm, concept).score(DATA, progress=False, token_budget=200).scores
    return together | {"a pass that ends early": alone}


def refused(lm, place):
    sites = resolve_sites(lm)
    readout = direction_readout(
        sites, {s.name: torch.ones(s.out_features, s.in_features) for s in sites}, "difference"
    )
    said = {}
    for name, kind, call in (
        ("fit", ModelError, lambda: EKFAC.fit(lm, DATA, progress=False)),
        ("difference", EngineError, lambda: shared_pass(lm, DATA, {"it": readout}, progress=False)),
        ("train", TrainingError, lambda: train(lm, DATA, place)),
    ):
        with pytest.raises(kind) as error:
            call()
        said[name] = str(error.value)
    return said


def in_two(place):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    wait_for_all()
    lm = whole()
    mesh = init_device_mesh("cpu", (2,))
    for block in lm.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(lm.model, mesh=mesh)
    local = lm.blocks[0].mlp.up_proj.weight.to_local().shape
    lm = load_model((lm.model, lm.tokenizer))
    before = lm.fingerprint
    found = scores(lm)
    left = [name for name, weight in lm.model.named_parameters() if weight.grad is not None]
    return {
        "scores": found,
        "fingerprints": (before, lm.fingerprint),
        "local": tuple(local),
        "left": left,
        "parameters": lm.n_parameters,
        "said": refused(lm, place),
    }


def test_two_processes_with_half_the_weights_each_score_as_one_with_all(tmp_path):
    lm = whole()
    found = in_processes(in_two, tmp_path / "run", num_processes=2)
    assert found["local"][0] * 2 == lm.blocks[0].mlp.up_proj.out_features and not found["left"]
    assert set(found["fingerprints"]) == {lm.fingerprint} and found["parameters"] == lm.n_parameters
    for method, expected in scores(lm).items():
        assert abs(found["scores"][method] - expected).max() <= 1e-12 * abs(expected).max(), method
    assert "device_map" in found["said"]["fit"] and "engine='reverse'" in found["said"]["difference"]
    assert "sharded" in found["said"]["train"]


def test_the_older_kind_of_sharding_is_refused_by_name():
    class FullyShardedDataParallel(torch.nn.Linear):
        pass

    lm = whole()
    lm.model.model.layers[0].mlp.up_proj = FullyShardedDataParallel(16, 8)
    with pytest.raises(ModelError, match="fully_shard"):
        load_model((lm.model, lm.tokenizer))
