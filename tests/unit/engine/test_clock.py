"""The clock: steps, passes, totals and noise levels."""

import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from diffusion_cache.engine.clock import (
    StepClock,
    _Seen,
    begin_index,
    is_flow,
    loop_total,
    noise_levels,
    scheduler_total,
    timestep_of,
)

# diffusers' own, with NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def clock(total=None):
    return StepClock(lambda timestep: total)


def called(clock, t=None):
    """One call; gives (step, position of the call within it)."""
    clock.denoiser_called((), {} if t is None else {"timestep": t})
    return clock.index, clock.position


# steps and passes


def test_a_step_event_begins_the_next_step():
    c = clock()
    seen = []
    for t in (9, 8, 7):
        seen.append(called(c, t))
        c.scheduler_stepped()
    assert seen == [(0, 0), (1, 0), (2, 0)]
    assert c.evaluation == 2


def test_two_calls_a_step_are_two_passes():
    c = clock()
    seen = []
    for t in (9, 8, 7):
        seen += [called(c, t), called(c, t)]
        c.scheduler_stepped()
    assert seen == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert c.evaluation == 5


def test_steps_count_and_not_timesteps_once_an_event_was_seen():
    """Order-2 samplers repeat a timestep, others change it between the passes of a step."""
    c = clock()
    assert called(c, 9) == (0, 0)
    c.scheduler_stepped()
    assert called(c, 9) == (1, 0)
    assert called(c, 5) == (1, 1)
    c.scheduler_stepped()
    c.scheduler_stepped()  # two schedulers (video and audio) are one step
    assert called(c, 5) == (2, 0)


def test_without_events_a_changed_timestep_is_the_next_step():
    c = clock()
    times = [9, 9, 8, 8, 8, 7, 9]
    assert [called(c, t) for t in times] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 0), (3, 0)]


def test_events_take_over_from_timesteps():
    c = clock()
    assert [called(c, t) for t in (9, 8)] == [(0, 0), (1, 0)]
    c.scheduler_stepped()
    assert [called(c, t) for t in (7, 6, 5)] == [(2, 0), (2, 1), (2, 2)]


def test_first_step_of_a_run_before_any_event_keeps_its_passes_together():
    c = clock()
    assert [called(c, t) for t in (9, 9)] == [(0, 0), (0, 1)]
    c.scheduler_stepped()
    assert called(c, 8) == (1, 0)


def test_a_step_event_before_the_first_call_is_no_step():
    c = clock()
    c.scheduler_stepped()
    assert called(c, 9) == (0, 0)
    assert called(c, 8) == (0, 1)


def test_next_step_is_explicit():
    c = clock()
    c.next_step()
    assert [called(c, t) for t in (9, 8, 7)] == [(0, 0), (0, 1), (0, 2)]  # timesteps do not count any more
    c.next_step()
    c.next_step()
    assert [called(c, 7), called(c, 7)] == [(1, 0), (1, 1)]
    c.scheduler_stepped()
    c.next_step()  # both said it: one step
    assert called(c, 7) == (2, 0)


def test_in_a_loop_that_calls_next_step_nothing_else_counts():
    c = clock()
    called(c, 9)
    c.next_step()
    assert called(c, 8) == (1, 0)
    c.scheduler_stepped()  # a scheduler that steps in the middle of the loop's iteration
    assert called(c, 8) == (1, 1)


def test_suppressed_steps_do_not_count():
    c = clock()
    called(c, 9)
    with c.suppressed():
        c.scheduler_stepped()
        with c.suppressed():
            c.scheduler_stepped()
        c.scheduler_stepped()
    assert called(c, 9) == (0, 1)
    with pytest.raises(KeyError), c.suppressed():
        raise KeyError
    c.scheduler_stepped()
    assert called(c, 9) == (1, 0)


def test_timesteps_that_are_set_while_suppressed_or_in_a_loop_of_next_step_begin_nothing():
    c = clock()
    called(c, 9)
    c.scheduler_stepped()
    called(c, 8)
    with c.suppressed():
        c.timesteps_set()
    c.scheduler_stepped()
    assert called(c, 7) == (2, 0)
    c.next_step()
    c.timesteps_set()
    assert called(c, 6) == (3, 0)


