"""Language caches in diffusers' LLaDA2Pipeline: exact where they say so, alike every time, and gone without a trace."""

import copy
import warnings

import pytest
import torch
from diffusers import LLaDA2Pipeline
from language_models import BLOCK, call, logits, logits_seen, model, pipeline
from torch import nn

import diffusion_cache as dc
from diffusion_cache import registry
from diffusion_cache.language import DelayedKV, Elastic, LanguageRun, SubBlock
from diffusion_cache.plan import Plan
from diffusion_cache.schedule import Schedule

METHODS = {
    "prefix": {},
    "dkv": {"refresh": 3},
    "elastic": {"window": 2, "threshold": 0.995},
    "sub_block": {"size": 2},
    "planned": {"plan": Plan("mine", "layer", None, "residual", Schedule.uniform([True, True, False]), ())},
}
EVERYTHING = [("dkv", {"refresh": 1}), ("sub_block", {"size": 1000})]


@pytest.fixture(scope="module")
def pipe():
    return pipeline(model())


def test_the_contracts_are_of_all_methods():
    assert set(METHODS) == set(registry.languages.names())


def sequences(pipe, **others):
    return pipe(**call(**others)).sequences


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


LEFT_PADDED = torch.tensor([[1] * 6, [0] * 2 + [1] * 4, [0] * 4 + [1] * 2])
CALLS = {
    "as it is": {},
    "padded on the left": {"attention_mask": LEFT_PADDED},
    "edited": {"editing_threshold": 0.05},
    "sampled": {"sampling_method": "multinomial", "temperature": 1.0},
    "blocks of another length": {"block_length": 3},
    "one token": {"gen_length": 1},
}


