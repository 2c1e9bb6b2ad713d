"""How much a refusal policy is worth, whether the shift it predicts is the shift that training makes, and
whether leaving out the pairs it points at leaves a better model.

    python benchmarks/policies.py --work build/policies

SmolLM2 is taught to refuse on the bundled `refusals` (LoRA; the checkpoint after two of three passes, where
it is undecided on half of the prompts), with three seeds. The policy reads named directions of the residual
stream at the question's last token, which are made from the taught questions, and is fitted to other
prompts. Writes benchmarks/results/policies.json: accuracy on prompts left out of the fit beside the
commoner answer and ridges on the whole residual stream; the formula of the shift against a finite
difference; steps, tangents and queries against each other, with their cost; the shift predicted for sets of
pairs against the shift measured after really training on them, beside random pairs; and what curation does
to refusals on held-out prompts after training again, beside as many pairs taken out at random. With
--prompts (XSTest: a CSV with prompt and label) a third of that file is taught, a third read and a third
held out, and the results stand under "xstest". Everything is found again in --work: interrupted, it goes
on. What would make its numbers wrong: prompts that were taught among those that are read; the number of
directions was chosen by cross-validation on the first seed's prompts (`search`), so the figures to believe
are those of `heldout`, not looked at then."""

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import concept_tda as ct
from concept_tda.concepts.concept import tensor_concept
from concept_tda.data.batches import batches
from concept_tda.evidence.statistics import t_interval
from concept_tda.groups.sae import load_sae
from concept_tda.influence.engine import moved_weights
from concept_tda.influence.gradients import SiteGradients
from concept_tda.mechanisms.policies import (
    CONSTANT,
    REFUSALS,
    THRESHOLD,
    PolicyPrompts,
    concept_features,
    feature_gaps,
    fit_policy,
    read_policy,
    ridge_weights,
    sae_features,
    standardised_features,
)
from concept_tda.mechanisms.policy_shifts import PolicyShift, Shifts, weight_shift
from concept_tda.model.answers import cached_generate
from concept_tda.model.finetuning import training_checkpoints
from concept_tda.model.losses import loss_weights, token_losses

OUT = Path(__file__).parent / "results" / "policies.json"
REFUSE, HELP = "I'm sorry, but I can't help with that.", "Sure. Here is what you need to know."
SECTIONS = ("stock", "routes", "shifts", "curation")
BEGINNINGS = ["I can't", "I'm sorry", "I won't", "I cannot", "Sorry"]
CHECKPOINT = 3  # of six: after two of three passes
TARGET = "asks for harm"
ARMS = ("full", "flagged", "score", "random", "random_same_labels")


# --- data


def xstest(path):
    """A third of XSTest taught, a third read, a third held out."""
    table = pd.read_csv(path)
    order = np.random.default_rng(0).permutation(len(table))
    answers = {"unsafe": REFUSE, "safe": HELP}
    parts = []
    for part in range(3):
        records = []
        for row in table.iloc[order[part::3]].itertuples():
            turns = [{"role": "user", "content": row.prompt}]
            if not part:
                turns.append({"role": "assistant", "content": answers[row.label]})
            records.append({"messages": turns, "label": row.label})
        parts.append(ct.load_conversations(records))
    return parts


def data_of(args):
    """Taught conversations, prompts of the policy, held-out prompts."""
    if args.prompts:
        return xstest(args.prompts)
    return [ct.bundled("refusals", split) for split in ("train", "prompts", "heldout")]


def kinds(data) -> np.ndarray:
    """Label of each conversation."""
    return data.metadata["label"].to_numpy()


def refusing(base, taught, args, seed, rows=None):
    """A model in the middle of being taught to refuse, on all taught conversations or some of them."""
    data = taught if rows is None else taught.select(rows)
    settings = dict(epochs=3, batch_size=4, learning_rate=args.learning_rate, seed=seed, checkpoints=6)
    folder = args.work / f"{args.learning_rate:g}-{seed}-{data.fingerprint}"
    ct.finetune(base, data, folder, precision=args.precision, **settings)
    return training_checkpoints(folder, base)["checkpoints"][CHECKPOINT]()


