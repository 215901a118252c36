"""Learning rate over the steps of a run."""

from collections.abc import Callable
from typing import Literal

import jax
import optax

Schedule = Literal["constant", "linear", "cosine", "hunyuan"]
ANNEALED_SHARE = 0.05
ANNEALED_TO = 0.1


def make_schedule(
    kind: Schedule, peak: float, steps: int, warmup_steps: int, final_share: float
) -> Callable[[jax.Array], jax.Array]:
    """The rate of step 0 … steps-1.

    All kinds rise linearly to `peak` over `warmup_steps`. Then "constant" stays; "linear" and "cosine" fall to
    final_share · peak at the end; "hunyuan" falls along a cosine to final_share · peak over a long phase and then, in
    the last 5% of the steps, linearly to a tenth of the peak (arXiv 2411.02265 §2.2.3, which gives the three phases
    and the last value; the shape of the long phase and its end are our choice).
    """
    warmup = optax.linear_schedule(peak / max(warmup_steps, 1), peak, max(warmup_steps - 1, 0))
    rest = steps - warmup_steps
    if kind == "constant":
        return optax.join_schedules([warmup, optax.constant_schedule(peak)], [warmup_steps])
    if kind == "linear":
        fall = optax.linear_schedule(peak, final_share * peak, rest)
        return optax.join_schedules([warmup, fall], [warmup_steps])
    if kind == "cosine":
        fall = optax.cosine_decay_schedule(peak, rest, alpha=final_share)
        return optax.join_schedules([warmup, fall], [warmup_steps])
    annealing = max(1, round(ANNEALED_SHARE * steps))
    fall = optax.cosine_decay_schedule(peak, max(1, rest - annealing), alpha=final_share)
    last = optax.linear_schedule(final_share * peak, ANNEALED_TO * peak, annealing)
    return optax.join_schedules([warmup, fall, last], [warmup_steps, steps - annealing])
