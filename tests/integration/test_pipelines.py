"""The wrapper as users use it: the four shipped pipelines with every sampler, and bare denoisers in one's own loop."""

import copy
import weakref
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from cases import Spy

import diffusion_cache as dc
from diffusion_cache import reference
from diffusion_cache.engine import StepRecord, intercept, patches
from diffusion_cache.history import History
from diffusion_cache.plan import Plan
from diffusion_cache.schedule import Schedule

STEPS = 6
HEUN = {"heun": diffusers.HeunDiscreteScheduler, "flow-heun": diffusers.FlowMatchHeunDiscreteScheduler}
PIPELINES = [(name, sampler) for name, model in reference.MODELS.items() for sampler in model.samplers] + [
    ("dit-digits", "heun"),
    ("unet-digits", "heun"),
    ("wan-moving-digits", "flow-heun"),
]
PASSES = {"dit-digits": ["0"], "unet-digits": ["0"], "flux-digits": ["cond"], "wan-moving-digits": ["cond", "uncond"]}

pytestmark = [
    pytest.mark.filterwarnings("error::diffusion_cache.errors.DiffusionCacheWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers' own, with NumPy 2
]

each_pipeline = pytest.mark.parametrize(("name", "sampler"), [pytest.param(*p, id="-".join(p)) for p in PIPELINES])
each_model = pytest.mark.parametrize("name", reference.MODELS)


@cache
def shared(name, sampler=None):
    """A pipeline that tests leave as they found it."""
    return fresh(name, sampler)


def fresh(name, sampler=None):
    pipe = reference.load(name, None if sampler in HEUN else sampler)
    if sampler in HEUN:
        pipe.scheduler = HEUN[sampler].from_config(pipe.scheduler.config)
    return made(pipe)


_made = []


def made(pipe):
    _made.append(pipe)
    return pipe


@pytest.fixture(autouse=True)
def nothing_left():
    """Whatever a test did: once everything is disabled, no class is patched that was not before."""
    before = set(patches._patches)
    yield
    for pipe in _made:
        dc.disable(pipe)
    _made.clear()
    assert set(patches._patches) == before


def generate(name, pipe, steps=STEPS, labels=(3,), seeds=(5,), guidance=None, **extra):
    call = reference.inputs(name, labels, seeds, steps=steps, guidance=guidance) | extra
    return reference.images(name, pipe(**call))


def denoiser_of(name, pipe):
    return getattr(pipe, reference.spec(name).denoiser)


def iterations(sampler, steps=STEPS):
    """What the loop runs over: second-order samplers call the denoiser twice a step, but for the last."""
    return 2 * steps - 1 if sampler in HEUN else steps


def computed_steps(summary):
    """One string a pass, 1 where it was computed."""
    passes = dict.fromkeys(record.pass_name for record in summary.records)
    return ["".join(str(int(r.computed)) for r in summary.records if r.pass_name == key) for key in passes]


def untouched(module):
    return not [name for name, child in module.named_modules() if intercept.ATTRIBUTE in vars(child)]


# the same by hand, with no engine


def taken_apart(output):
    """The tensors of a module's output, and what puts them together again."""
    if isinstance(output, torch.Tensor):
        return (output,), lambda streams: streams[0]
    if isinstance(output, tuple):
        return output, tuple
    return output.to_tuple(), lambda streams: type(output)(*streams)


class ByHand:
    """Reuses at fixed steps by replacing `forward` of the span's modules, knowing the model and counting calls.

    computed: which steps are; passes: calls in a step. predict(nodes, features, step) forecasts one stream.
    """

    def __init__(self, name, denoiser, computed, passes, predict, whole=False):
        self.computed, self.passes, self.predict = computed, passes, predict
        self.calls, self.kept = 0, {}
        self.bytes = {}
        self.denoiser = denoiser
        if whole:
            spans = [[denoiser]]
        elif name == "unet-digits":
            blocks = [*denoiser.down_blocks, denoiser.mid_block, *denoiser.up_blocks]
            spans = [blocks[1:-1]]
        elif name == "flux-digits":
            spans = [[*denoiser.transformer_blocks, *denoiser.single_transformer_blocks]]
        elif name == "dit-digits":
            spans = [list(denoiser.transformer_blocks)]
        else:
            spans = [list(denoiser.blocks)]
        self.residual = not whole and name != "unet-digits"
        self.streams = (
            (lambda args, kwargs: (kwargs["encoder_hidden_states"], kwargs["hidden_states"]))
            if name == "flux-digits"
            else (lambda args, kwargs: args[:1])
        )
        self.patched = []
        for index, members in enumerate(spans):
            for position, module in enumerate(members):
                self.patch(module, index, position == 0, position == len(members) - 1)
        self.hook = denoiser.register_forward_pre_hook(self.called)

    def called(self, module, args):
        self.step, self.pass_index = divmod(self.calls, self.passes)
        self.calls += 1

    def patch(self, module, index, first, last):
        forward = module.forward
        self.patched.append(module)

        def by_hand(*args, **kwargs):
            key = index, self.pass_index
            if first and self.residual:
                self.entered = self.streams(args, kwargs)
            if self.step in self.computed:
                output = forward(*args, **kwargs)
                if last:
                    streams, _ = taken_apart(output)
                    if self.residual:
                        streams = [y - x for y, x in zip(streams, self.entered, strict=True)]
                    self.kept.setdefault(key, []).append((self.step, streams))
                    self.bytes[key] = sum(y.nbytes for y in streams)
                self.kept[module, self.pass_index] = output
                return output
            output = self.kept[module, self.pass_index]
            if not last:
                return output
            nodes = [step for step, _ in self.kept[key]]
            features = zip(*(streams for _, streams in self.kept[key]), strict=True)
            streams = [self.predict(nodes, list(feature), self.step) for feature in features]
            if self.residual:
                streams = [x + y for x, y in zip(self.entered, streams, strict=True)]
            return taken_apart(output)[1](streams)

        module.forward = by_hand

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for module in self.patched:
            del module.forward
        self.hook.remove()


def last_feature(nodes, features, step):
    return features[-1]


def line(nodes, features, step):
    if len(nodes) < 2:
        return features[-1]
    slope = (features[-1] - features[-2]) / (nodes[-1] - nodes[-2])
    return features[-1] + (step - nodes[-1]) * slope


@each_pipeline
@pytest.mark.parametrize("scope", ["denoiser", None])
def test_reuse_equals_reusing_by_hand(name, sampler, scope):
    pipe = shared(name, sampler)
    mask = "11010010010"[: iterations(sampler)]
    computed = {step for step, entry in enumerate(mask) if entry == "1"}
    denoiser = denoiser_of(name, pipe)
    with ByHand(name, denoiser, computed, len(PASSES[name]), last_feature, whole=scope == "denoiser") as by_hand:
        expected = generate(name, pipe)
    with dc.cached(pipe, "mask", "reuse", mask=mask, scope=scope):
        cached = generate(name, pipe)
        summary = dc.summary(pipe)
    assert torch.equal(cached, expected)
    assert not torch.equal(cached, generate(name, pipe))
    assert computed_steps(summary) == [mask] * len(PASSES[name])
    assert summary.cache_bytes == sum(by_hand.bytes.values())


@each_model
def test_taylor_equals_a_line_by_hand(name):
    pipe = shared(name)
    mask = "1101001"
    computed = {0, 1, 3, 6}
    with ByHand(name, denoiser_of(name, pipe), computed, len(PASSES[name]), line):
        expected = generate(name, pipe, steps=7)
    with dc.cached(pipe, "mask", "taylor", mask=mask):
        cached = generate(name, pipe, steps=7)
    torch.testing.assert_close(cached, expected, rtol=0, atol=2e-5)
    with dc.cached(pipe, "mask", "reuse", mask=mask):
        assert (generate(name, pipe, steps=7) - expected).abs().max() > 1e-4


# what is counted


@each_pipeline
def test_records(name, sampler):
    pipe = shared(name, sampler)
    total = iterations(sampler)
    with dc.cached(pipe, "interval", every=2):
        generate(name, pipe)
        summary = dc.summary(pipe)
    assert list(summary.records) == [
        StepRecord(step, key, reference.spec(name).denoiser, step % 2 == 0, "schedule", 1, step % 2)
        for step in range(total)
        for key in PASSES[name]
    ]
    reused = total // 2
    assert (summary.total, summary.spans) == (total, 1)
    assert (summary.computed, summary.reused) == ((total - reused) * len(PASSES[name]), reused * len(PASSES[name]))
    assert summary.hit_rate == pytest.approx(reused / total)
    assert summary.scopes == (("cut",) if name == "unet-digits" else ("stack",))


def test_true_guidance_of_flux_is_a_second_pass():
    pipe = shared("flux-digits")
    with dc.cached(pipe, "interval", "reuse", every=3, scope="denoiser"):
        cached = generate("flux-digits", pipe, guidance=2.0)
        summary = dc.summary(pipe)
    assert [(r.step, r.pass_name, r.computed) for r in summary.records] == [
        (step, key, step in (0, 3)) for step in range(STEPS) for key in ("cond", "uncond")
    ]
    with ByHand("flux-digits", pipe.transformer, {0, 3}, 2, last_feature, whole=True):
        assert torch.equal(cached, generate("flux-digits", pipe, guidance=2.0))


@pytest.mark.parametrize(
    ("name", "labels", "guidance", "rows"),
    [
        ("dit-digits", (3,), None, (slice(0, 1), slice(1, 2))),
        ("dit-digits", (3, 4, 5), None, (slice(0, 3), slice(3, 6))),
        ("dit-digits", (3, 4, 5), 1.0, (slice(None),)),
        ("unet-digits", (3, 4), None, (slice(0, 2), slice(2, 4))),
        ("unet-digits", (3, 4), 1.0, (slice(None),)),
        ("flux-digits", (3, 4), None, (slice(None),)),
        ("wan-moving-digits", (3, 4), None, (slice(None),)),
    ],
)
def test_policies_are_told_where_a_call_stands(name, labels, guidance, rows):
    pipe, spy = shared(name), Spy()
    with dc.cached(pipe, spy):
        generate(name, pipe, steps=4, labels=labels, seeds=range(len(labels)), guidance=guidance)
    passes = PASSES[name]  # the first step is computed without asking
    assert [(s.index, s.pass_name) for s in spy.steps] == [(step, key) for step in (1, 2, 3) for key in passes]
    assert [s.evaluation for s in spy.steps] == list(range(len(passes), 4 * len(passes)))
    assert {s.total for s in spy.steps} == {4}
    assert [s.rows for s in spy.steps] == [rows] * len(spy.steps)
    levels = [s.noise_level for s in spy.steps[:: len(passes)]]
    assert levels == sorted(levels)
    assert levels[0] < levels[-1]
    batch = len(labels) * len(rows)
    assert {shape[0] for shape in spy.signals} == {batch}


@pytest.mark.parametrize(
    ("policy", "options", "steps", "expected"),
    [
        ("interval", dict(every=3), 8, "10010010"),
        ("interval", dict(every=3, warmup=2, last=1), 8, "11001001"),
        ("interval", dict(every=8, start=0.25, end=0.75), 8, "11000011"),
        ("interval", dict(every=8, max_consecutive=2), 8, "10010010"),
        ("interval", dict(every=2, max_reused=2), 8, "10101111"),
        ("mask", dict(mask="10010001"), 8, "10010001"),
        ("mask", dict(mask=[1, 0, 1, 0]), 8, "11001100"),
        ("first_block", dict(threshold=1e9), 8, "10000000"),
        ("first_block", dict(threshold=1e9, max_consecutive=3, last=2), 8, "10001011"),
        ("first_block", dict(threshold=0.0), 8, "11111111"),
    ],
)
@pytest.mark.parametrize("name", ["dit-digits", "wan-moving-digits"])
def test_the_schedule_is_the_policys(name, policy, options, steps, expected):
    pipe = shared(name)
    with dc.cached(pipe, policy, **options):
        generate(name, pipe, steps=steps)
        assert computed_steps(dc.summary(pipe)) == [expected] * len(PASSES[name])


def test_reasons_of_an_adaptive_policy():
    pipe = shared("dit-digits")
    with dc.cached(pipe, "first_block", threshold=1e9, warmup=2, max_consecutive=2):
        generate("dit-digits", pipe)
        records = dc.summary(pipe).records
    assert [r.computed for r in records] == [True, True, False, False, True, False]
    reasons = [r.reason for r in records]
    assert reasons[:2] == ["warm-up"] * 2
    assert reasons[4] == "max_consecutive"
    assert all(float(reasons[i].removeprefix("change ")) > 0 for i in (2, 3, 5))


@each_pipeline
def test_one_step(name, sampler):
    pipe = shared(name, sampler)
    expected = generate(name, pipe, steps=1)
    with dc.cached(pipe, "interval", every=2):
        assert torch.equal(generate(name, pipe, steps=1), expected)
        summary = dc.summary(pipe)
    assert computed_steps(summary) == ["1"] * len(PASSES[name])
    assert (summary.total, summary.hit_rate, summary.cache_bytes) == (1, 0.0, 0)


# switching on and off


@each_model
def test_disable_gives_the_uncached_output_back(name):
    pipe = shared(name)
    uncached = generate(name, pipe)
    dc.enable(pipe, "interval", every=2)
    cached = generate(name, pipe)
    dc.disable(pipe)
    assert not torch.equal(cached, uncached)
    assert untouched(denoiser_of(name, pipe))
    assert torch.equal(generate(name, pipe), uncached)
    dc.disable(pipe)  # no-op


def test_cached_is_over_when_its_block_is():
    pipe = shared("dit-digits")
    uncached = generate("dit-digits", pipe)
    with dc.cached(pipe, "interval", every=2) as given:
        assert given is pipe
        assert not torch.equal(generate("dit-digits", pipe), uncached)
    assert torch.equal(generate("dit-digits", pipe), uncached)
    with pytest.raises(ZeroDivisionError), dc.cached(pipe, "interval", every=2):
        _ = 1 / 0
    assert torch.equal(generate("dit-digits", pipe), uncached)
    with pytest.raises(dc.ConfigError, match="not enabled"):
        dc.summary(pipe)


def test_summary_is_of_the_last_generation_and_readable():
    pipe = shared("wan-moving-digits")
    with dc.cached(pipe, "interval", every=3):
        generate("wan-moving-digits", pipe, steps=4)
        first = dc.summary(pipe)
        generate("wan-moving-digits", pipe, steps=6)
        second = dc.summary(pipe)
    assert (first.total, second.total) == (4, 6)
    assert len(first.records) == 8
    text = " ".join(str(second).split())
    assert "interval(every=3) + taylor(order=1, feature='auto')" in text
    assert "transformer cond │ █··█··" in text
    assert "transformer uncond │ █··█··" in text
    assert "2/6" in text
    assert "1 span(s) at scope stack" in text
    assert "4 calls computed and 8 reused, hit rate 67%" in text
    assert f"cache {second.cache_mib:.2f} MiB" in text
    assert second.cache_mib * 2**20 == second.cache_bytes > 0


# what is kept


@each_model
def test_features_are_released_at_the_end(name, monkeypatch):
    pipe = shared(name)
    features = []
    observe = History.observe

    def observed(self, *args):
        observe(self, *args)
        features.extend(weakref.ref(tensor) for tensor in self.slots[-1])

    monkeypatch.setattr(History, "observe", observed)
    alive = []

    def count(pipe, step, timestep, kwargs):
        alive.append(sum(ref() is not None for ref in features))
        return kwargs

    with dc.cached(pipe, "interval", every=2):
        generate(name, pipe, **({} if name == "dit-digits" else {"callback_on_step_end": count}))
        session = vars(pipe)["_diffusion_cache"]
        assert len(features) >= 3
        assert [ref() for ref in features] == [None] * len(features)
        assert session.last_run.spans._states == {}
        assert session.last_run.decisions._states == {}
    if name != "dit-digits":
        assert max(alive) > 0  # they did live during the run


def test_features_are_released_after_an_exception():
    pipe = shared("flux-digits")

    def stop(pipe, step, timestep, kwargs):
        if step == 3:
            raise RuntimeError("stop")
        return kwargs

    with dc.cached(pipe, "interval", every=2):
        with pytest.raises(RuntimeError, match="stop"):
            generate("flux-digits", pipe, callback_on_step_end=stop)
        assert vars(pipe)["_diffusion_cache"].last_run.spans._states == {}
        assert [r.step for r in dc.summary(pipe).records] == [0, 1, 2, 3]


@each_model
def test_bytes_grow_with_the_batch_and_the_history(name):
    pipe = shared(name)
    used = {}
    for labels, order in (((3,), 0), ((3, 4), 0), ((3,), 2)):
        with dc.cached(pipe, "interval", "taylor", every=2, order=order):
            generate(name, pipe, labels=labels, seeds=labels)
            used[labels, order] = dc.summary(pipe).cache_bytes
    one = used[(3,), 0]
    assert one > 0
    assert used == {((3,), 0): one, ((3, 4), 0): 2 * one, ((3,), 2): 3 * one}


# what pipelines offer beside


@pytest.mark.parametrize("name", ["unet-digits", "flux-digits", "wan-moving-digits"])
def test_callbacks(name):
    pipe = shared(name)
    seen = []

    def halve(pipe, step, timestep, kwargs):
        seen.append((step, float(timestep)))
        return {"latents": kwargs["latents"] * 0.5} if step == 2 else kwargs

    mask = "101001"
    with ByHand(name, denoiser_of(name, pipe), {0, 2, 5}, len(PASSES[name]), last_feature):
        expected = generate(name, pipe, callback_on_step_end=halve)
    by_hand, seen = seen, []
    with dc.cached(pipe, "mask", "reuse", mask=mask):
        assert torch.equal(generate(name, pipe, callback_on_step_end=halve), expected)
        assert computed_steps(dc.summary(pipe)) == [mask] * len(PASSES[name])
        assert not torch.equal(generate(name, pipe), expected)
    assert seen == by_hand
    assert [step for step, _ in seen] == list(range(STEPS))


@pytest.mark.parametrize("name", ["unet-digits", "flux-digits", "wan-moving-digits"])
def test_latent_output(name):
    pipe = shared(name)
    call = reference.inputs(name, (3,), (5,), steps=STEPS) | {"output_type": "latent", "return_dict": False}
    with dc.cached(pipe, "interval", "reuse", every=2):
        latents = pipe(**call)[0]
        assert dc.summary(pipe).total == STEPS
    call |= reference.inputs(name, (3,), (5,), steps=STEPS) | {"output_type": "latent"}
    with ByHand(name, denoiser_of(name, pipe), {0, 2, 4}, len(PASSES[name]), last_feature):
        assert torch.equal(latents, pipe(**call)[0])


@each_model
def test_batches_may_change_from_call_to_call(name):
    pipe = shared(name)
    batches = [(3,), (1, 2, 7), (4, 4), (3,)]
    fresh_outputs = []
    for labels in batches:
        with dc.cached(pipe, "interval", every=2):
            fresh_outputs.append(generate(name, pipe, labels=labels, seeds=range(len(labels))))
    with dc.cached(pipe, "interval", every=2):
        for labels, expected in zip(batches, fresh_outputs, strict=True):
            assert torch.equal(generate(name, pipe, labels=labels, seeds=range(len(labels))), expected)
            assert dc.summary(pipe).hit_rate == 0.5


def test_images_do_not_depend_on_their_neighbours_under_a_planned_policy():
    pipe = shared("dit-digits")
    with dc.cached(pipe, "interval", every=2):
        alone = generate("dit-digits", pipe, labels=(3,), seeds=(5,))
        together = generate("dit-digits", pipe, labels=(3, 8), seeds=(5, 6))
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_image_to_image_begins_in_the_middle(strength):
    pipe = fresh("unet-digits")
    pipe.vae.encode = lambda image: SimpleNamespace(latents=image)
    pipe = made(diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe, vae=pipe.vae))
    pipe.set_progress_bar_config(disable=True)
    call = reference.inputs("unet-digits", (3,), (5,), steps=8)
    image = torch.linspace(0, 1, 256).reshape(1, 1, 16, 16)
    with dc.cached(pipe, "interval", every=2, last=1):
        pipe(image=image, strength=strength, **call)
        summary = dc.summary(pipe)
    total = int(8 * strength)
    assert summary.total == total
    assert computed_steps(summary) == [("10101011" if total == 8 else "1011")]


