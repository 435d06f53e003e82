"""Which tokens show what moves: a stand-in for a segmentation of the finished video."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from ..ops import double
from ..signals import Grid


def latent_motion(latents: Tensor, grid: Grid) -> Tensor:
    """The tokens whose latents change most from frame to frame: bool [n, frames·height·width].

    latents: of finished videos, [n, C, F, H, W]. grid: frames, height and width of the tokens. The change of a place is
    the mean over channels of |z_f − z_f±1|, averaged over its two neighbours in time and the patch of a token; the
    threshold is Otsu's, for each video its own, and lies between two groups however large they are.

    Raises:
        ConfigError: for latents without frames, or with a single one.
    """
    if latents.ndim != 5 or latents.shape[2] < 2:
        raise ConfigError(
            f"motion needs the latents of videos, [n, C, F, H, W] with two frames or more, not {list(latents.shape)}: "
            "give a foreground mask instead"
        )
    change = latents.float().diff(dim=2).abs().mean(1, keepdim=True)
    change = torch.cat([change[:, :, :1], change, change[:, :, -1:]], dim=2)
    change = (change[:, :, 1:] + change[:, :, :-1]) / 2
    by_token = F.adaptive_avg_pool3d(change, grid).flatten(1)
    return by_token > torch.stack([otsu(row) for row in by_token])[:, None]


def otsu(values: Tensor) -> Tensor:
    """The value up to which values [n] belong to the lower of two groups, so that the groups' means differ most."""
    ranked = double(values).sort().values
    sums, below = ranked.cumsum(0), torch.arange(1, len(ranked), device=ranked.device)
    above = len(ranked) - below
    apart = (sums[-1] - sums[:-1]) / above - sums[:-1] / below
    return ranked[(below * above * apart**2).argmax()].to(values)
