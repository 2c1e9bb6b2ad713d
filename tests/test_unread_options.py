"""No option of the command line is typed in vain: what a command or a method does not read it refuses, and
what it accepts changes what comes out."""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from terminal import call, enter_place, write_records

from concept_tda.cli import app
from concept_tda.commands.methods import GOVERNED, METHODS, Asked, options_of
from concept_tda.commands.scoring import score_asked
from concept_tda.data.conversations import load_conversations
from concept_tda.model.finetuning import finetune
from concept_tda.model.loading import load_model

N = 12
SIDES = "--positive kind.jsonl --negative plain.jsonl --layer 1"
USUAL = dict(
    model="model", data="train.jsonl", concept=None, positive=None, negative=None, layer=None, name=None,
    pooling="response_mean", transfer=False, queries=None, methods=("length",), sites="attention",
    curvature="ekfac", damping=0.1, relative=True, checkpoints=None, cheap=None, exact=None, keep=0.9,
    form="across_tokens", tokens=False, preferences=False, chosen="chosen", rejected="rejected", seed=0,
    null=0, max_tokens=1536, token_budget=1024, adapter=None, dtype="float32", device=None,
    chat_template=None,
)  # fmt: skip
TYPED: dict[str, Any] = dict(
    concept="flattery.safetensors", positive="kind.jsonl", negative="plain.jsonl", layer="1", name="kindness",
    pooling="all_but_first", transfer=True, queries="answers.jsonl", sites="mlp", curvature="identity",
    damping=0.7, relative=False, checkpoints="tuned", cheap="length", exact="graddot", keep=1.0,
    form="within_token", tokens=True, seed=3, null=5, max_tokens=40, token_budget=64, num_processes=2,
)  # fmt: skip
SPEED_ONLY = {"token_budget", "num_processes"}  # they change the price, and no score


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """A folder with a model, data, a concept and a fine-tune."""
    before, cache = Path.cwd(), os.environ.get("CONCEPT_TDA_CACHE")
    folder = tmp_path_factory.mktemp("typed")
    os.environ["CONCEPT_TDA_CACHE"] = str(folder / "cache")
    enter_place(folder, N)
    lm, train = load_model("model"), load_conversations("train.jsonl")
    finetune(lm, train, "tuned", rank=2, epochs=1, checkpoints=2, learning_rate=0.01, progress=False)
    shutil.copytree("tuned", "other")
    yield folder
    os.chdir(before)
    os.environ.pop("CONCEPT_TDA_CACHE")
    if cache is not None:
        os.environ["CONCEPT_TDA_CACHE"] = cache


def flags(name: str, value: Any) -> list[str]:
    """An option as it is typed."""
    if name == "relative":
        return ["--absolute"]
    option = f"--{name.replace('_', '-')}"
    return [option] if value is True else [option, str(value)]


def needed(method: str, sides: bool = False) -> dict[str, Any]:
    """The least that a method wants, the behaviour from a file or from two sides."""
    made = dict(positive="kind.jsonl", negative="plain.jsonl", layer="1")
    given = {
        "concept": made if sides else dict(concept="flattery.safetensors"),
        "queries": dict(queries="answers.jsonl"),
        "layer": dict(layer="1"),
        "checkpoints": dict(checkpoints="tuned"),
        "pair": dict(cheap="length", exact="graddot", queries="answers.jsonl"),
    }
    return {name: one for need in METHODS[method].needs for name, one in given[need].items()}


def refusal(arguments: list[str]) -> str:
    """The error that a line ends with, before anything is opened."""
    result = call(*arguments)
    assert result.exit_code == 2, (arguments, result.output, repr(result.exception))
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    return error


@pytest.mark.parametrize("command", ["score", "plan"])
@pytest.mark.parametrize("method", METHODS)
def test_an_option_that_a_method_does_not_read_is_refused(method, command):
    assert set(TYPED) == GOVERNED, "an option without a value to type here"
    given = needed(method)
    counts = options_of(Asked(**USUAL | given | {"methods": (method,)}), method)
    unread = GOVERNED - counts - set(given) - {"seed"}
    assert unread, "every method leaves some option unread"
    words = [word for name, value in given.items() for word in flags(name, value)]
    for name in sorted(unread):
        more = flags(name, TYPED[name])
        if name in ("positive", "negative"):
            more = SIDES.split()
        if name in ("cheap", "exact"):
            more = ["--cheap", "length", "--exact", "graddot"]
        line = [command, "gone", "gone.jsonl", "--methods", method, *words, *more]
        if name == "tokens" and command == "score":
            line += ["--out", "x.parquet"]
        error = refusal(line)
        assert more[0].split("/")[0] in error or name in ("layer", "positive", "negative"), (name, error)
        assert "leave" in error or "--methods cascade" in error or "not both" in error, (name, error)


ELSEWHERE = {  # what these do not change, and why
    ("max_tokens", "training-influence"): "a run on data cut otherwise is refused by the library",
    ("seed", "cascade"): "all that was not picked is in the sample, where it is few",
    ("positive", "random-direction"): "it takes the layer of the concept, whatever the sides say",
    ("negative", "random-direction"): "it takes the layer of the concept, whatever the sides say",
}


