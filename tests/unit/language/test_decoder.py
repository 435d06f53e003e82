"""A model taken apart: what its attention is measured to be, and what cannot be taken apart."""

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from language_models import BLOCK, Llama, model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from diffusion_cache.errors import ConfigError
from diffusion_cache.language.decoder import Decoder
from diffusion_cache.language.store import Store
from diffusion_cache.reference import fill_forward


@pytest.mark.parametrize("reach", [BLOCK, 2, 1, 8 * BLOCK, None])
def test_how_far_attention_looks_is_measured(reach):
    made = model(reach)
    assert Decoder(made, BLOCK).reach == reach
    assert Decoder(made, BLOCK, watching=True).reach == reach
    assert not any(module._forward_hooks for module in made.modules())
    assert made.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_how_far_attention_looks_is_measured_in_16_bits(dtype):
    assert Decoder(fill_forward.load(dtype), fill_forward.BLOCK).reach == fill_forward.BLOCK


def test_rounding_that_reaches_every_token_is_not_taken_for_attention():
    made = model(cls=Rounding)
    assert Decoder(made, BLOCK).reach == BLOCK


def test_a_causal_model_of_transformers_as_it_is():
    assert Decoder(model(cls=LlamaForCausalLM), BLOCK).reach == 1


@torch.no_grad()
def test_some_tokens_alone_give_the_logits_of_all():
    made = model(None)
    decoder, store = Decoder(made, BLOCK), Store(2, torch.device("cpu"), None)
    tokens = torch.randint(12, (2, 9), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(9).expand(2, -1) + torch.tensor([[0], [5]])
    padding = torch.ones_like(tokens)
    padding[1, :3] = 0
    store.grow(9)
    for places in (torch.arange(9).expand(2, -1), torch.tensor([[8, 2], [3, 7]])):
        store.given(places)
        hidden, given = decoder.embed(tokens.gather(1, places)), decoder.rows(places, positions, padding)
        for index in range(len(decoder.layers)):
            hidden = decoder.layer(index, hidden, given, store)
    expected = made(tokens, attention_mask=padding, position_ids=positions).logits
    found = decoder.logits(hidden)
    torch.testing.assert_close(found, expected.gather(1, places[..., None].expand_as(found)), rtol=1e-5, atol=1e-5)


def test_models_without_such_parts_are_refused():
    with pytest.raises(ConfigError, match="Linear cannot be run in parts"):
        Decoder(nn.Linear(2, 2), BLOCK)
    small = GPT2LMHeadModel(GPT2Config(vocab_size=13, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    with pytest.raises(ConfigError, match="GPT2LMHeadModel cannot be run in parts"):
        Decoder(small.eval(), BLOCK)


def test_an_offloaded_model_is_refused():
    def sequential(made):
        cpu_offload(made, execution_device="cpu")

    def whole(made):
        cpu_offload_with_hook(made, "cpu")

    for offload in (lambda made: made.to("meta"), sequential, whole):
        made = model()
        offload(made)
        with pytest.raises(ConfigError, match=r"^Llama is offloaded .*: load it without offloading"):
            Decoder(made, BLOCK)
    made = add_hook_to_module(model(), AlignDevicesHook("cpu"))  # which leaves the weights where they are
    assert Decoder(made, BLOCK).reach == BLOCK


def test_attention_that_forgets_is_refused():
    made = model()
    made.config.sliding_window = 1024
    with pytest.raises(ConfigError, match="Llama has sliding_window=1024"):
        Decoder(made, BLOCK)


class Rounding(Llama):
    """Adds to every logit what depends on the last token, as little as rounding would."""

    def forward(self, input_ids, **kwargs):
        output = super().forward(input_ids, **kwargs)
        output.logits = output.logits + 1e-6 * input_ids[:, -1, None, None]
        return output


class Scaled(LlamaForCausalLM):
    """Does to its logits what its parts know nothing of."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output


class Constant(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = torch.zeros_like(output.logits)
        return output


def test_models_whose_parts_give_other_logits_are_refused():
    with pytest.raises(ConfigError, match="gives other logits than as a whole"):
        Decoder(model(cls=Scaled), BLOCK)
    with pytest.raises(ConfigError, match="do not depend on the last token"):
        Decoder(model(cls=Constant), BLOCK)


def test_layers_that_fail_alone_are_refused(monkeypatch):
    made = model()
    monkeypatch.setattr(made.model.layers[1].self_attn, "forward", lambda hidden_states, **_: hidden_states[:, 3])
    monkeypatch.setattr(made, "forward", model().forward)
    with pytest.raises(
        ConfigError, match=r"Llama cannot be run layer by layer \(ValueError: .*: a language cache needs"
    ):
        Decoder(made, BLOCK)


def test_attention_that_gives_no_weights_is_refused_where_they_are_looked_at(monkeypatch):
    made = model()
    for layer in made.model.layers:
        inner = layer.self_attn.forward
        monkeypatch.setattr(layer.self_attn, "forward", lambda inner=inner, **kwargs: (inner(**kwargs)[0], None))
    assert Decoder(made, BLOCK).reach == BLOCK
    with pytest.raises(ConfigError, match="does not give its weights"):
        Decoder(made, BLOCK, watching=True)
    assert not any(module._forward_hooks for module in made.modules())