# users swap parts


@pytest.mark.parametrize(
    ("name", "other", "after_a_run"),
    [
        ("dit-digits", diffusers.DDIMScheduler, True),
        ("dit-digits", diffusers.DPMSolverMultistepScheduler, True),
        ("dit-digits", diffusers.DPMSolverMultistepScheduler, False),
        ("dit-digits", diffusers.EulerDiscreteScheduler, True),
        ("dit-digits", diffusers.HeunDiscreteScheduler, False),
        ("wan-moving-digits", diffusers.FlowMatchEulerDiscreteScheduler, False),
        ("wan-moving-digits", diffusers.UniPCMultistepScheduler, True),
    ],
)
def test_scheduler_swapped_after_enabling(name, other, after_a_run):
    def scheduler():
        extra = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
        config = dict(pipe.scheduler.config) | (extra if other is diffusers.UniPCMultistepScheduler else {})
        return other.from_config(config)

    pipe = fresh(name)
    total = iterations("heun" if other in HEUN.values() else None)
    own, pipe.scheduler = pipe.scheduler, scheduler()
    with dc.cached(pipe, "interval", every=2):
        expected = generate(name, pipe)
    pipe.scheduler = own
    before = vars(other).copy()
    dc.enable(pipe, "interval", every=2)
    if after_a_run:
        generate(name, pipe)
    pipe.scheduler = scheduler()
    assert torch.equal(generate(name, pipe), expected)
    summary = dc.summary(pipe)
    assert summary.total == total
    assert computed_steps(summary) == [("10" * total)[:total]] * len(PASSES[name])
    dc.disable(pipe)
    assert vars(other) == before