def outcome(asked: Asked) -> dict[str, Any]:
    """Everything that a score says, but for its price, the time, and the line that was typed."""
    (result,) = score_asked(asked).values()
    card = result.card.to_dict()
    for name in ("command", "cost", "created", "settings"):
        del card[name]
    settings = {k: v for k, v in result.card.settings.items() if "seconds" not in k and k != "max_tokens"}
    kept = result.token_scores is not None
    null = None if result.null is None else (result.null.draws, result.null.seed, result.null.quantiles)
    return dict(card=card, settings=settings, scores=result.scores, tokens=kept, null=null)


def differs(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether a reader could tell them apart."""
    if not np.array_equal(one["scores"], other["scores"]):
        return True
    return repr(one | {"scores": 0}) != repr(other | {"scores": 0})


@contextlib.contextmanager
def one_model():
    """Models that are opened once."""
    import concept_tda.model.loading as loading

    known, opened = {}, loading.load_model

    def remembered(name, **options):
        if options.get("adapter") or not isinstance(name, str):
            return opened(name, **options)
        return known.setdefault(repr((name, options)), opened(name, **options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load_model", remembered)
        yield


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
def test_an_option_that_a_method_reads_changes_what_comes_out(method):
    """Each option is changed alone, where nothing else makes it void."""
    file = Asked(**USUAL | needed(method) | {"methods": (method,)})
    sides = Asked(**USUAL | needed(method, sides=True) | {"methods": (method,)})
    if method in ("source", "training-influence"):
        sides = file._replace(positive="kind.jsonl", negative="plain.jsonl", layer="1")
    if method == "repsim":
        sides = file
    values = dict(TYPED) | {
        "layer": "2", "queries": "kind.jsonl", "checkpoints": "longer", "cheap": "random",
        "exact": "gradcos", "negative": "answers.jsonl", "positive": "answers.jsonl",
    }  # fmt: skip
    found: dict[Asked, dict[str, Any]] = {}
    with one_model():
        for name in sorted(options_of(file, method) | options_of(sides, method)):
            base = sides if name in ("positive", "negative", "layer", "name", "pooling") else file
            if name not in options_of(base, method) or name in SPEED_ONLY:
                continue
            if name in ("name", "positive", "negative") and base.positive is None:
                continue  # made of a file instead
            if name == "transfer" or (name, method) in ELSEWHERE:
                continue
            value = {"concept": other_concept, "checkpoints": longer_run}.get(name, lambda: values[name])()
            changed = base._replace(**{name: value})
            one, other = (
                found.get(asked) or found.setdefault(asked, outcome(asked)) for asked in (base, changed)
            )
            assert differs(one, other), (method, name)


def other_concept() -> str:
    import torch

    from concept_tda.concepts.concept import tensor_concept

    if not Path("other.safetensors").exists():
        direction = torch.arange(16.0).sin()
        tensor_concept(direction, 2, name="other", lm=load_model("model")).save("other.safetensors")
    return "other.safetensors"


def longer_run() -> str:
    if not Path("longer").exists():
        lm, train = load_model("model"), load_conversations("train.jsonl")
        finetune(lm, train, "longer", rank=2, epochs=2, checkpoints=2, learning_rate=0.02, progress=False)
    return "longer"


VOID = [
    ("--name", "--concept flattery.safetensors --name kindness"),
    ("--pooling", "--concept flattery.safetensors --pooling prompt_last"),
    ("--transfer", f"{SIDES} --transfer"),
    ("--damping", "--methods influence-function --queries answers.jsonl --curvature identity --damping 1"),
    ("--relative", "--methods influence-function --queries answers.jsonl --curvature identity --absolute"),
    ("--seed", "--concept flattery.safetensors --seed 1"),
    ("--seed", "--methods influence-function --queries answers.jsonl --curvature datainf --seed 1"),
    ("--null", "--methods gradcos --queries answers.jsonl --null 100"),
    ("--pooling", "--methods graddot --queries answers.jsonl --pooling prompt_last"),
    ("--layer", "--methods graddot --queries answers.jsonl --layer 1"),
    ("--keep", "--methods graddot --queries answers.jsonl --keep 0.5"),
    ("--max-tokens", "--methods bm25 --queries answers.jsonl --max-tokens 9"),
]


@pytest.mark.parametrize("option, line", VOID)
def test_an_option_that_another_makes_void_is_refused(option, line):
    error = refusal(["score", "gone", "gone.jsonl", *line.split()])
    assert error.startswith(f"Error: {option}") and "leave it out" in error


def test_of_several_methods_it_is_said_which_does_not_read_an_option():
    words = "--concept flattery.safetensors --queries answers.jsonl --methods vector-filter,graddot"
    result = call("score", "model", "train.jsonl", *words.split(), "--sites", "mlp", "--out", "both")
    assert result.exit_code == 0, result.output
    notes = [line for line in result.stderr.splitlines() if line.startswith("Note: ")]
    assert "Note: --sites counts for graddot, not for vector-filter" in notes
    assert "Note: --concept counts for vector-filter, not for graddot" in notes
    assert "--sites: vector-filter, loss do not read it" in refusal(
        [
            "score",
            "gone",
            "x",
            *words.replace("graddot", "loss").split()[:2],
            "--methods",
            "vector-filter,loss",
        ]
        + ["--sites", "mlp"]
    )


def test_the_line_on_a_card_can_be_typed():
    from concept_tda.results.attribution import load_attribution

    words = "--concept flattery.safetensors --queries answers.jsonl --methods vector-filter,graddot,random"
    done = call(
        "score", "model", "train.jsonl", *words.split(), "--seed", "4", "--sites", "mlp", "--out", "l"
    )
    assert done.exit_code == 0, done.output
    for name in ("vector-filter", "graddot", "random"):
        saved = load_attribution(f"l/{name}.parquet")
        line = saved.card.command["line"].split()[1:]
        assert call(*line, "--out", f"again-{name}.parquet").exit_code == 0, line
        again = load_attribution(f"again-{name}.parquet")
        np.testing.assert_array_equal(again.scores, saved.scores)


# ---- the other commands: each option always counts, or there is a line in which it is refused

ALWAYS = {
    "score": "model data methods preferences chosen rejected adapter dtype device chat_template out "
    "overwrite",
    "plan": "model data methods preferences chosen rejected adapter dtype device chat_template json_ "
    "price_per_hour",
    "run": "model data out overwrite",
    "doctor": "example layer sites max_tokens adapter dtype device chat_template json_",
    "contrast": "positive negative layer name pooling seed dtype device chat_template out overwrite",
    "probe": "positive negative layer name pooling seed dtype device chat_template out overwrite",
    "persona": "layer judge samples temperature max_new_tokens pooling seed dtype device chat_template out "
    "overwrite",
    "finetune": "recipe rank alpha learning_rate warmup_steps weight_decay precision "
    "epochs batch_size max_tokens seed checkpoints dtype device "
    "chat_template out",
    "show": "n query card json_",
    "compare": "labels top n page json_",
    "view": "labels out open_",
    "report": "out title labels examples rows overwrite",
    "filter": "drop_fraction drop_count threshold decisions layout out overwrite",
    "swap": "fraction count threshold lowest layout out overwrite",
    "groups": "by labels n query table drop_fraction",
    "discover": "n atoms examples seed",
    "experiment": "judge capability fractions seeds random recipe rank alpha learning_rate "
    "warmup_steps weight_decay precision "
    "epochs batch_size "
    "dtype device chat_template out json_",
    "demo": "",
}
UNREAD = {
    "run": {name: f"run r.parquet --{name} x" for name in ("positive", "negative", "checkpoints", "queries")}
    | {"concept": "run l.parquet --concept x"},
    "show": {"overwrite": "show r.parquet --overwrite"},
    "compare": {"positive": "compare r.parquet l.parquet --positive yes",
                "overwrite": "compare r.parquet l.parquet --overwrite"},
    "view": {"positive": "view r.parquet --positive yes --out v.html --no-open",
             "overwrite": "view r.parquet --overwrite --no-open"},
    "report": {"positive": "report r.parquet --positive yes"},
    "filter": {"lowest": "filter r.parquet --decisions d.json --lowest",
               "query": "filter r.parquet --decisions d.json --query x"},
    "groups": {"out": "groups r.parquet --by topic --out x.jsonl",
               "overwrite": "groups r.parquet --by topic --overwrite"},
    "experiment": {"trait": "experiment m r.parquet --capability kind.jsonl --trait x",
                   "neutral": "experiment m r.parquet --capability kind.jsonl --neutral x"},
}  # fmt: skip


def all_commands():
    """Every command with its parameters."""
    import typer

    def below(group):
        for name, one in group.commands.items():
            yield from below(one) if hasattr(one, "commands") else [(name, one)]

    return dict(below(typer.main.get_command(app)))


def test_every_option_of_every_command_counts_or_has_a_line_in_which_it_is_refused():
    found = {
        name: {one.name for one in command.params if one.param_type_name == "option"} - {"debug", "help"}
        for name, command in all_commands().items()
    }
    assert set(found) == set(ALWAYS)
    for name, options in found.items():
        governed = GOVERNED if name in ("score", "plan") else set()
        known = set(ALWAYS[name].split()) | set(UNREAD.get(name, {})) | governed
        assert options == known - ({"model", "data"} if name in ("score", "plan") else set()), name


@pytest.mark.parametrize("command, option", [(name, one) for name, lines in UNREAD.items() for one in lines])
def test_an_option_that_a_command_does_not_read_is_refused(command, option):
    if not Path("r.parquet").exists():
        for out, words in {"r": "--concept flattery.safetensors", "l": "--methods length"}.items():
            assert (
                call("score", "model", "train.jsonl", *words.split(), "--out", f"{out}.parquet").exit_code
                == 0
            )
        write_records("d.json", [])
    error = refusal(UNREAD[command][option].split())
    assert error.startswith(f"Error: --{option}: nothing would read it here") and (
        "leave it out" in error or "too" in error
    )
