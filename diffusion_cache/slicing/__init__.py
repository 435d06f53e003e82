"""Less memory: a denoiser's operators run on slices of frames, positions or tokens, with the output unchanged.

Streamlined Inference (NeurIPS 2024): its feature slicer and its operator grouping. What can run in slices is declared
in `table.py`, by class; `runner.py` runs one module in slices of the size that fits.
"""

from .features import SlicedFeatures, slice_features

__all__ = ["SlicedFeatures", "slice_features"]
