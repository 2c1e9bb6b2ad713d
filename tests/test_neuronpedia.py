"""Descriptions of features by Neuronpedia: every form they come in, and whose they must be."""

import gzip
import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_matrix

from concept_tda.data.conversations import load_conversations
from concept_tda.groups.groups import Groups
from concept_tda.groups.labels import LabelError, label_groups
from concept_tda.groups.neuronpedia import NeuronpediaError, beside_neuronpedia, read_neuronpedia
from concept_tda.groups.sae import SparseAutoencoder

F, NAME = 12, "gemma-2-2b/20-gemmascope-res-16k"


def an_sae(neuronpedia_id=NAME, layer=21):
    """An SAE that only has shapes and the name that SAELens would know."""
    metadata = type("metadata", (), {"neuronpedia_id": neuronpedia_id})
    cfg = type("cfg", (), {"metadata": metadata})
    code = type("Code", (), {"W_dec": torch.randn(F, 4), "W_enc": torch.randn(4, F), "cfg": cfg})
    return SparseAutoencoder(code(), layer, "gemma/res")


def of_the_api(index=7, **changes):
    """A record as `/api/feature/…` gives it, shortened."""
    record = {
        "modelId": "gemma-2-2b",
        "layer": "20-gemmascope-res-16k",
        "index": str(index),
        "frac_nonzero": 0.002,
        "pos_str": ["vendor"],
        "explanations": [
            {"description": " terms of trade", "explanationModelName": "gpt-4o-mini", "typeName": "oai"},
            {"description": "vendors", "explanationModelName": "gemini-2.0-flash", "typeName": "np"},
        ],
    }
    return record | changes


def of_an_export(index, description="d"):
    return {
        "modelId": "gemma-2-2b",
        "layer": "20-gemmascope-res-16k",
        "index": str(index),
        "description": description,
        "explanationModelName": "gpt-4o-mini",
    }


def test_a_record_of_the_api(tmp_path):
    table = read_neuronpedia(of_the_api(), an_sae())
    assert table.index.tolist() == [7, 7] and table["theirs"].tolist() == ["terms of trade", "vendors"]
    assert table["said_by"].tolist() == ["gpt-4o-mini", "gemini-2.0-flash"]
    (tmp_path / "7.json").write_text(json.dumps(of_the_api()))
    pd.testing.assert_frame_equal(read_neuronpedia(tmp_path / "7.json", an_sae()), table)
    pd.testing.assert_frame_equal(read_neuronpedia([of_the_api(), of_the_api()], an_sae()), table)


def test_exports_in_every_form_are_the_same_table(tmp_path):
    records = [of_an_export(i, f"feature {i}") for i in (5, 0, 11)]
    lines = "\n".join(map(json.dumps, records)) + "\n"
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "b.jsonl").write_text(lines)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "batch-0.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    expected = read_neuronpedia(records, an_sae())
    assert expected.index.tolist() == [0, 5, 11] and expected.loc[5, "theirs"] == "feature 5"
    for place in ("a.json", "b.jsonl", "folder", "folder/batch-0.jsonl.gz"):
        pd.testing.assert_frame_equal(read_neuronpedia(str(tmp_path / place), an_sae()), expected)


def test_features_without_a_description_are_left_out():
    silent = of_the_api(index=3, explanations=[])
    table = read_neuronpedia([silent, of_the_api(), of_an_export(4, "")], an_sae())
    assert set(table.index) == {7}
    with pytest.raises(NeuronpediaError, match="holds no descriptions"):
        read_neuronpedia(silent, an_sae())


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"modelId": "gemma-2-9b"}, "another model, whose feature 7"),
        ({"layer": "19-gemmascope-res-16k"}, "another layer or SAE"),
        ({"layer": "20-gemmascope-res-65k"}, "another layer or SAE"),
        ({"index": str(F)}, "has features 0 to 11"),
        ({"index": "seven"}, "is no number"),
        ({"modelId": None}, "has no modelId"),
    ],
)
def test_records_of_another_feature_are_refused(changes, match):
    with pytest.raises(NeuronpediaError, match=match):
        read_neuronpedia([of_the_api(index=2), of_the_api(**changes)], an_sae())


