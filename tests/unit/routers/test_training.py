"""Training routers: what is learned, exact resumption, processes that agree, and bad input."""

import math
import os
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from plans import batch
from plans import profile as profiled

from diffusion_cache import reference
from diffusion_cache.errors import ConfigError, DiffusionCacheWarning
from diffusion_cache.planning.static import evaluations
from diffusion_cache.profiling.generation import teach
from diffusion_cache.reference.data import digits_of
from diffusion_cache.registry import routers
from diffusion_cache.routers import training as module
from diffusion_cache.routers.lesson import Lesson
from diffusion_cache.routers.mixing import Gates
from diffusion_cache.routers.router import Router, above, random_logits, starts
from diffusion_cache.routers.training import CHECKPOINT, PRICE_RATE, Settings, Trainer, parts, train

STEPS = 4
SHORT = Settings(trajectories=4, batch=2, held_out=2, evaluate_every=2, refreshes=1)
BRIEF = replace(SHORT, compute=0.7, trajectories=2)
ALONE = SimpleNamespace(
    num_processes=1,
    process_index=0,
    is_main_process=True,
    device=torch.device("cpu"),
    mixed_precision="no",
    reduce=lambda value, how: value,
    autocast=lambda: torch.autocast("cpu", enabled=False),
)


def samples(numbers):
    return [(str(number % 10), 10**7 + number) for number in numbers]


def clean(numbers):
    return digits_of([number % 10 for number in numbers], list(numbers))


class Shop:
    """A shipped model's pipeline with its profile, and routers trained for it."""

    def __init__(self, name, scope, steps=STEPS):
        self.name, self.steps = name, steps
        self.pipe, self.profile = reference.load(name), profiled(name, scope=scope, steps=steps)

    def batch(self, given):
        return batch(self.pipe, self.name, given, self.steps)

    def trainer(self, folder, recipe, settings=SHORT, **options):
        made = dict(clean=clean, accelerator=ALONE, progress=lambda *told: None)
        return Trainer(self.batch, samples, self.profile, recipe, settings, folder, **{**made, **options})

    def train(self, folder, recipe, settings=SHORT, **options):
        return train(
            self.batch,
            samples,
            self.profile,
            recipe,
            settings,
            folder=folder,
            **{"clean": clean, "accelerator": ALONE, **options},
        )


@pytest.fixture(scope="module")
def stacks():
    return Shop("flux-digits", "stack")


@pytest.fixture(scope="module")
def branches():
    return Shop("dit-digits", "branch")


def curves(result):
    return [{key: row.get(key) for key in ("trajectory", "loss", "compute", "price", "error")} for row in result.log]


@pytest.mark.parametrize("name", ["harmonica", "l2c"])
def test_a_router_is_a_plan_at_its_budget(branches, name, tmp_path):
    before = teach(branches.batch(samples([5]))).states[-1]
    result = branches.train(tmp_path, routers.get(name)(), BRIEF)
    plan = result.plan
    assert abs(evaluations(branches.profile, plan.computed()[:, 0].numpy()) / STEPS - 0.7) <= 0.01
    assert plan.facts["router"] == name
    if name == "l2c":
        assert plan.computed()[::2].all()
    assert all(parameter.requires_grad for parameter in branches.pipe.transformer.parameters())
    assert torch.equal(teach(branches.batch(samples([5]))).states[-1], before)
    # what is stated is the error of the plan that is given
    trainer = branches.trainer(tmp_path, routers.get(name)(), BRIEF)
    trainer.teachers = [teach(branches.batch(samples(range(2))))]
    assert trainer.error(plan) == pytest.approx(result.error, rel=1e-6)
    assert result.error == min(row["error"] for row in result.log if "error" in row)


def test_cuts_are_trained_alike(tmp_path):
    shop = Shop("unet-digits", "cut", steps=3)
    result = shop.train(tmp_path, routers.get("harmonica")(), replace(SHORT, compute=0.8, trajectories=2))
    assert [row["trajectory"] for row in result.log] == [0, 1, 2]
    assert all(0 < row["loss"] < 10 for row in result.log[1:])


