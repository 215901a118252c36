"""The fewest GPUs of a kind on which an experiment fits, and its fastest layout there, by estimates."""

from rich.console import Console

from experiments.experiment import Experiment
from experiments.plan import job_of
from moe.planner.chips import Chip
from moe.planner.rank import Option
from moe.planner.search import candidates, look
from parallel.network.cluster import Cluster

GPUS = (512, 1024, 2048)
WORTH = {"mesh.stage": (1,), "mesh.sequence": (1,), "mesh.expert": (8, 16), "mesh.tensor": (1, 2, 4, 8)}
"""What is looked through: the layouts that a whole search finds at the front, and no others, for it to take seconds."""


def layout_for(experiment: Experiment, chip: Chip, told: Console) -> Option | None:
    """The fastest that fits on the fewest GPUs, by estimates; None where none does."""
    for gpus in GPUS:
        cluster = Cluster(nodes=gpus // 8, gpu_link=chip.link)
        found = [
            settings
            for settings in candidates(job_of(experiment, "train"), cluster)
            if all(settings[path] in values for path, values in WORTH.items())
        ]
        told.print(f"{chip.name}: estimating {len(found)} layouts on {gpus} GPUs")
        seen = look(found, lambda changes: job_of(experiment.vary(changes), "train"), chip, cluster)
        if seen.options and seen.options[0].plan.fits:
            return seen.options[0]
    return None
