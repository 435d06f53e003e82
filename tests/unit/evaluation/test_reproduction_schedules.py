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


def test_objectives_are_compared_at_equal_compute_only(monkeypatch):
    def ran(psnr, work):
        return Ran((psnr,), (0.0,), work, 10.0, torch.empty(0))

    found = {schedules.LeMiCa: ran(31.0, 0.3), schedules.DPCache: ran(30.0, 0.3), schedules.MeanCache: ran(40.0, 0.4)}
    monkeypatch.setattr(schedules, "optimal", lambda seeds, system, nfe: found[system])
    seeds = seed_sets()[0]
    assert schedules.minimax_beats_sum(seeds).holds
    assert not schedules.compared(seeds, ("sum", schedules.DPCache), ("minimax", schedules.LeMiCa)).holds
    assert not schedules.power_beats_sum(seeds).holds  # it has spent more
    assert schedules.minimax_beats_sum(seeds).figures["minimax_13"] == 31.0


def test_claims_have_names_of_their_own():
    names = {claim.name for claim in load_claims(["schedules", "unet"])}
    assert {"schedules.minimax_beats_sum", "schedules.damages_add_up", "unet.key_steps_beat_every_nth"} <= names
