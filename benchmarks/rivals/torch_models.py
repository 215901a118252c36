"""transformers' models in the sizes of a job. Runs in the peers' environment.

All have as many parameters as ours, and as many of them active, but for a few thousand. What differs:

- HunYuanMoEV1 is our model, but that the one chosen expert always has weight 1.
- Qwen2Moe multiplies the shared expert's output by a gate, and has no norms of queries and keys.
- Qwen3Moe has no shared expert. It is given one expert more, and two a token, so that the sizes are equal.

None adds a loss for balance in these runs; ours does.
"""

import torch
import transformers

from benchmarks.rivals.job import Family, Job, Setting, Sizes


def build(job: Job, setting: Setting) -> transformers.PreTrainedModel:
    """With random weights, in float32 under autocast and else in the job's format."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{setting.family}Config")(**_settings(setting.family, job.sizes))
    return transformers.AutoModelForCausalLM.from_config(
        config,
        dtype=torch.float32 if setting.autocast else getattr(torch, job.format),
        attn_implementation="sdpa",
        experts_implementation=setting.experts,
    )


def _settings(family: Family, sizes: Sizes) -> dict[str, object]:
    common = {
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.d_model,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_kv_heads,
        "head_dim": sizes.head_dim,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    own = {
        "HunYuanMoEV1": {"intermediate_size": sizes.d_expert, "num_experts": sizes.num_experts, "moe_topk": 1},
        "Qwen2Moe": {
            "moe_intermediate_size": sizes.d_expert, "shared_expert_intermediate_size": sizes.d_expert,
            "num_experts": sizes.num_experts, "num_experts_per_tok": 1, "qkv_bias": False,
        },
        "Qwen3Moe": {
            "moe_intermediate_size": sizes.d_expert, "num_experts": sizes.num_experts + 1, "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
    }  # fmt: skip
    return common | own[family]
