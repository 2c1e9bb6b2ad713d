"""What people give at the front door by mistake, and what they are told."""

import inspect
import re
from types import SimpleNamespace

import pytest
import torch

import concept_tda as ct
from concept_tda.groups.sae import SparseAutoencoder
from concept_tda.influence.doctor import DoctorError
from concept_tda.model.finetuning import FinetuneError
from concept_tda.model.loading import ModelError

OWN_WORDS = {"doctor": DoctorError, "finetune": FinetuneError}  # which say it about all of their arguments
CHATS = [{"prompt": f"a {i}", "response": f"x {i} c"} for i in range(6)]


@pytest.fixture(scope="module")
def right(tiny_lm, tmp_path_factory):
    "A right argument of each name that the front door asks for."
    lm = ct.load_model(tiny_lm)
    data = ct.load_conversations(CHATS)
    direction = torch.randn(lm.width, generator=torch.Generator().manual_seed(0))
    concept = ct.tensor_concept(direction, 1, name="kindness")
    judge = ct.FunctionJudge(lambda prompt, answer: 1.0, ["why?"], name="ones")
    common = dict(
        lm=lm, concept=concept, concepts=concept, like=concept, layer=1, strength=1.0, name="kindness"
    )
    common |= dict.fromkeys(["data", "examples", "queries", "positive", "negative", "prompts", "train"], data)
    common |= dict(folder=tmp_path_factory.mktemp("front"), judge=judge, judges={"ones": judge}, model=lm)
    common |= dict(layers=[1], attributions={}, methods=[], trait="sycophantic", results={})
    common |= dict(capability=ct.FunctionJudge(lambda prompt, answer: 0.0, ["why?"], name="zeros"))
    weights = SimpleNamespace(W_enc=torch.ones(lm.width, 8), W_dec=torch.ones(8, lm.width))
    common |= dict(sae=SparseAutoencoder(weights, 1, "ones"))
    common |= dict(scorers=[ct.VectorFilter(lm, concept)])
    result = common["scorers"][0].score(data, progress=False)
    common |= dict(attribution=result, path=common["folder"] / "report.html", questions=["why?"], parts=data)
    return common


def asking_for(name):
    "What the front door has that takes an argument of this name."
    doors = {door: getattr(ct, door) for door in ct.__all__} | {"EKFAC.fit": ct.EKFAC.fit}
    return [
        door
        for door, it in doors.items()
        if callable(it) and not (inspect.isclass(it) and issubclass(it, Exception)) and name in asked(it)
    ]


def asked(it):
    "Names of the arguments that have to be given."
    needed = inspect.signature(it).parameters.values()
    return [one.name for one in needed if one.default is one.empty and one.kind < one.VAR_KEYWORD]


def counts():
    "What the front door counts: options that are whole numbers, but for those with another meaning."
    other = "seed", "memory_budget"  # any number; however little
    return [
        (door, one.name)
        for door in ct.__all__
        if callable(it := getattr(ct, door)) and not (inspect.isclass(it) and issubclass(it, Exception))
        for one in inspect.signature(it).parameters.values()
        if type(one.default) is int and one.annotation in (int, int | None) and one.name not in other
    ]


def called(door, right, **wrong):
    it = ct.EKFAC.fit if door == "EKFAC.fit" else getattr(ct, door)
    own = dict(trait=right["judge"]) if door == "ParetoCurve" else {}
    given = own | wrong
    result = it(**{name: right[name] for name in asked(it) if name not in given} | given)
    if hasattr(result, "__enter__"):
        with result:
            pass
    return result


@pytest.mark.parametrize("door", asking_for("lm"))
def test_whatever_takes_a_model_says_how_to_open_what_was_given_instead(door, right, tiny_lm):
    ways = {
        "load_model((model, tokenizer))": tiny_lm[0],
        "load_model('a/name')": "a/name",
        "load_model": None,
    }
    for way, wrong in ways.items():
        with pytest.raises(OWN_WORDS.get(door, ModelError)) as told:
            called(door, right, lm=wrong)
        assert ("load_model" if door in OWN_WORDS else way) in str(told.value)


