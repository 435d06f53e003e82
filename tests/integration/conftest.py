import accidents
import pytest

import diffusion_cache as dc
from diffusion_cache.engine import patches


@pytest.fixture
def nothing_left():
    """Whatever a test did: once everything is disabled, no class is patched that was not before."""
    before = set(patches._patches)
    yield
    for pipe in accidents.PIPES:
        dc.disable(pipe)
    accidents.PIPES.clear()
    assert set(patches._patches) == before
