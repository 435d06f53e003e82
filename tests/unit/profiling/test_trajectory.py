"""Trajectory matching: the weights against independent solutions, on every sampler, and what it leaves alone."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler, UniPCMultistepScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import nn

import diffusion_cache as dc
from diffusion_cache import reference
from diffusion_cache.context import Correction
from diffusion_cache.engine import Observer
from diffusion_cache.engine.patches import wrapped_step
from diffusion_cache.engine.session import Method
from diffusion_cache.forecasters.fitted import Fit, Fitted, taylor_weights
from diffusion_cache.policies import Guarded
from diffusion_cache.policies.mask import Mask
from diffusion_cache.profiling import trajectory
from diffusion_cache.profiling.generation import Batch, attached, state_of, teach
from diffusion_cache.profiling.trajectory import (
    NUDGES,
    ONE_FEATURE,
    Fitting,
    Settings,
    UnfitError,
    _root_weights,
    fit,
    guidance_weights,
)

STEPS = 10
MASK = Mask("1101001010")
NODES = {2: (0, 1), 4: (0, 1, 3), 5: (0, 1, 3), 7: (1, 3, 6), 9: (3, 6, 8)}  # of the reused steps
SAMPLERS = [
    ("dit-digits", "ddim"),
    ("dit-digits", "dpm++"),
    ("unet-digits", "ddim"),
    ("flux-digits", "flow-euler"),
    ("wan-moving-digits", "flow-euler"),
    ("wan-moving-digits", "unipc"),
]
RIDGE = 1e-3
# replaying fitted weights in float32: guidance is combined in float64 while fitting, by the pipeline afterwards
REPLAYED = 2e-5


def batch_of(name, pipe, count=2, seed=None, **options):
    def call():
        if seed is not None:
            torch.manual_seed(seed)
        return pipe(**{**reference.inputs(name, range(3, 3 + count), range(5, 5 + count), steps=STEPS), **options})

    return Batch(pipe, call, lambda output: reference.images(name, output), count)


def cached(batch, forecaster, policy=MASK, **where):
    with dc.cached(batch.pipe, policy, forecaster, granularity="batch", **where):
        return batch.images(batch.call()).float(), dc.summary(batch.pipe).records


def guidance_of(name):
    """What guidance weighs the branches with, in their order."""
    scale = reference.spec(name).guidance
    return {"unet-digits": [1 - scale, scale], "flux-digits": [1.0]}.get(name, [scale, 1 - scale])


def solved(columns, wanted, owners, ridge=RIDGE):
    """The constrained least squares over a basis of what sums to zero for each owner; columns: [unknowns, elements]."""
    members = [[i for i, owner in enumerate(owners) if owner == one] for one in dict.fromkeys(owners)]
    basis = []
    for places in members:
        for place in places[1:]:
            row = torch.zeros(len(owners), dtype=torch.float64)
            row[places[0]], row[place] = -1.0, 1.0
            basis.append(row)
    basis = torch.stack(basis, dim=1)
    design = torch.cat([columns.T @ basis, ridge**0.5 * torch.diag(columns.norm(dim=1)) @ basis])
    right = torch.cat([wanted, torch.zeros(len(owners), dtype=torch.float64)])
    return basis @ torch.linalg.lstsq(design, right[:, None]).solution.flatten()


@pytest.mark.parametrize("small", [1.0, 1e-5, 1e-7, 1e-9])
def test_an_owner_that_hardly_matters_is_solved_for_alike(small):
    """Its weights sum to zero too, and it does not take from the other's."""
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(8, 500, generator=generator, dtype=torch.float64)
    columns[4:] *= small
    wanted = columns.T @ torch.tensor([0.5, -0.2, -0.4, 0.1, 0.3, 0.2, -0.4, -0.1], dtype=torch.float64)
    found = trajectory._solve(columns, wanted, [RIDGE] * 8, [range(4), range(4, 8)])
    unit = torch.tensor([1.0] * 4 + [1 / small] * 4, dtype=torch.float64)  # in which the reference is as sure
    expected = solved(columns * unit[:, None], wanted, [0] * 4 + [1] * 4) * unit
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert float(found[4:].sum()) == pytest.approx(0.0, abs=1e-6)


