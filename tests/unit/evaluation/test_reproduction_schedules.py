"""The parts of the schedules' claims that need no model."""

import grams
import torch

from diffusion_cache.evaluation.reproduction import load_claims, schedules, seed_sets
from diffusion_cache.evaluation.reproduction.bench import Ran


def test_everything_is_computed_but_the_cells():
    profile = grams.profile_of(torch.ones(3, 5, 2), "block")
    plan = schedules.reusing(profile, [(4, 2), (1, 0), (3, 0)])
    assert (~plan.computed()[:, 0]).nonzero().tolist() == [[1, 0], [3, 0], [4, 2]]
    assert plan.nodes[:, :, 0].tolist() == [[-1] * 3, [0, -1, -1], [-1] * 3, [2, -1, -1], [-1, -1, 3]]


def ran(psnr, work):
    return Ran((psnr - 1, psnr + 1), (0.1, 0.3), work, 10.0, torch.empty(0))


def test_better_at_each_budget_for_no_more_compute(monkeypatch):
    found = {schedules.LeMiCa: ran(31.0, 0.3), schedules.DPCache: ran(30.0, 0.3), schedules.MeanCache: ran(40.0, 0.4)}
    monkeypatch.setattr(schedules, "optimal", lambda seeds, system, nfe, order: found[system])
    seeds = seed_sets()[0]
    outcome = schedules.minimax_beats_sum(seeds)
    assert outcome.holds
    assert outcome.figures["minimax_14"] == 31.0
    assert (outcome.figures["sum_8_worst"], outcome.figures["sum_8_error"]) == (29.0, 0.2)
    assert not schedules.power_beats_sum(seeds).holds  # it has spent more
    one, other = [ran(31.0, 0.3), ran(30.0, 0.3)], [ran(30.0, 0.3), ran(31.0, 0.3)]
    assert not schedules.compared(("one", one), ("other", other)).holds


def test_claims_have_names_of_their_own():
    names = {claim.name for claim in load_claims(["schedules", "unet"])}
    assert {"schedules.minimax_beats_sum", "schedules.damages_add_up", "unet.key_steps_beat_every_nth"} <= names
