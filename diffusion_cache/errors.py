"""Errors and warnings of diffusion_cache."""


class DiffusionCacheError(Exception):
    """Base of everything this package raises on purpose."""


class ConfigError(DiffusionCacheError, ValueError):
    """A name, option or combination that cannot work; the message says what to do."""


class NoSpansError(DiffusionCacheError):
    """The model has nothing to cache at the scope asked for."""


class DiffusionCacheWarning(UserWarning):
    """Something did not go as asked, and generation went on without it (the message says what)."""
