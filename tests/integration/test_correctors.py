"""Correctors and the further kinds of forecasters on whole pipelines: rows apart, guidance branches, refusals."""

import math
from itertools import pairwise, product

import pipelines_image
import pytest
import small
import torch

import diffusion_cache as dc
from diffusion_cache import ops, reference
from diffusion_cache.context import NoiseLevels
from diffusion_cache.engine import Method, Observer, session_of
from diffusion_cache.errors import ConfigError
from diffusion_cache.forecasters import AverageVelocity, Sampler
from diffusion_cache.policies import Guarded
from diffusion_cache.policies.mask import Mask
from diffusion_cache.profiling.generation import attached

STEPS = 6
IDENTITIES = {
    "affine": {"scale": 1.0, "bias": 0.0},
    "magnitude": {"ratios": (1.0,) * STEPS},
    "shrink": {"strength": 1.0},
}
MASK = {"policy": "mask", "mask": "110100"}


def generate(model, pipe, labels=(3, 8), seeds=(5, 6), steps=STEPS):
    return reference.images(model, pipe(**reference.inputs(model, labels, seeds, steps=steps)))


@pytest.fixture(scope="module")
def flux():
    return reference.load("flux-digits")


@pytest.fixture(scope="module")
def dit():
    return reference.load("dit-digits")


@pytest.mark.parametrize(
    ("corrector", "forecaster"),
    [
        *product(("affine", "shrink"), ("taylor", "rfc", "average_velocity")),
        ("magnitude", "reuse"),  # of which alone it mends forecasts
    ],
)
def test_identities_give_the_same_image_bit_for_bit(flux, corrector, forecaster):
    options = {**MASK, "forecaster": forecaster, "scope": "denoiser"}
    with dc.cached(flux, **options):
        plain = generate("flux-digits", flux)
    with dc.cached(flux, **options, corrector=corrector, **IDENTITIES[corrector]):
        assert torch.equal(generate("flux-digits", flux), plain)
        assert corrector in dc.summary(flux).method
        assert dc.summary(flux).reused == 3
    changed = {"affine": {"scale": 1.1}, "magnitude": {"ratios": (1.1,) * STEPS}, "shrink": {"strength": 0.5}}
    with dc.cached(flux, **options, corrector=corrector, **changed[corrector]):
        assert (generate("flux-digits", flux) - plain).abs().max() > 1e-4


class Outputs(Observer):
    """Of a denoiser span: what it is given and gives, and what reused calls are forecast as; by step."""

    def __init__(self):
        self.inputs, self.computed, self.reused = {}, {}, {}

    def run_began(self, run):
        pass

    def span_computed(self, frame, span, inputs, leaves, outputs):
        self.inputs[frame.step.index] = next(iter(inputs.values())).double()
        self.computed[frame.step.index] = outputs[0].double()

    def denoiser_called(self, frame, output, again):
        for visit in frame.reused:
            self.reused[frame.step.index] = visit.forecast[0].double()


def test_average_velocities_are_those_of_the_path(flux):
    """Against the formula, from what the denoiser was seen to be given and to give; and their bytes are as stated."""
    seen = Outputs()
    method = Method(Guarded(Mask("1110100")), AverageVelocity(), "denoiser", granularity="batch")
    with attached(flux, method, seen):
        generate("flux-digits", flux, steps=7)
        sigmas = flux.scheduler.sigmas.double()
    assert set(seen.reused) == {3, 5, 6}
    for step, (early, late) in {3: (0, 2), 5: (1, 4), 6: (1, 4)}.items():
        r, t, s = sigmas[early], sigmas[late], sigmas[step + 1]
        moved = seen.inputs[late] - seen.inputs[early]
        expected = seen.computed[late] + (s - t) * (moved - (t - r) * seen.computed[early]) / (t - r) ** 2
        torch.testing.assert_close(seen.reused[step], expected, rtol=1e-4, atol=1e-4)
    stated = dc.inspect(
        flux, reference.inputs("flux-digits", (3, 8), (5, 6)), forecaster="average_velocity", scope="denoiser"
    )
    with dc.cached(flux, policy="interval", forecaster="average_velocity", scope="denoiser"):
        generate("flux-digits", flux)
        assert dc.summary(flux).cache_bytes == stated.cache_bytes
    with dc.cached(flux, policy="interval", every=2, forecaster="taylor", order=2, scope="denoiser"):
        generate("flux-digits", flux)
        assert dc.summary(flux).cache_bytes * 2 == stated.cache_bytes


class Curved(torch.nn.Module):
    """A velocity that changes, or minus it."""

    def __init__(self, sign):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.sign = torch.nn.Linear(4, 4), sign

    def forward(self, hidden_states, timestep):
        return self.sign * (hidden_states + self.linear(hidden_states) * torch.sin(3 * timestep))


SIGMAS = (1.0, 0.9, 0.75, 0.6, 0.5, 0.3, 0.1, 0.0)
LEVELS = NoiseLevels([2 * math.log((1 - s) / s) if s < 1 else -80.0 for s in SIGMAS[:-1]], "flow")


