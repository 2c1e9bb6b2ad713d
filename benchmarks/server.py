"""How well a completions server reproduces exact influence, in float32 and in bfloat16.

    python benchmarks/server.py --work build/server --out benchmarks/results/scale.json
    python benchmarks/server.py … --queries concept --servers url --url http://localhost:8000/v1 --called vllm
    python benchmarks/server.py … --queries graddot --servers bfloat16 --coarse 3e-4 3e-3

A query (GradDot; the influence function with EK-FAC on attention; Concept Influence on the direction of
sycophancy at layer 15, with the identity and with EK-FAC) is written as two adapters. Local servers over
transformers, or the server at --url, score the examples with it, and the scores are held against the reverse
engine, which has the weights. Writes the key `server_spearman` and leaves the other keys of the file alone:
for each query and server the rank correlation on all examples, what the gate measured on the probes, and what
rank and step the adapters have. --coarse writes the query anew with larger steps than it is exact with, for a
server that rounds; under `coarse` stands what was known of the step when it was written, and what came out.
What is finished lies in --work and is not computed again.

What would make a number wrong: fewer examples than make a rank correlation stable (the interval stands beside
it); examples that are no sample of the file (the shortest are taken, so that the run ends on two cores; the
file says how short).
"""

import argparse
import json
from pathlib import Path

import numpy as np

import concept_tda as ct
from concept_tda.concepts.concept import contrastive_concept
from concept_tda.data.conversations import bundled
from concept_tda.foundation.storage import atomic_file
from concept_tda.influence.curvature import EKFAC
from concept_tda.influence.scorers import ConceptInfluence, GradDot, InfluenceFunction
from concept_tda.influence.served import ServedInfluence, load_query, write_query
from concept_tda.model.local_server import LocalServer
from concept_tda.model.servers import ServedModel
from concept_tda.results.attribution import load_attribution
from concept_tda.results.metrics import spearman

QUERIES = "graddot", "ekfac", "concept", "concept_ekfac"
KEPT = dict(rank=64, least_kept=0.8)
LAYER, PAIRS = 15, 6  # of the concept, and how many held-out pairs of answers it is made from
PROBES, SEED = 10, 0


def interval(first, second, draws=2000):
    """95 % bootstrap interval over examples of a rank correlation."""
    rng = np.random.default_rng(SEED)
    rows = rng.integers(0, len(first), (draws, len(first)))
    found = [spearman(first[one], second[one]) for one in rows]
    return [round(float(q), 5) for q in np.quantile(found, [0.025, 0.975])]


