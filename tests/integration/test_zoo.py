"""Every denoiser class that diffusers exports, at every scope: identical when computed, exact when reused, restored."""

import importlib

import diffusers
import pytest
import torch
import zoo
from torch import nn
from zoo_checks import PERTURBED, TOLERANCE, checks, compared_apart

from diffusion_cache.models.spans import SIDE_STACK, branches, is_unet, stacks

CASES = zoo.cases()
# what cannot be cached, and the reason that is told; scopes by the start of their names
KEYS_AND_VALUES = "fills a cache of keys and values"
REASONS = {
    # a cut leaves fewer up blocks than down blocks outside, and the one above it reads a skip connection from inside
    ("UNet1DModel-resnets", "cut"): "used outside of it as well",
    ("UNet1DModel-resnets", "branch"): "no attention or feed-forward modules",
    ("StableCascadeUNet", "cut"): "runs the blocks of its levels one by one",
    ("StableCascadeUNet-repeated", "cut"): "runs the blocks of its levels one by one",
    ("QwenImage21Transformer2DModel-kv_extract", ""): KEYS_AND_VALUES,
    ("SanaWMLTX2RefinerTransformer3DModel-capture", ""): KEYS_AND_VALUES,
    ("WanAnimate2Transformer3DModel-extract", ""): KEYS_AND_VALUES,
    ("AnyFlowFARTransformer3DModel-prefill", ""): KEYS_AND_VALUES,
    ("Flux2Transformer2DModel-kv_extract", ""): KEYS_AND_VALUES,
    ("GlmImageTransformer2DModel-kv_write", ""): KEYS_AND_VALUES,
}
# stacks that a case does not run, or that run beside the sample's
BESIDE = {
    "LatteTransformer3DModel-image": {"temporal_transformer_blocks"},
    "Flux3Transformer2DModel": {"mode_blocks.image_cond"},
}
# stacks of which the next one begins with what the last one gave, and nothing between: cached as one span
JOINED = (
    "BriaTransformer2DModel",
    *(f"FluxTransformer2DModel{variant}" for variant in ("", "-schnell", "-control", "-kontext")),
    "Flux2Transformer2DModel-kv_extract",
    *(f"HunyuanImageTransformer2DModel{variant}" for variant in ("", "-distilled", "-refiner")),
    *(f"HunyuanVideoTransformer3DModel{variant}" for variant in ("", "-latent-concat", "-token-replace")),
    "HunyuanVideoFramepackTransformer3DModel",
    *(f"LongCatImageTransformer2DModel{variant}" for variant in ("", "-edit")),
    *(f"MotifVideoTransformer3DModel{variant}" for variant in ("", "-decoder")),
    "OvisImageTransformer2DModel",
)
SEVERAL_STACKS = [case for case in CASES if len(case.chain) > 1 and not case.levels]
# linear layers whose outputs are added, where the feed-forward is no module of its own
INLINE = ("proj_mlp", "proj_out", "ff_out", "down_proj")


def exported() -> set[str]:
    """The classes of diffusers' transformers and UNets; containers that are no modules to call left in."""
    names = set()
    for part in ("models.transformers", "models.unets"):
        module = importlib.import_module(f"diffusers.{part}")
        names |= {name for name in dir(module) if _is_model(getattr(module, name))}
    return {name for name in names if hasattr(diffusers, name)}


def _is_model(value) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


def reason(case: zoo.Case, scope: str) -> str | None:
    found = [text for (name, start), text in REASONS.items() if name == case.id and scope.startswith(start)]
    return found[0] if found else None


def test_the_zoo_is_complete():
    covered = {case.name for case in CASES} | set(zoo.unbuildable())
    assert exported() - covered == set()
    assert len({case.name for case in CASES}) >= 82
    assert len({case.id for case in CASES}) == len(CASES)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.id)
def built(request):
    return request.param, zoo.build(request.param)


def test_denoiser(built):
    case, model = built
    with torch.compiler.set_stance("force_eager"):  # some compile how they make a mask, which takes long
        found = checks(case, model)
    for check in found:
        assert check.identical, check
        assert check.restored, check
        assert check.error <= TOLERANCE, check
        why = reason(case, check.scope)
        if why:
            assert check.reused == 0
            assert why in check.reason
        else:
            assert check.reused > 0, check
            assert check.perturbed > PERTURBED, check


@pytest.mark.parametrize("case", SEVERAL_STACKS, ids=lambda case: case.id)
def test_stacks_in_a_row_are_one_span(case):
    found = compared_apart(case, zoo.build(case))
    assert (found.joined, found.error <= TOLERANCE) == (case.id in JOINED, True)
    assert found.joined or found.error == 0
    assert (found.reused == 0) == (reason(case, "stack") is not None)
    if found.joined:
        assert found.bytes <= 0.6 * found.bytes_apart  # half, where the later ones give all that the first ones do


def test_blocks_and_branches_are_found(built):
    case, model = built
    if is_unet(model):
        assert len(model.down_blocks) == case.levels
        expected = set()
    else:
        main = {name: len(blocks) for name, blocks in stacks(model).items() if not SIDE_STACK.search(name)}
        assert {name: count for name, count in main.items() if name in case.chain} == dict(case.chain)
        assert set(main) - set(case.chain) <= BESIDE.get(case.id, BESIDE.get(case.name, set()))
        expected = set(_branches(case, model))
    assert expected - set(branches(model)) == set()


def _branches(case, model):
    for stack, attributes in case.branches.items():
        for name, block in model.get_submodule(stack).named_children():
            for attribute in attributes:
                if attribute in INLINE or _get(block, attribute) is None:
                    continue
                yield f"{stack}.{name}.{attribute}"


def _get(block: nn.Module, attribute: str) -> nn.Module | None:
    try:
        return block.get_submodule(attribute)
    except AttributeError:
        return None
