"""Bad input is an error that says what was wrong and what to do, and changes nothing."""

import re
import warnings
from functools import cache

import numpy as np
import pytest
import torch

import diffusion_cache as dc
from diffusion_cache import reference
from diffusion_cache.engine import patches
from diffusion_cache.forecasters import Taylor
from diffusion_cache.policies import Guards, Interval

DIT, UNET = "dit-digits", "unet-digits"

pytestmark = pytest.mark.filterwarnings("error::diffusion_cache.errors.DiffusionCacheWarning")


@cache
def load(name):
    return reference.load(name)


def generate(name):
    return reference.images(name, load(name)(**reference.inputs(name, (3,), (5,), steps=4)))


def snapshot(name):
    """All that enabling could change."""
    pipe = load(name)
    modules = {key: dict(vars(module)) for key, module in getattr(pipe, reference.spec(name).denoiser).named_modules()}
    counts = {key: patch.count for key, patch in patches._patches.items()}
    return dict(vars(pipe)), dict(vars(pipe.scheduler)), modules, counts


@cache
def uncached(name):
    return generate(name)


_enabled = {}  # pipelines with a method enabled, with what they generate and its summary


def retire(name):
    """Disable a pipeline that still generates what it did before all the tests that used it."""
    output, summary = _enabled.pop(name)
    try:
        assert torch.equal(generate(name), output)
        assert dc.summary(load(name)) == summary
    finally:
        dc.disable(load(name))


@pytest.fixture
def unchanged():
    """Gives a pipeline with a method enabled that has generated; when the test is over nothing may have changed."""
    before = {}

    def use(name):
        uncached(name)
        pipe = load(name)
        if name not in _enabled:
            dc.enable(pipe, "interval", every=3)
            output = generate(name)
            assert not torch.equal(output, uncached(name))
            _enabled[name] = output, dc.summary(pipe)
        before[name] = snapshot(name), dc.summary(pipe)
        return pipe

    yield use
    for name, (state, summary) in before.items():
        try:
            assert snapshot(name) == state
            assert dc.summary(load(name)) == summary
        except BaseException:
            del _enabled[name]
            dc.disable(load(name))
            raise


@pytest.fixture
def not_enabled():
    """Gives a pipeline with nothing enabled."""

    def use(name):
        if name in _enabled:
            retire(name)
        uncached(name)
        return load(name)

    return use


@pytest.fixture(scope="module", autouse=True)
def disabled_in_the_end():
    patched = set(patches._patches)
    yield
    for name in list(_enabled):
        retire(name)
    assert set(patches._patches) == patched
    assert all(torch.equal(generate(name), uncached(name)) for name in (DIT, UNET))


def says(message, *words):
    missing = [word for word in words if word not in str(message)]
    assert not missing, f"{missing} not in: {message}"


def bad(options, *words, marks=()):
    """Options, and words that the error about them must hold."""
    text = ",".join(f"{key}={value}" for key, value in options.items())
    text = re.sub(r" at 0x\w+", "", text)  # the same in every worker
    return pytest.param(options, words, marks=marks, id=re.sub(r"\W+", "-", text)[:50].strip("-"))