def integrated(sign, policy, forecaster="average_velocity", **options):
    """Where a flow ends whose pipeline takes the denoiser's output times `sign` for its velocity."""
    model, x = Curved(sign), torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    options = dict(scope="denoiser", num_steps=len(LEVELS), noise_levels=LEVELS, **options)
    with torch.no_grad(), dc.run(model, policy, forecaster, **options) as run:
        for now, after in pairwise(SIGMAS):
            x = x + sign * (after - now) * model(hidden_states=x, timestep=torch.tensor(now))
            run.next_step()
        return x


@pytest.mark.parametrize(
    "options",
    [
        dict(policy="mask", mask="1110101"),
        dict(policy="mask", mask="1110101", cache_dtype="int8-delta"),
        dict(policy="easycache", threshold=0.3, warmup=3),  # rows apart
    ],
)
def test_average_velocities_of_an_output_that_is_negated(options):
    """As pipelines of Z-Image and Lumina do."""
    expected = integrated(1.0, **options)
    torch.testing.assert_close(integrated(-1.0, **options), expected)
    assert (expected - integrated(1.0, forecaster="reuse", **options)).abs().max() > 1e-3


def test_average_velocities_of_a_list_of_samples():
    """Each with its own path; Z-Image's pipeline negates them."""
    case = next(case for case in pipelines_image.CASES if case.id == "ZImagePipeline")
    pipe = case.build()
    seen = Outputs()
    method = Method(Guarded(Mask("1110")), AverageVelocity(), "denoiser", granularity="batch")
    with attached(pipe, method, seen):
        pipe(**case.call())
        sigmas = pipe.scheduler.sigmas.double()
    r, t, s = sigmas[0], sigmas[2], sigmas[4]
    moved = seen.inputs[2] - seen.inputs[0]
    expected = seen.computed[2] + (s - t) * (-moved - (t - r) * seen.computed[0]) / (t - r) ** 2
    torch.testing.assert_close(seen.reused[3], expected, rtol=1e-4, atol=1e-4)


def test_which_way_outputs_point_is_read_back_once(flux, monkeypatch):
    """In the first run: later ones wait for nothing."""
    with dc.cached(flux, policy="interval", every=2, forecaster="average_velocity", scope="denoiser"):
        first = generate("flux-digits", flux)
        assert [*session_of(flux).directions.values()] == [1.0]
        monkeypatch.setattr(ops, "decoded", lambda feature: pytest.fail("read again"))
        assert torch.equal(generate("flux-digits", flux), first)


APART = dict(policy="first_block", threshold=0.2, warmup=2)


@pytest.mark.parametrize(
    "options",
    [
        {"forecaster": "rfc"},
        {"forecaster": "frequency"},
        {"forecaster": "hermite", "corrector": "shrink", "strength": 0.7},
        {"forecaster": "rfc", "corrector": "affine", "scale": 1.01, "bias": 0.01},
        {"policy": "easycache", "forecaster": "average_velocity", "corrector": "shrink"},
        {"forecaster": "reuse", "corrector": "magnitude", "ratios": [1.0 + 0.01 * step for step in range(12)]},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_samples_computed_at_steps_of_their_own_are_as_if_alone(flux, options):
    steps, seeds, labels = 12, (5, 6, 11), (3, 8, 1)
    with dc.cached(flux, **{**APART, **options}):
        together = generate("flux-digits", flux, labels, seeds, steps)
        reasons = [record.reason for record in dc.summary(flux).records]
        assert any(" of 3 samples" in reason for reason in reasons)
        for place, (label, seed) in enumerate(zip(labels, seeds, strict=True)):
            alone = generate("flux-digits", flux, (label,), (seed,), steps)
            assert (alone[0] - together[place]).abs().max() < 1e-4


@pytest.mark.parametrize("forecaster", ["rfc", "frequency", "chebyshev"])
def test_guidance_branches_in_rows_do_not_mix(dit, forecaster):
    """A sample's image is the same whatever stands in its neighbours' rows, which hold both its branches."""
    with dc.cached(dit, **MASK, forecaster=forecaster):
        pair = generate("dit-digits", dit)
        other = generate("dit-digits", dit, (3, 1), (5, 9))
        assert dc.summary(dit).reused == 3
    assert (pair[0] - other[0]).abs().max() < 1e-4
    assert (pair[1] - other[1]).abs().max() > 1e-2


def test_a_denoiser_compiled_as_a_whole_takes_weighted_sums_only():
    pipe = reference.load("dit-digits")
    pipe.transformer.compile(backend="eager")
    with pytest.raises(ConfigError, match=r"'rfc' is no weighted sum of features.*compile_repeated_blocks"):
        dc.enable(pipe, **MASK, forecaster="rfc", scope="stack")
    dc.enable(pipe, **MASK, forecaster="hermite", corrector="shrink", scope="stack")
    dc.disable(pipe)
    dc.enable(pipe, **MASK, forecaster="rfc", scope="denoiser")
    dc.disable(pipe)


def test_correctors_work_in_a_denoiser_compiled_as_a_whole():
    torch._dynamo.reset()
    options = {**MASK, "forecaster": "hermite", "corrector": "shrink", "strength": 0.6, "scope": "stack"}
    pipe = small.load("dit-digits")
    with dc.cached(pipe, **options):
        expected = generate("dit-digits", pipe)
    pipe.transformer.compile(backend="eager")
    with dc.cached(pipe, **options):
        assert (generate("dit-digits", pipe) - expected).abs().max() <= 1e-5
        assert dc.summary(pipe).reused == 3
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corrector": "shrnk"}, "Unknown corrector 'shrnk'. Did you mean 'shrink'?"),
        ({"corrector": "shrink", "strenth": 0.5}, "Unknown option 'strenth'.*corrector 'shrink'.*'strength'"),
        ({"corrector": "shrink", "strength": 2.0}, "strength must be from 0 to 1"),
        ({"corrector": "magnitude"}, "ratios"),
        ({"corrector": "alignment"}, "compares probe_residual of each step.*for policy 'interval'"),
        ({"corrector": 3}, "corrector must be a name or an instance"),
        ({"forecaster": "average_velocity", "scope": "stack"}, "does not serve scope 'stack'.*use scope 'denoiser'"),
        (
            {"corrector": "shrink", "profile": "dit-digits-ddim", "nfe": 10, "policy": None},
            "corrector comes from the profile",
        ),
    ],
)
def test_bad_input_changes_nothing(dit, options, message):
    before = generate("dit-digits", dit)
    with pytest.raises(ConfigError, match=message):
        dc.enable(dit, **{"policy": "interval", **options})
    assert torch.equal(generate("dit-digits", dit), before)


