"""Rival caches, each behind one thin adapter, on the very pipeline that our own methods run on.

A rival is used through its own public functions, with a fresh configuration for every `apply`, from clean state at
every generation, and nothing of it is left on the pipeline afterwards. What that takes beyond the rival's own means
is said at the place. A rival's quality is its own; its accidents (a guidance pass that reads the other's features,
a generation that starts from the last one's state) are kept from happening, so that it is judged at its best.
"""

import importlib.util

from ...errors import ConfigError
from ...registry import unknown_name
from .base import Peer, settings_of
from .cache_dit import CacheDiT, CacheDiTDMD, CacheDiTMask, CacheDiTTaylorSeer
from .deepcache import DeepCache
from .fastercache import DiffusersFasterCache
from .first_block import DiffusersFirstBlock
from .mag import DiffusersMag
from .pab import DiffusersPAB
from .sea import DiffusersSea
from .taylorseer import DiffusersTaylorSeer

__all__ = ["Peer", "peer", "peers", "settings_of"]

peers: dict[str, Peer] = {
    rival.name: rival
    for rival in (
        CacheDiT(),
        CacheDiTTaylorSeer(),
        CacheDiTDMD(),
        CacheDiTMask(),
        DiffusersFirstBlock(),
        DiffusersTaylorSeer(),
        DiffusersMag(),
        DiffusersPAB(),
        DiffusersFasterCache(),
        DiffusersSea(),
        DeepCache(),
    )
}


def peer(name: str) -> Peer:
    """The rival of that name.

    Raises:
        ConfigError: an unknown name, or a package that is not installed.
    """
    if name not in peers:
        raise unknown_name("rival", name, peers)
    found = peers[name]
    if importlib.util.find_spec(found.module) is None:
        raise ConfigError(
            f"rival {name!r} needs the package {found.package}: pip install 'diffusion-cache[peers]', "
            "or leave this rival out"
        )
    return found
