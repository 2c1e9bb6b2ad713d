"""Looking at a result: in a notebook, in one HTML file"""

from concept_tda._lazy import floor

__getattr__, __dir__ = floor(__name__)
