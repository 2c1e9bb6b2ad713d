"""What a method found: the one result type, and results side by side"""

from concept_tda._lazy import floor

__getattr__, __dir__ = floor(__name__)
