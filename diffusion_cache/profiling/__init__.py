"""Profiling: what one pass over calibration samples accumulates for each span, step and pass."""
