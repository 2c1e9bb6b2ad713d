"""Sparse autoencoders, features and discovery on SmolLM2 and the bundled data, with their price.

    python benchmarks/groups.py --work build/groups   # everything, a quarter of an hour
    python benchmarks/groups.py --work build/groups --sections sae

Prints what it finds and writes benchmarks/results/groups.json. The SAE learns from as many activations as
--tokens says, far fewer than the one to two million from which on one should believe it; beside it stands a
random one."""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import psutil
from sklearn.metrics import roc_auc_score

import concept_tda as ct
from concept_tda.groups.discovery import discover, movement_check, sparse_atoms
from concept_tda.groups.sae import random_sae, sae_quality, train_sae
from concept_tda.influence.atlas import InfluenceAtlas

SECTIONS = ("sae", "features", "discovery")
OUT = Path(__file__).parent / "results" / "groups.json"


def quality_of(lm, sae, data) -> dict:
    """The figures of one SAE, rounded."""
    row = sae_quality(lm, sae, data).to_pandas().iloc[0]
    return {
        name: round(float(row[name]), 4) for name in ("explained", "l0", "dead", "loss_added", "recovered")
    }


def sae_section(lm, args) -> dict:
    """Train one on the bundled training data; quality on questions it has not seen."""
    train, start = ct.bundled(args.data), time.perf_counter()
    folder = args.work / f"sae-{args.tokens}"
    sae = train_sae(lm, train, args.layer, folder, n_features=args.features, k=args.k, tokens=args.tokens)
    seconds, held_out = time.perf_counter() - start, ct.bundled(args.data, "heldout")
    return {
        "tokens": args.tokens,
        "seconds": round(seconds, 1),
        **quality_of(lm, sae, held_out),
        "random_sae": quality_of(lm, random_sae(lm, sae, train), held_out),
    }


def features_section(lm, args) -> dict:
    """Seconds for the features of the bundled file, and what ten thousand such examples would take."""
    train = ct.bundled(args.data)
    sae = ct.load_sae(args.work / f"sae-{args.tokens}")
    start = time.perf_counter()
    ct.read_features(lm, sae, train, args.work / f"features-{time.time_ns()}")
    seconds = time.perf_counter() - start
    peak = psutil.Process().memory_info().rss / 2**30
    return {
        "examples": len(train),
        "seconds": round(seconds * 10_000 / len(train), 1),
        "extrapolated_from_seconds": round(seconds, 1),
        "memory_gb": round(peak, 2),
    }


def discovery_section(lm, args) -> dict:
    """Predicted movement against the measured one, directions and atoms, for --data; other sets stay."""
    train, queries = ct.bundled(args.data), ct.bundled(args.data, "heldout")[: args.queries]
    start = time.perf_counter()
    if args.atlas:
        atlas = InfluenceAtlas.load(args.atlas)
    else:
        folder = args.work / f"atlas-{args.data}"
        atlas = ct.build_atlas(
            lm, queries, train, args.layer, folder=folder, rank=args.rank, curvature="identity"
        )
    found = discover(atlas, 6)
    seconds, start = time.perf_counter() - start, time.perf_counter()
    if args.atlas:
        seconds += sum(value for name, value in atlas.cost.items() if name.endswith("seconds"))
    atoms = sparse_atoms(atlas, args.atoms)
    figures = {
        "queries": atlas.card["settings"]["query_examples"],
        "atlas": atlas.card["settings"]["mode"],
        "seconds": round(seconds, 1),
        "directions": found.table.round(4).to_dict("records"),
        "agreement": round(found.movement.agreement, 4),
        "agreement_null_95": round(found.movement.null_95, 4),
        "atoms": {
            "n": len(atoms.table),
            "found": int(atoms.table["found"].sum()),
            "null_95": round(float(atoms.table["null_95"][0]), 4),
            "coherence": atoms.table["coherence"].round(4).tolist(),
            "examples": atoms.table["examples"].tolist(),
            "seconds": round(time.perf_counter() - start, 1),
        },
        "separation": separation(atlas, found, atoms, train),
    }
    known = json.loads(OUT.read_text()).get("discovery", {}) if OUT.exists() else {}
    if args.truth:
        tuned = args.tuned or args.work / f"tuned-{args.data}"
        if not args.tuned:
            ct.finetune(lm, train, tuned)
        checked = movement_check(atlas, lm, ct.load_model(tuned), queries)
        figures = {name: round(float(value), 4) for name, value in checked.items()} | figures
    return known | {args.data: known.get(args.data, {}) | figures}


def separation(atlas, found, atoms, train) -> dict:
    """How well the best line of each list tells the two labels that differ in behaviour apart (AUC), beside
    the best of as many random directions (median of 50 draws)."""
    labels = np.array(train.metadata["label"])
    wanted = np.isin(labels, ["sycophantic", "honest", "careless", "careful"])
    bad = np.isin(labels, ["sycophantic", "careless"])[wanted]
    rows_Nd = np.asarray(atlas.rows, np.float64)[wanted]
    random = np.random.default_rng(0)

    def best(directions_Kd) -> float:
        aucs = [roc_auc_score(bad, scores) for scores in (rows_Nd @ directions_Kd.T).T]
        return max(max(auc, 1 - auc) for auc in aucs)

    draws = [best(random.normal(size=(len(found.directions), rows_Nd.shape[1]))) for _ in range(50)]
    figures = {
        "directions": best(found.directions),
        "atoms": best(atoms.directions[: len(found.directions)]),
        "random": np.median(draws),
    }
    return {name: round(float(value), 4) for name, value in figures.items()}


def main():
    """Run the sections that were asked for; each is written as soon as it is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for models, atlas and features")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--data", default="sycophancy")
    parser.add_argument("--layer", type=int, default=20)
    parser.add_argument("--features", type=int, default=4608)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--queries", type=int, default=4)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--atoms", type=int, default=32, help="atoms of the dictionary of atlas rows")
    parser.add_argument("--atlas", type=Path, help="an atlas built before; made where none is given")
    parser.add_argument("--no-truth", dest="truth", action="store_false", help="without the fine-tune")
    parser.add_argument("--tuned", type=Path, help="a fine-tune on the data; made where none is given")
    args = parser.parse_args()
    lm = ct.load_model(args.model)
    result = json.loads(OUT.read_text()) if OUT.exists() else {}
    for name in args.sections:
        section = {"sae": sae_section, "features": features_section, "discovery": discovery_section}[name]
        result["features_10k" if name == "features" else name] = section(lm, args)
        OUT.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
