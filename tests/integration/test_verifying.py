"""Policies that verify, probe or look at the history, in real runs: their formulas on what the model itself gave."""

from itertools import pairwise

import pipelines_image
import pytest
import torch
from walks import BATCH, STEPS, call, model_of, walk

import diffusion_cache as dc
from diffusion_cache import models, reference
from diffusion_cache.engine.forecasting import Forecasts
from diffusion_cache.errors import ConfigError
from diffusion_cache.policies import RaCfg


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.fixture(scope="module")
def latents():
    return walk()


def cached(model, latents, **options):
    """The records of a run, and its outputs."""
    with dc.run(model, num_steps=STEPS, **options) as run:
        outputs = []
        for step, x in enumerate(latents):
            run.next_step()
            outputs.append(call(model, x, step))
    return run.summary().records, outputs


def decisions(records):
    return "".join(str(int(record.computed)) for record in records)


def blocks_of(model, x, step):
    """What each block is given, beside its keywords, and gives, uncached."""
    seen = []
    hooks = [
        block.register_forward_hook(
            lambda module, args, kwargs, output: seen.append((args[0], args[1:], kwargs, output)), with_kwargs=True
        )
        for block in model.transformer_blocks
    ]
    call(model, x, step)
    for hook in hooks:
        hook.remove()
    return seen


def l1(now, before):
    return ((now - before).abs().mean() / before.abs().mean()).item()


# DiCache


@pytest.mark.parametrize("row", range(BATCH))
def test_dicache_on_what_enters_and_leaves_the_probe(model, latents, row):
    x = latents[:, row : row + 1]
    seen = [blocks_of(model, x[step], step) for step in range(STEPS)]
    changes = [
        abs(l1(now[1][3], before[1][3]) - l1(now[0][0], before[0][0])) for before, now in pairwise(seen)
    ]  # of the first two blocks
    threshold, total, expected = 2.5 * sum(changes) / len(changes), 0.0, "1"
    for change in changes:
        total += change
        compute = total >= threshold
        expected += str(int(compute))
        total = 0.0 if compute else total
    records, outputs = cached(model, x, policy="dicache", front=2, threshold=threshold, forecaster="reuse")
    assert decisions(records) == expected
    assert "01" in expected
    # the call goes on from what the probe gave
    last, reused = 0, [step for step in range(STEPS) if expected[step] == "0"]
    for step in range(STEPS):
        last = last if step in reused else step
        if step in reused:
            resumed = seen[step][1][3] + seen[last][2][3] - seen[last][1][3]
            hook = model.transformer_blocks[2].register_forward_hook(lambda *args, given=resumed: given)
            assert torch.allclose(outputs[step], call(model, x[step], step), rtol=1e-4, atol=1e-5)
            hook.remove()


# SpeCa


def drafted(model, x, rollback, threshold, decay):
    """Which steps of one sample SpeCa computes, and with what reasons: the last block on drafts, by hand."""
    seen = [blocks_of(model, x[step], step) for step in range(STEPS)]
    last, found, rejected, before = 0, ["warm-up"], None, 0.0
    for step in range(1, STEPS):
        if not rollback and rejected is not None:
            found.append(rejected)
            last, rejected = step, None
            continue
        draft = seen[step][0][0] + seen[last][1][3] - seen[last][0][0]
        with torch.no_grad():
            real = model.transformer_blocks[2](draft, *seen[step][2][1], **seen[step][2][2])
        error = l1(seen[last][2][3], real)
        reject = error > max(threshold * decay ** (step / STEPS), 0.01)
        if rollback:
            found.append(f"computed again: error {error:.3g}" if reject else f"error {error:.3g}")
            last = step if reject else last
        else:
            found.append("draft" if last == step - 1 else f"error {before:.3g}")
            rejected = f"error {error:.3g}" if reject else None
        before = error
    return found