@dataclass
class OwnScheduler:
    """A user's own: no scheduler of diffusers', and not hashable, as dataclasses are."""

    rate: float = 0.05

    init_noise_sigma, order, config = 1.0, 1, {}

    def set_timesteps(self, num_inference_steps, device=None):
        self.timesteps = torch.linspace(999, 1, num_inference_steps)

    def scale_model_input(self, sample, timestep):
        return sample

    def step(self, velocity, timestep, sample):
        return SimpleNamespace(prev_sample=sample - self.rate * velocity)


def test_a_scheduler_of_ones_own():
    pipe = fresh("dit-digits")
    pipe.scheduler = OwnScheduler()
    with ByHand("dit-digits", pipe.transformer, {0, 2, 4}, 1, last_feature):
        expected = generate("dit-digits", pipe)
    with dc.cached(pipe, "interval", "reuse", every=2):
        assert torch.equal(generate("dit-digits", pipe), expected)
        assert dc.summary(pipe).total == STEPS
    assert set(vars(pipe.scheduler)) == {"rate", "timesteps"}


def test_scheduler_swapped_after_enabling_is_forgotten():
    pipe = fresh("dit-digits")
    own = pipe.scheduler
    before = dict(vars(own))
    dc.enable(pipe, "interval", every=2)
    generate("dit-digits", pipe)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(own.config)
    generate("dit-digits", pipe)
    dc.disable(pipe)
    assert set(vars(pipe.scheduler)) == set(before)
    assert set(vars(own)) == set(before)


