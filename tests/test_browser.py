"""The views in a real browser: with the widget's own script, a stand-in for the notebook's model, and the
real Python object behind it; from a file without a kernel; and in a live JupyterLab."""

import base64
import json
import os
import re
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import numpy as np
import pytest
from test_attribution import HOSTILE

from concept_tda.data.conversations import Conversation, Conversations, load_conversations
from concept_tda.data.masks import chosen_tokens
from concept_tda.influence.queries import LossQuery, TokenQuery
from concept_tda.influence.scorers import Influence
from concept_tda.model.loading import LanguageModel
from concept_tda.results.attribution import Attribution
from concept_tda.results.cards import QueryCard
from concept_tda.results.metrics import detection_metrics
from concept_tda.views.browser import ExampleBrowser, embedded_browser
from concept_tda.views.contents import BROWSER_SCRIPTS, WidgetError, front_end, hits
from concept_tda.views.explorer import ConceptView
from concept_tda.views.report import write_report

from chromium import Chromium, Page, needs_browser
from tiny import tiny_pair

pytestmark = needs_browser

XSS = [
    *HOSTILE,
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "javascript:alert(1)",
    "<a href=javascript:alert(1)>x</a>",
    "<iframe srcdoc='<script>alert(1)</script>'>",
    "<|im_end|>",
    "<svg/onload=alert(1)>",
    "${alert(1)}`'\"\\",
    "\u2028alert(1)\u2029",
    "\ud800 half",
    "__proto__",
    "constructor",
    "مرحبا <b>بالعالم</b> \u202e",
    "𝕊" * 30_000,
]
PAGE = (
    "<!doctype html><html><head><meta charset=utf-8><meta name=viewport "
    "content='width=device-width,initial-scale=1'><style>body{{margin:4px;color-scheme:light "
    "dark}}{style}</style></head><body><div id=here></div>{rest}</body></html>"
)
STUB = """
const bytes = text => new DataView(Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer);
const plain = value => value && value.bytes !== undefined ? bytes(value.bytes) : value;
window.state = JSON.parse(atob('{state}'), (key, value) => plain(value));
const listeners = {{}};
let changes = {{}};
const fire = (name, ...values) => (listeners[name] ?? []).forEach(call => call(...values));
window.deliver = (message, buffers) => fire('msg:custom', message, buffers.map(bytes));
window.assign = (name, value) => {{
  window.state[name] = plain(value);
  fire('change:' + name);
}};
const model = {{
  get: name => window.state[name],
  on: (name, call) => (listeners[name] ??= []).push(call),
  off: (name, call) => {{ listeners[name] = (listeners[name] ?? []).filter(one => one !== call); }},
  send: message => window.toPython(JSON.stringify(message)),
  set: (name, value) => {{ window.state[name] = changes[name] = value; }},
  save_changes: () => {{
    window.toPython(JSON.stringify({{state: changes}}));
    changes = {{}};
  }},
}};
window.draw_again = () => {{
  window.close_view?.();
  window.close_view = widget.render({{model, el: document.getElementById('here')}});
}};
window.draw_again();
"""


@pytest.fixture(scope="module")
def chromium():
    with Chromium() as browser:
        yield browser


def plain(value):
    """A trait for JSON: bytes as base64, in dicts as well."""
    if isinstance(value, (bytes, memoryview)):
        return {"bytes": base64.b64encode(bytes(value)).decode()}
    return {key: plain(one) for key, one in value.items()} if isinstance(value, dict) else value


class StandIn:
    """A page that shows a widget whose notebook is this test: what the page sends goes to the real object,
    and its answers and changed traits go back."""

    def __init__(self, chromium, widget, tmp_path, names, **window):
        self.widget, self.names = widget, names
        state = base64.b64encode(
            json.dumps({name: plain(getattr(widget, name)) for name in names}).encode()
        ).decode()
        script = (
            widget._esm.replace("export default", "const widget =")
            if isinstance(widget._esm, str)
            else str(widget._esm).replace("export default", "const widget =")
        )
        path = tmp_path / "page.html"
        path.write_text(
            PAGE.format(
                style=widget._css, rest=f"<script type=module>{script}{STUB.format(state=state)}</script>"
            ),
            encoding="utf-8",
        )
        self.page = chromium.open(**window)
        self.page.send("Runtime.addBinding", name="toPython")
        self.known = {name: plain(getattr(widget, name)) for name in names}
        self.page.go(path.as_uri())

    def pump(self):
        """Hand over what the page has sent since the last time."""
        self.page.send("Runtime.evaluate", expression="0")
        while self.page.calls:
            _, payload = self.page.calls.popleft()
            for name, value in json.loads(payload).get("state", {}).items():
                self.known[name] = value  # the page knows what it said
                setattr(self.widget, name, value)
            if "state" in json.loads(payload):
                self.share()
                continue
            sent = []
            self.widget.send = lambda content, buffers=None: sent.append(
                (content, [base64.b64encode(bytes(one)).decode() for one in buffers or []])
            )
            self.widget._handle_custom_msg(json.loads(payload), [])
            self.share()
            for content, buffers in sent:
                self.page.value(f"window.deliver({json.dumps(content)}, {json.dumps(buffers)})")

    def share(self):
        """Traits that Python has changed."""
        for name in self.names:
            if (value := plain(getattr(self.widget, name))) != self.known[name]:
                self.known[name] = value
                self.page.value(f"window.assign({json.dumps(name)}, {json.dumps(value)})")

    def wait(self, script):
        return self.page.wait(script, meanwhile=self.pump)

    def value(self, script):
        self.pump()
        return self.page.value(script)

    def settle(self):
        self.wait("new Promise(done => setTimeout(() => done(true), 250))")
        self.pump()
        self.page.value("new Promise(done => setTimeout(() => done(true), 60))")
        self.pump()

    def rows(self):
        self.settle()
        return self.value(
            "[...document.querySelectorAll('.row')].sort((a, b) => parseFloat(a.style.top) - "
            "parseFloat(b.style.top)).map(row => row.querySelector('.response')?.textContent ?? "
            "row.textContent)"
        )

    def status(self):
        self.settle()
        return self.value("document.querySelector('.statusline [role=status]').textContent")

    def choose(self, label, value):
        self.value(
            f"(() => {{ const pick = document.querySelector('[aria-label=\"{label}\"]'); "
            f"pick.value = {json.dumps(value)}; "
            "pick.dispatchEvent(new Event('change')); pick.dispatchEvent(new Event('input')); })()"
        )


TRAITS = ["table", "columns", "groups", "saved", "marks", "notes", "undoable"]


def chats(texts):
    return Conversations(
        [
            Conversation(
                ({"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": text}),
                metadata={"kind": f"kind {i % 3}", "bad": i % 2 == 0},
            )
            for i, text in enumerate(texts)
        ],
        "train",
    )


def several(n=40, texts=None, tokens=True, seed=0):
    """Three methods with distinct scores; answers differ in length and are no near-duplicates."""
    rng = np.random.default_rng(seed)
    data = chats(
        texts
        or [
            f"answer {i} " + " ".join(str(word) for word in rng.integers(0, 10**6, 5 + i % 7))
            for i in range(n)
        ]
    )
    card = lambda method: QueryCard(
        method, "sycophancy", zero="gradient", model="tiny", data="train", notes=["one example was cut"]
    )
    pieces = [
        ["<|im_start|>", "user", "\n", c.prompt[0]["content"], *re.findall(r"(?s).{1,8}", c.response)]
        for c in data
    ]
    extra = (
        dict(
            tokens=pieces,
            token_scores=[rng.normal(size=len(one)) for one in pieces],
            response_masks=[np.arange(len(one)) > 3 for one in pieces],
        )
        if tokens
        else {}
    )
    return [
        Attribution(data, rng.normal(size=len(data)), card("Concept Influence"), **extra),
        Attribution(data, rng.normal(size=len(data)), card("BM25")),
        Attribution(data, [len(c.response) + i / 1000 for i, c in enumerate(data)], card("Length")),
    ]


@pytest.fixture
def live(chromium, tmp_path):
    pages = []

    def open_(results=None, window={}, **options):
        results = results or several()
        stand_in = StandIn(
            chromium, ExampleBrowser(results[0], results[1:], by="ada", **options), tmp_path, TRAITS, **window
        )
        pages.append(stand_in)
        stand_in.wait("document.querySelector('.reading .turn')")
        return stand_in

    yield open_
    for stand_in in pages:
        assert stand_in.page.errors == []
        stand_in.page.close()


def responses(result, order):
    return [" ".join(result.conversations[int(i)].response.split())[:240] for i in order]


# looking ------------------------------------------------------------------------------------------


