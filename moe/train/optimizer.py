"""AdamW with decoupled weight decay by kind of parameter, clipping by the global norm, and a rate for experts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import jax
import optax

from moe.model.config import ConfigError
from moe.model.parameter import Kind, ParameterSpec
from moe.train.schedule import Schedule, make_schedule


@dataclass(frozen=True)
class OptimizerConfig:
    """
    learning_rate: at the peak of the schedule.
    schedule, warmup_steps, final_share: see moe/train/schedule.py.
    b1, b2, eps: of Adam (arXiv 1412.6980), as Megatron and the release's recipes set them.
    weight_decay: decoupled (arXiv 1711.05101), times the learning rate, for all kinds but `undecayed`.
    clip_norm: largest global norm of the gradients; None leaves them.
    expert_rate: the routed experts' learning rate relative to the others'. An expert sees only its share of the batch;
        Hunyuan-Large's rule gives about 0.31 for 1 of 16 (arXiv 2411.02265 §2.2.3).
    """

    learning_rate: float = 3e-4
    schedule: Schedule = "cosine"
    warmup_steps: int = 100
    final_share: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    undecayed: tuple[Kind, ...] = ("norm",)
    clip_norm: float | None = 1.0
    expert_rate: float = 1.0

    def __post_init__(self) -> None:
        if self.schedule not in get_args(Schedule):
            raise ConfigError(f"optimizer.schedule={self.schedule!r}: give one of {', '.join(get_args(Schedule))}")
        for name in ("learning_rate", "eps", "expert_rate"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)}: give a number above 0")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)}: give a number from 0 to below 1")
        if self.warmup_steps < 0:
            raise ConfigError(f"optimizer.warmup_steps={self.warmup_steps}: give 0 or more steps")
        if self.weight_decay < 0:
            raise ConfigError(f"optimizer.weight_decay={self.weight_decay}: give 0 or more")
        if not 0 <= self.final_share <= 1:
            raise ConfigError(f"optimizer.final_share={self.final_share}: give a share of the peak from 0 to 1")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ConfigError(f"optimizer.clip_norm={self.clip_norm}: give a norm above 0, or None for no clipping")
        unknown = set(self.undecayed) - set(get_args(Kind))
        if unknown:
            raise ConfigError(f"optimizer.undecayed names {sorted(unknown)}: the kinds are {', '.join(get_args(Kind))}")


def make_optimizer(
    config: OptimizerConfig, specs: dict[str, Any], steps: int
) -> tuple[optax.GradientTransformation, Callable[[jax.Array], jax.Array]]:
    """The transformation of gradients into updates, and the learning rate by step.

    Args:
        specs: the parameters' ParameterSpecs, by which decay and rates are chosen.
        steps: of the whole run.

    Raises:
        ConfigError: the warmup is longer than the run.
    """
    if config.warmup_steps >= steps:
        raise ConfigError(
            f"optimizer.warmup_steps={config.warmup_steps} with training.steps={steps}: warm up for fewer steps than "
            f"the run has, {max(1, steps // 10)} for example"
        )
    schedule = make_schedule(config.schedule, config.learning_rate, steps, config.warmup_steps, config.final_share)

    def by_kind(choose: Callable[[Kind], Any]) -> Any:
        return jax.tree.map(lambda spec: choose(spec.kind), specs, is_leaf=lambda x: isinstance(x, ParameterSpec))

    parts = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    parts += [
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, by_kind(lambda kind: kind not in config.undecayed)),
    ]
    if config.expert_rate != 1.0:
        parts.append(optax.masked(optax.scale(config.expert_rate), by_kind(lambda kind: kind == "expert")))
    return optax.chain(*parts, optax.scale_by_learning_rate(schedule)), schedule
