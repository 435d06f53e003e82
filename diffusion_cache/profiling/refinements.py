"""Profiles of language models: what each layer adds to the masked tokens of a block, refinement by refinement.

A refinement of one token is none of its neighbour's, as each is decoded at its own; but a block is decoded from its
first refinement to its last, and refinements are counted from its start. Blocks are the samples. What a token's layers
give matters until it is decoded: two refinements are compared over the tokens that are masked at the later one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..fingerprint import Fingerprint
from ..language import SCOPE, decoding, enabled, serves
from ..language.decoder import Decoder
from ..models import unwrap
from ..ops import double
from ..profile import Profile, SpanFacts

Progress = Callable[[str, int, int], None]


def measure(pipe: Any, calls: Sequence[Mapping[str, Any]], progress: Progress = lambda what, done, of: None) -> Profile:
    """Profile a language pipeline on calls of it, without a cache: spans are layers, steps a block's refinements.

    calls: arguments of each call of the pipeline; their rows are the profile's samples. Of the Gram matrices, the mean
    squared distance of two refinements (over the tokens masked at the later one), G_ii + G_tt − 2·G_it, and the
    diagonal, the mean energy of a token that is masked then, are exact. Steps: refinements of the longest block.

    Raises:
        ConfigError: for a pipeline that decodes no text, a model that a language cache cannot serve, no calls, or calls
            in which no token is masked.
    """
    if not serves(pipe):
        raise ConfigError(
            f"refinements are of a pipeline that decodes masked tokens block by block, not of {type(pipe).__name__}"
        )
    if isinstance(calls, Mapping) or not calls:
        raise ConfigError("a profile needs at least one call: give a list of the pipeline's arguments, one dict a call")
    with enabled(pipe, None):
        decoder = Decoder(pipe.model, pipe.scheduler.config.block_length)
        sums = Sums(len(decoder.layers))
        samples: list[tuple[str, int]] = []
        for number, call in enumerate(calls):
            progress("full runs", number, len(calls))
            rows = blocks(pipe, decoder, call, sums.add)
            samples += [(f"call {number}", row) for row in range(rows)]
    distances, energies = sums.means()
    return Profile(
        fingerprint=Fingerprint.of(pipe, {"model": pipe.model}, steps=distances.shape[-1]),
        scope=SCOPE,
        depth=None,
        spans=_spans(decoder),
        passes=("0",),
        row_passes=1,
        samples=tuple(samples),
        arrays={
            name: ((energy[:, :, None] + energy[:, None] - distance) / 2)[:, None]
            for name, distance, energy in zip(("gram_residual", "gram_output"), distances, energies, strict=True)
        },
        facts={"feature": "residual", "block_length": pipe.scheduler.config.block_length},
    )


class Block:
    """A block's refinements. masked: which of its tokens were, [refinements, n, block]. features: what the layers added
    and what left them, [2, refinements, layers, n, block, channels]."""

    def __init__(self, masked: Sequence[Tensor], features: Sequence[Tensor]):
        self.masked = torch.stack(list(masked))
        self.features = torch.stack(list(features), dim=1)


def blocks(pipe: Any, decoder: Decoder, call: Mapping[str, Any], see: Callable[[Block], None]) -> int:
    """Hand on each block that a call of the pipeline decodes, when it is done; gives the number of its rows."""
    size, mask_token = decoding(pipe, (), dict(call))
    length = rows = 0
    masked: list[Tensor] = []
    added: list[list[Tensor]] = []
    left: list[list[Tensor]] = []

    def done() -> None:
        if masked:
            see(
                Block(
                    masked,
                    [torch.stack([torch.stack(parts) for parts in both]) for both in zip(added, left, strict=True)],
                )
            )
        for held in (masked, added, left):
            held.clear()

    def refined(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal length, rows
        tokens = args[0] if args else kwargs["input_ids"]
        if tokens.shape[1] != length:  # the window has grown by the next block
            done()
        rows, length = tokens.shape
        masked.append(tokens[:, -size:] == mask_token)
        added.append([])
        left.append([])

    def ran(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        after = output[0] if isinstance(output, tuple) else output
        before = args[0] if args else kwargs["hidden_states"]
        added[-1].append((after - before)[:, -size:])
        left[-1].append(after[:, -size:])

    with _hooked(pipe.model, decoder, refined, ran), torch.no_grad():
        pipe(**call)
    done()
    return rows


@contextmanager
def _hooked(model: nn.Module, decoder: Decoder, refined: Callable, ran: Callable) -> Iterator[None]:
    hooks = [unwrap(model).register_forward_pre_hook(refined, with_kwargs=True)]
    hooks += [layer.register_forward_hook(ran, with_kwargs=True) for layer in decoder.layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Sums:
    """Squared distances of refinements i < t, and energies at t, of what layers add and of what leaves them.

    distances [2, layers, T, T], energies [2, layers, T], tokens [T]: float64 sums over the tokens masked at t, and how
    many there were at i and t; T grows with the blocks.
    """

    def __init__(self, layers: int):
        self.distances = torch.zeros(2, layers, 0, 0, dtype=torch.float64)
        self.energies = torch.zeros(2, layers, 0, dtype=torch.float64)
        self.tokens = torch.zeros(0, dtype=torch.float64)

    def add(self, block: Block) -> None:
        steps = int(block.masked.flatten(1).any(dim=1).sum())  # tokens are decoded, and never masked again
        more = max(0, steps - len(self.tokens))
        self.distances = nn.functional.pad(self.distances, (0, more, 0, more))
        self.energies, self.tokens = (nn.functional.pad(sums, (0, more)) for sums in (self.energies, self.tokens))
        for step in range(steps):
            rows = double(block.features[:, : step + 1, :, block.masked[step]])  # [2, i, layers, tokens, channels]
            now = rows[:, -1:]
            self.distances[:, :, : step + 1, step] += (rows - now).square().sum(dim=(3, 4)).transpose(1, 2).cpu()
            self.energies[:, :, step] += now[:, 0].square().sum(dim=(2, 3)).cpu()
            self.tokens[step] += rows.shape[3]

    def means(self) -> tuple[Tensor, Tensor]:
        """Distances, symmetric, and energies, of a token.

        Raises:
            ConfigError: where no token was masked.
        """
        if not len(self.tokens):
            raise ConfigError("no token of these calls was to be decoded: give calls with a gen_length above 0")
        distances = self.distances / self.tokens
        return distances + distances.transpose(-1, -2), self.energies / self.tokens


def _spans(decoder: Decoder) -> tuple[SpanFacts, ...]:
    """The layers; their share of the arithmetic goes by the parameters that every token meets."""
    counts = [sum(parameter.numel() for parameter in layer.parameters()) for layer in decoder.layers]
    total = sum(counts) + sum(parameter.numel() for parameter in decoder.head.parameters())
    return tuple(
        SpanFacts(f"layers.{index}", "model", SCOPE, "residual", decoder.embed.weight.shape[1], count / total)
        for index, count in enumerate(counts)
    )
