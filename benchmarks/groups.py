"""Sparse autoencoders, features and discovery on SmolLM2 and the bundled data, with their price.

    python benchmarks/groups.py --work build/groups   # all but the last two, a quarter of an hour
    python benchmarks/groups.py --work build/groups --sections sae
    python benchmarks/groups.py --work build/groups --sections kinds filtering   # an hour; resumes

Prints what it finds and writes benchmarks/results/groups.json. The SAE learns from as many activations as
--tokens says, far fewer than the one to two million from which on one should believe it; beside it stands a
random one.

`kinds` trains the small SAE of the tutorial *What kind of example does it?*, and reads its features and
those of a random one into results/kinds. `filtering` leaves whole kinds out and trains again, beside single
examples, random ones, and the kinds of the random SAE. Examples, scores, recipe and the trainings without
kinds are those of results/paper/sycophancy; all trainings end up in results/kinds/retrained.json. What would
make its numbers wrong: an SAE or a size of kind chosen by the judge's verdict."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_matrix
from sklearn.metrics import roc_auc_score

import concept_tda as ct
import concept_tda.groups.sae as sae_room
from concept_tda.concepts.judges import OpenAIReader
from concept_tda.data.conversations import Conversations
from concept_tda.evidence.retraining import CellFolder, read_packed, write_record
from concept_tda.groups.discovery import discover, movement_check, sparse_atoms
from concept_tda.groups.features import feature_groups, load_features, read_features
from concept_tda.groups.groups import Groups, random_groups, score_groups, union_rows
from concept_tda.groups.labels import label_groups
from concept_tda.groups.sae import SparseAutoencoder, random_sae, recurrence, sae_quality, train_sae
from concept_tda.influence.atlas import InfluenceAtlas
from concept_tda.influence.engine import peak_memory

SECTIONS = ("sae", "features", "memory", "labels", "discovery", "kinds", "filtering")
RESULTS = Path(__file__).parent / "results"
OUT, PAPER, KINDS = RESULTS / "groups.json", RESULTS / "paper" / "sycophancy", RESULTS / "kinds"
KIND_SAE = dict(n_features=1152, k=16, tokens=300_000, batch_size=512)  # chosen by held-out reconstruction
# kinds of 6 to 10 of the 120 examples: for both SAEs the union of the highest ones is then exactly a quarter
KIND_SIZES = dict(smallest=6, largest=10 / 120 + 1e-9)


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
    return {
        "examples": len(train),
        "seconds": round(seconds * 10_000 / len(train), 1),
        "extrapolated_from_seconds": round(seconds, 1),
    }


class RandomCode(torch.nn.Module):
    """As much work and memory as a top-k autoencoder of this size, without having learnt anything."""

    def __init__(self, width, n_features, k):
        super().__init__()
        self.W_enc = torch.nn.Parameter(torch.randn(width, n_features))
        self.W_dec, self.k = torch.nn.Parameter(torch.randn(n_features, width)), k

    def encode(self, acts):
        """The k largest of each token, the others 0."""
        codes = acts @ self.W_enc
        values, places = codes.topk(self.k, dim=-1)
        return torch.zeros_like(codes).scatter(-1, places, values.relu())


def own_peak(model, examples, args) -> dict:
    """Features of so many examples in this very process: its peak, and what it had used before."""
    if model == "tiny":
        sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
        from tiny import tiny_pair

        lm, layer = ct.load_model(tiny_pair("llama")), 1
        rows = [{"prompt": f"Is {i} so?", "response": f"it is the sea {i}"} for i in range(examples)]
        train, code = ct.load_conversations(rows), RandomCode(lm.width, 1024, args.k)
    else:
        lm, layer, train = ct.load_model(model), args.layer, ct.bundled(args.data)[:examples]
        code = RandomCode(lm.width, args.features, args.k)
    before, start = peak_memory(lm.device), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = ct.read_features(lm, SparseAutoencoder(code, layer, "random"), train, folder, progress=False)
        stored = found.max.nnz
    return {
        "examples": len(train),
        "peak_gb": round(peak_memory(lm.device) / 2**30, 3),
        "before_gb": round(before / 2**30, 3),
        "stored_numbers": int(stored),
        "seconds": round(time.perf_counter() - start, 1),
    }


def memory_section(lm, args) -> dict:
    """Peak memory of features, each measured in a process of its own: a tiny model and the real one."""
    found = {}
    for model, examples in (("tiny", 500), ("tiny", 2_000), ("tiny", 10_000), (args.model, 240)):
        call = [sys.executable, __file__, "--work", str(args.work), "--peak", model, str(examples)]
        options = ["--layer", str(args.layer), "--features", str(args.features), "--k", str(args.k)]
        done = subprocess.run([*call, *options], check=True, capture_output=True, text=True)
        found.setdefault(model, []).append(json.loads(done.stdout.splitlines()[-1]))
    return {"peak_gb": found[args.model][0]["peak_gb"], "processes": found}


def labels_section(lm, args) -> dict:
    """Seconds for labels of many groups by a scripted endpoint that takes 50 ms for each answer."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from scripted_server import Server

    def answer(body, number):
        said = f"name {number}" if body["messages"][0]["content"].startswith("Two numbered") else "0000"
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
        return 200, {"id": "x", "object": "chat.completion", "choices": [choice], "usage": {}}, {}

    random, train = np.random.default_rng(0), ct.bundled(args.data)
    found = {"examples": len(train), "groups": 6, "endpoint_ms": 50}
    members = csr_matrix(random.random((len(train), found["groups"])) < 0.2)
    groups = Groups(train, [str(i) for i in range(found["groups"])], members, "drawn")
    many = csr_matrix(random.random((len(train), 2_000)) < 0.2)
    start = time.perf_counter()
    label_groups(Groups(train, [str(i) for i in range(2_000)], many, "drawn"), None)
    found["local_seconds_for_2000_groups"] = round(time.perf_counter() - start, 1)
    for concurrency in (1, 8, 32):
        server = Server([answer], delay=found["endpoint_ms"] / 1000)
        with tempfile.TemporaryDirectory() as folder:
            options = dict(base_url=server.url, api_key="none", folder=folder, concurrency=concurrency)
            start = time.perf_counter()
            label_groups(groups, OpenAIReader("scripted", **options), progress=False)
        seconds = time.perf_counter() - start
        found["requests"], asked = len(server.requests), len(server.requests) / seconds
        found[f"concurrency_{concurrency}"] = {
            "seconds": round(seconds, 1),
            "requests_a_second": round(asked, 1),
            "most_at_a_time": server.most_running,
        }
        server.close()
    return found


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


