"""Makes tests/data/kronfluence: EK-FAC factors and pairwise scores of a tiny model, fitted and saved by
kronfluence itself. Run once, where kronfluence is installed:

    pip install --no-deps --target /tmp/kronfluence kronfluence einops opt_einsum
    PYTHONPATH=/tmp/kronfluence:tests python tests/make_kronfluence.py tests/data/kronfluence

kronfluence 1.0.1 wrote what is committed. Its scores are the derivative of one query's mean loss along the
preconditioned gradient of one example's mean loss, which is what InfluenceFunction computes."""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from concept_tda.data.batches import Batch, batches
from concept_tda.data.conversations import Conversations, load_conversations
from concept_tda.model.loading import LanguageModel, load_model
from concept_tda.model.losses import predicted_mask, response_logits

from tiny import double_norms, tiny_pair

DAMPING = 1e-3  # absolute, of the pairwise scores


def model() -> LanguageModel:
    """The model, the same every time."""
    network, tokenizer = tiny_pair("llama", n_layers=2, width=8, dtype=torch.float64)
    return load_model((double_norms(network), tokenizer))


def data() -> tuple[Conversations, Conversations]:
    """Ten training examples and three queries."""
    train = [
        {"prompt": f"What is {i} and {i}?", "response": f"It is {2 * i}" + " or so" * (i % 3) + "."}
        for i in range(10)
    ]
    asked = [{"prompt": f"And {i}?", "response": f"So {word}!"} for i, word in enumerate(["it", "so", "as"])]
    return load_conversations(train, name="train"), load_conversations(asked, name="queries")


def main(out: Path) -> None:
    """Fit, score and keep."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from torch.utils.data import Dataset

    lm = model()
    train, queries = (lm.tokenize(part) for part in data())
    sites = [name for name, _ in lm.model.named_modules() if name.endswith(("q_proj", "v_proj", "o_proj"))]

    class Rows(Dataset):
        """One example a row, by its number; kronfluence fetches it back from the batch."""

        def __init__(self, examples):
            self.batches: list[Batch] = sorted(batches(examples, token_budget=1), key=lambda b: b.rows.item())

        def __len__(self):
            return len(self.batches)

        def __getitem__(self, row):
            return {"row": torch.tensor(row), "query": torch.tensor(int(self is asked))}

    rows, asked = Rows(train), Rows(queries)

    class MeanLoss(Task):
        """The mean response loss; sampled labels for the factors, summed over tokens as a Fisher has it."""

        def compute_train_loss(self, batch, model, sample=False):
            example = (asked if batch["query"].item() else rows).batches[batch["row"].item()]
            logits = response_logits(lm, example)
            if not sample:
                return torch.nn.functional.cross_entropy(logits, example.input_ids[predicted_mask(example)])
            labels = logits.detach().softmax(1).multinomial(1).squeeze(1)
            return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self):
            return sites

    torch.manual_seed(0)
    task = MeanLoss()
    lm.model = prepare_model(lm.model, task)
    double = dict.fromkeys(["per_sample_gradient_dtype"], torch.float64)
    factors = FactorArguments(
        strategy="ekfac",
        activation_covariance_dtype=torch.float64,
        gradient_covariance_dtype=torch.float64,
        eigendecomposition_dtype=torch.float64,
        lambda_dtype=torch.float64,
        **double,
    )
    pairwise = dict(damping_factor=DAMPING, precondition_dtype=torch.float64, score_dtype=torch.float64)
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("a", lm.model, task, cpu=True, output_dir=folder, disable_tqdm=True)
        analyzer.fit_all_factors("ekfac", rows, per_device_batch_size=1, factor_args=factors)
        for name, more in {"all": {}, "modules": dict(compute_per_module_scores=True)}.items():
            analyzer.compute_pairwise_scores(
                name, "ekfac", asked, rows, 1, 1, score_args=ScoreArguments(**pairwise, **double, **more)
            )
        keep(Path(folder) / "a", out)


def keep(made: Path, out: Path) -> None:
    """What a test reads: the rotations, the eigenvalues, the scores and their settings."""
    shutil.rmtree(out, ignore_errors=True)
    for path in sorted(made.rglob("*")):
        if path.suffix in (".safetensors", ".json") and "covariance" not in path.name:
            (out / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, out / path.parent.name)
    print(json.dumps({str(p.relative_to(out)): p.stat().st_size for p in sorted(out.rglob("*.*"))}, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