def test_scheduler_copied_inside_the_run_still_counts():
    pipe = fresh("wan-moving-digits")

    def replace(pipe, step, timestep, kwargs):
        pipe.scheduler = copy.deepcopy(pipe.scheduler)
        return kwargs

    with dc.cached(pipe, "interval", every=2):
        expected = generate("wan-moving-digits", pipe)
        records = dc.summary(pipe).records
        assert torch.equal(generate("wan-moving-digits", pipe, callback_on_step_end=replace), expected)
        assert dc.summary(pipe).records == records


def test_copies_of_a_scheduler_are_forgotten_too():
    pipe = fresh("wan-moving-digits")
    own = set(vars(pipe.scheduler))
    with dc.cached(pipe, "interval", every=2):
        generate("wan-moving-digits", pipe, steps=2)
        own |= set(vars(pipe.scheduler)) - {"_diffusion_cache_mark"}
        pipe.scheduler = copy.deepcopy(pipe.scheduler)
        generate("wan-moving-digits", pipe, steps=2)
    assert set(vars(pipe.scheduler)) == own


@pytest.mark.parametrize(("name", "after_a_run"), [("dit-digits", False), *((name, True) for name in reference.MODELS)])
def test_denoiser_swapped_after_enabling(name, after_a_run):
    pipe = fresh(name)
    part = reference.spec(name).denoiser
    own = getattr(pipe, part)
    other = copy.deepcopy(own)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    setattr(pipe, part, other)
    uncached = generate(name, pipe)
    with dc.cached(pipe, "interval", every=2):
        expected = generate(name, pipe)
    setattr(pipe, part, own)

    dc.enable(pipe, "interval", every=2)
    if after_a_run:
        assert not torch.equal(generate(name, pipe), expected)
    setattr(pipe, part, other)
    assert torch.equal(generate(name, pipe), expected)
    assert dc.summary(pipe).hit_rate == 0.5
    assert not untouched(other)
    assert untouched(own)
    dc.disable(pipe)
    assert untouched(other)
    assert torch.equal(generate(name, pipe), uncached)


