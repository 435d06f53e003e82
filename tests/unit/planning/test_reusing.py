"""Plans that reuse the last computed feature."""

import plans
import pytest
import torch

from diffusion_cache.errors import ConfigError
from diffusion_cache.planning.reusing import reusing

MODEL = "flux-digits"


def test_each_span_takes_its_own_last_computed_step():
    profile = plans.profile(MODEL)
    assert len(profile.spans) == 2
    plan = reusing("two", profile, [{0, 3}, [0, 1, 6]], {"why": "a test"})
    assert plan.computed()[:, 0, 0].tolist() == [True, False, False, True, False, False, False, False]
    assert plan.nodes[:, 0, 0].tolist() == [-1, 0, 0, -1, 3, 3, 3, 3]
    assert plan.nodes[:, 1, 0].tolist() == [-1, -1, 1, 1, 1, 1, -1, 6]
    assert torch.equal(plan.weights[:, 0, :, 0] == 1, ~plan.computed()[:, 0])
    one, other = (span.share for span in profile.spans)
    assert plan.nfe == pytest.approx(8 - 6 * one - 5 * other)
    assert (plan.scope, plan.noise_levels, plan.facts) == ("stack", profile.noise_levels, {"why": "a test"})


def test_bad_steps():
    profile = plans.profile(MODEL)
    for computed in ([{0}], [{0}, {0, 8}], [{0}, {0, -1}], [{0}, {1}]):
        with pytest.raises(ConfigError):
            reusing("bad", profile, computed)
