"""Denoisers made for one accident each: blocks that write into their input, signals that cannot be taken, and what is
left of a run when it is over.
"""

import contextvars
import gc
import weakref

import pytest
import torch
from torch import nn

import diffusion_cache as dc
from diffusion_cache import reference
from diffusion_cache.engine import signals
from diffusion_cache.engine.intercept import ATTRIBUTE
from diffusion_cache.errors import ConfigError, DiffusionCacheWarning
from diffusion_cache.history import History

WIDTH, STEPS = 16, 8


class Block(nn.Module):
    def __init__(self, writes):
        super().__init__()
        self.norm, self.linear, self.writes = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), writes

    def forward(self, hidden_states, temb):
        change = self.linear(self.norm(hidden_states) + temb)
        if self.writes:
            hidden_states += change
            return hidden_states
        return hidden_states + change


class Denoiser(nn.Module):
    """writes: its blocks add to their input in place."""

    def __init__(self, writes=False):
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([Block(writes) for _ in range(4)])

    def forward(self, hidden_states, timestep):
        hidden_states, temb = self.enter(hidden_states), torch.sin(timestep).view(-1, 1, 1)
        for block in self.blocks:
            hidden_states = block(hidden_states, temb)
        return self.leave(hidden_states)


def loop(model, run=None, rows=1, steps=STEPS):
    x = torch.randn(rows, 8, WIDTH, generator=torch.Generator().manual_seed(1))
    for step in range(steps):
        x = x - 0.1 * model(x, torch.full((rows,), 1 - step / steps))
        if run is not None:
            run.next_step()
    return x


def intercepted(model):
    return [module for module in model.modules() if ATTRIBUTE in vars(module)]


