"""Small language models with random weights, of each kind of attention, for the tests of language caches."""

from contextlib import contextmanager

import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
from transformers import LlamaForCausalLM

from diffusion_cache.language.masks import additive, sees

VOCABULARY, MASK, BLOCK = 13, 12, 4
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    use_cache=False,
)


class Seeing:
    """A causal model whose tokens see their block of `reach` tokens and those before, or every token if it is None."""

    reach: int | None = BLOCK

    def forward(self, input_ids, attention_mask=None, position_ids=None, **kwargs):
        if attention_mask.ndim == 2:
            places = torch.arange(input_ids.shape[1])
            attention_mask = additive(sees(places, places, self.reach) & attention_mask[:, None].bool(), self.dtype)
        return super().forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)


class Llama(Seeing, LlamaForCausalLM):
    pass


def model(reach=BLOCK, cls=Llama, **sizes):
    """Weights are large enough for every token to depend on all that it sees, and the mask token is never predicted."""
    torch.manual_seed(0)
    made = cls(cls.config_class(**{**SIZES, **sizes})).eval()
    made.reach = reach
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
        head = made.get_output_embeddings().weight
        head[MASK] = head[:MASK].mean(dim=0)
    return made


def pipeline(made):
    pipe = LLaDA2Pipeline(made, BlockRefinementScheduler(block_length=BLOCK))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(samples=3, prompt=6, seed=0, **others):
    """Arguments of a call that decodes ten tokens after a prompt that ends within a block."""
    tokens = torch.randint(MASK, (samples, prompt), generator=torch.Generator().manual_seed(seed))
    return {
        "input_ids": tokens,
        "gen_length": 10,
        "num_inference_steps": BLOCK,
        "mask_token_id": MASK,
        "threshold": 0.9,
        "editing_threshold": None,
        "sampling_method": "greedy",
        "output_type": "seq",
        **others,
    }


@contextmanager
def logits_seen(pipe):
    """The logits that the pipeline's scheduler is given, step by step."""
    seen, step = [], type(pipe.scheduler).step

    def noted(self, *args, **kwargs):
        seen.append(kwargs["model_output"].clone())
        return step(self, *args, **kwargs)

    type(pipe.scheduler).step = noted
    try:
        yield seen
    finally:
        type(pipe.scheduler).step = step


def logits(pipe, **others):
    with logits_seen(pipe) as seen:
        pipe(**call(**others))
    return seen
