"""Published systems: where their papers cache, when they compute, with what they forecast. One file each."""

from .base import DENOISER_KINDS, Parts, System

__all__ = ["DENOISER_KINDS", "Parts", "System"]
