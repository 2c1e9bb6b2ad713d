"""Who draws what, by full names. Filled by concept_tda/__init__.py, read by foundation.display."""

from collections.abc import Callable

VIEWS: dict[str, str | Callable] = {}