def test_the_list_is_in_the_order_of_the_scores_at_both_ends(live):
    results = several()
    view = live(results)
    order = np.argsort(-results[0].scores)
    seen = view.rows()
    assert seen == responses(results[0], order)[: len(seen)] and len(seen) >= 5
    view.page.press("Tab")  # the list takes keys only when it is reached
    view.value("document.querySelector('.rows').focus()")
    view.page.press("End")
    assert view.rows()[-1] == responses(results[0], order)[-1]
    view.choose("Order", "low")
    assert view.rows()[:5] == responses(results[0], order[::-1])[:5]
    view.choose("Order", "file")
    assert view.rows()[:5] == responses(results[0], range(5))
    view.choose("Method", "1")
    view.choose("Order", "high")
    assert view.rows()[:5] == responses(results[0], np.argsort(-results[1].scores))[:5]


def test_disagreements_of_two_methods_can_be_sorted_and_filtered(live):
    results = several()
    view = live(results)
    gap = results[0].percentiles - results[1].percentiles
    view.choose("Order", "above-1")
    assert view.rows()[:6] == responses(results[0], np.argsort(-gap, kind="stable"))[:6]
    view.choose("Smallest difference in percentile points", "30")
    assert view.status().startswith(f"{(gap >= 30).sum()} of 40")
    view.choose("Order", "below-2")
    assert (
        view.rows()[0]
        == responses(results[0], [np.argmax(results[2].percentiles - results[0].percentiles)])[0]
    )


def test_search_facets_and_length_narrow_the_list_together(live):
    results = several()
    view = live(results, labels="bad")
    kinds = [c.metadata["kind"] for c in results[0].conversations]
    view.value("document.querySelector('.ctda-view').focus()")
    view.value("document.querySelector('.rows').focus()")
    view.page.press("/")
    view.page.type('"answer 1"')
    expected = {i for i, c in enumerate(results[0].conversations) if "answer 1" in c.response}
    view.wait(
        f"document.querySelector('.statusline [role=status]').textContent.startsWith('{len(expected)} of 40')"
    )
    boxes = view.value(
        "[...document.querySelectorAll('fieldset')].map(one => one.querySelector('legend').textContent "
        "+ '|' + [...one.querySelectorAll('.value')].map(v => v.textContent))"
    )
    assert boxes == ["bad|yes,no", "kind|kind 0,kind 1,kind 2"]
    view.page.click(".filters summary")
    view.page.click("input[data-facet='1'][data-code='0']")
    expected = {i for i in expected if kinds[i] == "kind 0"}
    assert view.status().startswith(f"{len(expected)} of 40")
    lengths = view.widget._contents.lengths
    view.choose("Longest", str(int(np.median(lengths))))
    assert view.status().startswith(f"{sum(lengths[i] <= np.median(lengths) for i in expected)} of 40")
    view.value(
        "[...document.querySelectorAll('.actions button')].find(b => b.textContent === 'Clear "
        "filters').click()"
    )
    assert view.status().startswith("40 examples")


@pytest.mark.parametrize(
    "words", ["", "moon", '"the moon" -cheese', "-x", "ANSWER 1", 'no"quote', '"', "-", "  spaced   out "]
)
def test_search_means_the_same_with_and_without_a_kernel(chromium, words):
    texts = ["The moon is cheese", "the moon", "an x", "answer 1 2", 'no"quote', "a - b", "spaced out"]
    page = chromium.open("about:blank")
    lower = [text.lower() for text in texts]
    found = page.value(
        f"(() => {{ {front_end(*BROWSER_SCRIPTS)}; const terms = searchTerms({json.dumps(words)}); "
        f"return {json.dumps(lower)}.flatMap((text, i) => found(text, terms) ? [i] : []); }})()"
    )
    page.close()
    assert found == hits(lower, words).tolist()


def test_a_brush_on_the_histogram_filters_by_pointer_and_by_keys(live):
    results = several()
    view, scores = live(results), results[0].scores
    x, y, width, height = view.page.box(".chart")
    view.page.drag(x + width * 0.5, y + 20, x + width - 1, y + 20)
    low = scores.min() + 0.5 * np.ptp(scores)
    assert abs(int(view.status().split()[0]) - (scores >= low).sum()) <= 1
    assert view.rows()[0] == responses(results[0], [scores.argmax()])[0]
    for kind in ("mousePressed", "mouseReleased"):
        view.page.mouse(kind, x + width * 0.2, y + 40, clickCount=1)  # a click without a drag takes it away
    assert view.status().startswith("40 examples")
    view.value("document.querySelectorAll('.handle')[1].focus()")
    for _ in range(4):
        view.page.press("PageDown")
    high = scores.max() - 0.4 * np.ptp(scores)
    assert view.status().startswith(f"{(scores <= high + 1e-12).sum()} of 40")
    assert abs(float(view.value("document.activeElement.getAttribute('aria-valuenow')")) - high) < 1e-9
    view.page.press("Escape")
    assert view.status().startswith("40 examples")


def test_tokens_show_their_exact_scores_on_hover_and_by_key(live):
    results = several()
    view, top = live(results), int(np.argmax(several()[0].scores))
    spans = view.value(
        "[...document.querySelectorAll('.reading .tokens span')].map(s => [s.textContent, s.title, "
        "s.style.background])"
    )
    assert [s[0] for s in spans] == results[0].tokens[top]
    assert all(
        np.isclose(float(s[1].split(",")[0].replace("−", "-")), score, rtol=1e-3)
        for s, score in zip(spans, results[0].token_scores[top])
    )
    assert spans[0][1].endswith("the attention sink: not coloured") and spans[0][2] == ""
    strongest = 1 + int(np.argmax(np.abs(results[0].token_scores[top][1:])))
    assert ("--more" if results[0].token_scores[top][strongest] > 0 else "--less") in spans[strongest][2]
    view.page.hover(".reading .turn.answer .tokens span:nth-child(2)")
    exact = lambda: float(view.value("document.querySelector('.readout b').textContent").replace("−", "-"))
    assert np.isclose(exact(), results[0].token_scores[top][5], rtol=1e-4)
    view.value("document.querySelector('.reading .turn.answer .tokens').focus()")
    view.page.press("ArrowRight")
    assert np.isclose(exact(), results[0].token_scores[top][6], rtol=1e-4)


def test_near_duplicates_fold_and_unfold(live):
    same = "I would call the station and ask for the lost umbrella before buying another one"
    texts = [same + end for end in (" today", " soon", "")] + [
        f"something else entirely number {i} " + " ".join(str(j * i) for j in range(9)) for i in range(9)
    ]
    results = several(texts=texts)
    view = live(results)
    assert (
        "2 near-duplicates folded" in view.status()
        and view.value("document.querySelector('.row').ariaSetSize") == "10"
    )
    assert view.value("[...document.querySelectorAll('.row .tag')].map(t => t.textContent)") == ["+2 alike"]
    view.page.click(".tick input")
    assert "folded" not in view.status() and view.value("document.querySelector('.row').ariaSetSize") == "12"


def lexical(n=60):
    """Two methods: the first prefers texts that say "lantern" to those that say "harbour"; the second is the
    length. Words vary otherwise."""
    rng = np.random.default_rng(3)
    told = [
        f"answer {i} {'lantern' if i % 2 else 'harbour'} {' '.join(rng.choice(list('abcdefghijk'), 4))}"
        for i in range(n)
    ]
    results = several(texts=told, tokens=False)
    scores = np.arange(n) % 2 + rng.random(n) / 2
    return [Attribution(results[0].conversations, scores, results[0].card), *results[1:]]


ENDS = (
    "[...document.querySelectorAll('.end-words .two > div')]"
    ".map(end => [...end.querySelectorAll('bdi')].map(word => word.textContent))"
)


def test_words_beyond_chance_stand_beside_the_list_and_are_searched_for(live):
    view = live(lexical())
    assert not view.value("document.querySelector('.end-words').textContent")  # nothing is asked for unseen
    view.value("document.querySelector('.words-part').open = true")
    view.wait("document.querySelector('.end-words bdi')")
    assert view.value(ENDS) == [["lantern"], ["harbour"]]
    assert "shuffled order" in view.value("document.querySelector('.end-words').textContent")
    view.page.click(".end-words .two > div:last-child button")
    view.wait("document.querySelector('.statusline [role=status]').textContent.startsWith('30 of 60')")
    assert all("harbour" in one for one in view.rows())
    view.choose("Method", "1")  # noise
    view.wait("document.querySelector('.end-words').textContent.startsWith('None of')")
    assert view.value("document.querySelectorAll('.end-words button').length") == 0
    view.choose("Method", "0")
    view.wait("document.querySelector('.end-words bdi')?.textContent === 'lantern'")


