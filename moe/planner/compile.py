"""Compiles a job for a described chip: in a process of its own, kept by fingerprint.

python -m moe.planner.compile FOLDER      # what that process does: request.json → program, buffers, facts
"""

import dataclasses
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe.planner.backends import backends
from moe.planner.chips import Chip
from moe.planner.job import Job, job_from_json, rebuilt
from moe.planner.target import SETUP, TargetError, can_compile
from parallel.network.cluster import Cluster
from parallel.network.environment import xla_flags

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(".cache/plan")
SOURCES = (
    "parallel", "moe/ops", "moe/model", "moe/train", "moe/serve", "moe/planner/lower.py", "moe/planner/backends.py",
    "moe/planner/compile.py",
)  # fmt: skip
"""What decides on the program and on what is kept of it; a change there compiles anew."""


class CompileError(RuntimeError):
    """XLA refused the program: its own words."""


@dataclass(frozen=True)
class Facts:
    """What XLA says of a program, bytes of one GPU.

    arguments, outputs, aliased, temporaries: of the GPU's memory; `aliased` of the arguments are outputs as well.
    peak: the largest sum of buffers that live at once.
    host: of the host's memory, arguments and temporaries.
    seconds: of lowering and compiling. resident: peak memory of the process that compiled, bytes.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    peak: int
    host: int
    seconds: float
    resident: int
    jax: str

    @property
    def allocated(self) -> int:
        """Bytes that a GPU must have: XLA lays all temporaries into one block of this size."""
        return self.arguments + self.outputs - self.aliased + self.temporaries


@dataclass(frozen=True)
class Compiled:
    """A compiled program in its folder."""

    folder: Path
    facts: Facts

    def program(self) -> str:
        """The optimized and scheduled HLO."""
        return _unpacked(self.folder / "program.hlo.gz")

    def buffers(self) -> str:
        """XLA's buffer assignment: every allocation with the values in it."""
        return _unpacked(self.folder / "buffers.txt.gz")

    def lifetimes(self) -> str:
        """XLA's live ranges: the flattened schedule, and for each value where in it the value begins and ends."""
        return _unpacked(self.folder / "lifetimes.txt.gz")


def compile_job(
    job: Job,
    chip: Chip,
    cluster: Cluster,
    *,
    cache: Path = CACHE,
    report: Callable[[str], None] = lambda text: None,
) -> Compiled:
    """Compiles, or finds what was compiled before. The flags are those of `python -m parallel.network env`.

    Raises:
        TargetError: neither this environment nor .venv-plan has the CUDA plugin.
        CompileError: XLA, or our own checks, refuse the program.
    """
    if job.kind == "train" and job.precision.matmuls == "fp8" and not chip.fp8:
        raise CompileError(f"precision.matmuls='fp8' on {chip.device}, which has no fp8: take 'int8', or none")
    flags = [f"--{flag.name}={flag.value}" for flag in xla_flags(cluster)]
    request = json.dumps(
        {
            "job": job.to_json(),
            "chip": dataclasses.asdict(chip),
            "devices_per_node": cluster.gpus_per_node,
            "flags": flags,
        }
    )
    folder = cache / hashlib.sha256((request + _digest_of_sources()).encode()).hexdigest()[:32]
    if not (folder / "facts.json").exists():
        python = compiler()
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
            work = Path(unfinished) / "work"
            work.mkdir()
            (work / "request.json").write_text(request, "utf-8")
            report(f"compiling for {cluster.nodes * cluster.gpus_per_node} x {chip.device}")
            flags += [f"--xla_dump_to={work.resolve() / 'dump'}", "--xla_dump_hlo_as_text"]
            environment = os.environ | {
                "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": " ".join(flags),
            }
            done = subprocess.run(
                [python, "-m", "moe.planner.compile", str(work.resolve())],
                cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                raise CompileError(_last_words(done))
            shutil.rmtree(folder, ignore_errors=True)
            work.rename(folder)
    return Compiled(folder, Facts(**json.loads((folder / "facts.json").read_text("utf-8"))))


def compiler() -> str:
    """The Python that can compile for GPUs: this one, or that of .venv-plan.

    Raises:
        TargetError: there is none.
    """
    if can_compile():
        return sys.executable
    beside = ROOT / ".venv-plan" / "bin" / "python"
    if (ROOT / ".venv-plan" / "installed").exists():
        return str(beside)
    raise TargetError(f"compiling for a GPU needs an environment of its own, about 5 GB: `{SETUP}` installs it")


def _digest_of_sources() -> str:
    digest = hashlib.sha256()
    for place in SOURCES:
        path = ROOT / place
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _pack(file: Path, text: str) -> None:
    with gzip.open(file, "wt", encoding="utf-8") as stream:
        stream.write(text)


def _unpacked(file: Path) -> str:
    with gzip.open(file, "rt", encoding="utf-8") as stream:
        return stream.read()


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    """The last exception's line; XLA writes a stack behind it."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    lines = [line for line in lines if re.match(r"[\w.]+(Error|Exception): ", line)] or lines
    return lines[-1] if lines else f"the compiler's process ended with exit code {done.returncode}"


def _work(folder: Path) -> None:
    """In the compiling process: from request.json to the files of `Compiled`."""
    import resource

    import jax

    from moe.planner.lower import lower
    from moe.planner.target import described_mesh

    request = json.loads((folder / "request.json").read_text("utf-8"))
    job = job_from_json(request["job"])
    chip: Chip = rebuilt(Chip, request["chip"])
    start = time.monotonic()
    mesh = described_mesh(chip, job.mesh, request["devices_per_node"])
    dump = folder / "dump"
    compiled = lower(replace(job, execution=backends(chip, job.execution)), mesh).compile()
    seconds = time.monotonic() - start
    memory: Any = compiled.memory_analysis()
    facts = Facts(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        host=memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
        seconds=seconds,
        resident=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        jax=jax.__version__,
    )
    _pack(folder / "program.hlo.gz", compiled.as_text() or "")
    for name, dumped in (("buffers", "buffer-assignment"), ("lifetimes", "live-range")):
        (file,) = dump.glob(f"*_gpu_after_optimizations-{dumped}.txt")
        _pack(folder / f"{name}.txt.gz", file.read_text("utf-8"))
    shutil.rmtree(dump)
    (folder / "facts.json").write_text(json.dumps(dataclasses.asdict(facts)), "utf-8")


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
