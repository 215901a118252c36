"""config.json to ModelConfig and back, for Hunyuan-Large, Hunyuan-A13B, Mixtral and Qwen3-MoE.

Every key is either read, or known to change nothing of what the model computes, or refused by name.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from moe.model.config import ConfigError, ModelConfig, RopeConfig, RouterConfig

Family = Literal["hunyuan", "hunyuan_v1_moe", "mixtral", "qwen3_moe"]
FAMILIES: tuple[Family, ...] = ("hunyuan", "hunyuan_v1_moe", "mixtral", "qwen3_moe")
"""`model_type` of config.json."""

ABOUT_FILES_AND_TOKENS = """
_name_or_path architectures auto_map dtype model_type torch_dtype transformers_version tokenizer_class use_cache
use_flash_attn _attn_implementation chunk_size_feed_forward return_dict output_attentions output_hidden_states
is_encoder_decoder id2label label2id problem_type max_position_embeddings max_window_layers org_vocab_size
bos_token_id eos_token_id eod_token_id pad_id sep_token_id unk_token_id mask_init_id im_start_id im_end_id im_newline_id
text_start_id text_end_id image_token_id video_start_id video_end_id num_media_embeds skip_cls_token
"""
# The release's gate has room for every token, so it neither drops nor recycles any (modeling_hunyuan.py, top1gating).
ABOUT_TRAINING = """
attention_dropout hidden_dropout capacity_factor moe_drop_tokens moe_random_routing_dropped_token output_router_logits
router_aux_loss_coef router_z_loss_coef
"""
UNDER_A_SWITCH_THAT_IS_OFF = """
kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim n_group topk_group class_num pool_type dense_list
xdrope_section
"""
WITHOUT_EFFECT = frozenset((ABOUT_FILES_AND_TOKENS + ABOUT_TRAINING + UNDER_A_SWITCH_THAT_IS_OFF).split())
ABOUT_PICTURES = ("vit_", "anyres_")
"""Beginnings of settings that leave a text model as it is."""

ONLY = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "pretraining_tp": (1,),
    "use_rotary_pos_emb": (True,),
    "use_mla": (False,),
    "group_limited_greedy": (False,),
    "routed_scaling_factor": (1, 1.0),
    "norm_type": ("hf_rms", "rms"),
    "add_classification_head": (False,),
    "use_pack_kv": (False,),
    "use_torch_rmsnorm": (False,),
    "use_sliding_window": (False,),
    "router_jitter_noise": (0, 0.0),
    "enable_lm_head_fp32": (True, False),
    "decoder_sparse_step": (1,),
    "partial_rotary_factor": (1, 1.0),
    "position_embedding_xdrope": (False,),
}
"""Settings that change the computation and of which only these values are implemented; absent or null is allowed."""


class _Reader:
    """The settings of a config.json, remembering which were read."""

    def __init__(self, settings: dict[str, Any], where: str) -> None:
        self.settings, self.where = settings, where
        self.used = set(WITHOUT_EFFECT)

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of `names` that is set; one value where it is a list of the same value for each layer."""
        self.used |= set(names)
        for name in names:
            value = self.settings.get(name)
            if isinstance(value, list):
                if len({json.dumps(each) for each in value}) != 1:
                    raise self.error(name, "differs from layer to layer; give all layers the same")
                value = value[0]
            if value is not None:
                return value
        return default

    def need(self, *names: str) -> Any:
        value = self.get(*names)
        if value is None:
            raise ConfigError(f"{self.where}: lacks {' or '.join(names)}, without which the model has no shape")
        return value

    def error(self, name: str, remedy: str) -> ConfigError:
        return ConfigError(f"{self.where}: {name}={self.settings.get(name)!r} {remedy}")

    def finish(self) -> None:
        """Raises ConfigError for settings that are not implemented, or were never read."""
        for name, allowed in ONLY.items():
            value = self.settings.get(name)
            if value is not None and value not in allowed:
                raise self.error(name, f"is not implemented; {' or '.join(map(repr, allowed))} is")
        known = self.used | set(ONLY)
        unknown = [
            name
            for name, value in self.settings.items()
            if value is not None and name not in known and not name.startswith(ABOUT_PICTURES)
        ]
        if unknown:
            raise self.error(
                unknown[0], "is a setting that is not known here; if it changes nothing, remove it from the file"
            )


def read_config(path: Path) -> tuple[Family, ModelConfig, dict[str, Any]]:
    """The family, the model and the file's contents.

    Raises:
        ConfigError: no such file, an unknown family, or a setting that is not implemented.
    """
    try:
        settings = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a checkpoint's folder") from error
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON ({error})") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: is no JSON object")
    family, config = model_config(settings, str(path))
    return family, config, settings


