"""What the model is: sizes, attention, routing. How it is computed lives in `precision.py` and `execution.py`."""

import itertools
from dataclasses import dataclass, field, replace
from typing import Literal


class ConfigError(ValueError):
    """A configuration that cannot work: names the field, its value, and what would work."""


def divisors(n: int) -> str:
    """The divisors of `n` as a sentence fragment for error messages: "1, 2, 4 or 8"."""
    found = [str(d) for d in range(1, n + 1) if n % d == 0]
    return found[0] if len(found) == 1 else ", ".join(found[:-1]) + " or " + found[-1]


def require_positive(config: object, *fields: str, area: str = "") -> None:
    """Raises ConfigError for the first of `fields` that is not a whole number of at least 1.

    Args:
        area: what stands before the field's name in the message, such as "data.".
    """
    for name in fields:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{area}{name}={value!r}: give a whole number of at least 1")


def require_choice(config: object, name: str, choices: tuple[str, ...], area: str = "") -> None:
    """Raises ConfigError where the field `name` is none of `choices`."""
    if getattr(config, name) not in choices:
        raise ConfigError(f"{area}{name}={getattr(config, name)!r}: give one of {', '.join(choices)}")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al., arXiv 2104.09864), `rotate_half` convention.

    With `ntk_alpha` the base becomes theta · alpha^(H/(H-2)): Hunyuan-Large uses alpha 1e5 (Pretrain) or 1e3
    (Instruct) on theta 1e4 (released code, HunYuanDynamicNTKAlphaRotaryEmbedding).
    frequencies: the number format in which base^(-2i/H) is rounded. The release keeps them in bfloat16 where it has no
        alpha (HunYuanRotaryEmbedding), and the angles of a late position are then far from the exact ones.
    """

    theta: float = 10_000.0
    ntk_alpha: float | None = None
    frequencies: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.theta <= 0:
            raise ConfigError(f"rope.theta={self.theta}: give a positive base, such as 10000.0")
        if self.ntk_alpha is not None and self.ntk_alpha <= 0:
            raise ConfigError(f"rope.ntk_alpha={self.ntk_alpha}: give a positive alpha, or None for plain RoPE")
        require_choice(self, "frequencies", ("float32", "bfloat16"), area="rope.")


@dataclass(frozen=True)
class RouterConfig:
    """Which experts take a token, and what keeps them evenly loaded.

    capacity_factor: None is dropless. Otherwise an expert takes at most ceil(factor · K · T / E) rows of one sequence
        (GShard's groups, arXiv 2006.16668 §2.2; here a group is a sequence, so a run's drops do not depend on how
        its batch is sharded).
    overflow: what happens to rows over capacity. "drop" leaves them to the shared expert and the residual;
        "recycle" gives them a random free slot of another expert (Hunyuan-Large report, arXiv 2411.02265 §2.1).
    balance: "aux_loss" adds the load-balance loss (Switch, arXiv 2101.03961 eq. 4); "bias" shifts each expert's
        selection score instead, without a loss (arXiv 2408.15664); "none" does neither.
    """

    top_k: int = 1
    renormalize: bool | None = None
    capacity_factor: float | None = None
    overflow: Literal["drop", "recycle"] = "drop"
    balance: Literal["aux_loss", "bias", "none"] = "aux_loss"
    aux_loss_weight: float = 0.01
    z_loss_weight: float = 0.0
    bias_rate: float = 0.001

    def __post_init__(self) -> None:
        require_positive(self, "top_k", area="router.")
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            raise ConfigError(
                f"router.capacity_factor={self.capacity_factor}: give a positive factor (1.25 is usual), "
                "or None for dropless routing"
            )
        require_choice(self, "overflow", ("drop", "recycle"), area="router.")
        require_choice(self, "balance", ("aux_loss", "bias", "none"), area="router.")
        if self.overflow == "recycle":
            self._check_recycle()
        for name in ("aux_loss_weight", "z_loss_weight", "bias_rate"):
            if getattr(self, name) < 0:
                raise ConfigError(f"router.{name}={getattr(self, name)}: give a number of at least 0")

    def _check_recycle(self) -> None:
        if self.capacity_factor is None:
            raise ConfigError(
                "router.overflow='recycle' with router.capacity_factor=None: dropless routing never overflows; "
                "give a capacity_factor of at least 1.0, or set overflow='drop'"
            )
        if self.capacity_factor < 1.0:
            raise ConfigError(
                f"router.overflow='recycle' with router.capacity_factor={self.capacity_factor}: there are fewer slots "
                "than rows, so not every dropped row can be recycled; give a capacity_factor of at least 1.0"
            )
        if self.top_k > 1:
            raise ConfigError(
                f"router.overflow='recycle' with router.top_k={self.top_k}: the release defines it for top-1 only; "
                "set overflow='drop', or capacity_factor=None for dropless routing"
            )

    @property
    def renormalizes(self) -> bool:
        """Whether the chosen experts' weights are scaled to sum 1: by default for top-k of k > 1 only, as released."""
        return self.top_k > 1 if self.renormalize is None else self.renormalize


