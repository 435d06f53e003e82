"""Measuring quality and speed: runs, metrics, rivals and the report over them."""