def test_a_higher_price_keeps_less(stacks, tmp_path):
    kept = []
    for place, beta in enumerate((1e-9, 1e3)):
        recipe = routers.get("sdt")(beta=beta, lr=1.0)
        trainer = stacks.trainer(
            tmp_path / str(place), recipe, replace(SHORT, compute=None, trajectories=3, evaluate_every=3)
        )
        result = trainer.run()
        kept.append(result.plan.nfe)
        assert (result.plan.computed()[:, 0].numpy() == above(trainer.best_logits, recipe.threshold)).all()
    assert kept[1] < kept[0] == STEPS


def test_dual_ascent_moves_towards_the_budget(stacks, tmp_path):
    ends = []
    for compute in (0.35, 0.9):
        settings = replace(SHORT, compute=compute, trajectories=4, evaluate_every=4)
        log = stacks.train(tmp_path / str(compute), routers.get("sdt")(lr=0.5), settings).log[1:]
        for before, after in pairwise(log):
            rise = math.log(after["price"] / before["price"])
            assert rise == pytest.approx(PRICE_RATE * (after["compute"] - compute), abs=1e-9)
        ends.append(log[-1]["compute"])
    assert ends[0] < ends[1]


def test_the_best_start_is_taken_and_gone_back_to(stacks, tmp_path, monkeypatch):
    groups = [{"name": "all", "spans": None}]
    measured = replace(
        stacks.profile,
        arrays={**stacks.profile.arrays, "sensitivity": torch.ones(1, STEPS)},
        facts={**stacks.profile.facts, "sensitivity": {"groups": groups, "unmeasured": []}},
    )
    monkeypatch.setattr(stacks, "profile", measured)
    errors = iter([0.5, 0.4, 0.3, 0.6, 0.9])  # of four starts, and after the second trajectory
    monkeypatch.setattr(Trainer, "error", lambda self, plan: next(errors))
    recipe = routers.get("budgeted")()
    trainer = stacks.trainer(tmp_path, recipe, replace(SHORT, trajectories=2))
    result = trainer.run()
    assert result.error == 0.3
    start = Router(starts(measured, 0.5, 1)[2]).logits
    assert torch.equal(trainer.best_logits, start)
    assert torch.equal(trainer.router.logits, start)
    for optimizer in trainer.optimizers.values():
        assert optimizer.param_groups[0]["lr"] == recipe.lr / 2
        assert not optimizer.state


def test_the_step_of_one_update(stacks, tmp_path):
    """Adam's first step is the learning rate, against the gradient of loss and price."""
    trainer = stacks.trainer(tmp_path, routers.get("sdt")(beta=1e3), replace(SHORT, trajectories=1, compute=None))
    before = trainer.router.logits
    trainer.run()
    torch.testing.assert_close(trainer.router.logits[1:], (before - trainer.recipe.lr)[1:], rtol=1e-4, atol=1e-4)
    assert torch.equal(trainer.router.logits[0], before[0])


def test_the_change_of_a_hard_gate_is_that_of_flipping_it(stacks, tmp_path):
    """Of outputs that are linear in the gates, the mean over probes against the losses at both ends."""
    trainer = stacks.trainer(tmp_path, routers.get("budgeted")(start="random"))
    generator = torch.Generator().manual_seed(0)
    base, slopes = torch.randn(4, 50, generator=generator), torch.randn(2, 4, 50, generator=generator)
    ends = torch.tensor([1.0, 0.0])

    def difference(mix):
        return base + torch.tensordot(mix, slopes, dims=1)

    expected = []
    for place in range(2):
        losses = [difference(ends.index_fill(0, torch.tensor([place]), end)).square().mean() for end in (0.0, 1.0)]
        expected.append(losses[1] - losses[0])
    found = []
    for trainer.done in range(2000):
        mix = ends.clone().requires_grad_()
        _, (change,) = trainer._changes(1, difference(mix), {1: Gates(mix, (True, False), mix)})
        found.append(change)
    torch.testing.assert_close(torch.stack(found).mean(0), torch.stack(expected), rtol=0, atol=0.15)
    straight = torch.autograd.grad(difference(mix).square().mean(), mix)[0]
    assert (straight - torch.stack(expected)).abs().min() > 0.5  # what leaving the curvature out would give


