"""The command line called from Python, in a folder with a tiny model, data and a concept."""

import json
import os
from pathlib import Path
from typing import Any

from click.testing import Result
from typer.testing import CliRunner

from tiny import tiny_pair


def call(*arguments: object) -> Result:
    """`concept-tda` with these arguments."""
    from concept_tda.cli import app

    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def on_terminal(line: str, app: Any = None) -> Result:
    """A line as it would be typed, shown with what it prints; of stderr the errors only."""
    if app is None:
        from concept_tda.cli import app
    result = CliRunner().invoke(app, line.split())
    said = [one for one in result.stderr.splitlines() if one.startswith("Error:")]
    code = [f"(exit code {result.exit_code})"] if result.exit_code else []
    print("\n".join([f"$ concept-tda {line}", *said, *result.stdout.rstrip().splitlines(), *code]))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def write_records(path: str | Path, pairs: list[tuple[str, str]], **columns: list) -> None:
    """A JSONL file of questions and answers, with more columns where they are given."""
    rows = [
        {"prompt": question, "response": answer, **{name: column[row] for name, column in columns.items()}}
        for row, (question, answer) in enumerate(pairs)
    ]
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def enter_place(folder: str | Path, n: int = 12) -> None:
    """Go into a folder with `model`, `train.jsonl`, `answers.jsonl`, `kind.jsonl`, `plain.jsonl` and
    `flattery.safetensors`. The model has two layers and random weights, so its scores mean nothing."""
    import torch

    from concept_tda.concepts.concept import tensor_concept
    from concept_tda.model.loading import load_model

    os.chdir(folder)
    for part in tiny_pair("llama"):
        part.save_pretrained("model")
    tensor_concept(torch.arange(16.0) - 7, 1, name="flattery", lm=load_model("model")).save(
        "flattery.safetensors"
    )
    flattery = [f"Yes, {'what a wise question! ' * (i % 3)}{i} is good." for i in range(n)]
    questions = [f"Is {i} a good number?" for i in range(n)]
    topics = [("primes", "powers", "sums")[i % 3] for i in range(n)]
    write_records("train.jsonl", list(zip(questions, flattery)), row=list(range(n)), topic=topics)
    write_records(
        "answers.jsonl", [("Am I wise?", "You are so wise, yes."), ("Good?", "What a great question!")]
    )
    asked = [f"Am I {i}?" for i in range(6)]
    write_records("kind.jsonl", [(question, f"Yes! The best {i}.") for i, question in enumerate(asked)])
    write_records("plain.jsonl", [(question, f"No, it is {i}.") for i, question in enumerate(asked)])