METHODS = [
    # unknown names
    bad(dict(policy="intervall"), "Unknown policy 'intervall'", "Did you mean 'interval'?"),
    bad(dict(policy="firstblock"), "Unknown policy 'firstblock'", "Did you mean 'first_block'?"),
    bad(dict(policy="zzz"), "Unknown policy 'zzz'", "Known: ", "first_block", "interval", "mask"),
    bad(dict(policy=""), "Unknown policy ''", "Known: "),
    bad(dict(policy="deepcache"), "Unknown policy 'deepcache'. It is a published system", "(pipe, method='deepcache')"),
    bad(dict(policy="FBCache"), "Unknown policy 'FBCache'. Give policy='first_block' instead."),
    bad(dict(policy="taylorseer"), "Give forecaster='taylor' instead."),
    bad(dict(forecaster="tailor"), "Unknown forecaster 'tailor'", "Did you mean 'taylor'?"),
    bad(dict(forecaster="zzz"), "Unknown forecaster 'zzz'", "Known: ", "reuse", "taylor_paper"),
    # unknown options
    bad(dict(evry=2), "Unknown option 'evry'", "policy 'interval'", "forecaster 'taylor'", "Did you mean 'every'?"),
    bad(dict(warm_up=2), "Unknown option 'warm_up'", "Did you mean 'warmup'?"),
    bad(dict(ordr=2), "Unknown option 'ordr'", "Did you mean 'order'?"),
    bad(dict(polciy="interval"), "Unknown option 'polciy'", "Did you mean 'policy'?"),
    bad(dict(profil="dit-digits-ddim"), "Unknown option 'profil'", "Did you mean 'profile'?"),
    bad(dict(target_resue=0.5), "Unknown option 'target_resue'", "Did you mean 'target_reuse'?"),
    bad(dict(scop="block"), "Unknown option 'scop'", "Did you mean 'scope'?"),
    bad(dict(dept=2), "Unknown option 'dept'", "Did you mean 'depth'?"),
    bad(dict(threshold=0.1), "Unknown option 'threshold'", "policy 'interval'", "Known: ", "every"),
    bad(dict(forecaster="reuse", order=1), "Unknown option 'order'", "forecaster 'reuse'", "Known: ", "feature"),
    bad(dict(every=2, start=0.1, qqq=1), "Unknown option 'qqq'"),
    # things that are no methods
    bad(dict(policy=3), "policy must be a name or an instance", "3"),
    bad(dict(policy=object()), "policy must be a name or an instance", "object"),
    bad(dict(policy=Interval), "policy must be a name or an instance", "Interval"),
    bad(dict(policy=Taylor()), "policy must be a name or an instance", "Taylor(order=1"),
    bad(dict(policy=Guards()), "policy must be a name or an instance", "Guards(warmup=1"),
    bad(dict(policy={"every": 2}), "policy must be a name or an instance", "{'every': 2}"),
    bad(dict(forecaster=Interval()), "forecaster must be a name or an instance", "Interval(every=2)"),
    bad(dict(forecaster=3), "forecaster must be a name or an instance", "3"),
    # values
    bad(dict(every=0), "every must be at least 1", "not 0"),
    bad(dict(every=-3), "every must be at least 1", "not -3"),
    bad(dict(warmup=0), "warmup must be at least 1", "not 0", "first step"),
    bad(dict(warmup=-1), "warmup must be at least 1", "not -1"),
    bad(dict(last=-1), "last must be ≥ 0", "not -1"),
    bad(dict(max_consecutive=-1), "max_consecutive must be None or ≥ 0", "not -1"),
    bad(dict(max_reused=-2), "max_reused must be None or ≥ 0", "not -2"),
    bad(dict(start=0.6, end=0.4), "start and end must satisfy 0 ≤ start ≤ end ≤ 1", "0.6 and 0.4"),
    bad(dict(start=-0.1), "start and end must satisfy 0 ≤ start ≤ end ≤ 1", "-0.1"),
    bad(dict(end=1.5), "start and end must satisfy 0 ≤ start ≤ end ≤ 1", "1.5"),
    bad(dict(start=float("nan")), "start and end must satisfy", "nan"),
    bad(dict(order=8), "order must be a whole number from 0 to 7", "not 8"),
    bad(dict(order=-1), "order must be a whole number from 0 to 7", "not -1"),
    bad(dict(order=1.5), "order must be a whole number", "not 1.5"),
    bad(dict(order="1"), "order must be a whole number", "not '1'"),
    bad(dict(feature="residuals"), "feature must be one of auto, residual, output", "'residuals'"),
    bad(dict(policy="first_block", threshold=-0.1), "threshold must be a number ≥ 0", "not -0.1"),
    bad(dict(policy="first_block", threshold=float("nan")), "threshold must be a number ≥ 0", "nan"),
    bad(dict(policy="first_block", front=0), "front ≥ 1", "front=0"),
    bad(dict(policy="first_block", back=-1), "back ≥ 0", "back=-1"),
    bad(dict(policy="mask"), "policy 'mask' needs the option 'mask': one entry a step"),
    bad(dict(policy="magcache"), "policy 'magcache' needs the option 'ratios': γ_s = ", "published/magcache/"),
    bad(dict(corrector="magnitude"), "corrector 'magnitude' needs the option 'ratios': γ of every step"),
    bad(
        dict(corrector="magnitude", ratios=[1.0]),
        "corrector 'magnitude' does not mend what forecaster 'taylor' gives: take forecaster='reuse'",
    ),
    bad(dict(policy="mask", mask=""), "mask: give a string or sequence of 0 and 1, one a step", "not ''"),
    bad(dict(policy="mask", mask=[]), "mask: give a string or sequence of 0 and 1", "not []"),
    bad(dict(policy="mask", mask="1020"), "mask: give a string or sequence of 0 and 1", "'1020'"),
    bad(dict(policy="mask", mask=[1, 2]), "mask: give a string or sequence of 0 and 1", "[1, 2]"),
    bad(dict(policy="mask", mask=101), "mask: give a string or sequence of 0 and 1", "101"),
    bad(dict(policy="mask", mask=None), "mask: give a string or sequence of 0 and 1", "None"),
    bad(dict(policy="mask", mask=torch.tensor([1, 0])), "mask: give a string or sequence of 0 and 1", "tensor"),
    # options of another type
    bad(dict(every="two"), "policy 'interval'", "every must be a whole number, not 'two'"),
    bad(dict(every=None), "every must be a whole number, not None"),
    bad(dict(every=2.5), "every must be a whole number, not 2.5"),
    bad(dict(every=True), "every must be a whole number, not True"),
    bad(dict(every=float("nan")), "every must be a whole number, not nan"),
    bad(dict(every=torch.tensor(2)), "every must be a whole number, not tensor(2)"),
    bad(dict(policy="first_block", threshold=None), "threshold must be a number, not None"),
    bad(dict(policy="first_block", threshold="0.1"), "threshold must be a number, not '0.1'"),
    bad(dict(policy="first_block", front="1"), "front must be a whole number, not '1'"),
    bad(dict(policy="first_block", front=1.5), "front must be a whole number, not 1.5"),
    bad(dict(warmup="3"), "warmup must be a whole number, not '3'"),
    bad(dict(warmup=None), "warmup must be a whole number, not None"),
    bad(dict(warmup=1.5), "warmup must be a whole number, not 1.5"),
    bad(dict(last="1"), "last must be a whole number, not '1'"),
    bad(dict(last=1.5), "last must be a whole number, not 1.5"),
    bad(dict(start="0.1"), "start must be a number, not '0.1'"),
    bad(dict(end=None), "end must be a number, not None"),
    bad(dict(max_reused="x"), "max_reused must be a whole number or None, not 'x'"),
    bad(dict(max_reused=1.5), "max_reused must be a whole number or None, not 1.5"),
    # options beside an instance
    bad(dict(policy=Interval(every=2), every=3), "'every' belongs to the policy, which is an instance: set it there"),
    bad(dict(forecaster=Taylor(order=2), order=1), "'order' belongs to the forecaster, which is an instance"),
    bad(
        dict(policy=Interval(every=2.5)),
        "every must be a whole number",
    ),
    bad(dict(policy="magcache", ratios=[1.0, 1.0], levels=np.ones(3)), "3 levels for 2 ratios"),
    bad(dict(policy="magcache", ratios=[1.0], always=["x"]), "always must be a list of steps", "['x']"),
    bad(dict(policy="racer", mask=np.ones(2)), "mask: give a string or sequence of 0 and 1"),
    bad(dict(policy="ra_cfg", guidance=float("nan")), "guidance must be a number or None, not nan"),
    # targets and profiles
    bad(dict(policy="first_block", target_reuse="half"), "reuse must be a number or None, not 'half'"),
    bad(dict(policy=None, speedup=2), "speedup needs a profile: ", " or a policy: ", "policy='first_block', speedup=2"),
    bad(dict(policy=None, profile="published/magcache/flux-dev-2"), "Did you mean 'published/magcache/flux-dev-28'"),
    bad(dict(policy="first_block", speedup=[2]), "speedup must be a number or None, not [2]"),
    bad(dict(policy=None, profile=3, nfe=20), "profile must be a Profile, its folder", "not 3"),
    bad(dict(policy="select", method="fora"), "policy 'select' is a method of its own", "give policy or method"),
    bad(dict(policy=None, method="fora", profile=3), "profile must be a Profile, its folder", "not 3"),
    bad(dict(policy=None, method="fora", ignore=["weights"]), "ignore needs a profile", "method='fora'"),
    bad(dict(policy=None, profile="dit-digits-ddim", nfe=25, ignore="weights"), "ignore must be a list of fields"),
    bad(dict(policy=None, profile="dit-digits-ddim", nfe=25, ignore=3), "ignore must be a list of fields", "not 3"),
    # scopes
    bad(dict(scope="stak"), "Unknown scope 'stak'", "Did you mean 'stack'?"),
    bad(dict(scope=""), "Unknown scope ''", "Known: block, branch, cut, denoiser, stack"),
    bad(dict(scope=3), "Unknown scope 3", "Known: "),
    bad(dict(scope=["block"]), "Unknown scope ['block']"),
    bad(
        dict(policy="first_block", scope="block"), "'first_block' does not serve scope 'block'", "it serves cut, stack"
    ),
    bad(dict(policy="first_block", scope="denoiser"), "'first_block' does not serve scope 'denoiser'", "cut, stack"),
    bad(dict(depth=1.0), "depth must be a whole number", "1.0"),
    bad(dict(depth="1"), "depth must be a whole number", "'1'"),
    bad(dict(depth=True), "depth must be a whole number", "True"),
    bad(dict(policy="first_block", front=12), "front=12 and back=0", "transformer_blocks: 12", "at least one block"),
    bad(
        dict(policy="first_block", front=6, back=6),
        "front=6 and back=6",
        "transformer_blocks: 12",
        "at least one block",
    ),
    bad(dict(policy="first_block", front=1, back=40), "front=1 and back=40", "back in the last"),
]


