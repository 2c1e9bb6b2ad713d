"""Is it true? Retraining without what was blamed"""

from concept_tda._lazy import floor

__getattr__, __dir__ = floor(__name__)