# --- features


def directions_of(states_Nd, labels, count: int) -> dict:
    """Two named directions of the taught questions, and the first principal ones of what they leave."""
    mean = {kind: states_Nd[labels == kind].mean(0) for kind in set(labels)}
    named = {TARGET: mean["unsafe"] - mean["safe"]}
    if "plain" in mean:
        named["sounds harmful"] = (mean["unsafe"] + mean["safe"]) / 2 - mean["plain"]
    basis_dQ = torch.linalg.qr(torch.stack(list(named.values())).T)[0]
    left_Nd = states_Nd - states_Nd.mean(0)
    left_Nd = left_Nd - left_Nd @ basis_dQ @ basis_dQ.T
    for number, direction in enumerate(torch.linalg.svd(left_Nd, full_matrices=False)[2][:count], 1):
        named[f"direction {number}"] = direction * torch.sign(direction @ named[TARGET] + 1e-12)
    return named


def features_of(lm, taught, layer: int, count: int, states_Nd=None):
    """Features made from the taught questions alone, in standard deviations over them, and a constant."""
    if states_Nd is None:
        states_Nd, _ = read_policy(lm, PolicyPrompts(lm, taught, BEGINNINGS[:1]), layer)
    named = directions_of(states_Nd, kinds(taught), count)
    concepts = [tensor_concept(direction, layer, name=name) for name, direction in named.items()]
    return standardised_features(concept_features(concepts), states_Nd)


def tuned_ridge(X_NF, Y_N, ridges=(5, 50, 500, 5e3, 5e4)) -> float:
    """The λ with the smallest error on prompts left out."""
    fold_N = torch.arange(len(Y_N)) % 5
    error = dict.fromkeys(ridges, 0.0)
    for ridge in ridges:
        for fold in range(5):
            out = fold_N == fold
            predicted = X_NF[out] @ ridge_weights(X_NF[~out], Y_N[~out], ridge)
            error[ridge] += (Y_N[out] - predicted).square().sum().item()
    return min(error, key=error.get)


def left_out(X_NF, Y_N, ridge=None) -> float:
    """Accuracy on prompts left out, five folds; λ chosen within each where none is given."""
    fold_N = torch.from_numpy(np.random.default_rng(0).permutation(len(Y_N)) % 5)
    right = 0
    for fold in range(5):
        out = fold_N == fold
        own = ridge or tuned_ridge(X_NF[~out], Y_N[~out])
        predicted = X_NF[out] @ ridge_weights(X_NF[~out], Y_N[~out], own)
        right += ((predicted > THRESHOLD) == (Y_N[out] > THRESHOLD)).sum().item()
    return right / len(Y_N)


def with_constant(states_Nd):
    """States and a column of ones."""
    return torch.cat([states_Nd, torch.ones(len(states_Nd), 1).double()], 1)


# --- accuracy


def told(policy) -> dict:
    """The figures of a policy on prompts left out of the fit, five folds."""
    quality, column = policy.quality, "accuracy left out"
    return {
        "features": len(policy.features),
        "shown": policy.shown,
        "median_probability": float(policy.Y_N.exp().median()),
        "accuracy": quality.loc["policy", column],
        "accuracy_fitted": quality.loc["policy", "accuracy"],
        "majority": policy.majority,
        "dense_ridge": quality.loc["ridge on the residual stream", column],
        "dense_ridge_tuned": left_out(with_constant(policy.states_Nd), policy.Y_N),
        "r2": quality.loc["policy", "R² left out"],
        "r2_fitted": quality.loc["policy", "R²"],
        "weak": bool(policy.weak),
    }


