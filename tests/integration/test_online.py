"""Policies that look at a run while it goes on, in real runs: their formulas on what the model took and gave."""

import math
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
import zoo
from walks import BATCH, STEPS, call, model_of, walk

import diffusion_cache as dc
from diffusion_cache import reference
from diffusion_cache.context import SCOPES, Needs, Policy, Verdict
from diffusion_cache.policies import MagCache
from diffusion_cache.profile import Profile, shipped_profiles
from diffusion_cache.signals import filtered_l1

LEVELS = [-4.0 + step for step in range(STEPS)]
FLUX, UNET = "flux-digits", "unet-digits"


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.fixture(scope="module")
def latents():
    return walk()


def reasons(model, latents, **options):
    """Why each step was computed or reused, and the outputs."""
    with dc.run(model, forecaster="reuse", num_steps=STEPS, noise_levels=LEVELS, **options) as run:
        outputs = []
        for step, x in enumerate(latents):
            run.next_step()
            outputs.append(call(model, x, step))
    return [record.reason for record in run.summary().records], outputs


@contextmanager
def attended(model):
    """What the first attention is given, call by call."""
    seen = []
    attention = model.transformer_blocks[0].attn1
    hook = attention.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    yield seen
    hook.remove()


def l1(now, before):
    return ((now - before).abs().mean() / before.abs().mean()).item()


def summed(increments, threshold):
    """The reasons that a sum of these increments gives; None: there is none yet."""
    total, found = 0.0, ["warm-up"]
    for increment in increments:
        if increment is None:
            found.append("nothing to compare with")
            continue
        total += increment
        found.append(f"sum {total:.3g}")
        total = total if total < threshold else 0.0
    return found


def own_sample(row, model, latents, **options):
    return reasons(model, latents[:, row : row + 1], **options)[0]


@pytest.mark.parametrize("row", range(BATCH))
def test_teacache_on_what_the_first_attention_receives(model, latents, row):
    with attended(model) as seen:
        for step, x in enumerate(latents):
            call(model, x[row : row + 1], step)
    changes = [l1(now, before) for before, now in pairwise(seen)]
    increments = [2 * change**2 + 0.5 * change for change in changes]
    threshold = 2.5 * sum(increments) / len(increments)
    found = own_sample(row, model, latents, policy="teacache", threshold=threshold, coefficients=(2.0, 0.5, 0.0))
    assert found == summed(increments, threshold)


@pytest.mark.parametrize("row", range(BATCH))
def test_seacache_on_latents(model, latents, row):
    x = latents[:, row : row + 1]
    increments = [filtered_l1(x[s], x[s - 1], LEVELS[s], LEVELS[s - 1]).item() for s in range(1, STEPS)]
    threshold = 2.5 * sum(increments) / len(increments)
    found = own_sample(row, model, latents, policy="seacache", threshold=threshold, scope="denoiser")
    assert found == summed(increments, threshold)


@pytest.mark.parametrize("row", range(BATCH))
def test_easycache_on_what_the_denoiser_takes_and_gives(model, latents, row):
    x = latents[:, row : row + 1]
    y = [call(model, x[step], step) for step in range(STEPS)]
    threshold, total, computed, kappa, expected = 0.5, 0.0, [0], None, ["warm-up"]
    for step in range(1, STEPS):
        if kappa is None:
            expected.append("nothing to compare with")
            reuse = False
        else:
            total += kappa * ((x[step] - x[step - 1]).abs().mean() / y[computed[-1]].abs().mean()).item()
            expected.append(f"sum {total:.3g}")
            reuse = total < threshold
        if not reuse:
            last, total = computed[-1], 0.0
            kappa = ((y[step] - y[last]).abs().mean() / (x[step] - x[last]).abs().mean()).item()
            computed.append(step)
    assert 2 < len(computed) < STEPS
    assert own_sample(row, model, latents, policy="easycache", threshold=threshold) == expected


METHODS = [
    dict(policy="teacache", threshold=3.2),
    dict(policy="seacache", threshold=0.5, scope="denoiser"),
    dict(policy="seacache", threshold=0.3, scope="stack"),
    dict(policy="easycache", threshold=0.8),
]