def test_denoiser_swapped_and_never_run_again():
    pipe = fresh("dit-digits")
    own = pipe.transformer
    dc.enable(pipe, "interval", every=2)
    pipe.transformer = copy.deepcopy(own)
    dc.disable(pipe)
    assert untouched(own)
    assert untouched(pipe.transformer)


def test_denoiser_swapped_for_one_that_cannot_be_cached_runs_uncached():
    pipe = fresh("dit-digits")
    own = pipe.transformer
    dc.enable(pipe, "interval", every=2, scope="stack")

    class Stackless(torch.nn.Module):
        config, dtype, device = own.config, own.dtype, own.device

        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(1, 1)

        def forward(self, x, timestep=None, class_labels=None):
            return diffusers.models.modeling_outputs.Transformer2DModelOutput(sample=x * 0.5)

    pipe.transformer = Stackless()
    with pytest.warns(dc.DiffusionCacheWarning, match="running without the cache.*no stack"):
        cached = generate("dit-digits", pipe)
    dc.disable(pipe)
    assert torch.equal(generate("dit-digits", pipe), cached)
    assert untouched(own)


@each_model
def test_a_pipeline_that_shares_the_denoiser_is_unaffected(name):
    pipe = fresh(name)
    uncached = generate(name, pipe)
    dc.enable(pipe, "interval", every=2)
    cached = generate(name, pipe)
    other = made(type(pipe).from_pipe(pipe, vae=pipe.vae))
    other.set_progress_bar_config(disable=True)
    assert denoiser_of(name, other) is denoiser_of(name, pipe)
    with pytest.warns(dc.DiffusionCacheWarning, match="has modules of"):
        assert torch.equal(generate(name, other), uncached)
    with pytest.raises(dc.ConfigError, match="not enabled"):
        dc.summary(other)
    assert torch.equal(generate(name, pipe), cached)

    # with a method of its own, and one of the two disabled
    dc.enable(other, "interval", every=3)
    own = generate(name, other)
    assert torch.equal(generate(name, pipe), cached)
    assert computed_steps(dc.summary(other))[0] == "100100"
    dc.disable(pipe)
    with pytest.warns(dc.DiffusionCacheWarning, match="has modules of"):
        assert torch.equal(generate(name, pipe), uncached)
    assert torch.equal(generate(name, other), own)
    dc.disable(other)
    assert untouched(denoiser_of(name, pipe))


