"""The report: complete, self-contained, small, and safe with hostile texts, in a real browser too where there
is one."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from test_attribution import HOSTILE, Reader, make

from concept_tda.data.conversations import Conversation, Conversations, load_conversations
from concept_tda.foundation.errors import StorageError
from concept_tda.results.attribution import Attribution
from concept_tda.results.cards import Cost, QueryCard
from concept_tda.results.comparison import compare
from concept_tda.results.metrics import AttributionError, percent_text
from concept_tda.views.report import write_report
from concept_tda.views.review import Review

from chromium import Chromium, needs_browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
browser = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium on the PATH")


def chats(texts, name="train"):
    return Conversations(
        [
            Conversation(
                ({"role": "user", "content": f"q {text}"}, {"role": "assistant", "content": text}),
                metadata={"bad": i % 2 == 0, "note": text},
            )
            for i, text in enumerate(texts)
        ],
        name,
    )


def tokenized(data, seed=0, width=5):
    """Token arguments with made-up scores."""
    rng, texts = (
        np.random.default_rng(seed),
        [re.findall(rf"(?s).{{1,{width}}}", c.prompt[0]["content"] + c.response) for c in data],
    )
    return dict(
        tokens=texts,
        token_scores=[rng.normal(size=len(t)) for t in texts],
        response_masks=[np.arange(len(t)) > len(t) // 3 for t in texts],
    )


def several(n=40, texts=None):
    """Three methods on the same examples, one with token scores."""
    data, rng = chats(texts or [f"an answer with the number {i}" for i in range(n)]), np.random.default_rng(0)
    card = lambda method: QueryCard(
        method,
        "sycophancy",
        zero="gradient",
        model="tiny",
        model_fingerprint="feed",
        data="train",
        layer=3,
        notes=["one example was cut"],
        cost=Cost(2.0, 100),
    )
    return [
        Attribution(data, rng.normal(size=len(data)), card("Concept Influence"), **tokenized(data)),
        Attribution(data, rng.normal(size=len(data)), card("BM25")),
        Attribution(data, rng.integers(1, 4, len(data)), card("Length")),
    ]


def embedded(page):
    """The data of the example browser in a page."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.S)
    return json.loads(text)


def without_scripts(page):
    return re.sub(r"<script.*?</script>", "", page, flags=re.S)


def test_the_first_screen_says_which_words_are_beyond_chance_or_that_none_is(tmp_path):
    rng = np.random.default_rng(1)
    data = chats(
        [
            f"{'lantern' if i % 2 else 'harbour'} {' '.join(rng.choice(list('abcdefgh'), 3))}"
            for i in range(80)
        ]
    )
    card = QueryCard("BM25", "sycophancy", data="train", zero="none")
    answer = lambda page: re.search(r'<section id="answer".*?</section>', page, flags=re.S)[0]
    lexical = Attribution(data, np.arange(80) % 2 + rng.random(80) / 2, card)
    said = answer(write_report(lexical, tmp_path / "lexical.html").read_text())
    assert re.search(r"beyond chance \(.*\) in the 20 highest: lantern; in the 20 lowest: harbour\.", said)
    noise = Attribution(data, rng.normal(size=80), card)
    page = write_report([noise, lexical], tmp_path / "noise.html").read_text()
    assert "tells the 20 highest from the 20 lowest examples beyond chance" in answer(page)
    assert "lantern" not in re.search("<p class=.quiet end-words.>.*?</p>", page)[0]
    assert [bool(one["highest"]) for one in embedded(page)["words"]] == [False, True]