def test_gradients_survive_16_bits(stacks, tmp_path):
    """That of a mean over many elements would be rounded to nothing on its way back."""
    trainer = stacks.trainer(tmp_path, routers.get("sdt")())
    mix = torch.full((1,), 0.5, requires_grad=True)
    slope = torch.full((2**18,), 1e-2, dtype=torch.float16)
    _, (change,) = trainer._changes(1, (mix.half() * slope).double(), {1: Gates(mix, (True,))})
    assert float(change) == pytest.approx(2 * 0.5 * 1e-4, rel=0.01)


@pytest.mark.parametrize(("beta", "expected"), [(1e-9, [1.5, 3.5, 5.0]), (None, [2.0, 3.5, 5.0])])
def test_an_update_is_the_mean_of_the_gradients_that_there_are(stacks, tmp_path, beta, expected):
    """Of five trajectories two at a time: the last one alone, and without the first where that finds the price."""
    settings = replace(SHORT, trajectories=5, accumulation=2)
    trainer = stacks.trainer(tmp_path, routers.get("sdt")(beta=beta), settings)
    row, found = trainer.router.rows[1], []
    gate = row.detach().sigmoid()
    trainer.costs = torch.zeros(len(row))  # so that gradients are those of losses alone
    trainer.optimizers = {1: SimpleNamespace(step=lambda: found.append(float((row.grad / gate / (1 - gate)).mean())))}
    for trainer.done in range(5):
        trainer._update(1, torch.full((len(row),), trainer.done + 1.0), row.sigmoid())
        trainer._paid(SimpleNamespace(changes={step: torch.ones(len(row)) for step in range(1, STEPS)}))
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_step_that_is_computed_is_weighed_like_its_neighbours(stacks, tmp_path):
    """It has no loss and does nothing to the sample, until training opens its gates."""
    two = 1 - sum(span.share for span in stacks.profile.spans) * (STEPS - 2) / STEPS
    settings = replace(SHORT, trajectories=1, compute=two)
    trainer = stacks.trainer(tmp_path, routers.get("budgeted")(start="random"), settings)
    trainer.starts = [torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]).expand_as(trainer.router.logits)]
    trainer.run()
    weights = trainer.weights[1:].tolist()
    assert weights[0] != weights[2]
    assert weights[1] == pytest.approx((weights[0] + weights[2]) / 2)


def test_weights_are_per_unit_of_the_loss_of_all_processes(stacks, tmp_path):
    pair = SimpleNamespace(**{**vars(ALONE), "reduce": lambda value, how: (value + 0.5) / 2})  # the other's are 0.5
    trainer = stacks.trainer(tmp_path, routers.get("sdt")(), accelerator=pair)
    trainer._weigh_losses({1: 0.5, 2: 1.5, 3: 0.0}, torch.tensor([0.0, 1.0, 2.0, 3.0]))
    assert trainer.weights.tolist() == pytest.approx([1, 2, 2, 12])


def test_gradients_of_a_router_that_is_given_up_are_dropped(stacks, tmp_path):
    """The update counts those of the two trajectories since, of three that it would take the mean of."""
    settings = replace(SHORT, trajectories=3, accumulation=3)
    trainer = stacks.trainer(tmp_path, routers.get("sdt")(beta=1e-9), settings)
    row, found = trainer.router.rows[1], []
    trainer.costs = torch.zeros(len(row))
    for trainer.done in range(3):
        if trainer.done == 1:
            trainer._go_back()
            step = SimpleNamespace(step=lambda: found.append(row.grad / row.sigmoid() / (1 - row.sigmoid())))
            trainer.optimizers = {1: step}
        trainer._update(1, torch.full((len(row),), trainer.done + 1.0), row.sigmoid())
    torch.testing.assert_close(found, [torch.full((len(row),), 2.5)])  # the mean of 2 and 3