def test_a_page_without_a_kernel_has_the_words_of_every_method(chromium, tmp_path):
    results = lexical()
    words = json.loads(embedded_browser(results[0], results[1:]))["words"]
    assert len(words) == 3 and words[0]["highest"][0][0] == "lantern" and not words[1]["highest"]
    path = ExampleBrowser(results[0], results[1:]).page().save(tmp_path / "browser.html")
    page = chromium.open(path.as_uri())
    page.wait("document.querySelector('.reading .turn')")
    page.value("document.querySelector('.words-part').open = true")
    page.wait("document.querySelector('.end-words bdi')")
    assert page.value(ENDS) == [["lantern"], ["harbour"]] and page.errors == []
    page.close()


SELECT = """(() => {{
  const spans = [...document.querySelectorAll('.reading .turn.{turn} .tokens span')];
  document.getSelection().setBaseAndExtent(spans[{start}].firstChild, 0, spans[{end}].firstChild,
                                           spans[{end}].textContent.length);
  document.querySelector('.reading').dispatchEvent(new Event('pointerup'));
  return spans.slice({start}, {end} + 1).map(span => span.textContent).join('').trim();
}})()"""


def test_selected_words_of_an_answer_offer_the_lines_that_ask_which_data_made_them(chromium, tmp_path):
    lm = LanguageModel(*tiny_pair("llama"), "tiny")
    train = load_conversations(
        [
            {"prompt": f"Is {i} even?", "response": "yes, it is!" if i % 2 else "no, certainly not."}
            for i in range(6)
        ]
    )
    data = lm.tokenize(train)
    scores = [np.arange(len(item.input_ids)) / 9.0 for item in data]
    result = Attribution(
        data, np.arange(6.0), QueryCard("GradDot", "x", zero="gradient"), token_scores=scores
    )
    path = ExampleBrowser(result).page().save(tmp_path / "browser.html")
    page = chromium.open(path.as_uri())
    page.wait("document.querySelector('.reading .turn.answer .tokens span')")
    assert page.value("document.querySelector('.asking').hidden")
    page.value(SELECT.format(turn="question", start=1, end=2))  # words of a question were made by no loss
    assert page.value("document.querySelector('.asking').hidden")
    words = page.value(SELECT.format(turn="answer", start=1, end=4))
    code = page.value("document.querySelector('.asking pre').textContent")
    assert json.dumps(words) in code and "train.select([5])" in code
    assert words in page.value("document.querySelector('.asking q').textContent")
    page.click(".asking button")  # a real press: the button must survive the release of the pointer
    page.wait("/copied|copy them/i.test(document.querySelector('.asking').lastChild.textContent)")
    names = dict(lm=lm, train=train)
    exec(code, names)  # the lines do what they say
    asked = TokenQuery(LossQuery(train[5:]), chosen_tokens(lm.tokenize(train[5:]), words))
    np.testing.assert_allclose(names["asked"].scores, Influence(lm, asked).score(train).scores)
    page.press("ArrowDown")
    page.value("document.querySelectorAll('.row')[1].click()")
    page.wait("document.querySelector('.asking').hidden")  # another example, nothing selected
    assert page.errors == []
    page.close()


def test_the_kernel_is_asked_which_data_made_selected_words_and_answers_beside_the_result(live):
    results = several()
    shown, called = results[0], []

    def ask(answer, words):
        called.append((answer.ids, words))
        if len(called) == 2:
            raise WidgetError("no such <b>words</b>")
        scores = np.arange(len(shown), dtype=float)[::-1] - 15.5
        return Attribution(shown.conversations, scores, QueryCard("By words", "x", zero="gradient"))

    view = live(results, ask=ask)
    order = np.argsort(-shown.scores)
    words = view.value(SELECT.format(turn="answer", start=1, end=3))
    assert view.value("document.querySelector('.asked').hidden")
    assert "train.select" in view.value("document.querySelector('.asking pre').textContent")
    view.page.click(".asking .ask")
    view.wait("document.querySelector('.asked .beside')")
    (asked,) = view.widget.asked
    assert called == [([shown.ids[order[0]]], words)]
    assert words in view.value("document.querySelector('.asked h4 q').textContent")
    for column, result, other in (("words", asked, shown), ("here", shown, asked)):
        told = view.value(
            f"[...document.querySelectorAll('.asked .{column} .one')].map(one => [one.title, one.innerText])"
        )
        ends = [*result.top(5).rows, *result.bottom(5).rows]
        assert len(told) == 10
        for (title, text), row in zip(told, ends):
            higher = f"{np.floor(10 * result.percentiles[row]) / 10:.1f} %"
            assert text.startswith(higher) and f"#{other.ranks[row]} by" in text
            assert (
                f"question {row}" in text and " ".join(shown.conversations[row].response.split())[:40] in text
            )
            assert title == "raw score " + f"{result.scores[row]:+.6g}".replace("-", "−")
    assert "By words" in view.value("document.querySelector('.asked .words .name').textContent")
    view.value(
        "document.querySelectorAll('.asked .words .one')[1].click()"
    )  # the example opens, the answer stays
    view.settle()
    assert reading_id(view) == shown.ids[1] and not view.value("document.querySelector('.asked').hidden")
    view.wait("document.querySelector('.reading .turn.answer .tokens span')")
    view.value(SELECT.format(turn="answer", start=0, end=2))
    view.page.click(".asking .ask")
    view.wait("document.querySelector('.asked .problem')")
    assert view.value("document.querySelector('.asked .problem').textContent") == "no such <b>words</b>"
    view.value("[...document.querySelectorAll('.asked button')].at(-1).click()")
    assert view.value("document.querySelector('.asked').hidden") and len(view.widget.asked) == 1


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_of_an_answer_about_words_is_cut(live, width):
    results = several()
    view = live(
        results,
        window={"width": width},
        ask=lambda answer, words: results[1].query(),  # of the same file
    )
    view.value(SELECT.format(turn="answer", start=1, end=3))
    view.value("document.querySelector('.asking .ask').click()")
    view.wait("document.querySelector('.asked .beside')")
    assert view.value("document.documentElement.scrollWidth") <= width
    boxes = "[...document.querySelectorAll('.asked, .asked *')].map(one => one.getBoundingClientRect().right)"
    assert max(view.value(boxes)) <= width + 1


def test_a_model_given_as_ask_scores_by_the_likelihood_of_the_words():
    lm = LanguageModel(*tiny_pair("llama"), "tiny")
    train = load_conversations(
        [
            {"prompt": f"Is {i} even?", "response": "yes, it is!" if i % 2 else "no, certainly not."}
            for i in range(6)
        ]
    )
    result = Attribution(train, np.arange(6.0), QueryCard("GradDot", "x", zero="gradient"))
    browser = ExampleBrowser(result, ask=lm)
    found = browser.ask(2, "certainly")
    query = TokenQuery(LossQuery(train[2:3]), chosen_tokens(lm.tokenize(train[2:3]), "certainly"))
    np.testing.assert_allclose(found.scores, Influence(lm, query).score(train, progress=False).scores)
    assert browser.asked == [found]
    reply, _ = browser._answer({"kind": "ask", "place": 2, "words": "certainly"})
    top = reply["asked"]["ends"][0]["sides"][0][0]
    assert top["place"] == int(np.argmax(found.scores)) and top["rank"] == [
        1,
        int(result.ranks[top["place"]]),
    ]
    for wrong, words in ((7, "nobody"), ("lm", "a str: give the model"), (lambda *_: 3, "gave a int")):
        with pytest.raises(WidgetError, match="nobody can be asked" if wrong == 7 else words):
            (ExampleBrowser(result) if wrong == 7 else ExampleBrowser(result, ask=wrong)).ask(2, "certainly")
    with pytest.raises(WidgetError, match="row 9 is not"):
        browser.ask(9, "certainly")


# deciding -----------------------------------------------------------------------------------------


def reading_id(view):
    return view.value("document.querySelector('.reading code').textContent")