@pytest.mark.parametrize(
    "method",
    [{"policy": "interval", "every": 3}, {"policy": "dicache", "threshold": 0.02}],
    ids=lambda m: m["policy"],
)
def test_blocks_that_write_into_their_input_in_inference_mode(method):
    """Tensors do not count there how often they are written into; the same comes out, and the same is computed."""
    model, found = Denoiser(writes=True).eval(), []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), dc.run(model, forecaster="reuse", num_steps=STEPS, **method) as run:
            found.append((loop(model, run).clone(), [record.computed for record in run.summary().records]))
    (expected, computed), (images, also) = found
    assert 0 < sum(computed) < STEPS
    assert also == computed
    assert torch.allclose(images, expected, atol=1e-6)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_blocks_that_write_into_their_input_are_stored_from_the_first_step_on(mode):
    """So that a first run is like those after it."""
    model, reused = Denoiser(writes=True).eval(), []
    with mode(), dc.run(model, "interval", "reuse", every=2, num_steps=STEPS, scope="block") as run:
        loop(model, run)
        reused += [record.spans_reused for record in run.summary().records]
    assert reused == [0, 4] * (STEPS // 2)


def test_what_a_first_block_adds_is_not_taken_for_what_it_gives():
    """Where it writes into its input and that was not copied, which inference tensors are, steps are computed."""
    model = Denoiser(writes=True).eval().requires_grad_(False)
    method = dict(policy="first_block", threshold=0.2, forecaster="reuse", num_steps=STEPS)
    expected = loop(model)
    with torch.inference_mode(), dc.run(model, **method) as run:
        loop(model, run)
        assert run.summary().computed < STEPS
    told = pytest.warns(DiffusionCacheWarning, match="the first block before blocks.* writes into what it is given")
    with told, torch.no_grad(), dc.run(model, **method) as run:
        assert torch.equal(loop(model, run), expected)
        assert run.summary().computed == STEPS


@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_forecasts_that_are_compared_have_weights_for_every_row(monkeypatch, rows):
    """Kernels take no others, where plain PyTorch would broadcast."""
    tables, forecast = [], signals.ops.forecast

    def noted(base, features, weights):
        tables.append(len(weights))
        return forecast(base, features, weights)

    model = Denoiser().eval()
    with monkeypatch.context() as patched, dc.run(model, "racer", every=3, num_steps=STEPS) as run:
        patched.setattr(signals.ops, "forecast", lambda *args: noted(*args) if len(args) == 3 else forecast(*args))
        loop(model, run, rows)
    assert tables
    assert set(tables) == {rows}


class Listing(Denoiser):
    """Takes and returns a tensor for each sample, in a list."""

    def forward(self, hidden_states, timestep):
        return [super(Listing, self).forward(each, timestep[:1]) for each in hidden_states]


@torch.no_grad()
def test_forecasts_that_cannot_be_compared_are_told():
    model = Listing().eval()
    samples = [torch.randn(4, 8, WIDTH), torch.randn(4, 8, WIDTH)]

    def runs():
        with dc.run(model, "racer", every=3, scope="denoiser", num_steps=STEPS) as run:
            for step in range(STEPS):
                model(samples, torch.full((2,), 1 - step / STEPS))
                run.next_step()

    with pytest.raises(ConfigError, match=r"'racer' compares forecasts of samples, and .* has a row for each"):
        runs()
    assert not intercepted(model)


@torch.no_grad()
def test_a_signal_that_fails_has_the_step_computed(monkeypatch):
    model = Denoiser().eval()
    expected = loop(model)

    def fails(entry):
        raise RuntimeError("out of luck")

    def cached():
        with dc.run(model, "first_block", threshold=1e9, num_steps=STEPS) as run:
            return loop(model, run), run.summary().computed

    with monkeypatch.context() as patched:
        patched.setitem(signals.TAKEN, "probe_residual", fails)
        with pytest.warns(DiffusionCacheWarning, match="taking signals") as told:
            images, computed = cached()
    assert len(told) == 1
    assert computed == STEPS
    assert torch.equal(images, expected)
    assert cached()[1] == 1


def histories():
    gc.collect()
    return [found for found in gc.get_objects() if isinstance(found, History) and found.slots]


@pytest.mark.parametrize("device", ["model", "cpu"])
@torch.no_grad()
def test_features_do_not_outlive_their_run(device):
    model, before = Denoiser().eval(), len(histories())
    # of one step more: after the last one nothing is held already
    with dc.run(model, "interval", every=2, cache_device=device, num_steps=STEPS + 1) as run:
        loop(model, run)
        assert len(histories()) > before
    assert len(histories()) == before
    assert run.summary().cache_bytes > 0


@torch.no_grad()
def test_what_was_resident_is_known_after_the_run():
    """Also what the first guidance pass gave for the second."""
    model = Denoiser().eval()

    def guided(x, t):
        conditional, unconditional = model(x, t), model(x + 1, t)
        return conditional + 0.5 * (conditional - unconditional)

    options = {"every": 2, "unconditional_every": 2, "cache_device": "cpu", "num_steps": STEPS}
    with dc.run(model, "interval", **options) as run:
        loop(guided, run)
        inside = run.summary().resident_bytes
    assert run.summary().resident_bytes == inside > 0


@torch.no_grad()
def test_a_run_that_ends_in_another_context_leaves_nothing_on_the_model():
    model = Denoiser().eval()
    expected = loop(model)
    running = dc.run(model, "interval", every=2, num_steps=STEPS)
    contextvars.copy_context().run(running.__enter__)
    assert intercepted(model)
    with pytest.warns(DiffusionCacheWarning, match="left in another thread or task than it was entered in"):
        contextvars.copy_context().run(running.__exit__, None, None, None)
    assert not intercepted(model)
    assert torch.equal(loop(model), expected)


def test_a_denoiser_that_was_replaced_is_not_kept_alive():
    name = "dit-digits"
    pipe, other = reference.load(name), reference.load(name).transformer
    with dc.cached(pipe, "interval", every=2):
        pipe(**reference.inputs(name, [1], [1], 2))
        gone = [weakref.ref(pipe.transformer), weakref.ref(pipe.transformer.transformer_blocks[0])]
        pipe.register_modules(transformer=other)
        for _ in range(2):
            pipe(**reference.inputs(name, [1], [1], 2))
        gc.collect()
        assert [each() for each in gone] == [None, None]
