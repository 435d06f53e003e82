"""What slicing saves and costs: peak bytes, time and error of one denoiser call, whole and in slices.

The denoisers are UNetSpatioTemporalConditionModel (Stable Video Diffusion), UNetMotionModel (AnimateDiff) and
WanTransformer3DModel with random weights, narrow enough that activations outweigh weights and a call takes seconds on
one core.
"""

import copy
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from ..measure import paired, peak_bytes
from ..slicing import slice_features

TEXT = 64
Draw = Callable[..., Tensor]


def unet_spatio_temporal(draw: Draw) -> tuple[str, dict[str, Any], dict[str, Any]]:
    config = {
        "block_out_channels": (32, 64, 64, 64),
        "num_attention_heads": (2, 4, 4, 4),
        "cross_attention_dim": TEXT,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24,
    }
    inputs = {
        "sample": draw(1, 14, 8, 32, 32),
        "encoder_hidden_states": draw(1, 1, TEXT),
        "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]]),
    }
    return "UNetSpatioTemporalConditionModel", config, inputs


def unet_motion(draw: Draw) -> tuple[str, dict[str, Any], dict[str, Any]]:
    config = {
        "block_out_channels": (32, 64, 64, 64),
        "num_attention_heads": 4,
        "motion_num_attention_heads": 4,
        "cross_attention_dim": TEXT,
    }
    return "UNetMotionModel", config, {"sample": draw(1, 4, 16, 32, 32), "encoder_hidden_states": draw(16, 77, TEXT)}


def wan(draw: Draw) -> tuple[str, dict[str, Any], dict[str, Any]]:
    # a feed-forward 5.8 times as wide as the tokens, as in Wan 2.1 1.3B
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 128,
        "num_layers": 2,
        "ffn_dim": 1493,
        "text_dim": TEXT,
        "freq_dim": 32,
    }
    inputs = {"hidden_states": draw(1, 16, 5, 48, 64), "encoder_hidden_states": draw(1, 32, TEXT)}
    return "WanTransformer3DModel", config, inputs


SUBJECTS = (unet_spatio_temporal, unet_motion, wan)


def error(output: Tensor, expected: Tensor) -> float:
    return ((output - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def measure(
    subject: Callable[[Draw], tuple[str, dict[str, Any], dict[str, Any]]],
    device: str,
    dtype: torch.dtype,
    pairs: int,
    shares: Sequence[int],
    seed: int = 0,
) -> list[dict[str, Any]]:
    """A row for each share of the whole call's peak that slices may take (1 / share is `max_bytes`).

    seed: of weights and inputs. peak_bytes: of activations beside inputs and weights (`weight_bytes`), live tensor
    storages on the CPU and the allocator's bytes on a GPU. time_ratio: whole and sliced calls take turns; the median
    of sliced over whole within a pair, in process CPU time on a CPU and wall time on a GPU. error: largest difference
    over largest value.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    name, config, inputs = subject(lambda *shape: torch.randn(shape, generator=generator))
    model: nn.Module = getattr(diffusers, name)(**config).eval().to(device, dtype)
    twin = copy.deepcopy(model)
    inputs = {key: value.to(device, dtype) for key, value in inputs.items()}
    inputs["timestep"] = torch.tensor([500.0], device=device)

    def whole() -> Tensor:
        return model(**inputs, return_dict=False)[0]

    def sliced() -> Tensor:
        return twin(**inputs, return_dict=False)[0]

    expected, peak = whole(), peak_bytes(whole, device)
    rows = []
    for share in shares:
        with slice_features(twin, max_bytes=peak // share):
            first = sliced()  # measures what slices take
            sliced_peak = peak_bytes(sliced, device)
            timing = paired(sliced, whole, pairs)
            worst = max(error(first, expected), error(sliced(), expected))
        rows.append(
            {
                "model": name,
                "weight_bytes": sum(p.nbytes for p in model.parameters()),
                "max_bytes": peak // share,
                "peak_bytes": peak,
                "sliced_peak_bytes": sliced_peak,
                "saved": 1 - sliced_peak / peak,
                "time_ratio": timing.wall_ratio if device == "cuda" else timing.cpu_ratio,
                "whole_seconds": timing.b_seconds if device == "cuda" else statistics.median(timing.b_cpu),
                "error": worst,
            }
        )
    return rows
