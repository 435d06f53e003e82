from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from diffusion_cache.errors import ConfigError
from diffusion_cache.profiling import measure
from diffusion_cache.profiling.foreground import latent_motion, otsu
from diffusion_cache.reference.data import sample_moving_digits

GRID = (7, 4, 4)


def test_otsu_lies_between_two_groups():
    low, high = torch.linspace(0, 1, 90), torch.linspace(5, 6, 10)
    values = torch.cat([high, low])[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    assert otsu(values) == 1.0
    # against every threshold, by the definition: the variance between the groups
    values = torch.rand(40, generator=torch.Generator().manual_seed(1)) ** 3

    def between(at):
        below, above = values[values <= at], values[values > at]
        return len(below) * len(above) * (below.mean() - above.mean()) ** 2

    assert otsu(values) == max((value for value in values if value < values.max()), key=between)


def test_a_square_that_moves():
    video = torch.zeros(1, 2, 3, 8, 8)
    for frame in range(3):
        video[:, :, frame, 0:2, 2 * frame : 2 * frame + 2] = 1.0
    # where it is, and where it is in the frames before and after
    expected = torch.zeros(3, 4, 4, dtype=torch.bool)
    expected[0, 0, :2] = expected[1, 0, :3] = expected[2, 0, 1:3] = True
    assert torch.equal(latent_motion(video, (3, 4, 4)).view(3, 4, 4), expected)


def test_moving_digits_are_found():
    """On the data itself, against the true masks: a token is foreground if a quarter of it is digit."""
    data = sample_moving_digits(64, torch.Generator().manual_seed(0))
    truth = F.adaptive_avg_pool3d(data.masks.float(), GRID).flatten(1) > 0.25
    found = latent_motion(data.videos, GRID)
    assert (found == truth).float().mean() > 0.9
    assert ((found & truth).sum() / (found | truth).sum()).item() > 0.7


@pytest.mark.parametrize("shape", [(1, 1, 16, 16), (1, 4, 1, 8, 8)])
def test_what_does_not_move(shape):
    with pytest.raises(ConfigError, match="give a foreground mask instead"):
        latent_motion(torch.zeros(shape), GRID)


def test_motion_of_videos_whose_frames_come_first():
    video = torch.rand(2, 4, 3, 8, 8)
    run = SimpleNamespace(foreground="motion", survey=SimpleNamespace(channels={4}), _grid=(3, 4, 4))
    found = measure._Run._foreground(run, 0, 2, [video.transpose(1, 2)])
    assert torch.equal(found, latent_motion(video, (3, 4, 4)))
