"""A causal language model of transformers, run layer by layer on some of its tokens."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, DiffusionCacheError
from ..models import unwrap
from .masks import additive, sees
from .store import Store

SEED = 0
TRIED = 128  # tokens at least that a model is tried out on, so that blocks longer than the pipeline's are noticed


class Decoder:
    """The parts of a model: embedding, layers, positions, logits; and how far its attention looks.

    reach: the number of tokens in the blocks that attention never looks beyond, 1 for plain causal attention, None
    where every token sees every other. It is measured, by changing the last of some random tokens; and it is made sure
    that the parts give the model's logits. watching: whether attention weights are to be read.

    Raises:
        ConfigError: for a model that is not built from such parts, or whose logits they do not give.
    """

    def __init__(self, model: nn.Module, block: int, watching: bool = False):
        plain: Any = unwrap(model)
        self.name = type(plain).__name__
        try:
            body = plain.get_decoder()
            self.embed: Any = plain.get_input_embeddings()
            self.head: Any = plain.get_output_embeddings()
            self.layers: Any = body.layers
            self.norm: Any = body.norm
            self.rotary: Any = body.rotary_emb
        except AttributeError as error:
            raise ConfigError(
                f"{self.name} cannot be run in parts ({error}): a language cache needs a causal model of transformers "
                "with an embedding, layers, norm, rotary_emb and an output embedding"
            ) from None
        if _is_offloaded(plain):
            raise ConfigError(
                f"{self.name} is offloaded (its weights are on the meta device, or moved by accelerate), and a "
                "language cache runs its parts where their weights are: load it without offloading and move it as a "
                'whole, as with pipe.to("cuda")'
            )
        self.config = plain.config
        for limit in ("sliding_window", "attention_chunk_size"):
            if getattr(self.config, limit, None):
                raise ConfigError(
                    f"{self.name} has {limit}={getattr(self.config, limit)}: a language cache knows no attention that "
                    "forgets the beginning"
                )
        parameters = inspect.signature(self.layers[0].forward).parameters
        self._cache_argument = "past_key_values" if "past_key_values" in parameters else "past_key_value"
        self._weights: Tensor | None = None
        self.watching = watching
        with torch.no_grad():
            self.reach: int | None = self._measure(model, block)

    def rows(self, places: Tensor, positions: Tensor, padding: Tensor) -> dict[str, Any]:
        """What the layers are given beside hidden states, for the tokens at these places [n, queries].

        positions, padding: of the whole window, [n, tokens] each.
        """
        window = torch.arange(padding.shape[1], device=places.device)
        seen = sees(places, window, self.reach) & padding[:, None].bool()
        dtype = self.embed.weight.dtype
        chosen = positions.gather(1, places)
        return {
            "attention_mask": additive(seen, dtype if dtype.is_floating_point else torch.float32),
            "position_ids": chosen,
            "position_embeddings": self.rotary(self.embed.weight, chosen),
        }

    def layer(self, index: int, hidden: Tensor, rows: dict[str, Any], store: Store) -> Tensor:
        output = self.layers[index](hidden, **rows, **{self._cache_argument: store})
        return output[0] if isinstance(output, tuple) else output

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(self.norm(hidden))

    @property
    def weights(self) -> Tensor:
        """Attention weights of the layer that ran last, averaged over heads [n, queries, tokens]; inside `watched`."""
        if self._weights is None:
            raise ConfigError(f"the attention of {self.name} does not give its weights, which this method looks at")
        return self._weights

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Attention weights can be read inside, if they are to be: attention runs in its plain form."""
        if not self.watching:
            yield
            return
        before = self.config._attn_implementation
        hooks = [
            child.register_forward_hook(self._noted)
            for layer in self.layers
            for name, child in layer.named_children()
            if "attn" in name or "attention" in name
        ]
        self.config._attn_implementation = "eager"
        try:
            yield
        finally:
            self.config._attn_implementation = before
            self._weights = None
            for hook in hooks:
                hook.remove()

    def _noted(self, module: nn.Module, args: Any, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if isinstance(weights, Tensor) and weights.ndim == 4:
            self._weights = weights.float().mean(dim=1)

    def _measure(self, model: nn.Module, block: int) -> int | None:
        device, length = self.embed.weight.device, block * max(3, -(-TRIED // block))
        generator = torch.Generator().manual_seed(SEED)
        tokens = torch.randint(self.embed.weight.shape[0], (1, length), generator=generator).to(device)
        positions = torch.arange(length, device=device)[None]
        padding = torch.ones_like(tokens)
        changed = tokens.clone()
        changed[:, -1] = (tokens[:, -1] + 1) % self.embed.weight.shape[0]
        expected, other = (
            model(given, attention_mask=padding, position_ids=positions).logits for given in (tokens, changed)
        )
        scale, precision = expected.abs().max(), torch.finfo(expected.dtype).eps
        changes = (expected - other).abs().amax(dim=(0, 2))
        # tokens that do not see the last one change by nothing, or by rounding; in 16 bits others change by as little
        firsts = [int((changes > least).nonzero()[0]) for least in (0, 8 * precision * scale) if changes.max() > least]
        if not firsts:
            raise ConfigError(f"the logits of {self.name} do not depend on the last token: is it a language model?")
        differences = []
        for first in dict.fromkeys(firsts):
            self.reach = length - first if first else None
            differences.append((self._in_parts(tokens, positions, padding) - expected).abs().max())
            if differences[-1] <= precision**0.5 * scale:
                return self.reach
        raise ConfigError(
            f"{self.name}, run layer by layer, gives other logits than as a whole (by {min(differences):.3g} of "
            f"{scale:.3g}): its attention is none that a language cache knows (each token sees its own block and "
            "all before, or every token)"
        )

    def _in_parts(self, tokens: Tensor, positions: Tensor, padding: Tensor) -> Tensor:
        """Logits of all tokens, run layer by layer, in two parts where the first cannot depend on the second."""
        length = tokens.shape[1]
        middle = length - self.reach if self.reach else 0
        store = Store(1, tokens.device, self.reach)
        store.grow(length)
        parts = [part for part in (positions[:, :middle], positions[:, middle:]) if part.numel()]
        try:
            with self.watched():
                return torch.cat([self._forward(tokens, part, positions, padding, store) for part in parts], dim=1)
        except DiffusionCacheError:
            raise
        except Exception as error:
            raise ConfigError(
                f"{self.name} cannot be run layer by layer ({type(error).__name__}: {error}): a language cache needs "
                "layers that are given hidden states, an attention mask and positions, and keep keys and values"
            ) from error

    def _forward(self, tokens: Tensor, places: Tensor, positions: Tensor, padding: Tensor, store: Store) -> Tensor:
        rows = self.rows(places, positions, padding)
        store.given(places)
        hidden = self.embed(tokens.gather(1, places))
        for index in range(len(self.layers)):
            hidden = self.layer(index, hidden, rows, store)
            if self.watching:
                _ = self.weights
        return self.logits(hidden)


def _is_offloaded(model: nn.Module) -> bool:
    """Whether weights are elsewhere than where they are used; other hooks of accelerate only bring inputs there."""
    hooks = [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")]
    parts = [part for hook in hooks for part in getattr(hook, "hooks", (hook,))]
    moving = any(getattr(part, "offload", False) or type(part).__name__ == "CpuOffload" for part in parts)
    return moving or any(weight.is_meta for weight in model.parameters())