@pytest.mark.parametrize("options", METHODS, ids=str)
@pytest.mark.parametrize("sync", ["immediate", "lagged"])
def test_a_batch_decides_for_each_sample_as_if_it_were_alone(model, latents, options, sync):
    together, outputs = reasons(model, latents, **options, sync=sync)
    assert any("of 3 samples" in reason for reason in together)
    for row in range(BATCH):
        _, alone = reasons(model, latents[:, row : row + 1], **options, sync=sync)
        for whole, single in zip(outputs, alone, strict=True):
            torch.testing.assert_close(whole[row : row + 1], single, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_nan_is_computed(model, latents, options):
    broken = latents.clone()
    broken[4] = math.nan
    found, outputs = reasons(model, broken[:, :1], **options | {"threshold": math.inf})
    assert found[4:6] == ["sum nan", "sum nan"]  # the change to it and the one from it
    assert outputs[4].isnan().all()
    assert all(output.isfinite().all() for step, output in enumerate(outputs) if step != 4)


@dataclass(frozen=True)
class Watching(Policy):
    """Reuses two of three steps, and keeps all that it is shown."""

    named: tuple = ()
    probe: int = 0
    shown: list = field(default_factory=list)
    given: list = field(default_factory=list)

    scopes = frozenset(SCOPES)

    @property
    def needs(self):
        return Needs(signals=self.named, previous=1, probe=self.probe)

    def measure(self, signals, past):
        self.shown.append((dict(signals), past))
        return torch.zeros(len(next(iter(signals.values()))))

    def remember(self, signals, past):
        self.given.append(signals)
        return {}

    def decide(self, step, value, state):
        return Verdict(step.index % 3 == 0, "every third")


@contextmanager
def noted(module, output=False):
    """What a module is called with, or what it gives."""
    seen = []
    if output:
        hook = module.register_forward_hook(lambda module, args, given: seen.append(given))
    else:
        hook = module.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    yield seen
    hook.remove()


def test_signals_of_a_transformer_are_what_its_modules_take_and_give():
    pipe = reference.load(FLUX)
    named = ("input", "input_map", "probe_input", "probe_residual", "modulated_input", "noise_level", "output")
    policy = Watching(named, probe=1)
    blocks, last = pipe.transformer.transformer_blocks, pipe.transformer.single_transformer_blocks[-1]
    dc.enable(pipe, policy, granularity="batch")
    with noted(pipe.transformer) as calls, noted(blocks[0]) as probes, noted(last, output=True) as out:
        generate(FLUX, pipe, steps=7)
    assert [record.computed for record in dc.summary(pipe).records] == [True, False, False] * 2 + [True]
    levels = 2 * ((1 - pipe.scheduler.sigmas[:-1]) / pipe.scheduler.sigmas[:-1]).log()
    assert [len(policy.shown), len(policy.given), len(probes), len(out)] == [6, 3, 7, 3]
    for step, (signals, past) in enumerate(policy.shown, start=1):
        assert torch.equal(signals["probe_input"], probes[step]["hidden_states"])
        torch.testing.assert_close(signals["input"] - signals["probe_input"], signals["probe_residual"])
        assert signals["noise_level"].tolist() == pytest.approx([levels[step].item()] * 2, rel=1e-5)
        for token, (_, y, x) in enumerate(calls[step]["img_ids"].long().tolist()):
            assert torch.equal(signals["input_map"][:, :, y, x], signals["input"][:, token])
        assert "output" not in signals
        assert "output" not in past.previous
        before = policy.shown[step - 2][0] if step > 1 else policy.given[0]
        assert all(past.previous[name] is before[name] for name in named[:-1])
        assert all(past.computed[name] is policy.given[(step - 1) // 3][name] for name in named)
    for signals, given in zip(policy.given, out, strict=True):
        assert torch.equal(signals["output"], given[1])  # text first


def test_what_enters_an_attention_is_what_it_is_given_when_the_block_runs(model, latents):
    policy = Watching(("modulated_input",))
    with attended(model) as seen:
        reasons(model, latents, policy=policy, granularity="batch", warmup=STEPS)
    assert len(seen) == len(policy.given) == STEPS  # hooks do not run where it is only looked at
    for signals, given in zip(policy.given, seen, strict=True):
        assert torch.equal(signals["modulated_input"], given)


def generate(name, pipe, steps=12):
    return reference.images(name, pipe(**reference.inputs(name, (3, 8), (5, 6), steps=steps)))


SHIPPED = [
    (FLUX, dict(policy="teacache", threshold=0.2)),
    (FLUX, dict(policy="easycache", threshold=0.2, scope="denoiser")),
    (FLUX, dict(policy="seacache", threshold=0.5, scope="denoiser")),
    (FLUX, dict(policy="seacache", threshold=0.5, scope="stack")),
    (FLUX, dict(policy="growing_window")),
    (FLUX, dict(policy=MagCache.from_profile(Profile.from_pretrained(shipped_profiles()["flux-digits-flow-euler"])))),
    (UNET, dict(policy="easycache", threshold=0.9, scope="denoiser")),
    (UNET, dict(policy="seacache", threshold=0.9, scope="denoiser")),
    (UNET, dict(policy="growing_window")),
]


@pytest.mark.parametrize(("name", "options"), SHIPPED, ids=lambda value: str(value)[:60])
@pytest.mark.parametrize("sync", ["immediate", "lagged"])
def test_on_shipped_models(name, options, sync):
    pipe = reference.load(name)
    with dc.cached(pipe, **options, sync=sync):
        first = generate(name, pipe)
        summary = dc.summary(pipe)
        again = generate(name, pipe)
    assert torch.equal(first, again)
    assert 0 < summary.reused < len(summary.records)
    assert torch.isfinite(first).all()


def test_a_window_in_noise_on_a_sampler():
    pipe = reference.load(FLUX)
    with dc.cached(pipe, "teacache", threshold=math.inf, sigma_max=0.9, sigma_min=0.5):
        generate(FLUX, pipe)
        records = dc.summary(pipe).records
    sigmas = pipe.scheduler.sigmas[:-1].tolist()
    assert [not record.computed for record in records] == [0.5 <= sigma <= 0.9 for sigma in sigmas]
    assert {record.reason for record in records if record.computed} == {"warm-up", "outside the window"}


class Unlike(torch.nn.Module):
    """Stands where attention does."""

    def forward(self, x, **conditions):
        return x


def test_where_no_attention_is_reached_an_error_names_another_policy(latents):
    model = model_of()
    model.transformer_blocks[0].attn1 = Unlike()
    plain = call(model, latents[0], 0)
    with pytest.raises(dc.ConfigError, match=r"none is reached .* 'first_block'"):
        reasons(model, latents, policy="teacache")
    assert torch.equal(call(model, latents[0], 0), plain)


def test_looking_at_the_first_attention_leaves_no_trace(latents):
    """Random numbers are drawn as if nothing had been run on the way there."""
    model = model_of(dropout=0.5).train()
    torch.manual_seed(1)
    plain = [call(model, x, step) for step, x in enumerate(latents)]
    torch.manual_seed(1)
    _, cached = reasons(model, latents, policy="teacache", granularity="batch", warmup=STEPS)
    assert all(map(torch.equal, plain, cached))


def added_one(module, args):
    args[0].add_(1.0)


def test_a_block_that_writes_into_what_it_is_given_does_so_once(latents):
    model = model_of()
    model.transformer_blocks[0].norm1.register_forward_pre_hook(added_one)
    plain = [call(model, x, step) for step, x in enumerate(latents)]
    _, cached = reasons(model, latents, policy="teacache", granularity="batch", warmup=STEPS)
    assert all(map(torch.equal, plain, cached))


def test_noise_levels_are_asked_for_where_they_are_not_known(model, latents):
    needed = pytest.raises(dc.ConfigError, match="'seacache' needs the sampler's noise levels")
    with dc.run(model, "seacache", num_steps=STEPS, scope="denoiser"), needed:
        call(model, latents[0], 0)
    with pytest.raises(dc.ConfigError, match="2 noise_levels for 9 steps"):
        dc.run(model, num_steps=STEPS, noise_levels=[1.0, 2.0]).__enter__()


def test_videos_that_come_frames_first_are_turned():
    """CogVideoX takes [rows, frames, C, H, W]."""
    case = next(case for case in zoo.cases() if case.id == "CogVideoXTransformer3DModel")
    model, latents = zoo.build(case), case.inputs(zoo.Draw(1))["hidden_states"]
    for scope, size in (("denoiser", 1), ("stack", model.config.patch_size)):
        policy = Watching(("input_map",))
        with torch.no_grad(), dc.run(model, policy, num_steps=2, scope=scope) as run:
            model(**case.inputs(zoo.Draw(1)))
            run.next_step()
        (signals,) = policy.given
        rows, frames, _, height, width = latents.shape
        assert signals["input_map"].shape[0] == rows
        assert signals["input_map"].shape[2:] == (frames, height // size, width // size)
        assert scope == "stack" or torch.equal(signals["input_map"], latents.transpose(1, 2))


def test_tokens_that_cannot_be_placed_ask_for_another_scope():
    pipe = reference.load(FLUX)
    ids = pipe._prepare_latent_image_ids
    pipe._prepare_latent_image_ids = lambda *args: torch.zeros_like(ids(*args))
    with dc.cached(pipe, "seacache", scope="stack"), pytest.raises(dc.ConfigError, match="use scope 'denoiser'"):
        generate(FLUX, pipe)
    del pipe._prepare_latent_image_ids
    assert torch.isfinite(generate(FLUX, pipe)).all()


def test_unknown_sync():
    with pytest.raises(dc.ConfigError, match=r"Unknown sync 'late'.*lagged"):
        dc.enable(reference.load(FLUX), sync="late")
