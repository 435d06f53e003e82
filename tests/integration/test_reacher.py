"""The shipped Diffusion-Policy transformer and its task."""

import pytest
import torch
from safetensors.torch import load_file

import diffusion_cache as dc
from diffusion_cache import reference
from diffusion_cache.plan import Plan
from diffusion_cache.profiling.generation import Loop
from diffusion_cache.profiling.measure import Options, measure
from diffusion_cache.reference import reacher, reaching
from diffusion_cache.reference.models import BARE
from diffusion_cache.schedule import Schedule

FEW = 10


@pytest.fixture(scope="module")
def model():
    return reacher.load()


def scene(start, goal, gates):
    return reaching.Scene(*(torch.tensor([each]) for each in (start, goal, gates)))


def test_weights_are_small_16_bit_and_finite():
    path = reference.WEIGHTS / reacher.NAME / "model.safetensors"
    assert path.stat().st_size <= 2e6
    state = load_file(path)
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_card_says_how_it_was_made_and_that_it_passed():
    card = reference.card(reacher.NAME)
    assert reacher.NAME in BARE
    assert {"steps", "batch", "seconds", "hardware", "loss"} <= set(card["training"])
    assert card["gate_samples"] == 200
    assert card["success_rate"] >= reacher.GATE


def test_the_wall_is_touched_everywhere_but_in_its_gates():
    here = scene([0.0, -0.5], [0.0, 0.8], [-0.5, 0.5])

    def hit(before, after):
        return bool(reaching.touched(here, torch.tensor([before]), torch.tensor([after])))

    assert hit([0.0, -0.2], [0.0, 0.2])
    assert hit([0.0, -0.2], [0.0, -reaching.WALL + 0.05])
    assert not hit([0.0, -0.3], [0.0, -reaching.WALL - 0.01])
    for gate in (-0.5, 0.5):
        assert not hit([gate, -0.2], [gate, 0.2])
        assert not hit([gate + 0.9 * reaching.GATE, -0.2], [gate + 0.9 * reaching.GATE, 0.2])
        assert hit([gate + 1.1 * reaching.GATE, -0.2], [gate + 1.1 * reaching.GATE, 0.2])


def test_a_step_is_no_longer_than_its_speed():
    moved = reaching.move(torch.zeros(2, 2), torch.tensor([[3.0, 4.0], [0.03, 0.04]]))
    assert moved[0].tolist() == pytest.approx([0.6 * reaching.SPEED, 0.8 * reaching.SPEED])
    assert moved[1].tolist() == pytest.approx([0.03, 0.04])


def carried_out(here, target, steps=reaching.LIMIT):
    """Success of following `target(position)`, and the side of the wall's middle that it was crossed on, of each."""
    position, side = here.start, torch.zeros(len(here.start))
    failed = torch.zeros(len(here.start), dtype=torch.bool)
    done = failed.clone()
    for _ in range(steps):
        before, position = position, reaching.move(position, target(position))
        failed |= reaching.touched(here, before, position) & ~done
        done |= reaching.arrived(here, position) & ~failed
        side = torch.where((before[:, 1] < 0) & (position[:, 1] >= 0), position[:, 0].sign(), side)
    return done, side


def test_the_demonstrator_succeeds_by_either_gate_and_the_way_between_them_fails():
    generator = torch.Generator().manual_seed(0)
    here = reaching.scenes(200, generator)
    demonstrator = reaching.Demonstrator(here, generator)
    stage = torch.zeros(200, dtype=torch.long)

    def demonstrated(position):
        nonlocal stage
        target, stage = demonstrator.act(position, stage)
        return target

    done, side = carried_out(here, demonstrated)
    assert done.all()
    assert 60 < (side > 0).sum() < 140
    assert carried_out(here, lambda position: here.goal)[0].float().mean() < 0.5


def test_demonstrations_show_what_the_demonstrator_does():
    observation, actions = reaching.demonstrations(500, reacher.HORIZON, torch.Generator().manual_seed(1))
    assert observation.shape == (500, reacher.OBSERVED, 2)
    assert actions.shape == (500, reacher.HORIZON, 2)
    steps = torch.cat([observation[:, 1:2], actions], dim=1).diff(dim=1).norm(dim=2)
    assert steps.max() <= reaching.SPEED + 1e-6
    goal, early = observation[:, 4], observation[:, 1, 1] > reaching.APPROACH
    assert (actions[early, -1] - goal[early]).norm(dim=1).max() < reaching.NEAR


