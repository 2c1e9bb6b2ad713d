"""How quick the example browser is with many examples: opening it in Python, first paint, and each way of
filtering and sorting, in headless Chromium.

    .venv/bin/python benchmarks/views.py [--examples 10000] [--out benchmarks/results/views.json]

Nothing is asserted. Times are medians over repetitions, in milliseconds; `kernel` is the time the Python
object takes to answer, without a notebook's transport."""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from test_browser import TRAITS, StandIn  # noqa: E402

from concept_tda.data.conversations import Conversation, Conversations  # noqa: E402
from concept_tda.foundation.storage import code_version  # noqa: E402
from concept_tda.results.attribution import Attribution  # noqa: E402
from concept_tda.results.cards import QueryCard  # noqa: E402
from concept_tda.views.browser import ExampleBrowser  # noqa: E402

from chromium import CHROMIUM, Chromium  # noqa: E402

PROBE = """window.timed = async (act) => {
  const start = performance.now();
  await act();
  await new Promise(done => requestAnimationFrame(() => setTimeout(done, 0)));
  return performance.now() - start;
};
window.pick = (label, value) => {
  const node = document.querySelector(`[aria-label="${label}"]`);
  node.value = value;
  node.dispatchEvent(new Event('change'));
  node.dispatchEvent(new Event('input'));
};"""
ACTIONS = {
    "sort by another order": ["pick('Order', 'low')", "pick('Order', 'high')"],
    "sort by disagreement": ["pick('Order', 'above-1')", "pick('Order', 'high')"],
    "filter by length": ["pick('Shortest', '200')", "pick('Shortest', '')"],
    "filter by facet": ["document.querySelector('input[data-facet=\"0\"]').click()"] * 2,
    "jump to the other end": [
        "[...document.querySelectorAll('.both-ends button')].at(-1).click()",
        "document.querySelector('.both-ends button').click()",
    ],
}


def made_up(n):
    """n examples of about 150 words with three methods and a topic."""
    rng = np.random.default_rng(0)
    words = np.array([f"word{i}" for i in range(5_000)])
    data = Conversations(
        [
            Conversation(
                (
                    {"role": "user", "content": " ".join(rng.choice(words, 30))},
                    {"role": "assistant", "content": " ".join(rng.choice(words, rng.integers(20, 220)))},
                ),
                metadata={"topic": f"topic {i % 12}"},
            )
            for i in range(n)
        ],
        "made up",
    )
    return [
        Attribution(data, rng.standard_t(4, size=n), QueryCard(method, "sycophancy"))
        for method in ("Concept Influence", "BM25", "Length")
    ]


def milliseconds(act):
    "What a call returns, and how long it took."
    start = time.perf_counter()
    result = act()
    return result, 1000 * (time.perf_counter() - start)


def measure(n, repetitions):
    "Medians for one number of examples: opening in Python, first paint, then every action in the page."
    results = made_up(n)
    widget, opened = milliseconds(lambda: ExampleBrowser(results[0], results[1:], by="benchmark"))
    times = {
        "open in Python": opened,
        "find near-duplicates (once)": milliseconds(widget.find_groups)[1],
        "kernel: first search (lower-cases all texts)": milliseconds(
            lambda: widget._answer(dict(kind="search", words="word17"))
        )[1],
        "kernel: search": statistics.median(
            milliseconds(lambda: widget._answer(dict(kind="search", words="word17 word4")))[1]
            for _ in range(repetitions)
        ),
        "kernel: 15 rows of texts": statistics.median(
            milliseconds(lambda: widget._answer(dict(kind="examples", places=list(range(15)))))[1]
            for _ in range(repetitions)
        ),
    }
    with Chromium() as chromium, tempfile.TemporaryDirectory() as folder:
        view = StandIn(chromium, widget, Path(folder), TRAITS)
        view.wait("document.querySelector('.reading .turn')")
        view.page.value(PROBE)
        times["first paint of the view"] = statistics.median(
            view.page.value("timed(() => window.draw_again())") for _ in range(repetitions)
        )
        for name, steps in ACTIONS.items():
            found = []
            for _ in range(repetitions):
                for step in steps:
                    found.append(view.page.value(f"timed(async () => {{ {step}; }})"))
                    view.pump()
            times[name] = statistics.median(found)
        sizes = {
            "columns: bytes for each example": round(sum(len(one) for one in widget.columns.values()) / n, 1),
            "saved with the notebook, kB": round(len(json.dumps(widget.saved)) / 1000, 1),
        }
    return {name: round(value, 1) for name, value in times.items()} | sizes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", type=int, nargs="+", default=[1_000, 10_000])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not CHROMIUM:
        sys.exit("no Chromium on the PATH: nothing to measure")
    report = dict(
        about="example browser",
        code=code_version(),
        machine=f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        milliseconds={str(n): measure(n, options.repetitions) for n in options.examples},
    )
    print(json.dumps(report, indent=1))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