@pytest.mark.parametrize("others", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("reach", [BLOCK, 1])
def test_prefix_gives_the_logits_of_no_cache(reach, others):
    pipe = pipeline(model(reach))

    def generator():
        return {"generator": torch.Generator().manual_seed(0)} if "temperature" in others else {}

    expected = logits(pipe, **others, **generator())
    with dc.cached(pipe, method="prefix"):
        assert_same(logits(pipe, **others, **generator()), expected)
        summary = dc.summary(pipe)
    assert summary.executed < 0.6 * summary.tokens or others.get("gen_length") == 1


@pytest.mark.parametrize("reach", [BLOCK, None])
@pytest.mark.parametrize(("method", "options"), EVERYTHING)
def test_methods_that_are_told_to_compute_everything_do(method, options, reach):
    """A refresh at every refinement, and one part as long as all."""
    pipe = pipeline(model(reach))
    expected = logits(pipe)
    with dc.cached(pipe, method=method, **options):
        found = logits(pipe)
        assert dc.summary(pipe).computed == len(found)
    assert_same(found, expected)


@pytest.mark.parametrize(("method", "options"), METHODS.items(), ids=METHODS)
def test_two_runs_are_alike_and_nothing_is_left_behind(pipe, method, options):
    def state():
        modules = {name: dict(vars(module)) for name, module in pipe.model.named_modules()}
        hooks = [len(module._forward_hooks) for module in pipe.model.modules()]
        return vars(LLaDA2Pipeline)["__call__"], set(vars(pipe)), modules.keys(), hooks, vars(pipe.model).keys()

    expected = logits(pipe)
    before, attention = state(), pipe.model.config._attn_implementation
    dc.enable(pipe, method=method, **options)
    found = logits(pipe)
    assert all(torch.equal(one, other) for one, other in zip(logits(pipe), found, strict=True))
    # after another size, and after a run that was cut off in the middle of a block
    sequences(pipe, samples=2, prompt=3)

    class Interrupted(Exception):
        pass

    def stop(pipe, step, timestep, tensors):
        if step == 5:
            raise Interrupted
        return tensors

    with pytest.raises(Interrupted):
        pipe(**call(callback_on_step_end=stop))
    assert all(torch.equal(one, other) for one, other in zip(logits(pipe), found, strict=True))
    summary = dc.summary(pipe)
    assert summary.cache_bytes > 0
    assert summary.executed < summary.tokens
    assert method in str(summary)
    dc.disable(pipe)
    assert state() == before
    assert pipe.model.config._attn_implementation == attention
    assert all(torch.equal(one, other) for one, other in zip(logits(pipe), expected, strict=True))


@pytest.mark.parametrize(("method", "options"), METHODS.items(), ids=METHODS)
def test_a_sample_does_not_depend_on_its_neighbours(pipe, method, options):
    with dc.cached(pipe, method=method, **options):
        together = logits(pipe)
        tokens = call()["input_ids"]
        for sample in range(3):
            alone = logits(pipe, input_ids=tokens[sample : sample + 1])
            for one, other in zip(alone, together, strict=False):
                assert (one[0] - other[sample]).abs().max() <= 1e-4 * other.abs().max()


@pytest.mark.parametrize(("method", "options"), METHODS.items(), ids=METHODS)
def test_what_is_kept_is_used(pipe, method, options, monkeypatch):
    with dc.cached(pipe, method=method, **options):
        expected = logits(pipe)
        update, layers = LanguageRun._refine, pipe.model.model.layers

        def spoilt(self, *args, **kwargs):
            if self._store is not None:
                self._store._values[len(layers) - 1][:, :, 0] += 1.0  # of a token that is settled
            return update(self, *args, **kwargs)

        monkeypatch.setattr(LanguageRun, "_refine", spoilt)
        found = logits(pipe)
    assert torch.equal(found[0], expected[0])
    assert (found[1] - expected[1]).abs().max() > 1e-3


def test_tokens_are_counted(pipe):
    """Two samples of 8 + 8 tokens in blocks of four, each block decoded in four refinements."""
    given = call(samples=2, prompt=8, gen_length=8, threshold=2.0)
    expected = {"prefix": ((12 + 3 * 4) + (8 + 3 * 4), 8), "dkv": ((12 + 4 + 3 + 2) + (8 + 4 + 3 + 2), 4)}
    for method, (tokens, refreshes) in expected.items():
        with dc.cached(pipe, method=method):
            pipe(**given)
            summary = dc.summary(pipe)
        assert summary.executed == 2 * tokens
        assert summary.tokens == 2 * 4 * (12 + 16)
        assert summary.computed == refreshes  # of dkv, too, where all tokens but one are masked and that one is new


def test_refreshing_single_layers_computes_more_than_none_and_less_than_all(pipe):
    executed = {}
    for threshold in (-1.0, 1.0):
        with dc.cached(pipe, method="elastic", window=1, threshold=threshold):
            sequences(pipe, threshold=2.0)
            executed[threshold] = dc.summary(pipe).executed
    assert executed[-1.0] < executed[1.0] < 3 * (8 * 3 + (8 + 4 * 3) * 2)  # of three samples, refreshed every time


def test_what_was_not_computed_is_not_decoded(pipe):
    """Of a block in two parts, decoded a token a refinement, the second part waits for the first."""
    active, decoded = [], []

    def noted(pipe, step, timestep, tensors):
        active.append(tensors["active_block"][0])
        decoded.append(tensors["transfer_index"][0])
        return tensors

    with dc.cached(pipe, method="sub_block", size=2), logits_seen(pipe) as seen:
        pipe(
            **call(samples=1, prompt=8, gen_length=12, threshold=2.0),
            callback_on_step_end=noted,
            callback_on_step_end_tensor_inputs=["active_block", "transfer_index"],
        )
        parts = [step for step, one in enumerate(dc.summary(pipe).records) if not one.computed]
    waited = 0
    for step in parts:
        first = active[step].int().argmax() // 2 * 2
        inside = (torch.arange(BLOCK) // 2 * 2 == first) & active[step]
        held = active[step] & ~inside
        assert decoded[step][inside].sum() == 1
        assert not decoded[step][held].any()
        assert torch.equal(seen[step][0, held].argmax(-1), seen[step - 1][0, held].argmax(-1))
        assert (seen[step][0, held].softmax(-1) < 1.1 / seen[step].shape[-1]).all()
        waited += int(held.sum())
    assert waited > 0


def test_models_that_look_ahead_are_refused_by_prefix_alone():
    pipe = pipeline(model(None))
    expected = sequences(pipe)
    with pytest.raises(dc.ConfigError, match=r"logits of the first token change with the last: take dkv or elastic"):
        dc.enable(pipe, method="prefix")
    with dc.cached(pipe, method="dkv", refresh=2):
        sequences(pipe)
        dc.summary(pipe)
        with pytest.raises(dc.ConfigError, match="prefix keeps finished blocks"):
            dc.enable(pipe)
        assert dc.summary(pipe).method == "dkv(refresh=2)"
    assert torch.equal(sequences(pipe), expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "prefx"}, "Unknown language cache 'prefx'. Did you mean 'prefix'"),
        ({"method": "dkv", "refesh": 3}, "Unknown option 'refesh' for language cache 'dkv'. Did you mean 'refresh'"),
        ({"method": "dkv", "refresh": "often"}, "refresh must be a whole number"),
        ({"method": DelayedKV(2), "refresh": 3}, "'refresh' belongs to the language cache"),
        ({"policy": "interval", "every": 2}, "policy is for denoisers"),
        ({"method": "prefix", "speedup": 2.0}, "speedup needs a profile"),
        ({"min_psnr": 30.0}, "min_psnr is for denoisers"),
        ({"method": "planned", "plan": "mine"}, "plan needs a profile"),
        ({"method": "prefix", "granularity": "batch"}, "granularity is for denoisers"),
        ({"method": 3}, "must be a name or an instance"),
    ],
)
def test_bad_input_is_told_and_changes_nothing(pipe, wrong, message):
    dc.enable(pipe, method=SubBlock(2))
    before = sequences(pipe)
    with pytest.raises(dc.ConfigError, match=message):
        dc.enable(pipe, **wrong)
    assert torch.equal(sequences(pipe), before)
    assert dc.summary(pipe).method == "sub_block(size=2)"
    dc.disable(pipe)
    with pytest.raises(dc.ConfigError, match="not enabled"):
        dc.summary(pipe)


