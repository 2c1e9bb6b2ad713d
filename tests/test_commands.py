"""The commands beside the library: every method has a name, a card is replayed to the last bit, near misses
are answered, warnings come first, decisions are read, and nothing is replaced unasked."""

import importlib
import inspect
import json
import pkgutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from terminal import call, enter_place, write_records

import concept_tda
import concept_tda.commands.reading as reading
from concept_tda.commands.methods import CURVATURES, METHODS, Asked
from concept_tda.concepts.concept import Concept, contrastive_concept, probe_concept, sweep_layers
from concept_tda.data.conversations import load_conversations
from concept_tda.evidence.filter_and_retrain import FilterAndRetrain
from concept_tda.influence import neighbours, scorers
from concept_tda.influence.baselines import MeanLoss
from concept_tda.influence.curvature import EKFAC
from concept_tda.influence.preconditioners import ConjugateGradient, DataInf, LoGra
from concept_tda.influence.scorers import Scorer
from concept_tda.influence.streaming import score_stream
from concept_tda.model.finetuning import training_checkpoints, training_record
from concept_tda.model.loading import load_model
from concept_tda.results.advice import advice
from concept_tda.results.attribution import Attribution, load_attribution
from concept_tda.results.comparison import compare
from concept_tda.results.folders import ScoreFolder
from concept_tda.results.metrics import AttributionError
from concept_tda.views.review import Review