class Replay(Observer):
    """A generation with fitted weights, and of each step: features, what the sampler was given, and its copy."""

    def __init__(self, batch, forecaster):
        self.features, self.nodes, self.reused, self.steps = {}, [], [], []
        method = Method(Guarded(MASK), forecaster, "denoiser", granularity="batch")

        def make(step):
            def noted(scheduler, output, time, sample, *args, **kwargs):
                self.steps.append((copy.deepcopy(scheduler), output.clone(), time, sample.clone(), step))
                return step(scheduler, output, time, sample, *args, **kwargs)

            return noted

        with attached(batch.pipe, method, self), wrapped_step(batch.pipe.scheduler, make):
            self.images = batch.images(batch.call())

    def span_computed(self, frame, span, inputs, leaves, outputs):
        self.features[frame.step.index, frame.position] = outputs[0].double().clone()


@pytest.mark.parametrize(
    ("name", "sampler"), [pair for pair in SAMPLERS if pair[1] != "flow-euler" or "flux" in pair[0]]
)
def test_weights_are_the_closed_form_of_a_linear_span(name, sampler):
    """At scope denoiser the output is Σ w_j F_j, so each step has one least-squares solution, joint in branches."""
    exact = name != "flux-digits"  # whose pipeline mixes in float32 noise
    batch = batch_of(name, reference.load(name, sampler, torch.float64 if exact else torch.float32))
    teacher = teach(batch)
    result = fit(teacher, MASK, Settings("denoiser"))
    replay, guidance = Replay(batch, result.forecaster), guidance_of(name)
    checked = 0
    for step, nodes in NODES.items():
        scheduler, output, time, sample, ask = replay.steps[step]

        def led(output, now=scheduler, time=time, sample=sample, ask=ask):
            return ask(copy.deepcopy(now), output, time, sample, return_dict=False)[0].double()

        here = led(output)
        slope = (led(output + 1) - here)[:2]
        target = output[:2].double() + (teacher.states[step].double() - here)[:2] / slope
        columns, owners, start = [], [], torch.zeros_like(target)
        for branch, scale in enumerate(guidance):
            position, row = divmod(branch, teacher.rows)
            held = [replay.features[node, position].chunk(teacher.rows)[row] for node in nodes]
            columns += [(scale * feature).flatten() for feature in held]
            owners += [branch] * len(nodes)
            start += scale * sum(w * f for w, f in zip(taylor_weights(nodes, step), held, strict=True))
        found = solved(torch.stack(columns), (target - start).flatten(), owners).split(len(nodes))
        for branch, delta in enumerate(found):
            key = step, 0, branch
            if step not in result.notes:
                assert result.forecaster.table[key].nodes == nodes
                expected = torch.tensor(taylor_weights(nodes, step), dtype=torch.float64) + delta
                weights = torch.tensor(result.forecaster.table[key].weights, dtype=torch.float64)
                assert (weights - expected).norm() <= (1e-6 if exact else 1e-3) * expected.norm()
                checked += 1
    assert checked >= 4 * len(guidance)
    assert (replay.images - result.images).abs().max() <= REPLAYED