@pytest.mark.parametrize("rollback", [False, True])
@pytest.mark.parametrize("row", range(BATCH))
def test_speca_on_the_last_block(model, latents, row, rollback):
    x, options = latents[:, row : row + 1], dict(threshold=0.9, decay=0.5, rollback=rollback)
    expected = drafted(model, x, **{"threshold": 0.9, "decay": 0.5, "rollback": rollback})
    records, outputs = cached(model, x, policy="speca", forecaster="reuse", **options)
    assert [record.reason for record in records] == expected
    kinds = decisions(records)
    assert 1 < kinds.count("1") < STEPS
    if rollback:  # a computed step is one, whatever was tried before it
        for step, output in enumerate(outputs):
            assert torch.equal(output, call(model, x[step], step)) == (kinds[step] == "1")


@pytest.mark.parametrize("rollback", [False, True])
def test_speca_decides_on_samples_apart(model, latents, rollback):
    options = dict(policy="speca", threshold=0.9, rollback=rollback)
    records, together = cached(model, latents, **options)
    assert any("samples" in record.reason for record in records)
    assert rollback == any(sample.again for record in records for sample in record.samples)
    for row in range(BATCH):
        alone_records, alone = cached(model, latents[:, row : row + 1], **options)
        for step in range(STEPS):
            assert torch.allclose(together[step][row], alone[step][0], rtol=1e-3, atol=1e-4)
            assert alone_records[step].samples == records[step].samples[row : row + 1]


def test_speca_tells_what_it_cannot_verify(model, latents, monkeypatch):
    weights = Forecasts.weights

    def failing(self, frame, span, history):
        if any(tail is history for tail in self._tails.values()):
            raise ZeroDivisionError("no weights")
        return weights(self, frame, span, history)

    monkeypatch.setattr(Forecasts, "weights", failing)
    with pytest.warns(UserWarning, match="forecasting the last blocks failed"):
        records, _ = cached(model, latents, policy="speca", threshold=100.0)
    assert decisions(records) == "101010101"  # reused once, not verified, computed
    assert records[2].reason == "error nan"


def test_a_rollback_cannot_lag_behind():
    pipe = reference.load("flux-digits")
    with pytest.raises(ConfigError, match="not sync='lagged'"):
        dc.enable(pipe, "speca", rollback=True, sync="lagged")
    with dc.cached(pipe, "speca", sync="lagged", threshold=0.1):
        lagged = pipe(**reference.inputs("flux-digits", (3, 8), (5, 6), steps=6)).images
    with dc.cached(pipe, "speca", threshold=0.1):
        same = pipe(**reference.inputs("flux-digits", (3, 8), (5, 6), steps=6)).images
        assert dc.summary(pipe).reused > 0
    assert torch.equal(torch.as_tensor(lagged), torch.as_tensor(same))  # it decides a step later anyway


# alignment


def aligned(model, seen, expected, step):
    """The last span's feature by DiCache's alignment, from the two steps computed last before this one."""
    *_, a, b = [0, *(i for i in range(step) if expected[i] == "1")]
    probe = [one[0][3] - one[0][0] for one in seen]
    rest = [one[2][3] - one[0][3] for one in seen]
    if a == b:
        return rest[b]
    gamma = ((probe[step] - probe[a]).abs().mean() / (probe[b] - probe[a]).abs().mean()).clamp(1, 1.5)
    return rest[a] + gamma * (rest[b] - rest[a])


@pytest.mark.parametrize("forecaster", ["reuse", "taylor"])
def test_alignment_follows_the_probe_of_each_sample(model, latents, forecaster):
    options = dict(policy="dicache", threshold=1.345, forecaster=forecaster, corrector="alignment")
    records, together = cached(model, latents, **options)
    assert any("samples" in record.reason for record in records)
    for row in range(BATCH):
        x = latents[:, row : row + 1]
        kinds, outputs = cached(model, x, **options)
        expected = decisions(kinds)
        assert "10" in expected[2:]
        seen = [blocks_of(model, x[step], step) for step in range(STEPS)]
        for step, kind in enumerate(expected):
            assert torch.allclose(together[step][row], outputs[step][0], rtol=1e-3, atol=1e-4)
            if kind == "0" and forecaster == "reuse":
                resumed = seen[step][0][3] + aligned(model, seen, expected, step)
                hook = model.transformer_blocks[2].register_forward_hook(lambda *args, given=resumed: given)
                assert torch.allclose(outputs[step], call(model, x[step], step), rtol=1e-4, atol=1e-4)
                hook.remove()


