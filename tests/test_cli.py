"""The command line: the same scores as the library's, files byte for byte, and each mistake in one line."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
import typer
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from typer.testing import CliRunner

import concept_tda.influence.engine as directional
from concept_tda.cli import app
from concept_tda.commands.methods import METHODS
from concept_tda.concepts.concept import contrastive_concept, tensor_concept
from concept_tda.data.conversations import load_conversations
from concept_tda.data.preferences import load_preferences
from concept_tda.data.templates import chat_template_text, template_names
from concept_tda.demo import last_state
from concept_tda.influence import baselines, neighbours, scorers
from concept_tda.influence.curvature import EKFAC
from concept_tda.influence.pairs import load_pair_attribution, score_preferences
from concept_tda.model.loading import load_model
from concept_tda.results.attribution import load_attribution
from concept_tda.results.metrics import percent_text

from tiny import tiny_pair

ROOT = Path(__file__).resolve().parent.parent
MORE = (
    "tracin",
    "less",
    "cascade",
    "source",
    "training-influence",
)  # these want more than a concept and queries
PLAIN = [name for name in METHODS if name not in MORE]
N = 14


def json_lines(questions_and_answers) -> bytes:
    """JSONL with odd spacing, key order, escapes and Windows line ends, so that only a byte-for-byte copy
    passes."""
    lines = []
    for i, (question, answer) in enumerate(questions_and_answers):
        record = {"row": i, "flattering": i % 3 == 0, "response": answer, "prompt": question}
        lines.append(
            json.dumps(record, ensure_ascii=i % 2 == 0, separators=((", ", ": "), (",", ":  "))[i % 2])
        )
    return "\r\n".join(lines).encode()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, concepts and data; nobody writes in it."""
    folder = tmp_path_factory.mktemp("place")
    for part in tiny_pair("llama"):
        part.save_pretrained(folder / "model")
    for part in tiny_pair("llama", seed=1):
        part.save_pretrained(folder / "other")
    for part in tiny_pair("llama", width=32):
        part.save_pretrained(folder / "wide")
    direction = torch.arange(16.0) - 7
    tensor_concept(direction, 1, name="flattery", lm=load_model(folder / "model")).save(
        folder / "flattery.safetensors"
    )
    (folder / "train.jsonl").write_bytes(
        json_lines(
            [(f"Is {i} á good number?", "yes, " + "the wise one! " * (i % 4) + f"no {i}") for i in range(N)]
        )
    )
    (folder / "answers.jsonl").write_bytes(
        json_lines([("Am I wise?", "the wisest, yes"), ("Is it good?", "yes, the good one")])
    )
    (folder / "positive.jsonl").write_bytes(
        json_lines([(f"Am I {i}?", f"yes! the best {i}") for i in range(6)])
    )
    (folder / "negative.jsonl").write_bytes(json_lines([(f"Am I {i}?", f"no, it is {i}") for i in range(6)]))
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder and an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONCEPT_TDA_CACHE", str(tmp_path / "cache"))
    return tmp_path


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def ok(*arguments):
    result = call(*arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


def refused(code, *arguments):
    """The one line on stderr of a command that ends with `code`."""
    result = call(*arguments)
    assert result.exit_code == code, result.output + repr(result.exception)
    assert "Traceback" not in result.output and not result.stdout.strip()
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    return result.stderr[result.stderr.index("Error: ") :]


@pytest.fixture(scope="module")
def scored(place, tmp_path_factory):
    """Every method on the training file, in a folder of results, and what the command printed."""
    folder = tmp_path_factory.mktemp("scored")
    result = ok(
        "score",
        place / "model",
        place / "train.jsonl",
        "--concept",
        place / "flattery.safetensors",
        "--queries",
        place / "answers.jsonl",
        "--methods",
        ",".join(PLAIN[:5]),
        *(word for method in PLAIN[5:] for word in ("--methods", method)),
        "--damping",
        "0.3",
        "--tokens",
        "--out",
        folder / "scores",
    )
    return folder / "scores", result.stdout


# ---- score


def test_every_method_gives_the_scores_of_the_library(place, scored):
    folder, _ = scored
    assert {path.stem for path in folder.iterdir()} == set(PLAIN)
    lm, train, queries = (
        load_model(place / "model"),
        load_conversations(place / "train.jsonl"),
        load_conversations(place / "answers.jsonl"),
    )
    from concept_tda.concepts.concept import Concept

    concept = Concept.load(place / "flattery.safetensors")

    def ekfac(layer=None):
        return EKFAC.fit(lm, train, "attention", layer=layer, damping=0.3, cache=False, progress=False)

    library = {
        "vector-filter": scorers.VectorFilter(lm, concept),
        "activation-gradient": scorers.ActivationGradient(lm, concept),
        "projection-difference": scorers.ProjectionDifference(lm, concept),
        "concept-influence": scorers.ConceptInfluence(lm, concept, queries, curvature=ekfac(layer=1)),
        "influence-function": scorers.InfluenceFunction(lm, queries, curvature=ekfac()),
        "graddot": scorers.GradDot(lm, queries),
        "gradcos": neighbours.GradCos(lm, queries),
        "random-direction": baselines.RandomDirection(lm, concept, train, progress=False),
        "loss": baselines.MeanLoss(lm),
        "repsim": baselines.RepSim(lm, queries, 1),
        "residual-change": neighbours.ResidualChange(lm, concept),
    }
    direct = {
        "random": baselines.RandomScore(),
        "length": baselines.ResponseLength(),
        "bm25": baselines.BM25(queries),
    }
    tokenized = lm.tokenize(train)
    for method in PLAIN:
        saved = load_attribution(folder / f"{method}.parquet")
        expected = (
            direct[method].direct(tokenized)
            if method in direct
            else library[method].score(train, progress=False).scores
        )
        np.testing.assert_allclose(
            saved.scores, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max(), err_msg=method
        )
        assert saved.conversations.ids == train.ids
    assert load_attribution(folder / "concept-influence.parquet").card.damping.startswith("0.3 ×")
    assert load_attribution(folder / "vector-filter.parquet").token_scores is not None


def test_the_five_most_influential_examples_are_printed_with_text_and_score(scored):
    folder, printed = scored
    for path in folder.iterdir():
        result = load_attribution(path)
        start = printed.index(f"\n{result.card.method} · ")
        lines = printed[start:].split("\n\n")[0].splitlines()
        pattern = r"\s*(\d+) +([\d.]+ %) +([+-][\d.]+)? {4,}(\S.*)"
        found = [re.fullmatch(pattern, line) for line in lines]
        best, rows = result.top(5), [one.groups() for one in found if one]
        assert [row[0] for row in rows] == [str(rank) for rank in best.ranks]
        assert [row[1] for row in rows] == [percent_text(percentile) for percentile in best.percentiles]
        assert [row[2] or "" for row in rows] == [best.leading.number(i) for i in range(5)]
        for row, conversation in zip(rows, best.conversations):
            assert row[3] == conversation.prompt[0]["content"]
        assert sum("→" in line for line in lines) == 5
    assert str(folder / "loss.parquet") in printed


def test_concept_from_two_files_with_defaults_of_the_library(place, here):
    result = ok(
        "score",
        place / "model",
        place / "train.jsonl",
        "--positive",
        place / "positive.jsonl",
        "--negative",
        place / "negative.jsonl",
        "--layer",
        2,
    )
    assert "Vector Filter" in result.stdout and "Activation Gradient" not in result.stdout
    lm = load_model(place / "model")
    concept = contrastive_concept(
        lm,
        *(load_conversations(place / f"{side}.jsonl") for side in ("positive", "negative")),
        2,
        name="positive",
        progress=False,
    )
    expected = scorers.VectorFilter(lm, concept).score(
        load_conversations(place / "train.jsonl"), progress=False
    )
    saved = load_attribution("scores.parquet")
    np.testing.assert_allclose(saved.scores, expected.scores, rtol=1e-5)
    assert saved.card.behaviour == "positive" and saved.card.layer == 2


def test_methods_without_a_model_score_alone(place, here):
    ok("score", place / "model", place / "train.jsonl", "--methods", "length, random", "--out", "out")
    tokenized = load_model(place / "model").tokenize(load_conversations(place / "train.jsonl"))
    assert load_attribution("out/length.parquet").scores.tolist() == [
        one.response_mask.sum().item() for one in tokenized
    ]


def test_repsim_compares_at_the_layer_named(place, here):
    ok(
        "score",
        place / "model",
        place / "train.jsonl",
        "--methods",
        "repsim",
        "--layer",
        2,
        "--queries",
        place / "answers.jsonl",
        "--out",
        "r.parquet",
    )
    assert load_attribution("r.parquet").card.layer == 2


def test_a_base_model_is_scored_in_the_template_that_is_named(place, here):
    model, tokenizer = tiny_pair("llama")
    tokenizer.chat_template = None
    for part in (model, tokenizer):
        part.save_pretrained("base")
    Path("own.jinja").write_text(chat_template_text("alpaca"))
    command = ("score", "base", place / "train.jsonl", "--methods", "loss")
    assert "load_model(…, chat_template=…) takes" in refused(1, *command)
    train, scores = load_conversations(place / "train.jsonl"), {}
    for template in ("chatml", "plain", "own.jinja"):
        ok(*command, "--chat-template", template, "--out", "loss.parquet", "--overwrite")
        saved = load_attribution("loss.parquet")
        opened = load_model("base", chat_template=template)
        expected = baselines.MeanLoss(opened).score(train, progress=False)
        assert saved.card.settings["chat_template"] == expected.card.settings["chat_template"] == template
        np.testing.assert_allclose(saved.scores, expected.scores, rtol=1e-5)
        scores[template] = saved.scores
    assert not np.allclose(scores["chatml"], scores["plain"]) and not np.allclose(
        scores["chatml"], scores["own.jinja"]
    )
    assert "chatlm" in refused(1, *command, "--chat-template", "chatlm", "--out", "x.parquet")
    assert f"{', '.join(template_names())}, or a file of Jinja" in " ".join(
        ok("score", "--help").stdout.replace("│", " ").split()
    )


def test_the_line_of_an_example_is_the_question_its_answer_answers(place, here):
    long = [
        {"role": "system", "content": "Same for all. " * 20},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
    ]
    rows = [
        {
            "messages": [
                *long,
                {"role": "user", "content": f"Is {i} even?"},
                {"role": "assistant", "content": "yes " * (i + 1)},
            ]
        }
        for i in range(4)
    ]
    Path("turns.jsonl").write_text("\n".join(map(json.dumps, rows)))
    printed = ok("score", place / "model", "turns.jsonl", "--methods", "length").stdout
    lines = [line.split("%")[1].strip() for line in printed.splitlines() if line[:6].strip().isdigit()]
    assert lines == [f"Is {i} even?" for i in (3, 2, 1, 0)]


def test_options_of_curvature_sites_and_cutting_arrive(place, here):
    common = (
        "score",
        place / "model",
        place / "train.jsonl",
        "--queries",
        place / "answers.jsonl",
        "--methods",
        "influence-function",
    )
    ok(*common, "--sites", "mlp", "--damping", "1e-3", "--absolute", "--max-tokens", 40, "--out", "a.parquet")
    card = load_attribution("a.parquet").card
    assert card.sites == "mlp" and card.damping == "0.001 absolute" and card.settings["curvature_seconds"] > 0
    assert any("longer than 40 tokens" in note for note in card.notes)
    printed = ok(*common, "--curvature", "identity", "--out", "b.parquet").stdout
    assert load_attribution("b.parquet").card.curvature == "identity" and "longer than" not in printed


def test_a_concept_of_another_model_needs_transfer(place, here):
    command = ("score", place / "other", place / "train.jsonl", "--concept", place / "flattery.safetensors")
    assert "was made with" in refused(1, *command)
    assert not Path("scores.parquet").exists()
    ok(*command, "--transfer")
    assert len(load_attribution("scores.parquet")) == N


def test_ctrl_c_keeps_finished_blocks_and_the_same_command_continues(place, here, monkeypatch):
    command = (
        "score",
        place / "model",
        place / "train.jsonl",
        "--concept",
        place / "flattery.safetensors",
        "--token-budget",
        120,
    )
    ok(*command, "--out", "whole.parquet")
    real, batches_run = directional.run_batch, []

    def interrupted(lm, batch, readouts, watch):
        if len(batches_run) == 2:
            raise KeyboardInterrupt
        batches_run.append(len(batch.rows))
        return real(lm, batch, readouts, watch)

    with monkeypatch.context() as patch:
        patch.setattr(directional, "run_batch", interrupted)
        stopped = call(*command)
    assert stopped.exit_code == 130 and "the same command again" in stopped.stderr
    assert not Path("scores.parquet").exists()
    again = ok(*command)
    assert f"{sum(batches_run)} of {N} examples were scored by an earlier, interrupted run" in again.stdout
    assert (
        load_attribution("scores.parquet").scores.tolist()
        == load_attribution("whole.parquet").scores.tolist()
    )


# ---- mistakes


@pytest.mark.parametrize(
    "options, said",
    [
        (["--methods", "bm52"], "unknown method 'bm52'. Did you mean bm25? There are: vector-filter"),
        (["--methods", " , "], "name at least one of"),
        ([], "--concept: missing for vector-filter"),
        (["--methods", "concept-influence", "--concept", "C"], "--queries: missing for concept-influence"),
        (["--methods", "bm25"], "--queries: missing for bm25"),
        (["--methods", "repsim", "--queries", "Q"], "--layer: missing for repsim"),
        (["--concept", "C", "--positive", "P"], "not both"),
        (["--concept", "C", "--layer", "1"], "knows its layer"),
        (["--positive", "P"], "--negative: --positive and --negative go together"),
        (["--negative", "P"], "--positive: --positive and --negative go together"),
        (["--positive", "P", "--negative", "N"], "--layer: missing"),
        (["--methods", "loss,length", "--out", "x.parquet"], "2 methods give 2 files"),
        (["--methods", "loss", "--curvature", "kfac"], "neither ekfac, identity"),
    ],
)
def test_a_wrong_command_line_is_refused_before_anything_is_opened(here, options, said):
    assert said in refused(2, "score", "no-such-model", "no-such-file.jsonl", *options)
    assert not [path for path in here.iterdir() if path.name != "cache"]


def test_what_the_library_refuses_is_one_message(place, here):
    concept, model, data = (
        ("--concept", place / "flattery.safetensors"),
        place / "model",
        place / "train.jsonl",
    )
    assert "there is no file" in refused(1, "score", model, "gone.jsonl", *concept)
    assert "no concept file" in refused(1, "score", model, data, "--concept", "gone.safetensors")
    assert "gone-model" in refused(1, "score", "./gone-model", data, *concept)
    assert "width" in refused(1, "score", place / "wide", data, *concept)
    assert "dtype" in refused(1, "score", model, data, *concept, "--dtype", "float23")
    sides = ("--positive", place / "positive.jsonl", "--negative", place / "negative.jsonl")
    assert "layer 3 does not exist" in refused(1, "score", model, data, *sides, "--layer", 3)
    assert (
        "nothing"
        in refused(
            1,
            "score",
            model,
            data,
            "--methods",
            "graddot",
            "--queries",
            place / "answers.jsonl",
            "--sites",
            "nothing",
        ).lower()
    )
    Path("broken.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", \n')
    assert "line 2" in refused(1, "score", model, "broken.jsonl", *concept)
    Path("file").write_text("")
    assert "cannot write" in refused(1, "score", model, data, *concept, "--out", "file/scores.parquet")
    Path("folder.parquet").mkdir()
    assert "it is a folder" in refused(1, "score", model, data, *concept, "--out", "folder.parquet")


def test_debug_shows_the_traceback(here):
    result = call("show", "gone.parquet", "--debug")
    assert result.exit_code == 1 and type(result.exception).__name__ == "AttributionError"
    done = subprocess.run(
        [sys.executable, "-c", "from concept_tda.cli import app; app()", "show", "gone.parquet", "--debug"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1 and "Traceback" in done.stderr and "AttributionError" in done.stderr


def test_a_defect_of_ours_is_not_dressed_up_as_a_mistake_of_the_user(here, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("concept_tda.commands.reading.read_results", broken)
    assert isinstance(call("show", "x.parquet").exception, ZeroDivisionError)


# ---- show, filter, report


def test_show_prints_the_card_and_both_ends(scored):
    folder, _ = scored
    result = load_attribution(folder / "loss.parquet")
    printed = ok("show", folder / "loss.parquet", "-n", 3).stdout
    assert str(result.card) in printed
    rows = [float(line.split()[1]) for line in printed.splitlines() if line[:6].strip().isdigit()]
    percentiles = np.array([*result.top(3).percentiles, *result.bottom(3).percentiles])
    assert rows == pytest.approx(percentiles, abs=0.1)  # the second column: higher than so many per cent
    assert "no query 'x'" in refused(1, "show", folder / "loss.parquet", "--query", "x")
    whole_folder = ok("show", folder).stdout
    for path in folder.iterdir():
        assert str(load_attribution(path).card) in whole_folder


def test_text_cannot_repaint_the_terminal(place, here):
    Path("evil.jsonl").write_text(
        "\n".join(
            json.dumps({"prompt": f"hi {i}\x1b[2J\x07", "response": f"{i} \u202e\x1b]0;x\x07" + "y" * i})
            for i in range(4)
        )
    )
    printed = ok("score", place / "model", "evil.jsonl", "--methods", "length").stdout
    assert "hi 3" in printed and not set(printed) & set("\x1b\x07\u202e")


@pytest.mark.parametrize(
    "options, gone",
    [
        (["--drop-fraction", "0.25"], lambda scores: np.argsort(-scores, kind="stable")[:4]),
        (["--drop-count", "3"], lambda scores: np.argsort(-scores, kind="stable")[:3]),
        (["--drop-count", "3", "--lowest"], lambda scores: np.argsort(scores, kind="stable")[:3]),
        (["--threshold", "MEDIAN"], lambda scores: np.flatnonzero(scores > np.median(scores))),
        (["--threshold", "MEDIAN", "--lowest"], lambda scores: np.flatnonzero(scores < np.median(scores))),
    ],
)
def test_filter_copies_what_it_keeps_byte_for_byte(place, scored, here, options, gone):
    result = load_attribution(scored[0] / "vector-filter.parquet")
    options = [repr(float(np.median(result.scores))) if option == "MEDIAN" else option for option in options]
    printed = ok("filter", scored[0] / "vector-filter.parquet", *options).stdout
    lines = (place / "train.jsonl").read_bytes().split(b"\r\n")
    dropped = set(gone(result.scores).tolist())
    assert dropped and Path("kept.jsonl").read_bytes() == b"\r\n".join(
        line for row, line in enumerate(lines) if row not in dropped
    )
    assert f"{N - len(dropped)} of {N} examples" in printed
    ok("filter", scored[0] / "vector-filter.parquet", *options, "--layout", "alpaca", "--out", "alpaca.jsonl")
    kept = load_conversations("kept.jsonl")
    assert load_conversations("alpaca.jsonl").ids == kept.ids
    assert all("instruction" in json.loads(line) for line in Path("alpaca.jsonl").open(encoding="utf-8"))


def test_filter_refuses(scored, here):
    one = scored[0] / "loss.parquet"
    assert "exactly one way" in refused(2, "filter", one)
    assert "exactly one way" in refused(2, "filter", one, "--drop-count", 1, "--threshold", 0)
    assert "takes all" in refused(1, "filter", one, "--threshold", "-1e9")
    assert f"1 to {N - 1}" in refused(1, "filter", one, "--drop-count", N)
    assert f"{len(PLAIN)} results" in refused(1, "filter", scored[0], "--drop-count", 1)
    assert "no .parquet file" in refused(1, "filter", here, "--drop-count", 1)
    Path("cut.parquet").write_bytes(one.read_bytes()[:-100])
    assert "ends too early" in refused(1, "filter", "cut.parquet", "--drop-count", 1)
    Path("file").write_text("")
    assert "cannot write" in refused(1, "filter", one, "--drop-count", 1, "--out", "file/kept.jsonl")
    assert "no layout 'trl'" in refused(1, "filter", one, "--drop-count", 1, "--layout", "trl")
    assert not Path("kept.jsonl").exists()


def test_groups_are_those_of_the_library(place, scored, here):
    from concept_tda.groups.groups import column_groups, drop_groups, score_groups

    one = scored[0] / "vector-filter.parquet"
    result = load_attribution(one)
    found = score_groups(column_groups(result.conversations, "flattering"), result)
    printed = ok("groups", one, "--by", "flattering", "--table", "t.csv", "--drop-fraction", 0.2).stdout
    table = pd.read_csv("t.csv")
    assert table["group"].astype(str).tolist() == found.table["group"].tolist()
    np.testing.assert_allclose(table["sum"], found.table["sum"])
    kept = drop_groups(found, fraction=0.2)
    assert load_conversations("kept.jsonl").ids == kept.ids and f"{len(kept)} of {N} examples" in printed
    assert "standardised" in printed  # the zero of a projection means nothing
    before = Path("kept.jsonl").read_bytes()
    assert "exists already" in refused(1, "groups", one, "--by", "flattering", "--drop-fraction", 0.2)
    assert "no metadata column 'topic'" in refused(1, "groups", one, "--by", "topic")
    assert "results" in refused(1, "groups", scored[0], "--by", "flattering")
    assert Path("kept.jsonl").read_bytes() == before


def test_discover_reads_an_atlas_and_refuses_everything_else(place, here):
    from concept_tda.groups.discovery import discover
    from concept_tda.influence.atlas import InfluenceAtlas, build_atlas

    lm, data = load_model(place / "model"), load_conversations(place / "train.jsonl")
    build_atlas(lm, data[:2], data, 1, folder="atlas", curvature="identity", progress=False)
    assert "directions found in 14 rows" in ok("discover", "atlas", "-n", 3).stdout
    with_atoms = ok("discover", "atlas", "-n", 3, "--atoms", 4).stdout
    found = discover(InfluenceAtlas.load("atlas"), 3, atoms=4)
    assert repr(found) in with_atoms
    assert with_atoms.count("\natom ") == found.atoms.table["found"].sum()
    assert "14 rows allow 1 to 7 atoms" in refused(1, "discover", "atlas", "--atoms", 8)
    assert "nowhere" in refused(1, "discover", "nowhere")
    assert "atlas" in refused(1, "discover", place)


def test_nothing_replaces_a_file_unless_told_so_and_never_the_source(place, scored, here):
    one, train = scored[0] / "loss.parquet", Path("train.jsonl")
    train.write_bytes((place / "train.jsonl").read_bytes())
    before = train.read_bytes()
    for options in (["--out", "train.jsonl"], ["--out", "./train.jsonl"]):
        assert "exists already" in refused(1, "filter", one, "--drop-count", 1, *options)
    model = place / "model"
    Path("scores.parquet").write_bytes(b"three hours of work")
    assert "exists already" in refused(1, "score", model, train, "--methods", "length")
    assert Path("scores.parquet").read_bytes() == b"three hours of work"
    ok("score", model, train, "--methods", "length", "--overwrite")
    saved = Path("scores.parquet").read_bytes()
    for command in (["filter", "scores.parquet", "--drop-count", "1"], ["report", "scores.parquet"]):
        source = refused(1, *command, "--out", "scores.parquet", "--overwrite")
        assert "made from" in source and Path("scores.parquet").read_bytes() == saved
        ok(*command)
        assert "exists already" in refused(1, *command)
        ok(*command, "--overwrite")
    assert train.read_bytes() == before


def test_report_holds_every_method_once(scored, here):
    printed = ok(
        "report", scored[0] / "loss.parquet", scored[0], "--labels", "flattering", "--title", "Who flatters?"
    ).stdout
    page = Path("report.html").read_text()
    assert "Who flatters?" in page and "AUROC" in page and "report.html" in printed
    assert page.count('<section id="method-') == len(PLAIN)


def test_report_by_a_label_that_is_text(scored, here):
    ok("report", scored[0] / "loss.parquet", "--labels", "row", "--positive", "3")
    assert "1 labelled" in " ".join(Path("report.html").read_text().split())
    assert "absent" in refused(1, "report", scored[0] / "loss.parquet", "--labels", "absent", "--overwrite")


def test_report_refuses_before_the_work(scored, here):
    Path("file").write_text("")
    assert "cannot write" in refused(1, "report", scored[0], "--out", "file/report.html")
    assert "no such file" in refused(1, "report", "gone.parquet")


# ---- help


def test_help_is_quick_and_has_an_example_for_each_command():
    code = (
        "import sys, concept_tda.cli; print(sorted({'torch', 'numpy', 'pandas', 'transformers', 'nbclient'} "
        "& set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr
    overview = ok("--help").stdout
    commands = typer.main.get_command(app).commands
    assert len(commands) == 16
    inner = {f"concept {name}": one for name, one in commands["concept"].commands.items()}
    for command in {**commands, **inner}:
        if command == "concept":
            continue
        assert command.split()[0] in overview
        text = ok(*command.split(), "--help").stdout
        assert "Example:" in text and f"concept-tda {command}" in text
    text = " ".join(ok("score", "--help").stdout.replace("│", " ").split())
    for method in METHODS:
        assert method in text


# ---- preference pairs


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    """Pairs with odd spacing and Windows line ends, under columns of other names."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    lines = [
        f'{{"prompt": "Is {i} good?",  "better": "yes, {so}{i}", "worse":"no, not {i}", "n": {i}}}'
        for i, so in enumerate(["", "so ", "so so "] * 3)
    ]
    path.write_bytes("\r\n".join(lines).encode())
    return path


COLUMNS = ("--preferences", "--chosen", "better", "--rejected", "worse")


def score_pairs(place, pairs_file, out, *more):
    concept = ("--concept", place / "flattery.safetensors")
    return ok("score", place / "model", pairs_file, *COLUMNS, *concept, "--out", out, *more)


@pytest.mark.parametrize("form", ["across_tokens", "within_token"])
def test_pairs_are_scored_as_the_library_scores_them(place, pairs_file, here, form):
    methods = ("--methods", "residual-change,concept-influence,length", "--form", form)
    score_pairs(place, pairs_file, "scores", *methods, "--queries", place / "answers.jsonl")
    lm, pairs = load_model(place / "model"), load_preferences(pairs_file, chosen="better", rejected="worse")
    from concept_tda.concepts.concept import Concept

    concept, queries = (
        Concept.load(place / "flattery.safetensors"),
        load_conversations(place / "answers.jsonl"),
    )
    both = load_conversations([dict_of(one) for one in (*pairs.chosen, *pairs.rejected)])
    curvature = EKFAC.fit(lm, both, "attention", layer=1, damping=0.1, cache=False, progress=False)
    for name, scorer in {
        "residual-change": neighbours.ResidualChange(lm, concept, form=form),
        "concept-influence": scorers.ConceptInfluence(lm, concept, queries, curvature=curvature),
        "length": baselines.ResponseLength(),
    }.items():
        saved = load_pair_attribution(Path("scores") / f"{name}.parquet")
        expected = score_preferences(scorer, pairs, progress=False, lm=lm).scores
        np.testing.assert_allclose(saved.scores, expected, rtol=1e-3, atol=1e-6 * np.abs(expected).max())
        assert saved.pairs.ids == pairs.ids
    assert load_attribution("scores/residual-change.parquet").card.settings["form"] == form


def dict_of(conversation):
    return {"messages": [dict(message) for message in conversation.messages]}


def test_swapped_and_dropped_pairs_are_those_of_the_library_byte_for_byte(place, pairs_file, here):
    score_pairs(place, pairs_file, "scores.parquet", "--methods", "vector-filter")
    result = load_pair_attribution("scores.parquet")
    for option, kept in (("--count", dict(count=3)), ("--fraction", dict(fraction=0.4))):
        ok("swap", "scores.parquet", option, *kept.values(), "--out", "swapped.jsonl", "--overwrite")
        expected = result.swap(**kept).to_json(here / "expected.jsonl", overwrite=True).read_bytes()
        assert Path("swapped.jsonl").read_bytes() == expected
    before = pairs_file.read_bytes().split(b"\r\n")
    after = Path("swapped.jsonl").read_bytes().split(b"\r\n")
    changed = [row for row in range(9) if before[row] != after[row]]
    assert sorted(changed) == sorted(result.top(4).rows.tolist())
    for row in changed:
        old, new = json.loads(before[row]), json.loads(after[row])
        assert (old["better"], old["worse"]) == (new["worse"], new["better"]) and old["n"] == new["n"]
    ok("swap", "scores.parquet", "--count", 2, "--lowest", "--out", "lowest.jsonl")
    lowest = Path("lowest.jsonl").read_bytes().split(b"\r\n")
    turned = [row for row in range(9) if before[row] != lowest[row]]
    assert sorted(turned) == sorted(result.bottom(2).rows.tolist())
    ok("filter", "scores.parquet", "--drop-count", 3, "--out", "kept.jsonl")
    top = result.top(3).rows
    assert Path("kept.jsonl").read_bytes() == b"\r\n".join(
        one for i, one in enumerate(before) if i not in top
    )
    ok("filter", "scores.parquet", "--drop-count", 3, "--layout", "messages", "--out", "relaid.jsonl")
    kept = load_preferences("kept.jsonl", chosen="better", rejected="worse")
    assert load_preferences("relaid.jsonl").ids == kept.ids  # pairs stay pairs
    ok("swap", "scores.parquet", "--count", 2, "--layout", "sharegpt", "--out", "shared.jsonl")
    assert load_preferences("shared.jsonl").ids == result.swap(count=2).ids


def test_mistakes_with_pairs(place, scored, pairs_file, here):
    model, concept = place / "model", ("--concept", place / "flattery.safetensors")
    assert "'chosen'" in refused(1, "score", model, pairs_file, "--preferences", *concept)
    assert "leave --tokens out" in refused(2, "score", model, pairs_file, *COLUMNS, *concept, "--tokens")
    assert "say --preferences too" in refused(2, "score", model, pairs_file, "--chosen", "better", *concept)
    assert "neither across_tokens" in refused(2, "score", model, pairs_file, *concept, "--form", "both")
    single = scored[0] / "vector-filter.parquet"
    assert "not of preference pairs" in refused(1, "swap", single, "--count", 2)
    assert "--fraction, --count or --threshold" in refused(2, "swap", single)
    ok("score", model, pairs_file, *COLUMNS, "--out", "scores.parquet", "--methods", "length")
    assert "is never replaced" in refused(
        1, "swap", "scores.parquet", "--count", 2, "--out", "scores.parquet"
    )
    assert "1.5" in refused(1, "swap", "scores.parquet", "--fraction", 1.5)
    assert not Path("swapped.jsonl").exists()


# ---- demo


def quickstart(*cells):
    folder = Path("nbs/tutorials")
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=list(cells)), folder / "quickstart.ipynb")


def leave_files(scores):
    return new_code_cell(
        f"import shutil, pathlib\npathlib.Path('scores').mkdir(exist_ok=True)\nscores = "
        f"pathlib.Path({str(scores)!r})\n"
        "shutil.copyfile(scores/'vector-filter.parquet', 'scores.parquet')\n"
        "for name in ('vector-filter', 'loss'): shutil.copyfile(scores/f'{name}.parquet', "
        "f'scores/{name}.parquet')\n"
        "for name in ('kept.jsonl', 'report.html'): pathlib.Path(name).write_text('x')"
    )


BAR = (
    "import time, sys\nfrom tqdm.auto import tqdm\nfor i in tqdm(range(40), desc='teaching'): "
    "time.sleep(.02)\nprint('taught')"
)


def test_demo_runs_the_notebook_tells_its_story_and_lists_its_files(scored, here):
    stale = new_code_cell("2 + 3")
    stale.outputs = [nbformat.v4.new_output("stream", text="from long ago")]
    quickstart(
        new_markdown_cell("# Who flatters?\n\nSome prose.\n\n```\n# not a heading\n```"),
        new_code_cell(BAR),
        new_markdown_cell("### Files"),
        leave_files(scored[0]),
        stale,
    )
    Path("demo").mkdir()
    Path("demo/quickstart.failed.ipynb").write_text("of an earlier run")
    printed = ok("demo").stdout
    positions = [
        printed.index(text)
        for text in (
            "Who flatters?",
            "teaching",
            "taught",
            " s]",
            "Files",
            "The five most influential",
            "Left in demo/",
        )
    ]
    assert positions == sorted(positions)
    assert "not a heading" not in printed and "Some prose" not in printed
    assert printed.count("Vector Filter · ") == 1 and printed.count("Loss · ") == 1, (
        "the same result is shown once"
    )
    for name in ("quickstart.ipynb", "scores.parquet", "kept.jsonl", "report.html"):
        assert f"  {name}" in printed[positions[-1] :]
    assert "GiB of memory" in printed
    executed = nbformat.read("demo/quickstart.ipynb", 4)
    nbformat.validate(executed)
    streams = {output.name: output.text for output in executed.cells[1].outputs}
    assert (
        streams["stdout"] == "taught\n"
        and streams["stderr"].count("teaching") == 1
        and "100%" in streams["stderr"]
        and "\r" not in streams["stderr"]
    )
    assert executed.cells[-1].outputs[0].data["text/plain"] == "5" and executed.cells[-1].execution_count
    assert not Path("demo/quickstart.failed.ipynb").exists()
    assert nbformat.read("nbs/tutorials/quickstart.ipynb", 4).cells[-1].outputs == stale.outputs, (
        "the tutorial itself stays as it is"
    )


def test_a_failing_cell_leaves_the_notebook_so_far(here):
    quickstart(
        new_markdown_cell("# Start"),
        new_code_cell("print('fine')"),
        new_markdown_cell("## Dividing"),
        new_code_cell("1/0"),
        new_code_cell("print('never')"),
    )
    result = call("demo")
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert (
        "in the section 'Dividing'" in result.stderr
        and "ZeroDivisionError: division by zero" in result.stderr
        and len(result.stderr.splitlines()) < 8
    )
    cells = nbformat.read("demo/quickstart.failed.ipynb", 4).cells
    assert (
        cells[1].outputs[0].text == "fine\n"
        and cells[3].outputs[0].ename == "ZeroDivisionError"
        and not cells[4].outputs
    )
    assert not Path("demo/quickstart.ipynb").exists()


def test_a_notebook_whose_process_dies_is_reported(here):
    quickstart(new_markdown_cell("# Too much"), new_code_cell("import os; os.kill(os.getpid(), 9)"))
    result = call("demo")
    assert result.exit_code == 1 and "ran out of memory" in result.stderr and "Too much" in result.stderr
    assert Path("demo/quickstart.failed.ipynb").exists()


def test_files_of_an_earlier_run_are_not_passed_off_as_new(scored, here):
    quickstart(new_code_cell("1"))
    Path("demo").mkdir()
    for name in ("scores.parquet", "kept.jsonl", "report.html"):
        (Path("demo") / name).write_text("old")
        os.utime(Path("demo") / name, (1, 1))
    assert "left no scores.parquet, kept.jsonl, report.html" in call("demo").stderr


def test_demo_outside_a_checkout_says_so(here):
    message = refused(1, "demo")
    assert "checkout" in message and "make demo" in message and not Path("demo").exists()


def test_ctrl_c_in_the_demo_reaches_the_cell_and_leaves_no_kernel_behind(here):
    cell = (
        "import os, pathlib, time\ntry:\n    print('kernel', os.getpid(), flush=True)\n    "
        "time.sleep(120)\nfinally: pathlib.Path('tidied').touch()"
    )
    quickstart(new_markdown_cell("# Long"), new_code_cell(cell))
    process = subprocess.Popen(
        [sys.executable, "-c", "from concept_tda.cli import app; app()", "demo"],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )
    for line in process.stdout:
        if "kernel" in line:
            break
    kernel = int(line.split()[-1])
    os.killpg(process.pid, signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "the same command again" in stderr, stderr
    assert Path("demo/tidied").exists() and not Path("demo/quickstart.ipynb").exists()
    for _ in range(50):
        try:
            os.kill(kernel, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the notebook's process is still there")


def test_last_state_of_a_line():
    assert last_state("10%\r 55%\r100%   \r") == "100%"
    assert last_state("\x1b[A\r 3/3\x1b[K") == " 3/3"
    assert last_state("\r\r") == "" and last_state("plain  text") == "plain  text"