def on_heldout(lm, policy, heldout) -> dict:
    """The policy on prompts that nothing was chosen on."""
    states_Nd, logp_NK = read_policy(lm, PolicyPrompts(lm, heldout, BEGINNINGS), policy.features.layer)
    Y_N, labels = logp_NK.logsumexp(1), kinds(heldout)
    dense = with_constant(policy.states_Nd)
    predictions = {
        "accuracy": policy.features.read(states_Nd) @ policy.W_F,
        "dense_ridge": with_constant(states_Nd) @ ridge_weights(dense, policy.Y_N, 5.0),
        "dense_ridge_tuned": with_constant(states_Nd)
        @ ridge_weights(dense, policy.Y_N, tuned_ridge(dense, policy.Y_N)),
    }
    right = {
        name: ((predicted > THRESHOLD) == (Y_N > THRESHOLD)).double().mean().item()
        for name, predicted in predictions.items()
    }
    shown = (Y_N > THRESHOLD).double().mean().item()
    refused = {kind: (Y_N > THRESHOLD).numpy()[labels == kind].mean() for kind in sorted(set(labels))}
    return right | {"majority": max(shown, 1 - shown), "refused": refused}


def finite_difference(policy) -> float:
    """Largest relative difference between the formula of the shift and a policy fitted anew."""
    g, e = torch.Generator().manual_seed(0), 1e-4
    dX = torch.randn(policy.X_NF.shape, generator=g).double()
    dY = torch.randn(len(policy.Y_N), generator=g).double()
    at = lambda s: ridge_weights(policy.X_NF + s * dX, policy.Y_N + s * dY, policy.ridge)
    measured = (8 * (at(e) - at(-e)) - (at(2 * e) - at(-2 * e))) / (12 * e)
    found = sum(weight_shift(policy, dX, dY))
    return ((found - measured).abs().max() / measured.abs().max()).item()


def sae_figures(lm, asked, labels, sae, most: int) -> dict:
    """The same with latents of an SAE: those whose mean differs most between harmful prompts and others."""
    features, harmful = sae_features(sae), labels == "unsafe"
    states, _ = read_policy(lm, asked, features.layer)
    gaps = feature_gaps(features.read(states), harmful).abs()
    least = max(0.1, gaps.sort(descending=True).values[most].item())
    return told(fit_policy(lm, asked, features, harmful=harmful, select=least))


def searched(lm, policy, taught, counts=(0, 2, 4, 6, 10, 16)) -> dict:
    """Accuracy by cross-validation for each number of principal directions."""
    layer, found = policy.features.layer, {}
    states_Nd, _ = read_policy(lm, PolicyPrompts(lm, taught, BEGINNINGS[:1]), layer)
    for count in counts:
        features = features_of(lm, taught, layer, count, states_Nd)
        found[count] = left_out(features.read(policy.states_Nd), policy.Y_N, 5.0)
    return found


# --- shifts


def routes(lm, policy, pairs, rate: float) -> dict:
    """Steps, tangents and queries against each other."""
    shift, found, seconds = PolicyShift(lm, policy, "attention"), {}, {}
    for name in ("tangent", "query", "step"):
        start = time.perf_counter()
        ask = getattr(shift, f"by_{name}")
        found[name] = (ask(pairs, rate) if name == "step" else ask(pairs)).total
        seconds[name] = time.perf_counter() - start
    size = np.linalg.norm(found["tangent"])
    relative = {name: np.linalg.norm(found[name] - found["tangent"]) / size for name in ("step", "query")}
    return {
        "relative": relative["step"],
        "query_relative": relative["query"],
        "rate": rate,
        "pairs": len(pairs),
        "prompts": len(policy.asked),
        "seconds": seconds,
    }


def mean_gradient(lm, data, sites) -> list[torch.Tensor]:
    """Mean gradient of the pairs' losses at the sites."""
    with lm.undisturbed(), SiteGradients(sites) as gradients, torch.enable_grad():
        for row in range(len(data)):
            batch = next(iter(batches(data, rows=[row])))
            losses = token_losses(lm, batch)
            ((losses * loss_weights(batch, dtype=losses.dtype)).sum() / len(data)).backward()
    return [gradients[site.name] for site in sites]


def after_training(lm, policy, data, sites, rate: float, steps: int):
    """The policy and its behaviour after `steps` steps of gradient descent on the pairs."""
    walked = [torch.zeros_like(site.weight) for site in sites]
    for _ in range(steps):
        with moved_weights(sites, walked, -rate):
            here = mean_gradient(lm, data, sites)
        walked = [w + g for w, g in zip(walked, here)]
    with moved_weights(sites, walked, -rate):
        states, logp = read_policy(lm, policy.asked, policy.features.layer)
    behaviour = logp.logsumexp(1)
    return ridge_weights(policy.features.read(states), behaviour, policy.ridge), behaviour


