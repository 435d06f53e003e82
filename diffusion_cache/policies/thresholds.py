"""What policies that compare with a threshold share."""

from ..errors import ConfigError


def check_threshold(policy: str, threshold: float) -> None:
    """ConfigError unless a threshold is a number ≥ 0; infinity never computes for its sake."""
    if not threshold >= 0:
        raise ConfigError(f"{policy}: threshold must be a number ≥ 0, not {threshold}")