class Known(nn.Module):
    """A stack as one block, which adds a residual that is given instead of running, if one is."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks, self.residual, self.found = blocks, None, None
        self.norm1 = blocks[0].norm1  # the model's output layer takes the timestep's embedding from there

    def forward(self, hidden, *args, **kwargs):
        if self.residual is not None:
            return hidden + self.residual
        out = hidden
        for block in self.blocks:
            out = block(out, *args, **kwargs)
        self.found = out - hidden
        return out


@torch.no_grad()
def test_weights_of_a_stack_by_another_way():
    """Written out for a bare DiT and DDIM in float64, no guidance: the student's path and the weights along it."""
    name = "dit-digits"
    pipe = reference.load(name, "ddim", torch.float64)
    batch = batch_of(name, pipe, guidance_scale=1.0)
    teacher = teach(batch)
    result = fit(teacher, MASK, Settings("stack"))

    model, labels = copy.deepcopy(pipe.transformer), torch.tensor([3, 4])
    stack = Known(model.transformer_blocks)
    model.transformer_blocks = nn.ModuleList([stack])
    sampler = DDIMScheduler.from_config(pipe.scheduler.config)
    sampler.set_timesteps(STEPS)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    shape = (1, *teacher.states[0].shape[1:])
    x = torch.cat([torch.randn(shape, generator=g, dtype=torch.float64) for g in generators])
    history, found, nudge = {}, {}, NUDGES[torch.float64]
    for step, time in enumerate(sampler.timesteps):

        def output(residual, x=x, time=time):
            stack.residual = residual
            return model(x, timestep=time.expand(2), class_labels=labels).sample

        def led(e, x=x, time=time):
            return sampler.step(e, time, x).prev_sample

        if step not in NODES:
            x = led(output(None))
            history[step] = stack.found
            continue
        held = [history[node] for node in NODES[step]]
        taylor = torch.tensor(taylor_weights(NODES[step], step), dtype=torch.float64)

        def forecast(weights, held=held):
            return sum(weight * residual for weight, residual in zip(weights, held, strict=True))

        before = output(forecast(taylor))
        slope = led(before + 1) - led(before)
        wanted = (teacher.states[step] - led(before)) / slope
        moved = [output(forecast(taylor) + nudge * residual) for residual in held]
        columns = torch.stack([((e - before) / nudge).flatten() for e in moved])
        weights = taylor + solved(columns, wanted.flatten(), [0] * len(held))
        better = (output(forecast(weights)) - before - wanted).norm() < wanted.norm()
        assert better == (step not in result.notes)
        found[step] = weights if better else taylor
        x = led(output(forecast(found[step])))
    assert set(result.forecaster.table) == {(step, 0, 0) for step in NODES if step not in result.notes}
    assert len(result.forecaster.table) >= 4
    for (step, _, _), entry in result.forecaster.table.items():
        assert entry.nodes == NODES[step]
        assert torch.tensor(entry.weights, dtype=torch.float64) == pytest.approx(found[step], rel=1e-5, abs=1e-6)
    assert (teacher.states[-1] - x).norm() < 0.5 * (teacher.states[-1] - taylor_path(batch)).norm()


def taylor_path(batch):
    """Where Taylor's weights end up."""
    states = []

    def make(step):
        def noted(*args, **kwargs):
            result = step(*args, **kwargs)
            states.append(result[0] if isinstance(result, tuple) else result.prev_sample)
            return result

        return noted

    with wrapped_step(batch.pipe.scheduler, make):
        cached(batch, "taylor", scope="stack")
    return states[-1]


def sound(result, branches=1, groups=1):
    """Each entry of the table for one step it may be for, and its weights sum to one."""
    fitted = set(NODES) - set(result.notes)
    assert set(result.forecaster.table) == {(s, g, b) for s in fitted for g in range(groups) for b in range(branches)}
    for (step, _, _), entry in result.forecaster.table.items():
        assert entry.nodes == NODES[step][-result.forecaster.length :]
        assert sum(entry.weights) == pytest.approx(1.0, abs=1e-6)
    assert set(result.errors) == fitted
    assert all(after < before for before, after in result.errors.values())
    return len(fitted)


@pytest.mark.parametrize(("name", "sampler"), SAMPLERS)
def test_every_sampler_of_the_shipped_models(name, sampler):
    batch = batch_of(name, reference.load(name, sampler))
    teacher = teach(batch)
    result = fit(teacher, MASK, Settings())
    assert sound(result, teacher.branches) >= 4
    taylor, records = cached(batch, "taylor")
    replayed, again = cached(batch, result.forecaster)
    assert (replayed - result.images).abs().max() <= REPLAYED
    assert records == again
    assert (result.images - teacher.images).norm() < (taylor - teacher.images).norm()
    assert type(result.forecaster) is Fitted


@pytest.mark.parametrize(
    ("name", "scope", "groups"),
    [
        ("flux-digits", "stack", (0, 1)),
        ("flux-digits", "branch", ()),
        ("dit-digits", "branch", (0, 1) * 12),
        ("dit-digits", "block", ()),
        ("unet-digits", "cut", ()),
        ("wan-moving-digits", "denoiser", ()),
    ],
)
def test_scopes_and_groups(name, scope, groups):
    batch = batch_of(name, reference.load(name))
    teacher = teach(batch)
    result = fit(teacher, MASK, Settings(scope, groups=groups))
    assert sound(result, teacher.branches, len(set(groups)) or 1) >= 3
    assert result.forecaster.groups == groups
    taylor, _ = cached(batch, "taylor", scope=scope)
    replayed, _ = cached(batch, result.forecaster, scope=scope)
    assert (replayed - result.images).abs().max() <= REPLAYED
    assert (result.images - teacher.images).norm() < (taylor - teacher.images).norm()