@pytest.mark.parametrize("policy", [dict(policy="interval"), dict(policy="easycache", scope="denoiser")])
def test_alignment_needs_a_policy_that_looks_at_a_probe(policy):
    with pytest.raises(ConfigError, match=r"compares probe_residual .* 'dicache', 'first_block' or 'ra_cfg'"):
        dc.enable(reference.load("dit-digits"), corrector="alignment", **policy)


# RACER


def disagreement(features, nodes, step):
    """Between a ridge regression on Chebyshev polynomials, of features less the last one, and a line."""
    times = torch.tensor([2.0 * node / (STEPS - 1) - 1 for node in (*nodes, step)], dtype=torch.float64)
    basis = torch.stack([torch.cos(degree * torch.acos(times)) for degree in range(5)], 1)
    design, target = basis[:-1], basis[-1]
    known = torch.stack([features[node].double().flatten() for node in nodes])
    ridge = torch.linalg.solve(design.T @ design + 0.1 * torch.eye(5), design.T @ (known - known[-1]))
    spectral = target @ ridge + known[-1]
    slope = (known[-1] - known[-2]) / (nodes[-1] - nodes[-2]) if len(nodes) > 1 else 0 * known[-1]
    line = known[-1] + (step - nodes[-1]) * slope
    return ((spectral - line).norm() / spectral.norm()).item()


@pytest.mark.parametrize(
    ("mask", "threshold", "forecaster"),
    [
        ("110100100", 1.0, {"forecaster": "reuse"}),
        ("111100100", 0.1, {"forecaster": "chebyshev", "keep": 6}),  # which keeps more than the risk is of
    ],
)
@pytest.mark.parametrize("row", range(BATCH))
def test_racer_on_what_two_forecasts_make_of_the_history(model, latents, row, mask, threshold, forecaster):
    x = latents[:, row : row + 1]
    seen = [blocks_of(model, x[step], step) for step in range(STEPS)]
    features = [one[2][3] - one[0][0] for one in seen]
    options = dict(policy="racer", mask=mask, threshold=threshold, risk_history=3, **forecaster)
    records, _ = cached(model, x, **options)
    nodes = []
    for step, record in enumerate(records):
        if record.reason.startswith("risk"):
            assert float(record.reason.removeprefix("risk ")) == pytest.approx(
                disagreement(features, nodes[-3:], step), rel=6e-3
            )
        nodes += [step] * record.computed
    assert len(nodes) == mask.count("1")
    assert any(record.computed and record.reason.startswith("risk") for record in records)
    # its forecasts are those of the forecaster, whatever else is kept
    _, outputs = cached(model, x, policy="mask", mask=decisions(records), **forecaster)
    assert all(torch.equal(a, b) for a, b in zip(cached(model, x, **options)[1], outputs, strict=True))


def test_racer_refreshes_samples_apart_and_each_as_often(model, latents):
    options = dict(policy="racer", every=4, threshold=0.94)
    records, together = cached(model, latents, **options)
    assert any("samples" in record.reason for record in records)
    for row in range(BATCH):
        alone_records, alone = cached(model, latents[:, row : row + 1], **options)
        assert decisions(alone_records).count("1") == 3
        for step in range(STEPS):
            assert torch.allclose(together[step][row], alone[step][0], rtol=1e-3, atol=1e-4)


# RA-CFG


def branches_noted(monkeypatch, name, guidance):
    """What is combined at each decision, and the scale that the step tells."""
    noted = []

    def combine(self, values, step):
        noted.append((step.pass_name, step.index, list(values), step.guidance))
        return max(values)

    monkeypatch.setattr(RaCfg, "combine", combine)
    pipe = reference.load(name)
    seen = probed(pipe, name, reference.inputs(name, (3,), (5,), steps=4, guidance=guidance))
    with dc.cached(pipe, "ra_cfg", threshold=1e9, granularity="batch"):
        pipe(**reference.inputs(name, (3,), (5,), steps=4, guidance=guidance))
    return noted, seen