@pytest.mark.parametrize("door", asking_for("concept"))
def test_whatever_takes_a_concept_says_how_to_make_one_of_what_was_given_instead(door, right):
    ways = {"tensor_concept(": torch.ones(4), "Concept.load('k.safetensors')": "k.safetensors"}
    for way, wrong in (ways | {"contrastive_concept": None}).items():
        with pytest.raises(ct.ConceptTDAError) as told:
            called(door, right, concept=wrong)
        assert way in str(told.value)


# The others need checkpoints or a folder. Their queries become a `LossQuery` as here, or are tokenised.
IN_ONE_PASS = [
    door
    for door in asking_for("queries")
    if door != "build_atlas" and "checkpoints" not in asked(getattr(ct, door))
]


@pytest.mark.parametrize("door", IN_ONE_PASS)
def test_queries_are_whatever_training_data_may_be(door, right):
    by_file, by_list = (
        ct.score_together(
            [called(door, right, queries=queries, **more)], right["data"], lm=right["lm"], progress=False
        )
        for more in [dict(curvature="identity") if "Influence" in door else {}]
        for queries in (right["data"], CHATS)
    )
    assert [one.scores.tolist() for one in by_file.values()] == [
        one.scores.tolist() for one in by_list.values()
    ]
    with pytest.raises(ct.ConceptTDAError):
        called(door, right, queries=None)


def test_one_scorer_or_none_is_no_list_of_scorers(right):
    one = right["scorers"][0]
    for wrong, said in (
        (one, "one alone has"),
        ([], "got nothing"),
        ([one, 3], "got a int"),
        (None, "nothing"),
    ):
        with pytest.raises(ct.ConceptTDAError, match=said):
            ct.score_together(wrong, right["data"])
    for wrong in (None, [], [1]):
        with pytest.raises(ct.ConceptTDAError):
            ct.compare(wrong)


# `read_features` and `feature_groups` want a real SAE; their batches and sizes are checked like the others'.
@pytest.mark.parametrize("wrong", [float("nan"), 2.5, 40.5, -3])
@pytest.mark.parametrize(("door", "name"), [one for one in counts() if "feature" not in one[0]])
def test_whatever_counts_something_says_what_a_count_is(door, name, wrong, right, tmp_path):
    data, lm, result = right["data"], right["lm"], right["attribution"]
    both = ct.load_conversations([one | dict(kind="xy"[i % 2], plain="y") for i, one in enumerate(CHATS)])
    own = dict(
        tokenize=dict(conversations=data, tokenizer=lm.tokenizer),
        build_atlas=dict(rank=4),
        plan=dict(scorers=right["scorers"]),
        Cascade=dict(cheap=right["scorers"][0], exact=ct.GradDot(lm, data)),
        LESS=dict(checkpoints=[lm], moments=[None], learning_rates=[1e-3]),
        LossJudge=dict(conversations=data),
        ContrastJudge=dict(items=both, trait="kind", neutral="plain"),
        LocalJudge=dict(prompt_template="{question} {answer}", judge_lm=lm, questions=["why?"]),
        OpenAIJudge=dict(prompt_template="{question} {answer}"),
        MethodComparison=dict(methods={"a": result}, concept=right["concept"]),
        score_groups=dict(groups=ct.column_groups(both, "kind")),
        compare=dict(attributions=[result]),
    )
    folder = dict(folder=tmp_path / "new") if "folder" in asked(getattr(ct, door)) else {}
    with pytest.raises(ct.ConceptTDAError) as told:
        made = called(
            door, right | dict(attributions={"a": result}), **folder, **own.get(door, {}), **{name: wrong}
        )
        made.score(data, progress=False) if hasattr(made, "score") else made.evaluate(lm)
    assert re.search(rf"\b{name}\b", str(told.value)) and f"{wrong}" in str(told.value)
