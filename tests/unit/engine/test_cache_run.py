"""Runs over a denoiser compiled as a whole: what is not reached is said; and guidance branches stacked in a batch."""

import warnings

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch.utils._python_dispatch import TorchDispatchMode

import diffusion_cache as dc
from diffusion_cache.engine.cache_run import row_groups
from diffusion_cache.engine.intercept import ATTRIBUTE


@pytest.fixture
def denoiser():
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=1, num_layers=2, norm_num_groups=16,
        sample_size=4, patch_size=2, num_embeds_ada_norm=4,
    ).eval()  # fmt: skip


@pytest.fixture
def compiled(denoiser):
    denoiser.compile(backend="eager")
    yield denoiser
    torch._dynamo.reset()


TIMES = (900, 600, 300, 0)


@torch.no_grad()
def call(model, t):
    return model(torch.ones(1, 1, 4, 4), timestep=torch.tensor([t]), class_labels=torch.tensor([0])).sample


def run(model, scope, policy="interval", **options):
    """Outputs and summary of a run that computes its steps 0 and 2, if it caches."""
    options = options or {"every": 2}
    with dc.run(model, policy=policy, forecaster="reuse", num_steps=4, scope=scope, **options) as cached:
        return [call(model, t) for t in TIMES], cached.summary()


def test_blocks_of_a_compiled_denoiser_are_not_reached_by_an_adaptive_policy(compiled):
    plain = [call(compiled, t) for t in TIMES]
    inner = vars(compiled)[ATTRIBUTE]
    with pytest.warns(dc.DiffusionCacheWarning, match=r"nothing was cached.*scope 'denoiser'") as caught:
        outputs, summary = run(compiled, "stack", "first_block", threshold=1e9)
    assert len([warning for warning in caught if warning.category is dc.DiffusionCacheWarning]) == 1
    assert all(map(torch.equal, outputs, plain))
    assert (summary.computed, summary.reused, summary.cache_bytes) == (4, 0, 0)
    assert vars(compiled)[ATTRIBUTE] is inner


def test_an_export_within_a_run_is_of_the_denoiser_itself(denoiser):
    inputs = {"timestep": torch.tensor([900]), "class_labels": torch.tensor([0]), "return_dict": False}
    with torch.no_grad(), dc.run(denoiser, every=2, policy="interval", num_steps=4) as cached:
        call(denoiser, 900)
        exported = torch.export.export(denoiser, (torch.ones(1, 1, 4, 4),), inputs, strict=False).module()
        call(denoiser, 600)
        assert [record.computed for record in cached.summary().records] == [True, False]
        assert torch.equal(
            exported(torch.ones(1, 1, 4, 4), **inputs)[0], denoiser._call_impl(torch.ones(1, 1, 4, 4), **inputs)[0]
        )


def test_compiled_denoiser_is_cached_as_one(compiled):
    plain = [call(compiled, t) for t in TIMES]
    inner = vars(compiled)[ATTRIBUTE]
    with warnings.catch_warnings():
        warnings.simplefilter("error", dc.DiffusionCacheWarning)
        outputs, summary = run(compiled, "denoiser")
    assert not torch.equal(plain[0], plain[1])
    assert all(map(torch.equal, outputs, [plain[0], plain[0], plain[2], plain[2]]))
    assert (summary.computed, summary.reused) == (2, 2)
    assert summary.cache_bytes == outputs[0].nbytes == 64
    assert vars(compiled)[ATTRIBUTE] is inner


@pytest.mark.parametrize(
    ("seeds", "labels", "groups"),
    [
        ([1, 2, 1, 2], [3, 4, 9, 9], 2),  # two samples with guidance
        ([1, 1, 1, 1], [3, 3, 9, 9], 2),  # the same sample twice
        ([1, 1, 1], [3, 4, 9], 3),
        ([1, 1], [3, 3], 1),  # the same sample twice, without guidance
        ([1, 2], [3, 3], 1),
        ([1, 1, 2, 2], [3, 3, 9, 9], 1),
    ],
)
def test_guidance_branches_are_told_from_samples_that_are_alike(seeds, labels, groups):
    torch.manual_seed(0)
    noise, embeddings = torch.randn(10, 2, 3), torch.randn(10, 5)
    timestep = torch.tensor(500)
    given = {"timestep": timestep, "added": {"text": embeddings[labels]}}
    assert row_groups((noise[seeds],), given) == groups
    assert row_groups((), {"sample": noise[seeds], "class_labels": torch.tensor(labels)}) == groups
    assert row_groups(([*noise[seeds]],), given) == 1  # a list of samples has no rows


class Reads(TorchDispatchMode):
    """Counts numbers that are read back one by one."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += operator is torch.ops.aten._local_scalar_dense.default
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("spoilt", [False, True])
def test_features_that_wait_on_the_host_are_not_read_there_at_the_end(denoiser, spoilt):
    if spoilt:
        denoiser.transformer_blocks[1].register_forward_hook(lambda module, args, output: output * torch.nan)
    run = dc.run(denoiser, "interval", every=2, num_steps=4, scope="block", cache_device="cpu", cache_dtype="int8")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", dc.DiffusionCacheWarning)
        cached = run.__enter__()
        for t in TIMES:
            call(denoiser, t)
            cached.next_step()
        with Reads() as reads:
            run.__exit__(None, None, None)
    assert reads.count == 0  # but for one list of all
    own = [str(one.message) for one in told if issubclass(one.category, dc.DiffusionCacheWarning)]
    assert ["not finite" in message and "transformer_blocks.1" in message for message in own] == [True] * spoilt