def test_total_is_asked_once_with_the_first_calls_timestep():
    asked = []
    c = StepClock(lambda timestep: asked.append(timestep) or 7)
    assert (c.total, c.first_timestep, asked) == (None, None, [])
    for t in (3, 2, 1):
        called(c, t)
    assert (c.total, c.first_timestep, asked) == (7, 3, [3])


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        (("x", 5), {}, 5),
        (("x",), {"timestep": 5}, 5),
        (("x", "text"), {"timesteps": 5}, 5),
        (("x",), {"timestep_ratio": 5}, 5),
        (("x",), {"t": 5}, 5),
        (("x",), {"text": 5}, None),
        ((), {}, None),
    ],
)
def test_timestep_of(args, kwargs, expected):
    assert timestep_of(args, kwargs) == expected


TIMES = torch.tensor([900.0, 600.0, 300.0])


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (TIMES[0], TIMES[0], True),
        (TIMES[0], TIMES[1], False),
        (TIMES[0].expand(4), TIMES[0].expand(4), True),
        (TIMES[0].expand(4), TIMES[1].expand(4), False),
        (TIMES[0].clone(), TIMES[0], True),
        (TIMES[:2], torch.tensor([900.0, 600.0]), True),
        (TIMES[:2], TIMES[1:], False),
        (TIMES[0].expand(2), TIMES[0].expand(4), True),
        (TIMES[0].expand(2), TIMES[1].expand(4), False),
        (TIMES[0], 900.0, False),
        (5, 5, True),
        (5, 4, False),
        (0.5, 0.5, True),
        (np.float64(2), np.float64(2), True),
        (None, None, True),
        (None, 3, False),
    ],
)
def test_same_timestep(a, b, same):
    assert _Seen(b).equals(a) is same


def test_timestep_written_in_place_is_another_timestep():
    c, t = clock(), torch.tensor([900.0])
    seen = []
    for _ in range(3):
        seen.append(called(c, t))
        t -= 100
    assert seen == [(0, 0), (1, 0), (2, 0)]


def test_a_loops_own_timestep_may_come_again():
    """It is no entry of a scheduler's timesteps, of which views of a panorama are all stepped at the same."""
    c, own = clock(), torch.tensor([9.0])
    called(c, own.expand(2))
    c.scheduler_stepped()
    assert called(c, own.expand(2)) == (1, 0)


# where a run begins, and its total


@pytest.mark.parametrize("make", [EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler])
def test_begin_index_that_the_scheduler_was_told(make):
    scheduler = make()
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(4)
    assert begin_index(scheduler) == begin_index(scheduler, scheduler.timesteps[2]) == 4
    scheduler.set_begin_index(0)
    assert begin_index(scheduler, scheduler.timesteps[2]) == 0