@contextmanager
def read_once():
    """Within it the training of an SAE reads every example once and keeps its activations (160 MB here)."""
    kept, plain = {}, sae_room.read_tokens

    def read(lm, batch, layer):
        rows = batch.rows.tolist()
        if not all(row in kept for row in rows):
            acts_Rd, counted_BT = plain(lm, batch, layer)
            kept.update(zip(rows, acts_Rd.split(counted_BT.sum(1).tolist())))
        return torch.cat([kept[row] for row in rows]), None

    sae_room.read_tokens = read
    try:
        yield
    finally:
        sae_room.read_tokens = plain


def kind_texts():
    """What the SAE of the kinds learns from: all bundled answers but those its quality is measured on."""
    parts = [ct.bundled("sycophancy"), ct.bundled("careless"), ct.bundled("careless", "heldout")]
    return Conversations([one for part in parts for one in part], "bundled texts")


def kind_sae(lm, work, seed=0):
    """A small SAE at the layer of the concept."""
    with read_once():
        return train_sae(lm, kind_texts(), 20, work / f"kinds-sae-{seed}", seed=seed, **KIND_SAE)


def kind_groups(train) -> dict:
    """The kinds that the features of each SAE make, from their tables on disk.

    A feature of the trained SAE fires above 0.1; one of the random SAE above a threshold at which both have
    as many pairs of an example and a feature that fires on it."""
    tables = {name: load_features(KINDS / name.replace(" ", "-"), train) for name in ("SAE", "random SAE")}
    as_many = np.sort(tables["random SAE"].max.data)[-tables["SAE"].fires().nnz - 1]
    above = {"SAE": 0.1, "random SAE": float(as_many)}
    return {
        name: feature_groups(table, threshold=above[name], **KIND_SIZES) for name, table in tables.items()
    }


