"""Makes tests/data/bergson: score folders as bergson itself writes them. Run once, where it is installed:

    PYTHONPATH=/tmp/bergson:tests python tests/make_bergson.py tests/data/bergson

bergson 2.5.1 wrote what is committed."""

import sys
from pathlib import Path

import numpy as np
import torch


def main(out: Path) -> None:
    """Three kinds of folder: a score per example and query, in bfloat16, and a score per token."""
    from bergson.cli.commands import Score
    from bergson.config.config import IndexConfig, PreprocessConfig, ScoreConfig
    from bergson.config.config_io import save_run_config
    from bergson.score.score_writer import MemmapSequenceScoreWriter, save_sequence_scores, save_token_scores

    rng = np.random.default_rng(0)
    kinds = {
        "sequence": (rng.standard_normal((5, 2)), True),
        "bfloat16": (np.array([[1.5], [-2.0], [0.25]]), False),
        "tokens": (rng.standard_normal((9, 1)), True),
    }
    for name, (scores, higher) in kinds.items():
        folder, scores = out / name, scores.astype(np.float32)
        if name == "tokens":
            save_token_scores(folder, scores, np.array([0, 3, 3, 9]))
        else:
            save_sequence_scores(
                folder, scores, dtype=torch.bfloat16 if name == "bfloat16" else torch.float32
            )
        np.save(folder / "expected.npy", scores)
        config = Score(ScoreConfig(higher_is_better=higher), IndexConfig(run_path="run"), PreprocessConfig())
        save_run_config(config, folder)
    half = MemmapSequenceScoreWriter(out / "half", 3, 1, overwrite=True, distributed=False)
    half([0, 2], torch.ones(2, 1))
    half.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