def model_config(settings: dict[str, Any], where: str = "config.json") -> tuple[Family, ModelConfig]:
    """The model that `settings` describe. See `read_config`."""
    family = settings.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(f"{where}: model_type={family!r} is not implemented; {', '.join(FAMILIES)} are")
    reader = _Reader(settings, where)
    if settings.get("quantization_config") is not None:
        raise reader.error(
            "quantization_config", "cannot be read wide; serve it as it is, or give the checkpoint before it"
        )
    try:
        build = {"mixtral": _mixtral, "qwen3_moe": _qwen3}.get(family, _hunyuan)
        config = build(reader, family)
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, ConfigError) else ConfigError(f"{where}: {error}") from error
    reader.finish()
    return family, config


def _common(reader: _Reader, *, eps: float, theta: float, padding_id: int | None) -> dict[str, Any]:
    """The fields that all families have. eps, theta, padding_id: where the file does not say."""
    heads = reader.need("num_attention_heads")
    if "pad_token_id" in reader.settings:
        padding_id = reader.get("pad_token_id")
        if padding_id is not None and padding_id < 0:
            # torch.nn.Embedding counts a negative padding_idx from the end.
            padding_id += reader.need("vocab_size")
    return {
        "vocab_size": reader.need("vocab_size"),
        "d_model": reader.need("hidden_size"),
        "num_layers": reader.need("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": reader.get("num_key_value_heads", default=heads),
        "head_dim": reader.get("attention_head_dim", "head_dim", default=reader.need("hidden_size") // heads),
        "tie_embeddings": reader.get("tie_word_embeddings", default=False),
        "norm_eps": reader.get("rms_norm_eps", default=eps),
        "init_std": reader.get("initializer_range", default=0.02),
        "padding_id": padding_id,
        "rope": _rope(reader, theta),
    }


def _rope(reader: _Reader, theta: float) -> RopeConfig:
    told = reader.get("rope_scaling", "rope_parameters", default={})
    name = "rope_scaling" if reader.settings.get("rope_scaling") is not None else "rope_parameters"
    if not isinstance(told, dict):
        raise reader.error(name, "is no JSON object")
    told = dict(told)
    theta = float(told.pop("rope_theta", None) or reader.get("rope_theta", default=theta))
    kind = told.pop("rope_type", None) or "default"
    kind = told.pop("type", kind)
    alpha = told.pop("alpha", None)
    # Of the kinds that are implemented, none reads a factor: NTK-alpha takes alpha alone.
    for ignored in ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
        told.pop(ignored, None)
    if told:
        raise reader.error(name, f"has {', '.join(told)}, not known here")
    if kind == "default" and alpha is None:
        return RopeConfig(theta)
    if kind == "dynamic" and alpha:
        return RopeConfig(theta, ntk_alpha=float(alpha))
    raise reader.error(name, "is not implemented; null and {'type': 'dynamic', 'alpha': ...} are")


def _hunyuan(reader: _Reader, family: Family) -> ModelConfig:
    """Tencent's families. Hunyuan-A13B's own config always has QK-norm and a shared expert, and scales the weights of
    the chosen experts to sum 1 for top-1 as well (transformers, hunyuan_v1_moe)."""
    large = family == "hunyuan"
    fields = _common(reader, eps=1e-5, theta=10_000.0, padding_id=0)
    if large and fields["rope"].ntk_alpha is None:
        fields["rope"] = replace(fields["rope"], frequencies="bfloat16")
    width = reader.need("intermediate_size")
    experts = reader.get("num_experts", "num_local_experts", default=1)
    shared = reader.get("num_shared_expert", default=1)
    factor = reader.get("cla_share_factor", default=1)
    router = RouterConfig(
        top_k=reader.get("moe_topk", "num_experts_per_tok", default=1), renormalize=None if large else True
    )
    skipped = reader.get("moe_layer_num_skipped", default=0)
    expert_width = reader.get("moe_intermediate_size", default=width)
    if reader.get("norm_topk_prob", default=True) is not True:
        raise reader.error("norm_topk_prob", "is not implemented for Hunyuan; True is")
    mixed = reader.get("use_mixed_mlp_moe", default=not large)
    cla = reader.get("use_cla", default=False)
    qk_norm = reader.get("use_qk_norm", default=not large)
    dense = experts == 1
    return ModelConfig(
        **fields,
        num_experts=0 if dense else experts,
        d_expert=0 if dense else expert_width,
        num_shared_experts=shared if mixed and not dense else 0,
        num_dense_layers=0 if dense else skipped,
        d_dense=width if dense or skipped else 0,
        cla_factor=factor if cla else 1,
        qk_norm="after_rope" if qk_norm else "none",
        router=RouterConfig() if dense else router,
    )


def _mixtral(reader: _Reader, family: Family) -> ModelConfig:
    """arXiv 2401.04088: top-k weights scaled to sum 1, no shared expert, no QK-norm."""
    if reader.get("sliding_window") is not None:
        raise reader.error("sliding_window", "is not implemented; null is")
    return ModelConfig(
        **_common(reader, eps=1e-5, theta=1_000_000.0, padding_id=None),
        num_experts=reader.get("num_local_experts", "num_experts", default=8),
        d_expert=reader.need("intermediate_size"),
        num_shared_experts=0,
        qk_norm="none",
        router=RouterConfig(top_k=reader.get("num_experts_per_tok", default=2), renormalize=True),
    )


def _qwen3(reader: _Reader, family: Family) -> ModelConfig:
    """arXiv 2505.09388: QK-norm before RoPE, no shared expert."""
    fields = _common(reader, eps=1e-6, theta=10_000.0, padding_id=None)
    reader.used |= {"sliding_window", "mlp_only_layers"}
    dense = sorted(reader.settings.get("mlp_only_layers") or [])
    if dense != list(range(len(dense))):
        raise reader.error("mlp_only_layers", "is not implemented; the first layers, such as [0, 1], may be dense")
    width = reader.get("intermediate_size", default=0)
    return ModelConfig(
        **fields,
        num_experts=reader.get("num_experts", "num_local_experts", default=128),
        d_expert=reader.need("moe_intermediate_size"),
        num_shared_experts=0,
        num_dense_layers=len(dense),
        d_dense=width if dense else 0,
        qk_norm="before_rope",
        router=RouterConfig(
            top_k=reader.get("num_experts_per_tok", default=8),
            renormalize=reader.get("norm_topk_prob", default=False),
        ),
    )


def hunyuan_settings(config: ModelConfig, torch_dtype: str) -> dict[str, Any]:
    """The config.json with which Tencent's code computes what a model trained here does.

    Plain RoPE is written as NTK-alpha with alpha 1, which is the same and which the release computes in float32.

    Raises:
        ConfigError: the released code has no such model.
    """
    plain = config.rope.ntk_alpha is None
    released_rope = plain and config.rope.frequencies == "bfloat16"
    alpha = 1.0 if plain else config.rope.ntk_alpha
    settings = {
        "architectures": ["HunYuanForCausalLM"],
        "model_type": "hunyuan",
        "torch_dtype": torch_dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_expert if config.num_experts else config.d_dense,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "attention_head_dim": config.head_dim,
        "pad_token_id": config.padding_id,
        "hidden_act": "silu",
        "attention_bias": False,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "rope_scaling": None if released_rope else {"type": "dynamic", "factor": 1.0, "alpha": alpha},
        "tie_word_embeddings": config.tie_embeddings,
        "use_qk_norm": config.qk_norm == "after_rope",
        "use_cla": config.cla_factor > 1,
        "cla_share_factor": config.cla_factor,
        "num_experts": config.num_experts or 1,
        "moe_topk": config.router.top_k,
        "use_mixed_mlp_moe": config.num_shared_experts > 0,
        "num_shared_expert": max(1, config.num_shared_experts),
    }
    if config.num_dense_layers and config.num_experts:
        settings |= {
            "moe_layer_num_skipped": config.num_dense_layers,
            "intermediate_size": config.d_dense,
            "moe_intermediate_size": config.d_expert,
        }
    if config.router.balance == "bias" and config.has_moe:
        raise ConfigError(
            "model.router.balance='bias': the released code has no place for the selection biases; "
            "export a model trained with 'aux_loss' or 'none'"
        )
    for name, ours, theirs in differences(config, model_config(settings)[1]):
        raise ConfigError(f"model.{name}={ours!r}: the released code knows {theirs!r} only, so it cannot be exported")
    return settings


def differences(one: ModelConfig, other: ModelConfig) -> list[tuple[str, Any, Any]]:
    """The fields in which two models compute differently: (name, one's value, the other's).

    How a router is balanced and limited in training, and how parameters were first drawn, is no difference.
    """
    found = []
    for prefix, a, b in (("", one, other), ("rope.", one.rope, other.rope)):
        for name in type(a).__dataclass_fields__:
            if name in ("rope", "router", "init_std", "padding_id"):
                continue
            mine, theirs = getattr(a, name), getattr(b, name)
            if name == "ntk_alpha" and (mine or 1.0) == (theirs or 1.0):
                continue
            if mine != theirs and not _unused(name, one, other):
                found.append((prefix + name, mine, theirs))
    if one.has_moe:
        for name in ("top_k", "renormalizes"):
            mine, theirs = getattr(one.router, name), getattr(other.router, name)
            if mine != theirs:
                found.append((f"router.{name}", mine, theirs))
    return found


def _unused(name: str, one: ModelConfig, other: ModelConfig) -> bool:
    if name in ("d_expert", "num_shared_experts"):
        return not (one.has_moe or other.has_moe)
    return name == "d_dense" and not (one.has_dense or other.has_dense)
