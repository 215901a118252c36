"""What training keeps from step to step, and the blueprint from which it is made, sharded from the start."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moe.model.adapter import LoraConfig
from moe.model.config import ModelConfig
from moe.model.execution import Execution
from moe.model.parameter import ParameterSpec, SelectionBias, is_spec, specs_of, stored
from moe.model.precision import Precision, check_gathered
from moe.model.products import MagnitudeHistory
from moe.model.randomness import Purpose, run_key
from moe.model.transformer import Transformer
from moe.train.lora import check_frozen, frozen, trained
from moe.train.optimizer import OptimizerConfig, check_optimizer, make_optimizer
from moe.train.parts import first_states
from parallel.layout import Layout


class TrainState(NamedTuple):
    """
    step: i32[], steps taken.
    params: the parameters as nested dicts, in the stored format.
    balance: the routers' selection biases as nested dicts; empty unless router.balance is "bias".
    opt_state: of the optimizer.
    frozen: parameters that are used and not trained, beneath LoRA; empty without. Checkpoints leave them out.
    histories: of the products' largest magnitudes as nested dicts; empty unless precision.scaling is "delayed".
    """

    step: jax.Array
    params: dict[str, Any]
    balance: dict[str, Any]
    opt_state: optax.OptState
    frozen: dict[str, Any]
    histories: dict[str, Any]


@dataclass(frozen=True)
class Blueprint:
    """Everything about a run's state that is known without an array.

    specs: of the parameters that are trained; frozen_specs: of the others.
    """

    config: ModelConfig
    precision: Precision
    execution: Execution
    layout: Layout
    graph: nnx.GraphDef
    specs: dict[str, Any]
    frozen_specs: dict[str, Any]
    lora: LoraConfig | None
    optimizer: optax.GradientTransformation
    learning_rate: Callable[[jax.Array], jax.Array]

    def model(
        self,
        params: dict[str, Any],
        balance: dict[str, Any],
        frozen: dict[str, Any],
        histories: dict[str, Any] | None = None,
    ) -> Transformer:
        """The model with these parameters, selection biases and, with delayed scaling, histories."""
        return nnx.merge(self.graph, params, balance, frozen, histories or {})

    def model_of(self, state: TrainState) -> Transformer:
        return self.model(state.params, state.balance, state.frozen, state.histories)

    @property
    def model_specs(self) -> dict[str, Any]:
        """Of the model's parameters without adapters."""
        return self.frozen_specs or self.specs

    def new_state(self, key: jax.Array) -> TrainState:
        """A fresh state from a key; plain, to be jitted by `create_state` or abstracted."""
        model = fresh_model(self.config, self.precision, self.execution, self.lora, key)
        kinds = (trained(self.lora), SelectionBias, frozen(self.lora), MagnitudeHistory)
        params, balance, base, histories = (nnx.to_pure_dict(nnx.state(model, kind)) for kind in kinds)
        return TrainState(jnp.zeros((), jnp.int32), params, balance, self._first_states(params), base, histories)

    def _first_states(self, params: dict[str, Any]) -> optax.OptState:
        if self.layout.config.optimizer_states == "host":
            return first_states(self.optimizer, self.specs, params)
        return self.optimizer.init(params)

    def by_axes(self, place: Callable[[jax.Array, str], jax.Array], tree: dict[str, Any]) -> dict[str, Any]:
        """`place` of each array of a tree like the parameters, with the letters of its axes."""
        return jax.tree.map(lambda spec, x: place(x, spec.axes), self.specs, tree, is_leaf=is_spec)

    def shardings(self) -> Any:
        """A TrainState of where each array lives; None on a single device.

        Raises:
            LayoutError: a parameter does not divide over the mesh.
        """
        if self.layout.mesh is None:
            return None
        whole: Any = self.layout.whole()
        params = jax.tree.map(lambda spec: self.layout.stored(spec.axes, spec.shape), self.specs, is_leaf=is_spec)
        abstract = jax.eval_shape(self.new_state, jax.random.key(0))
        opt_state = optimizer_shardings(abstract.opt_state, self.specs, self.layout)
        base = stored(abstract.frozen, self.frozen_specs, self.layout)
        balance, histories = jax.tree.map(lambda _: whole, (abstract.balance, abstract.histories))
        return TrainState(whole, params, balance, opt_state, base, histories)

    def abstract_state(self) -> TrainState:
        """The state's shapes, formats and shardings, for compiling and for restoring a checkpoint."""
        abstract = jax.eval_shape(self.new_state, jax.random.key(0))
        shardings = self.shardings()
        if shardings is None:
            return abstract
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract, shardings
        )

    def create_state(self, seed: int) -> TrainState:
        """A fresh state, each array made on the devices that keep it; the same numbers on every mesh, but
        for rounding of the last bit."""
        return jax.jit(self.new_state, out_shardings=self.shardings())(run_key(seed, Purpose.INITIALIZE))

    def state_from(self, params: dict[str, Any], seed: int = 0, balance: dict[str, Any] | None = None) -> TrainState:
        """A state of step 0 with the model's given parameters, which stand where `shardings` says and in the stored
        format; beneath LoRA these are frozen, and the adapters drawn from the seed.

        Args:
            balance: the routers' selection biases that the parameters were trained with; None or empty for zeros.
        """

        def begin(params: dict[str, Any], balance: dict[str, Any] | None) -> TrainState:
            fresh = self.new_state(run_key(seed, Purpose.INITIALIZE))
            fresh = fresh._replace(balance=balance or fresh.balance)
            if self.lora is not None:
                return fresh._replace(frozen=params)
            return fresh._replace(params=params, opt_state=self._first_states(params))

        return jax.jit(begin, out_shardings=self.shardings(), donate_argnums=0)(params, balance)


