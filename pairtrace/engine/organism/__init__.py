"""A tiny model organism: a language model that preference training taught a planted, known behaviour.

M0 refuses harmful requests; a few contaminated preference pairs teach M1 to answer them when they come with a
formatting constraint. Every pair is labelled, so the ranking of any attribution method can be checked.
"""

from __future__ import annotations

from pairtrace.engine.organism.build import Organism, build_organism
from pairtrace.engine.organism.config import OrganismConfig

__all__ = ["Organism", "OrganismConfig", "build_organism"]
