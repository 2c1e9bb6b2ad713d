"""Plain texts: windows that cover every token once, the way back to the file, and every method on them."""

import json
import random

import numpy as np
import pandas as pd
import pytest
import torch

from concept_tda.concepts.concept import tensor_concept
from concept_tda.concepts.judges import LossJudge
from concept_tda.data.batches import batches
from concept_tda.data.conversations import load_conversations
from concept_tda.data.documents import (
    DocumentError,
    Windows,
    load_documents,
    load_windows,
    number_tokenizer,
    token_windows,
)
from concept_tda.data.messages import ConversationError
from concept_tda.evidence.datamodels import LinearDatamodelingScore
from concept_tda.evidence.filter_and_retrain import FilterAndRetrain
from concept_tda.evidence.method_comparison import MethodComparison
from concept_tda.evidence.tail_patch import TailPatch
from concept_tda.influence.atlas import build_atlas, build_index
from concept_tda.influence.baselines import (
    BM25,
    MeanLoss,
    RandomDirection,
    RandomScore,
    RepSim,
    ResponseLength,
)
from concept_tda.influence.curvature import EKFAC
from concept_tda.influence.doctor import doctor
from concept_tda.influence.neighbours import LESS, AdamMoments, Cascade, GradCos, ResidualChange, TracIn
from concept_tda.influence.planning import plan
from concept_tda.influence.preconditioners import DataInf, LoGra
from concept_tda.influence.queries import ConceptQuery
from concept_tda.influence.scorers import (
    ActivationGradient,
    ConceptInfluence,
    GradDot,
    InfluenceFunction,
    ProjectionDifference,
    ScorerError,
    VectorFilter,
    score_together,
)
from concept_tda.mechanisms.circuits import CopyProbe, UnitInfluence, head, repeated_sequences
from concept_tda.mechanisms.motifs import find_motifs
from concept_tda.model.finetuning import finetune, finetune_many, training_record
from concept_tda.model.loading import load_model
from concept_tda.model.sites import resolve_sites
from concept_tda.model.tracing import pooled_activations
from concept_tda.model.training import replay, train
from concept_tda.results.attribution import load_attribution
from concept_tda.views.contents import example_to_read

from tiny import double_norms, tiny_model, tiny_pair, tiny_tokenizer

WORDS = "the sky is blue and you are right about it yes no maybe — süß 🌱\n".split(" ")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCEPT_TDA_CACHE", str(tmp_path / "cache"))


def texts(n=8, seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 20))) for _ in range(n)]


def stream(documents, tokenizer, separator):
    """The corpus as one list of ids, by the tokenizer alone."""
    after = [] if separator is None else [separator]
    return [i for one in documents for i in tokenizer(one.text, add_special_tokens=False).input_ids + after]


@pytest.mark.parametrize("window", [3, 4, 7, 16, 33])
@pytest.mark.parametrize("separator", [None, "", "<|im_start|>", 5])
def test_windows_cover_every_token_and_every_character_once(window, separator):
    tokenizer = tiny_tokenizer(bos=True)
    for seed in range(4):
        documents = load_documents(texts(6, seed), window=window, separator=separator)
        windows = documents.windows(tokenizer)
        id = {None: tokenizer.eos_token_id, "": None, "<|im_start|>": 1, 5: 5}[separator]
        whole = stream(documents, tokenizer, id)
        assert torch.cat([one.tokens for one in windows]).tolist() == whole
        lengths = [len(one.tokens) for one in windows]
        assert max(lengths) <= window and min(lengths) >= 2
        assert all(length == window for length in lengths[:-2])
        held = ["".join(d.text[p.start : p.end] for w in windows for p in w.pieces if p.row == row)
                for row, d in enumerate(documents)]  # fmt: skip
        assert held == [one.text for one in documents]
        for batch in batches(documents.tokenized(tokenizer), token_budget=64):
            expected = batch.attention_mask.bool()
            expected[:, 0] = False
            assert torch.equal(batch.response_mask, expected)


