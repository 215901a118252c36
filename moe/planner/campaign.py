"""A whole training run by the plan of one of its steps: GPU-days, days, energy."""

from dataclasses import dataclass

from moe.planner.plan import Plan

SECONDS_A_DAY = 86_400.0


@dataclass(frozen=True)
class Campaign:
    """tokens: to be trained on, 1 each."""

    plan: Plan
    tokens: float

    @property
    def steps(self) -> float:
        return self.tokens / self.plan.job.tokens

    @property
    def days(self) -> float:
        """On the plan's own number of GPUs, without failures and evaluations."""
        return self.steps * self.plan.prediction.seconds / SECONDS_A_DAY

    @property
    def days_range(self) -> tuple[float, float]:
        """By the prediction's uncertainty."""
        prediction = self.plan.prediction
        return self.days * prediction.low / prediction.seconds, self.days * prediction.high / prediction.seconds

    @property
    def gpu_days(self) -> float:
        return self.days * self.plan.devices

    @property
    def megawatt_hours(self) -> float:
        """Of the boards alone at their full power, which is an upper bound for them; hosts, network and cooling come on
        top."""
        return self.gpu_days * 24 * self.plan.chip.watts / 1e6

    def gpus_for(self, days: float) -> int:
        """To be done in so many days, in whole nodes, if more nodes were worth as much as these: as copies of the model
        that take their share of a larger batch."""
        per_node = self.plan.cluster.gpus_per_node
        return -(-int(-(-self.gpu_days // days)) // per_node) * per_node