def test_a_failure_computes_everything_and_is_told_once(pipe, monkeypatch):
    expected = sequences(pipe)

    def broken(self, view):
        raise RuntimeError("broken")

    monkeypatch.setattr(Elastic, "rows", broken)
    with dc.cached(pipe, method="elastic"), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert torch.equal(sequences(pipe), expected)
    assert [str(w.message) for w in told if issubclass(w.category, dc.DiffusionCacheWarning)] == [
        "the language cache failed (RuntimeError: broken); this generation goes on without it"
    ]


def test_a_model_that_is_swapped_in_is_cached_or_told_of():
    pipe, other = pipeline(model()), model(num_hidden_layers=2)
    uncached = sequences(pipeline(other))
    with dc.cached(pipe, method="prefix"):
        pipe.model = other
        assert torch.equal(sequences(pipe), uncached)
        assert dc.summary(pipe).executed < dc.summary(pipe).tokens
        pipe.model = model(None)
        with pytest.warns(dc.DiffusionCacheWarning, match="running without the cache"):
            sequences(pipe)
    assert "_compiled_call_impl" not in vars(other)


def test_copies_come_out_uncached(pipe):
    with dc.cached(pipe, method="prefix"):
        twin = copy.deepcopy(pipe)
        sequences(twin)
        with pytest.raises(dc.ConfigError, match="not enabled"):
            dc.summary(twin)
        other = LLaDA2Pipeline(pipe.model, pipe.scheduler)  # shares the model
        other.set_progress_bar_config(disable=True)
        sequences(other)
        with pytest.raises(dc.ConfigError, match="nothing was generated"):
            dc.summary(pipe)


def test_what_is_no_language_pipeline_is_none(pipe):
    with pytest.raises(dc.ConfigError, match="expected a diffusers pipeline"):
        dc.enable(nn.Linear(1, 1), method="fora")
    with pytest.raises(dc.ConfigError, match="Unknown system 'prefix'"):
        dc.enable(dc.reference.load("dit-digits"), method="prefix")