def test_images_are_noised_by_the_scale_of_the_sampler():
    """Where samples begin as noise times that of the noisiest level."""
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    lesson = Lesson(
        SimpleNamespace(stored=None, mixture=SimpleNamespace(pipe=SimpleNamespace(scheduler=scheduler))),
        2,
        torch.full((2, 1, 4, 4), 0.25),
    )
    assert scheduler.init_noise_sigma > 10
    state = lesson._noised(1, SimpleNamespace(sample=noise * scheduler.init_noise_sigma), (None,))[0]
    torch.testing.assert_close(state, 0.25 + scheduler.sigmas[2] * noise)


def test_what_is_stated_of_a_fitted_plan_is_its_own_error(stacks, tmp_path, monkeypatch):
    errors = iter([0.5, 0.4, 0.3])  # of the start, after the only trajectory, and with fitted weights
    monkeypatch.setattr(Trainer, "error", lambda self, plan: next(errors))
    result = stacks.train(tmp_path, routers.get("sdt")(fitted=True), replace(SHORT, trajectories=1))
    assert "left_to_taylor" in result.plan.facts
    assert result.error == result.plan.facts["error"] == 0.3


def test_the_peak_of_earlier_processes_is_remembered(stacks, tmp_path):
    stacks.train(tmp_path, routers.get("sdt")(), replace(SHORT, trajectories=2, evaluate_every=1))
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    peak = 2**50
    state |= {"done": 1, "log": state["log"][:2]}
    state["log"][-1]["peak_bytes"] = peak
    torch.save(state, tmp_path / CHECKPOINT)
    resumed = stacks.train(tmp_path, routers.get("sdt")(), replace(SHORT, trajectories=2, evaluate_every=1))
    assert resumed.log[-1]["peak_bytes"] == peak


def test_a_pipeline_other_than_the_profiles_is_refused(stacks, tmp_path):
    other = Shop("flux-digits", "stack")
    with torch.no_grad():
        for parameter in other.pipe.transformer.parameters():
            parameter.mul_(1.5)
    with pytest.raises(ConfigError, match="not of this model"):
        other.train(tmp_path, routers.get("sdt")())


def test_a_resumed_training_is_of_the_same_sampler(stacks, tmp_path):
    """Also in what a profile may be used beyond."""
    once, other = replace(SHORT, trajectories=1), Shop("flux-digits", "stack")
    stacks.train(tmp_path, routers.get("sdt")(), once)
    scheduler = other.pipe.scheduler
    other.pipe.scheduler = type(scheduler).from_config(scheduler.config, shift=2 * scheduler.config.shift)
    with pytest.warns(DiffusionCacheWarning, match="shift"), pytest.raises(ConfigError, match="another model"):
        other.train(tmp_path, routers.get("sdt")(), once)


def test_a_resumed_training_is_the_same_to_the_bit(stacks, tmp_path):
    recipe = routers.get("harmonica")(order=1)

    class Stop(Exception):
        pass

    def stopping(what, done, of):
        if done == 2:
            raise Stop

    folder = tmp_path / "resumed"
    settings = replace(SHORT, evaluate_every=1)
    whole = stacks.train(tmp_path / "another", recipe, settings)
    with pytest.raises(Stop):
        stacks.train(folder, recipe, settings, progress=stopping)
    assert torch.load(folder / CHECKPOINT, weights_only=True)["done"] == 1
    resumed = stacks.train(folder, recipe, settings)
    assert curves(resumed) == curves(whole)
    states = [torch.load(tmp_path / name / CHECKPOINT, weights_only=True) for name in ("another", "resumed")]
    for key, value in states[0]["router"].items():
        assert torch.equal(states[1]["router"][key], value)
    assert torch.equal(resumed.plan.weights.nan_to_num(0), whole.plan.weights.nan_to_num(0))
    assert resumed.plan.schedule == whole.plan.schedule


