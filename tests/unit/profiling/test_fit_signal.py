"""Fitting TeaCache's polynomial, from given changes and from a pipeline's."""

import json
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module

import diffusion_cache as dc
from diffusion_cache import reference
from diffusion_cache.cli import fit_signal as command
from diffusion_cache.engine import session_of
from diffusion_cache.errors import ConfigError
from diffusion_cache.evaluation.prompts import FITTING_SEEDS
from diffusion_cache.profiling.fit_signal import Change, changes, fit
from diffusion_cache.profiling.generation import Batch
from diffusion_cache.signals import relative_l1

NAME, STEPS = "flux-digits", 4


def along(polynomial, low=0.01, high=0.2, count=30):
    return [Change(float(x), float(np.polyval(polynomial, x))) for x in np.linspace(low, high, count)]


@pytest.mark.parametrize("polynomial", [(2.0, 0.1), (300.0, -40.0, 3.0, 0.0, 0.05)])
def test_changes_that_lie_on_a_polynomial_give_it_back(polynomial):
    found = fit(along(polynomial), along(polynomial, 0.02, 0.15), len(polynomial) - 1)
    assert found.coefficients == pytest.approx(polynomial, rel=1e-6, abs=1e-9)
    assert (found.r2, found.held_out_r2) == pytest.approx((1.0, 1.0))
    assert found.held_out_error == pytest.approx(0.0, abs=1e-9)
    assert found.held_out_unfitted > 0.05
    assert (found.changes, found.held_out_changes) == (30, 30)


def test_how_well_it_holds_is_told_of_what_was_not_fitted():
    fitting = [Change(1.0, 1.0), Change(2.0, 2.0), Change(3.0, 3.0)]
    others = [Change(1.0, 2.0), Change(3.0, 4.0)]  # one too high, where the mean is 3
    found = fit(fitting, others, 1)
    assert (found.r2, found.held_out_r2) == pytest.approx((1.0, 0.0))
    assert found.held_out_error == pytest.approx(1 / 3)


@pytest.mark.parametrize("degree", [0, 3, 1.5, True])
def test_degrees_that_cannot_be_fitted(degree):
    few = [Change(1.0, 1.0), Change(2.0, 2.0), Change(3.0, 3.0)]
    with pytest.raises(ConfigError, match="degree must be"):
        fit(few, few, degree)


def test_the_changes_are_those_of_the_uncached_run():
    """Each row's output against the step before, in every pass; and the run is what it would be without looking."""
    pipe = reference.load(NAME)
    inputs = lambda: reference.inputs(NAME, (3, 8), (5, 6), STEPS)  # noqa: E731
    outputs = []
    hook = pipe.transformer.register_forward_hook(lambda module, args, output: outputs.append(output[0].clone()))
    uncached = reference.images(NAME, pipe(**inputs()))
    hook.remove()
    images = []

    def call():
        images.append(reference.images(NAME, pipe(**inputs())))

    with warnings.catch_warnings():
        warnings.simplefilter("error", dc.DiffusionCacheWarning)
        found = changes(Batch(pipe, call, lambda output: output, 2))
    assert torch.equal(images[0], uncached)
    assert session_of(pipe) is None
    expected = [value for a, b in pairwise(outputs) for value in relative_l1(b, a).tolist()]
    assert [change.output for change in found] == pytest.approx(expected, rel=1e-5)
    assert all(change.signal > 0 for change in found)


def test_from_the_command_line_to_the_policy(tmp_path, capsys):
    path = tmp_path / "fit.json"
    with initialize_config_module("diffusion_cache.configs", version_base="1.3"):
        given = [f"model={NAME}", f"steps={STEPS}", "num_samples=2", "held_out=2", "degree=2", f"out={path}"]
        command.run_configured(compose("fit_signal", given))
    stored = json.loads(path.read_text())
    assert "held out" in capsys.readouterr().out
    assert stored["fit"]["changes"] == stored["fit"]["held_out_changes"] == 2 * (STEPS - 1)
    pipe = reference.load(NAME)
    seeds = [(index, index + FITTING_SEEDS) for index in range(2)]
    first, other = (
        changes(
            Batch(
                pipe,
                lambda which=which: pipe(**reference.inputs(NAME, (0, 1), [s[which] for s in seeds], STEPS)),
                lambda output: output,
                2,
            )
        )
        for which in (1, 0)
    )
    assert stored["options"]["coefficients"] == pytest.approx(fit(first, other, 2).coefficients, rel=1e-6)
    with dc.cached(pipe, policy="teacache", **stored["options"]):
        pipe(**reference.inputs(NAME, (0,), (0,), STEPS))
        assert dc.summary(pipe).total == STEPS


def test_what_cannot_be_fitted_or_written_is_told_before_anything_is_generated(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "_changes", lambda *given: pytest.fail("generated"))
    with initialize_config_module("diffusion_cache.configs", version_base="1.3"):
        config = compose("fit_signal", [f"model={NAME}", "degree=0", f"out={tmp_path / 'fit.json'}"])
    with pytest.raises(ConfigError, match="degree must be a whole number of at least 1, not 0"):
        command.run_configured(config)
    config.degree = 2
    monkeypatch.setattr("diffusion_cache.cli.writing.TemporaryFile", full)
    with pytest.raises(ConfigError, match="No space left on device; choose another file with out=…"):
        command.run_configured(config)


@pytest.mark.parametrize(("out", "message"), [("", "is a folder: give out="), ("file/fit.json", "choose another file")])
def test_a_place_that_cannot_be_written_is_told_before_anything_is_generated(tmp_path, monkeypatch, out, message):
    (tmp_path / "file").touch()
    monkeypatch.setattr(command, "_changes", lambda *given: pytest.fail("generated"))
    with initialize_config_module("diffusion_cache.configs", version_base="1.3"):
        config = compose("fit_signal", [f"model={NAME}", f"out={tmp_path / out}"])
    with pytest.raises(ConfigError, match=message):
        command.run_configured(config)