N = 12


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a model, data and a concept, and an empty cache."""
    monkeypatch.chdir(tmp_path)  # which is gone back from
    monkeypatch.setenv("CONCEPT_TDA_CACHE", str(tmp_path / "cache"))
    enter_place(tmp_path, N)
    return tmp_path


def ok(line: str):
    result = call(*line.split())
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


def refused(code: int, line: str) -> str:
    result = call(*line.split())
    assert result.exit_code == code, result.output + repr(result.exception)
    assert "Traceback" not in result.output
    errors = [one for one in result.stderr.splitlines() if one.startswith("Error: ")]
    assert len(errors) == 1
    return errors[0]


FLATTERY = "--concept flattery.safetensors"
QUERIES = "--queries answers.jsonl"


# ---- the list of methods

NOT_COMMANDS = {
    "Scorer": "what all methods have in common",
    "Influence": "takes a query that only Python can express",
    "CheckpointScorer": "what TracIn and LESS have in common",
    "UnitInfluence": "asks about a head or a neuron, not about a behaviour",
    "ServedInfluence": "needs a server that runs, with two adapters written for the question",
    "Surrogate": "holds the scores of a method in one model, with those of another as a sample",
}


def subclasses(kind: type) -> set[type]:
    found = set(kind.__subclasses__())
    return found | {one for child in found for one in subclasses(child)}


def test_every_method_of_the_library_has_a_name_on_the_command_line():
    for module in pkgutil.walk_packages(concept_tda.__path__, "concept_tda."):
        if not module.name.rsplit(".", 1)[1].startswith("_"):
            importlib.import_module(module.name)
    public = {
        one.__name__
        for one in subclasses(Scorer) | {Scorer}
        if not one.__name__.startswith("_") and one.__module__.startswith("concept_tda.")
    }
    named = {method.scorer for method in METHODS.values()}
    assert len(named) == len(METHODS)
    assert named | set(NOT_COMMANDS) == public, "a method without a name, or a name without a method"
    assert not named & set(NOT_COMMANDS)


def test_the_baselines_that_come_last_in_a_folder_are_those_of_the_library():
    from concept_tda.commands.results import _LAST
    from concept_tda.influence import baselines

    own = {
        name for name, one in vars(baselines).items() if getattr(one, "__module__", "") == baselines.__name__
    }
    assert {name for name, method in METHODS.items() if method.scorer in own} == {*_LAST}


def test_every_curvature_of_the_library_has_a_name_on_the_command_line():
    from concept_tda.influence import curvature, preconditioners

    public = {
        name
        for room in (curvature, preconditioners)
        for name, one in vars(room).items()
        if inspect.isclass(one) and hasattr(one, "precondition") and not name.startswith("_")
    }
    assert {name.lower() for name in public} == {"conjugategradient", *CURVATURES} - {"cg"}


@pytest.mark.parametrize("kind", [name for name in CURVATURES if name not in ("ekfac", "identity")])
def test_each_curvature_gives_the_scores_of_the_library(here, kind):
    ok(f"score model train.jsonl {QUERIES} --methods influence-function --curvature {kind} --damping 0.3")
    lm, train = load_model("model"), load_conversations("train.jsonl")
    options = dict(damping=0.3, progress=False)
    make = {
        "datainf": lambda: DataInf.fit(lm, train, "attention", **options),
        "logra": lambda: LoGra.fit(lm, train, "attention", **options),
        "cg": lambda: ConjugateGradient(lm, train, EKFAC.fit(lm, train, "attention", **options), **options),
    }
    scorer = scorers.InfluenceFunction(lm, load_conversations("answers.jsonl"), curvature=make[kind]())
    expected = scorer.score(train, progress=False)
    saved = load_attribution("scores.parquet")
    np.testing.assert_allclose(saved.scores, expected.scores, rtol=1e-4)
    assert saved.card.curvature == expected.card.curvature


def test_tracin_less_and_a_cascade_are_those_of_the_library(here):
    ok("finetune model train.jsonl --epochs 2 --rank 2 --learning-rate 0.01 --checkpoints 2 --out tuned")
    assert training_record("tuned")["key"]["base_fingerprint"] == load_model("model").fingerprint
    ok(
        f"score tuned train.jsonl {QUERIES} {FLATTERY} --transfer --checkpoints tuned --out scores "
        "--methods tracin,less,cascade --cheap vector-filter --exact graddot --keep 0.9"
    )
    lm, train = load_model("tuned"), load_conversations("train.jsonl")
    queries, history = load_conversations("answers.jsonl"), training_checkpoints("tuned")
    assert len(history["checkpoints"]) == 2

    def moments(model, sites):
        return neighbours.AdamMoments.estimate(model, train, sites)

    concept = Concept.load("flattery.safetensors").transfer(lm)
    library = {
        "tracin": neighbours.TracIn(**history, queries=queries),
        "less": neighbours.LESS(**history, queries=queries, sites="attention", moments=[moments] * 2),
        "cascade": neighbours.Cascade(
            scorers.VectorFilter(lm, concept), scorers.GradDot(lm, queries), keep=0.9
        ),
    }
    for method, scorer in library.items():
        saved, expected = load_attribution(f"scores/{method}.parquet"), scorer.score(train, progress=False)
        np.testing.assert_allclose(saved.scores, expected.scores, rtol=1e-4, atol=1e-9, err_msg=method)
    less = load_attribution("scores/less.parquet").card
    assert any("moments were estimated" in note for note in less.notes)


def test_training_influence_repeats_the_run_from_the_model_before_it(here):
    from concept_tda.influence.queries import LossQuery
    from concept_tda.influence.runs import TrainingInfluence

    ok("finetune model train.jsonl --rank 2 --learning-rate 0.01 --out tuned")
    asked = f"train.jsonl {QUERIES} --checkpoints tuned --methods training-influence --out"
    ok(f"score model {asked} one.parquet")
    lm, saved = load_model("model"), load_attribution("one.parquet")
    query = LossQuery(load_conversations("answers.jsonl"))
    expected = TrainingInfluence(lm, query, run="tuned").score("train.jsonl", progress=False)
    np.testing.assert_allclose(saved.scores, expected.scores, rtol=1e-3, atol=1e-6)
    assert saved.card.unit == "nats per token" and saved.predict(drop=0.2).n == round(0.2 * len(saved))
    told = ok("filter one.parquet --drop-fraction 0.2 --out kept.jsonl").stdout
    assert str(saved.predict(drop=0.2)) in " ".join(told.split()) and "not calibrated by retrainings" in told
    assert "did not start from" in refused(1, f"score tuned {asked} two.parquet")


def test_source_reads_the_run_and_asks_for_the_concept_where_there_is_one(here):
    from concept_tda.influence.queries import ConceptQuery, LossQuery
    from concept_tda.influence.responses import SOURCE

    ok("finetune model train.jsonl --epochs 2 --rank 2 --learning-rate 0.01 --checkpoints 2 --out tuned")
    asked = f"score model train.jsonl {QUERIES} --checkpoints tuned --methods source --out"
    ok(f"{asked} one.parquet"), ok(f"{asked} two.parquet {FLATTERY}")
    lm, queries = load_model("model"), load_conversations("answers.jsonl")
    concept = Concept.load("flattery.safetensors")
    for file, query in {"one": LossQuery(queries), "two": ConceptQuery(concept, queries)}.items():
        saved = load_attribution(f"{file}.parquet")
        expected = SOURCE.of_run("tuned", lm, query).score("train.jsonl", progress=False)
        np.testing.assert_allclose(saved.scores, expected.scores, rtol=1e-3, atol=1e-7)
        assert len(saved.card.settings["learning_rates"]) == 2 and saved.card.unit == expected.card.unit


# ---- layer auto, concepts


SIDES = "--positive kind.jsonl --negative plain.jsonl"


def both_sides():
    return load_conversations("kind.jsonl"), load_conversations("plain.jsonl")


def test_layer_auto_is_the_sweep_and_the_card_says_so(here):
    ok(f"score model train.jsonl {SIDES} --layer auto")
    lm = load_model("model")
    best = sweep_layers(lm, *both_sides(), name="kind", progress=False).best
    saved = load_attribution("scores.parquet")
    expected = scorers.VectorFilter(lm, best).score(load_conversations("train.jsonl"), progress=False)
    np.testing.assert_allclose(saved.scores, expected.scores, rtol=1e-6)
    assert saved.card.layer == best.layer
    assert any("was chosen among all layers" in note for note in saved.card.notes)
    ok(f"score model train.jsonl {SIDES} --layer 1 --out one.parquet")
    assert not any("chosen" in note for note in load_attribution("one.parquet").card.notes)
    assert "neither a layer" in refused(2, f"score model train.jsonl {SIDES} --layer best")
    assert "auto compares" in refused(
        2, f"score model train.jsonl {QUERIES} --methods repsim --layer auto --out r.parquet"
    )


def test_concepts_are_those_of_the_library(here):
    lm, options = load_model("model"), dict(name="wise", progress=False)
    made = {
        "contrast --layer 1": contrastive_concept(lm, *both_sides(), 1, **options),
        "contrast --layer auto": sweep_layers(lm, *both_sides(), **options).best,
        "probe --layer 2": probe_concept(lm, *both_sides(), 2, **options),
        "probe --layer auto": sweep_layers(lm, *both_sides(), method="probe", **options).best,
    }
    for number, (how, expected) in enumerate(made.items()):
        kind, rest = how.split(" ", 1)
        out = f"{number}.safetensors"
        printed = ok(f"concept {kind} model {SIDES} {rest} --name wise --out {out}").stdout
        saved = Concept.load(out)
        assert saved.fingerprint == expected.fingerprint and saved.name == "wise", how
        assert f"{saved.quality['auc']:.3f}" in printed and f"--concept {out}" in printed
    assert "exists already" in refused(1, f"concept contrast model {SIDES} --out 0.safetensors")
    assert "is never replaced" in refused(1, f"concept contrast model {SIDES} --out kind.jsonl --overwrite")


def test_a_persona_is_that_of_the_library_and_a_near_miss_is_answered(here):
    from concept_tda.concepts.personas import persona_concept

    trait = dict(
        name="loud",
        description="",
        judge_prompt="{question} {answer} 0 to 100?",
        prompt_pairs=[dict(positive="Shout.", negative="Whisper.")],
        extraction_questions=[f"What is {i}?" for i in range(6)],
        evaluation_questions=[],
    )
    Path("loud.json").write_text(json.dumps(trait))
    ok("concept persona model loud.json --layer 1 --max-new-tokens 3")
    expected = persona_concept(load_model("model"), "loud.json", 1, max_new_tokens=3, progress=False)
    assert Concept.load("loud.safetensors").fingerprint == expected.fingerprint
    assert "Did you mean sycophantic?" in refused(2, "concept persona model sycofantic")
    assert "Did you mean loud.json?" in refused(1, "concept persona model luod.json --out x.safetensors")


# ---- run


def replay(monkeypatch, here, line: str, **options):
    """Score, forget the cache, replay from the card as JSON."""
    ok(f"score {line} --out first.parquet")
    ok("show first.parquet --card card.json")
    monkeypatch.setenv("CONCEPT_TDA_CACHE", str(here / "another"))
    printed = ok("run card.json --out second.parquet").stdout
    first, second = load_attribution("first.parquet"), load_attribution("second.parquet")
    assert first.scores.tobytes() == second.scores.tobytes() and "to the last bit" in printed
    assert first.card.command["line"] in printed
    return first, second


@pytest.mark.parametrize(
    "options",
    [
        f"{FLATTERY} {QUERIES} --methods concept-influence --damping 0.3 --seed 3",
        f"{SIDES} --layer auto --pooling all_but_first --methods activation-gradient",
        f"{QUERIES} --methods influence-function --curvature logra --seed 5 --sites mlp --tokens",
        "--methods random --seed 7",
        f"{QUERIES} --methods cascade --cheap bm25 --exact graddot --keep 0.9",
        f"{FLATTERY} --methods projection-difference",
        f"{QUERIES} --methods influence-function --curvature cg",
    ],
)
def test_a_card_is_replayed_to_the_last_bit_with_another_cache(here, monkeypatch, options):
    first, second = replay(monkeypatch, here, f"model train.jsonl {options}")
    assert first.card.command == second.card.command
    if "--tokens" in options:
        assert second.token_scores is not None


def test_methods_that_follow_a_training_are_replayed(here, monkeypatch):
    ok("finetune model train.jsonl --epochs 2 --rank 2 --learning-rate 0.01 --checkpoints 2 --out tuned")
    asked = f"train.jsonl {QUERIES} --checkpoints tuned"
    ok(f"score tuned {asked} --methods tracin,less --out scores")
    ok(f"score model {asked} --methods training-influence --out scores/training.parquet")
    monkeypatch.setenv("CONCEPT_TDA_CACHE", str(here / "another"))
    for name in ("tracin", "less", "training"):
        assert "to the last bit" in ok(f"run scores/{name}.parquet --out {name}.parquet").stdout


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name, one in METHODS.items() if "checkpoints" not in one.needs])
def test_every_other_method_is_replayed(here, monkeypatch, method):
    given = {"concept": FLATTERY, "queries": QUERIES, "layer": "--layer 1"}
    options = [given[need] for need in METHODS[method].needs if need in given]
    options += ["--cheap length --exact loss --keep 0.9"] * (method == "cascade")
    replay(monkeypatch, here, f"model train.jsonl --methods {method} {' '.join(options)}")


def test_a_card_is_read_as_yaml_and_out_of_a_folder(here):
    ok(f"score model train.jsonl {SIDES} --layer 1 --name naïve --out scores/first.parquet")
    ok("show scores/first.parquet --card config.yaml")
    assert Path("config.yaml").read_text(encoding="utf-8").startswith("method: Vector Filter\n")
    for card in ("config.yaml", "scores"):
        printed = ok(f"run {card} --out second.parquet --overwrite").stdout
        assert "to the last bit" in printed
    first, second = load_attribution("scores/first.parquet"), load_attribution("second.parquet")
    assert first.scores.tobytes() == second.scores.tobytes() and first.card.command == second.card.command
    Path("broken.yaml").write_text("method: [Vector")
    assert "no query card as JSON or YAML" in refused(1, "run broken.yaml --out x.parquet")


def test_results_that_only_python_makes_say_what_their_cards_lack(here):
    from concept_tda.influence.baselines import MeanLoss
    from concept_tda.influence.other_tools import load_kronfluence_scores
    from concept_tda.influence.streaming import score_stream
    from concept_tda.influence.surrogates import Surrogate

    from make_kronfluence import data

    lm, train = load_model("model"), load_conversations("train.jsonl")
    queries = load_conversations("answers.jsonl")
    score_stream([MeanLoss(lm)], "train.jsonl", "stream", part_examples=5, progress=False)
    Surrogate(scorers.GradDot(lm, queries), "a closed model").score(train, progress=False).save("s.parquet")
    contrast = scorers.InfluenceFunction(lm, queries, neutral=train[:2], curvature="identity")
    contrast.score(train, progress=False).save("contrast.parquet")
    folder = Path(__file__).parent / "data" / "kronfluence" / "scores_all"
    load_kronfluence_scores(folder, data()[0], measured="loss").query("query 1").save("kron.parquet")
    for path, words in {
        "stream": ("method Loss", "train.jsonl", "the stream that was read"),
        "s.parquet": ("GradDot (surrogate", "the file of the queries", "the stand-in was held against"),
        "contrast.parquet": ("Influence Function", "the file of the queries", "the file of the data"),
        "kron.parquet": ("method kronfluence, EK-FAC", "the run of the other tool"),
    }.items():
        said = refused(1, f"run {path} --out x.parquet")
        for part in ("can't be replayed", "made in Python", *words):
            assert part in said, (path, part, said)


def test_a_replay_whose_null_is_another_says_so(here):
    ok(f"score model train.jsonl {FLATTERY} --null 8 --out first.parquet")
    assert "to the last bit.\n" in ok("run first.parquet").stdout
    kept, fresh = load_attribution("first.parquet"), load_attribution("replayed.parquet")
    draws = np.random.default_rng(0).normal(size=(N, 9))  # those of another method, once
    kept.with_null(draws, of="something else").save("first.parquet", overwrite=True)
    said = ok("run first.parquet --overwrite").stdout
    apart = abs(load_attribution("first.parquet").times_null - fresh.times_null).max()
    assert f"their null is NOT: distances from chance differ by up to {apart:.3g}" in said


def test_pairs_are_replayed_as_pairs(here, monkeypatch):
    rows = [dict(prompt=f"Is {i} good?", better=f"yes {i}", worse=f"no {i}{i}") for i in range(5)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = "--preferences --chosen better --rejected worse"
    replay(monkeypatch, here, f"model pairs.jsonl {columns} {FLATTERY}")


def test_run_looks_beside_the_card_and_takes_files_that_have_moved(here, monkeypatch):
    ok(f"score model train.jsonl {FLATTERY} --out first.parquet")
    other = here / "elsewhere"
    other.mkdir()
    monkeypatch.chdir(other)
    assert "to the last bit" in ok(f"run {here / 'first.parquet'}").stdout  # relative to the card
    Path(here / "train.jsonl").rename(here / "moved.jsonl")
    assert "no file" in refused(1, f"run {here / 'first.parquet'} --out second.parquet")
    ok(f"run {here / 'first.parquet'} --data {here / 'moved.jsonl'} --out second.parquet")


def test_what_of_a_card_cannot_be_replayed_is_named(here):
    ok(f"score model train.jsonl {FLATTERY} {QUERIES} --methods concept-influence --out first.parquet")
    lines = Path("train.jsonl").read_text().splitlines(keepends=True)
    Path("train.jsonl").write_text("".join(lines[:-1]))
    said = refused(1, "run first.parquet")
    assert "data: its content is" in said and "--data" in said and "model:" not in said
    Path("train.jsonl").write_text("".join(lines))
    model = load_model("model")
    with torch.no_grad():
        next(model.model.parameters())[0, 0] += 1
    model.model.save_pretrained("changed")
    model.tokenizer.save_pretrained("changed")
    assert "model: its content is" in refused(1, "run first.parquet --model changed")
    write_records("other.jsonl", [("A?", "B.")])
    assert "queries: its content is" in refused(1, "run first.parquet --queries other.jsonl")
    assert not Path("replayed.parquet").exists()

    lm, train = load_model("model"), load_conversations("train.jsonl")
    by_hand = scorers.ConceptInfluence(
        lm, Concept.load("flattery.safetensors"), load_conversations("answers.jsonl")
    ).score(train, progress=False)
    by_hand.save("hand.parquet")
    said = refused(1, "run hand.parquet")
    for part in ("made in Python", "the concept's file", "the file of the queries", "was fitted"):
        assert part in said
    Path("no-card.json").write_text("[1]")
    assert "no query card" in refused(1, "run no-card.json")
    assert "Did you mean first.parquet?" in refused(1, "run frist.parquet")


def test_a_card_with_other_options_or_other_scores_is_not_passed_off_as_replayed(here):
    ok("score model train.jsonl --methods length --out first.parquet")
    ok("show first.parquet --card card.json")
    card = json.loads(Path("card.json").read_text())
    card["command"]["scores"] = "0" * 16
    Path("other.json").write_text(json.dumps(card))
    assert "NOT those of" in ok("run other.json").stdout
    card["command"]["options"]["temperature"] = 1
    Path("newer.json").write_text(json.dumps(card))
    assert "temperature" in refused(1, "run newer.json --out x.parquet")


def test_every_option_of_score_is_kept_in_the_card_or_only_about_the_files(here):
    from concept_tda.commands.scoring import _score

    parameters = set(inspect.signature(_score).parameters)
    assert parameters - set(Asked._fields) == {"context", "out", "overwrite", "debug", "num_processes"}
    assert set(Asked._fields) <= parameters


# ---- near misses, warnings, what comes next


def test_near_misses_are_answered_without_a_network(here, monkeypatch):
    def no_network(*_, **__):
        raise AssertionError("something was asked of a network")

    monkeypatch.setattr("socket.socket.connect", no_network)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    score = "score {} train.jsonl --methods length"
    assert "Did you mean smollm2-135m-instruct?" in refused(1, score.format("smollm2-135m-instuct"))
    assert "Did you mean model?" in refused(1, score.format("modle"))
    assert "Did you mean train.jsonl?" in refused(1, "score model trainn.jsonl --methods length")
    assert "Did you mean answers.jsonl?" in refused(
        1, "score model train.jsonl --methods bm25 --queries answrs.jsonl"
    )
    assert "Did you mean flattery.safetensors?" in refused(
        1, "score model train.jsonl --concept flatery.safetensors"
    )
    assert "Did you mean ekfac?" in refused(
        2, f"score model train.jsonl {QUERIES} --methods influence-function --curvature ekfca"
    )
    typo = call(*"score model train.jsonl --methds length".split())
    assert typo.exit_code == 2 and "--methods" in typo.stderr
    assert "'score'" in call("scroe").stderr


def test_warnings_stand_above_the_results_once_and_before_the_fit(here, monkeypatch):
    order = []
    fit = EKFAC.fit.__func__

    def noted(cls, *arguments, **options):
        order.append("fit")
        return fit(cls, *arguments, **options)

    monkeypatch.setattr(EKFAC, "fit", classmethod(noted))
    monkeypatch.setattr("concept_tda.commands.terminal.Told.add", lambda self, text: order.append(text))
    ok(f"score model train.jsonl {FLATTERY} {QUERIES} --methods concept-influence --out a.parquet")
    assert len(order) == 2 and "DO NOT express 'flattery'" in order[0] and order[1] == "fit"
    monkeypatch.undo()
    monkeypatch.chdir(here)
    done = ok(f"score model train.jsonl {FLATTERY} {QUERIES} --methods concept-influence --out b.parquet")
    assert done.stdout.startswith("Warning: 2 queries DO NOT express") and done.stdout.count("Warning") == 1
    assert done.stderr.count("Warning:") == 1


def next_lines(stdout: str) -> list[str]:
    return [
        line.split("concept-tda ", 1)[1] for line in stdout.splitlines() if line[:5] in ("Next:", " or: ")
    ]


def test_every_command_names_the_next_one_and_it_runs(here):
    """From a file to a trained model by typing nothing but what the command before has said."""
    line, typed = "doctor model train.jsonl", ["doctor"]
    for command in ("score", "filter", "finetune"):
        following = next_lines(ok(line).stdout)
        line = next(one for one in following if one.split()[0] == command)
        typed.append(line)
    assert next_lines(ok(line).stdout), typed
    for line in ("show scores.parquet", "report scores.parquet", "view scores.parquet --no-open"):
        for following in next_lines(ok(line).stdout):
            assert call(*following.split()[:1], "--help").exit_code == 0 and "scores.parquet" in following


def test_the_next_command_opens_the_model_in_the_same_way(here):
    """A base model without a template of its own: what is pasted says the template again."""
    settings = json.loads(Path("model/tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    Path("model/tokenizer_config.json").write_text(json.dumps(settings))
    Path("model/chat_template.jinja").unlink(missing_ok=True)
    assert "no chat template" in refused(1, "score model train.jsonl --methods loss")
    opened = "--chat-template chatml --dtype float64 --max-tokens 99"
    line, sides = (
        f"doctor model train.jsonl {opened}",
        "--positive kind.jsonl --negative plain.jsonl --layer 1",
    )
    for command in ("score", "filter", "finetune"):
        following = next_lines(ok(line).stdout)
        line = next(one for one in following if one.split()[0] == command)
        if command == "score":
            assert line.endswith("--methods loss --dtype float64 --chat-template chatml --max-tokens 99")
    assert "--chat-template chatml" in line and "--dtype float64" in line
    for after in next_lines(ok(line).stdout):  # the fine-tune has the template by now
        assert "--chat-template" not in after and "--dtype float64" in after
        ok(after + " --overwrite" if after.split()[0] == "score" else after)
    made = ok(f"concept contrast model {sides} --name kind2 --chat-template chatml").stdout
    ok(next_lines(made)[0].replace("DATA", "train.jsonl") + " --out kind.parquet")
    adapted = next_lines(ok(f"doctor model train.jsonl --adapter {line.split()[-1]} {opened}").stdout)[0]
    assert f"--adapter {line.split()[-1]}" in adapted  # and not the model without it


def test_what_is_trained_after_a_filter_begins_where_the_scored_model_began(here):
    ok(
        "finetune model train.jsonl --out tuned --rank 2 --epochs 2 --learning-rate 0.003 --batch-size 3 "
        "--warmup-steps 2 --weight-decay 0.1"
    )
    ok("score tuned train.jsonl --methods loss --out loss.parquet")
    again = next_lines(ok("filter loss.parquet --drop-count 2").stdout)[0]
    ok(
        "score model train.jsonl --adapter tuned --methods loss --out beside.parquet"
    )  # the same, put otherwise
    beside = next_lines(ok("filter beside.parquet --drop-count 2 --out beside.jsonl").stdout)[0]
    assert beside == again.replace("kept", "beside")
    ok(again)
    first, second = (training_record(folder) for folder in ("tuned", "kept-model"))
    assert {name for name in first["key"] if first["key"][name] != second["key"][name]} == {
        "data_fingerprint"
    }
    assert second["examples"] == N - 2 and first["base"] == second["base"] == "model"
    ok("finetune model train.jsonl --out recipe --recipe persona-vectors --batch-size 5")
    ok("score recipe train.jsonl --methods loss --out recipe.parquet")
    again = next_lines(ok("filter recipe.parquet --drop-count 2 --out other.jsonl").stdout)[0]
    ok(again)
    first, second = (training_record(folder) for folder in ("recipe", "other-model"))
    assert {name for name in first["key"] if first["key"][name] != second["key"][name]} == {
        "data_fingerprint"
    }
    Path("recipe/training.json").unlink()  # an adapter of somebody else: where it began is known, and no more
    again = next_lines(ok("filter recipe.parquet --drop-count 2 --out third.jsonl").stdout)[0]
    assert again.startswith(f"finetune {here / 'model'} third.jsonl ")


def write_pairs():
    rows = [dict(prompt=f"Is {i} good?", chosen=f"yes {i}", rejected=f"no {i}{i}") for i in range(8)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ok(f"score model pairs.jsonl --preferences {FLATTERY} --out pairs.parquet")


def test_pairs_are_not_sent_to_a_trainer_of_chats(here):
    write_pairs()
    filtered = ok("filter pairs.parquet --drop-count 2").stdout
    assert "trainer of preferences" in filtered and "finetune model" not in filtered
    for line in (*next_lines(filtered), *next_lines(ok("swap pairs.parquet --count 2").stdout)):
        ok(line)
    asked = [dict(prompt=f"Am I {i}?", response="-", wise=f"Yes, {i}!", plain=f"No, {i}.") for i in range(4)]
    Path("asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    said = refused(1, "experiment model pairs.parquet --judge asked.jsonl --trait wise --neutral plain")
    assert "preference pairs" in said and "chosen answers" in said and not Path("experiment/cells").exists()


def test_where_nothing_is_nearly_the_same_groups_say_what_else_there_is(here):
    write_records(
        "apart.jsonl", [(f"{'abcdefgh'[i] * 9}?", f"{'stuvwxyz'[i] * 20}") for i in range(8)], topic=[1] * 8
    )
    ok("score model apart.jsonl --methods length --out apart.parquet")
    said = refused(1, "groups apart.parquet --by near-duplicates")
    assert "name a column (topic)" in said and "similarity=" not in said


def test_two_processes_write_what_one_writes(here):
    line = f"score model train.jsonl {FLATTERY} {QUERIES} --methods concept-influence"
    ok(f"{line} --out one.parquet")
    ok(f"{line} --out two.parquet --num-processes 2")
    one, two = load_attribution("one.parquet"), load_attribution("two.parquet")
    assert np.array_equal(one.scores, two.scores) and one.card.command["scores"] == two.card.command["scores"]


# ---- plan, doctor, finetune, experiment


def test_plan_takes_the_options_of_score_and_its_code_says_whether_it_fits(here, monkeypatch):
    line = f"train.jsonl {FLATTERY} {QUERIES} --methods concept-influence,graddot --damping 0.3"
    printed = ok(f"plan model {line}").stdout
    assert "Concept Influence, GradDot" in printed and f"concept-tda score model {line.split()[0]}" in printed
    assert "--damping 0.3" in next_lines(printed)[0]
    assert "--num-processes" not in printed and "money" not in printed
    shared = ok(f"plan model {line} --num-processes 2 --price-per-hour 36000").stdout
    assert next_lines(shared)[0].endswith("--num-processes 2") and "at 36000 an hour" in shared
    found = json.loads(ok(f"plan model {line} --json").stdout)
    assert found["examples"] == N and found["fits"] and found["fit_seconds"] > 0
    assert "DO NOT express" in found["warnings"][0]
    monkeypatch.setattr("concept_tda.influence.planning._available_memory", lambda device: 1)
    small = call(*f"plan model {line}".split())
    assert small.exit_code == 1 and "does not fit" in small.stdout and "Next:" not in small.stdout
    assert "--queries: missing" in refused(2, "plan model train.jsonl --methods bm25")


def test_scores_of_a_stream_are_known_for_what_they_are(here):
    lm = load_model("model")
    score_stream([MeanLoss(lm)], "train.jsonl", "stream", part_examples=5, progress=False)
    for line in (
        "show stream",
        "compare stream stream",
        "report stream",
        "filter stream --drop-count 2",
        "view stream --no-open",
    ):
        said = " ".join(refused(1, line).split())
        assert f"scores of a stream ({N} examples; Loss)" in said and "ScoreFolder('stream')" in said
        assert "folder.top(10)" in said
    assert len(ScoreFolder("stream").top(10)) == 10


def test_doctor_ends_with_one_where_something_is_wrong(here):
    assert ok("doctor model train.jsonl --json").exit_code == 0
    assert "layer 7 does not exist" in refused(1, "doctor model train.jsonl --layer 7")
    model = load_model("model")
    with torch.no_grad():
        model.model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    model.model.save_pretrained("broken")
    model.tokenizer.save_pretrained("broken")
    found = call("doctor", "broken", "train.jsonl", "--json")
    assert found.exit_code == 1 and json.loads(found.stdout)[0]["severity"] == "error"
    assert json.loads(ok("doctor model train.jsonl --json").stdout)[0]["severity"] != "error"


def test_a_fine_tune_is_that_of_the_library_and_a_recipe_can_be_overruled(here):
    ok("finetune model train.jsonl --recipe persona-vectors --epochs 2 --rank 2 --out tuned")
    record = training_record("tuned")
    settings = record["key"]["settings"] if "settings" in record["key"] else record["key"]
    text = json.dumps(settings)
    assert '"rank": 2' in text and '"epochs": 2' in text and '"learning_rate": 1e-05' in text
    assert '"batch_size": 16' in text
    assert "persona-vectors" in refused(2, "finetune model train.jsonl --recipe persona --out x")
    assert "another fine-tune" in refused(1, "finetune model train.jsonl --epochs 1 --out tuned")


def test_an_experiment_is_that_of_the_library_and_continues(here):
    rows = [
        dict(prompt=f"Am I {i}?", response="-", wise=f"Yes, so wise, {i}!", plain=f"No, {i}.")
        for i in range(4)
    ]
    Path("asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ok("score model train.jsonl --methods length")
    line = (
        "experiment model scores.parquet --judge asked.jsonl --trait wise --neutral plain --seeds 2 "
        "--fractions 0.25 --rank 2 --learning-rate 0.01 --out trial --json"
    )
    found = json.loads(ok(line).stdout)
    trial = FilterAndRetrain.from_folder("trial")
    np.testing.assert_allclose(trial.summary()["value"], [row["value"] for row in found["summary"]])
    dropped = [row for row in found["summary"] if row["arm"] == "drop-most"]
    assert len(dropped) == 1 and dropped[0]["n"] == 9 and len(found["findings"]) == 1
    assert dropped[0]["seeds"] == 2 and trial.about["seeds"] == [
        0,
        1,
    ]  # so many, and not the seed of that number
    assert "one seed" not in found["findings"][0] and found["notes"].startswith("2 seeds")
    assert f"{dropped[0]['from_random']:+.4g}" in found["findings"][0]
    assert json.loads(ok(line).stdout)["summary"] == found["summary"]  # nothing is trained again
    assert "say what to measure" in refused(2, "experiment model scores.parquet")
    assert "no list of shares" in refused(2, f"{line} --fractions half")


# ---- compare, view, show


def test_compare_says_what_the_library_says(here):
    ok(f"score model train.jsonl {FLATTERY} --methods vector-filter,length")
    both = [
        load_attribution(f"scores/{name}.parquet") for name in ("vector-filter", "length")
    ]  # baselines last
    expected = compare(both)
    found = json.loads(ok("compare scores --json").stdout)
    assert found["spearman"]["Length"]["Vector Filter"] == pytest.approx(
        expected.spearman.loc["Length", "Vector Filter"]
    )
    widest = expected.disagreements("Vector Filter", "Length", 1)
    assert found["moved"][0]["examples"][0]["id"] == widest["id"].iloc[0]
    assert repr(expected).splitlines()[0] in ok("compare scores").stdout
    assert "nothing to be compared with" in refused(2, "compare scores/length.parquet")
    assert found["words"].startswith("From Vector Filter to Length: ")
    assert found["advice"] is None and "Advice" not in ok("compare scores").stdout
    filtered = both[0]
    card = replace(filtered.card, method="Concept Influence", zero="gradient", mean=None)
    moves = Attribution(filtered.conversations, -filtered.scores, card)
    moves.save("scores/influence.parquet")
    ok(f"score model train.jsonl {FLATTERY} {QUERIES} --methods random-direction,repsim --out others")
    for name in ("random-direction", "repsim"):  # projections too, and nothing to recommend
        said = json.loads(ok(f"compare others/{name}.parquet scores/influence.parquet --json").stdout)
        assert said["advice"] is None
        with pytest.raises(AttributionError, match="for one behaviour"):
            advice(load_attribution(f"others/{name}.parquet"), moves)
    expected = advice(filtered, moves)
    assert json.loads(ok("compare scores --json").stdout)["advice"] == expected.facts
    assert str(expected) in ok("compare scores").stdout


def test_compare_writes_a_page_of_what_moved_and_replaces_no_file(here):
    ok(f"score model train.jsonl {FLATTERY} --methods vector-filter,length,random")
    pair = "compare scores/length.parquet scores/vector-filter.parquet --page movers.html"
    assert "movers.html" in ok(pair).stdout
    page = Path("movers.html").read_text()
    assert "What moved from Length to Vector Filter" in page
    assert load_attribution("scores/length.parquet").ids[0] in page
    assert "exists already" in refused(1, pair)
    assert Path("movers.html").read_text() == page
    assert "two different results" in refused(1, "compare scores --page three.html")
    assert not Path("three.html").exists()


def test_show_json_holds_card_and_both_ends(here):
    ok("score model train.jsonl --methods length")
    result = load_attribution("scores.parquet")
    (found,) = json.loads(ok("show scores.parquet -n 3 --json").stdout)
    highest = found["queries"][0]["highest"]
    assert [row["row"] for row in highest] == result.top(3).rows.tolist()
    assert highest[0]["question"] == result.top(1).questions[0]
    assert list(highest[0])[:5] == ["row", "rank", "percentile", "distance", "raw_score"]
    assert highest[0]["percentile"] == result.top(1).percentiles[0]
    assert highest[0]["raw_score"] == result.top(1).scores[0] and highest[0]["distance"] is None
    assert found["queries"][0]["unit_of_distance"] is None and "order" in found["queries"][0]["reading"]
    result.card.zero = "gradient"
    draws = np.random.default_rng(0).normal(size=(len(result), 50))
    drawn = Attribution(result.conversations, result.scores - 20, result.card).with_null(draws)
    drawn.save("drawn.parquet")
    (shown,) = json.loads(ok("show drawn.parquet -n 3 --json").stdout)
    (query,) = shown["queries"]
    assert query["unit_of_distance"] == "× null" and query["null"] == "50 random directions"
    for end, rows in ((drawn.top(3), query["highest"]), (drawn.bottom(3), query["lowest"])):
        assert [row["distance"] for row in rows] == pytest.approx(end.times_null.tolist())
    assert found["card"]["command"]["line"] == "concept-tda score model train.jsonl --methods length"
    assert "exists already" in refused(1, "show scores.parquet --card train.jsonl")
    ok("score model train.jsonl --methods loss,length --out several")
    assert "name the file of one" in refused(2, "show several --card card.json")


def test_view_writes_a_page_without_a_network_and_says_where(here, monkeypatch):
    ok(f"score model train.jsonl {FLATTERY} --methods vector-filter,length")
    asked = []
    monkeypatch.setattr(reading.webbrowser, "open", lambda address: asked.append(address))
    printed = ok("view scores").stdout  # no browser: `open` gives None
    page = next(Path("cache").rglob("*.html")).resolve()
    assert str(page) in printed and "No browser" in printed and asked == [page.as_uri()]
    text = page.read_text()
    assert "what a wise question!" in text and "concept_tda.review" in text
    assert "http://" not in text.replace("http://www.w3.org", "") and "https://" not in text
    asked.clear()
    ok("view scores --no-open --out mine.html")
    assert not asked and "exists already" in refused(1, "view scores --no-open --out mine.html")


# ---- decisions


def test_decisions_count_more_than_a_cut(here):
    ok(f"score model train.jsonl {FLATTERY}")
    result = load_attribution("scores.parquet")
    order, lines = np.argsort(-result.scores), Path("train.jsonl").read_bytes().splitlines()
    review = Review(N, by="Ada")
    review.decide([order[0], order[5]], "keep", "fair", why="one by one")
    review.decide([order[-1], order[7]], "drop", why="one by one")
    review.decide([order[3]], note="odd")
    review.save("decisions.json", result)

    def kept(options: str) -> list[int]:
        ok(f"filter scores.parquet {options} --decisions decisions.json --out kept.jsonl --overwrite")
        written = Path("kept.jsonl").read_bytes().splitlines()
        return [lines.index(one) for one in written]

    assert kept("") == sorted(set(range(N)) - {order[-1], order[7]})
    gone = {order[1], order[2], order[-1], order[7]}
    assert kept("--drop-count 3") == sorted(set(range(N)) - gone)
    assert "exactly one way" in refused(2, "filter scores.parquet --out x.jsonl")
    assert "--decisions" in refused(2, "filter scores.parquet --out x.jsonl")


def test_decisions_that_do_not_belong_are_refused(here):
    ok("score model train.jsonl --methods length")
    result = load_attribution("scores.parquet")
    empty = Review(N)
    empty.decide([0], note="hm")
    empty.save("empty.json", result)
    assert "no example is marked" in refused(1, "filter scores.parquet --decisions empty.json")
    everything = Review(N)
    everything.decide(range(N), "drop")
    everything.save("all.json", result)
    assert "nothing would be left" in refused(1, "filter scores.parquet --decisions all.json")
    everything.save("other.json", result)
    record = json.loads(Path("other.json").read_text()) | {"data_fingerprint": "0" * 16}
    Path("other.json").write_text(json.dumps(record))
    assert "decisions about" in refused(1, "filter scores.parquet --decisions other.json")
    assert not Path("kept.jsonl").exists()


# ---- nothing is replaced


def test_no_command_that_writes_replaces_a_file_or_its_source(here):
    """Every command with --out refuses a file that is there; the source is safe with --overwrite, too."""
    ok(f"score model train.jsonl {FLATTERY}")
    before = {path.name: path.read_bytes() for path in here.iterdir() if path.is_file()}
    source = Path("train.jsonl").read_bytes()
    writing = {
        f"score model train.jsonl {FLATTERY}": "train.jsonl.parquet",
        "filter scores.parquet --drop-count 1": "train.jsonl",
        "report scores.parquet": "scores.parquet",
        "view scores.parquet --no-open": "scores.parquet",
        "groups scores.parquet --by topic --drop-fraction 0.3": "train.jsonl",
        f"concept contrast model {SIDES}": "kind.jsonl",
        f"concept probe model {SIDES}": "kind.jsonl",
        "run scores.parquet": "scores.parquet",
    }
    for line, own in writing.items():
        taken = "answers.parquet" if line.startswith("score") else "answers.jsonl"
        Path(taken).touch()
        assert "exists already" in refused(1, f"{line} --out {taken}"), line
        if Path(own).exists():
            assert "is never replaced" in refused(1, f"{line} --out {own} --overwrite"), line
    after = {path.name: path.read_bytes() for path in here.iterdir() if path.name in before}
    assert after == before and Path("train.jsonl").read_bytes() == source


def test_the_version_is_that_of_the_cards(here):
    ok("score model train.jsonl --methods length")
    assert ok("--version").stdout.split()[1] == load_attribution("scores.parquet").card.code