def examples_of(lm, n):
    """The shortest examples, three of them as queries, and the length of the longest."""
    lengths = lm.tokenize(bundled("sycophancy")).lengths
    rows = np.sort(np.argsort(lengths, kind="stable")[: n + 3])
    shown = rows[:: len(rows) // 3][:3]
    train = np.setdiff1d(rows, shown)
    return *(bundled("sycophancy").select(one.tolist()) for one in (train, shown)), int(lengths[rows].max())


def concept_of(lm):
    """Sycophantic minus honest answers to the same held-out questions, the shortest ones."""
    held_out = bundled("sycophancy", "heldout")
    length = {}
    for chat, n in zip(held_out, lm.tokenize(held_out).lengths.tolist()):
        length[chat.metadata["pair"]] = length.get(chat.metadata["pair"], 0) + n
    pairs = set(sorted(length, key=length.get)[:PAIRS])
    sides = [
        held_out.filter(lambda c, label=label: c.metadata["label"] == label and c.metadata["pair"] in pairs)
        for label in ("sycophantic", "honest")
    ]
    return contrastive_concept(lm, *sides, LAYER, name="sycophancy", held_out=0, progress=False)


def scorer_of(name, lm, train, queries):
    """The exact scorer of a query."""
    if name == "graddot":
        return GradDot(lm, queries)
    curvature = "identity"
    if name.endswith("ekfac"):
        curvature = EKFAC.fit(lm, lm.tokenize(train), "attention", progress=False)
    if name == "ekfac":
        return InfluenceFunction(lm, queries, curvature=curvature)
    return ConceptInfluence(lm, concept_of(lm), queries, curvature=curvature)


def prepared(name, lm, train, queries, folder, coarse):
    """The written query, those with other steps, and the exact scores, once."""
    exact = folder / "exact.parquet"
    steps = {None: folder / "query"} | {step: folder / f"query-{step:g}" for step in coarse}
    todo = [step for step, place in steps.items() if not (place / "query.json").exists()]
    scorer = scorer_of(name, lm, train, queries) if todo or not exact.exists() else None
    if not exact.exists():
        scorer.score(train, progress=False).save(exact)
    for step in todo:
        accepted = {} if step is None else dict(step=step, most_error=1000.0)
        write_query(scorer, train, steps[step], n_probes=PROBES, **accepted, **KEPT)
        print(load_query(steps[step]), flush=True)
    return {step: load_query(place) for step, place in steps.items()}, load_attribution(exact)


def measured(model, query, train, exact):
    """Scores of a server against the exact ones; the gate measures and refuses nothing here."""
    scorer = ServedInfluence(model, query, tolerance=10.0, budget=1000.0)
    result = scorer.score(train, progress=False)
    if result.ids != exact.ids:
        raise SystemExit("--work holds other examples' scores: give the same --examples, or another folder")
    rho = spearman(result.scores, exact.scores)
    off = np.sqrt(np.square(result.scores - exact.scores).mean()) / exact.scores.std()
    return dict(
        spearman=round(rho, 5),
        interval=interval(result.scores, exact.scores),
        error=round(float(off), 4),
        gate={name: float(f"{value:.3g}") for name, value in vars(scorer.checked).items()},
        seconds=round(result.card.cost.seconds, 1),
    )


def through(kind, lm_of, url, query, train, exact, tokenizer):
    """What one server gives."""
    if kind == "url":
        return measured(ServedModel("base", tokenizer, url, texts=5, timeout=600), query, train, exact)
    adapters = {name: query.folder / name for name in ("plus", "minus")}
    with LocalServer(lm_of(kind), "base", adapters) as server:
        return measured(ServedModel("base", tokenizer, server.url), query, train, exact)


def known_of(query):
    """What was known of a query where it was written."""
    return {key: query.about[key] for key in ("rank", "kept", "step", "error", "spearman")}


def merged(path, key, value):
    """Put one key into a JSON file."""
    there = json.loads(path.read_text()) if path.exists() else {}
    with atomic_file(path) as part:
        part.write_text(json.dumps(there | {key: value}, indent=1) + "\n")


def main():
    """Measure, one query and one server after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--examples", type=int, default=24)
    parser.add_argument("--queries", nargs="+", default=["graddot", "concept"], choices=QUERIES)
    parser.add_argument("--servers", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--coarse", nargs="*", default=[], type=float, help="larger steps, written anyway")
    parser.add_argument("--url", help="of a server with the adapters of one query")
    parser.add_argument("--called", default="url", help="what the server at --url is called in the file")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    opened = {}

    def lm_of(dtype):
        if dtype not in opened:
            opened[dtype] = ct.load_model(args.model, dtype=dtype)
        return opened[dtype]

    lm = lm_of("float32")
    train, shown, longest = examples_of(lm, args.examples)
    found = json.loads((args.work / "found.json").read_text()) if (args.work / "found.json").exists() else {}
    for name in args.queries:
        queries, exact = prepared(name, lm, train, shown, args.work / name, args.coarse)
        about = known_of(queries[None]) | dict(examples=len(train), longest_tokens=longest)
        own = found[name] = found.get(name, {}) | about
        for kind, step in [(kind, step) for kind in args.servers for step in queries]:
            if step is None:
                place, key = own, args.called if kind == "url" else kind
            else:
                place = own.setdefault("coarse", {}).setdefault(f"{step:g}", known_of(queries[step]))
                key = kind
            if key not in place:
                place[key] = through(kind, lm_of, args.url, queries[step], train, exact, lm.tokenizer)
                print(name, step or "", key, place[key], flush=True)
                with atomic_file(args.work / "found.json") as part:
                    part.write_text(json.dumps(found, indent=1))
    about = dict(model=args.model, probes=PROBES, seed=SEED)
    merged(args.out, "server_spearman", about | found)


if __name__ == "__main__":
    main()