def test_groups_are_given_weights_of_their_own():
    """More unknowns fit better where the student has come the same way, at the first step that is fitted."""
    name = "flux-digits"
    batch = batch_of(name, reference.load(name))
    teacher = teach(batch)
    one, two, same = (fit(teacher, MASK, Settings("stack", groups=groups)) for groups in ((), (0, 1), (0, 0)))
    assert two.errors[2][0] == pytest.approx(one.errors[2][0])
    assert two.errors[2][1] < one.errors[2][1]
    assert two.forecaster.table[2, 0, 0].weights != pytest.approx(two.forecaster.table[2, 1, 0].weights, abs=1e-2)
    assert set(same.forecaster.table) == set(one.forecaster.table)
    for key, entry in same.forecaster.table.items():  # sums in BLAS may differ in their last digit
        assert entry.weights == pytest.approx(one.forecaster.table[key].weights, rel=1e-6)


@pytest.mark.parametrize("history", [1, 2, 4])
def test_lengths_of_the_history(history):
    name = "dit-digits"
    batch = batch_of(name, reference.load(name))
    result = fit(teach(batch), MASK, Settings("stack", history=history))
    nodes = {2: (0, 1), 4: (0, 1, 3), 5: (0, 1, 3), 7: (0, 1, 3, 6), 9: (1, 3, 6, 8)}
    assert {key[0]: entry.nodes for key, entry in result.forecaster.table.items()} == {
        step: held[-history:] for step, held in nodes.items() if step not in result.notes
    }
    if history == 1:  # one weight that must be one
        assert all(entry.weights == pytest.approx((1.0,)) for entry in result.forecaster.table.values())
    else:
        assert len(result.errors) >= 3
    assert result.forecaster.history == history
    assert (cached(batch, result.forecaster, scope="stack")[0] - result.images).abs().max() <= REPLAYED


def test_a_strong_ridge_keeps_taylor():
    name = "dit-digits"
    teacher = teach(batch_of(name, reference.load(name)))
    distance = []
    for ridge in (1e-3, 1.0, 1e3):
        table = fit(teacher, MASK, Settings("stack", ridge=ridge)).forecaster.table
        pairs = [(entry.weights, taylor_weights(entry.nodes, key[0])) for key, entry in table.items() if key[0] == 2]
        distance.append(max(abs(a - b) for pair in pairs for a, b in zip(*pair, strict=True)))
    assert distance[0] > distance[1] > distance[2]
    assert 0 < distance[2] < 1e-2


def test_a_schedule_with_nothing_reused():
    name = "dit-digits"
    teacher = teach(batch_of(name, reference.load(name)))
    result = fit(teacher, Mask("1"), Settings("stack"))
    assert (result.forecaster.table, result.notes, result.errors) == ({}, {}, {})
    assert torch.equal(result.images, teacher.images)


def test_the_run_is_counted_as_without_fitting():
    """Copies of the sampler step and calls are made again, and neither is taken for a step of the run."""
    name, records = "wan-moving-digits", []
    batch = batch_of(name, reference.load(name, "unipc"))

    def call():
        output = batch.call()
        summary = dc.summary(batch.pipe)
        records.append((summary.records, summary.cache_bytes, summary.total))
        return output

    _, expected = cached(batch, Fitted())
    result = fit(teach(batch), MASK, Settings())
    fit(teach(Batch(batch.pipe, call, batch.images, 2)), MASK, Settings())
    taught, fitted = records
    assert [record.computed for record in taught[0]] == [True] * 2 * STEPS
    # of the forecasts themselves the records tell what they were
    assert [record._replace(note="") for record in fitted[0]] == [record._replace(note="") for record in expected]
    assert fitted[2] == STEPS
    assert len(result.errors) >= 4
    with dc.cached(batch.pipe, MASK, result.forecaster, granularity="batch"):
        batch.call()
        assert dc.summary(batch.pipe).cache_bytes == fitted[1]


# what is left to Taylor


def kept_taylor(batch, result, where="stack"):
    """All as without fitting."""
    assert result.forecaster.table == {}
    assert torch.equal(result.images, cached(batch, "taylor", scope=where)[0])