def probed(pipe, name, call):
    """The first block's residual of each call, uncached: its relative change since the step before is what matters."""
    denoiser = getattr(pipe, reference.spec(name).denoiser)
    (blocks,) = [stack for stack in models.spans.stacks(denoiser).values()][:1]
    found = []
    hook = next(iter(blocks.values())).register_forward_hook(
        lambda module, args, kwargs, output: found.append(
            (output if isinstance(output, torch.Tensor) else output[-1])
            - (args[0] if args else kwargs["hidden_states"])
        ),
        with_kwargs=True,
    )
    pipe(**call)
    hook.remove()
    return found


def test_branches_in_one_call_are_combined_the_unconditional_first(monkeypatch):
    """DiT stacks [cond, null]."""
    noted, seen = branches_noted(monkeypatch, "dit-digits", 3.5)
    assert [(step, guidance) for _, step, _, guidance in noted] == [(1, 3.5), (2, 3.5), (3, 3.5)]
    change = [l1(seen[1][row], seen[0][row]) for row in (0, 1)]
    assert noted[0][2] == pytest.approx(change[::-1], rel=1e-4)
    assert abs(change[0] / change[1] - 1) > 1e-3


def test_branches_in_calls_of_their_own_know_what_the_other_measured_last(monkeypatch):
    noted, seen = branches_noted(monkeypatch, "wan-moving-digits", 3.5)
    assert [name for name, *_ in noted] == ["cond", "uncond"] * 3
    assert {guidance for *_, guidance in noted} == {3.5}
    cond, uncond = (l1(seen[2 + call], seen[call]) for call in (0, 1))  # at step 1, of calls that take turns
    assert noted[0][2] == pytest.approx([cond, cond], rel=1e-4)
    assert noted[1][2] == pytest.approx([uncond, cond], rel=1e-4)
    assert noted[2][2][0] == noted[1][2][0]  # from the step before
    assert noted[3][2][1] == noted[2][2][1]
    assert abs(cond / uncond - 1) > 1e-3


def test_z_image_stacks_the_prompt_first_and_guides_by_one_more_than_its_scale(monkeypatch):
    case = next(case for case in pipelines_image.CASES if case.id == "ZImagePipeline")
    pipe, noted = case.build(), []

    def combine(self, values, step):
        noted[-1].append((list(values), step.guidance))
        return max(values)

    monkeypatch.setattr(RaCfg, "combine", combine)
    with dc.cached(pipe, "ra_cfg", threshold=1e9, granularity="batch"):
        for known in (models.calls.PROMPT_FIRST, ()):
            monkeypatch.setattr(models.calls, "PROMPT_FIRST", known)
            noted.append([])
            pipe(**case.call(), guidance_scale=4.5)
    right, wrong = noted
    assert right == [(values[::-1], 5.5) for values, _ in wrong]
    assert len(right) == case.iterations - 1
    assert all(abs(u / c - 1) > 1e-3 for (u, c), _ in right)


@pytest.mark.parametrize(("guidance", "branches"), [(1.0, 1), (2.5, 2)])
def test_a_denoiser_that_is_distilled_for_guidance_has_a_scale_beside(monkeypatch, guidance, branches):
    noted, _ = branches_noted(monkeypatch, "flux-digits", guidance)
    assert {(len(values), scale) for _, _, values, scale in noted} == {(branches, guidance)}


def test_spans_keep_what_any_part_of_a_method_looks_at():
    pipe = reference.load("dit-digits")
    call = reference.inputs("dit-digits", (3,), (5,), steps=8)
    one = dc.inspect(pipe, call, forecaster="reuse")
    assert one.history == 1
    for more, options in ((5, {}), (3, {"risk_history": 3})):
        kept = dc.inspect(pipe, call, policy="racer", forecaster="reuse", **options)
        assert (kept.history, kept.cache_bytes) == (more, more * one.cache_bytes)
        with dc.cached(pipe, "racer", every=1, warmup=7, forecaster="reuse", threshold=1e9, **options):
            pipe(**call)
            assert dc.summary(pipe).cache_bytes == kept.cache_bytes
    assert dc.inspect(pipe, policy="dicache", forecaster="reuse", corrector="alignment").history == 2
