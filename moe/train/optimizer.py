"""AdamW, Adafactor or Muon: with decoupled weight decay by kind of parameter, clipping by the global norm, and a rate
for experts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from moe.model.config import ConfigError
from moe.model.parameter import Kind, ParameterSpec, is_spec
from moe.model.precision import Precision
from moe.train.optimizers.adafactor import scale_by_adafactor
from moe.train.optimizers.adam import scale_by_adam
from moe.train.optimizers.matrices import matrix_axes
from moe.train.optimizers.moments import States, format_of
from moe.train.optimizers.muon import MATRICES, Orthogonalized, scale_by_muon
from moe.train.optimizers.rounding import (
    Rounding,
    with_kahan_compensation,
    with_master_weights,
    with_stochastic_rounding,
)
from moe.train.schedule import Schedule, make_schedule
from parallel.layout import SINGLE_DEVICE, Layout, LayoutConfig

Optimizer = Literal["adamw", "adafactor", "muon"]


@dataclass(frozen=True)
class OptimizerConfig:
    """
    kind: "adamw"; "adafactor", of whose second moments rows' and columns' means are kept, and no first moments; "muon",
        which orthogonalizes the momentum of matrices in attention, experts and dense layers, beside AdamW for the rest
        (moe/train/optimizers/).
    learning_rate: at the peak of the schedule.
    schedule, warmup_steps, final_share: see moe/train/schedule.py.
    b1, b2, eps: of Adam (arXiv 1412.6980), as Megatron and the release's recipes set them. Of Adafactor b2 is the
        largest decay, and the others are not used.
    momentum: of Muon (arXiv 2502.16982, released code).
    weight_decay: decoupled (arXiv 1711.05101), times the learning rate, for all kinds but `undecayed`.
    clip_norm: largest global norm of the gradients; None leaves them.
    states: in which the moments are kept. "bfloat16" is for all matrices; "int8" and "fp8", with a scale for a block of
        values, for those of attention, experts and dense layers; the rest is float32 (moe/train/optimizers/moments.py).
    master_weights: whether float32 copies of the parameters are kept with the optimizer's states, and updated in place
        of the parameters, which then are these copies rounded. For parameters that are stored in bfloat16, whose steps
        are too coarse for most updates.
    rounding: without such copies, how an updated parameter becomes bfloat16: "stochastic", right on average; "kahan",
        with what rounding lost kept for the next step, in bfloat16 (moe/train/optimizers/rounding.py).
    expert_rate: the routed experts' learning rate relative to the others'. An expert sees only its share of the batch;
        Hunyuan-Large's rule gives about 0.31 for 1 of 16 (arXiv 2411.02265 §2.2.3).
    """

    kind: Optimizer = "adamw"
    learning_rate: float = 3e-4
    schedule: Schedule = "cosine"
    warmup_steps: int = 100
    final_share: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95
    weight_decay: float = 0.1
    undecayed: tuple[Kind, ...] = ("norm",)
    clip_norm: float | None = 1.0
    states: States = "float32"
    master_weights: bool = False
    rounding: Rounding = "nearest"
    expert_rate: float = 1.0

    def __post_init__(self) -> None:
        for name, choices in (("kind", Optimizer), ("schedule", Schedule), ("states", States), ("rounding", Rounding)):
            if getattr(self, name) not in get_args(choices):
                known = ", ".join(get_args(choices))
                raise ConfigError(f"optimizer.{name}={getattr(self, name)!r}: give one of {known}")
        for name in ("learning_rate", "eps", "expert_rate"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)}: give a number above 0")
        for name in ("b1", "b2", "momentum"):
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
        if self.kind == "adafactor" and self.states != "float32":
            raise ConfigError(
                f"optimizer.states={self.states!r} with optimizer.kind='adafactor': means of rows and columns are "
                "small; set states='float32'"
            )
        if self.states == "bfloat16" and 1 - self.b2 < 2**-8:
            raise ConfigError(
                f"optimizer.states='bfloat16' with optimizer.b2={self.b2}: of second moments in bfloat16 a part below "
                "1/256 is lost; set b2 to 0.996 or less, or states='float32'"
            )
        if self.master_weights and self.rounding != "nearest":
            raise ConfigError(
                f"optimizer.master_weights=true with optimizer.rounding={self.rounding!r}: the copies lose nothing; "
                "set rounding='nearest', or master_weights=false"
            )
        unknown = set(self.undecayed) - set(get_args(Kind))
        if unknown:
            raise ConfigError(f"optimizer.undecayed names {sorted(unknown)}: the kinds are {', '.join(get_args(Kind))}")


def check_optimizer(config: OptimizerConfig, precision: Precision, layout: LayoutConfig) -> None:
    """
    Raises:
        ConfigError: the parameters are float32, and need none of what bfloat16 does; or matrices that are to be
            orthogonalized wait on the hosts.
    """
    if config.kind == "muon" and layout.on_host:
        raise ConfigError(
            f"optimizer.kind='muon' with layout.{layout.on_host[0]}='host': devices share out the matrices of all "
            "layers, and of these one at a time would come from the host; set 'device', or kind='adamw'"
        )
    if precision.parameters != "float32":
        return
    for name, off in (("master_weights", False), ("rounding", "nearest")):
        value = getattr(config, name)
        if value != off:
            told, instead = ("true", "false") if value is True else (repr(value), repr(off))
            raise ConfigError(
                f"optimizer.{name}={told} with precision.parameters='float32': these lose nothing to rounding; set "
                f"precision.parameters='bfloat16', or {name}={instead}"
            )


def make_optimizer(
    config: OptimizerConfig,
    specs: dict[str, Any],
    steps: int,
    layout: Layout = SINGLE_DEVICE,
    dtype: DTypeLike = jnp.float32,
) -> tuple[optax.GradientTransformation, Callable[[jax.Array], jax.Array]]:
    """The transformation of gradients into updates, and the learning rate by step.

    Its `update` takes `norm`, the global norm of all gradients, where it is given only a part of them; and `key`, where
    it rounds by chance, and `layer`, where it is given one layer of each stack.

    Args:
        specs: the parameters' ParameterSpecs, by which decay and rates are chosen.
        steps: of the whole run.
        layout: of the parameters. dtype: of Muon's products.

    Raises:
        ConfigError: the warmup is longer than the run, or no parameter is for Muon.
    """
    if config.warmup_steps >= steps:
        raise ConfigError(
            f"optimizer.warmup_steps={config.warmup_steps} with training.steps={steps}: warm up for fewer steps than "
            f"the run has, {max(1, steps // 10)} for example"
        )
    schedule = make_schedule(config.schedule, config.learning_rate, steps, config.warmup_steps, config.final_share)

    def by_kind(choose: Callable[[Kind], Any]) -> Any:
        return _by_spec(lambda spec: choose(spec.kind), specs)

    parts = [] if config.clip_norm is None else [clip_by_norm(config.clip_norm)]
    parts += [
        *_directions(config, specs, layout, dtype),
        optax.add_decayed_weights(config.weight_decay, by_kind(lambda kind: kind not in config.undecayed)),
    ]
    if config.expert_rate != 1.0:
        parts.append(optax.masked(optax.scale(config.expert_rate), by_kind(lambda kind: kind == "expert")))
    optimizer = optax.chain(*parts, optax.scale_by_learning_rate(schedule))
    if config.master_weights:
        optimizer = with_master_weights(optimizer)
    if config.rounding == "kahan":
        optimizer = with_kahan_compensation(optimizer)
    if config.rounding == "stochastic":
        optimizer = with_stochastic_rounding(optimizer, _by_spec(lambda spec: spec.axes.startswith("L"), specs))
    return optimizer, schedule


def _directions(
    config: OptimizerConfig, specs: dict[str, Any], layout: Layout, dtype: DTypeLike
) -> list[optax.GradientTransformation]:
    """Gradients made into steps, by the optimizer's kind."""
    if config.kind == "adafactor":
        return [scale_by_adafactor(_by_spec(lambda spec: matrix_axes(spec.axes), specs), config.b2)]
    formats = _by_spec(lambda spec: format_of(spec, config.states), specs)
    adam = scale_by_adam(formats, config.b1, config.b2, config.eps)
    if config.kind == "adamw":
        return [adam]
    ours = _by_spec(lambda spec: spec.kind in MATRICES, specs)
    if not any(jax.tree.leaves(ours)):
        raise ConfigError(
            f"optimizer.kind='muon': none of the trained parameters is one of {', '.join(MATRICES)}; set kind='adamw'"
        )
    matrices = _by_spec(lambda spec: Orthogonalized(spec.axes, format_of(spec, config.states)), specs)
    muon = scale_by_muon(matrices, config.momentum, layout, dtype)
    return [optax.masked(muon, ours), optax.masked(adam, jax.tree.map(lambda own: not own, ours))]


def _by_spec(choose: Callable[[ParameterSpec], Any], specs: dict[str, Any]) -> Any:
    return jax.tree.map(choose, specs, is_leaf=is_spec)


def clip_by_norm(limit: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm` that is told the norm, where it is given a part of the gradients."""

    def update(gradients: Any, state: Any, params: Any = None, *, norm: jax.Array | None = None, **_: Any):
        del params
        norm = global_norm(gradients) if norm is None else norm
        # XLA repeats a product where it is used; quotients it would write down, of all gradients at once.
        factor = jnp.where(norm < limit, 1.0, limit / norm)
        return jax.tree.map(lambda g: (g * factor).astype(g.dtype), gradients), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def global_norm(gradients: Any) -> jax.Array:
    """f32[], whatever the gradients' format."""
    return optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), gradients))