def test_the_best_router_is_kept_and_training_ends_early(stacks, tmp_path, monkeypatch):
    errors = iter([0.5, 0.3, 0.4, 0.4, 0.1])
    monkeypatch.setattr(Trainer, "error", lambda self, plan: next(errors))
    result = stacks.train(tmp_path, routers.get("sdt")(), replace(SHORT, trajectories=9, evaluate_every=1, patience=2))
    assert result.error == 0.3
    assert [row["error"] for row in result.log] == [0.5, 0.3, 0.4, 0.4]


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(tmp_path):
    shop = Shop("flux-digits", "stack")
    weight = shop.pipe.transformer.proj_out.weight

    def breaking(what, done, of):
        if done == 1:
            weight.data.fill_(float("nan"))

    with pytest.raises(ConfigError, match="trajectory 1, step 1 is not finite"):
        shop.train(tmp_path, routers.get("sdt")(), replace(SHORT, evaluate_every=1), progress=breaking)
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert state["done"] == 1
    assert all(bool(torch.isfinite(row).all()) for row in state["router"].values())
    assert weight.requires_grad


def test_guidance_that_is_not_linear_is_told(stacks):
    lesson = Lesson(SimpleNamespace(stored=None), 1, None)
    draw = torch.Generator().manual_seed(0)
    lesson.calls = [(torch.randn(2, 8, generator=draw), torch.randn(2, 8, generator=draw))]
    with pytest.raises(ConfigError, match="train without guidance_rescale"):
        lesson._difference(SimpleNamespace(model_output=torch.randn(1, 8, generator=draw)))


@pytest.mark.parametrize("count", [2, 3])
def test_guidance_may_end_early(count):
    """A call of as many rows as there are samples is one branch; of twice as many, two."""
    lesson = Lesson(SimpleNamespace(stored=None), count, None)
    teacher, student = torch.randn(2, 2 * count, 8, generator=torch.Generator().manual_seed(0)).double()
    lesson.calls = [(teacher, student)]
    both = lesson._difference(SimpleNamespace(model_output=1.5 * student[:count] - 0.5 * student[count:]))
    error = student - teacher
    torch.testing.assert_close(both, 1.5 * error[:count] - 0.5 * error[count:])
    lesson.calls = [(teacher[:count], student[:count])]
    torch.testing.assert_close(lesson._difference(SimpleNamespace(model_output=student[:count])), error[:count])


def test_a_denoiser_output_of_another_shape_is_told():
    lesson = Lesson(SimpleNamespace(stored=None), 2, None)
    lesson.calls = [(torch.ones(3, 8), torch.ones(3, 8))]
    with pytest.raises(ConfigError, match="another shape than the denoiser's output, so that the loss"):
        lesson._difference(SimpleNamespace(model_output=torch.ones(2, 8)))


def test_trainings_do_not_go_on_from_others(stacks, tmp_path):
    recipe, once = routers.get("sdt")(), replace(SHORT, trajectories=1)
    stacks.train(tmp_path, recipe, once)
    with pytest.raises(ConfigError, match="another settings"):
        stacks.train(tmp_path, recipe, replace(once, seed=1))
    with pytest.raises(ConfigError, match="another recipe"):
        stacks.train(tmp_path, routers.get("sdt")(lr=0.5), once)
    half = SimpleNamespace(**{**vars(ALONE), "mixed_precision": "bf16"})
    with pytest.raises(ConfigError, match="another precision"):
        stacks.train(tmp_path, recipe, once, accelerator=half)

    def sevens(numbers):
        return [("7", seed) for _, seed in samples(numbers)]

    with pytest.raises(ConfigError, match="another samples"):
        train(stacks.batch, sevens, stacks.profile, recipe, once, folder=tmp_path, accelerator=ALONE)
    with pytest.raises(ConfigError, match="another model and steps"):
        Shop("flux-digits", "stack", steps=3).train(tmp_path, recipe, once)
    (tmp_path / CHECKPOINT).write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="cannot be read"):
        stacks.train(tmp_path, recipe, once)