def test_decisions_by_key_reach_python_and_can_be_undone(live):
    results = several()
    view, order = live(results), np.argsort(-several()[0].scores)
    view.value("document.querySelector('.rows').focus()")
    view.page.press("d")  # moves on to the next row
    view.page.press("k")
    view.settle()
    decisions = view.widget.decisions
    assert (
        decisions.loc[order[0], "decision"] == "drop"
        and decisions.loc[order[1], "decision"] == "keep"
        and len(decisions) == 2
    )
    assert (
        set(decisions.by) == {"ada"}
        and set(decisions.why) == {"one by one"}
        and decisions.loc[order[0], "id"] == results[0].ids[order[0]]
    )
    assert view.status().endswith("1 dropped · 1 kept")
    assert reading_id(view) == results[0].ids[order[2]]
    view.page.press("z")  # and undoing goes back to the row that was decided
    view.settle()
    assert view.widget.decisions.index.tolist() == [order[0]] and view.status().endswith("1 dropped")
    assert reading_id(view) == results[0].ids[order[1]]
    view.page.press("ArrowUp")
    view.page.press("n")
    view.page.type("praises a bad plan")
    view.page.press("Enter", modifiers=2)
    view.settle()
    assert view.widget.decisions.loc[order[0], "note"] == "praises a bad plan"


def test_deciding_under_a_filter_goes_through_the_list_row_by_row_and_stops_at_its_end(live):
    results = several()
    view, order = live(results), np.argsort(-results[0].scores)
    view.choose("Decisions", "undecided")  # a decided row leaves the list, and the next one takes its place
    view.value("document.querySelector('.rows').focus()")
    for key in "dkdc":  # clearing decides nothing, and stays
        view.page.press(key)
        view.settle()
    decided = view.widget.decisions["decision"]
    assert decided.to_dict() == dict(zip(order[:3].tolist(), ["drop", "keep", "drop"]))
    assert reading_id(view) == results[0].ids[order[3]] and view.rows()[0].startswith(f"answer {order[3]} ")
    view.choose("Decisions", "all")
    view.value("document.querySelector('.rows').focus()")
    view.page.press("End")
    view.page.press("k")
    view.settle()
    assert view.widget.decisions.loc[order[-1], "decision"] == "keep"
    assert reading_id(view) == results[0].ids[order[-1]]


def test_decisions_in_bulk_say_which_filter_chose_them(live):
    results = several()
    view = live(results, record=None)
    view.page.click(".filters summary")
    view.page.click("input[data-facet='0'][data-code='1']")
    view.settle()
    view.page.click(".actions button.drop")
    view.settle()
    chosen = [i for i, c in enumerate(results[0].conversations) if c.metadata["kind"] == "kind 1"]
    decisions = view.widget.decisions
    assert (
        decisions.index.tolist() == chosen
        and set(decisions.decision) == {"drop"}
        and all("kind: kind 1" in why for why in decisions.why)
    )
    assert len(view.widget.kept) == 40 - len(chosen)


def test_rows_selected_with_shift_are_decided_together(live):
    results = several()
    view, order = live(results), np.argsort(-several()[0].scores)
    view.value("document.querySelector('.rows').focus()")
    for _ in range(3):
        view.page.press("ArrowDown", modifiers=8)
    view.page.press("k")
    view.settle()
    assert sorted(view.widget.decisions.index) == sorted(order[:4].tolist()) and set(
        view.widget.decisions.why
    ) == {"one of 4 examples selected by hand"}
    view.page.press("d")  # and rows selected before the answer has come stay selected
    view.page.press("ArrowDown", modifiers=8)
    view.settle()
    assert view.value("[...document.querySelectorAll('.bulk .quiet')].map(one => one.textContent)") == [
        "2 selected: "
    ]


def test_python_decisions_appear_and_export_answers_in_the_page(live, tmp_path):
    results = several()
    view = live(results)
    view.widget.decide([int(results[0].top(1).rows[0])], "drop", "from Python")
    view.share()
    assert (
        view.status().endswith("1 dropped")
        and view.value("document.querySelector('.decide textarea').value") == "from Python"
    )
    view.choose("File to write", str(tmp_path / "clean.jsonl"))
    for expected in ("39 of 40 examples written", "exists already"):
        view.value("[...document.querySelectorAll('footer button')].at(-1).click()")
        view.settle()
        assert expected in view.value("document.querySelector('footer [role=status]').textContent")
    assert len((tmp_path / "clean.jsonl").read_text().splitlines()) == 39


def test_a_key_pressed_while_writing_is_only_text(live):
    view = live()
    view.page.click("input[type=search]")
    view.page.press("d")
    view.settle()
    assert (
        view.widget.decisions.empty
        and view.value("document.querySelector('input[type=search]').value") == "d"
    )


def test_shortcuts_of_the_notebook_are_suppressed(live):
    assert live().value("document.querySelector('.ctda-view').hasAttribute('data-lm-suppress-shortcuts')")


# size, safety, access -----------------------------------------------------------------------------


def test_ten_thousand_examples_draw_only_what_is_in_view(live):
    rng = np.random.default_rng(1)
    data = chats([f"answer {i} is {i * 7919 % 10007}" for i in range(10_000)])
    result = Attribution(data, rng.normal(size=10_000), QueryCard("Concept Influence", "sycophancy"))
    view = live([result])
    assert view.value("document.querySelectorAll('.row').length") < 30 and view.status().startswith(
        "10,000 examples"
    )
    assert len(view.widget.saved) == 60 and len(json.dumps(view.widget.saved)) < 600_000
    view.page.click(".row")
    view.value("document.querySelector('.row.middle')?.click()")
    view.value("document.querySelector('.rows').focus()")
    for _ in range(60):
        view.page.press("PageDown")
    assert (
        "more between the two ends" in view.value("document.querySelector('.rows').textContent")
        or view.value("document.querySelector('.rows').scrollTop") > 0
    )
    view.choose("Order", "file")
    view.value("document.querySelector('.rows').scrollTop = 74 * 5000")
    assert " ".join(data[5000].response.split()) in view.rows()
    view.page.click("input[type=search]")
    view.page.type("7919")
    view.wait(
        f"document.querySelector('.statusline "
        f"[role=status]').textContent.startsWith('{len(hits(view.widget._contents.texts(), '7919'))} of "
        f"10,000')"
    )


def harmless(page):
    """No text has become an element, and nothing was run or asked for."""
    assert (
        page.value(
            "document.querySelectorAll('#here :is(script, img, iframe, object, embed, link, style, base, "
            'form, svg[onload], a:not([href^="#example="]))\').length'
        )
        == 0
    )
    assert page.value(
        "[...document.querySelectorAll('#here *')].every(node => [...node.attributes].every(one => "
        "!one.name.startsWith('on')))"
    )
    assert page.errors == [] and all(
        address.startswith(("file:", "data:", "about:")) for address in page.requests
    )


def too_wide(page):
    """What sticks out of the window, unless it can be scrolled by itself."""
    return page.value(
        "document.documentElement.scrollWidth <= window.innerWidth ? [] : "
        "[...document.querySelectorAll('#here *')]"
        ".filter(n => n.getBoundingClientRect().right > window.innerWidth + 1 && !n.closest('.wide, .row'))"
        ".map(n => `${n.tagName}.${n.className} ${n.textContent.slice(0, 40)}`).slice(0, 5)"
    )


def hostile_results():
    data = Conversations(
        [
            Conversation(
                (
                    {"role": "system", "content": text},
                    {"role": "user", "content": text},
                    {"role": "assistant", "content": text},
                ),
                metadata={
                    "kind": text[:60],
                    f"name {text[:40]}": text[:3_000],
                    "group": "a" if i % 2 else "<b>b</b>",
                },
            )
            for i, text in enumerate(XSS)
        ],
        "<script>alert('data')</script>",
    )
    rng = np.random.default_rng(0)
    card = lambda method: QueryCard(
        method,
        "<img src=x onerror=alert(1)>",
        model="</script><script>alert(1)</script>",
        data="<b>data</b>",
        notes=["<svg onload=alert(1)>"],
    )
    tokens = [[text, text[:50], "<|im_end|>"] for text in XSS]
    return [
        Attribution(
            data,
            rng.normal(size=len(XSS)),
            card("<script>alert(2)</script>"),
            tokens=tokens,
            token_scores=[rng.normal(size=3) for _ in XSS],
            response_masks=[np.array([False, True, True])] * len(XSS),
        ),
        Attribution(data, rng.normal(size=len(XSS)), card("javascript:alert(3)")),
    ]