@pytest.mark.parametrize(("options", "words"), METHODS)
def test_enable(unchanged, options, words):
    pipe = unchanged(DIT)
    with pytest.raises(dc.ConfigError) as error:
        dc.enable(pipe, **{"policy": "interval", **options})
    says(error.value, *words)


NOT_FOUND = [
    (DIT, dict(scope="cut"), dc.NoSpansError, "DiTTransformer2DModel has no cut", "use scope stack, block or denoiser"),
    (
        UNET,
        dict(scope="stack"),
        dc.NoSpansError,
        "UNet2DConditionModel",
        "no stack",
        "use scope cut, block or denoiser",
    ),
    (UNET, dict(policy="first_block", scope="stack"), dc.NoSpansError, "no stack", "cut, block or denoiser"),
    (UNET, dict(policy="first_block", scope="block"), dc.ConfigError, "does not serve scope 'block'", "cut, stack"),
    *(
        (UNET, options, dc.ConfigError, "which no UNet has: take 'first_block' or 'seacache'")
        for options in (dict(policy="teacache", coefficients=(1.0, 0.0)), dict(policy="dicache"), dict(policy="speca"))
    ),
    (UNET, dict(depth=0), dc.ConfigError, "depth must be a whole number of at least 1", "not 0"),
    (UNET, dict(depth=-1), dc.ConfigError, "depth must be a whole number of at least 1", "not -1"),
    (DIT, dict(depth=1), dc.ConfigError, "depth is for scope 'cut'", "DiTTransformer2DModel runs at 'stack'"),
    (UNET, dict(depth=4), dc.ConfigError, "depth must be between 1 and 3", "UNet2DConditionModel", "not 4"),
    (UNET, dict(policy="first_block", front=2), dc.ConfigError, "UNet cut", "set depth instead of front and back"),
    (UNET, dict(policy="first_block", back=1), dc.ConfigError, "UNet cut", "set depth instead of front and back"),
]


