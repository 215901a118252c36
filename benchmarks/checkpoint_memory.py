"""Peak memory of importing and exporting a checkpoint made on the spot: python -m benchmarks.checkpoint_memory

The largest tensor is what must be held; the rest of a checkpoint may be of any size.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from moe.model.hf.checkpoint import hf_tensors
from moe.model.hf.config import hunyuan_settings, model_config
from moe.model.presets import HUNYUAN_LARGE
from moe.model.tensor_files import NewTensor, write_tensors

SHARD_BYTES = 1_000_000_000


class Memory(NamedTuple):
    """All in bytes. idle: peak of a process that imports nothing; the others are peaks of whole processes."""

    checkpoint: int
    largest: int
    idle: int
    imported: int
    exported: int

    def ratio(self, peak: int) -> float:
        """What the work itself took, in units of the largest tensor."""
        return (peak - self.idle) / self.largest


def write_checkpoint(folder: Path, gigabytes: float) -> tuple[int, int]:
    """Hunyuan-Large at half its width and with fewer experts, in as many layers as make up the size, in bfloat16.

    Returns:
        bytes of all tensors and of the largest one.
    """
    sizes = {"hidden_size": 3200, "intermediate_size": 4576, "num_experts": 4, "num_attention_heads": 40}
    settings = hunyuan_settings(HUNYUAN_LARGE, "bfloat16") | sizes
    found: list[NewTensor] = []
    while sum(tensor.nbytes for tensor in found) < gigabytes * 1e9:
        settings["num_hidden_layers"] = settings["num_hidden_layers"] + 2 if found else 2
        family, config = model_config(settings)
        found = [
            NewTensor(tensor.name, np.dtype(ml_dtypes.bfloat16), tensor.shape) for tensor in hf_tensors(config, family)
        ]

    def contents() -> Iterator[np.ndarray]:
        rng = np.random.default_rng(0)
        for tensor in found:
            for row in range(0, tensor.shape[0], 4096):
                rows = (min(4096, tensor.shape[0] - row), *tensor.shape[1:])
                # Any 16 bits but those of NaN and infinity.
                yield (rng.integers(0, 0x7F00, rows, np.uint16)).view(ml_dtypes.bfloat16)

    folder.mkdir()
    write_tensors(folder, found, contents(), shard_bytes=SHARD_BYTES)
    (folder / "config.json").write_text(json.dumps(settings))
    return sum(tensor.nbytes for tensor in found), max(tensor.nbytes for tensor in found)


def measure(folder: Path, gigabytes: float) -> Memory:
    """Writes `folder`/hf, imports it to `folder`/ours, exports that to `folder`/again."""
    total, largest = write_checkpoint(folder / "hf", gigabytes)
    idle = peak_of("--help")
    imported = peak_of("import", str(folder / "hf"), str(folder / "ours"))
    exported = peak_of("export", str(folder / "ours"), str(folder / "again"))
    return Memory(total, largest, idle, imported, exported)


def peak_of(*arguments: str) -> int:
    """Peak resident memory of `python -m moe.model.hf` with `arguments`, bytes."""
    # A child's own child reports its peak alone; this process's children would report the largest of all so far.
    report = (
        "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode; "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024); sys.exit(code)"
    )
    command = [sys.executable, "-c", report, sys.executable, "-m", "moe.model.hf", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed: {done.stderr}")
    return int(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint_memory", description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=6.0, help="size of the checkpoint (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        memory = measure(Path(folder), options.gigabytes)
    print(f"checkpoint {memory.checkpoint / 1e9:.2f} GB, largest tensor {memory.largest / 1e9:.2f} GB")
    for name, peak in (("idle process", memory.idle), ("import", memory.imported), ("export", memory.exported)):
        print(f"{name:13} peak {peak / 1e9:.2f} GB, {memory.ratio(peak):.2f} x the largest tensor above the idle one")


if __name__ == "__main__":
    main()