def test_hostile_texts_are_shown_and_not_run_with_a_kernel(live):
    from concept_tda.foundation.display import visible_text

    for results in (
        hostile_results(),
        [Attribution(r.conversations, r.scores, r.card) for r in hostile_results()],
    ):
        view = live(results, labels="group", positive="a")
        view.widget.decide(
            [int(row) for row in results[0].rows],
            "keep",
            note="<img src=x onerror=alert(4)></script>",
            why="<script>alert(5)</script>",
        )
        view.share()
        view.value("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        view.value("document.querySelector('.rows').focus()")
        view.value("document.querySelector('.tick input').click()")
        shown = []
        for _ in XSS:
            view.settle()
            shown.append(
                view.value(
                    "[...document.querySelectorAll('.reading .turn')].map(t => t.textContent).join('')"
                )
            )
            view.page.press("ArrowDown")
        assert [
            text for text in XSS if not any(visible_text(text)[:2_000].strip() in one for one in shown)
        ] == []
        harmless(view.page)
        view.value("window.close_view()")


@pytest.mark.parametrize("width", [400, 1200])
def test_hostile_texts_are_shown_and_not_run_from_a_file(chromium, tmp_path, width):
    results = hostile_results()
    page = open_embedded(
        chromium,
        tmp_path,
        embedded_browser(results[0], results[1:], labels="group", positive="a"),
        width=width,
    )
    page.value("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    page.value("document.querySelector('.rows').focus()")
    for _ in XSS:
        page.press("ArrowDown")
        page.value("new Promise(done => setTimeout(done, 30))")
        assert too_wide(page) == []
    harmless(page)
    assert (
        page.value("document.querySelector('h3').textContent")
        == "<script>alert(2)</script>: <img src=x onerror=alert(1)>"
    )
    page.close()


def open_embedded(chromium, tmp_path, data, **window):
    script = (
        front_end(*BROWSER_SCRIPTS) + "\nwindow.view = mountEmbedded(document.getElementById('here'), "
        "JSON.parse(document.getElementById('data').textContent));"
    )
    path = tmp_path / "embedded.html"
    path.write_text(
        PAGE.format(
            style=front_end("views.css"),
            rest=(
                f"<script type='application/json' id=data>{data}</script><script "
                f"type=module>{script}</script>"
            ),
        ),
        encoding="utf-8",
        errors="surrogatepass",
    )
    page = chromium.open(path.as_uri(), **window)
    page.wait("document.querySelector('.reading .turn')")
    return page


def test_rows_of_a_page_show_what_was_said_without_the_template_s_tokens(chromium, tmp_path):
    """The stretches of tokens hold `<|im_start|>user` and `<|im_end|>`, the list doesn't."""
    result = several()[0]
    for tokens in result.tokens:
        tokens[-1] += "<|im_end|>"
    page = open_embedded(chromium, tmp_path, embedded_browser(result))
    row = "document.querySelector('.row .response')?.textContent"
    assert page.wait(f"{row}?.startsWith('answer') && {row}") == result.top(1).conversations[0].response
    page.close()


def test_an_address_opens_its_example_in_a_page_of_its_own(chromium, tmp_path):
    results = several()
    page = open_embedded(chromium, tmp_path, embedded_browser(results[0], results[1:], labels="bad"))
    reading = "document.querySelector('.reading').textContent"
    other = int(np.argsort(-results[0].scores)[20])
    link = "document.querySelector('.reading a[href^=\"#example=\"]').getAttribute('href')"
    page.value("document.querySelector('.rows').focus()")
    for _ in range(20):
        page.press("ArrowDown")
    page.wait(f"{reading}.includes('answer {other} ')")
    address = page.value(f"location.href.split('#')[0] + {link}")
    assert address.endswith(f"#example={results[0].ids[other]}")
    page.close()
    again = chromium.open(address)
    again.wait(f"{reading}.includes('answer {other} ')")
    row = "document.querySelector('.row.current .response')?.textContent"
    again.wait(f"{row}?.startsWith('answer {other} ')")  # texts are unpacked while the page is there already
    again.value(f"location.hash = '#example={results[0].ids[3]}'")  # another link, followed within the page
    again.wait(f"{reading}.includes('answer 3 ')")
    again.value("location.hash = '#example=nothing'")
    again.value("new Promise(done => setTimeout(done, 60))")
    assert again.value(f"{reading}.includes('answer 3 ')") and again.errors == []
    again.close()


def test_without_a_kernel_list_histogram_brush_search_and_highlights_work(chromium, tmp_path):
    results = several()
    page, scores = (
        open_embedded(chromium, tmp_path, embedded_browser(results[0], results[1:], labels="bad")),
        results[0].scores,
    )
    texts = lambda: page.value(
        "new Promise(done => setTimeout(() => done([...document.querySelectorAll('.row')].sort((a, b) "
        "=> parseFloat(a.style.top) - parseFloat(b.style.top)).map(row => "
        "row.querySelector('.response').textContent)), 300))"
    )
    assert texts()[:4] == responses(results[0], np.argsort(-scores))[:4]
    assert page.value("document.querySelectorAll('.reading .tokens span').length") == len(
        results[0].tokens[int(scores.argmax())]
    )
    page.click("input[type=search]")
    page.type("17")
    wanted = [i for i in np.argsort(-scores) if "17" in results[0].conversations[int(i)].text]
    assert (
        page.wait(
            f"document.querySelector('.statusline [role=status]').textContent.startsWith('{len(wanted)} "
            f"of 40')"
        )
        and texts()[:3] == responses(results[0], wanted)[:3]
    )
    page.value(
        "[...document.querySelectorAll('.actions button')].find(b => b.textContent === 'Clear "
        "filters').click()"
    )
    x, y, width, height = page.box(".chart")
    page.drag(x + 1, y + 5, x + width * 0.25, y + 5)
    low = scores.min() + 0.25 * np.ptp(scores)
    assert (
        abs(
            int(page.value("document.querySelector('.statusline [role=status]').textContent").split()[0])
            - (scores <= low).sum()
        )
        <= 1
    )
    assert (
        page.value("document.querySelectorAll('.decide button, footer').length") == 0
    )  # nothing to decide where nobody listens
    assert page.errors == [] and len(page.requests) == 1
    page.close()


def open_report(chromium, tmp_path, results, *, change=lambda page: page, **window):
    """A written report in a page, with its policy."""
    from concept_tda.views.report import write_report

    path = write_report(
        results,
        tmp_path / "report.html",
        labels="bad" if "bad" in results[0].conversations[0].metadata else None,
    )
    path.write_text(change(path.read_text()), encoding="utf-8")
    return chromium.open(path.as_uri(), **window)


def test_the_report_browses_from_a_file(chromium, tmp_path):
    results = several()
    page, scores = open_report(chromium, tmp_path, results), results[0].scores
    page.wait("document.querySelector('#browser .reading .turn')")
    status = lambda: page.value(
        "new Promise(done => setTimeout(() => done(document.querySelector('#browser .statusline "
        "[role=status]').textContent), 300))"
    )
    texts = lambda: page.value(
        "new Promise(done => setTimeout(() => done([...document.querySelectorAll('#browser "
        ".row')].sort((a, b) => parseFloat(a.style.top) - parseFloat(b.style.top)).map(row => "
        "row.querySelector('.response').textContent)), 300))"
    )
    assert texts()[:4] == responses(results[0], np.argsort(-scores))[:4]
    top = int(scores.argmax())
    spans = page.value(
        "[...document.querySelectorAll('#browser .reading .tokens span')].map(s => [s.textContent, "
        "s.title, getComputedStyle(s).backgroundColor])"
    )
    assert [s[0] for s in spans] == results[0].tokens[top] and np.allclose(
        [float(s[1].split(",")[0].replace("−", "-")) for s in spans],
        results[0].token_scores[top],
        rtol=1e-2,
    )
    strongest = 1 + int(np.argmax(np.abs(results[0].token_scores[top][1:])))  # the sink has no colour
    assert ("238, 112, 20" if results[0].token_scores[top][strongest] > 0 else "42, 120, 220") in spans[
        strongest
    ][2]
    page.click("#browser input[type=search]")
    page.type("17")
    wanted = [i for i in np.argsort(-scores) if "17" in results[0].conversations[int(i)].text]
    assert status().startswith(f"{len(wanted)} of 40") and texts()[:3] == responses(results[0], wanted)[:3]
    page.value(
        "[...document.querySelectorAll('.actions button')].find(b => b.textContent === 'Clear "
        "filters').click()"
    )
    x, y, width, height = page.box(".chart")
    page.drag(x + 1, y + 5, x + width * 0.25, y + 5)
    assert abs(int(status().split()[0]) - (scores <= scores.min() + 0.25 * np.ptp(scores)).sum()) <= 1
    assert page.value(
        "[...document.querySelectorAll('.ends')].every(ends => !ends.open)"
    )  # the static lists step back
    assert page.errors == [] and len(page.requests) == 1 and page.requests[0].startswith("file:")
    page.close()


def test_a_report_whose_scripts_are_blocked_can_be_read(chromium, tmp_path):
    results = several()
    page = open_report(
        chromium,
        tmp_path,
        results,
        change=lambda page: re.sub(r"script-src 'sha256-[^']*'", "script-src 'none'", page),
    )
    assert "scripts are blocked here" in page.value("document.querySelector('#browser').innerText")
    shown, scores = page.value("document.querySelector('.ends').innerText"), results[0].scores
    assert all(
        " ".join(results[0].conversations[int(i)].response.split()) in " ".join(shown.split())
        for i in [*np.argsort(scores)[:3], *np.argsort(-scores)[:3]]
    )
    assert page.requests[1:] == []
    page.close()


@pytest.mark.parametrize("width", [400, 1200])
def test_a_report_of_hostile_texts_shows_and_does_not_run_them(chromium, tmp_path, width):
    from concept_tda.foundation.display import visible_text

    page = open_report(chromium, tmp_path, hostile_results(), width=width)
    page.wait("document.querySelector('#browser .reading .turn')")
    page.value("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    page.value(
        "(() => { const fold = document.querySelector('.tick input'); if (fold.checked) fold.click(); "
        "document.querySelector('.rows').focus(); })()"
    )
    shown = []
    for _ in XSS:
        shown.append(
            page.value(
                "new Promise(done => setTimeout(() => done([...document.querySelectorAll('.reading "
                ".turn')].map(t => t.textContent).join('')), 40))"
            )
        )
        page.press("ArrowDown")
    assert [
        text[:40] for text in XSS if not any(visible_text(text)[:2_000].strip() in one for one in shown)
    ] == []
    assert page.value("document.documentElement.scrollWidth <= window.innerWidth")
    assert (
        page.value("document.querySelectorAll('script').length") == 2
        and page.value(
            "document.querySelectorAll('body :is(img, iframe, object, embed, link, base, form, "
            'a:not([href^="#"]))\').length'
        )
        == 0
    )
    assert page.value(
        "[...document.querySelectorAll('*')].every(node => [...node.attributes].every(one => "
        "!one.name.startsWith('on')))"
    )
    assert page.errors == [] and len(page.requests) == 1
    page.close()


@pytest.mark.parametrize("dark", [False, True])
def test_every_text_has_enough_contrast(chromium, tmp_path, dark):
    results = several()
    page = open_embedded(
        chromium, tmp_path, embedded_browser(results[0], results[1:], labels="bad"), dark=dark
    )
    worst = page.value("""(() => {
      const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
      const mix = (colour, under) => {
        for (const layer of [`rgb(${under})`, colour]) {
          canvas.fillStyle = layer;
          canvas.fillRect(0, 0, 1, 1);
        }
        return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
      };
      const light = c => {
        const [r, g, b] = c.map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
        return .2126 * r + .7152 * g + .0722 * b;
      };
      const ground = node => {
        const line = [];
        for (let n = node; n; n = n.parentElement) line.unshift(getComputedStyle(n).backgroundColor);
        return line.reduce((under, colour) => mix(colour, under), [255, 255, 255]);
      };
      let worst = [99, ''];
      const walk = document.createTreeWalker(document.querySelector('.ctda-view'), NodeFilter.SHOW_TEXT);
      while (walk.nextNode()) {
        const node = walk.currentNode.parentElement;
        const text = walk.currentNode.textContent;
        if (!text.trim() || !node.offsetParent) continue;
        if (node.matches('.special, option, .empty, .empty *')) continue;
        const under = ground(node), a = light(mix(getComputedStyle(node).color, under)), b = light(under);
        const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
        if (ratio < worst[0]) worst = [ratio, node.className + ': ' + text.slice(0, 40)];
      }
      return worst;
    })()""")
    assert worst[0] >= 4.5, worst
    page.close()


def test_a_long_right_to_left_example_keeps_the_layout(live):
    tokens = ["שלום ", "עולם "] * 2_500
    data = chats(["".join(tokens), "short"])
    rng = np.random.default_rng(0)
    result = Attribution(
        data,
        [1.0, -1.0],
        QueryCard("Concept Influence", "x"),
        tokens=[tokens, ["short"]],
        token_scores=[rng.normal(size=5_000), np.ones(1)],
        response_masks=[np.ones(5_000, bool), np.ones(1, bool)],
    )
    for width in (400, 1200):
        view = live([result], window=dict(width=width))
        assert view.value("document.documentElement.scrollWidth <= window.innerWidth")
        assert (
            view.value("getComputedStyle(document.querySelector('.reading .tokens')).direction") == "rtl"
            and view.value("document.querySelectorAll('.reading .tokens span').length") == 4_000
        )
        view.value("document.querySelector('.reading .more').click()")
        assert view.value("document.querySelectorAll('.reading .tokens span').length") == 5_000
        assert view.value("document.documentElement.scrollWidth <= window.innerWidth")


def test_tab_reaches_everything_in_reading_order_and_all_controls_have_names(live):
    view = live(labels="bad")
    names = []
    for _ in range(40):
        view.page.press("Tab")
        name = view.value(
            "(() => { const n = document.activeElement; return n === document.body ? '' : "
            "(n.getAttribute('aria-label') || n.labels?.[0]?.textContent || n.textContent || "
            "'').trim().slice(0, 40); })()"
        )
        if name == "" and names:
            break
        names.append(name)
    assert all(names), names
    place = lambda start: next(i for i, name in enumerate(names) if name.startswith(start))
    assert (
        place("Query card")
        < place("Lowest score shown")
        < place("Search in prompts")
        < place("Order")
        < place("Filters")
        < place("Examples")
        < place("✕ Drop")
        < place("File to write")
        < place("Keys")
    )


# the explorer -------------------------------------------------------------------------------------


def test_the_explorer_draws_tokens_layers_neighbours_and_steered_answers_side_by_side(chromium, tmp_path):
    hostile = "<script>alert(1)</script>"
    turn = dict(role="question", answer=False, tokens=["a", hostile], scores=[0.5, -1.0])
    example = dict(row=3, value=2.0, response=hostile, turns=[dict(role="user", answer=False, text=hostile)])
    reading = dict(
        concept=hostile,
        layer=1,
        place="here",
        unit="projection",
        centre=0.25,
        limit=1.0,
        turns=[turn],
        layers=[0, 1, 2],
        sweep=[0.1, -0.5, 2.0],
        sweep_words="words",
        nearest=[example],
        farthest=[example],
        among="among",
    )
    view = ConceptView(
        reading=reading,
        steering=[dict(strength=float(s), text=f"{hostile} {s}", value=1.5 * s + 1) for s in (1, 0, -1)],
        status="ready",
    )
    asked = []
    view.on_msg(lambda _, message, __: asked.append(message))
    stand_in = StandIn(chromium, view, tmp_path, ["reading", "steering", "status"])
    page = stand_in.page
    assert page.value(
        "[...document.querySelectorAll('.conversation .tokens span')].map(s => s.textContent)"
    ) == ["a", hostile]
    page.hover(".conversation .tokens span:nth-child(2)")
    assert (
        page.value("document.querySelector('.readout').textContent") == f'"{hostile}" −1 (projection −0.75)'
    )
    answers = page.value("[...document.querySelectorAll('.steered')].map(one => one.textContent)")
    assert answers == [
        f"strength −1 · concept in it −0.5, −1.5 against 0{hostile} -1",
        f"strength 0 · concept in it +1{hostile} 0",
        f"strength +1 · concept in it +2.5, +1.5 against 0{hostile} 1",
    ]
    tops = page.value(
        "[...document.querySelectorAll('.steered')].map(one => one.getBoundingClientRect().top)"
    )
    assert len(set(tops)) == 1  # beside each other
    page.value("document.querySelector('.sweep').focus()")
    page.press("ArrowRight")
    stand_in.pump()
    assert [(one["kind"], one["layer"]) for one in asked] == [("layer", 2)]
    page.value("window.assign('reading', {...window.state.reading, layer: 2})")
    assert page.value("document.activeElement.getAttribute('aria-valuenow')") == "2"
    harmless(page)
    page.close()


# a live notebook ----------------------------------------------------------------------------------

CELLS = [
    """import numpy as np
from concept_tda.results.attribution import Attribution
from concept_tda.results.cards import QueryCard
from concept_tda.data.conversations import Conversation, Conversations
def chat(i):
    question = {"role": "user", "content": f"question {i}"}
    return Conversation((question, {"role": "assistant", "content": f"answer {i} <script>alert(1)</script>"}))
data = Conversations([chat(i) for i in range(30)], "train")
result = Attribution(data, np.arange(30) - 10.5, QueryCard("Concept Influence", "sycophancy"))
browser = result.inspect(by="ada", record="review.json")
browser"""
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab server with one notebook; address, token and folder."""
    import nbformat

    folder = tmp_path_factory.mktemp("lab")
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS],
        metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}},
    )
    nbformat.write(notebook, folder / "look.ipynb")
    home = folder / "home"
    home.mkdir()
    environment = {
        **os.environ,
        "HOME": str(home),
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "IPYTHONDIR": str(home / "ipython"),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--ServerApp.ip=127.0.0.1",
        "--ServerApp.port=0",
        f"--ServerApp.root_dir={folder}",
        "--IdentityProvider.token=lookhere",
        "--LabApp.expose_app_in_browser=True",
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    log = (folder / "log.txt").open("w")
    server = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        end = time.monotonic() + 90
        while not (files := list((home / "runtime").glob("jpserver-*.json"))):
            if server.poll() is not None or time.monotonic() > end:
                pytest.skip(f"JupyterLab did not start: {(folder / 'log.txt').read_text()[-500:]}")
            time.sleep(0.2)
        time.sleep(0.3)
        yield json.loads(files[0].read_text())["url"], folder
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
        log.close()


@pytest.mark.slow
def test_keep_and_drop_in_a_live_jupyterlab_kernel(chromium, lab):
    address, folder = lab
    page = chromium.open(f"{address}lab/tree/look.ipynb?token=lookhere&reset", width=1400, height=1100)
    page.wait(
        "window.jupyterapp && jupyterapp.shell.currentWidget?.context?.isReady && "
        "jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === 'idle'",
        90,
    )
    page.value("jupyterapp.commands.execute('notebook:run-all-cells')")
    page.wait(
        "document.querySelector('.ctda-view .reading .turn') && document.querySelector('.ctda-view .row "
        ".response')?.textContent",
        90,
    )
    assert page.value("document.querySelectorAll('.ctda-view script').length") == 0
    assert (
        page.value("document.querySelector('.ctda-view .row .response').textContent")
        == "answer 29 <script>alert(1)</script>"
    )
    page.value("document.querySelector('.ctda-view .rows').focus()")
    page.press("d")
    page.press("d")  # twice would delete a notebook's cell, were the shortcut not suppressed
    page.press("ArrowUp")  # each moved on, so the cursor is on the third row
    page.press("k")
    page.wait("document.querySelector('.ctda-view .statusline').textContent.includes('1 kept')", 30)
    record = lambda: {
        one["row"]: one["decision"] for one in json.loads((folder / "review.json").read_text())["decisions"]
    }
    end = time.monotonic() + 30
    while record() != {29: "drop", 28: "keep"}:
        assert time.monotonic() < end, record()
        time.sleep(0.1)
    assert page.value("jupyterapp.shell.currentWidget.content.widgets.length") == 1
    page.click(".ctda-view input[type=search]")
    page.type("answer 7")
    page.wait(
        "document.querySelector('.ctda-view .statusline').textContent.startsWith('3 of 30')", 30
    )  # 7, 17 and 27
    page.press("Escape")
    # the decision is in the kernel's own object, and undoing there changes the view
    page.value(
        """(async () => {
          const kernel = jupyterapp.shell.currentWidget.sessionContext.session.kernel;
          const decided = "browser.decisions.decision.to_dict() == {28: 'keep', 29: 'drop'}";
          const run = kernel.requestExecute({code: `assert ${decided}; browser.undo()`});
          const reply = await run.done;
          if (reply.content.status !== 'ok') throw Error(reply.content.evalue);
        })()"""
    )
    page.wait("!document.querySelector('.ctda-view .statusline').textContent.includes('1 kept')", 30)
    assert record() == {29: "drop", 28: "drop"} and not any(
        error.startswith("dialog") for error in page.errors
    )
    assert all(
        request.startswith((address, address.replace("http", "ws"), "data:", "blob:", "about:"))
        for request in page.requests
    ), [r for r in page.requests if not r.startswith(address)]
    page.close()


# two methods as a scatter, and the page for saved notebooks ---------------------------------------


def point(page, results, place, *, other, up="rank"):
    """Where an example's point must be, worked out here from the numbers alone."""
    left, top, width, height = page.box(".plot")
    across, edge = results[0].scores, 10
    ups = results[other].ranks if up == "rank" else -results[other].scores
    share = lambda values: (values[place] - values.min()) / np.ptp(values)
    return left + float(np.clip(share(across) * width, 3.5, width - 3.5)), top + 1 + edge + float(
        share(ups)
    ) * (height - 2 - 2 * edge)


def lonely(results, other, up="rank"):
    """An example whose point is far from all others, and not the one shown at first."""
    ups = results[other].ranks if up == "rank" else results[other].scores
    spots = np.stack(
        [
            1150 * (results[0].scores - results[0].scores.min()) / np.ptp(results[0].scores),
            150 * (ups - ups.min()) / np.ptp(ups),
        ],
        1,
    )
    far = np.linalg.norm(spots[:, None] - spots[None], axis=2) + 1e9 * np.eye(len(spots))
    far[int(results[0].scores.argmax())] = 0
    return int(far.min(1).argmax())


def open_scatter(page):
    page.value(
        "document.querySelector('.scatter > summary').click()"
    )  # closed at first: the list comes before it


def press_at(page, x, y):
    for kind in ("mousePressed", "mouseReleased"):
        page.mouse(kind, x, y, clickCount=1)


def ring(page):
    return page.value(
        "(() => { const spot = document.querySelector('.spot'), b = spot.getBoundingClientRect(); "
        "return spot.hidden ? null : [b.x + b.width / 2, b.y + b.height / 2]; })()"
    )


def ink(page, x, y):
    """Colour [r, g, b, a] that is drawn at a place of the window."""
    return page.value(
        "(() => { const c = document.querySelector('.plot canvas'), b = c.getBoundingClientRect(); "
        f"const x = Math.round(({x} - b.x) * c.width / b.width); "
        f"const y = Math.round(({y} - b.y) * c.height / b.height); "
        "return [...c.getContext('2d').getImageData(x, y, 1, 1).data]; })()"
    )


@pytest.mark.parametrize("dark", [False, True])
def test_a_point_of_the_scatter_chooses_its_example_and_shows_its_text(live, dark):
    results = several()
    view = live(results, window=dict(dark=dark))
    open_scatter(view.page)
    for other, up in ((1, "rank"), (1, "score"), (2, "rank")):
        view.choose("Method to compare with", str(other))
        view.choose("Rank or score of the other method", up)
        view.settle()
        place = lonely(results, other, up)
        x, y = point(view.page, results, place, other=other, up=up)
        red, green, blue, alpha = ink(view.page, x, y)
        assert alpha > 150 and (red > blue) == (results[0].scores[place] > 0), (red, green, blue, alpha)
        press_at(view.page, x, y)
        view.wait(f"document.querySelector('.reading').textContent.includes('id {results[0].ids[place]}')")
        view.wait("document.querySelector('.row.current .response')?.textContent")
        assert (
            view.value("document.querySelector('.row.current .response').textContent")
            == responses(results[0], [place])[0]
        )
        assert np.allclose(ring(view.page), [x, y], atol=1.5)
        view.value("document.querySelector('.rows').focus()")
        view.page.press("Home")
        view.settle()
        top = int(results[0].scores.argmax())
        assert np.allclose(
            ring(view.page), point(view.page, results, top, other=other, up=up), atol=1.5
        )  # the ring follows the list


def test_the_scatter_follows_filters_method_and_order(live):
    results = several()
    view = live(results, labels="bad")
    open_scatter(view.page)
    view.choose(
        "Order", "above-2"
    )  # the keyboard's way to the disagreements brings their method into the scatter
    view.settle()
    assert view.value("document.querySelector('[aria-label=\"Method to compare with\"]').value") == "2"
    view.choose("Order", "high")
    place = lonely(results, 2)
    view.value(
        "(() => { const box = document.querySelector('input[type=search]'); box.value = "
        "'nothinghasthis'; box.dispatchEvent(new Event('input')); })()"
    )
    view.wait("document.querySelector('.statusline [role=status]').textContent.startsWith('0 of 40')")
    view.settle()
    x, y = point(view.page, results, place, other=2)
    red, green, blue, alpha = ink(view.page, x, y)
    assert abs(red - blue) < 6 and alpha > 50  # grey: it does not pass
    press_at(view.page, x, y)
    assert view.status().startswith("0 of 40") and ring(view.page) is None
    view.value(
        "[...document.querySelectorAll('.actions button')].find(b => b.textContent === 'Clear "
        "filters').click()"
    )
    view.choose("Method", "2")
    view.settle()
    assert view.value(
        "[...document.querySelector('[aria-label=\"Method to compare with\"]').options].map(o => "
        "o.textContent)"
    ) == ["Concept Influence", "BM25"]
    assert "score by Length" in view.value(
        "document.querySelector('.plot canvas').getAttribute('aria-label')"
    )


def test_one_method_has_no_scatter(live):
    view = live(several()[:1])
    assert view.value("document.querySelectorAll('.scatter, .plot').length") == 0


def test_ten_thousand_points_are_drawn_and_picked_without_a_kernel(chromium, tmp_path):
    rng = np.random.default_rng(0)
    n = 10_000
    data = chats([f"{i}" for i in range(n)])
    results = [Attribution(data, rng.normal(size=n), QueryCard(name, "b")) for name in ("one", "two")]
    page = open_embedded(chromium, tmp_path, embedded_browser(results[0], results[1:]))
    open_scatter(page)
    page.wait("document.querySelector('.plot canvas').width > 300")
    x, y, width, height = page.box(".plot")
    press_at(page, x + width / 2, y + height / 2)
    page.wait("view.cursor !== view.view.rows[0]")
    assert np.allclose(ring(page), [x + width / 2, y + height / 2], atol=15) and page.errors == []
    page.close()


def open_frame(chromium, tmp_path, html, **window):
    """What a notebook's saved output shows, in a page from a file: that page, and the one in its frame, which
    the sandbox puts in a process of its own."""
    path = tmp_path / "saved.html"
    path.write_text(
        f"<!doctype html><meta charset=utf-8><title>outside</title><body>{html}", encoding="utf-8"
    )
    known = {target["targetId"] for target in chromium.send("Target.getTargets")["targetInfos"]}
    page = chromium.open(path.as_uri(), **window)
    frames = [
        target["targetId"]
        for target in chromium.send("Target.getTargets")["targetInfos"]
        if target["type"] == "iframe" and target["targetId"] not in known
    ]
    assert len(frames) == 1, "the frame shares its process with the page: it is no sandbox"
    session = chromium.send("Target.attachToTarget", targetId=frames[0], flatten=True)["sessionId"]
    chromium.events[session] = deque()
    frame = Page(chromium, session, frames[0])
    for domain in ("Runtime", "Network", "Log"):
        frame.send(f"{domain}.enable")  # what was said before is told again
    frame.wait(
        "document.querySelector('.reading .turn') && document.querySelector('.row .response')?.textContent"
    )
    return page, frame


def test_a_saved_view_runs_in_its_frame_from_a_file(chromium, tmp_path):
    results = several()
    shown = ExampleBrowser(results[0], results[1:], labels="bad").page(height=1000)
    assert (
        len(shown._repr_html_()) < 300_000
        and "\n" not in shown._repr_html_()
        and "<iframe" not in repr(shown)
    )
    page, frame = open_frame(chromium, tmp_path, shown._repr_html_())
    order = np.argsort(-results[0].scores)
    assert frame.value(
        "[...document.querySelectorAll('.row .response')].slice(0, 4).map(r => r.textContent)"
    ) == responses(results[0], order[:4])
    assert (
        frame.value("document.querySelectorAll('.decide button, footer').length") == 0
        and frame.value("document.querySelectorAll('.plot').length") == 1
    )
    left, top, _, height = page.box("iframe")
    assert (
        height == 1000 and page.value("document.querySelector('iframe').contentDocument") is None
    )  # an origin of its own
    box = frame.value(
        "(() => { const b = document.querySelectorAll('.row')[2].getBoundingClientRect(); return [b.x + "
        "60, b.y + 40]; })()"
    )
    press_at(page, left + box[0], top + box[1])
    frame.wait(
        f"document.querySelector('.reading').textContent.includes('id {results[0].ids[int(order[2])]}')"
    )
    assert page.errors == frame.errors == [] and all(
        request.startswith(("file:", "about:")) for request in page.requests + frame.requests
    )
    page.close()


def test_hostile_texts_in_a_saved_view_do_nothing(chromium, tmp_path):
    results = hostile_results()
    shown = ExampleBrowser(results[0], results[1:]).page(height=900)
    markup = shown._repr_html_()
    assert (
        markup.count("<") == 2 and markup.count('"') == 8
    )  # the frame's own, and nothing that could end its attribute
    page, frame = open_frame(chromium, tmp_path, markup)
    assert frame.value("document.querySelectorAll('.row').length") >= 5
    assert (
        frame.value("document.querySelectorAll('script').length") == 2
        and frame.value("document.querySelectorAll('img, iframe, a, svg[onload]').length") == 0
    )
    assert (
        page.value("document.querySelectorAll('body > *').length") == 1
        and page.value("document.title") == "outside"
    )
    assert page.errors == frame.errors == [] and all(
        request.startswith(("file:", "about:")) for request in page.requests + frame.requests
    )
    page.close()
    page = chromium.open(shown.save(tmp_path / "page.html").as_uri())
    page.wait("document.querySelector('.reading .turn')")
    assert page.errors == [] and len(page.requests) == 1
    page.close()


def test_a_frame_of_no_height_is_refused():
    with pytest.raises(WidgetError, match="200 pixels"):
        ExampleBrowser(several()[0]).page(height=0)


def test_the_title_names_the_method_whose_ranks_are_shown(chromium, tmp_path):
    results = several()
    page = open_embedded(chromium, tmp_path, embedded_browser(results[0], results[1:]))
    title = "document.querySelector('h3').textContent"
    assert page.value(title) == f"{results[0].label}: {results[0].card.behaviour}"
    page.value(
        "(() => { const pick = document.querySelector('select[aria-label=Method]'); pick.value = '1'; "
        "pick.dispatchEvent(new Event('change')); })()"
    )
    assert page.value(title) == f"{results[1].label}: {results[1].card.behaviour}"
    assert page.value("document.querySelector('.ctda-view').getAttribute('aria-label')").endswith(
        page.value(title)
    )
    page.close()


def of_two_methods():
    """A method with token scores; one with others, another question and another card; one without any."""
    first, *_, length = several()
    card = QueryCard("Second", "boasting", zero="projection", mean=0.2, model="other", data="train", layer=3)
    scores = [-one[::-1] for one in first.token_scores]
    extra = dict(tokens=first.tokens, response_masks=first.response_masks, token_scores=scores)
    return first, Attribution(first.conversations, -2 * first.scores, card, **extra), length


@pytest.mark.parametrize("where", ["page", "kernel", "report"])
def test_title_card_sentence_labels_and_colours_follow_the_method(chromium, tmp_path, live, where):
    results, labels = of_two_methods(), [i % 3 == 0 for i in range(40)]
    if where == "kernel":
        page = live(results, labels=labels).page
    elif where == "page":
        page = open_embedded(chromium, tmp_path, embedded_browser(results[0], results[1:], labels=labels))
    else:
        page = chromium.open(write_report(list(results), tmp_path / "report.html", labels=labels).as_uri())
    view = "document.querySelector('.ctda-view')"
    text = lambda selector: page.value(f"{view}.querySelector('{selector}')?.textContent ?? ''")

    def pick(number):
        page.value(
            f"(() => {{ const pick = {view}.querySelector('select[aria-label=Method]'); "
            f"pick.value = '{number}'; pick.dispatchEvent(new Event('change')); }})()"
        )

    page.wait(f"{view}?.querySelector('.reading .turn')")
    for number in (1, 2, 0):
        pick(number)
        one = results[number]
        behaviour = one.queries[0] if where == "report" else one.card.behaviour
        page.wait(f"{view}.querySelector('h3').textContent === '{one.label}: {behaviour}'")
        assert ("above zero, training more" in text(".sign").lower()) == (one.card.zero == "gradient")
        card = dict(
            page.value(
                f"[...{view}.querySelectorAll('header details tr')].map(row => [...row.children].map(cell "
                "=> cell.textContent))"
            )
        )
        assert card["method"] == one.card.method and card["behaviour"] == one.card.behaviour
        assert card["model"] == one.card.model and (one.card.model in text("header .quiet"))
        auroc = detection_metrics(one.scores, np.array(labels))["AUROC"]
        assert f"AUROC {auroc:.3f}" in text(".reading-note")
        page.value(f"{view}.querySelector('.both-ends button').click()")
        highest = one.conversations[int(np.argmax(one.scores))].response
        page.wait(f"{view}.querySelector('.reading .answer').textContent.includes({json.dumps(highest)})")
        titles = page.value(f"[...{view}.querySelectorAll('.reading .tokens span')].map(s => s.title)")
        if one.token_scores is None:
            assert not any(titles) and f"{one.label} has no token scores." in text(".reading")
            continue
        shown = [float(title.split(",")[0].replace("−", "-")) for title in titles]
        assert np.allclose(shown, one.token_scores[int(np.argmax(one.scores))], rtol=1e-2)
        assert f"token scores of {one.label}" in text(".reading .legend")
    assert page.errors == []
