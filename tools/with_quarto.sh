#!/usr/bin/env bash
# Runs a command with a `quarto` on PATH: the real one where installed, otherwise (or with STAND_IN=1) tools/stand_in/quarto.
set -euo pipefail
cd "$(dirname "$0")/.."
# The environment's python; our page processor (tools/); the tiny models that some notebooks show things on (tests/).
export PATH="$PWD/.venv/bin:$PATH" PYTHONPATH="$PWD/tools:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "${STAND_IN:-}" ] || ! command -v quarto >/dev/null; then export PATH="$PWD/tools/stand_in:$PATH"; fi
exec "$@"