def test_a_pipeline_of_another_class_that_shares_the_denoiser():
    pipe = fresh("flux-digits")
    other = made(diffusers.FluxImg2ImgPipeline.from_pipe(pipe, vae=pipe.vae))
    other.set_progress_bar_config(disable=True)
    call = dict(image=torch.linspace(0, 1, 256).reshape(1, 1, 16, 16), strength=0.5)

    def edit():
        return generate("flux-digits", other, steps=8, **call)

    uncached = edit()
    dc.enable(pipe, "interval", every=2)
    generate("flux-digits", pipe)
    with pytest.warns(dc.DiffusionCacheWarning, match="has modules of"):
        assert torch.equal(edit(), uncached)
    dc.enable(other, "interval", every=2)
    assert not torch.equal(edit(), uncached)
    assert dc.summary(other).total == 4
    assert computed_steps(dc.summary(other)) == ["1010"]
    dc.disable(pipe)
    dc.disable(other)
    assert torch.equal(edit(), uncached)


# inspect


@each_model
def test_inspect_before_and_after_a_generation(name):
    pipe = fresh(name)
    part = reference.spec(name).denoiser
    before = dc.inspect(pipe)
    assert before.pipeline == reference.spec(name).pipeline
    stacks = [span.name for span in before.spans]
    assert len(stacks) == (2 if name == "flux-digits" else 1)
    assert {span.denoiser for span in before.spans} == {part}
    assert {span.kind for span in before.spans} == {"cut" if name == "unet-digits" else "stack"}
    assert 0 < sum(span.parameters for span in before.spans) < denoiser_of(name, pipe).num_parameters()
    assert before.history == 2
    assert before.cache_bytes is None
    assert "bytes are known after a generation" in " ".join(str(before).split())
    assert untouched(denoiser_of(name, pipe))

    dc.enable(pipe, "interval", every=2)
    assert dc.inspect(pipe).cache_bytes is None  # nothing was generated yet
    cached = generate(name, pipe)
    after = dc.inspect(pipe)
    assert after.cache_bytes == dc.summary(pipe).cache_bytes > 0
    assert [(s.name, s.modules, s.parameters) for s in after.spans] == [
        ("+".join(stacks), sum(s.modules for s in before.spans), sum(s.parameters for s in before.spans))
    ]
    # asking changes nothing
    summary = dc.summary(pipe)
    assert dc.inspect(pipe, reference.inputs(name, (3, 4), (5, 6)), forecaster="reuse").history == 1
    assert dc.summary(pipe) == summary
    assert torch.equal(generate(name, pipe), cached)