def test_it_succeeds_by_both_ways(model):
    seeds = range(reacher.FIRST_SEED, reacher.FIRST_SEED + FEW)
    done = reacher.successes(model, seeds)
    # of ten episodes of a policy at its gate, fewer succeed once in a hundred times
    assert done.sum() >= 5
    here = scene([0.0, -0.7], [0.0, 0.8], [-0.5, 0.5])
    observation = here.observation(here.start, here.start).expand(FEW, -1, -1)
    actions = reacher.act(model, observation, [torch.Generator().manual_seed(seed) for seed in range(FEW)])
    crossing = actions.gather(1, actions[..., 1:].abs().argmin(dim=1, keepdim=True).expand(-1, -1, 2))[:, 0, 0]
    assert (crossing < -0.3).any()
    assert (crossing > 0.3).any()


def test_cached_in_a_loop_of_ones_own(model):
    """Computing everything changes nothing; reusing everything after the first step changes the actions."""
    seeds = range(4)
    within = {
        every: lambda every=every: dc.run(
            model, "interval", "reuse", every=every, scope="branch", num_steps=reacher.STEPS
        )
        for every in (1, reacher.STEPS)
    }
    observation = reaching.demonstrations(4, reacher.HORIZON, torch.Generator().manual_seed(0))[0]

    def act():
        return reacher.act(model, observation, [torch.Generator().manual_seed(seed) for seed in seeds])

    expected = act()
    with within[1]() as run:
        assert torch.equal(act(), expected)
        assert run.summary().total == reacher.STEPS
        assert run.summary().hit_rate == 0
    with within[reacher.STEPS]() as run:
        assert not torch.allclose(act(), expected, atol=0.1)
        assert run.summary().hit_rate == 1 - 1 / reacher.STEPS
    assert torch.equal(act(), expected)


def test_a_loop_of_ones_own_runs_by_a_plan_of_its_profile(model):
    loop = Loop(model, reacher.scheduler())
    observation = torch.randn(2, reacher.OBSERVED, 2, generator=torch.Generator().manual_seed(0))

    def make(samples):
        def actions():
            generators = [torch.Generator().manual_seed(seed) for _, seed in samples]
            return reacher.act(model, observation[: len(samples)], generators, FEW, loop.scheduler)

        return loop.batch(actions, len(samples))

    samples = [("", 3), ("", 4)]
    profile = measure(make, samples, Options("stack", batch=2, sensitivity_samples=0))
    half = Plan("half", "stack", None, "auto", Schedule.uniform([True, False] * (FEW // 2)), profile.noise_levels)
    stored = profile.with_plans([half])
    expected = make(samples).call()
    for wish in (dict(plan="half"), dict(nfe=FEW / 2)):
        with dc.run(model, profile=stored, num_steps=FEW, **wish) as run:
            actions = make(samples).call()
        assert [record.computed for record in run.summary().records] == [True, False] * (FEW // 2)
        assert not torch.equal(actions, expected)
    with dc.run(model, plan=half, num_steps=FEW) as run:
        assert torch.equal(make(samples).call(), actions)
    assert torch.equal(make(samples).call(), expected)
    other = reacher.load()
    for parameter in other.parameters():
        parameter.data += 1
    for denoiser, options, problem in (
        (other, dict(profile=stored, plan="half"), "is not of this model"),
        (model, dict(profile=stored, plan="half", policy="interval"), "policy comes from the profile"),
        (model, dict(plan=half, nfe=3), "this plan is given already"),
        (model, dict(nfe=3), r"nfe needs a profile: run\(model, profile=…, nfe=3\)"),
        (model, dict(plan=half, ignore=["weights"]), r"ignore needs a profile: run\(model, "),
        (model, dict(profile=stored, plan="half", ignore="weights"), "ignore must be a list of fields.*not 'weights'"),
        (model, dict(profile=stored, plan="half", ignore=5), "ignore must be a list of fields.*not 5"),
        (model, dict(profile=stored, nfe=1), "no plan takes 1 "),
    ):
        with pytest.raises(dc.ConfigError, match=problem), dc.run(denoiser, num_steps=FEW, **options):
            pass
