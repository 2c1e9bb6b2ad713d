"""Scorers on exported activations against the same scorers on the model they were exported from; and files
that are wrong in every way they can be."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from concept_tda.concepts.concept import ConceptError, contrastive_concept
from concept_tda.data.conversations import bundled
from concept_tda.foundation.errors import ConceptTDAError
from concept_tda.groups.features import read_features
from concept_tda.groups.sae import SparseAutoencoder
from concept_tda.influence.baselines import MeanLoss, RepSim
from concept_tda.influence.scorers import ActivationGradient, GradDot, ProjectionDifference, VectorFilter
from concept_tda.model.answers import answer_records, with_record
from concept_tda.model.exports import (
    ExportError,
    export_activations,
    export_remote_activations,
    load_activations,
)
from concept_tda.model.loading import LayerError, SiteError, load_model
from concept_tda.model.tracing import POOLINGS, as_prompts

from tiny import tiny_pair

LAYER = 2


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCEPT_TDA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def lm():
    return load_model(tiny_pair("llama", n_layers=3))


@pytest.fixture(scope="module")
def data():
    return bundled("sycophancy")[:16]


@pytest.fixture(scope="module")
def files(lm, data, tmp_path_factory):
    """A file of examples and one of tokens."""
    folder = tmp_path_factory.mktemp("exports")
    export_activations(lm, data, [0, LAYER], folder / "examples.safetensors", progress=False)
    export_activations(lm, data, [0, LAYER], folder / "tokens.safetensors", tokens=True)
    return folder


def as_parquet(path, to, metadata=True):
    """The same content in the other kind of file, rows of examples in another order."""
    tensors, about = load_file(path), json_metadata(path)
    ids = json.loads(about.pop("ids"))
    if "lengths" in tensors:
        ids = np.repeat(ids, tensors["lengths"].numpy()).tolist()
    columns = {"id": ids} | {
        name: [row.tolist() for row in one] for name, one in tensors.items() if name.startswith("layer")
    }
    if "response" in tensors:
        columns["response"] = tensors["response"].bool().tolist()
    else:
        columns = {name: one[::-1] for name, one in columns.items()}
    table = pa.table(columns)
    pq.write_table(table.replace_schema_metadata(about) if metadata else table, to)
    return to


def json_metadata(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return dict(file.metadata())


@pytest.mark.parametrize("kind", ["examples", "tokens"])
@pytest.mark.parametrize("format", ["safetensors", "parquet"])
def test_scores_are_those_of_the_model(lm, data, files, tmp_path, kind, format):
    path = files / f"{kind}.safetensors"
    if format == "parquet":
        path = as_parquet(path, tmp_path / "a.parquet")
    exported = load_activations(path)
    concept = contrastive_concept(lm, data[:4], data[4:8], LAYER, name="c", progress=False)
    own = contrastive_concept(exported, data[:4], data[4:8], LAYER, name="c", progress=False)
    torch.testing.assert_close(own.direction, concept.direction, rtol=1e-5, atol=1e-6)
    chosen = data.select([9, 3, 12, 0, 5, 7])
    for of in (
        lambda lm: VectorFilter(lm, concept),
        lambda lm: RepSim(lm, data[:3], LAYER),
        lambda lm: RepSim(lm, data[:3], 0),
    ):
        found, wanted = (of(one).score(chosen, progress=False) for one in (exported, lm))
        np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-4, atol=1e-5)
        assert found.card.access == "activations" and found.card.model_fingerprint == lm.fingerprint


@pytest.mark.parametrize("pooling", POOLINGS)
def test_tokens_can_be_pooled_in_every_way(lm, data, files, pooling):
    exported = load_activations(files / "tokens.safetensors")
    found, wanted = (
        RepSim(one, data[:3], LAYER, pooling).score(data, progress=False) for one in (exported, lm)
    )
    np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-4, atol=1e-5)


def test_another_pooling_than_that_of_the_rows_is_refused(lm, data, files):
    exported = load_activations(files / "examples.safetensors")
    concept = contrastive_concept(
        lm, data[:4], data[4:8], LAYER, name="c", pooling="prompt_last", progress=False
    )
    for ask in (
        lambda: VectorFilter(exported, concept),
        lambda: RepSim(exported, data[:3], LAYER, "all_but_first"),
        lambda: contrastive_concept(exported, data[:4], data[4:8], LAYER, name="c", pooling="prompt_last"),
    ):
        with pytest.raises(ExportError, match="pooled by response_mean"):
            ask()


def test_projection_difference_with_answers_that_were_exported_too(lm, data, files, tmp_path):
    concept = contrastive_concept(lm, data[:4], data[4:8], LAYER, name="c", progress=False)
    prompts = as_prompts(data)
    records = answer_records(lm, prompts, None, 8, False, dict(max_new_tokens=6, temperature=0.0, seed=0))
    answers = type(data)([with_record(p, r) for p, r in zip(prompts, records) if r["answer"]], "answers")
    assert len(answers) > 10
    rows = [row for row, record in enumerate(records) if record["answer"]]
    export_activations(lm, answers, [0, LAYER], tmp_path / "answers.safetensors", progress=False)
    exported = load_activations([files / "examples.safetensors", tmp_path / "answers.safetensors"])
    found, wanted = (
        ProjectionDifference(one, concept, answers=answers).score(data.select(rows), progress=False)
        for one in (exported, lm)
    )
    np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConceptTDAError, match="answers="):
        ProjectionDifference(exported, concept, progress=False).score(data, progress=False)


class Code(torch.nn.Module):
    """A random sparse code of 32 features."""

    def __init__(self, width):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.W_enc = torch.nn.Parameter(torch.randn(width, 32, generator=generator))
        self.W_dec = torch.nn.Parameter(self.W_enc.detach().T.clone())

    def encode(self, x):
        return (x @ self.W_enc - 3).relu()


def test_sae_features(lm, data, files, tmp_path):
    sae = SparseAutoencoder(Code(16), LAYER, "random")
    exported = load_activations(files / "tokens.safetensors")
    found = read_features(exported, sae, data, tmp_path / "a", progress=False)
    wanted = read_features(lm, sae, data, tmp_path / "b", progress=False)
    assert wanted.max.nnz > 50
    np.testing.assert_allclose(found.max.toarray(), wanted.max.toarray(), atol=1e-5)
    np.testing.assert_allclose(found.mean.toarray(), wanted.mean.toarray(), atol=1e-5)
    with pytest.raises(ExportError, match="tokens is asked for"):
        read_features(load_activations(files / "examples.safetensors"), sae, data, tmp_path / "x")


def test_what_needs_a_model_is_refused(lm, data, files):
    exported = load_activations(files / "examples.safetensors")
    concept = contrastive_concept(lm, data[:4], data[4:8], LAYER, name="c", progress=False)
    for ask, error in (
        (lambda: MeanLoss(exported).score(data, progress=False), ExportError),
        (lambda: ActivationGradient(exported, concept).score(data, progress=False), ExportError),
        (lambda: GradDot(exported, data[:3]).score(data, progress=False), SiteError),
        (lambda: VectorFilter(exported, concept).score(data, tokens=True, progress=False), ExportError),
        (lambda: exported.check_layer(1), LayerError),
    ):
        with pytest.raises(error):
            ask()


def test_ids(lm, data, files):
    exported = load_activations(files / "examples.safetensors")
    with pytest.raises(ExportError, match="3 of 4 conversations.*Export them too"):
        exported.tokenize(bundled("sycophancy")[15:19])


def test_a_concept_of_another_model(data, files):
    other = load_model(tiny_pair("llama", n_layers=3, seed=1))
    concept = contrastive_concept(other, data[:4], data[4:8], LAYER, name="c", progress=False)
    with pytest.raises(ConceptError):
        VectorFilter(load_activations(files / "examples.safetensors"), concept)


def spoilt(files, tmp_path, kind="examples", **changes):
    """A file with other tensors or metadata; None takes one out."""
    path = files / f"{kind}.safetensors"
    tensors, about = load_file(path), json_metadata(path)
    for name, value in changes.items():
        place = tensors if isinstance(value, torch.Tensor) or name in tensors else about
        place[name] = value
    keep = lambda one: {name: value for name, value in one.items() if value is not None}
    save_file(keep(tensors), tmp_path / "s.safetensors", metadata=keep(about))
    return tmp_path / "s.safetensors"


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("examples", {"layer_2": torch.full((16, 16), torch.nan)}, "layer_2.*not finite in 16 of 16 rows"),
        ("examples", {"layer_2": torch.zeros(15, 16)}, r"16 ids make 16 rows.*\(15, 16\)"),
        ("examples", {"layer_2": torch.zeros(16, 8)}, "of one width"),
        ("examples", {"layer_2": torch.zeros(16)}, r"shape \[16\]"),
        ("examples", {"layer_2": torch.zeros(16, 16, dtype=torch.int64)}, "int64"),
        ("examples", {"layer_0": None, "layer_2": None}, "holds no layer"),
        ("examples", {"ids": json.dumps(["a"] * 16)}, "15 ids come twice"),
        ("examples", {"ids": None}, "no metadata 'ids'"),
        ("examples", {"pooling": None}, "how its rows were pooled"),
        ("examples", {"pooling": "median"}, "how its rows were pooled"),
        ("tokens", {"response": None}, "both `lengths` and `response`"),
        ("tokens", {"response": torch.zeros(3, dtype=torch.uint8)}, "rows of one width"),
    ],
)
def test_files_that_are_wrong(files, tmp_path, kind, changes, message):
    with pytest.raises(ExportError, match=message):
        load_activations(spoilt(files, tmp_path, kind, **changes))


def test_what_a_file_lacks_can_be_said(lm, data, files, tmp_path):
    path = as_parquet(files / "examples.safetensors", tmp_path / "a.parquet", metadata=False)
    with pytest.raises(ExportError, match="pooling="):
        load_activations(path)
    exported = load_activations(path, pooling="response_mean", model="far away")
    assert exported.name == "far away" and exported.fingerprint.startswith("exported-")
    found, wanted = (RepSim(one, data[:3], LAYER).score(data, progress=False) for one in (exported, lm))
    np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-4, atol=1e-5)


def test_a_name_that_belies_the_file(lm, data, tmp_path):
    for name in ("a.parquet", "a", "a.st"):
        with pytest.raises(ExportError, match=r"call it .*a\.safetensors"):
            export_activations(lm, data, 2, tmp_path / name)
        with pytest.raises(ExportError, match=r"call it .*a\.safetensors"):
            export_remote_activations("some/model", data, 2, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_files_that_do_not_go_together(lm, data, files, tmp_path):
    export_activations(lm, data[:4], LAYER, tmp_path / "other.safetensors", progress=False)
    with pytest.raises(ExportError, match="not of one model, layers and pooling"):
        load_activations([files / "examples.safetensors", tmp_path / "other.safetensors"])
    for name, content in (("damaged.safetensors", b"x"), ("damaged.parquet", b"PAR1")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ExportError, match="can't be read"):
            load_activations(tmp_path / name)
    pq.write_table(pa.table({"layer_1": [[1.0]]}), tmp_path / "b.parquet")
    with pytest.raises(ExportError, match="no column 'id'"):
        load_activations(tmp_path / "b.parquet")
    pq.write_table(pa.table({"id": ["a", "b"], "layer_1": [[1.0], [1.0, 2.0]]}), tmp_path / "c.parquet")
    with pytest.raises(ExportError, match="equally long"):
        load_activations(tmp_path / "c.parquet")


# -------------------- from a model on a server


@pytest.fixture
def ndif(lm, tmp_path, monkeypatch):
    """nnsight's remote backend with a stand-in for the server: requests are kept, unpacked and run on the
    model there; every other way out of this process is closed. The hub is a folder."""
    import socket

    import nnsight.modeling.huggingface as hub
    import transformers
    import transformers.pipelines
    from nnsight import TransformersModel
    from nnsight.intervention.backends.remote import RemoteBackend
    from nnsight.schema.request import RequestModel

    folder = tmp_path / "hub"
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    for one in (transformers.AutoTokenizer, transformers.AutoConfig):
        real = one.from_pretrained
        given = lambda name, *a, real=real, **k: real(folder if name == "org/tiny" else name, *a, **k)
        monkeypatch.setattr(one, "from_pretrained", given)
    monkeypatch.setitem(hub._ID_CACHE, "org/tiny", "org/tiny")
    monkeypatch.setattr(transformers.pipelines, "get_task", lambda *_: "text-generation")
    sent = []

    def closed(*_, **__):
        raise AssertionError("something else leaves this machine")

    def answer(backend, request, tracer):
        blob = RequestModel.serialize(tracer, compress=False)  # what `_serialize` packs
        sent.append((backend.host, json.loads(request.metadata()), blob))
        there = TransformersModel(load_model(str(folder)).model, tokenizer=lm.tokenizer)
        restored = RequestModel.deserialize(blob, there._remoteable_persistent_objects(), compress=False)
        restored.execute(restored.info.code)
        return {"found": restored.info.frame.f_locals["found"]}

    monkeypatch.setattr(RemoteBackend, "request", answer)
    monkeypatch.setattr(socket.socket, "connect", closed)
    monkeypatch.setattr(socket, "create_connection", closed)
    return sent


def test_activations_of_a_model_on_a_server(lm, data, ndif, tmp_path):
    """What comes back is what the model gives; what goes out is the block, tokens, mask and weights."""
    path = export_remote_activations(
        "org/tiny", data, [0, LAYER], tmp_path / "r.safetensors", token_budget=600, progress=False
    )
    export_activations(lm, data, [0, LAYER], tmp_path / "here.safetensors", progress=False)
    away, here = load_activations(path), load_activations(tmp_path / "here.safetensors")
    side = lambda model: contrastive_concept(model, data[:6], data[6:12], LAYER, name="side", progress=False)
    for scorer in (
        lambda model: VectorFilter(model, side(model)),
        lambda model: RepSim(model, data[:3], LAYER),
    ):
        results = [scorer(one).score(data, progress=False) for one in (away, here)]
        np.testing.assert_allclose(*(one.scores for one in results), rtol=1e-4, atol=1e-6)
        assert results[0].card.access == "activations" and results[0].card.model == "org/tiny"
    again = export_remote_activations(
        "org/tiny", data[:4], LAYER, tmp_path / "more.safetensors", progress=False
    )
    VectorFilter(load_activations(again), side(away))  # another file of the same model takes its concept
    assert len(ndif) > 1  # a request for each batch
    for host, envelope, blob in ndif:
        assert host == "https://api.ndif.us" and json.loads(envelope["model_key"].split(":", 1)[1]) == {
            "repo_id": "org/tiny",
            "revision": None,
            "task": "text-generation",
        }
        assert b"einsum" in blob and b"concept_tda.data" not in blob and str(tmp_path).encode() not in blob
        for one in data:
            for message in one.messages:
                assert message["content"][:25].encode() not in blob and one.id.encode() not in blob


def test_a_server_that_refuses_or_a_folder(lm, data, ndif, tmp_path, monkeypatch):
    from nnsight.intervention.backends.remote import RemoteBackend, RemoteError

    def refuses(*_):
        raise RemoteError("org/tiny is not deployed")

    monkeypatch.setattr(RemoteBackend, "request", refuses)
    with pytest.raises(ExportError, match="not deployed.*nnsight.ndif.status.*set_default_api_key"):
        export_remote_activations("org/tiny", data, 1, tmp_path / "r.safetensors", progress=False)
    with pytest.raises(ExportError, match="is a folder here"):
        export_remote_activations(str(tmp_path / "hub"), data, 1, tmp_path / "r.safetensors")
    with pytest.raises(LayerError, match="layer 9"):
        export_remote_activations("org/tiny", data, 9, tmp_path / "r.safetensors")
    assert not (tmp_path / "r.safetensors").exists()
