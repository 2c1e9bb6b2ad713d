"""Who draws what, by full names. Filled by concept_tda/__init__.py, read by concept_tda.foundation.display."""

from collections.abc import Callable

VIEWS: dict[str, str | Callable] = {}