@pytest.mark.parametrize("options", [{"clip_sample": True, "clip_sample_range": 0.5}, {"thresholding": True}])
def test_a_sampler_that_is_not_affine(options):
    name = "dit-digits"
    pipe = reference.load(name)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **options)
    batch = batch_of(name, pipe)
    result = fit(teach(batch), MASK, Settings("stack"))
    assert result.notes == dict.fromkeys(NODES, "the sampler's step is not affine in the model output")
    kept_taylor(batch, result)


def test_guidance_that_is_rescaled():
    """By the ratio of two standard deviations, sample by sample."""
    name = "unet-digits"
    batch = batch_of(name, reference.load(name), guidance_rescale=0.7, guidance_scale=4.0)
    result = fit(teach(batch), MASK, Settings("cut"))
    assert result.notes == dict.fromkeys(NODES, "guidance is no linear combination of the denoiser's outputs")
    kept_taylor(batch, result, "cut")


def test_rescaled_guidance_is_told_from_rounding():
    generator = torch.Generator().manual_seed(0)
    cond = torch.randn(4, 1, 16, 16, generator=generator)
    spread = torch.linspace(0.1, 0.15, 4)[:, None, None, None]
    uncond = cond + spread * torch.randn(cond.shape, generator=generator)
    cond, uncond = cond.bfloat16(), uncond.bfloat16()
    guided = uncond + 4 * (cond - uncond)
    assert guidance_weights([uncond.double(), cond.double()], guided) == pytest.approx([-3.0, 4.0], abs=0.01)
    with pytest.raises(UnfitError, match="no linear combination"):
        guidance_weights([uncond.double(), cond.double()], rescale_noise_cfg(guided, cond, 0.7))


def test_what_guidance_adds_to_a_linear_combination_stays():
    one, other, beside = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0)).double()
    given = 2 * one - other + 1e-3 * beside
    moved = SimpleNamespace(_repeat=lambda calls, like: [one + 1.0, other - 0.5])
    found = Fitting._guided(moved, given, [one, other], [], [2.0, -1.0])
    torch.testing.assert_close(found, given + 2.5, rtol=0, atol=1e-12)


