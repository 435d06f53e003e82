"""Adjusted noise levels: the shares by their formulas, and where the time that is left over goes."""

import grams
import numpy as np
import plans
import pytest
import torch

from diffusion_cache import reference
from diffusion_cache.errors import ConfigError
from diffusion_cache.planning.static import static_plan
from diffusion_cache.planning.timesteps import (
    LEAST,
    adjusted,
    calibrated,
    distances,
    kept_if_better,
    profiled_shares,
    shares,
    total_gram,
)
from diffusion_cache.profiling.generation import teach
from diffusion_cache.profiling.rectify import reuse_errors

OWN = (1.0, 0.9, 0.75, 0.5, 0.0)


def test_shares_by_their_formulas():
    errors, outputs, changes = [0.0, 1.0, 2.0, 5.0], [2.0, 4.0, 4.0, 4.0], [0.0, 1.0, 4.0, 20.0]
    assert shares(errors, outputs, changes, "B").tolist() == [1.0, 0.75, 0.5, LEAST]
    assert shares(errors, outputs, changes, "A").tolist() == [1.0, LEAST, 0.5, 0.75]
    with pytest.raises(ConfigError, match="one of A, B, not 'C'"):
        shares(errors, outputs, changes, "C")


def test_nothing_is_moved_where_all_steps_go_all_the_way():
    assert adjusted(OWN, [1.0] * 4) == pytest.approx(OWN[:-1], abs=1e-15)


def test_time_that_is_left_over_is_spread_over_what_remains():
    """By hand: step 1 goes half of its .15; the .075 that is left over and the .75 before are shared 1 : 2."""
    moved = adjusted(OWN, [1.0, 0.5, 1.0, 1.0])
    assert moved == pytest.approx((1.0, 0.9, 0.825, 0.55), abs=1e-15)
    # the next reused step's interval is half of what it has become
    again = adjusted(OWN, [1.0, 0.5, 0.5, 0.5])
    assert again == pytest.approx((1.0, 0.9, 0.825, 0.825 - 0.275 / 2), abs=1e-15)
    # and it lands on another end just the same, downwards or upwards
    assert adjusted((1.0, 0.75, 0.5, 0.25), [1.0, 0.5, 1.0]) == pytest.approx((1.0, 0.75, 0.625), abs=1e-15)
    assert adjusted((0.0, 0.25, 0.5, 1.0), [1.0, 0.5, 1.0]) == pytest.approx((0.0, 0.25, 0.375), abs=1e-15)


@pytest.mark.parametrize(
    ("phi", "why"), [([1.0] * 5, "for 5 steps 6"), ([1.0, 0.0, 1.0, 1.0], "more than nothing"), ([2.0] * 4, "at most")]
)
def test_shares_that_cannot_be(phi, why):
    with pytest.raises(ConfigError, match=why):
        adjusted(OWN, phi)


def test_shares_of_a_profile():
    """Of the uncached run, with a computed step in between."""
    profile = plans.profile("flux-digits", scope="denoiser", feature="residual")
    computed = [True, False, False, True, False, True, False, True]
    residual, output = (distances(total_gram(profile, name)) for name in ("residual", "output"))
    energy = profile.arrays["gram_output"][0, 0].diagonal().double().sqrt().numpy()
    sources = {1: 0, 2: 0, 4: 3, 6: 5}
    for kind in "AB":
        found = profiled_shares(profile, computed, "residual", kind)
        for step in range(8):
            if computed[step]:
                assert found[step] == 1
                continue
            size = energy[step] if kind == "B" else output[step, step - 1]
            expected = np.clip(1 - residual[sources[step], step] / size, LEAST, 1)
            assert found[step] == pytest.approx(expected, abs=1e-9)
    # v itself, one step old: nothing is left of a step with A
    assert profiled_shares(profile, computed, "output", "A")[[1, 4, 6]].tolist() == [LEAST] * 3


def test_kind_a_is_by_the_change_of_the_output_whatever_is_reused():
    residuals, outputs = np.random.default_rng(0).normal(size=(2, 6, 5))
    profile = grams.profile_of(residuals[None])
    profile.arrays["gram_output"] = torch.as_tensor(outputs @ outputs.T)[None, None]
    computed = [True, False, False, True, False, False]
    errors = np.linalg.norm(residuals[[0, 0, 0, 3, 3, 3]] - residuals, axis=1)
    changes = [0.0, *np.linalg.norm(np.diff(outputs, axis=0), axis=1)]
    expected = shares(errors, np.linalg.norm(outputs, axis=1), changes, "A")
    assert profiled_shares(profile, computed, "residual", "A") == pytest.approx(np.where(computed, 1.0, expected))


def test_shares_of_runs():
    """Of the cached run, in L1 norms; the plan's own levels are not gone through for it."""
    batch = plans.batch(reference.load("flux-digits"), "flux-digits", plans.drawn(100, 2))
    teacher = teach(batch)
    computed = [True, False, False, True, False, True, False, True]
    own = plans.profile("flux-digits").fingerprint.sigmas
    plan = static_plan(plans.profile("flux-digits"), "", computed)
    errors, outputs, _ = reuse_errors(teacher, plan)
    phi = np.where(computed, 1, np.clip(1 - errors / outputs, LEAST, 1))
    assert (phi[np.array(computed) == 0] < 1).all()
    moved = calibrated(plan, teacher, own, "B")
    assert moved.sigmas == pytest.approx(adjusted(own, phi), abs=1e-7)
    assert calibrated(moved, teacher, own, "B").sigmas == pytest.approx(moved.sigmas, abs=1e-7)
    # and it is kept where it scores higher
    for preferred in (plan.sigmas, moved.sigmas):
        kept = kept_if_better(plan, teacher, own, lambda tried, wanted=preferred: float(tried.sigmas == wanted))
        assert kept.sigmas == preferred
        assert kept.facts["sigmas"] == {"own": float(preferred is None), "moved": float(preferred is not None)}
    assert kept_if_better(plan, teacher, None, len).facts["sigmas"] == "the sampler has none"

    def refused(tried):
        raise ConfigError("not with this sampler")

    kept = kept_if_better(plan, teacher, own, refused)
    assert (kept.sigmas, kept.facts["sigmas"]) == (None, "not with this sampler")
