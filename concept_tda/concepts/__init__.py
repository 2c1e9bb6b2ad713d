"""A behaviour: as a direction in the model, as a number on its answers"""

from concept_tda._lazy import floor

__getattr__, __dir__ = floor(__name__)
