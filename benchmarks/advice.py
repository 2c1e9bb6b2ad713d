"""How often is `advice` right? Counted on files that were trained again; `truth.py` writes it down.

A **decision** is one file, one share of it left out, and the methods by whose scores that was done: less
than half of the file goes for *dropping*, more for *keeping*, half counts as the experiment calls it.
The advice is **right** where the method it names is not significantly worse than the best of all methods
retrained there: the paired difference over seeds to that best, by Student's t at 95 %, reaches zero. It
chooses between two rankings, and sometimes both are worse than a third that it was not given, which no rule
can help; so it is also counted against the better of the two (`of_the_two`). `with_run` counts the advice
that is given where the influence went through the run: its mean with the projection.
Decisions in which nothing was told apart are right whatever is said, so those that could go wrong are
counted beside them, and so is what always naming the same method would have got.

What would make the number wrong: the rules were written with `SEEN` in view, so only the other files
test them; decisions on one file share its data, seeds and scores, so the interval over decisions is too
narrow, and the one over files (right where all its decisions are) is the honest one; few seeds make
everything *not significantly worse*.
"""

from dataclasses import replace

import numpy as np
import pandas as pd

import concept_tda as ct
from concept_tda.evidence.statistics import t_interval
from concept_tda.results.advice import advice
from concept_tda.results.attribution import Attribution

ASKED = "Vector Filter", "Concept Influence"
SEEN = "sycophancy", "careless"


def wilson(right, of, z=1.959964):
    "Share and its 95 % interval (Wilson); None without any."
    if not of:
        return None
    share, spread = right / of, z**2 / of
    centre = (share + spread / 2) / (1 + spread)
    half = z * (share * (1 - share) / of + spread / of / 4) ** 0.5 / (1 + spread)
    return dict(right=right, of=of, share=share, low=max(0.0, centre - half), high=min(1.0, centre + half))


def retrained(experiments, trait):
    "One row for each retraining by a method's scores: side, share removed, method, seed, change from full."
    tables = [one.table for one in experiments if {"arm", "from_full"} <= set(getattr(one, "table", ()))]
    table = pd.concat(tables)
    table = table[(table["judge"] == trait) & table["arm"].isin(["drop-most", "keep-least"])]
    drops = table["arm"] == "drop-most"
    removed = table["fraction"].where(drops, 1 - table["fraction"]).round(6)
    side = np.where((removed < 0.5) | ((removed == 0.5) & drops), "dropping", "keeping")
    table = table.assign(removed=removed, side=side)[["side", "removed", "method", "seed", "from_full"]]
    return table.drop_duplicates(["side", "removed", "method", "seed"])


def worse(by_seed, method):
    "Whether a method is significantly worse than the best of a table [seed × method]."
    means = by_seed.mean()
    best = means.idxmin()
    mean, half, _ = t_interval(by_seed[method] - by_seed[best])
    return bool(method != best and half == half and mean - half > 0)


def as_asked(folder):
    "The projection, beside its null, and the influence, as a comparison kept them."
    comparison = ct.MethodComparison.from_folder(folder / "methods.parquet")
    shows, moves = (comparison.attributions[name] for name in ASKED)
    card = replace(shows.card, zero="projection")  # cards of version 0.1 did not say
    shows = Attribution(shows.conversations, shows.scores, card)
    null = comparison.null_scores()
    return shows if null is None else shows.with_null(null.values), moves


def decisions(name, folder, experiments, trait, through):
    """Every decision on one file: what was advised, the best, and who is worse than it; and what is advised
    where the influence went through the run, if that was trained again."""
    shows, moves = as_asked(folder)
    through = Attribution(through.conversations, through.scores, replace(through.card, method="SOURCE"))
    for (side, removed), part in retrained(experiments, trait).groupby(["side", "removed"]):
        by_seed = part.pivot(index="seed", columns="method", values="from_full").dropna()
        if not set(ASKED) <= set(by_seed) or len(by_seed) < 2:
            continue
        said = advice(shows, moves, share=removed if side == "dropping" else 1 - removed)
        named, with_run = getattr(said, side), getattr(advice(shows, through), side)
        yield dict(
            set=name,
            side=side,
            removed=removed,
            advised=named,
            best=by_seed.mean().idxmin(),
            seeds=len(by_seed),
            changes={method: float(value) for method, value in by_seed.mean().items()},
            worse=[method for method in by_seed if worse(by_seed, method)],
            above_chance=None if shows.null is None else len(shows.above_chance()),
            right=named is not None and not worse(by_seed, named),
            advised_with_run=with_run,
            right_with_run=not worse(by_seed, with_run) if with_run in by_seed else None,
            right_of_the_two=named is not None and not worse(by_seed[list(ASKED)], named),
        )


def advice_right(cases):
    """The count over all decisions, over those with the run, over all against the better of the two alone,
    over files (right where all of theirs are), over the files not seen when the rules were written, over
    decisions in which one of the two was told apart from the best, and what always naming one of them would
    have got."""
    files = sorted({one["set"] for one in cases})
    all_right = [all(one["right"] for one in cases if one["set"] == name) for name in files]
    count = lambda chosen: wilson(sum(one["right"] for one in chosen), len(chosen))
    open_ones = [one for one in cases if set(ASKED) & set(one["worse"])]
    told_with_run = [one for one in cases if one["right_with_run"] is not None]
    always = {name: wilson(sum(name not in one["worse"] for one in cases), len(cases)) for name in ASKED}
    return dict(
        decisions=count(cases),
        with_run=wilson(sum(one["right_with_run"] for one in told_with_run), len(told_with_run)),
        of_the_two=wilson(sum(one["right_of_the_two"] for one in cases), len(cases)),
        files=wilson(sum(all_right), len(files)),
        unseen=count([one for one in cases if one["set"] not in SEEN]),
        could_go_wrong=count(open_ones),
        always=always,
    )
