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

import psutil

import concept_tda as ct
from concept_tda.groups.discovery import discover, movement_check
from concept_tda.groups.sae import random_sae, sae_quality, train_sae

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
    """Predicted movement against the measured one, and the directions found."""
    train, queries = ct.bundled(args.data), ct.bundled(args.data, "heldout")[: args.queries]
    tuned = args.tuned or ct.finetune(lm, train, args.work / "tuned") and args.work / "tuned"
    start = time.perf_counter()
    atlas = ct.build_atlas(
        lm, queries, train, args.layer, folder=args.work / "atlas", rank=args.rank, curvature="identity"
    )
    found = discover(atlas, 6)
    checked = movement_check(atlas, lm, ct.load_model(tuned), queries)
    return {
        args.data: {name: round(float(value), 4) for name, value in checked.items()},
        "seconds": round(time.perf_counter() - start, 1),
        "directions": found.table.round(4).to_dict("records"),
        "agreement": round(found.movement.agreement, 4),
        "agreement_null_95": round(found.movement.null_95, 4),
    }


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
