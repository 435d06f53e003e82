"""Mixed generations against plain and planned ones, gradients against differences, and the image-error proxy."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from plans import batch, drawn, profile

from diffusion_cache import reference
from diffusion_cache.engine.structure import first_tensor
from diffusion_cache.errors import ConfigError
from diffusion_cache.planning.static import static_plan
from diffusion_cache.profiling.generation import attached, last_state, plan_method, teach
from diffusion_cache.profiling.recorder import surveyed
from diffusion_cache.routers.mixing import Following, Gates, Mixture, _scaled, detached
from diffusion_cache.routers.proxy import CUMULATIVE, REMOVED, image_errors

STEPS = 5
KINDS = [
    ("dit-digits", "branch", 0),
    ("dit-digits", "branch", 1),
    ("flux-digits", "stack", 1),
    ("unet-digits", "cut", 1),
]


class Case:
    """A shipped model's batch of two, its spans mixed at one scope."""

    def __init__(self, name, scope, order=0):
        self.pipe = reference.load(name)
        self.batch = batch(self.pipe, name, drawn(0, 2), STEPS)
        with surveyed(self.batch, scope) as (_, survey):
            self.spans = [watched.span for watched in survey.spans]
        self.mixture = Mixture(self.pipe, self.spans, order)
        self.profile = profile(name, scope=scope, steps=STEPS)

    def gates(self, computed):
        return [Gates(torch.tensor(row).float(), tuple(row)) for row in computed.tolist()]

    def schedule(self, seed=0):
        computed = np.random.default_rng(seed).random((STEPS, len(self.spans))) < 0.5
        computed[0] = True
        return computed

    def last(self, gates):
        return self.mixture.generate(self.batch, Following(lambda step: gates[step]))


@pytest.fixture(scope="module")
def branches():
    return Case("dit-digits", "branch")


def test_open_gates_change_no_bit(branches):
    full = teach(branches.batch).states[-1][:2]
    everything = Gates.computing(len(branches.spans))
    assert torch.equal(branches.last([everything] * STEPS), full)
    assert len(branches.mixture.histories) == len(branches.spans)
    assert branches.pipe.transformer.__dict__.get("_compiled_call_impl") is None


@pytest.mark.parametrize(("name", "scope", "order"), KINDS)
def test_closed_gates_are_the_exported_plan(name, scope, order):
    case = Case(name, scope, order)
    computed = case.schedule(seed=3)
    mixed = case.last(case.gates(computed))
    plan = static_plan(case.profile, "hard", computed, order)
    with attached(case.pipe, plan_method(plan)), last_state(case.pipe.scheduler) as state:
        case.batch.call()
    torch.testing.assert_close(mixed, state[-1][:2], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(mixed, teach(case.batch).states[-1][:2], rtol=1e-3, atol=1e-3)


def test_features_from_before_guidance_ended_are_forgotten():
    """From then on calls have half as many rows: a forecast is of those alone."""
    case = Case("unet-digits", "cut", 1)

    def halve(pipe, step, timestep, tensors):
        if step == 1:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[1]
        return tensors

    def call():
        given = reference.inputs("unet-digits", [0, 1], [10, 11], STEPS)
        names = ["prompt_embeds"]
        return case.pipe(**given, callback_on_step_end=halve, callback_on_step_end_tensor_inputs=names)

    ended = replace(case.batch, call=call)
    full, closed = Gates.computing(1), Gates(torch.zeros(1), (False,))
    outputs = [
        Mixture(case.pipe, case.spans, order).generate(ended, Following(lambda step: closed if step > 2 else full))
        for order in (0, 1)
    ]
    torch.testing.assert_close(outputs[0], outputs[1])  # of one step there is nothing to extrapolate


def test_a_half_open_gate_mixes():
    """With the whole denoiser as the span, what the pipeline receives is the mix itself."""
    case = Case("flux-digits", "denoiser")
    gates, outputs, given = Gates.computing(1), [], []
    quarter = gates._replace(mix=torch.tensor([0.25]))

    class Noting(Following):
        def call(self, step, position, run):
            output = super().call(step, position, run)
            outputs.append(run(None)[0])
            given.append(output[0])
            return output

    case.mixture.generate(case.batch, Noting(lambda step: quarter if step == 1 else gates))
    torch.testing.assert_close(given[1], 0.25 * outputs[1] + 0.75 * outputs[0], rtol=1e-5, atol=1e-6)
    # stored as computed, not as mixed
    assert torch.equal(given[2], outputs[2])
    assert not torch.allclose(given[1], outputs[1], rtol=1e-2, atol=1e-2)


def test_gradients_of_gates_match_differences(branches):
    everything, probes = Gates.computing(len(branches.spans)), (1, 10, 23)
    found = {}

    class Probing(Following):
        def __init__(self, mix):
            super().__init__(lambda step: everything)
            self.mix = mix

        def call(self, step, position, run):
            if step != 2:
                return super().call(step, position, run)
            with torch.enable_grad():
                output = run(everything._replace(mix=self.mix))
                value = first_tensor(output).double()
                direction = torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).double()
                found["value"] = (value * direction).sum()
            return detached(output)

    mix = torch.full((len(branches.spans),), 0.5, requires_grad=True)
    branches.mixture.generate(branches.batch, Probing(mix))
    found["value"].backward()
    for place in probes:
        values = []
        for move in (0.05, -0.05):
            moved = mix.detach().clone()
            moved[place] += move
            branches.mixture.generate(branches.batch, Probing(moved))
            values.append(float(found["value"].detach()))
        assert float(mix.grad[place]) == pytest.approx((values[0] - values[1]) / 0.1, rel=2e-2)
    assert all(
        not leaf.requires_grad
        for past in branches.mixture.histories.values()
        for stored in past
        for leaf in stored.features
    )


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("kept", [True, False])
def test_later_outputs_know_what_was_kept(order, kept):
    """Of a whole denoiser, whose forecast is the output: its derivative is the difference that keeping a step makes."""
    case = Case("flux-digits", "denoiser", order)
    last = {}

    class Noting(Following):
        def call(self, step, position, run):
            with torch.enable_grad():
                last["output"] = run(self.gates(step))
            return detached(last["output"])

    def ran(keeps, keep=None):
        """Steps 0 and 1 computed, 2 computed and kept or not, 3 and 4 reused."""
        stored = (True, True, keeps, False, False)
        mix = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])
        gates = [Gates(mix[step : step + 1], (stored[step],), keep if step == 2 else None) for step in range(STEPS)]
        case.mixture.generate(case.batch, Noting(lambda step: gates[step]))
        return first_tensor(last["output"]).double()

    keep = torch.tensor([float(kept)], requires_grad=True)
    found = ran(kept, keep)
    assert torch.equal(found.detach(), ran(kept))
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(0)).double()
    (slope,) = torch.autograd.grad((found * direction).sum(), keep)
    expected = float(((ran(True) - ran(False)) * direction).sum().detach())
    assert float(slope) == pytest.approx(expected, rel=1e-4)
    assert abs(expected) > 0.1