def test_policy_and_corrector_share_ratios(flux):
    ratios = [1.0 + 0.01 * step for step in range(STEPS)]
    options = dict(policy="magcache", ratios=ratios, forecaster="reuse", threshold=0.5, max_skip=2)
    with dc.cached(flux, **options):
        plain = generate("flux-digits", flux)
        reused = dc.summary(flux).reused
    with dc.cached(flux, **options, corrector="magnitude"):
        assert (generate("flux-digits", flux) - plain).abs().max() > 1e-4
        assert dc.summary(flux).reused == reused > 0


def test_a_loop_of_ones_own_says_in_which_variable_it_integrates(flux):
    """Without that a forecaster that goes by it refuses; noise levels alone are log-SNR, and no more."""
    calls = []
    hook = flux.transformer.register_forward_pre_hook(lambda m, a, k: calls.append((a, k)), with_kwargs=True)
    generate("flux-digits", flux, steps=2)
    hook.remove()
    args, kwargs = calls[0]
    levels = [-2.0, 0.0, 2.0]
    with (
        pytest.raises(ConfigError, match="noise levels"),
        dc.run(flux.transformer, "interval", "sampler", num_steps=3, noise_levels=levels),
    ):
        flux.transformer(*args, **kwargs)
    with (
        dc.run(flux.transformer, "interval", "sampler", num_steps=3, noise_levels=NoiseLevels(levels, "flow")) as run,
        torch.no_grad(),
    ):
        for _ in levels:
            flux.transformer(*args, **kwargs)
            run.next_step()
        assert run.summary().reused == 1


def test_a_run_that_cannot_be_forecast_ends_and_the_pipeline_stays_usable(dit):
    expected = generate("dit-digits", dit)
    dc.enable(dit, policy="interval", forecaster="average_velocity", scope="denoiser")
    with pytest.raises(ConfigError, match="a sampler of form flow"):
        generate("dit-digits", dit)
    dc.disable(dit)
    assert torch.equal(generate("dit-digits", dit), expected)


def test_ratios_of_another_length_are_those_of_the_nearest_share_of_the_run(dit):
    def run(ratios):
        with dc.cached(dit, "interval", "reuse", corrector="magnitude", ratios=ratios):
            return generate("dit-digits", dit), [record.computed for record in dc.summary(dit).records]

    ratios = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0]
    assert STEPS == 6
    images, computed = run(ratios)
    assert not all(computed)
    assert torch.equal(images, run(ratios[::2])[0])


def test_steps_are_integrated_in_ddims_own_variable(dit):
    """Which is the angle arctan(σ/α) where v is predicted: against a direct computation from its own ᾱ."""
    seen = Outputs()
    method = Method(Guarded(Mask("110111")), Sampler(), "denoiser", granularity="batch")
    with attached(dit, method, seen):
        generate("dit-digits", dit)
        alphas = dit.scheduler.alphas_cumprod.double()[dit.scheduler.timesteps]
    u = ((1 - alphas) / alphas).sqrt().atan()
    middle = (u[2] + u[3]) / 2 - u[1]  # the mean of a line is its value in the middle
    expected = seen.computed[1] + middle * (seen.computed[1] - seen.computed[0]) / (u[1] - u[0])
    torch.testing.assert_close(seen.reused[2], expected, rtol=1e-4, atol=1e-4)
