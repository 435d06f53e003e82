import pytest
import torch

from diffusion_cache.evaluation.reproduction import language, seed_sets, slicing
from diffusion_cache.evaluation.reproduction.language import Bench, Decoded, Immediate, Periodic
from diffusion_cache.language import DelayedKV, Prefix, View
from diffusion_cache.reference import fill_forward


@pytest.fixture(scope="module")
def bench():
    made = Bench(seed_sets()[0])
    made.problems = made.problems[:4]
    return made


def decoded(solved=0.5, error=0.1, work=0.2, answers=None):
    return Decoded(solved, error, 0.01, work, torch.zeros(4, 2) if answers is None else answers)


def test_problems_are_of_their_set_and_judge_no_training():
    problems = [Bench(seeds).problems for seeds in seed_sets()]
    every = [problem for each in problems for problem in each]
    assert len(set(every)) == len(every) == 3 * 64
    assert not set(every) & set(range(fill_forward.GATE_SEED, fill_forward.GATE_SEED + 200))


def test_an_exact_method_is_not_off_and_an_approximate_one_is(bench):
    uncached, prefix = bench.decode(None), bench.decode(Prefix())
    assert (uncached.error, uncached.divergence, uncached.work) == (0, 0, 1)
    assert prefix.error < 1e-6
    assert torch.equal(prefix.answers, uncached.answers)
    found = bench.decode(Immediate(refresh=3))
    assert found.error > 100 * prefix.error
    assert found.divergence > 0
    assert found.work < prefix.work < 0.2


def test_the_logits_that_decided_are_compared(bench, monkeypatch):
    """Twice the logits are off by all of their length, whatever was decided."""
    step = language.Noting.step

    def doubled(self, model_output, *args, **kwargs):
        return step(self, 2 * model_output, *args, **kwargs)

    monkeypatch.setattr(language.Noting, "step", doubled)
    assert bench.decode(None).error == pytest.approx(1)


def test_keys_and_values_of_the_first_layer_do_not_drift(bench):
    first, *deeper = bench.drift()
    assert first == 0
    assert len(deeper) == 3
    assert min(deeper) > 1e-3


def test_what_methods_without_delay_or_test_compute():
    masked, changed = torch.tensor([[0, 0, 1, 1]]).bool(), torch.tensor([[0, 1, 0, 0]]).bool()
    view = View(masked, masked, changed, torch.tensor([[0, 1, 1, 1]]).bool(), age=1, refinement=1)
    assert torch.equal(Immediate(refresh=3).rows(view), masked)
    assert torch.equal(Periodic(window=1, refresh=3).rows(view), torch.tensor([[0, 1, 1, 0]]).bool())
    for method in (Immediate(refresh=2), Periodic(window=1, refresh=2)):
        assert torch.equal(method.rows(view), view.unsettled)


def test_the_better_one_is_off_by_less_at_no_more_tokens():
    def holds(first, second):
        return language.better({"one": first, "other": second}).holds

    assert holds(decoded(error=0.1), decoded(error=0.2))
    assert not holds(decoded(error=0.2), decoded(error=0.1))
    assert not holds(decoded(error=0.1, work=0.3), decoded(error=0.2, work=0.2))


def test_a_score_is_kept_within_the_bound(monkeypatch):
    found = {DelayedKV(): decoded(0.46, answers=torch.eye(4)), None: decoded(0.5, answers=torch.eye(4))}
    monkeypatch.setattr(language, "decoded", lambda seeds, method: found[method])
    assert language.kept(seed_sets()[0], DelayedKV()).holds
    found[DelayedKV()] = decoded(0.44, answers=torch.zeros(4, 4))
    outcome = language.kept(seed_sets()[0], DelayedKV())
    assert not outcome.holds
    assert outcome.figures["same"] == 0


def test_slices_have_to_save_enough_in_time(monkeypatch):
    row = {"model": "A", "saved": 0.5, "time_ratio": 1.05, "error": 1e-6}
    for change, saves, exact in (({}, True, True), ({"saved": 0.39}, False, True), ({"time_ratio": 1.11}, False, True)):
        monkeypatch.setattr(slicing, "rows", lambda seeds, change=change: [row, row | change])
        assert slicing.slices_save_memory(seed_sets()[0]).holds == saves
        assert slicing.slices_are_exact(seed_sets()[0]).holds == exact
    monkeypatch.setattr(slicing, "rows", lambda seeds: [row | {"error": 1e-4}])
    assert not slicing.slices_are_exact(seed_sets()[0]).holds
