"""Which data built a part of the model: circuits, and policies of features"""

from concept_tda._lazy import floor

__getattr__, __dir__ = floor(__name__)
