"""What kinds of data: features of the activations, groups of examples, and what a file teaches unasked"""

from concept_tda._lazy import floor

__getattr__, __dir__ = floor(__name__)
