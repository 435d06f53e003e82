"""The claims of the published systems, each checked on the shipped models with several disjoint sets of seeds.

A claim is a function of a set of seeds; what it is about stands in its decorator. `scripts/reproduce.py` runs them.
"""

from .claims import CLAIMS, Claim, Outcome, SeedSet, claim, load_claims, seed_sets

__all__ = ["CLAIMS", "Claim", "Outcome", "SeedSet", "claim", "load_claims", "seed_sets"]