@dataclass(frozen=True)
class ModelConfig:
    """A Hunyuan-shaped mixture-of-experts transformer. Axis letters in brackets.

    d_model [D], num_layers [L], num_heads [N], num_kv_heads [M], head_dim [H], num_experts [E], vocab_size [V].
    d_expert: hidden width [F] of one routed expert; a shared expert has the same, so that `num_shared_experts` of
        them are one feed-forward layer of num_shared_experts · d_expert (released code, HunYuanMLP is_shared_mlp).
    d_dense: hidden width of the layers that are dense: the first `num_dense_layers`, or all where num_experts is 0.
    cla_factor: layers that share one key and value projection (cross-layer attention, arXiv 2405.12981); 1 is none.
    qk_norm: where each head's query and key pass an RMSNorm: after RoPE as in Hunyuan, before it as in Qwen3, or
        nowhere.
    padding_id: token whose lookup gives no gradient to its row of the embedding (released code: the padding_idx of
        torch.nn.Embedding); None for no such token.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    d_expert: int = 0
    num_shared_experts: int = 1
    d_dense: int = 0
    num_dense_layers: int = 0
    cla_factor: int = 1
    qk_norm: Literal["after_rope", "before_rope", "none"] = "after_rope"
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    init_std: float = 0.02
    padding_id: int | None = None
    rope: RopeConfig = field(default_factory=RopeConfig)
    router: RouterConfig = field(default_factory=RouterConfig)

    def __post_init__(self) -> None:
        require_positive(
            self, "vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim", "cla_factor"
        )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}: "
                f"use {divisors(self.num_heads)} key-value heads"
            )
        require_choice(self, "qk_norm", ("after_rope", "before_rope", "none"))
        if self.qk_norm == "before_rope" and self.cla_factor > 1:
            raise ConfigError(
                f"qk_norm='before_rope' with cla_factor={self.cla_factor}: layers that share keys can have key norms "
                "of their own only after RoPE; set qk_norm='after_rope', or cla_factor=1"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim}: RoPE turns pairs of channels, give an even width")
        if self.padding_id is not None and not 0 <= self.padding_id < self.vocab_size:
            raise ConfigError(f"padding_id={self.padding_id}: give a token from 0 to {self.vocab_size - 1}, or None")
        if self.num_experts < 0 or self.num_shared_experts < 0 or self.num_dense_layers < 0:
            raise ConfigError("num_experts, num_shared_experts and num_dense_layers must be at least 0")
        if self.num_dense_layers > self.num_layers:
            raise ConfigError(
                f"num_dense_layers={self.num_dense_layers} of num_layers={self.num_layers}: give at most all of them"
            )
        if self.has_moe:
            require_positive(self, "d_expert")
            if self.router.top_k > self.num_experts:
                raise ConfigError(
                    f"router.top_k={self.router.top_k} of num_experts={self.num_experts}: "
                    f"choose between 1 and {self.num_experts}"
                )
        if self.has_dense:
            require_positive(self, "d_dense")

    @property
    def has_moe(self) -> bool:
        return self.num_experts > 0 and self.num_dense_layers < self.num_layers

    @property
    def dropless(self) -> "ModelConfig":
        """The same, but that each token goes to the experts that it chose, whatever capacity the model trains with."""
        router = replace(self.router, capacity_factor=None, overflow="drop")
        return replace(self, router=router if self.has_moe else RouterConfig())

    @property
    def has_dense(self) -> bool:
        return self.num_experts == 0 or self.num_dense_layers > 0

    def is_dense(self, layer: int) -> bool:
        """Whether layer `layer`, counted from 0, has a plain feed-forward network instead of experts."""
        return self.num_experts == 0 or layer < self.num_dense_layers

    def layer_groups(self, *, unrolled: bool = False) -> list[tuple[tuple[bool, ...], int]]:
        """The layers as runs of equal cross-layer groups: (whether each layer of the group is dense, number of groups).

        64 layers by a CLA factor of 2 are one run of 32 groups; 7 layers by 4 are a group of 4 and a group of 3.

        Args:
            unrolled: whether each group is a run of its own.
        """
        kinds = [self.is_dense(layer) for layer in range(self.num_layers)]
        groups = [tuple(kinds[first : first + self.cla_factor]) for first in range(0, len(kinds), self.cla_factor)]
        if unrolled:
            return [(dense, 1) for dense in groups]
        return [(dense, len(list(run))) for dense, run in itertools.groupby(groups)]