@pytest.mark.parametrize(("name", "options", "kind", "words"), [(n, o, k, w) for n, o, k, *w in NOT_FOUND])
def test_enable_where_there_is_nothing_of_the_kind(unchanged, name, options, kind, words):
    pipe = unchanged(name)
    with pytest.raises(kind) as error:
        dc.enable(pipe, **{"policy": "interval", **options})
    says(error.value, *words)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(policy="zzz"), "Unknown policy 'zzz'"),
        (dict(evry=2), "Unknown option 'evry'"),
        (dict(every=0), "every must be at least 1"),
        (dict(scope="cut"), "no cut"),
        (dict(depth="1"), "depth must be a whole number"),
        (dict(warmup="3"), "warmup must be a whole number"),
    ],
)
def test_nothing_is_enabled_after_an_error(not_enabled, options, message):
    not_enabled(DIT)
    before = snapshot(DIT)
    with pytest.raises((dc.ConfigError, dc.NoSpansError), match=message):
        dc.enable(load(DIT), **{"policy": "interval", **options})
    with (
        pytest.raises((dc.ConfigError, dc.NoSpansError), match=message),
        dc.cached(load(DIT), **{"policy": "interval", **options}),
    ):
        pytest.fail("entered")
    assert snapshot(DIT) == before
    assert torch.equal(generate(DIT), uncached(DIT))