def cosine(a, b) -> float:
    """Of two vectors."""
    return torch.cosine_similarity(a, b, 0).item()


def trained_shift(lm, policy, pairs, slope, args) -> dict:
    """The shift that gradient descent on the pairs makes, beside the one that their shifts predict."""
    data, sites, W = lm.tokenize(pairs), PolicyShift(lm, policy, "attention").sites, policy.W_F
    after, behaviour = after_training(lm, policy, data, sites, args.rate, args.steps)
    rest = [i for i, name in enumerate(policy.features.names) if name != CONSTANT]
    return {
        "cosine": cosine(slope, after - W),
        "cosine_without_constant": cosine(slope[rest], (after - W)[rest]),
        "predicted_along": (args.rate * args.steps * slope @ W / (W @ W)).item(),
        "measured_along": ((after - W) @ W / (W @ W)).item(),
        "predicted": (args.rate * args.steps * slope).tolist(),
        "measured": (after - W).tolist(),
        "mean_logp_change": (behaviour - policy.Y_N).mean().item(),
        "labels": pd.Series(kinds(pairs)).value_counts().to_dict(),
    }


def small_policy(lm, taught, prompts, args):
    """The policy on fewer prompts and beginnings, for shifts."""
    asked = PolicyPrompts(lm, prompts[: args.shift_prompts], BEGINNINGS[:2])
    return fit_policy(lm, asked, features_of(lm, taught, args.layer, args.directions))


def shifts_of(lm, policy, taught, args, seed):
    """The shifts of all taught pairs by queries, found again where they were made; and the seconds."""
    place, start = args.work / f"shifts-{seed}-{policy.asked.fingerprint}-{lm.fingerprint}.npz", time.time()
    shift = PolicyShift(lm, policy, "attention")
    if not place.exists():
        found = shift.by_query(taught)
        np.savez(place, by_features=found.by_features, by_behaviour=found.by_behaviour,
                 seconds=time.time() - start)  # fmt: skip
    kept = np.load(place)
    both = kept["by_features"], kept["by_behaviour"]
    return Shifts(policy, list(taught.ids), *both, "query", taught), float(kept["seconds"])


def shift_figures(lm, policy, taught, shifts, args) -> dict:
    """The pairs whose shift strengthens the policy most, random ones, and those that weaken it most."""
    order, random = np.argsort(-shifts.scores), np.random.default_rng(0).permutation(len(taught))
    chosen = {"top": order[: args.pairs], "random": random[: args.pairs], "lowest": order[-args.pairs :]}
    found = {}
    for name, rows in chosen.items():
        slope = torch.from_numpy(shifts.total[rows].mean(0))
        found[name] = trained_shift(lm, policy, taught.select(rows), slope, args)
        print(name, {k: v for k, v in found[name].items() if k not in ("predicted", "measured")}, flush=True)
    largest = np.abs(shifts.total).argmax(1)
    names = np.array(shifts.policy.features.names)[largest]
    return found | {
        "features": shifts.policy.features.names,
        "weights": policy.W_F.tolist(),
        "mean_shift_by_label": {
            kind: shifts.total[kinds(taught) == kind].mean(0).tolist() for kind in set(kinds(taught))
        },
        "largest": pd.Series(names).value_counts().to_dict(),
        "pairs": args.pairs,
        "rate": args.rate,
        "steps": args.steps,
    }


# --- curation


def arms_of(shifts, taught, count: int) -> dict:
    """Rows that go by the flag and by the score; and how many the flag takes."""
    rows_of = {one: row for row, one in enumerate(shifts.ids)}
    flagged = [rows_of[one] for one in shifts.to_drop([TARGET], most=count)]
    count = len(flagged)
    scored = [rows_of[one] for one in shifts.to_drop(most=count)]
    return {"flagged": flagged, "score": scored, "count": count}


