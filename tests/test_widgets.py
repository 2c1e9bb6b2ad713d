"""What stands behind the views: near-duplicates, length control, z, facets, decisions and their record,
exports, answers to the page."""

import json

import numpy as np
import pytest
from test_attribution import HOSTILE, make

from concept_tda.data.conversations import Conversation, Conversations, load_conversations
from concept_tda.results.attribution import Attribution
from concept_tda.results.cards import QueryCard
from concept_tda.results.duplicates import near_duplicates
from concept_tda.results.metrics import AttributionError
from concept_tda.views import contents
from concept_tda.views.browser import ExampleBrowser, embedded_browser
from concept_tda.views.contents import (
    BROWSER_SCRIPTS,
    WidgetError,
    front_end,
    percentiles_for_length,
)
from concept_tda.views.explorer import ConceptExplorer, concept_reading
from concept_tda.views.review import MARKS, Review

CARD = QueryCard("Concept Influence", "sycophancy", zero="gradient")


@pytest.fixture
def browser():
    return ExampleBrowser(make(12, tokens=True), [make(12, seed=1)], labels="bad", by="ada")


# near-duplicates ----------------------------------------------------------------------------------


def triples(text):
    import re

    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}


@pytest.mark.parametrize("seed", range(3))
def test_groups_are_those_of_comparing_all_pairs(seed):
    rng = np.random.default_rng(seed)
    originals = [" ".join(f"w{word}" for word in rng.integers(0, 500, 40)) for _ in range(30)]
    texts = []
    for text in originals:  # copies with one word in forty changed: similarity (38 - 3) / (38 + 3) = .85
        texts.append(text)
        for _ in range(rng.integers(0, 3)):
            words = text.split()
            words[rng.integers(3, 37)] = "changed"
            texts.append(" ".join(words))
    parent = list(range(len(texts)))

    def root(i):
        return i if parent[i] == i else root(parent[i])

    sets = [triples(text) for text in texts]
    for i in range(len(texts)):
        for j in range(i):
            if len(sets[i] & sets[j]) >= 0.7 * len(sets[i] | sets[j]):
                parent[max(root(i), root(j))] = min(root(i), root(j))
    assert near_duplicates(texts).tolist() == [root(i) for i in range(len(texts))]


def test_short_empty_and_unspaced_texts_fold_only_where_equal():
    assert near_duplicates(
        ["", " ", "a b", "A  b", "b a", "日本語の文章です", "日本語の文章だ"]
    ).tolist() == [0, 0, 2, 2, 4, 5, 6]
    assert near_duplicates(["one"]).tolist() == [0] and near_duplicates([]).tolist() == []


def test_a_thousand_copies_are_one_group_quickly():
    assert set(
        near_duplicates(
            ["the very same words in every example"] * 1000 + ["another one that has nothing to do with it"]
        ).tolist()
    ) == {0, 1000}


# numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 5, 40, 2_345])
def test_percentiles_for_length_are_those_of_the_neighbours_in_length(n):
    rng = np.random.default_rng(n)
    scores, lengths = rng.integers(0, 50, n).astype(float), rng.permutation(n)
    found, window, order = (
        percentiles_for_length(scores, lengths),
        min(n, int(np.clip(n // 10, 30, 500))),
        np.argsort(lengths),
    )
    for place in range(0, n, max(1, n // 17)):
        start = int(np.clip(place - window // 2, 0, n - window))
        near, own = scores[order[start : start + window]], scores[order[place]]
        assert np.isclose(found[order[place]], 100 * (np.mean(near < own) + np.mean(near == own) / 2))


def test_the_browser_leads_with_multiples_of_the_null_it_is_given():
    result, null = make(12), np.random.default_rng(0).normal(size=(12, 7))
    expected = result.with_null(null)
    backwards = [Attribution(result.conversations[::-1], column[::-1], CARD) for column in null.T]
    for given in (
        null,
        backwards,
        Attribution(result.conversations, null, CARD),
    ):  # matched by id, not by place
        shown = ExampleBrowser(result, [make(12, seed=1)], null=given)
        assert np.allclose(np.frombuffer(shown.columns["leading0"]), expected.times_null)
        first, second = shown.table["methods"]
        assert first["kind"] == "null" and first["null"]["words"] == "7 random directions"
        assert second["kind"] == "spread" and second["null"] is None
    for wrong in (np.zeros((12, 4)), np.zeros((11, 9))):
        with pytest.raises(AttributionError, match="at least 5"):
            ExampleBrowser(result, null=wrong)


def test_columns_hold_the_numbers_of_every_method(browser):
    column = lambda name, kind: np.frombuffer(browser.columns[name], kind)
    results = [make(12, tokens=True), make(12, seed=1)]
    for number, result in enumerate(results):
        assert (column(f"score{number}", np.float64) == result.scores).all() and (
            column(f"rank{number}", np.int32) == result.ranks
        ).all()
        assert np.allclose(column(f"percentile{number}", np.float32), result.percentiles)
    assert (
        column("length", np.int32).tolist() == [int(mask.sum()) for mask in results[0].response_masks]
        and browser.table["length_unit"] == "response tokens"
    )
    assert [facet["name"] for facet in browser.table["facets"]] == ["bad"] and column(
        "facet0", np.int16
    ).tolist() == [0 if i % 3 == 0 else 1 for i in range(12)]


def test_facets_have_few_plain_values_and_missing_ones_have_none():
    data = Conversations(
        [
            Conversation(
                ({"role": "user", "content": str(i)}, {"role": "assistant", "content": str(i)}),
                metadata={"topic": "ab"[i % 2], "number": i, "listed": [1], "same": 1}
                | ({"some": i % 2} if i > 3 else {}),
            )
            for i in range(10)
        ]
    )
    facets = contents._facets(data, None, "", None)
    assert [(name, sorted(values)) for name, values, _ in facets] == [
        ("topic", ["a", "b"]),
        ("some", ["0", "1"]),
    ]
    assert (
        facets[1][2].tolist()[:4] == [-1] * 4
        and [facets[1][1][code] for code in facets[1][2][4:]] == ["0", "1"] * 3
    )


def test_refused_results():
    result = make(12)
    with pytest.raises(WidgetError, match="part"):
        result.top(3).inspect([make(12, seed=1)])
    with pytest.raises(WidgetError, match="labels"):
        result.inspect(labels=[True])
    with pytest.raises(Exception, match="2 queries"):
        make(12, queries=2).inspect()
    shown = make(12, queries=2).inspect(query="concept 1").table["methods"][0]
    assert shown["name"] == "Concept Influence: concept 1"
    assert len(result.top(3).inspect().table["methods"]) == 1


# decisions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_undo_restores_every_earlier_state(seed):
    rng, review, states = np.random.default_rng(seed), Review(8, "ada"), []
    state = lambda: (review.marks.tolist(), dict(review.notes), dict(review.facts))
    for step in range(30):
        if states and rng.random() < 0.3:
            review.undo()
            assert state() == states.pop()
            continue
        states.append(state())
        review.decide(
            rng.choice(8, rng.integers(1, 5), replace=False),
            rng.choice([None, *MARKS]),
            rng.choice([None, "", f"note {step}"]),
        )
    while states:
        review.undo()
        assert state() == states.pop()
    assert review.undoable() == "" and len(review.history) >= 30
    with pytest.raises(WidgetError, match="nothing to undo"):
        review.undo()


@pytest.mark.parametrize(
    "places, mark, words",
    [
        ([99], "drop", "no example at position 99"),
        ([-1], "drop", "no example"),
        ([1], "remove", "'remove'"),
        ([], "drop", "no example to decide"),
    ],
)
def test_decisions_that_cannot_be_taken_change_nothing(browser, places, mark, words):
    with pytest.raises(WidgetError, match=words):
        browser.review.decide(places, mark)
    assert browser.decisions.empty and browser.history.empty


def test_decisions_say_who_what_when_and_why(browser):
    browser.decide([4, 2], "drop", why="both praise")
    browser.decide([4], note="praises\na plan")
    table = browser.decisions
    assert (
        table.index.tolist() == [2, 4]
        and table.decision.tolist() == ["drop", "drop"]
        and table.note.tolist() == ["", "praises\na plan"]
    )
    assert (
        table.why.tolist() == ["both praise", "in Python"]
        and set(table.by) == {"ada"}
        and table.id.tolist() == [browser.result.ids[2], browser.result.ids[4]]
    )
    assert (table.score == browser.result.scores[[2, 4]]).all() and (
        table["rank"] == browser.result.ranks[[2, 4]]
    ).all()
    with pytest.raises(WidgetError, match="row 77"):
        browser.decide([77], "drop")


def test_the_export_holds_the_kept_lines_byte_for_byte_and_the_record_beside_it(tmp_path):
    source = tmp_path / "train.jsonl"
    lines = [
        json.dumps(
            {
                "z": i,
                "messages": [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": text}],
            },
            ensure_ascii=False,
            separators=(", ", " : "),
        ).encode("utf-8")
        for i, text in enumerate(HOSTILE)
    ]
    source.write_bytes(b"\r\n".join(lines) + b"\r\n")
    result = Attribution(load_conversations(source), np.arange(len(lines)) - 3.0, CARD)
    browser = result.inspect(by="ada")
    browser.decide([1, 5], "drop", note="<script>")
    browser.decide([2], "keep")
    data, record = browser.export(tmp_path / "clean.jsonl")
    assert data.read_bytes() == b"".join(line + b"\r\n" for i, line in enumerate(lines) if i not in (1, 5))
    written = json.loads(record.read_text())
    assert [(one["row"], one["decision"], one["by"], one["note"]) for one in written["decisions"]] == [
        (1, "drop", "ada", "<script>"),
        (2, "keep", "ada", ""),
        (5, "drop", "ada", "<script>"),
    ]
    assert (
        written["n_exported"] == len(lines) - 2
        and written["data_fingerprint"] == result.conversations.fingerprint
        and written["card"]["method"] == CARD.method
    )
    with pytest.raises(WidgetError, match="exists already"):
        browser.export(data)
    browser.undo()
    browser.export(data, overwrite=True)


@pytest.mark.parametrize("path", ["", "x.json", "."])
def test_names_that_cannot_be_exported_to(browser, path):
    with pytest.raises(WidgetError, match="not the name of a file"):
        browser.export(path)


def test_dropping_everything_and_exporting_a_part_are_refused(browser, tmp_path):
    browser.decide(range(12), "drop")
    with pytest.raises(WidgetError, match="nothing would be left"):
        browser.export(tmp_path / "a.jsonl")
    with pytest.raises(Exception, match="part"):
        make(12).top(3).inspect().export(tmp_path / "a.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_a_record_survives_the_kernel_and_is_refused_for_other_data(tmp_path):
    path, result = tmp_path / "review.json", make(12)
    first = result.inspect(record=path, by="ada")
    first.decide([3, 4], "drop")
    first.decide([4], note="why")
    first.undo()
    second = result.inspect(record=path, by="grace")  # nothing was saved by hand
    assert second.decisions.drop(columns="at").equals(
        first.decisions.drop(columns="at")
    ) and second.history.action.tolist() == ["dropped", "noted", "undo"]
    second.decide([4], "keep")
    assert result.inspect(record=path).decisions.by.tolist() == ["ada", "grace"]
    with pytest.raises(WidgetError, match="decisions about 'train'"):
        make(11).inspect(record=path)
    for text in ("{", "[]", "{}"):
        path.write_text(text)
        with pytest.raises(WidgetError, match="review"):
            result.inspect(record=path)


# the page's questions -----------------------------------------------------------------------------


def answers(browser, **message):
    sent = []
    browser.send = lambda content, buffers=None: sent.append((content, buffers))
    browser._handle_custom_msg({"number": "a-1", **message}, [])
    assert len(sent) == 1 and sent[0][0]["reply"] == "a-1"
    return sent[0]


def test_answers_to_the_page(browser):
    examples = answers(browser, kind="examples", places=[3, 0])[0]["examples"]
    assert [one["place"] for one in examples] == [3, 0] and [
        "".join(turn["tokens"]) for turn in examples[0]["turns"]
    ] == ["<|user|> question 3", " answer 3"]
    assert np.allclose(
        [score for turn in examples[0]["turns"] for score in turn["scores"]],
        browser.result.token_scores[3],
        rtol=1e-5,
    )
    assert answers(browser, kind="snippets", places=[2])[0]["examples"] == [
        dict(place=2, prompt="question 2", response="answer 2")
    ]
    assert np.frombuffer(answers(browser, kind="search", words="answer 1")[1][0], np.int32).tolist() == [
        1,
        10,
        11,
    ]
    assert answers(browser, kind="decide", places=[1], mark=2, why="one by one")[0] == {
        "reply": "a-1"
    } and browser.decisions.decision.tolist() == ["drop"]
    assert np.frombuffer(browser.marks, np.uint8)[1] == 2 and browser.undoable == "dropped 1 example"


@pytest.mark.parametrize(
    "message",
    [
        dict(kind="examples", places=[99]),
        dict(kind="decide", places=[99], mark=2),
        dict(kind="decide", places=[1], mark=7),
        dict(kind="nonsense"),
        dict(),
        dict(kind="undo"),
        dict(kind="search"),
        dict(kind="export", path="/proc/no/a.jsonl"),
    ],
)
def test_a_question_that_makes_no_sense_gets_an_answer_and_changes_nothing(browser, message):
    assert answers(browser, **message)[0]["error"] and browser.decisions.empty


def test_every_trait_can_be_sent(browser):
    hostile = Attribution(
        Conversations(
            [
                Conversation(
                    ({"role": "user", "content": text}, {"role": "assistant", "content": text + "\ud800"}),
                    metadata={"\ud800": text, "half": "\udc00"},
                )
                for text in HOSTILE
            ]
        ),
        np.arange(len(HOSTILE)) - 2.5,
        QueryCard("\ud800", "\x00"),
    )
    for one in (browser, hostile.inspect(by="\ud800")):
        one.decide([0], "drop", note="\ud800")
        state = {
            name: value
            for name, value in one.get_state().items()
            if not isinstance(value, (bytes, memoryview)) and name not in ("columns", "layout")
        }
        json.dumps(state, ensure_ascii=False, allow_nan=False).encode("utf-8")
        json.dumps(
            answers(one, kind="examples", places=range(len(one.result)))[0],
            ensure_ascii=False,
            allow_nan=False,
        ).encode("utf-8")


# a page without a kernel --------------------------------------------------------------------------


def test_the_embedded_data_is_safe_and_keeps_to_its_size():
    texts = [f"{'word ' * 300}{i}</script><!--" for i in range(200)]
    data = Conversations(
        [
            Conversation(({"role": "user", "content": "q"}, {"role": "assistant", "content": text}))
            for text in texts
        ]
    )
    tokens = [[text[i : i + 5] for i in range(0, len(text), 5)] for text in texts]
    rng = np.random.default_rng(0)
    result = Attribution(
        data,
        rng.normal(size=200),
        CARD,
        tokens=tokens,
        token_scores=[rng.normal(size=len(one)) for one in tokens],
    )
    page = embedded_browser(result, most=700_000)
    content = json.loads(page)
    assert "<" not in page and len(page) < 800_000 and len(content["examples"]) == 200
    with_tokens = [
        place for place, example in enumerate(content["examples"]) if "tokens" in example["turns"][-1]
    ]
    order = np.argsort(-result.scores)
    assert (
        f"Token scores are in this page for {len(with_tokens)} examples" in content["table"]["note"]
        and 10 < len(with_tokens) < 200
    )
    assert {order[0], order[-1]} <= set(with_tokens)


# the explorer -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def explored(tiny_lm):
    import torch

    from concept_tda.concepts.concept import tensor_concept
    from concept_tda.model.loading import load_model

    lm = load_model(tiny_lm)
    torch.manual_seed(0)
    concept = tensor_concept(torch.randn(16), 1, name="made up", lm=lm)
    data = Conversations(
        [
            Conversation(
                ({"role": "user", "content": f"the {i}"}, {"role": "assistant", "content": "yes " * (i + 1)})
            )
            for i in range(9)
        ]
    )
    return lm, concept, data


def test_a_reading_is_the_projection_of_the_hidden_states(explored):
    import torch

    lm, concept, data = explored
    hooks = lambda: sum(len(block._forward_hooks) + len(block._forward_pre_hooks) for block in lm.blocks)
    before = hooks()
    read, tokenized = concept_reading(lm, concept, data[3]), lm.tokenize(data.select([3]))
    assert hooks() == before and not any(parameter.grad is not None for parameter in lm.model.parameters())
    with torch.no_grad():
        hidden = lm.model(input_ids=tokenized[0].input_ids[None], output_hidden_states=True).hidden_states
    for layer in (0, 1):
        assert np.allclose(
            read["values"][layer], (hidden[layer][0] @ concept.direction).numpy(), atol=1e-5
        )  # the last one of hidden_states is after the final norm
    mask = tokenized[0].response_mask.numpy()
    assert (
        np.allclose(read["pooled"], read["values"][:, mask].mean(1), atol=1e-5)
        and (read["response_mask"] == mask).all()
    )


def test_the_explorer_shows_what_it_reads(explored):
    from concept_tda.model.tracing import pooled_activations

    lm, concept, data = explored
    explorer = ConceptExplorer(
        lm, concept, train=data, strengths=(-1, 0, 1), max_new_tokens=4, progress=False
    )
    explorer.update("the 3", data[3].response)
    reading = explorer.view.reading
    projections = (pooled_activations(lm, data, 1, progress=False)[1] @ concept.direction).numpy()
    assert [one["row"] for one in reading["nearest"]] == np.argsort(-projections)[:4].tolist() and [
        one["row"] for one in reading["farthest"]
    ] == np.argsort(projections)[:4].tolist()
    assert np.isclose(
        reading["sweep"][1], (projections[3] - projections.mean()) / projections.std(), atol=1e-4
    ) and np.isclose(reading["centre"], projections.mean(), atol=1e-5)
    explorer.view._handle_custom_msg({"kind": "layer", "layer": 2}, [])
    assert explorer.layer_pick.value == 2 and explorer.view.reading["layer"] == 2
    explorer.view._handle_custom_msg({"kind": "layer", "layer": 99}, [])
    assert explorer.layer_pick.value == 2
    explorer.steer()
    assert [one["strength"] for one in explorer.view.steering] == [-1, 0, 1]
    from concept_tda.model.tracing import generate

    try:
        plain = generate(lm, ["the 3"], max_new_tokens=4, progress=False)[0].response
    except Exception:
        plain = ""
    assert explorer.view.steering[1]["text"] == plain


def test_the_explorer_shows_errors_where_one_looks(explored):
    lm, concept, _ = explored
    explorer = ConceptExplorer(lm, [concept, concept], progress=False)
    assert list(explorer.concepts) == ["made up (1)", "made up (2)"]
    explorer.question.value = " "
    explorer.read_button.click()
    assert explorer.view.status.startswith("!write a question first")
    with pytest.raises(WidgetError, match="not a concept"):
        ConceptExplorer(lm, ["evil"])
    with pytest.raises(WidgetError, match="no concept"):
        ConceptExplorer(lm, [])


def test_the_scripts_parse_no_markup_and_ask_for_nothing():
    script = front_end(*BROWSER_SCRIPTS, "browser_widget.js", "explorer.js")
    # the one address there is: decisions to save, as a file that the page has made itself
    for own in ("link.href = URL.createObjectURL(new Blob(", "URL.revokeObjectURL(link.href)"):
        assert script.count(own) == 1
        script = script.replace(own, "")
    for sink in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "createContextualFragment",
        "DOMParser",
        "eval(",
        "new Function",
        'setAttribute("on',
        "fetch(",
        "XMLHttpRequest",
        "WebSocket",
        "import(",
        "importScripts",
        ".src ",
        ".href",
    ):
        assert sink not in script, sink
    assert script.replace("http://www.w3.org/2000/svg", "").count("http") == 0
    style = front_end("views.css")
    assert "url(" not in style and "@import" not in style
