"""Where 0.1 kept the base of all errors. Test cases outside of this repository import it from here."""

from concept_tda.foundation.errors import ConceptTDAError

__all__ = ["ConceptTDAError"]