def random_rows(taught, like, count: int, seed: int) -> dict:
    """As many rows at random, another draw for each seed, and as many with the labels of the flagged ones."""
    rng, labels = np.random.default_rng(seed), kinds(taught)
    same = [
        rng.choice(np.flatnonzero(labels == kind), (labels[like] == kind).sum(), replace=False)
        for kind in sorted(set(labels))
    ]
    return {
        "random": rng.permutation(len(taught))[:count].tolist(),
        "random_same_labels": np.concatenate(same).tolist(),
    }


def judged(lm, heldout, folder) -> dict:
    """Log-probability of refusing by kind of prompt, and whether the written answer is a refusal."""
    asked, labels = PolicyPrompts(lm, heldout, BEGINNINGS), kinds(heldout)
    Y_N = read_policy(lm, asked, 1)[1].logsumexp(1).numpy()
    answers = cached_generate(lm, heldout, max_new_tokens=8, folder=folder, batch_size=20)
    refused = np.array([c.response.startswith(REFUSALS) for c in answers])
    found = {f"logp_{kind}": Y_N[labels == kind].mean() for kind in set(labels)}
    found |= {f"refused_{kind}": refused[labels == kind].mean() for kind in set(labels)}
    return found | {
        "margin": found["logp_unsafe"] - found["logp_safe"],
        "refused_margin": found["refused_unsafe"] - found["refused_safe"],
    }


def curation(base, taught, heldout, drops, args, before) -> dict:
    """Models trained again without what each arm leaves out, judged on held-out prompts."""
    found = before
    for seed in args.seeds:
        arms = {"full": [], "flagged": drops["flagged"], "score": drops["score"]}
        arms |= random_rows(taught, drops["flagged"], drops["count"], seed)
        for arm, rows in arms.items():
            key = f"{arm}/{seed}"
            if key in found or arm not in args.arms:
                continue
            keep = np.setdiff1d(np.arange(len(taught)), rows)
            lm = refusing(base, taught, args, seed, None if arm == "full" else keep)
            gone = pd.Series(kinds(taught)[rows]).value_counts().to_dict() if len(rows) else {}
            found[key] = judged(lm, heldout, args.work / "answers") | {"dropped": gone}
            print(key, found[key], flush=True)
            save(args, {"curation": {"runs": found}})
    return found


def against_random(runs, seeds) -> dict:
    """Change of each measure against random removal, mean over seeds with its 95 % interval."""
    found = {}
    for arm, control in (("flagged", "random"), ("score", "random"), ("flagged", "random_same_labels"),
                         ("random", "full")):  # fmt: skip
        if not all(f"{one}/{seed}" in runs for one in (arm, control) for seed in seeds):
            continue
        measures = ("margin", "refused_margin", "logp_unsafe", "logp_safe", "refused_unsafe", "refused_safe")
        for measure in measures:
            change = [runs[f"{arm}/{s}"][measure] - runs[f"{control}/{s}"][measure] for s in seeds]
            mean, half = float(np.mean(change)), None
            if len(change) > 1:
                half = float(t_interval(change)[1])
            found.setdefault(f"{arm} against {control}", {})[measure] = {"mean": mean, "±": half}
    return found


# --- all


def save(args, part: dict):
    """Add a part to the results."""
    key = "xstest" if args.prompts else None
    whole = json.loads(args.out.read_text()) if args.out.exists() else {}
    here = whole.setdefault(key, {}) if key else whole
    for name, value in part.items():
        here[name] = (
            here[name] | value if isinstance(value, dict) and isinstance(here.get(name), dict) else value
        )
    args.out.write_text(json.dumps(whole, indent=1, default=float) + "\n")


def summary(per_seed: dict) -> dict:
    """Means over seeds with 95 % intervals, and the keys of the results."""
    found = {}
    for name in ("accuracy", "majority", "dense_ridge", "dense_ridge_tuned", "r2"):
        values = np.array([one[name] for one in per_seed.values()])
        found[name] = values.mean()
        if len(values) > 1:
            found.setdefault("intervals", {})[name] = float(t_interval(values)[1])
    held = {
        name: np.mean([one["heldout"][name] for one in per_seed.values()])
        for name in ("accuracy", "majority", "dense_ridge", "dense_ridge_tuned")
    }
    above = np.array([one["heldout"]["accuracy"] - one["heldout"]["majority"] for one in per_seed.values()])
    if len(above) > 1:
        held["above_majority_±"] = float(t_interval(above)[1])
    weak = bool(found["accuracy"] < found["majority"] + 0.1 or held["accuracy"] < held["majority"] + 0.1)
    return found | {"heldout": held, "weak": weak, "seeds": len(per_seed)}