def test_the_sae_must_be_known_by_name():
    unnamed = an_sae(None)
    with pytest.raises(NeuronpediaError, match="does not say what Neuronpedia calls it"):
        read_neuronpedia(of_the_api(), unnamed)
    assert len(read_neuronpedia(of_the_api(), unnamed, sae_id=NAME)) == 2
    with pytest.raises(NeuronpediaError, match="not '20-gemmascope-res-16k'"):
        read_neuronpedia(of_the_api(), unnamed, sae_id="20-gemmascope-res-16k")
    with pytest.raises(NeuronpediaError, match="leave sae_id= out"):
        read_neuronpedia(of_the_api(), an_sae(), sae_id="gemma-2-2b/20-gemmascope-res-65k")


@pytest.mark.parametrize("layer, fits", [(20, True), (21, True), (19, False), (22, False)])
def test_the_block_is_the_one_the_sae_reads(layer, fits):
    if fits:  # before the block or after it: SAELens says which, the name does not
        assert len(read_neuronpedia(of_the_api(), an_sae(layer=layer))) == 2
        return
    with pytest.raises(NeuronpediaError, match="features of another layer"):
        read_neuronpedia(of_the_api(), an_sae(layer=layer))


def test_damaged_and_absent_files(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(of_an_export(1)) + '\n{"modelId": ')
    with pytest.raises(NeuronpediaError, match="x.jsonl, line 2: not JSON"):
        read_neuronpedia(tmp_path / "x.jsonl", an_sae())
    (tmp_path / "y.jsonl.gz").write_bytes(gzip.compress(b"{}" * 100)[:-9])
    with pytest.raises(NeuronpediaError, match="cannot be read"):
        read_neuronpedia(tmp_path / "y.jsonl.gz", an_sae())
    with pytest.raises(NeuronpediaError, match="no such file"):
        read_neuronpedia(tmp_path / "none", an_sae())
    with pytest.raises(NeuronpediaError, match="not a int"):
        read_neuronpedia(7, an_sae())


def test_their_text_cannot_break_out():
    table = read_neuronpedia(of_an_export(1, "plain\x1b[2J\x00text"), an_sae())
    assert not {"\x1b", "\x00"} & set(table.loc[1, "theirs"]) and "text" in table.loc[1, "theirs"]


class Knowing:
    """A reader that calls everything praise, and knows praise when it sees it."""

    name = "knowing"

    def __init__(self, naming="praise"):
        self.naming, self.asked = naming, []

    def texts(self, prompts, *, max_tokens, progress):
        self.asked += prompts
        return [
            self.naming if prompt.startswith("Two numbered lists") else self.judge(prompt)
            for prompt in prompts
        ]

    def judge(self, prompt):
        fits, other = (re.search(rf"If it {way}, reply (\d+)", prompt)[1] for way in ("does", "does not"))
        return fits if ("wise" in prompt) == ("praise" in prompt) else other


@pytest.fixture
def kinds():
    chats = load_conversations(
        [
            {"prompt": f"Is {i} so?", "response": f"{i} is wise" if i % 2 else f"{i} is odd"}
            for i in range(200)
        ]
    )
    wise = np.arange(200) % 2 == 1
    return Groups(chats, ["7 ours", "9"], csr_matrix(np.stack([wise, ~wise], 1)), "features")


def test_beside_ours_by_the_number_of_the_feature(kinds):
    theirs = read_neuronpedia([of_the_api(), of_an_export(3)], an_sae())
    table = beside_neuronpedia(label_groups(kinds, Knowing(), progress=False), theirs)
    assert table["group"].tolist() == ["7 ours", "9"] and table["ours"][0] == "praise"
    assert table["Neuronpedia (untested here)"][0] == "terms of trade"  # the first of the two
    assert pd.isna(table["Neuronpedia (untested here)"][1]) and table["passed"].tolist()[0]
    named = Groups(kinds.conversations, ["wise", "odd"], kinds.members, "hand")
    with pytest.raises(NeuronpediaError, match="'wise' is not called by the number"):
        beside_neuronpedia(label_groups(named), theirs)


def test_their_description_is_tested_without_being_asked_for(kinds):
    reader = Knowing()
    given = {"7 ours": "praise, they say", "9": "terms of trade"}
    found = label_groups(kinds, reader, given=given, progress=False)
    assert not any(prompt.startswith("Two numbered lists") for prompt in reader.asked)
    first, second = found.table.to_dict("records")
    assert first["label"] == "praise, they say" and first["passed"] and first["balanced_accuracy"] == 1
    assert second["passed"] and found.settings["given"] == sorted(given)
    with pytest.raises(LabelError, match="names 1 groups there are not, the first '8'"):
        label_groups(kinds, reader, given={"8": "x"}, progress=False)
    half = label_groups(kinds, Knowing(), given={"9": "nothing of the kind"}, progress=False)
    assert half.table["label"][0] == "praise"