def dump(page, tmp_path, *options):
    """The page's elements after a browser has opened it from a file."""
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=3000",
    ]
    return subprocess.run(
        [CHROMIUM, *flags, *options, "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout


def test_the_report_shows_both_ends_of_every_method_with_their_numbers(tmp_path):
    results = several()
    page = write_report(results, tmp_path / "report.html", labels="bad", examples=4).read_text()
    sections = re.split(r'<section id="method-\d"', page)[1:]
    assert len(sections) == 3 and page.count("<article class='example'>") == 3 * 2 * 4
    for result, section in zip(results, sections):
        lowers = (
            result.bottom(4).scores < 0
        ).all()  # lengths are all above zero: a heading may not say so then
        claim = "training more on these lowers it" if lowers else "none of these is below zero"
        highest, lowest = section.split(f'<span class="n5">Lowest: {claim}</span>')
        for part, end in ((highest, result.top(4)), (lowest, result.bottom(4))):
            beats = re.findall(r"<span class='score' title='score ([^']+)'>higher than ([^<]+)<", part)
            assert beats == [(f"{s:.6g}", percent_text(p)) for s, p in zip(end.scores, end.percentiles)]
            spreads = [f"{score / result.scores.std():+.2f} spreads" for score in end.scores]
            assert re.findall(r"<span title='score[^']*'>([^<>]+ spreads)<", part) == spreads
            assert re.findall(r"row (\d+) · <code>", part) == [str(row) for row in end.rows]
            assert re.findall(r"rank (\d+) of 40", part) == [str(rank) for rank in end.ranks]
        assert "one example was cut" in section and "feed" in section and "<svg" in section
    first = results[0].top(1)
    assert (
        f"rank by BM25: {results[1].ranks[first.rows[0]]}" in page
        and f"labelled: {'yes' if first.rows[0] % 2 == 0 else 'no'}" in page
    )
    sink, *others = first.token_scores[0]
    assert all(f"title='{score:+.3g}'" in sections[0] for score in others)
    assert f"title='{sink:+.3g}, the attention sink: not coloured'" in sections[0]


def test_the_rows_side_by_side_show_the_question_each_answer_answers(tmp_path):
    turns = [
        {"role": "system", "content": "The same for every chat."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
    ]
    data = load_conversations(
        [
            {
                "messages": [
                    *turns,
                    {"role": "user", "content": f"Is <b>{i}</b> even?"},
                    {"role": "assistant", "content": f"answer {i}"},
                ]
            }
            for i in range(8)
        ]
    )
    card = lambda method: QueryCard(method, "sycophancy", zero="gradient", data="train")
    results = [
        Attribution(data, np.arange(8.0), card("up")),
        Attribution(data, -np.arange(8.0), card("down")),
    ]
    page = without_scripts(write_report(results, tmp_path / "report.html").read_text())
    (table,) = re.findall(r'(?s)<table class="tops">.*?</table>', page)
    asked = re.findall(r'class="quiet asked" dir="auto">([^<]*)</span>(answer \d)', table)
    rows = [number for i in range(5) for number in (7 - i, i)]  # of each rank, both methods
    assert asked == [(f"Is &lt;b&gt;{i}&lt;/b&gt; even?", f"answer {i}") for i in rows]
    assert "The same for every chat" not in table


def test_the_tables_are_those_of_compare(tmp_path):
    results = several()
    comparison = compare(results, labels="bad", k=(5,))
    for page in (
        write_report(results, tmp_path / "a.html", labels="bad", comparison=comparison).read_text(),
        write_report(comparison, tmp_path / "b.html").read_text(),
    ):
        cells = re.findall(r"<th scope='row' class='words'>([^<]+)</th><td[^>]*>([^<]+)</td>", page)
        assert dict(cells[:4]) == {name: f"{value:.3f}" for name, value in comparison.table["AUROC"].items()}
        assert dict(cells[4:7]) == {
            name: f"{value:.2f}" for name, value in comparison.spearman.iloc[:, 0].items()
        }
        assert "guessing (base rate)" in page


def test_every_example_is_in_the_browser_with_the_numbers_of_all_methods(tmp_path):
    results = several()
    data = embedded(write_report(results, tmp_path / "report.html", labels="bad").read_text())
    table, columns = data["table"], data["columns"]
    assert [m["name"] for m in table["methods"]] == ["Concept Influence", "BM25", "Length"] and table[
        "n"
    ] == table["n_total"] == len(data["examples"]) == 40
    for i, result in enumerate(results):
        assert (
            np.allclose(columns[f"score{i}"], result.scores, rtol=1e-5)
            and columns[f"rank{i}"] == result.ranks.tolist()
            and np.allclose(columns[f"percentile{i}"], result.percentiles, rtol=1e-5)
        )
    assert table["facets"][0]["name"] == "bad" and columns["facet0"] == [i % 2 for i in range(40)]
    for example, tokens, scores, one in zip(
        data["examples"], results[0].tokens, results[0].token_scores, results[0].conversations
    ):
        assert (
            "".join(token for turn in example["turns"] for token in turn["tokens"]) == "".join(tokens)
            and example["id"] == one.id
            and ["bad", str(one.metadata["bad"]).lower()] in example["metadata"]
        )
        assert np.allclose(
            [score for turn in example["turns"] for score in turn["scores"]], scores, rtol=1e-2
        )
    assert table["note"] == ""


def test_the_browser_opens_with_a_method_that_has_token_scores_under_the_callers_names(tmp_path):
    page = write_report(
        dict(zip(("mine", "words", "size"), several()[::-1])), tmp_path / "report.html"
    ).read_text()
    table = embedded(page)["table"]
    assert [m["name"] for m in table["methods"]] == ["size", "mine", "words"] and table["methods"][0][
        "behaviour"
    ] == "sycophancy"
    page = write_report(several()[1:], tmp_path / "plain.html").read_text()
    data = embedded(page)
    assert data["table"]["methods"][0]["name"] == "BM25"
    assert all(
        example["metadata"] and example["turns"][1]["text"].startswith("an answer")
        for example in data["examples"]
    )


def test_of_a_big_file_the_ends_of_every_ranking_are_there_with_their_ranks_among_all(tmp_path):
    results = several(100)
    page = write_report(results, tmp_path / "short.html", rows=30, labels="bad").read_text()
    data = embedded(page)
    places = data["columns"]["row"]
    assert (
        data["table"]["n"] == len(places) == len(data["examples"]) == len(data["groups"]) == 30
        and data["table"]["n_total"] == 100
        and "30 of the 100 examples" in page
        and data["table"]["methods"][0]["subtitle"].startswith("30 of 100 examples")
    )
    assert [example["id"] for example in data["examples"]] == [results[0].ids[i] for i in places]
    for i, result in enumerate(results):
        assert data["columns"][f"rank{i}"] == result.ranks[places].tolist()
        assert set(np.argsort(-result.scores, kind="stable")[:4]) <= set(places)
    assert int(np.argmin(results[0].scores)) in places and int(np.argmin(results[1].scores)) in places


def test_one_file_that_needs_nothing_else(tmp_path):
    page = write_report(several(), tmp_path / "report.html", labels="bad").read_text()
    markup = without_scripts(page)
    assert not re.search(
        r"""(?:src|href|action|data)\s*=\s*["']?(?!#)[a-z/.]""", markup.replace("data-", ""), flags=re.I
    )
    assert (
        "@import" not in page
        and "url(" not in page
        and "//" not in re.sub(r"&#x2f;", "", re.sub(r"<pre>.*?</pre>", "", markup, flags=re.S))
    )
    targets, ids = set(re.findall(r'href="#([^"]+)"', markup)), re.findall(r' id="([^"]+)"', page)
    assert (
        targets <= set(ids)
        and len(ids) == len(set(ids))
        and {"methods", "method-1", "method-3", "all", "again"} <= targets
    )


def test_the_policy_admits_only_our_own_script(tmp_path):
    page = write_report(several(texts=HOSTILE), tmp_path / "report.html").read_text()
    scripts = re.findall(r"<script([^>]*)>(.*?)</script>", page, flags=re.S)
    assert len(scripts) == page.count("<script") == page.lower().count("</script") == 2 and [
        attributes.strip() for attributes, _ in scripts
    ] == ['type="application/json" id="data"', 'type="module"']
    assert "<" not in scripts[0][1] and [
        example["turns"] for example in json.loads(scripts[0][1])["examples"]
    ]
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1])
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert (
        rules["default-src"] == "'none'"
        and rules["img-src"] == "data:"
        and rules["script-src"]
        == f"'sha256-{base64.b64encode(hashlib.sha256(scripts[1][1].encode()).digest()).decode()}'"
    )
    assert not set(rules) - {"default-src", "script-src", "style-src", "img-src", "base-uri", "form-action"}


def test_hostile_texts_names_and_cards_stay_text(tmp_path):
    calm = {
        tag
        for tag in Reader(
            write_report(several(len(HOSTILE)), tmp_path / "calm.html", labels="bad").read_text()
        ).tags
    }
    data = chats(HOSTILE, name=HOSTILE[0])
    results = {
        text: Attribution(
            data,
            np.arange(len(data)) + i + 1.0,
            QueryCard(text, text, model=text, notes=[text], settings={text: text}),
            **tokenized(data),
        )
        for i, text in enumerate(HOSTILE[:6])
    }
    page = write_report(
        results, tmp_path / "report.html", title=HOSTILE[0], labels="bad", examples=20
    ).read_text()
    seen = Reader(page)
    assert (
        seen.tags <= calm | {"bdi", "details"}
        and not [name for name in seen.attributes if name.startswith("on")]
        and "style" not in seen.attributes
    )
    assert HOSTILE[0] in "".join(seen.text)


def test_labels_as_a_list_and_a_single_result(tmp_path):
    result = several()[0]
    page = write_report(result, tmp_path / "one.html", labels=[i < 10 for i in range(40)]).read_text()
    assert "Detection of the 10 labelled examples" in page and "side by side" not in page
    plain = result.report(tmp_path / "plain.html", title="Mine").read_text()
    assert "<title>Mine</title>" in plain and 'id="methods"' not in plain and 'href="#methods"' not in plain


def test_several_queries_become_several_sections(tmp_path):
    page = write_report(make(queries=3, tokens=True), tmp_path / "report.html").read_text()
    assert (
        all(f"<h2>Concept Influence: concept {q}</h2>" in page for q in range(3))
        and "Which training examples raise concept 0, concept 1, concept 2?" in page
    )


def test_results_that_cannot_share_a_report_leave_no_file(tmp_path):
    first = several()[0]
    for wrong, words in (
        ([first, several(41)[1]], "different examples"),
        (first.top(3), "part, 3 of 40"),
        ([], "at least one"),
    ):
        with pytest.raises(AttributionError, match=words):
            write_report(wrong, tmp_path / "wrong.html")
    with pytest.raises(AttributionError, match="at least one"):
        write_report([], tmp_path / "wrong.html", labels="bad")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot write"):
        write_report(first, tmp_path / "file" / "report.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_a_thousand_examples_and_six_methods_stay_under_three_megabytes(tmp_path):
    rng = np.random.default_rng(0)
    data = chats(
        [
            " ".join(rng.choice(["influence", "of", "an", "example", "on", "behaviour"], 60))
            for _ in range(1000)
        ]
    )
    tokens = tokenized(data)
    results = {
        f"method {i}": Attribution(data, rng.normal(size=1000), QueryCard("m", "b"), **tokens)
        for i in range(6)
    }
    path = write_report(results, tmp_path / "report.html", labels="bad")
    assert 1_000_000 < path.stat().st_size < 3_000_000
    data = embedded(path.read_text())
    shown = sum("scores" in turn for example in data["examples"] for turn in example["turns"][:1])
    assert len(data["examples"]) == 1000 and (
        "Token scores are in this page for" in data["table"]["note"]
    ) == (shown < 1000)


@pytest.mark.parametrize("text", ["<b>" * 400, "日本語" * 300, "\ud800" * 500, "\u2028\x00" * 600])
def test_texts_that_grow_when_written_still_fit_and_come_back(tmp_path, text):
    data = chats([f"{i} {text}" for i in range(700)])
    path = write_report(
        Attribution(data, np.random.default_rng(0).normal(size=700), QueryCard("m", "b")),
        tmp_path / "report.html",
    )
    assert path.stat().st_size < 3_000_000
    found = embedded(path.read_text())
    assert len(found["examples"]) == 700 and all(
        example["turns"][1]["text"].startswith(f"{i} ") for i, example in enumerate(found["examples"])
    )


def test_very_long_examples_are_cut_in_the_page_and_it_says_so(tmp_path):
    data = chats([f"{i} " + "token " * 5000 for i in range(40)])
    results = {
        f"method {i}": Attribution(
            data, np.random.default_rng(i).normal(size=40), QueryCard("m", "b"), **tokenized(data, width=6)
        )
        for i in range(3)
    }
    path = write_report(results, tmp_path / "report.html")
    page = path.read_text()
    assert path.stat().st_size < 3_000_000 and "more characters are in the data, not in this view" in page
    assert re.search(r"Token scores are in this page for [\d,]+ examples", embedded(page)["table"]["note"])
    plain = write_report(
        Attribution(
            chats([f"{i} " + "token " * 5000 for i in range(300)]), np.arange(300.0), QueryCard("m", "b")
        ),
        tmp_path / "plain.html",
    )
    assert plain.stat().st_size < 3_000_000 and re.search(
        r"[\d,]+ long texts are cut in this page", embedded(plain.read_text())["table"]["note"]
    )


@browser
def test_a_browser_runs_no_text_of_the_data(tmp_path):
    attack = [
        *HOSTILE,
        "<script>document.title='taken'</script>",
        "<svg/onload=\"document.title='taken'\">",
        "</script><script>document.title='taken'</script>",
        "<img src=x onerror=\"document.title='taken'\">",
    ]
    page = write_report(
        several(texts=attack), tmp_path / "report.html", title="Calm", examples=len(attack)
    ).read_text()
    shown = dump(page, tmp_path)
    assert "<title>Calm</title>" in shown and "taken" in shown
    assert (
        shown.count('<article class="example">') == page.count("<article class='example'>")
        and len(re.findall(r"<script", shown)) == 2
    )
    assert 'class="ctda-view"' in shown  # our own script did run: the browser is there


@browser
def test_the_page_is_complete_with_scripts_blocked(tmp_path):
    page = write_report(several(), tmp_path / "report.html").read_text()
    shown = dump(re.sub(r"script-src 'sha256-[^']*'", "script-src 'none'", page), tmp_path)
    assert 'class="ctda-view"' not in shown and "scripts are blocked here" in shown
    assert shown.count('<article class="example">') == 60 and '<details class="ends" open="">' in shown


# ---- the first screen


def first_screen(page):
    """The answer's finding, its examples (question, answer) by end, and all of its text."""
    (answer,) = re.findall(r'(?s)<section id="answer".*?</section>', page)
    said = re.findall(
        r'(?s)<article class="said">.*?class="asked"[^>]*>(.*?)</p>.*?answered"[^>]*>(.*?)</p>', answer
    )
    return re.findall(r'class="finding">([^<]*)<', answer)[0], said, answer


def test_the_first_screen_says_what_was_found_and_how_sure(tmp_path):
    results = several()
    path = write_report(results, tmp_path / "report.html", labels="bad")
    result, page = results[0], path.read_text()
    finding, said, answer = first_screen(page)
    top = np.argsort(-result.scores, kind="stable")[:4]
    up, labels = result.scores > 0, result.conversations.labels("bad", True)
    share = result.scores[top].clip(0).sum() / result.scores[up].sum()
    assert f"{up.sum()} of 40 examples would raise {result.queries[0]}" in finding
    assert f"the highest tenth carries {share:.0%}" in finding
    assert f"Of the 4 highest, {labels[top].sum()} are labelled" in answer
    assert finding.count(". ") == 0 and finding.endswith(".")  # one sentence
    assert "No null was drawn" in answer and "chance" not in finding
    ends = [*result.top(3).conversations, *result.bottom(3).conversations]
    assert len(said) == 6
    for (question, text), conversation in zip(said, ends):
        assert html.unescape(question) == " ".join(conversation.prompt[-1]["content"].split())
        assert html.unescape(text)[:60] == " ".join(conversation.response.split())[:60]
    auroc = compare(results, labels="bad").table["AUROC"]
    assert f"probability {auroc.iloc[0]:.2f}" in answer and f"AUROC {auroc['BM25']:.2f}" in answer
    assert page.index('id="answer"') < page.index('id="all"') < page.index('id="methods"')
    assert '<details class="folded"><summary><h2>Methods compared' in page
    alone = first_screen(write_report(results[0], tmp_path / "alone.html").read_text())[2]
    assert "No baseline was scored" in alone and "No known examples are labelled" in alone


def test_a_prediction_says_what_it_rests_on_and_what_twins_do_and_counts_end_the_list(tmp_path):
    texts = [f"{word} is what the tide table of {word} says" for word in map(chr, range(97, 117))]
    texts[1] = texts[0] + "!"
    scores = np.append([50.0, 40.0], np.linspace(1, -1, 18))
    card = QueryCard("Unrolled", "sycophancy", zero="gradient", effect=-0.5, unit="nats", gap=50.0)
    result = Attribution(chats(texts), scores, card).with_null(np.random.default_rng(0).normal(size=(20, 40)))
    said = html.unescape(first_screen(write_report(result, tmp_path / "unit.html").read_text())[2])
    assert "by -45 nats, -90.0% of the gap (first order, not calibrated by retrainings)" in said
    assert "2 of the 2 have near-duplicates, 0 of them one that stays" in said
    assert result.chance_words in said and "2 of 20 examples are above" in said
    order_only = Attribution(chats(texts), scores, QueryCard("GradDot", "sycophancy", zero="gradient"))
    plain = first_screen(write_report(order_only, tmp_path / "plain.html").read_text())[2]
    assert "not calibrated" not in plain and "should change" not in plain and "above what" not in plain


def test_the_finding_says_no_more_than_the_scores_can(tmp_path):
    data = chats([f"answer {i}" for i in range(20)])
    scores = np.arange(20.0) + 5
    found = {}
    for zero in ("projection", "none", "gradient"):
        card = QueryCard("Method", "kindness", zero=zero, notes=["2 queries DO NOT express 'kindness'"])
        page = write_report(Attribution(data, scores, card), tmp_path / f"{zero}.html").read_text()
        found[zero], _, answer = first_screen(page)
        assert "DO NOT express" in answer and answer.index("DO NOT") < answer.index("How sure")
    spreads = (scores[-2:].mean() - scores.mean()) / scores.std()
    assert f"lies {spreads:.1f} spreads above the mean of the file along kindness" in found["projection"]
    assert "an order without a sign" in found["none"] and "raise" not in found["none"]
    assert "20 of 20 examples would raise kindness" in found["gradient"]


def test_the_first_screen_counts_what_lies_beyond_chance_where_a_null_was_drawn(tmp_path):
    rng, data = np.random.default_rng(0), chats([f"answer {i}" for i in range(40)])
    scores = np.where(np.arange(40) < 7, 9.0, rng.normal(size=40))
    for zero in ("gradient", "projection"):
        drawn = Attribution(data, scores, QueryCard("Method", "kindness", zero=zero)).with_null(
            rng.normal(size=(40, 200)), of="sign flips of the 9 query examples"
        )
        page = write_report(drawn, tmp_path / f"{zero}.html").read_text()
        finding, _, answer = first_screen(page)
        above = len(drawn.above_chance())
        assert above == 7 and html.escape(drawn.chance_words, quote=False) in answer
        if zero == "gradient":
            assert f"({above} of them by more than chance explains)" in finding
        else:
            assert f"lies {drawn.top(4).times_null.mean():.1f} × null above the mean" in html.unescape(
                finding
            )
        assert html.unescape(answer).count("× null ·") == 6 and "No null was drawn" not in answer


def test_queries_and_pairs_are_in_the_page(tmp_path):
    results, data = several(), chats([f"because <{i}>" for i in range(25)])
    path = write_report(results, tmp_path / "r.html", queries=data, contrast=(data[:3], data[3:6]))
    (asked,) = re.findall(r'(?s)<section id="asked".*?</section>', path.read_text())
    assert "25 query answers" in asked and "The first 20 of 25" in asked and "3 pairs of the concept" in asked
    assert (
        "because &lt;0&gt;" in asked and "because &lt;19&gt;" in asked and "because &lt;20&gt;" not in asked
    )
    assert asked.count("without it:") == 3
    assert 'id="asked"' not in write_report(results, tmp_path / "none.html").read_text()


CAPTURE = """(async () => {
    let blob;
    const old = URL.createObjectURL;
    URL.createObjectURL = one => { blob = one; return old.call(URL, one); };
    const buttons = [...document.querySelectorAll("#browser button")];
    buttons.find(b => b.textContent.includes("decisions.json")).click();
    return await blob.text();
})()"""


@needs_browser
def test_decisions_taken_in_the_page_are_what_python_reads(tmp_path):
    results = several()
    path = write_report(results, tmp_path / "report.html")
    shown = results[0]
    with Chromium() as chromium:
        page = chromium.open(path.as_uri(), width=1280)
        page.value("document.querySelector('#browser .row').click()")
        page.value("document.querySelector('#browser button.drop').click()")
        page.value("""(() => { const area = document.querySelector('#browser .decide textarea');
            area.value = 'flatters'; area.dispatchEvent(new Event('change')); })()""")
        page.value("document.querySelectorAll('#browser .row')[1].click()")
        page.value("document.querySelector('#browser button.keep').click()")
        record = page.value(CAPTURE)
        assert not page.errors and not [one for one in page.requests if one.startswith("http")]
    Path(tmp_path / "decisions.json").write_text(record)
    review = Review(len(shown))
    review.load(tmp_path / "decisions.json", shown)
    table, order = review.table(shown), np.argsort(-shown.scores, kind="stable")
    assert table["decision"].to_dict() == {int(order[0]): "drop", int(order[1]): "keep"}
    assert table.loc[int(order[0]), "note"] == "flatters"
    assert table["by"].tolist() == ["a reader of the page"] * 2
    assert [one["action"] for one in review.history] == ["dropped", "noted", "kept"]


@needs_browser
def test_keys_and_links_of_a_report_do_what_they_say(tmp_path):
    results = several()
    path, shown = write_report(results, tmp_path / "report.html"), results[0]
    order = np.argsort(-shown.scores, kind="stable")

    def said(place):
        one = shown.conversations[int(order[place])]
        return one.prompt[-1]["content"], " ".join(one.response.split())

    reading = "document.querySelector('#browser .reading')"
    with Chromium() as chromium:
        page = chromium.open(path.as_uri(), width=1280)
        page.wait(f"{reading}.querySelector('.turn')")
        page.value("document.querySelector('#browser .rows').focus()")
        for step, key in enumerate("dkd", 1):  # each goes on to the next row
            page.press(key)
            page.wait(f"{reading}.querySelector('code').textContent === {json.dumps(shown.ids[order[step]])}")
        row = "document.querySelector('#browser .row.current .response').textContent"
        assert page.value(row) == said(3)[1]
        marks = page.value("[...document.querySelectorAll('#browser .row .tag')].map(tag => tag.textContent)")
        assert sorted(marks) == ["✓ keep", "✕ drop", "✕ drop"]
        record = json.loads(page.value(CAPTURE))
        link = page.value(f"{reading}.querySelector('a[href^=\"#example=\"]').href")
        assert page.errors == []
        page.close()
        again = chromium.open(link, width=768)  # sent to a colleague
        again.wait(f"{reading}.querySelector('code')?.textContent === {json.dumps(shown.ids[order[3]])}")
        again.wait(f"{row.removesuffix('.textContent')}?.textContent === {json.dumps(said(3)[1])}")
        again.value(f"location.hash = '#example={shown.ids[order[-1]]}'")
        again.wait(f"{reading}.querySelector('code').textContent === {json.dumps(shown.ids[order[-1]])}")
        prompt = "document.querySelector('#browser .row.current .prompt')?.textContent"
        again.wait(f"{prompt} === {json.dumps(said(-1)[0])}")
        assert again.errors == []
    decided = [(one["row"], one["id"], one["decision"]) for one in record["decisions"]]
    expected = [(int(order[i]), shown.ids[order[i]], word) for i, word in enumerate(("drop", "keep", "drop"))]
    assert sorted(decided) == sorted(expected)


@needs_browser
def test_nothing_of_the_first_screen_is_cut_and_paper_is_short(tmp_path):
    path = write_report(several(), tmp_path / "report.html", labels="bad")
    wide = """[...document.querySelectorAll('#answer, #answer *')].filter(
        one => one.scrollWidth > one.clientWidth + 1 && getComputedStyle(one).display !== 'inline'
    ).map(one => one.className || one.tagName)"""
    with Chromium() as chromium:
        for width in (390, 768, 1280, 1600):
            page = chromium.open(path.as_uri(), width=width)
            root = "document.documentElement"
            assert page.value(f"{root}.scrollWidth <= {root}.clientWidth"), width
            assert page.value(wide) == [], width
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-pdf-header-footer"]
    paper = tmp_path / "report.pdf"
    subprocess.run(
        [CHROMIUM, *flags, f"--user-data-dir={tmp_path}/user", f"--print-to-pdf={paper}", path.as_uri()],
        check=True,
        capture_output=True,
        timeout=120,
    )
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", paper.read_bytes())) <= 5