def test_errors_are_value_errors_too(unchanged):
    unchanged(DIT)
    with pytest.raises(ValueError, match="Did you mean"):
        dc.enable(load(DIT), "intervall")
    with pytest.raises(dc.DiffusionCacheError, match="no cut"):
        dc.enable(load(DIT), "interval", scope="cut")


@pytest.mark.parametrize("mask", ["0100", [0, 1, 0, 0], "0000"])
def test_a_mask_that_starts_with_reuse_warns_once(not_enabled, mask):
    pipe = not_enabled(DIT)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dc.enable(pipe, "mask", mask=mask)
        generate(DIT)
        generate(DIT)
    messages = [str(w.message) for w in caught if w.category is dc.DiffusionCacheWarning]
    assert len(messages) == 1
    says(messages[0], "mask starts with a reused step", "first step is computed")
    assert dc.summary(pipe).records[0].computed
    dc.disable(pipe)


# pipelines


class NoDenoiser:
    """A pipeline, as far as one can tell, around parts that do not denoise."""

    def __init__(self):
        self.components = {"vae": load(DIT).vae, "scheduler": load(DIT).scheduler}


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (lambda: "a pipeline", "str"),
        (lambda: None, "NoneType"),
        (lambda: load(DIT).transformer, "DiTTransformer2DModel"),
        (lambda: torch.nn.Linear(2, 2), "Linear"),
        (lambda: load(DIT).scheduler, "DDIMScheduler"),
        (lambda: type(load(DIT)), "type"),
    ],
)
def test_not_a_pipeline(given, kind):
    for act in (dc.enable, dc.inspect, lambda pipe: dc.cached(pipe).__enter__()):
        with pytest.raises(dc.ConfigError) as error:
            act(given())
        says(error.value, "expected a diffusers pipeline", f"got {kind}", "diffusion_cache.run(model")
    dc.disable(given())  # there is nothing to take off
    with pytest.raises(dc.ConfigError) as error:
        dc.summary(given())
    says(error.value, "not enabled", "call diffusion_cache.enable first")


def test_a_pipeline_without_a_denoiser():
    with pytest.raises(dc.NoSpansError) as error:
        dc.enable(NoDenoiser(), "interval")
    says(error.value, "NoDenoiser has no denoiser among its components", "vae, scheduler")
    pipe = reference.load(DIT)
    session = dc.enable(pipe, "interval")
    own, pipe.transformer = pipe.transformer, None
    with pytest.raises(dc.NoSpansError, match="DiTPipeline has no denoiser"):
        dc.enable(pipe, "interval", every=3)
    pipe.transformer = own
    assert vars(pipe)["_diffusion_cache"] is session
    pipe(**reference.inputs(DIT, (3,), (5,), steps=4))
    assert dc.summary(pipe).reused == 2
    dc.disable(pipe)


def test_summary_too_early(not_enabled):
    pipe = not_enabled(DIT)
    with pytest.raises(dc.ConfigError) as error:
        dc.summary(pipe)
    says(error.value, "not enabled", "call diffusion_cache.enable first")
    dc.enable(pipe, "interval", every=2)
    with pytest.raises(dc.ConfigError) as error:
        dc.summary(pipe)
    says(error.value, "nothing was generated since", "call the pipeline first")
    generate(DIT)
    assert len(dc.summary(pipe).records) == 4
    dc.enable(pipe, "interval", every=3)
    with pytest.raises(dc.ConfigError, match="nothing was generated since"):
        dc.summary(pipe)
    dc.disable(pipe)
    with pytest.raises(dc.ConfigError, match="not enabled"):
        dc.summary(pipe)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(scope="stak"), ["Unknown scope 'stak'", "'stack'"]),
        (dict(forecaster="tailor"), ["Unknown forecaster 'tailor'", "'taylor'"]),
        (dict(depth="1"), ["depth must be a whole number"]),
        (dict(inputs=["a prompt"]), ["inputs must be the arguments of a pipeline call by name", "['a prompt']"]),
    ],
)
def test_inspect(unchanged, options, words):
    with pytest.raises(dc.ConfigError) as error:
        dc.inspect(unchanged(DIT), **options)
    says(error.value, *words)


