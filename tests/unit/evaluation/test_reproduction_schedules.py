"""The parts of the schedules' claims that need no model."""

import grams
import torch

from diffusion_cache.evaluation.reproduction import load_claims, schedules
from diffusion_cache.evaluation.reproduction.bench import Ran


def test_everything_is_computed_but_the_cells():
    profile = grams.profile_of(torch.ones(3, 5, 2), "block")
    plan = schedules.reusing(profile, [(4, 2), (1, 0), (3, 0)])
    assert (~plan.computed()[:, 0]).nonzero().tolist() == [[1, 0], [3, 0], [4, 2]]
    assert plan.nodes[:, :, 0].tolist() == [[-1] * 3, [0, -1, -1], [-1] * 3, [2, -1, -1], [-1, -1, 3]]


def ran(psnr, work, nfe=10.0):
    return Ran((psnr - 1, psnr + 1), (0.1, 0.3), work, nfe, torch.empty(0))


def test_better_on_the_mean_over_budgets_for_no_more_compute():
    other = [ran(30.0, 0.3, 14.0), ran(20.0, 0.2, 8.0)]
    outcome = schedules.compared(("one", [ran(32.0, 0.3, 14.0), ran(19.0, 0.2, 8.0)]), ("other", other))
    assert outcome.holds
    assert outcome.ours == "NFE 14: 32.00 against 30.00 dB; NFE 8: 19.00 against 20.00 dB"
    assert (outcome.figures["one_14"], outcome.figures["other_8_worst"], outcome.figures["one_8_work"]) == (32, 19, 0.2)
    assert outcome.figures["other_8_error"] == 0.2
    assert not schedules.compared(("one", [ran(30.5, 0.3), ran(19.0, 0.2)]), ("other", other)).holds
    assert not schedules.compared(("one", [ran(32.0, 0.3), ran(21.0, 0.21)]), ("other", other)).holds
    assert not schedules.compared(("same", other), ("other", other)).holds


def test_claims_have_names_of_their_own():
    names = {claim.name for claim in load_claims(["schedules", "unet"])}
    assert {"schedules.minimax_beats_sum", "schedules.damages_add_up", "unet.key_steps_beat_every_nth"} <= names
