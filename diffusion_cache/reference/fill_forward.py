"""A small masked-diffusion language model with block-causal attention, and its task: filling gaps forward.

A problem is DIGITS digits of which most are 0, a gap; the answer has in place of each gap the last digit before it. The
answer's tokens start masked and are decoded a block at a time, by diffusers' LLaDA2Pipeline. As what stands in a gap
follows from the token of the answer before it, tokens that are decoded at once can contradict each other. The model is
transformers' Qwen3 with another attention mask: every token sees its own block and all earlier ones (Arriola et al.
2025, arXiv 2503.09573). scripts/train_reference.py trains it.
"""

from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from ..language.masks import additive, sees
from . import WEIGHTS

NAME = "fill-forward"
DIGITS, BLOCK = 32, 8
GAPS = 0.7  # their share
MASK = 10  # the token after the ten digits
GATE = 0.9
GATE_SEED = 60_000


class FillForward(Qwen3ForCausalLM):
    """Logits of every token's digit [n, tokens, 11] from tokens [n, tokens], some of them MASK."""

    def __init__(self) -> None:
        super().__init__(
            Qwen3Config(
                vocab_size=MASK + 1,
                hidden_size=128,
                intermediate_size=256,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=32,
                max_position_embeddings=1024,
                tie_word_embeddings=False,
                use_cache=False,
            )
        )

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """attention_mask: 1 for tokens and 0 for padding [n, tokens], or one's own [n, 1, queries, tokens] to add."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if attention_mask.ndim == 2:
            places = torch.arange(input_ids.shape[1], device=input_ids.device)
            attention_mask = additive(sees(places, places, BLOCK) & attention_mask[:, None].bool(), self.dtype)
        return super().forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)


def load(dtype: torch.dtype = torch.float32) -> FillForward:
    """The trained model on the CPU, in eval mode."""
    model = FillForward()
    model.load_state_dict(load_file(WEIGHTS / NAME / "model.safetensors"))
    return nn.Module.to(model, dtype).eval()


def pipeline(model: FillForward | None = None) -> Any:
    """diffusers' pipeline around the trained model, or around the given one. Call it with `pipe(**inputs(seeds))`."""
    from diffusers import BlockRefinementScheduler, LLaDA2Pipeline

    pipe: Any = LLaDA2Pipeline(model or load(), BlockRefinementScheduler(block_length=BLOCK))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def problems(seeds: range | list[int]) -> tuple[Tensor, Tensor]:
    """Digits with gaps, and with their gaps filled, both int64 [n, DIGITS]; a seed stands for one problem."""
    rows = [_draw(1, torch.Generator().manual_seed(seed)) for seed in seeds]
    digits = torch.cat(rows)
    return digits, filled(digits)


def _draw(n: int, generator: torch.Generator) -> Tensor:
    digits = torch.randint(1, 10, (n, DIGITS), generator=generator)
    gaps = torch.rand(n, DIGITS, generator=generator) < GAPS
    gaps[:, 0] = False
    return digits.masked_fill(gaps, 0)


def filled(digits: Tensor) -> Tensor:
    """The answers to digits [n, DIGITS], of which the first is no gap."""
    last = torch.where(digits > 0, torch.arange(digits.shape[1]), 0).cummax(dim=1).values
    return digits.gather(1, last)


def inputs(seeds: range | list[int], threshold: float = 2.0) -> dict[str, Any]:
    """Arguments of the pipeline's call for these problems.

    threshold: a refinement decodes the tokens that the model is surer of than this, and the surest in any case; above 1
    it is one token a refinement.
    """
    return {
        "input_ids": problems(seeds)[0],
        "gen_length": DIGITS,
        "num_inference_steps": BLOCK,
        "mask_token_id": MASK,
        "threshold": threshold,
        "editing_threshold": None,  # the model was not trained to judge tokens that it sees
        "sampling_method": "greedy",
        "output_type": "seq",
    }


def exact(seeds: range | list[int], sequences: Tensor) -> Tensor:
    """Whether each answer [n, DIGITS] is right in every digit, bool [n]."""
    return (sequences == problems(seeds)[1]).all(dim=1)


def exact_match(model: FillForward, samples: int = 200, batch: int = 50) -> float:
    """Share of problems that a model solves without a cache, of seeds from GATE_SEED on."""
    pipe = pipeline(model)
    seeds = list(range(GATE_SEED, GATE_SEED + samples))
    parts = [seeds[start : start + batch] for start in range(0, samples, batch)]
    right = torch.cat([exact(part, pipe(**inputs(part)).sequences) for part in parts])
    return right.float().mean().item()


def loss(model: FillForward, n: int, seed: int, device: str = "cpu") -> Tensor:
    """Cross entropy of the masked digits of n new answers, each of their blocks masked at a level of its own.

    The blocks of an answer are trained in one pass (arXiv 2503.09573): beside the clean tokens stands a
    noisy copy of the answer, of which every block sees itself and the clean blocks before it.
    """
    generator = torch.Generator().manual_seed(seed)
    digits = _draw(n, generator)
    answer = filled(digits)
    level = torch.rand(n, DIGITS // BLOCK, generator=generator).repeat_interleave(BLOCK, dim=1)
    masked = torch.rand(n, DIGITS, generator=generator) < level
    tokens = torch.cat([digits, answer, answer.masked_fill(masked, MASK)], dim=1)
    clean = torch.arange(2 * DIGITS)
    noisy = clean[DIGITS:]
    places = torch.cat([clean, noisy])
    seen = torch.cat([sees(places, clean, BLOCK), sees(places, noisy, BLOCK)], dim=1)
    earlier = noisy[:, None] // BLOCK > clean // BLOCK
    seen[2 * DIGITS :, : 2 * DIGITS] = earlier
    seen[2 * DIGITS :, 2 * DIGITS :] = noisy[:, None] // BLOCK == noisy // BLOCK
    seen[: 2 * DIGITS, 2 * DIGITS :] = False
    logits = model(
        tokens.to(device),
        attention_mask=additive(seen.to(device), torch.float32).expand(n, -1, -1, -1),
        position_ids=places.expand(n, -1).to(device),
    ).logits[:, 2 * DIGITS :]
    return F.cross_entropy(logits[masked.to(device)], answer[masked].to(device))
