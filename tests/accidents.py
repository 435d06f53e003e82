"""What the tests of accidents share; the fixture that goes with it, `nothing_left`, is in integration/conftest.py."""

import contextlib
import warnings

import diffusion_cache as dc
from diffusion_cache import reference
from diffusion_cache.engine import intercept

DIT, UNET, FLUX, WAN = "dit-digits", "unet-digits", "flux-digits", "wan-moving-digits"
PIPES = []  # made in the test that runs


def made(pipe):
    PIPES.append(pipe)
    return pipe


def load(name, **options):
    return made(reference.load(name, **options))


def denoiser_of(name, pipe):
    return getattr(pipe, reference.spec(name).denoiser)


def untouched(module):
    return not [name for name, child in module.named_modules() if intercept.ATTRIBUTE in vars(child)]


@contextlib.contextmanager
def warned(count, match):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    messages = [str(w.message) for w in caught if issubclass(w.category, dc.DiffusionCacheWarning)]
    assert len(messages) == count, messages
    assert all(match in message for message in messages)


class Stop(Exception):
    pass