def ddim(steps=10):
    """10 steps are 900, 800, …, 0; img2img pipelines begin in their midst and cannot say so to this scheduler."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("t", [600, 600.0, torch.tensor(600), torch.tensor([600.0]), torch.tensor(600).expand(4)])
def test_begin_index_by_the_first_timestep(t):
    assert begin_index(ddim(), t) == 3
    assert scheduler_total(ddim(), t) == 7
    assert noise_levels(ddim(), t) == noise_levels(ddim())[3:]


def test_begin_index_by_a_fractional_timestep():
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(8)  # 999, 856.29, 713.57, …
    assert begin_index(scheduler, scheduler.timesteps[2].expand(2)) == 2
    assert scheduler_total(scheduler, scheduler.timesteps[2]) == 6
    assert noise_levels(scheduler, scheduler.timesteps[2]) == noise_levels(scheduler)[2:]


def pndm():
    """Its 5 steps are 800, 600, 600, 400, 200, 0."""
    scheduler = PNDMScheduler(skip_prk_steps=True)
    scheduler.set_timesteps(5)
    return scheduler


def test_begin_index_among_repeated_timesteps():
    scheduler = pndm()
    assert [begin_index(scheduler, t) for t in scheduler.timesteps] == [0, 1, 2, 3, 4, 5]
    assert [begin_index(scheduler, t.expand(2)) for t in scheduler.timesteps[1:]] == [1, 2, 3, 4, 5]
    # by value alone the second is taken
    assert [begin_index(scheduler, t.clone()) for t in scheduler.timesteps] == [0, 2, 2, 3, 4, 5]
    assert begin_index(scheduler, 600) == 2


def test_begin_index_among_timesteps_that_are_a_view():
    scheduler = SimpleNamespace(timesteps=torch.tensor([9.0, 0.0, 8.0, 0.0, 7.0, 0.0])[::2])
    assert [begin_index(scheduler, t) for t in scheduler.timesteps] == [0, 1, 2]


@pytest.mark.parametrize(
    ("make", "first", "counted", "expected"),
    [
        (ddim, 0, None, 10),
        (ddim, 3, None, 7),
        (ddim, 0, 10, 10),
        (ddim, 0, 4, 4),  # a loop that ends early
        (ddim, 3, 4, 4),
        (ddim, 3, 10, 7),
        (pndm, 0, 5, 6),  # bars count what was asked for, loops what is listed
        (pndm, 0, 3, 6),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_loop_total(make, first, counted, expected):
    scheduler = make()
    assert loop_total(scheduler, scheduler.timesteps[first], counted) == expected


def test_loop_total_of_a_scheduler_without_a_list():
    assert loop_total(object(), None, 7) == 7
    assert loop_total(object(), None, None) is None


@pytest.mark.parametrize("t", [None, 601, 600.5, torch.tensor(601), torch.tensor([]), "600", torch.tensor(math.nan)])
def test_begin_index_that_is_not_found_is_the_start(t):
    assert begin_index(ddim(), t) == 0
    assert scheduler_total(ddim(), t) == 10
    assert noise_levels(ddim(), t) == noise_levels(ddim())


@pytest.mark.parametrize("begin", [None, 0, 3])
def test_scheduler_total(begin):
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    if begin is not None:
        scheduler.set_begin_index(begin)
    assert scheduler_total(scheduler) == 10 - (begin or 0)


def test_total_of_what_has_no_timesteps():
    assert scheduler_total(None) is None
    assert scheduler_total(object()) is None


# noise levels

SCHEDULERS = {
    "ddim": lambda: DDIMScheduler(),
    "ddim-reference": lambda: DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", timestep_spacing="leading", steps_offset=1, prediction_type="v_prediction"
    ),
    "ddim-zero-snr": lambda: DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing"),
    "dpm++": lambda: DPMSolverMultistepScheduler(),
    "dpm++karras": lambda: DPMSolverMultistepScheduler(use_karras_sigmas=True),
    "dpm++flow": lambda: DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0
    ),
    "euler": lambda: EulerDiscreteScheduler(),
    "euler-leading": lambda: EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
    "flow-euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "unipc": lambda: UniPCMultistepScheduler(),
    "unipc-flow": lambda: UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 7, 20])
def test_noise_levels_are_what_the_scheduler_itself_mixes(name, steps):
    """The ratio of data to noise, measured by noising a one with a zero and a zero with a one."""
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(steps)
    levels = noise_levels(scheduler)
    assert len(levels) == len(scheduler.timesteps) == steps
    assert all(a < b for a, b in pairwise(levels))  # ever less noise
    noising = getattr(scheduler, "scale_noise", None) or scheduler.add_noise
    one, zero = torch.ones(1), torch.zeros(1)
    for t, level in zip(scheduler.timesteps, levels, strict=True):
        if hasattr(scheduler, "scale_noise"):
            data, noise = noising(one, t[None], zero), noising(zero, t[None], one)
        else:
            data, noise = noising(one, zero, t[None]), noising(zero, one, t[None])
        data, noise = data.double().item(), noise.double().item()
        if abs(data) < 1e-3:  # float32 cancels in 1 − σ
            assert level < -13
        else:
            assert level == pytest.approx(2 * math.log(data / noise), abs=1e-2)


def alphas_cumprod():
    return np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


def test_ddim_by_formula():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(4)  # leading: 750, 500, 250, 0
    a = alphas_cumprod()[[750, 500, 250, 0]]
    assert noise_levels(scheduler) == pytest.approx(np.log(a / (1 - a)), abs=2e-3)


@pytest.mark.parametrize(
    ("make", "steps", "times"),
    [(EulerDiscreteScheduler, 4, [999, 666, 333, 0]), (DPMSolverMultistepScheduler, 3, [999, 666, 333])],
)
def test_variance_exploding_sigmas_by_formula(make, steps, times):
    scheduler = make()
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == times
    a = alphas_cumprod()[times]
    assert noise_levels(scheduler) == pytest.approx(np.log(a / (1 - a)), abs=2e-3)


def test_flow_match_by_hand():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])  # shifted by 3σ / (1 + 2σ): 1, 0.9, 0.75, 0.5
    expected = [-math.inf, -4 * math.log(3), -2 * math.log(3), 0.0]
    assert noise_levels(scheduler) == pytest.approx(expected, abs=1e-5)


def test_sigmas_above_1_of_a_flow_scheduler_are_variance_exploding():
    """As Cosmos-Predict2 has them."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    scheduler.config.sigma_max, scheduler.config.sigma_min = 80.0, 0.002
    scheduler.set_timesteps(sigmas=np.array([80.0, 7.0, 0.5, 0.002]))
    assert float(scheduler.sigmas.max()) > 1
    levels = noise_levels(scheduler)
    assert levels == pytest.approx([-2 * math.log(sigma) for sigma in scheduler.sigmas[:-1].tolist()])
    assert levels.form == "other"


