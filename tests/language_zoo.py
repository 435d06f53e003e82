"""Causal language models of transformers, tiny and with random weights, and what is measured of each.

LLaDA is built like Llama, Dream like Qwen2, SDAR like Qwen3 and LLaDA2 with experts, like Qwen3Moe; none of their own
classes is in transformers.
"""

import warnings
from typing import Any

import transformers
from language_models import BLOCK, Seeing, logits, model, pipeline

import diffusion_cache as dc

EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
LATENT = dict(
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    head_dim=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    first_k_dense_replace=1,
    num_key_value_heads=2,
    n_group=1,
    topk_group=1,
)
CASES: dict[str, dict[str, Any]] = {
    "ApertusForCausalLM": {},
    "ArceeForCausalLM": {},
    "BailingHybridForCausalLM": {},
    "BitNetForCausalLM": {},
    "CohereForCausalLM": {},
    "DeepseekV2ForCausalLM": LATENT,
    "DeepseekV3ForCausalLM": LATENT,
    "Ernie4_5ForCausalLM": {},
    "Ernie4_5_MoeForCausalLM": dict(moe_num_experts=4, moe_k=2, moe_intermediate_size=16),
    "Exaone4ForCausalLM": {},
    "GPT2LMHeadModel": {},
    "GPTNeoXForCausalLM": {},
    "Gemma2ForCausalLM": {},
    "Gemma3ForCausalLM": {},
    "GemmaForCausalLM": {},
    "Glm4ForCausalLM": {},
    "Glm4MoeForCausalLM": dict(EXPERTS, n_routed_experts=4, first_k_dense_replace=1),
    "GlmForCausalLM": {},
    "GptOssForCausalLM": dict(num_local_experts=4, num_experts_per_tok=2),
    "GraniteForCausalLM": {},
    "HeliumForCausalLM": {},
    "HunYuanDenseV1ForCausalLM": {},
    "LlamaForCausalLM": {},
    "Llama4ForCausalLM": {},
    "MiniMaxForCausalLM": {},
    "MistralForCausalLM": dict(sliding_window=None),
    "MixtralForCausalLM": dict(num_local_experts=4, sliding_window=None),
    "NanoChatForCausalLM": {},
    "NemotronForCausalLM": {},
    "OPTForCausalLM": dict(word_embed_proj_dim=32, ffn_dim=32),
    "Olmo2ForCausalLM": {},
    "OlmoForCausalLM": {},
    "OlmoeForCausalLM": EXPERTS,
    "Phi3ForCausalLM": {},
    "PhiForCausalLM": {},
    "Qwen2ForCausalLM": {},
    "Qwen2MoeForCausalLM": dict(EXPERTS, shared_expert_intermediate_size=16),
    "Qwen3ForCausalLM": {},
    "Qwen3MoeForCausalLM": EXPERTS,
    "Qwen3NextForCausalLM": EXPERTS,
    "SeedOssForCausalLM": {},
    "SmolLM3ForCausalLM": {},
    "StableLmForCausalLM": {},
    "Starcoder2ForCausalLM": dict(sliding_window=None),
}
SIZES = dict(
    hidden_size=32,
    head_dim=16,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
ATTENTION = {"block-causal": BLOCK, "causal": 1, "full": None}
METHODS = {"prefix": {}, "dkv": {"refresh": 3}, "sub_block": {"size": 2}, "elastic": {"window": 2, "threshold": 0.9}}
EXACT = {"block-causal": ("prefix", {}), "causal": ("prefix", {}), "full": ("dkv", {"refresh": 1})}


def measured(name: str) -> dict[str, Any]:
    """What the caches do with one class.

    error: for each attention, the largest difference of a generation's logits from those of no cache, over the largest
    logit, with a method that is to be exact there. share: of the uncached tokens, those that `prefix` ran, and
    methods: those that generate with fewer tokens, both block-causal. reason: what is told where none can be attached.
    """
    cls = getattr(transformers, name)
    made = model(cls=type(name, (Seeing, cls), {}), **{**SIZES, **CASES[name]})
    pipe = pipeline(made)
    row: dict[str, Any] = {"error": {}, "share": 1.0, "methods": [], "reason": ""}
    with warnings.catch_warnings():
        warnings.simplefilter("error", dc.DiffusionCacheWarning)
        try:
            for kind, (method, options) in EXACT.items():
                made.reach = ATTENTION[kind]
                expected = logits(pipe)
                with dc.cached(pipe, method=method, **options):
                    found = logits(pipe)
                    summary = dc.summary(pipe)
                if kind == "block-causal":
                    row["share"] = summary.executed / summary.tokens
                row["error"][kind] = max(
                    ((one - other).abs().max() / other.abs().max()).item()
                    for one, other in zip(found, expected, strict=True)
                )
            made.reach = BLOCK
            for method, options in METHODS.items():
                with dc.cached(pipe, method=method, **options):
                    logits(pipe)
                    if dc.summary(pipe).hit_rate > 0:
                        row["methods"].append(method)
        except dc.ConfigError as error:
            row["reason"] = str(error)
    return row
