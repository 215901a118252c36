"""How the driver and the processes that take part talk: JSON, a line at a time.

A process says `{"about": …}` once it is ready. Each line that it is given is a turn, to be taken now, and answered with
a `Turn`. The end of its standard input ends it. What it fails at it tells as `{"failed": …}`.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

About = dict[str, Any]
Take = Callable[[], tuple[dict[str, float], float | None]]
"""Takes a turn: seconds by part, and the loss where there is one."""


class WorkerError(RuntimeError):
    """A process that did not do its part: says which, and what it said last.

    worker: its name.
    """

    def __init__(self, worker: str, reason: str) -> None:
        super().__init__(f"{worker}: {reason}")
        self.worker = worker


@dataclass(frozen=True)
class Turn:
    """
    seconds: by part of the job.
    loss: nats a token, in training.
    peak: bytes, the largest that the process has taken so far: of its GPU's memory, or else its resident set, which is
        at least that of the driver, which started it.
    waited: seconds since its last turn. idle: seconds of CPU time that the process took in these.
    """

    seconds: dict[str, float]
    loss: float | None
    peak: int
    waited: float
    idle: float


def resident() -> int:
    """Bytes of the process's largest resident set."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def serve(begin: Callable[[], tuple[About, Take]], peak: Callable[[], int] = resident) -> None:
    """Takes part: makes ready with `begin`, then takes turns until the input ends.

    Args:
        peak: the most bytes that were taken so far.
    """
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    # What libraries print must not stand among the replies.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def reply(message: Mapping[str, Any]) -> None:
        print(json.dumps(message), file=replies, flush=True)

    try:
        about, take = begin()
        reply({"about": about})
        since = time.perf_counter(), time.process_time()
        for _ in sys.stdin:
            waited, used = time.perf_counter() - since[0], time.process_time() - since[1]
            seconds, loss = take()
            reply(asdict(Turn(seconds, loss, peak(), waited, used)))
            since = time.perf_counter(), time.process_time()
    except Exception as error:
        traceback.print_exc()
        reply({"failed": f"{type(error).__name__}: {error}".strip().splitlines()[0]})
        sys.exit(1)


class Worker:
    """The driver's end of a process that takes part; a context manager that ends it.

    about: what it says of itself.
    """

    def __init__(self, name: str, command: Sequence[str], *, folder: Path, limit: float) -> None:
        """
        Args:
            folder: where it runs.
            limit: seconds that making ready, or a turn, may take.

        Raises:
            WorkerError: it did not get ready.
        """
        self.name, self._limit = name, limit
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=folder, stdin=pipe, stdout=pipe, stderr=self._log, text=True)
        try:
            self.about: About = self._reply()["about"]
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def turn(self) -> Turn:
        """
        Raises:
            WorkerError: it failed, or took too long.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # It ended, and its reply, or there being none, tells of it.
        return Turn(**self._reply())

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        late = threading.Event()

        def kill() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(self._limit, kill)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if late.is_set():
            raise WorkerError(self.name, f"took longer than {self._limit:,.0f} s")
        if not line:
            code = self._process.wait()
            raise WorkerError(self.name, f"ended with status {code}; {self._last_words()}")
        message = json.loads(line)
        if "failed" in message:
            raise WorkerError(self.name, message["failed"])
        return message

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            if pipe is not None:
                pipe.close()
