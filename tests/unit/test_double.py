"""Float64 where the device has it, and nowhere asked of one that has not."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_cache.chunks import Chunks, Ladder
from diffusion_cache.engine.clock import begin_index, noise_levels
from diffusion_cache.engine.sigmas import _follow
from diffusion_cache.fingerprint import Fingerprint
from diffusion_cache.forecasters.fitted import Fit, Fitted
from diffusion_cache.measure import metrics
from diffusion_cache.ops import double
from diffusion_cache.profiling import foreground, polish, trajectory
from diffusion_cache.signals import filtered


class WithoutFloat64(TorchDispatchMode):
    """Tensors cannot be made float64, as on MPS."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.float64:
            raise TypeError("cannot convert to float64")
        return func(*args, **(kwargs or {}))


class Elsewhere(torch.Tensor):
    """On a device that has no float64."""

    device = torch.device("mps")

    def double(self):
        raise TypeError("cannot convert to float64")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


@pytest.fixture
def without_float64(monkeypatch):
    for module in (filtered, foreground, metrics, polish, trajectory):
        monkeypatch.setattr(module, "double", lambda x: torch.from_numpy(x.detach().numpy().astype(np.float64)))
    with WithoutFloat64():
        yield


def test_a_device_without_float64_leaves_it_to_the_cpu():
    value = torch.rand(3)
    assert torch.equal(double(value), value.double())
    assert torch.equal(double(SimpleNamespace(device=torch.device("mps"), cpu=lambda: value)), value.double())


def test_a_sampler_and_chunks_on_such_a_device_are_read_on_the_cpu():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    levels, second = noise_levels(scheduler), float(scheduler.timesteps[1])
    timesteps = scheduler.timesteps = scheduler.timesteps.as_subclass(Elsewhere)
    assert begin_index(scheduler, second) == 1
    moved = SimpleNamespace(timesteps=timesteps, sigmas=scheduler.sigmas.as_subclass(Elsewhere), config={"shift": 1.0})
    assert [*noise_levels(moved)] == [*levels]
    alphas = torch.tensor([0.9, 0.5]).as_subclass(Elsewhere)
    (level,) = noise_levels(SimpleNamespace(timesteps=torch.tensor([1]), alphas_cumprod=alphas, config={}))
    assert level == 0.0
    assert len(Fingerprint.of(SimpleNamespace(scheduler=moved), {}, steps=4).timesteps) == 4
    assert Chunks.of(torch.tensor([[3.0, 7.0]]).as_subclass(Elsewhere), 1, Ladder()).levels == (3.0, 7.0)


def test_noise_levels_are_moved_on_such_a_device():
    timesteps, sigmas = (torch.tensor([value]).as_subclass(Elsewhere) for value in (500.0, 0.5))
    assert _follow(timesteps, sigmas, SimpleNamespace(config=SimpleNamespace(num_train_timesteps=1000)))


def test_what_is_measured_asks_no_device_for_float64(without_float64):
    a, b = torch.rand(2, 2, 3, 8, 8)
    assert metrics.psnr(a, b).dtype == metrics.latent_error(a, b).dtype == torch.float64
    assert filtered.filtered_l1(a, b, torch.zeros(2), 0.5).isfinite().all()
    assert foreground.otsu(torch.rand(9)).dtype == torch.float32
    assert trajectory.guidance_weights([trajectory.aligned(a, a.shape)], 2 * a) == pytest.approx([2.0])


def test_weights_are_polished_without_float64(without_float64):
    direction, wanted = torch.rand(2, 2, 3)

    def generate(fitted, step):
        return direction * fitted.table[1, 0, -1].weights[0]

    def judge(fitted):
        return -float((generate(fitted, None) - wanted).norm())

    start = Fitted({(1, 0, -1): Fit((-1, 0), (0.5, 0.5))}, 2)
    assert judge(polish.polish(start, generate, wanted, judge)) > judge(start)