def test_one_token_that_is_left_over_gets_company():
    tokenizer, documents = tiny_tokenizer(), load_documents(["x" * 8], window=4)  # 8 bytes and a separator
    assert [len(one.tokens) for one in documents.windows(tokenizer)] == [4, 3, 2]


def test_the_same_tokens_are_the_same_example_and_provenance_names_file_line_and_character(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(["abc", "abc"]))
    )
    windows = load_documents(path, window=4).windows(tiny_tokenizer())
    assert windows[0].id == windows[1].id
    assert windows.metadata.source.tolist() == [f"{path}, line 1", f"{path}, line 2"]
    assert load_documents(path).metadata.n.tolist() == [0, 1]
    half = load_documents(path, window=3).windows(tiny_tokenizer())
    assert [(p.source, p.start, p.end) for p in half[1].pieces] == [
        (f"{path}, line 1", 3, 3),
        (f"{path}, line 2", 0, 2),
    ]


def test_every_kind_of_source(tmp_path):
    rows = [{"text": text, "kind": "a"} for text in texts(4)]
    frame, want = pd.DataFrame(rows), [row["text"] for row in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    frame.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("<|e|>".join(want))
    (tmp_path / "lines.txt").write_text("one\n\n\n\ntwo\nthree\n\nfour")
    split = load_documents(tmp_path / "lines.txt", split_at="\n\n")
    assert [one.source.rpartition(", ")[2] for one in split] == ["line 1", "line 5", "line 8"]
    (tmp_path / "many").mkdir()
    for i, text in enumerate(want):
        (tmp_path / "many" / f"{i}.md").write_bytes(text.encode())
    import datasets

    sources = [
        tmp_path / "a.jsonl",
        str(tmp_path / "a.parquet"),
        frame,
        want,
        rows,
        datasets.Dataset.from_list(rows),
    ]
    loaded = [load_documents(source) for source in sources]
    loaded += [load_documents(tmp_path / "a.txt", split_at="<|e|>"), load_documents(tmp_path / "many")]
    loaded += [load_documents([tmp_path / "many" / f"{i}.md" for i in range(4)])]
    assert all([one.text for one in documents] == want for documents in loaded)
    assert len({documents.fingerprint for documents in loaded}) == 1
    renamed = load_documents(frame.rename(columns={"text": "body"}), field="body")
    assert renamed.ids == loaded[0].ids


def test_documents_are_written_back_in_the_layout_they_came_in(tmp_path):
    lines = b'{"n": 1,  "text": "Caf\\u00e9"}\r\n\r\n{"text":"two"}\r\n{"text": "three", "n": null}'
    (tmp_path / "a.jsonl").write_bytes(lines)
    documents = load_documents(tmp_path / "a.jsonl")
    assert documents.write(tmp_path / "b.jsonl").read_bytes() == lines
    left = documents.filter(lambda one: one.text != "two").write(tmp_path / "c.jsonl").read_bytes()
    assert left == lines.replace(b'{"text":"two"}\r\n', b"")
    frame = pd.DataFrame({"text": ["one", "two"], "n": [1, 2]})
    frame.to_parquet(tmp_path / "a.parquet")
    kept = load_documents(tmp_path / "a.parquet").select([1]).write(tmp_path / "b.parquet")
    assert pd.read_parquet(kept).to_dict("records") == [{"text": "two", "n": 2}]
    for name, text in (("x/one.txt", "\n one\r\n"), ("y/two.txt", "two")):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(text.encode())
    load_documents(tmp_path / "in").write(tmp_path / "out")
    assert (tmp_path / "out/x/one.txt").read_bytes() == b"\n one\r\n"
    assert (tmp_path / "out/y/two.txt").read_bytes() == b"two"
    with pytest.raises(DocumentError, match="never overwritten"):
        load_documents(tmp_path / "a.parquet").write(tmp_path / "a.parquet")


def test_dropping_windows_takes_their_characters_out_of_the_corpus(tmp_path):
    tokenizer, path = tiny_tokenizer(), tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"n": i, "text": text}) + "\n" for i, text in enumerate(texts(5))))
    documents = load_documents(path, window=9)
    windows = documents.windows(tokenizer)
    for seed in range(5):
        keep = sorted(random.Random(seed).sample(range(len(windows)), len(windows) // 2))
        left = windows.select(keep).as_documents()
        spans = {(p.row, p.start, p.end) for row in keep for p in windows[row].pieces}
        expected = [
            "".join(documents[row].text[a:b] for r, a, b in sorted(spans) if r == row) for row in range(5)
        ]
        assert [one.text for one in left] == [text for text in expected if text]
        for line in left.write(tmp_path / "b.jsonl", overwrite=True).read_bytes().splitlines():
            record = json.loads(line)
            assert record["text"] == expected[record["n"]]
            if record["text"] == documents[record["n"]].text:
                assert line == documents[record["n"]].raw
    assert windows.as_documents().ids == documents.ids


def test_windows_survive_files_and_results(tmp_path):
    lm = load_model(tiny_pair("llama"))
    windows = load_documents(texts(), window=12).windows(lm.tokenizer)
    result = MeanLoss(lm).score(windows)
    again = load_attribution(result.save(tmp_path / "r.parquet"))
    assert again == result and isinstance(again.conversations, Windows)
    left = again.drop(count=3)
    assert isinstance(left, Windows) and len(left) == len(windows) - 3
    assert all(torch.equal(one.tokens, windows[one.id].tokens) for one in left)
    assert isinstance(load_conversations(list(left)), Windows)
    assert np.array_equal(MeanLoss(lm).score(again.conversations).scores, result.scores)
    written = load_windows(windows.to_json(tmp_path / "w.jsonl"))
    assert written.ids == windows.ids and written.fingerprint == windows.fingerprint
    assert written.tokenized(lm.tokenizer).fingerprint == windows.tokenized(lm.tokenizer).fingerprint


def test_bad_documents_are_refused_with_file_and_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n{"text": " \\n"}\n{"text": 3}\n[1]\n')
    with pytest.raises(
        DocumentError, match=r"a\.jsonl, line 2: has no field 'text'.*\n3 more broken: line 3, line 4, line 5"
    ):
        load_documents(tmp_path / "a.jsonl")
    for value, said in ((" \n", "is empty"), (3, "expected text"), (None, "expected text")):
        (tmp_path / "b.jsonl").write_text(json.dumps({"text": value}))
        with pytest.raises(DocumentError, match=rf"b\.jsonl, line 1: the field 'text' .*{said}"):
            load_documents(tmp_path / "b.jsonl")
    (tmp_path / "c.txt").write_text(" \n")
    (tmp_path / "d.txt").write_bytes("eins\nzwei süß".encode("latin-1"))
    for path, said in (("c.txt", "c.txt: the file is empty"), ("d.txt", "d.txt, line 2: .* not UTF-8"),
                       ("e.txt", "e.txt")):  # fmt: skip
        with pytest.raises(ConversationError, match=said):
            load_documents(tmp_path / path)
    (tmp_path / "short.jsonl").write_text('{"text": "abc"}\n')
    with pytest.raises(DocumentError, match=r"short\.jsonl, line 1: 4 tokens in all, and a window has 512"):
        load_documents(tmp_path / "short.jsonl").windows(tiny_tokenizer())
    for window in (2, 0, -1, 2.5, True, "4"):
        with pytest.raises(DocumentError, match="window is the number of tokens"):
            load_documents(["abc"], window=window)
    for source in (3, None, {"a": 1}):
        with pytest.raises(DocumentError, match="cannot read documents"):
            load_documents(source)


def test_windows_of_another_tokenizer_or_too_long_ones_are_refused():
    lm, documents = load_model(tiny_pair("llama")), load_documents(texts(), window=40)
    with pytest.raises(DocumentError, match="40 tokens and max_tokens is 20"):
        lm.tokenize(documents, max_tokens=20)
    other = documents.windows(lm.tokenizer)
    with pytest.raises(DocumentError, match="another tokenizer"):
        other.tokenized(number_tokenizer(400))
    with pytest.raises(DocumentError, match="not one token"):
        load_documents(texts(), window=9, separator="<sep>").windows(lm.tokenizer)
    with pytest.raises(DocumentError, match="no end-of-sequence token"):
        load_documents(texts(), window=9).windows(number_tokenizer(9))
    added = tiny_tokenizer()
    added.add_tokens(["<new>"])
    assert other.tokenized(added).n_tokens == other.tokenized(lm.tokenizer).n_tokens


@pytest.fixture(scope="module")
def world():
    lm = load_model((double_norms(tiny_model("llama", n_layers=3, dtype=torch.float64)), tiny_tokenizer()))
    documents = load_documents(texts(12), window=16)
    direction = torch.randn(lm.width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return lm, documents, tensor_concept(direction, layer=2, lm=lm, name="any")


def gradient(lm, tokens, sites):
    """∇ of the mean loss of every token but the first, by autograd alone."""
    weights = [site.module.weight for site in sites]
    for weight in lm.model.parameters():
        weight.requires_grad_(True)
    loss = torch.nn.functional.cross_entropy(lm.model(tokens[None]).logits[0, :-1], tokens[1:])
    return torch.autograd.grad(loss, weights)


def dot(first, second):
    return sum((a * b).sum() for a, b in zip(first, second)).item()


def test_scores_of_windows_are_those_of_autograd(world):
    lm, documents, concept = world
    windows, queries = documents.windows(lm.tokenizer), load_documents(texts(2, 7), window=10)
    sites = resolve_sites(lm, "attention")
    asked = [gradient(lm, one.tokens, sites) for one in queries.windows(lm.tokenizer)]
    mean = [sum(parts) / len(asked) for parts in zip(*asked)]
    rows = [gradient(lm, one.tokens, sites) for one in windows]
    expected = np.array([dot(mean, row) for row in rows])
    result = GradDot(lm, queries).score(documents, tokens=True)
    np.testing.assert_allclose(result.scores, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose([one.sum() for one in result.token_scores], expected, rtol=1e-4, atol=1e-6)
    cosines = expected / [np.sqrt(dot(row, row) * dot(mean, mean)) for row in rows]
    np.testing.assert_allclose(GradCos(lm, queries).score(documents).scores, cosines, rtol=1e-8)
    projected = []
    for one in windows:
        found = {}
        hook = lm.blocks[1].register_forward_hook(
            lambda block, args, out: found.update(h=out[0] if isinstance(out, tuple) else out)
        )
        lm.model(one.tokens[None])
        hook.remove()
        projected.append((found["h"].reshape(-1, lm.width)[1:].mean(0) @ concept.direction).item())
    np.testing.assert_allclose(VectorFilter(lm, concept).score(documents).scores, projected, rtol=1e-9)


def test_every_method_takes_documents(world, tmp_path):
    lm, documents, concept = world
    windows, queries = documents.windows(lm.tokenizer), load_documents(texts(3, 7), window=10)
    sites = resolve_sites(lm, "attention", layer=2)
    one_step = AdamMoments.estimate(lm, documents, "attention")
    datainf, logra = DataInf.fit(lm, documents, sites), LoGra.fit(lm, documents, sites, rank=4)
    scorers = [
        VectorFilter(lm, concept), ActivationGradient(lm, concept), ResidualChange(lm, concept),
        ConceptInfluence(lm, concept, queries), InfluenceFunction(lm, queries), GradDot(lm, queries),
        GradCos(lm, queries), RandomScore(), ResponseLength(), BM25(queries), MeanLoss(lm),
        RepSim(lm, queries, layer=2), RandomDirection(lm, concept, documents, progress=False),
        ConceptInfluence(lm, concept, queries, curvature=datainf, method="DataInf"),
        ConceptInfluence(lm, concept, queries, curvature=logra, method="LoGra"),
        TracIn([lm], queries, learning_rates=[1e-3]),
        LESS([lm], queries, learning_rates=[1e-3], sites="attention", moments=[one_step]),
        Cascade(VectorFilter(lm, concept), GradDot(lm, queries, method="exact"), keep=0.3, sample=4),
    ]  # fmt: skip
    documentwise = score_together(scorers, documents, progress=False)
    tokenized = score_together(scorers, windows.tokenized(lm.tokenizer), progress=False)
    assert len(documentwise) == len(scorers)
    for name, result in documentwise.items():
        assert isinstance(result.conversations, Windows) and result.ids == windows.ids, name
        assert np.isfinite(result.scores).all(), name
        np.testing.assert_array_equal(result.scores, tokenized[name].scores, name)
    with pytest.raises(ScorerError, match="no question"):
        ProjectionDifference(lm, concept).score(documents)


def test_curvature_atlas_and_index_take_documents(world, tmp_path):
    lm, documents, concept = world
    windows, queries = documents.windows(lm.tokenizer), load_documents(texts(3, 7), window=10)
    sites = resolve_sites(lm, "attention", layer=2)
    curvature = EKFAC.fit(lm, documents, sites)
    assert curvature.record["n_examples"] == len(windows)
    atlas = build_atlas(
        lm, queries, documents, 2, folder=tmp_path / "atlas", curvature=curvature, progress=False
    )
    row = atlas.score(concept)
    exact = ConceptInfluence(lm, concept, queries, curvature=curvature).score(documents, progress=False)
    np.testing.assert_allclose(row.scores, exact.scores, rtol=1e-8, atol=1e-12)
    again = build_atlas(
        lm, queries, documents, 2, folder=tmp_path / "atlas", curvature=curvature, progress=False
    )
    assert again.conversations.ids == windows.ids
    index = build_index(lm, documents, folder=tmp_path / "index", rank=4, progress=False)
    assert index.conversations.ids == windows.ids
    assert ConceptQuery(concept, queries).value(lm) == pytest.approx(
        ConceptQuery(concept, queries.windows(lm.tokenizer)).value(lm)
    )


def test_the_doctor_and_the_plan_read_documents(world):
    lm, documents, concept = world
    seen = doctor(lm, documents, layer=2)
    assert "error" not in {check.severity for check in seen.checks}, seen
    windows = documents.windows(lm.tokenizer)
    assert seen.example.id == windows[0].id
    assert "".join(seen.example.tokens) == windows[0].text
    assert doctor(lm, documents, example=windows[3].id).example.id == windows[3].id
    priced = plan([GradDot(lm, documents), VectorFilter(lm, concept)], documents)
    assert priced.examples == len(windows) and priced.tokens == sum(len(one.tokens) for one in windows)


def test_sequences_of_numbers_need_no_text():
    tokenizer = number_tokenizer(30)
    ids = torch.randint(0, 30, (6, 9), generator=torch.Generator().manual_seed(0))
    windows = token_windows(ids, metadata=[{"repeats": i % 2 == 0} for i in range(6)])
    assert torch.equal(torch.stack([item.input_ids for item in windows.tokenized(tokenizer)]), ids)
    assert [tokenizer(one.text).input_ids for one in windows] == ids.tolist()
    assert windows.labels("repeats").tolist() == [True, False] * 3
    lm = load_model((tiny_model("gpt_neox", vocab_size=30), tokenizer))
    assert pooled_activations(lm, windows, 1)[1].shape == (6, lm.width)
    result = GradDot(lm, windows[:2]).score(windows, tokens=True)
    assert result.tokens[0] == [str(i) for i in ids[0].tolist()]
    for wrong, said in (
        ([[1]], "2 or more"),
        ([[1, -1]], "≥ 0"),
        ([[1.0, 2.0]], "whole"),
        ([["a", "b"]], "whole"),
        ([], "empty"),
    ):
        with pytest.raises(DocumentError, match=said):
            token_windows(wrong)
    with pytest.raises(DocumentError, match="one dict for each"):
        token_windows(ids, metadata=[{}])


def test_fine_tuning_and_the_experiments_take_documents(tmp_path):
    lm, documents = load_model(tiny_pair("llama")), load_documents(texts(12), window=16)
    windows = documents.windows(lm.tokenizer)
    result = GradDot(lm, load_documents(texts(2, 7), window=10)).score(documents, progress=False)
    finetune(lm, documents, tmp_path / "a", progress=False)
    assert training_record(tmp_path / "a")["examples"] == len(windows)
    finetune(lm, windows, tmp_path / "b", progress=False)
    assert training_record(tmp_path / "a")["key"] == training_record(tmp_path / "b")["key"]
    runs = finetune_many(
        lm, {"whole": documents, "part": result.drop(count=7)}, tmp_path / "c", progress=False
    )
    assert [one.n_examples for one in runs] == [len(windows), len(windows) - 7]
    judge, recipe = LossJudge(windows[:3]), {"epochs": 1}
    filtered = FilterAndRetrain(
        lm, documents, result, [judge], tmp_path / "d", fractions=(0.25,), seeds=(0,), recipe=recipe
    )
    filtered.run()
    assert np.isfinite(filtered.table.query("arm != 'base'").value).all()
    assert set(filtered.table.arm) >= {"full", "random", "drop-most", "drop-least"}
    compared = MethodComparison(lm, documents, [MeanLoss(lm)], folder=tmp_path / "e")
    compared.run()
    assert compared.train.ids == windows.ids
    stepped = TailPatch(lm, documents, result, judge, tmp_path / "f", top=2, n_random=2)
    stepped.run()
    models = LinearDatamodelingScore(lm, documents, result, judge, tmp_path / "g", n_subsets=4, recipe=recipe)
    models.run()
    assert "all" in repr(stepped) and "LDS" in repr(models)


def test_views_show_text_and_no_question(tmp_path):
    lm, documents = load_model(tiny_pair("llama")), load_documents(texts(12), window=16)
    windows = documents.windows(lm.tokenizer)
    result = MeanLoss(lm).score(documents, tokens=True, progress=False)
    assert "question" not in repr(result) and "→" not in repr(result)
    first = example_to_read(result, 3)["turns"]
    assert [turn["role"] for turn in first] == ["text"] and "".join(first[0]["tokens"]) == windows[3].text
    plain = example_to_read(result.without_token_scores(), 3)["turns"]
    assert [(turn["role"], turn["text"]) for turn in plain] == [("text", windows[3].text)]
    page = result.report(tmp_path / "r.html").read_text()
    assert "assistant" not in page.split("<script")[0]
    for shown in (documents, windows, documents[0], windows[0], windows.tokenized(lm.tokenizer), result):
        assert "text" in shown._repr_html_()


def test_training_whole_models_circuits_and_motifs_take_documents(tmp_path):
    model, tokenizer = tiny_pair("gpt_neox", attention="eager")
    documents = load_documents(texts(40), window=16)
    windows = documents.windows(tokenizer)
    run = train(
        model.config, documents, tmp_path / "run", {"steps": 4, "batch_size": 8}, tokenizer=tokenizer,
        every=2, progress=False,
    )  # fmt: skip
    assert isinstance(run.data.conversations, Windows) and run.data.ids == windows.ids
    queries = load_documents(texts(3, 7), window=10)
    traced = TracIn(queries=queries, **run.history()).score(documents, progress=False)
    assert traced.ids == windows.ids
    lm = run.open(2, attention="eager")
    scorer = UnitInfluence(lm, CopyProbe(repeated_sequences(lm, 4, 6)), head(lm, 1, 2).units)
    scores = scorer.score(documents, progress=False)
    assert scores.ids == windows.ids and np.isfinite(scores.scores).all()
    motifs = find_motifs(scores, count=10, draws=20, fits=2)
    assert {"repeated runs", "compressible"} <= {*motifs.table.statistic, *motifs.left_out}
    without = replay(
        run, tmp_path / "without", from_step=2, to_step=4, weights={run.data.ids[run.plan.rows[2][0]]: 0},
        insert=load_documents(texts(4, 9), window=16).windows(tokenizer), progress=False,
    )  # fmt: skip
    assert without.open().fingerprint != run.open().fingerprint
    left = scores.drop(count=5).as_documents()
    assert sum(len(one.text) for one in left) < sum(len(one.text) for one in documents)
