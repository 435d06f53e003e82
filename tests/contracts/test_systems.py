"""The invariants of the design, for every published system on every shipped model: it serves it, or says why not."""

from functools import cache

import numpy as np
import plans
import pytest
import torch
from cases import STEPS, Subject, load

import diffusion_cache as dc
from diffusion_cache import reference, registry
from diffusion_cache.errors import ConfigError
from diffusion_cache.planning.select import see, with_selector
from diffusion_cache.planning.static import static_plan
from diffusion_cache.policies.mask import Mask
from diffusion_cache.profiling.generation import teach
from diffusion_cache.profiling.measure import Options, measure

# options with which a system reuses something in a run of STEPS steps; a newly registered system must be listed here
REUSING = {
    "bac": {"updates": 2},
    "deepcache": {"every": 2},
    "dpcache": {"nfe": 4.5},
    "ertacache": {"threshold": 0.5},
    "fora": {"every": 2},
    "laptop": {"keep": 0.5},
    "lemica": {"nfe": 4.5},
    "meancache": {"nfe": 4.5},
    "profiling_dit": {"full_steps": 2, "interval_from": 2, "interval_to": 2},
    "select": {},
    "smooth_cache": {"alpha": 1.0},
    "step_rehash": {"computed": 3},
}
PAIRS = [(name, model) for name in REUSING for model in reference.MODELS]


@cache
def subject(model):
    return Subject(model)


@cache
def profile(model, scope, needs=""):
    """Of two samples; needs: what the system reads beside inner products."""
    pipe = load(model)
    motion = "motion" if needs == "foreground" else None
    options = Options(
        scope=scope,
        batch=2,
        sensitivity_samples=1 if needs == "sensitivity" else 0,
        sensitivity_steps=2,
        attention=motion is not None,
    )
    drawn = plans.drawn(0, 2)
    return measure(lambda samples: plans.batch(pipe, model, samples, STEPS), drawn, options, foreground=motion)


@cache
def choosing(model, scope):
    """A profile with two plans, and which of them suits a class."""
    found = profile(model, scope)
    every = np.arange(STEPS)
    made = [static_plan(found, f"1 in {n}", every % n == 0, order=1) for n in (2, 3)]
    teachers = [teach(plans.batch(load(model), model, plans.drawn(50, 2), STEPS))]
    return found.with_plans(made), with_selector(found.with_plans(made), see(teachers, made))


def arguments(name, model):
    system = registry.systems.get(name)
    if not system.needs_profile:
        return {"method": name, **REUSING[name]}
    scopes = sorted(system.scopes)
    usual = "cut" if model == "unet-digits" else "stack"
    scope = usual if usual in scopes else scopes[0]
    if name == "select":
        return {"method": name, "profile": choosing(model, scope)[1]}
    needs = "foreground" if system.foreground else "sensitivity" if name == "laptop" else ""
    return {"method": name, "profile": profile(model, scope, needs), **REUSING[name]}


def served(name, model):
    system = registry.systems.get(name)
    kind = "unet" if model == "unet-digits" else "transformer"
    return kind in system.denoisers and not (system.foreground and model != "wan-moving-digits")


def test_every_system_has_options_to_be_tested_with():
    assert set(REUSING) == set(registry.systems.names())


def test_what_is_said_of_every_system():
    for name in registry.systems.names():
        system = registry.systems.get(name)
        assert system.paper
        assert system.scopes <= {"denoiser", "stack", "block", "branch", "cut"}
        assert system.denoisers <= {"transformer", "unet"}
        assert system.__doc__
        assert not system.__doc__.startswith(f"{system.__name__}(")  # a dataclass's own


@pytest.mark.filterwarnings("ignore::diffusion_cache.errors.DiffusionCacheWarning")
@pytest.mark.parametrize(("name", "model"), [pair for pair in PAIRS if served(*pair)])
def test_it_reuses_twice_alike_and_leaves_nothing_behind(name, model):
    """Where whole steps are reused, as a mask of the computed ones does with its forecaster."""
    here, given = subject(model), arguments(name, model)
    with dc.cached(here.pipe, **given):
        method = here.pipe._diffusion_cache.method
        first = here.generate()
        summary = dc.summary(here.pipe)
        again = here.generate()
    assert torch.isfinite(first).all()
    assert torch.equal(first, again)
    assert sum(record.spans_reused for record in summary.records) > 0
    assert summary.records[0].spans_reused == 0
    assert not torch.equal(first, here.uncached)
    whole = all(record.spans_reused in (0, record.spans) for record in summary.records)
    if whole and name != "profiling_dit":  # which leaves blocks out
        passes = len(summary.records) // STEPS
        mask = "".join(str(int(record.computed)) for record in summary.records[::passes])
        with dc.cached(here.pipe, Mask(mask), method.forecaster, scope=method.scope, depth=method.depth):
            assert torch.equal(here.generate(), first)
    assert torch.equal(here.generate(), here.uncached)


@pytest.mark.filterwarnings("ignore::diffusion_cache.errors.DiffusionCacheWarning")
@pytest.mark.parametrize(("name", "model"), [pair for pair in PAIRS if served(*pair)])
def test_reusing_nothing_changes_nothing(name, model):
    here, given = subject(model), arguments(name, model)
    with dc.cached(here.pipe, **given, warmup=STEPS):
        assert torch.equal(here.generate(), here.uncached)
        assert dc.summary(here.pipe).reused == 0


@pytest.mark.parametrize(("name", "model"), [pair for pair in PAIRS if not served(*pair)])
def test_what_it_does_not_serve_is_refused(name, model):
    here, system = subject(model), registry.systems.get(name)
    given = {"method": name, **REUSING[name]}
    if system.needs_profile:
        given["profile"] = profile(model, "block")
    with pytest.raises(ConfigError, match=r"is for a (transformer|unet), and|does not have|needs a profile at scope"):
        dc.enable(here.pipe, **given)
    assert torch.equal(here.generate(), here.uncached)


@pytest.mark.parametrize("name", [name for name in REUSING if registry.systems.get(name).needs_profile])
def test_a_profile_is_asked_for(name):
    model = "unet-digits" if registry.systems.get(name).denoisers == {"unet"} else "dit-digits"
    with pytest.raises(ConfigError, match=f"{name} plans from measurements"):
        dc.enable(subject(model).pipe, method=name, **REUSING[name])