def test_what_is_first_seen_at_a_step_that_is_not_kept_is_kept_all_the_same():
    """Nothing could be forecast without it."""
    case = Case("flux-digits", "denoiser")
    keep = torch.zeros(1, requires_grad=True)

    def last(first):
        return case.last([Gates(torch.tensor([float(step < 1)]), (step < 1 and first,), keep) for step in range(STEPS)])

    assert torch.equal(last(first=False), last(first=True))


def test_the_gradient_of_a_gate_may_exceed_16_bits():
    gate = torch.tensor(0.5, requires_grad=True)
    output = _scaled(torch.ones(2**17, dtype=torch.float16), gate)
    assert output.dtype == torch.float16
    output.sum(dtype=torch.float64).backward()
    assert gate.grad == 2**17


@pytest.mark.parametrize("variant", [REMOVED, CUMULATIVE])
def test_the_proxy_shares_what_generations_begin_with(branches, variant):
    computed = branches.schedule()
    gates = branches.gates(computed)
    ran = []
    handle = branches.pipe.transformer.register_forward_hook(lambda *_: ran.append(1))
    errors = image_errors(branches.mixture, branches.batch, gates, variant)
    handle.remove()
    # the recorded run, and what follows each step that was changed
    assert len(ran) == STEPS + sum(STEPS - t for t in range(1, STEPS))
    everything = Gates.computing(len(branches.spans))

    def distance(a, b):
        return float((a.double() - b.double()).square().flatten(1).sum(1).mean())

    last = branches.last(gates)
    if variant == REMOVED:
        without = [branches.last([everything if i == t else gates[i] for i in range(STEPS)]) for t in range(1, STEPS)]
        expected = [0.0, *(distance(last, other) for other in without)]
    else:
        upto = [branches.last([gates[i] if i <= t else everything for i in range(STEPS)]) for t in range(STEPS)]
        grown = [distance(upto[0], other) for other in upto]
        expected = [0.0, *(max(b - a, 0.0) for a, b in pairwise(grown))]
    assert errors.tolist() == pytest.approx(expected, rel=1e-6)
    assert max(expected) > 0


def test_a_cached_pipeline_is_not_mixed(branches):
    import diffusion_cache as dc

    with dc.cached(branches.pipe, "interval", every=2), pytest.raises(ConfigError, match="without a cache"):
        Mixture(branches.pipe, branches.spans)
