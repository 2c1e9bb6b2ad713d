"""Which training examples push: gradients, curvature, queries, the engine and the methods"""

from concept_tda._lazy import floor

__getattr__, __dir__ = floor(__name__)