def test_inspect_after_a_generation_that_stored_nothing_of_a_span():
    pipe = fresh("flux-digits")
    schedule = Schedule(tuple(((True, step % 2 == 0),) for step in range(STEPS)))
    dc.enable(pipe, plan=Plan("second", "stack", None, "auto", schedule, ()))
    generate("flux-digits", pipe)
    found = dc.inspect(pipe, forecaster="reuse")
    assert [span.feature_bytes == 0 for span in found.spans] == [True, False]
    assert found.cache_bytes == dc.summary(pipe).cache_bytes > 0
    assert "takes" in str(found)


@each_model
def test_inspect_measures_with_inputs(name):
    pipe = fresh(name)
    uncached = generate(name, pipe)
    found = dc.inspect(pipe, reference.inputs(name, (3,), (5,)), forecaster="reuse")
    with dc.cached(pipe, "interval", "reuse", every=2):
        generate(name, pipe)
        assert found.cache_bytes == dc.summary(pipe).cache_bytes > 0
    with dc.cached(pipe, "interval", "reuse", every=2, scope="denoiser"):
        generate(name, pipe)
        used = dc.summary(pipe).cache_bytes
    whole = dc.inspect(pipe, reference.inputs(name, (3,), (5,)), forecaster="reuse", scope="denoiser")
    assert [span.kind for span in whole.spans] == ["denoiser"]
    assert whole.cache_bytes == used
    assert untouched(denoiser_of(name, pipe))
    assert torch.equal(generate(name, pipe), uncached)


def test_inspect_leaves_the_generators_alone():
    call = reference.inputs("dit-digits", (3,), (5,), steps=4)
    before = call["generator"][0].get_state()
    dc.inspect(shared("dit-digits"), call)
    assert torch.equal(call["generator"][0].get_state(), before)
    before = torch.get_rng_state()
    dc.inspect(shared("dit-digits"), {**call, "generator": None})
    assert torch.equal(torch.get_rng_state(), before)


def test_inspect_that_fails_restores_what_was_enabled():
    pipe = fresh("dit-digits")
    dc.enable(pipe, "interval", every=2)
    cached = generate("dit-digits", pipe)
    with pytest.raises(TypeError, match="no_such_argument"):
        dc.inspect(pipe, {"no_such_argument": 1})
    assert torch.equal(generate("dit-digits", pipe), cached)
    assert dc.summary(pipe).hit_rate == 0.5
    dc.disable(pipe)


def test_inspect_runs_as_many_steps_as_the_pipeline_can():
    asked = []

    class NoSteps(diffusers.DiTPipeline):
        """One that has its number of steps from elsewhere."""

        def __call__(self, class_labels, generator=None, output_type="pt"):
            asked.append(4)
            return diffusers.DiTPipeline.__call__(
                self, class_labels, generator=generator, num_inference_steps=4, output_type=output_type
            )

    class FiveSteps(diffusers.DiTPipeline):
        """One that needs five."""

        def __call__(self, class_labels, num_inference_steps=5, **rest):
            asked.append(num_inference_steps)
            if num_inference_steps < 5:
                raise IndexError("list index out of range")
            return diffusers.DiTPipeline.__call__(self, class_labels, num_inference_steps=num_inference_steps, **rest)

    sizes = dc.inspect(shared("dit-digits"), reference.inputs("dit-digits", (3,), (5,))).cache_bytes
    assert sizes > 0
    for cls, expected in [(NoSteps, [4]), (FiveSteps, [2, 6])]:
        pipe = made(cls(**fresh("dit-digits").components))
        call = reference.inputs("dit-digits", (3,), (5,), steps=6)
        given = {name: call[name] for name in ("class_labels", "generator", "output_type")}
        if cls is FiveSteps:
            given = call
        before = given["generator"][0].get_state()
        assert dc.inspect(pipe, given).cache_bytes == sizes
        assert asked == expected
        assert torch.equal(given["generator"][0].get_state(), before)
        asked.clear()
        assert untouched(pipe.transformer)