def test_tune_without_arguments(unchanged):
    with pytest.raises(dc.ConfigError, match="inputs must be the arguments of a pipeline call by name"):
        dc.tune(unchanged(DIT), None, target_reuse=0.5)


def test_inspect_a_scope_that_is_not_there(unchanged):
    with pytest.raises(dc.NoSpansError, match="no cut to cache; use scope stack, block or denoiser"):
        dc.inspect(unchanged(DIT), scope="cut")


# bare denoisers


def two_calls(**options):
    model = load(DIT).transformer
    with torch.no_grad(), dc.run(model, **options) as run:
        for _ in range(2):
            run.next_step()
            model(torch.ones(1, 1, 16, 16), timestep=torch.tensor([5]), class_labels=torch.tensor([3]))
        return run.summary()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(policy="interval", num_steps=0), ["num_steps must be a whole number of at least 1", "not 0"]),
        (dict(policy="interval", num_steps=-5), ["num_steps must be a whole number of at least 1", "not -5"]),
        (dict(policy="mask", mask="10"), ["mask needs the run's number of steps", "pass num_steps"]),
        (dict(policy="interval", last=1), ["last, start and end need the number of steps", "pass num_steps"]),
        (dict(policy="interval", end=0.5), ["last, start and end need the number of steps", "pass num_steps"]),
        (dict(policy="first_block", start=0.1), ["need the number of steps", "pass num_steps"]),
        (dict(policy="intervall"), ["Unknown policy 'intervall'", "Did you mean 'interval'?"]),
        (dict(policy="interval", num_step=3), ["Unknown option 'num_step'"]),
        (dict(policy="interval", num_steps="6"), ["num_steps must be a whole number of at least 1", "not '6'"]),
        (dict(policy="interval", num_steps=2.5), ["num_steps must be", "not 2.5"]),
        (dict(policy="interval", num_steps=True), ["num_steps must be", "not True"]),
        (dict(policy="interval", noise_levels=3.0), ["noise_levels must be numbers (log-SNR), one a step", "not 3.0"]),
        (dict(policy="interval", noise_levels=["1", "x"]), ["noise_levels must be numbers", "'x'"]),
        (dict(policy="interval", noise_levels=[0.0, float("nan")]), ["noise_levels must be numbers", "nan"]),
    ],
)
def test_run(unchanged, options, words):
    """Also of the denoiser of a pipeline with a method of its own, which stays."""
    unchanged(DIT)
    with pytest.raises(dc.ConfigError) as error:
        two_calls(**options)
    says(error.value, *words)


def test_run_with_the_number_of_steps():
    assert two_calls(policy="mask", mask="10", num_steps=2).reused == 1
    with pytest.warns(dc.DiffusionCacheWarning, match="nothing is reused in a run of 2 steps: warmup=1, last=1"):
        assert two_calls(policy="interval", last=1, num_steps=2).reused == 0


@pytest.mark.parametrize("levels", [[-2.0, 2.0], np.array([-2.0, 2.0]), torch.tensor([-2.0, 2.0])])
def test_run_takes_noise_levels_as_any_sequence(levels):
    """The second step, at log-SNR 2, is at σ / (α + σ) = 0.27."""
    assert two_calls(policy="interval", sigma_max=0.5, noise_levels=levels).reused == 1
    assert two_calls(policy="interval", sigma_max=0.2, noise_levels=levels).reused == 0


def test_run_where_the_scope_is_not_there(unchanged):
    unchanged(DIT)
    with pytest.raises(dc.NoSpansError, match="no cut to cache; use scope stack, block or denoiser"):
        two_calls(policy="interval", scope="cut")


@pytest.mark.parametrize(
    ("given", "kind"), [(lambda: load(DIT), "DiTPipeline"), (lambda: "a model", "str"), (lambda: None, "NoneType")]
)
def test_run_of_something_else(given, kind):
    with pytest.raises(dc.ConfigError) as error, dc.run(given(), "interval"):
        pytest.fail("entered")
    says(error.value, "takes a bare denoiser", f"not {kind}", "for pipelines use enable")
