"""Plans: what is refused, how they are resampled, and that storing them changes nothing."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_cache.errors import ConfigError
from diffusion_cache.forecasters.fitted import Fitted
from diffusion_cache.plan import Band, Plan, Quality, Speed, positions
from diffusion_cache.schedule import Schedule

NAN, INF = math.nan, math.inf


def levels(total, low=-5.0, high=5.0):
    return tuple(np.linspace(low, high, total).tolist())


def empty(total, passes=1, spans=1, history=2):
    nodes = torch.full((total, spans, history), -1, dtype=torch.int32)
    return nodes, torch.full((total, passes, spans, history), NAN, dtype=torch.float64)


def bare(mask, **fields):
    """A plan without weights."""
    nodes, weights = empty(len(mask))
    given = {
        "name": "a",
        "scope": "denoiser",
        "depth": None,
        "feature": "auto",
        "schedule": Schedule.uniform(entry == "1" for entry in mask),
        "noise_levels": levels(len(mask)),
        "nodes": nodes,
        "weights": weights,
    }
    return Plan(**{**given, **fields})


def plan(**fields):
    """A plan of six steps: step 4 is forecast from steps 0 and 3, step 1 from step 0, the others by Taylor."""
    nodes, weights = empty(6)
    nodes[4, 0], weights[4, 0, 0] = torch.tensor([0, 3]), torch.tensor([-0.25, 1.25])
    nodes[1, 0], weights[1, 0, 0] = torch.tensor([-1, 0]), torch.tensor([0.0, 1.0])
    return bare("100100", **{"nodes": nodes, "weights": weights, **fields})


def band(**fields):
    given = {"signal": "input_l1", "mean": (NAN, *[0.5] * 5), "spread": (INF, *[0.25] * 5), "samples": 3}
    return Band(**{**given, **fields})


def strip(schedule):
    return "".join("1" if step[0][0] else "0" for step in schedule.compute)


def test_quality_of_values():
    values = [30.0 + i for i in range(40)]
    quality = Quality.of("psnr", values[::-1], range(100, 140))
    assert quality.mean == 49.5
    assert quality.p5 == 31.0  # 39 of 40 reach it, as the report has it
    assert (quality.worst, quality.worst_seed, quality.n) == (30.0, 139, 40)
    assert quality.values == tuple(values[::-1])


@pytest.mark.parametrize("n", [1, 2, 19, 20, 21, 59, 64, 100])
def test_fewer_than_5_percent_are_worse_than_p5(n):
    values = np.random.default_rng(n).normal(size=n).tolist()
    quality = Quality.of("psnr", values, range(n))
    assert sum(value < quality.p5 for value in values) < 0.05 * n
    better = [value for value in values if value > quality.p5]
    assert all(sum(value < other for value in values) >= 0.05 * n for other in better)  # none higher would do


def test_identical_images_have_infinite_quality():
    quality = Quality.of("psnr", [40.0, INF], [1, 2])
    assert (quality.mean, quality.worst) == (INF, 40.0)


@pytest.mark.parametrize(
    ("values", "seeds", "message"),
    [([], [], "0 values"), ([1.0], [], "0 seeds"), ([1.0, NAN], [7, 8], "seed 8 is NaN")],
)
def test_quality_refuses(values, seeds, message):
    with pytest.raises(ConfigError, match=message):
        Quality.of("psnr", values, seeds)


@pytest.mark.parametrize("speed", [(2.0, 2.1, 2.2), (2.0, 1.0, 1.5), (0.0, 0.0, 1.0), (NAN, 1.0, 2.0), (1.0, 1.0, INF)])
def test_speed_lies_within_its_spread(speed):
    with pytest.raises(ConfigError, match="spread"):
        Speed(*speed, "cpu", 1)


def test_defaults():
    made = plan()
    assert (made.total, made.history, made.passes, made.spans) == (6, 2, 1, 1)
    assert made.nfe == 2.0
    assert made.correction is None
    assert made.computed().shape == (6, 1, 1)
    assert made.computed().flatten().tolist() == [True, False, False, True, False, False]


def test_axes_of_length_one_stand_for_all():
    nodes, weights = empty(6, passes=2, spans=1)
    nodes[4, 0], weights[4, :, 0] = torch.tensor([0, 3]), torch.tensor([[0.5, 0.5], [0.0, 1.0]])
    made = plan(nodes=nodes, weights=weights)
    assert (made.passes, made.spans) == (2, 1)

    # weights that two spans share, though each has its own schedule
    both = Schedule((((True, True),), ((False, True),), ((True, False),)))
    nodes, weights = empty(3)
    nodes[2, 0], weights[2, 0, 0] = torch.tensor([0, 1]), torch.tensor([0.5, 0.5])
    assert plan(schedule=both, noise_levels=levels(3), nodes=nodes, weights=weights).spans == 2


def correction(values=None, spans=1, channels=3):
    """Of the one step that has weights; then with these values at these places."""
    found = torch.full((6, 1, spans, 2, channels), NAN, dtype=torch.float64)
    found[4, :, :, 0], found[4, :, :, 1] = 1.25, torch.linspace(-1, 1, channels, dtype=torch.float64)
    for place, value in (values or {}).items():
        found[place] = value
    return found


def changed(name, place, value):
    fields = dict(zip(("nodes", "weights"), (plan().nodes, plan().weights), strict=True))
    fields[name][place] = torch.as_tensor(value, dtype=fields[name].dtype)
    return fields


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"noise_levels": levels(5)}, "noise levels"),
        ({"noise_levels": (*levels(5), NAN)}, "NaN"),
        ({"feature": "latent"}, "feature"),
        ({"nfe": 0.0}, "NFE"),
        ({"nfe": INF}, "NFE"),
        ({"depth": -1}, "depth"),
        ({"sigmas": (1.0, NAN)}, "sigmas"),
        ({"facts": {"a": object()}}, "facts"),
        ({"facts": {"a": NAN}}, "facts"),
        ({"nodes": plan().nodes.long()}, "int32"),
        ({"weights": plan().weights.float()}, "float64"),
        ({"correction": correction().float()}, "float64"),
        ({"correction": correction(spans=2)}, r"correction: expected \[T, P, S, 2, C\]"),
        ({"correction": correction()[:5]}, r"not \[5, 1, 1, 2, 3\]"),
        ({"correction": correction(channels=0)}, r"not \[6, 1, 1, 2, 0\]"),
        ({"correction": correction()[..., 0]}, r"not \[6, 1, 1, 2\]"),
        ({"correction": correction({(4, 0, 0, 1, 2): NAN})}, "all of it NaN"),
        ({"correction": correction({(4, 0, 0, 0, 0): INF})}, "all of it NaN"),
        ({"correction": correction({(3,): 1.0})}, "NaN where there are no weights"),  # a computed step
        ({"correction": correction({(2,): 1.0})}, "NaN where there are no weights"),  # left to Taylor
        ({"nodes": plan().nodes[:, 0]}, "axes"),
        ({"nodes": plan().nodes[:5]}, "shapes"),
        ({"nodes": plan().nodes[..., :1]}, "shapes"),
        ({"weights": plan().weights[:5]}, "shapes"),
        ({"nodes": plan().nodes[..., :0], "weights": plan().weights[..., :0]}, "1 to 8"),
        ({"schedule": Schedule.uniform([True] * 5)}, "noise levels"),
        ({"schedule": Schedule((((True,),) * 2,) * 3 + (((True,),),) * 3)}, "same passes"),
        (changed("nodes", (4, 0), [3, 0]), "in order"),
        (changed("nodes", (4, 0), [3, 3]), "in order"),
        (changed("nodes", (4, 0), [3, -1]), "in order"),
        (changed("nodes", (4, 0), [3, 4]), "earlier steps"),
        (changed("nodes", (4, 0), [-2, 3]), "earlier steps"),
        (changed("nodes", (4, 0), [1, 3]), "computed steps"),
        (changed("weights", (4, 0, 0), [NAN, 1.0]), "finite at each node"),
        (changed("weights", (4, 0, 0), [INF, 1.0]), "finite at each node"),
        (changed("weights", (1, 0, 0), [0.5, 0.5]), "finite at each node"),  # a weight without a node
        (changed("weights", (2, 0, 0), [0.5, 0.5]), "finite at each node"),
        (
            {
                "nodes": changed("nodes", (3, 0), [-1, 0])["nodes"],
                "weights": changed("weights", (3, 0, 0), [0.0, 1.0])["weights"],
            },
            "NaN where the step is computed",
        ),
    ],
)
def test_plans_that_cannot_be(fields, message):
    with pytest.raises(ConfigError, match=message):
        plan(**fields)


def test_weights_for_another_number_of_spans():
    nodes, weights = empty(6, spans=2)
    with pytest.raises(ConfigError, match="P=1, S=3"):
        plan(schedule=Schedule((((True, True, True),),) * 6), nodes=nodes, weights=weights)


@pytest.mark.parametrize("what", ["nodes", "weights", "correction"])
def test_no_tensor_may_be_huge(what):
    """Whatever the schedule: each of their numbers is looked at in Python when a plan is used."""
    nodes, weights = empty(6, passes=1, spans=1)
    given = {"nodes": nodes, "weights": weights, "correction": torch.full((6, 1, 1, 2, 1), NAN, dtype=torch.float64)}
    shape = list(given[what].shape)
    shape[given[what].ndim - (3 if what == "correction" else 2)] = 10**7 // 6 + 1
    given[what] = given[what].flatten()[0].expand(shape)
    with pytest.raises(ConfigError, match=f"{what}: expected at most 10,000,000 numbers"):
        plan(**given)


def test_a_node_must_be_computed_in_the_pass_that_uses_it():
    # step 1 is computed in the first pass alone; both reuse at step 2
    schedule = Schedule((((True,), (True,)), ((True,), (False,)), ((False,), (False,))))
    nodes, weights = empty(3, passes=2)
    nodes[2, 0], weights[2, 0, 0] = torch.tensor([0, 1]), torch.tensor([0.5, 0.5])
    given = {"schedule": schedule, "noise_levels": levels(3), "nodes": nodes}
    assert plan(**given, weights=weights).passes == 2
    weights = weights.clone()
    weights[2, 1, 0] = torch.tensor([0.5, 0.5])
    with pytest.raises(ConfigError, match="computed steps"):
        plan(**given, weights=weights)


def test_storing_changes_nothing():
    made = plan(
        depth=2,
        noise_levels=(-INF, *levels(5)),
        sigmas=(3.0, 2.0, 1.5, 1.0, 0.5, 0.1),
        nfe=2.25,
        correction=correction(),
        facts={"objective": "power", "strength": 1e-3, "notes": ["a"]},
        quality=Quality.of("psnr", [30.5, INF, 31.0], [5, 6, 7]),
        speed=Speed(2.0, 1.9, 2.1, "cpu", 4),
        guard=band(),
    )
    again = Plan.from_json(made.to_json(), made.tensors())
    for name in vars(made):
        one, other = getattr(made, name), getattr(again, name)
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        else:
            assert str(one) == str(other), name  # NaN does not equal itself


def test_a_plan_stored_without_a_guard_has_none():
    stored = plan().to_json()
    assert "guard" not in stored
    assert Plan.from_json(stored, plan().tensors()).guard is None


def test_a_band_and_its_limits():
    assert band().limit(1, 6.0) == 2.0
    assert band().limit(0, 6.0) is None
    assert band(spread=(1e-9,) * 6).limit(1, 6.0) == pytest.approx(0.53)  # no less than 1% of the mean


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"signal": "input_l2"}, "Unknown guard signal 'input_l2'. Did you mean 'input_l1'"),
        ({"mean": (1.0,)}, "a mean and a spread for each step"),
        ({"spread": (-1.0,) * 6}, "no negative number"),
        ({"samples": 1}, "at least 2, not 1"),
    ],
)
def test_bands_that_cannot_be(fields, message):
    with pytest.raises(ConfigError, match=message):
        band(**fields)


def test_guards_of_plans_that_cannot_have_them():
    with pytest.raises(ConfigError, match="a band for each of 6 steps"):
        plan(guard=band(mean=(1.0,), spread=(1.0,)))
    partial = Schedule((((True, True),), *[((True, False),)] * 5))
    with pytest.raises(ConfigError, match="computes all of a step or nothing"):
        Plan("a", "block", None, "auto", partial, (), guard=band())


def test_a_schedule_that_is_none_is_refused():
    made = plan()
    for compute in (torch.full((6, 1, 1), 2, dtype=torch.uint8), torch.ones(6, 1, dtype=torch.uint8)):
        with pytest.raises(ConfigError, match="schedule"):
            Plan.from_json(made.to_json(), {**made.tensors(), "compute": compute})
    with pytest.raises(ConfigError, match="first step"):
        Plan.from_json(made.to_json(), {**made.tensors(), "compute": torch.zeros(6, 1, 1, dtype=torch.uint8)})


def test_its_own_noise_levels_keep_a_plan_as_it_is():
    made = plan()
    assert made.resampled([level + 0.0009 for level in made.noise_levels]) is made
    assert made.resampled([level + 0.01 for level in made.noise_levels]) is not made


def test_resampling_drops_what_no_longer_holds():
    measured = Quality.of("psnr", [30.0], [1]), Speed(2.0, 2.0, 2.0, "cpu", 1)
    made = plan(
        sigmas=tuple(range(1, 7)),
        correction=correction(),
        quality=measured[0],
        speed=measured[1],
        facts={"objective": "sum"},
        guard=band(),
    )
    after = made.resampled(levels(12))
    assert (after.quality, after.speed, after.sigmas, after.correction, after.guard) == (None,) * 5
    assert after.weights.isnan().all()
    assert (after.nodes == -1).all()
    assert after.nodes.shape == (12, 1, 2)
    assert after.noise_levels == levels(12)
    assert after.facts == {"objective": "sum", "resampled_from_steps": 6}


@pytest.mark.parametrize(
    ("mask", "total", "expected"),
    [
        ("1001001001", 10, "1001001001"),  # levels moved a little: the same steps
        ("1111100001", 5, "11001"),  # dense where it was
        ("10101", 9, "101010101"),
        ("1111", 8, "11111111"),
        ("1000", 8, "10000100"),
        ("1000", 1, "1"),
        ("1001", 1, "1"),
        ("1000000000", 3, "100"),
    ],
)
def test_resampled_schedules(mask, total, expected):
    after = bare(mask).resampled([level + 0.01 for level in levels(total)])
    assert strip(after.schedule) == expected
    assert after.nfe == expected.count("1")


def test_noise_levels_tell_where_the_computed_steps_go():
    # all computed steps are at the noisy end; the new run has most of its own there
    made = bare("1110000000", noise_levels=levels(10))
    noisy = made.resampled([*np.linspace(-5.0, -3.0, 8).tolist(), 4.0, 5.0])
    assert strip(noisy.schedule) == "1000100100"
    clean = made.resampled([-5.0, *np.linspace(3.0, 5.0, 9).tolist()])
    assert strip(clean.schedule)[0] == "1"
    assert sum(entry == "1" for entry in strip(clean.schedule)) == 3


FLUX = (0, 6, 12, 16, 19, 23, 26, 29, 32, 35, 37, 38, 39)  # of 40 steps: flux-digits' nfe-13


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (slice(16, 40), (0, 3, 7, 10, 13, 16, 19, 21, 22, 23)),  # image to image
        (slice(17, 40), (0, 2, 6, 9, 12, 15, 18, 20, 21, 22)),  # from a step that the plan reuses
        (slice(0, 24), (0, 6, 12, 16, 19, 23)),
        (slice(12, 24), (0, 4, 7, 11)),
    ],
)
@pytest.mark.parametrize("moved", [0.0, 0.01])
def test_runs_of_a_part_of_the_plans_steps(part, expected, moved):
    """Compute those of its steps that they make, whether at its noise levels or close by."""
    mask = "".join("1" if step in FLUX else "0" for step in range(40))
    made = bare(mask, noise_levels=levels(40))
    after = made.resampled([level + moved * (1 if part.start else -1) for level in levels(40)[part]])
    assert after.schedule.computed == expected
    assert after.nfe == len(expected)


def parted():
    """Steps 4 and 6 are forecast from the two computed before them, step 1 from step 0; all of these are corrected."""
    nodes, weights = empty(8)
    for step, held, values in ((1, [-1, 0], [0.0, 1.0]), (4, [2, 3], [-1.0, 2.0]), (6, [3, 5], [-0.5, 1.5])):
        nodes[step, 0], weights[step, 0, 0] = torch.tensor(held), torch.tensor(values)
    scaled = torch.full((8, 1, 1, 2, 1), NAN, dtype=torch.float64)
    scaled[[1, 4, 6]] = torch.tensor([1.5, 0.25], dtype=torch.float64)[:, None]
    return bare("10110100", nodes=nodes, weights=weights, correction=scaled)


@pytest.mark.parametrize(
    ("first", "end", "expected"),
    [
        (3, 8, {3: [0, 2]}),  # of step 4, weights are for a feature that the run has not
        (2, 8, {2: [0, 1], 4: [1, 3]}),
        (4, 8, {}),
        (6, 8, {}),  # a step with weights is the first, and computed
        (0, 5, {1: [-1, 0], 4: [2, 3]}),
    ],
)
def test_weights_for_features_of_the_part_alone_are_kept(first, end, expected):
    made = parted()
    after = made.resampled(made.noise_levels[first:end])
    own = made.computed().flatten().tolist()
    assert after.computed().flatten().tolist() == [True, *own[first + 1 : end]]
    fitted = torch.isfinite(after.weights).all(dim=3).flatten()
    assert fitted.nonzero().flatten().tolist() == list(expected)
    for step, nodes in expected.items():
        assert after.nodes[step, 0].tolist() == nodes
        assert torch.equal(after.weights[step], made.weights[first + step])
        assert torch.equal(after.correction[step], made.correction[first + step])
    assert (after.nodes[~fitted] == -1).all()
    run = made.noise_levels[first:end]
    assert Fitted.of(made).for_run(run) == Fitted.of(after)
    assert replace(Fitted.of(made), whole=True).for_run(run).table == {}
    assert after.correction[~fitted].isnan().all()
    moved = replace(made, sigmas=tuple(range(8, 0, -1))).resampled(made.noise_levels[first:end])
    assert moved.weights.isnan().all()


def test_spans_and_passes_are_resampled_each_by_itself():
    rng = np.random.default_rng(0)
    compute = rng.random((20, 2, 3)) < 0.4
    compute[0] = True
    schedule = Schedule(tuple(tuple(tuple(map(bool, row)) for row in step) for step in compute))
    nodes, weights = empty(20, passes=2, spans=3)
    made = bare("1" * 20, schedule=schedule, noise_levels=levels(20), nodes=nodes, weights=weights)
    after = made.resampled([level + 0.01 for level in levels(20)])
    assert after.schedule == schedule
    half = made.resampled(levels(10)).computed().numpy()
    assert half[0].all()
    for p in range(2):
        for s in range(3):
            lane = bare("".join("1" if entry else "0" for entry in compute[:, p, s]))
            assert half[:, p, s].tolist() == [e == "1" for e in strip(lane.resampled(levels(10)).schedule)]


def test_reused_steps_keep_their_cost():
    after = bare("1010101010", nfe=5 + 5 * 0.2).resampled(levels(20))
    assert after.schedule.nfe == 10
    assert after.nfe == pytest.approx(10 + 10 * 0.2)


def test_without_noise_levels_the_share_of_the_run_counts():
    after = bare("10010", noise_levels=()).resampled(levels(10))
    assert strip(after.schedule).count("1") == 4
    assert after.noise_levels == levels(10)


@pytest.mark.parametrize("given", [[], [0.0, NAN], [0.0] * 10_001])
def test_levels_that_nothing_can_be_resampled_to(given):
    with pytest.raises(ConfigError, match="resample"):
        plan().resampled(given)


def test_positions():
    assert positions([0, 1, 2], [0, 0.5, 2], 3).tolist() == [0, 0.5, 2]
    assert positions([0, 1, 3], [-9, 2, 9], 3).tolist() == [0, 1.5, 2]  # linear in the level; clamped at the ends
    assert positions([-INF, 0, 1, INF], [-INF, -0.5, 0.5, 1.5, INF], 4).tolist() == [0, 0.5, 1.5, 2.5, 3]
    assert positions([0, 1, 1, 2], [0, 2], 4).tolist() == [0, 3]
    assert positions([-INF], [0.0], 1).tolist() == [0]
    assert positions([], [1, 1, 1], 5).tolist() == [0, 2, 4]


@settings(max_examples=100, deadline=None)
@given(
    mask=st.lists(st.booleans(), min_size=1, max_size=60),
    total=st.integers(1, 80),
    shift=st.floats(-3, 3),
    ends=st.tuples(st.booleans(), st.booleans()),
)
def test_any_plan_can_be_resampled(mask, total, shift, ends):
    mask[0] = True
    own = list(levels(len(mask)))
    new = [level + shift for level in levels(total, -6.0, 4.0)]
    if ends[0]:
        own[0] = new[0] = -INF
    if ends[1]:
        own[-1] = new[-1] = INF
    made = bare("".join("1" if entry else "0" for entry in mask), noise_levels=tuple(own))
    after = made.resampled(new)
    assert after.computed()[0].all()
    if after.noise_levels[0] in own:  # its own or a part of them
        return
    places = positions(own, new, len(mask))
    first, end = math.floor(places[0] + 1e-6), math.ceil(places[-1] - 1e-6) + 1
    kept = 1 + sum(mask[first + 1 : end])
    assert after.schedule.nfe == max(1, math.floor(kept * total / (end - first) + 0.5))


def test_a_plan_without_weights_is_left_to_taylor():
    schedule = Schedule.uniform((True, False, True))
    bare = Plan("bare", "stack", None, "auto", schedule, (2.0, 1.0, 0.0))
    assert bare.nodes.tolist() == [[[-1]]] * 3
    assert bare.weights.shape == (3, 1, 1, 1)
    assert bool(bare.weights.isnan().all())
    with pytest.raises(ConfigError, match="nodes"):
        Plan("half", "stack", None, "auto", schedule, (), weights=bare.weights)
