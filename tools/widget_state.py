"""Notebooks keep the state of every widget that was ever made in them, drawn or not. This takes away
the states that no output shows, and the progress bars of the run: stopped, they tell a reader nothing.

    python tools/widget_state.py                  # all notebooks
    python tools/widget_state.py nbs/99_cli.ipynb"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STATE, VIEW = "application/vnd.jupyter.widget-state+json", "application/vnd.jupyter.widget-view+json"


def shown(notebook: dict) -> dict[str, dict]:
    """The states of the widgets that an output shows, and of those that these are made of."""
    states = notebook["metadata"].get("widgets", {}).get(STATE, {}).get("state", {})
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    views = [output["data"][VIEW]["model_id"] for output in outputs if VIEW in output.get("data", {})]
    found, to_see = {}, views
    while to_see:
        name = to_see.pop()
        if name in found or name not in states:
            continue
        found[name] = states[name]
        to_see += re.findall(r"IPY_MODEL_(\w+)", json.dumps(states[name]))
    return {name: state for name, state in states.items() if name in found}


def is_bar(output: dict) -> bool:
    """Whether an output is a progress bar as tqdm draws it."""
    data = output.get("data", {})
    return VIEW in data and bool(re.search(r"\d+%\|", "".join(data.get("text/plain", ""))))


def without_bars(notebook: dict) -> int:
    """Take the progress bars out of a notebook's outputs. How many there were."""
    number = 0
    for cell in (cell for cell in notebook["cells"] if cell.get("outputs")):
        kept = [output for output in cell["outputs"] if not is_bar(output)]
        number += len(cell["outputs"]) - len(kept)
        cell["outputs"] = kept
    return number


def stale(notebook: dict) -> list[str]:
    """Names of the states that nothing shows."""
    states = notebook["metadata"].get("widgets", {}).get(STATE, {}).get("state", {})
    return sorted(set(states) - set(shown(notebook)))


def clean(path: Path) -> int:
    """Take them out of a notebook. How many there were."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    number, found = without_bars(notebook), stale(notebook)
    if number or found:
        if left := shown(notebook):
            notebook["metadata"]["widgets"][STATE]["state"] = left
        else:
            notebook["metadata"].pop("widgets", None)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return number + len(found)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:] or sorted((ROOT / "nbs").rglob("*.ipynb"))):
        if number := clean(path):
            print(f"{path}: {number} bars and states of widgets that nothing shows")