@pytest.mark.parametrize(
    ("name", "settings", "options", "said"),
    [
        ("sdt", {"compute": 0.1}, {}, "compute is a share"),
        ("sdt", {"compute": None}, {}, "needs a compute"),
        ("l2c", {"compute": 0.7}, {"clean": None}, "trains on images"),
        ("budgeted", {}, {}, "no sensitivity"),
        ("sdt", {"batch": 3}, {"accelerator": SimpleNamespace(num_processes=2)}, "multiple of the 2 processes"),
    ],
)
def test_what_cannot_be_trained_says_so(stacks, name, settings, options, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        stacks.trainer(tmp_path, routers.get(name)(), replace(SHORT, **settings), **options)


def test_one_step_leaves_nothing_to_train(tmp_path):
    with pytest.raises(ConfigError, match="no span to train"):
        Shop("flux-digits", "stack", steps=1).trainer(tmp_path, routers.get("sdt")(), replace(SHORT, compute=1.0))


def test_other_steps_than_the_profile_has(stacks, tmp_path):
    other = Shop("flux-digits", "stack", steps=3)
    other.profile = stacks.profile
    with pytest.raises(ConfigError, match="4 steps and the generation 3"):
        other.train(tmp_path, routers.get("sdt")())


@pytest.mark.parametrize("settings", [{"trajectories": 0}, {"batch": 1.5}, {"held_out": 5000}, {"seed": -2}])
def test_numbers_that_cannot_be(settings):
    with pytest.raises(ConfigError, match=r"must be|may be"):
        Settings(**settings)


def rank(index, folder, shop, settings):
    """What one of two processes does: train, and leave its logits after each update."""
    from accelerate import Accelerator

    os.environ |= {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    rendezvous = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=index, world_size=2)
    torch.save(updates(shop, folder / "shared", settings, Accelerator(cpu=True)), folder / f"{index}.pt")


def updates(shop, folder, settings, accelerator):
    """The first gradient, and the logits after the last update."""
    trainer = shop.trainer(folder, routers.get("harmonica")(beta=1e-3, lr=0.01), settings, accelerator=accelerator)
    first = []
    step = trainer.optimizers[1].step
    trainer.optimizers[1].step = lambda: (first.append(trainer.router.rows[1].grad.clone()), step())
    trainer.run()
    return first[0], trainer.router.logits


def test_two_processes_agree_with_one(tmp_path):
    shop = Shop("flux-digits", "stack", steps=6)
    settings = replace(SHORT, trajectories=4, evaluate_every=4, compute=None)  # 20 updates
    gradient, logits = updates(shop, tmp_path / "alone", settings, ALONE)
    context = torch.multiprocessing.get_context("fork")
    ranks = [context.Process(target=rank, args=(i, tmp_path, shop, settings)) for i in range(2)]
    try:
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(120)
        assert [process.exitcode for process in ranks] == [0, 0]  # None for a hang
    finally:
        for process in ranks:
            process.kill()
    found = [torch.load(tmp_path / f"{i}.pt", weights_only=True) for i in range(2)]
    assert torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][0], gradient, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found[0][1], logits, rtol=1e-4, atol=1e-4)
    assert float((logits[1:] - random_logits(shop.profile, 0)[1:]).abs().min()) > 0.01


@pytest.mark.parametrize(("batch", "sizes"), [(8, [16, 4]), (None, [16, 4]), (3, [3] * 6 + [2]), (1, [1] * 20)])
def test_what_is_held_out_comes_in_small_parts_where_the_profile_did(batch, sizes):
    profile = SimpleNamespace(facts={} if batch is None else {"batch": batch})
    found = parts(range(20), profile)
    assert [len(part) for part in found] == sizes
    assert [number for part in found for number in part] == [*range(20)]


def test_the_error_is_of_all_parts_of_the_held_out_samples(monkeypatch):
    errors = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([4.0])}
    monkeypatch.setattr(module, "last_error", lambda teacher, plan: errors[teacher])
    trainer = SimpleNamespace(teachers=["a", "b"], _mean=lambda value: value)
    assert Trainer.error(trainer, None) == pytest.approx(2.0)