def scored_kinds(train, influence, n_random=3) -> dict:
    """The kinds of both SAEs with their influence, and the first random groups that make a quarter."""
    kinds = kind_groups(train)
    found = {f"kinds of the {name}": scored(own, influence) for name, own in kinds.items()}
    draws = (scored(random_groups(kinds["SAE"], seed), influence) for seed in count())
    quarter = (one for one in draws if len(union_rows(one, fraction=0.25)[0]) == len(train) // 4)
    return found | {f"random groups {place}": next(quarter) for place in range(1, n_random + 1)}


def scored(groups, influence):
    """Standardised sums; enough deals for so many groups."""
    return score_groups(groups, influence, standardise=True, deals=20_000)


def kinds_section(lm, args) -> dict:
    """Features of both SAEs, and their quality on questions that neither has read."""
    train, trained = paper_study()[0], kind_sae(lm, args.work)
    saes = {"SAE": trained, "random SAE": random_sae(lm, trained, kind_texts())}
    for name, sae in saes.items():
        read_features(lm, sae, train, KINDS / name.replace(" ", "-"))
    groups, again, found = kind_groups(train), kind_sae(lm, args.work, seed=1), {}
    for name, sae in saes.items():
        recurs = float((recurrence(sae, again) > 0.7).mean())
        found[name] = quality_of(lm, sae, ct.bundled("sycophancy", "heldout")[:20])
        found[name] |= {"recurs": round(recurs, 4), "kinds": len(groups[name])}
    return {"settings": KIND_SAE | KIND_SIZES, **found}


def paper_study():
    """The training examples, methods and recipe of the paper's filtering, from its committed files."""
    ids = json.loads((PAPER / "sycophancy.json").read_text())["train_ids"]
    data = ct.bundled("sycophancy")
    train = data.select([data.ids.index(one) for one in ids])
    packed, sizes = read_packed(PAPER / "retrained.json"), (0, 90, 120)
    cells = {
        name: parts
        for name, parts in packed["cells"].items()
        if parts.get("training", {"n": 0})["n"] in sizes  # the base model, a quarter left out, the whole file
    }
    methods = ct.MethodComparison.from_folder(PAPER / "methods.parquet").attributions
    return train, methods, packed["plans"]["filter"]["setting"]["recipe"], cells


def unpack(cells, folder):
    """Trainings of a packed file as files of a folder, so that a plan that shares them finds them."""
    for cell, parts in cells.items():
        for part, record in parts.items():
            if not (path := CellFolder(folder).path(cell, part)).exists():
                write_record(path, record)


def kind_experiment(lm, args):
    """Kinds by Concept Influence, of the trained SAE and of the random one, beside single examples."""
    train, methods, recipe, cells = paper_study()
    unpack(cells, args.work / "kinds")
    judge = ct.ContrastJudge(
        ct.bundled("sycophancy", "evaluation"), trait="sycophantic", neutral="honest", name="sycophancy"
    )
    chosen = {name: methods[name] for name in ("Concept Influence", "Influence Function")}
    groups = scored_kinds(train, chosen["Concept Influence"])
    return ct.FilterAndRetrain(
        lm,
        train,
        chosen,
        judge,
        args.work / "kinds",
        fractions=args.fractions,
        arms=("drop-most", "random"),
        n_random=3,
        recipe=recipe,
        groups=groups,
        name="kinds",
    )


def told(row) -> dict:
    """The margin of one arm, and its difference from random removal of as many; ± is half an interval."""
    names = {"value": "mean", "value ±": "half", "from_random": "from_random"}
    figures = {new: row[old] for old, new in (names | {"from_random ±": "from_random_half"}).items()}
    figures = {name: None if np.isnan(one) else round(float(one), 4) for name, one in figures.items()}
    return figures | {"seeds": row["seeds"], "examples": row["n"]}


def filtering_section(lm, args) -> dict:
    """Train what is missing, at most so many models; pack, and sum up what there is."""
    experiment = kind_experiment(lm, args)
    print(f"{experiment.remaining} of {experiment.n_models} models to come", flush=True)
    experiment.run(at_most=args.at_most)
    experiment.pack(KINDS / "retrained.json", overwrite=True)
    found = {}
    for row in experiment.summary().to_dict("records"):
        share = "" if np.isnan(row["fraction"]) else f"{row['fraction']:.0%}"
        found[" ".join(filter(None, (row["arm"], row["method"], share)))] = told(row)
    return found


def main():
    """Run the sections that were asked for; each is written as soon as it is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for models, atlas and features")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS[:-2])
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
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.25], help="shares to leave out")
    parser.add_argument("--at-most", type=int, help="trainings of the section filtering in this call")
    parser.add_argument("--tuned", type=Path, help="a fine-tune on the data; made where none is given")
    parser.add_argument("--peak", nargs=2, help="model and examples: only measure this process, and print")
    args = parser.parse_args()
    if args.peak:
        print(json.dumps(own_peak(args.peak[0], int(args.peak[1]), args)))
        return
    lm = None if set(args.sections) <= {"memory", "labels"} else ct.load_model(args.model)
    result = json.loads(OUT.read_text()) if OUT.exists() else {}
    for name in args.sections:
        section = {
            "sae": sae_section,
            "features": features_section,
            "memory": memory_section,
            "labels": labels_section,
            "discovery": discovery_section,
            "kinds": kinds_section,
            "filtering": filtering_section,
        }[name]
        found = section(lm, args)
        if name in ("features", "memory"):  # two sections, one entry
            result["features_10k"] = result.get("features_10k", {}) | found
        else:
            result[name] = found
        OUT.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
