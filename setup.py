"""Reads the package's metadata, dependencies and extras from settings.ini.

pyproject.toml declares these fields `dynamic`, so that setuptools takes them from here; the fields that never
change stand in pyproject.toml itself. The extra `all` is everything a user (not a
developer) can need on one machine; `ray` is for clusters."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

STATUSES = {
    "1": "1 - Planning",
    "2": "2 - Pre-Alpha",
    "3": "3 - Alpha",
    "4": "4 - Beta",
    "5": "5 - Production/Stable",
}
USER_EXTRAS = ("sae", "judge", "quantised")

parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
settings = parser["DEFAULT"]
package = settings["lib_path"]


def requirements(key):
    """The lines of a key of settings.ini."""
    return [line.strip() for line in settings[key].splitlines() if line.strip()]


extras = {
    key.removesuffix("_requirements"): requirements(key) for key in settings if key.endswith("_requirements")
}
extras["all"] = [requirement for name in USER_EXTRAS for requirement in extras[name]]

setup(
    version=settings["version"],
    install_requires=requirements("requirements"),
    extras_require=extras,
    classifiers=[
        f"Development Status :: {STATUSES[settings['status']]}",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=find_packages(include=[package, f"{package}.*"]),
    package_data={package: ["bundled/**/*", "static/*"]},
    entry_points={
        "console_scripts": requirements("console_scripts"),
        "nbdev": [
            f"{package}={package}._modidx:d"
        ],  # lets nbdev link `names` in other projects' pages to ours
    },
)
