"""What every floor stands on: errors, and files that survive a kill"""

from concept_tda._lazy import floor

__getattr__, __dir__ = floor(__name__)