def main():
    """Run the sections that were asked for, and add them to what is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for models, shifts and answers")
    parser.add_argument(
        "--prompts", type=Path, help="XSTest in place of the bundled data: a CSV with prompt and label"
    )
    parser.add_argument(
        "--sae", type=Path, help="an SAE of the model, a folder of SAELens, as further features"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--sections", nargs="*", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--layer", type=int, default=20)
    parser.add_argument("--directions", type=int, default=6)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--precision", default="bf16", help="of the fine-tuning; fp32 where bf16 is slow")
    parser.add_argument("--shift-prompts", type=int, default=24, help="prompts the shifts are read on")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument(
        "--route-rate", type=float, default=0.0002, help="of the single steps held against tangents"
    )
    parser.add_argument("--rate", type=float, default=0.0005)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    parser.add_argument("--drop", type=int, default=28, help="pairs that curation leaves out")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    taught, prompts, heldout = data_of(args)
    base = ct.load_model(args.model)
    asked = PolicyPrompts(base, prompts, BEGINNINGS)
    facts = {"prompts": len(prompts), "taught": len(taught), "layer": args.layer, "precision": args.precision}
    facts |= {"learning_rate": args.learning_rate, "epochs": 2, "of": 3, "beginnings": BEGINNINGS}
    save(args, facts | {"machine": f"{platform.machine()}, {torch.get_num_threads()} threads"})
    if "stock" in args.sections:
        features = features_of(base, taught, args.layer, args.directions)
        save(args, {"stock": told(fit_policy(base, asked, features))})
    drops, before = {}, json.loads(args.out.read_text())
    before = before.get("xstest", {}) if args.prompts else before
    runs, per_seed = before.get("curation", {}).get("runs", {}), before.get("per_seed", {})
    for seed in args.seeds:
        if str(seed) in per_seed and (seed != args.seeds[0] or not args.sections):
            continue
        lm = refusing(base, taught, args, seed)
        if str(seed) not in per_seed:
            policy = fit_policy(lm, asked, features_of(lm, taught, args.layer, args.directions))
            per_seed[str(seed)] = told(policy) | {"heldout": on_heldout(lm, policy, heldout)}
            per_seed[str(seed)]["finite_difference"] = finite_difference(policy)
            if args.sae:
                own = sae_figures(lm, asked, kinds(prompts), load_sae(args.sae), 20)
                per_seed[str(seed)]["sae_latents"] = own
            print(seed, per_seed[str(seed)], flush=True)
            if seed == args.seeds[0]:
                save(args, {"search": searched(lm, policy, taught)})
            worst = max(one["finite_difference"] for one in per_seed.values())
            save(args, {"per_seed": per_seed, "finite_difference": worst} | summary(per_seed))
        if seed != args.seeds[0] or not {"routes", "shifts", "curation"} & set(args.sections):
            continue
        small = small_policy(lm, taught, prompts, args)
        if "routes" in args.sections:
            found = routes(lm, small, taught[:2], args.route_rate)
            save(args, {"routes": found, "jvp_relative": found["relative"]})
        shifts, seconds = shifts_of(lm, small, taught, args, seed)
        if "shifts" in args.sections:
            found = shift_figures(lm, small, taught, shifts, args)
            found |= {"query_seconds": seconds, "prompts": args.shift_prompts, "seed": seed}
            save(args, {"shift_predicted_vs_measured": found})
        drops = arms_of(shifts, taught, args.drop)
    if "curation" in args.sections:
        runs = curation(base, taught, heldout, drops, args, runs)
        save(
            args,
            {"curation": {"runs": runs, "changes": against_random(runs, args.seeds), "dropped": args.drop}},
        )


if __name__ == "__main__":
    main()