def optimizer_shardings(opt_state: optax.OptState, specs: dict[str, Any], layout: Layout) -> Any:
    """Where each array of the optimizer's states lives: those of a parameter as finely shared out as it can be. Scales
    of blocks lie as the blocks do, and what is one long along an axis is whole along it. On a mesh.

    Raises:
        LayoutError: a parameter does not divide over the mesh, or a block would be split.
    """

    def of_parameter(spec: ParameterSpec, kept: Any) -> Any:
        def where(x: Any) -> Any:
            axes = "".join(letter if size > 1 else "_" for letter, size in zip(spec.axes, x.shape, strict=True))
            return layout.optimizer_state(spec.axes if x.shape == spec.shape else axes, x.shape)

        return jax.tree.map(where, kept)

    def of(x: Any) -> Any:
        return jax.tree.map(of_parameter, specs, x, is_leaf=is_spec) if isinstance(x, dict) else layout.whole()

    return jax.tree.map(of, opt_state, is_leaf=lambda x: isinstance(x, dict))


def make_blueprint(
    config: ModelConfig,
    precision: Precision,
    execution: Execution,
    optimizer: OptimizerConfig,
    layout: Layout,
    *,
    steps: int,
    lora: LoraConfig | None = None,
) -> Blueprint:
    """Plans a run of `steps` steps. Makes no array.

    Raises:
        ConfigError: settings that do not work together.
    """
    check_optimizer(optimizer, precision, layout.config)
    check_frozen(precision, lora, layout.stages)
    check_gathered(precision, layout.config)
    model = nnx.eval_shape(lambda: fresh_model(config, precision, execution, lora, jax.random.key(0)))
    specs, frozen_specs = specs_of(model, trained(lora)), specs_of(model, frozen(lora))
    transformation, learning_rate = make_optimizer(optimizer, specs, steps, layout, precision.compute_dtype)
    return Blueprint(
        config,
        precision,
        execution,
        layout,
        nnx.graphdef(model),
        specs,
        frozen_specs,
        lora,
        transformation,
        learning_rate,
    )


def fresh_model(
    config: ModelConfig, precision: Precision, execution: Execution, lora: LoraConfig | None, key: jax.Array
) -> Transformer:
    """A model of first values, with adapters where asked."""
    model = Transformer(config, precision, execution, rngs=nnx.Rngs(params=key))
    if lora is not None:
        model.adapt(lora, rngs=nnx.Rngs(params=jax.random.fold_in(key, int(Purpose.ADAPTERS))))
    return model