def test_a_flow_sigma_may_be_above_1_by_rounding():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    scheduler.sigmas[0] = 1 + 1e-6
    assert noise_levels(scheduler).form == "flow"


def test_edm_tells_no_form():
    """Its samplers scale by more than their prediction type says."""
    scheduler = EDMEulerScheduler()
    scheduler.set_timesteps(4)
    assert noise_levels(scheduler).form == "other"


def test_sigmas_of_flow_make_a_flow_sampler_whatever_is_predicted():
    assert is_flow(UniPCMultistepScheduler(use_flow_sigmas=True))
    assert not is_flow(UniPCMultistepScheduler())


def test_a_timestep_beyond_the_trained_ones_has_the_noise_of_the_last():
    alphas = torch.linspace(0.99, 0.01, 10)
    scheduler = SimpleNamespace(timesteps=torch.tensor([10, 5]), alphas_cumprod=alphas, config={})
    assert noise_levels(scheduler)[0] == pytest.approx(math.log(0.01 / 0.99), rel=1e-5)


def test_unipc_flow_by_formula():
    scheduler = SCHEDULERS["unipc-flow"]()
    scheduler.set_timesteps(10)
    s = np.linspace(1, 1e-3, 11)[1:-1]  # without the first, where σ is 1
    sigma = 3 * s / (1 + 2 * s)
    assert noise_levels(scheduler)[1:] == pytest.approx(2 * np.log((1 - sigma) / sigma), abs=1e-4)


@pytest.mark.parametrize("name", ["euler", "flow-euler", "unipc-flow", "dpm++"])
def test_levels_begin_where_the_run_does(name):
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(10)
    whole = noise_levels(scheduler)
    scheduler.set_begin_index(4)
    assert noise_levels(scheduler) == whole[4:]


def test_schedulers_that_tell_nothing():
    class Bare:
        timesteps = torch.arange(3)

    assert noise_levels(Bare()) == []
    assert noise_levels(None) == []


def test_a_late_start_has_the_form_of_the_whole_run():
    """Sigmas of the other form stay that, also where all that are left are below 1."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[80.0, 20.0, 5.0, 0.9, 0.5, 0.1])
    whole = noise_levels(scheduler)
    scheduler.set_begin_index(3)
    late = noise_levels(scheduler)
    assert whole.form == late.form == "other"
    assert late == whole[3:]
