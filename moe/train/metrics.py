"""What a run tells of itself, step by step: one JSON line a step, and the same for TensorBoard."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

from moe.train.run_folder import RunFolder, write_atomically
from moe.train.step import StepMetrics

Record = dict[str, Any]
"""One line: "step" (steps taken, from 1) and either "validation_loss" or the fields of `record_of`."""


def record_of(
    step: int, metrics: StepMetrics, seconds: float, flops_per_token: float, peak_flops: float | None
) -> Record:
    """A step's metrics as plain numbers.

    Args:
        step: steps taken, this one included.
        metrics: fetched from the devices.
        seconds: that the step took.
        flops_per_token: model FLOPs of one token's forward and backward pass.
        peak_flops: of all devices together, per second; None where no peak is stated, and then "mfu" is left out.

    Returns:
        loss (nats), aux_loss, z_loss, grad_norm, learning_rate, tokens, tokens_per_second, mfu, and with experts
        "layers": load (share per expert), dropped, recycled, entropy (nats), wire_bytes and, of these, across_bytes,
        each a list by MoE layer.
    """
    record: Record = {"step": step}
    for name in ("loss", "aux_loss", "z_loss", "grad_norm", "learning_rate"):
        record[name] = float(getattr(metrics, name))
    record["tokens"] = int(metrics.tokens)
    record["tokens_per_second"] = record["tokens"] / seconds
    if peak_flops is not None:
        record["mfu"] = record["tokens_per_second"] * flops_per_token / peak_flops
    if metrics.layers is not None:
        record["layers"] = {
            name.rpartition("_")[0]: np.asarray(value, np.float64).round(6).tolist()
            for name, value in metrics.layers._asdict().items()
        }
    return record


class MetricsWriter:
    """Appends records to metrics.jsonl and TensorBoard; what an earlier start wrote beyond `first_step` is cut off.

    After a kill a run repeats the steps since its last checkpoint, so each step stands in the file exactly once.
    """

    def __init__(self, folder: RunFolder, first_step: int) -> None:
        kept = [record for record in read_metrics(folder.metrics) if record["step"] <= first_step]
        write_atomically(folder.metrics, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = open(folder.metrics, "a", encoding="utf-8")  # noqa: SIM115 - closed by `close`
        self._tensorboard = SummaryWriter(str(folder.tensorboard), purge_step=first_step + 1)

    def write(self, record: Record) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        step = record["step"]
        for name, value in record.items():
            if name == "layers":
                self._write_layers(step, value)
            elif name != "step":
                self._tensorboard.add_scalar(name, value, step)

    def _write_layers(self, step: int, layers: dict[str, list]) -> None:
        for name, by_layer in layers.items():
            for layer, value in enumerate(by_layer):
                if name == "load":
                    for expert, share in enumerate(value):
                        self._tensorboard.add_scalar(f"load/layer {layer}/expert {expert}", share, step)
                else:
                    self._tensorboard.add_scalar(f"{name}/layer {layer}", value, step)

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()


def read_metrics(path: Path) -> list[Record]:
    """The records of a metrics.jsonl; a last line that was cut short is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text("utf-8", errors="replace").splitlines(keepends=True):
        if line.endswith("\n"):
            records.append(json.loads(line))
    return records