def test_guidance_that_ends_before_the_run_does():
    name = "unet-digits"

    def stop(pipe, step, timestep, given):
        if step == 4:
            pipe._guidance_scale = 0.0
            given["prompt_embeds"] = given["prompt_embeds"][len(given["prompt_embeds"]) // 2 :]
        return given

    options = dict(callback_on_step_end=stop, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    batch = batch_of(name, reference.load(name), **options)
    result = fit(teach(batch), MASK, Settings("cut"))
    assert result.notes == {}
    assert set(result.forecaster.table) == {(step, 0, branch) for step in (2, 4, 7, 9) for branch in (0, 1)}
    # of one branch then, whose rows a run takes for those of two
    for step, nodes in {7: (5, 6), 9: (5, 6, 8)}.items():
        one, other = (result.forecaster.table[step, 0, branch] for branch in (0, 1))
        assert one == other
        assert one.nodes == nodes
    assert (cached(batch, result.forecaster, scope="cut")[0] - result.images).abs().max() <= REPLAYED


def two_transformers():
    """Wan 2.2: another one from half of the noise on, at step 7 of 10."""
    pipe = reference.load("wan-moving-digits")
    pipe.register_modules(transformer_2=copy.deepcopy(pipe.transformer))
    pipe.register_to_config(boundary_ratio=0.5)
    return batch_of("wan-moving-digits", pipe)


def test_a_denoiser_that_begins_within_the_run():
    teacher = teach(two_transformers())
    assert teacher.begun == (0, 7)
    result = fit(teacher, Mask("1101001100"), Settings("denoiser"))
    assert result.notes == {8: ONE_FEATURE, 9: ONE_FEATURE}
    assert {key[0]: entry.nodes for key, entry in result.forecaster.table.items()} == {
        2: (0, 1), 4: (0, 1, 3), 5: (0, 1, 3)
    }  # fmt: skip


def test_guidance_that_pauses():
    """Its branches hold features of different steps then, for which a plan has no place."""

    def pause(pipe, step, timestep, given):
        pipe._guidance_scale = 1.0 if step < 3 else 3.0
        return given

    name = "wan-moving-digits"
    batch = batch_of(name, reference.load(name), callback_on_step_end=pause)
    result = fit(teach(batch), MASK, Settings("denoiser"))
    assert result.notes == dict.fromkeys((4, 5, 7, 9), "guidance branches hold features of different steps")
    assert set(result.forecaster.table) == {(2, 0, 0)}


# precision


@pytest.mark.parametrize("sampler", [DDIMScheduler, UniPCMultistepScheduler])
def test_in_half_precision(sampler):
    """What guidance and the sampler round is no reason to leave steps to Taylor."""
    name = "dit-digits"
    pipe = reference.load(name, dtype=torch.bfloat16)
    pipe.scheduler = sampler.from_config(pipe.scheduler.config)
    batch = batch_of(name, pipe)
    teacher = teach(batch)
    assert teacher.states[0].dtype == torch.bfloat16
    result = fit(teacher, MASK, Settings("denoiser"))
    assert result.notes == {}
    assert all(after < before for before, after in result.errors.values())
    taylor, _ = cached(batch, "taylor", scope="denoiser")
    assert (result.images - teacher.images).norm() < 0.9 * (taylor - teacher.images).norm()


# samples that leave their path


def test_weights_of_samples():
    missed = torch.tensor([[1.0, -1.0], [3.0, 3.0], [1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)[..., None]
    assert _root_weights(missed).square().flatten().tolist() == pytest.approx([1 / 2, 1 / 10, 1 / 2, 1.0])
    assert _root_weights(torch.zeros(2, 3)).flatten().tolist() == [1.0, 1.0]


def test_one_sample_does_not_decide_for_all():
    batch = batch_of("dit-digits", reference.load("dit-digits"), count=5)
    teacher = teach(batch)
    generator = torch.Generator().manual_seed(0)
    for state in teacher.states:  # [2 · 5, ...], as guidance doubles what this pipeline steps on
        state[::5] += torch.randn(state[:1].shape, generator=generator)
    others = {}
    for robust in (False, True):
        result = fit(teacher, MASK, Settings("stack", robust=robust))
        assert all(after < before for before, after in result.errors.values())
        others[robust] = (result.images - teacher.images)[1:].norm()
    assert others[True] < 0.8 * others[False]


# noise


class Noisy:
    """A model under a sampler that draws noise, with generators that are kept for a look at them afterwards."""

    def __init__(self, name, scheduler, own, **options):
        self.name, self.own, self.options = name, own, options
        self.pipe = reference.load(name)
        if scheduler is not None:
            config = {**self.pipe.scheduler.config, "clip_sample": False}
            self.pipe.scheduler = scheduler.from_config(config)
        self.batch = Batch(self.pipe, self.call, lambda output: reference.images(name, output), 2)

    def call(self):
        torch.manual_seed(7)
        given = reference.inputs(self.name, (3, 4), (5, 6), steps=STEPS)
        if not self.own:
            given["generator"] = torch.Generator().manual_seed(5)
        self.generators = given["generator"] if self.own else [given["generator"]]
        return self.pipe(**{**given, **self.options})

    def ends(self):
        return [torch.get_rng_state().tolist(), *(generator.get_state().tolist() for generator in self.generators)]


@pytest.mark.parametrize(
    ("name", "scheduler", "own", "options"),
    [
        ("unet-digits", None, True, {"eta": 0.7}),
        ("unet-digits", EulerAncestralDiscreteScheduler, False, {}),
        ("dit-digits", DDPMScheduler, True, {}),  # its pipeline leaves the noise to torch's own generator
    ],
    ids=["ddim with eta", "ancestral, one generator", "ddpm, no generator"],
)
def test_noise_is_the_teachers(name, scheduler, own, options):
    noisy = Noisy(name, scheduler, own, **options)
    torch.manual_seed(7)
    seeded = torch.get_rng_state().tolist()
    noisy.batch.call()
    expected = noisy.ends()
    assert expected != [seeded, *(torch.Generator().manual_seed(s).get_state().tolist() for s in (5, 6)[: 1 + own])]
    teacher = teach(noisy.batch)
    assert noisy.ends() == expected
    result = fit(teacher, MASK, Settings())
    assert noisy.ends() == expected
    taylor, _ = cached(noisy.batch, "taylor")
    assert len(result.errors) >= 4
    # a noise of its own at every step would leave far more than this
    assert (result.images - teacher.images).norm() < 0.75 * (taylor - teacher.images).norm()
    assert all(before < 0.95 for step, (before, _) in result.errors.items() if step != STEPS - 1)
    assert (cached(noisy.batch, result.forecaster)[0] - result.images).abs().max() <= REPLAYED


def path_of(batch, forecaster, **where):
    """The states that a cached run goes through."""
    states = []

    def make(step):
        def noted(*args, **kwargs):
            result = step(*args, **kwargs)
            states.append(state_of(result).clone())
            return result

        return noted

    with wrapped_step(batch.pipe.scheduler, make):
        cached(batch, forecaster, **where)
    return states


@pytest.mark.parametrize(
    ("name", "channels", "feature", "scale", "exact"),
    [
        ("flux-digits", 4, "auto", False, False),  # its pipeline mixes in float32 noise
        ("dit-digits", 1, "auto", False, True),
        ("dit-digits", 1, "residual", True, True),
        ("dit-digits", 1, "residual", False, True),
    ],
)
def test_planted_corrections_are_recovered(name, channels, feature, scale, exact):
    """On a path that weights and corrections have made, they are what puts the sampler back on it."""
    pipe = reference.load(name, dtype=torch.float64 if exact else torch.float32)
    batch = batch_of(name, pipe, guidance_scale=1.0)
    planted = {}
    for step, nodes in NODES.items():
        start = taylor_weights(nodes, step)
        weights = (start[0] + 0.1, *start[1:-1], start[-1] - 0.1)
        bias = tuple(0.05 * (step - 5) + 0.02 * channel for channel in range(channels))
        planted[step, 0, 0] = Fit(nodes, weights, Correction((1.0 + 0.01 * step * scale,) * channels, bias))
    teacher = teach(batch)
    forecaster = Fitted(planted, feature=feature)
    teacher.states = path_of(batch, forecaster, scope="denoiser")
    settings = Settings("denoiser", ridge=0.0, feature=feature, scale=scale, bias=True, strengths=(0.0, 0.0))
    result = fit(teacher, MASK, settings)
    assert set(result.forecaster.table) == set(planted)
    for key, found in result.forecaster.table.items():
        for got, wanted in (
            (found.weights, planted[key].weights),
            *zip(found.correction, planted[key].correction, strict=True),
        ):
            assert got == pytest.approx(wanted, **({"abs": 1e-6} if exact else {"abs": 2e-3}))
    without = fit(teacher, MASK, replace(settings, bias=False, scale=False))
    assert all(without.errors[step][1] > 5 * result.errors[step][1] for step in without.errors)


@pytest.mark.parametrize(("name", "scaled"), [("dit-digits", False), ("flux-digits", True)])
def test_regressors_of_spans_inside(name, scaled):
    """Closer to the path at the first step, where the student has come the same way; replayed, the same images."""
    batch = batch_of(name, reference.load(name))
    teacher = teach(batch)
    plain = fit(teacher, MASK, Settings("stack"))
    result = fit(teacher, MASK, Settings("stack", scale=True, bias=True, strengths=(1e-3, 1e-1)))
    first = next(iter(NODES))
    assert result.errors[first][0] == pytest.approx(plain.errors[first][0])
    assert result.errors[first][1] < plain.errors[first][1]
    assert result.forecaster.corrected_channels == 96
    corrections = [found.correction for found in result.forecaster.table.values()]
    # a DiT normalises what its blocks give, so that a scale of it is no scale of the model output
    assert all((one.scale != (1.0,) * 96) == scaled for one in corrections)
    assert all(any(one.bias) for one in corrections)
    replayed, _ = cached(batch, result.forecaster, scope="stack")
    assert (replayed - result.images).abs().max() <= REPLAYED


def test_a_scale_that_does_nothing_is_left_alone():
    batch = batch_of("dit-digits", reference.load("dit-digits"))
    teacher = teach(batch)
    plain, result = (fit(teacher, MASK, Settings("stack", scale=scale)) for scale in (False, True))
    assert result.errors.keys() == plain.errors.keys()
    for key, found in plain.forecaster.table.items():
        assert result.forecaster.table[key].weights == pytest.approx(found.weights)


def test_one_feature_can_be_corrected():
    """Which is what ERTACache rectifies: the newest feature, by a scale and a bias."""
    batch = batch_of("dit-digits", reference.load("dit-digits"))
    result = fit(teach(batch), MASK, Settings("denoiser", history=1, scale=True, bias=True))
    assert len(result.errors) >= 4
    assert (cached(batch, result.forecaster, scope="denoiser")[0] - result.images).abs().max() <= REPLAYED