def test_inspect_at_other_scopes():
    blocks = dc.inspect(shared("flux-digits"), scope="block").spans
    assert [span.name for span in blocks] == [f"transformer_blocks.{i}" for i in range(3)] + [
        f"single_transformer_blocks.{i}" for i in range(8)
    ]
    (cut,) = dc.inspect(shared("unet-digits"), scope="cut", depth=2).spans
    assert (cut.name, cut.modules) == ("cut.2", 3)


# a bare denoiser in one's own loop


class Loop:
    """A user's own loop over the DiT, with guidance as two calls a step."""

    def __init__(self):
        self.pipe = shared("dit-digits")
        self.denoiser = self.pipe.transformer
        self.scheduler = copy.deepcopy(self.pipe.scheduler)

    @torch.no_grad()
    def __call__(self, steps=STEPS, after_step=None, by_scheduler=True):
        self.scheduler.set_timesteps(steps)
        x = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(5))
        step = type(self.scheduler).step if by_scheduler else UNPATCHED_STEP
        for t in self.scheduler.timesteps:
            cond, null = (self.denoiser(x, timestep=t[None], class_labels=torch.tensor([c])).sample for c in (3, 1000))
            x = step(self.scheduler, null + 1.5 * (cond - null), t, x).prev_sample
            if after_step is not None:
                after_step()
        return x


UNPATCHED_STEP = diffusers.DDIMScheduler.step


@pytest.fixture
def loop_by_hand():
    loop = Loop()
    with ByHand("dit-digits", loop.denoiser, {0, 3}, 2, last_feature):
        expected = loop()
    assert not torch.equal(expected, loop())
    return expected


EXPECTED_LOOP = [(step, key, step in (0, 3)) for step in range(STEPS) for key in ("0", "1")]


@pytest.mark.parametrize("num_steps", [None, STEPS])
@pytest.mark.parametrize("how", ["scheduler", "next_step", "both", "neither"])
def test_own_loop(loop_by_hand, how, num_steps):
    loop = Loop()
    before = vars(diffusers.DDIMScheduler).copy()
    with dc.run(loop.denoiser, "interval", "reuse", every=3, num_steps=num_steps) as run:
        output = loop(
            after_step=run.next_step if how in ("next_step", "both") else None,
            by_scheduler=how in ("scheduler", "both"),
        )
        summary = run.summary()
    assert torch.equal(output, loop_by_hand)
    assert [(r.step, r.pass_name, r.computed) for r in summary.records] == EXPECTED_LOOP
    assert summary.total == num_steps
    assert {r.reason for r in summary.records} == {"schedule" if num_steps else "interval"} | (
        set() if num_steps else {"warm-up"}
    )
    assert summary.cache_bytes > 0
    assert untouched(loop.denoiser)
    assert vars(diffusers.DDIMScheduler) == before


def test_next_step_may_be_called_before_each_step(loop_by_hand):
    loop = Loop()
    with dc.run(loop.denoiser, "interval", "reuse", every=3) as run:
        run.next_step()
        assert torch.equal(loop(after_step=run.next_step), loop_by_hand)


def test_two_runs_of_one_loop_are_apart(loop_by_hand):
    loop = Loop()
    for _ in range(2):
        with dc.run(loop.denoiser, "interval", "reuse", every=3):
            assert torch.equal(loop(), loop_by_hand)


def test_own_loop_with_an_exception_leaves_nothing():
    loop = Loop()
    uncached = loop()

    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), dc.run(loop.denoiser, "interval", every=3) as run:
        loop(after_step=lambda: len(run.summary().records) == 8 and fail())
    assert untouched(loop.denoiser)
    assert run._run.spans._states == {}
    assert run.summary().hit_rate == 0.5
    assert torch.equal(loop(), uncached)


def test_own_loop_over_the_denoiser_of_an_enabled_pipeline(loop_by_hand):
    loop = Loop()
    with dc.cached(loop.pipe, "interval", every=2):
        cached = generate("dit-digits", loop.pipe)
        with dc.run(loop.denoiser, "interval", "reuse", every=3):
            assert torch.equal(loop(), loop_by_hand)
        assert torch.equal(generate("dit-digits", loop.pipe), cached)


def test_any_module_that_takes_a_timestep_can_be_run():
    class Plain(torch.nn.Module):
        calls = 0

        def forward(self, x, t: Any):
            self.calls += 1
            return {"velocity": x * t, "extra": None}

    model, x = Plain(), torch.ones(2, 3)
    with dc.run(model, "interval", "taylor", every=3):
        outputs = [model(x, t)["velocity"][0, 0].item() for t in (1.0, 3.0, 5.0, 8.0, 20.0, 30.0, 40.0)]
    # the line through (0, 1) and (3, 8), in steps
    assert outputs == pytest.approx([1, 1, 1, 8, 8 + 7 / 3, 8 + 14 / 3, 40])
    assert model.calls == 3


def test_summary_of_a_run_after_its_block():
    loop = Loop()
    with dc.run(loop.denoiser, "interval", every=3) as run:
        loop()
        inside = run.summary()
    assert run.summary() == inside
