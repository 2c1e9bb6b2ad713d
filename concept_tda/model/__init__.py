"""A language model: opening it, its sites, its losses, its activations, fine-tuning it"""

from concept_tda._lazy import floor

__getattr__, __dir__ = floor(__name__)
