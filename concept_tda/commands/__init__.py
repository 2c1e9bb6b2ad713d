"""The commands of the terminal: `concept-tda`"""

from concept_tda._lazy import floor

__getattr__, __dir__ = floor(__name__)
