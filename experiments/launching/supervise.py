"""Watches over processes of this machine: collects what they say, hands signals on, and ends all when one dies."""

import os
import selectors
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import IO, NamedTuple

from parallel.distributed import ARRIVAL_SECONDS, LOST, STOPPED

GRACE_SECONDS = 5.0
"""From the death of one process, noticed within `_POLL_SECONDS`, to the end of all."""
_POLL_SECONDS = 0.1
_NOISE = ("[Gloo]", "connected peer ranks")
"""Of lines that the runtime writes, worth keeping and not worth showing."""
_TOLD_LINES = 12
_NEVER_MET = (
    f"did not meet the others within {ARRIVAL_SECONDS} s: see that all were started, that process 0 runs where "
    "they look for it, that its machine's name leads there, and that the port is free and open"
)


@dataclass(frozen=True)
class Member:
    """One process to start: its number in the run, its command, and its whole environment."""

    index: int
    command: Sequence[str]
    environment: Mapping[str, str]


class Ended(NamedTuple):
    """
    code: 0 all done; 143 or 130 all stopped by a signal after saving; else that of the first that failed, where one
        that was killed counts as 1, and one that the runtime aborted as `LOST`.
    culprit: the number of the first that failed, or None.
    how: what became of it, as the rest of a sentence: "was killed by SIGKILL".
    told: the last lines that it wrote to stderr, where it ended by itself.
    seconds: from noticing to the end of all.
    killed_by: the signal that killed it, or 0.
    signal: the last one that was handed on to all, or 0.
    """

    code: int
    culprit: int | None = None
    how: str = ""
    told: str = ""
    seconds: float = 0.0
    killed_by: int = 0
    signal: int = 0


def supervise(members: Sequence[Member], logs: Path, show: Callable[[str], None]) -> Ended:
    """Starts the processes and returns when all have ended.

    What each writes goes to `logs`/process-<index>.log, and line by line to `show`, with the number before it; stderr
    goes to the log alone. SIGTERM and SIGINT are handed on to all. The processes have sessions of their own, so that a
    terminal's Ctrl-C reaches them once, through here. When one fails, the others get `GRACE_SECONDS` to end by
    themselves, since they may be failing of the same, and are then killed.

    Raises:
        OSError: a process cannot be started, or a log cannot be written.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with selectors.DefaultSelector() as selector, _Forwarding() as forwarding:
        processes = []
        try:
            for member in members:
                processes.append(_Process(member, logs, selector, show))
                forwarding.to(processes[-1].popen)
            ended = _watch(processes, selector)
            # Before a run listens for signals, they end it at once.
            if forwarding.received and ended.killed_by == forwarding.received:
                return Ended(128 + forwarding.received, signal=forwarding.received)
            return ended._replace(signal=forwarding.received)
        finally:
            for process in processes:
                process.kill()
                process.close()


def _watch(processes: "list[_Process]", selector: selectors.BaseSelector) -> Ended:
    culprit, noticed = None, 0.0
    while any(process.popen.poll() is None for process in processes):
        _read(selector, _POLL_SECONDS)
        if culprit is None:
            culprit, noticed = _first_failed(processes), time.monotonic()
        elif time.monotonic() - noticed > GRACE_SECONDS:
            for process in processes:
                process.kill()
    while _read(selector, 0):
        pass
    culprit = culprit or _first_failed(processes)
    if culprit is None:
        return Ended(max(process.popen.returncode for process in processes))
    code = culprit.popen.returncode
    seconds = time.monotonic() - noticed if noticed else 0.0
    told = "" if code < 0 else "\n".join(culprit.told).strip()
    passed_on = code if code > 0 else LOST if code == -signal.SIGABRT else 1
    how = _NEVER_MET if culprit.never_met else _how(code)
    return Ended(passed_on, culprit.member.index, how, told, seconds, killed_by=max(-code, 0))


def _read(selector: selectors.BaseSelector, seconds: float) -> bool:
    """Takes in what the processes wrote; whether there was anything."""
    if not selector.get_map():
        time.sleep(seconds)
        return False
    ready = selector.select(seconds)
    for key, _ in ready:
        key.data()
    return bool(ready)


def _first_failed(processes: "list[_Process]") -> "_Process | None":
    """Of those that failed one that did so by itself, where there is one, and not for the loss of another."""
    failed = [process for process in processes if process.popen.poll() not in (None, *STOPPED)]
    by_itself = [process for process in failed if process.popen.returncode not in (LOST, -signal.SIGABRT)]
    return next(iter(by_itself + failed), None)


def _how(code: int) -> str:
    if code == -signal.SIGABRT:
        return "was aborted by the runtime (SIGABRT), which happens when it has lost contact with another process"
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    if code == LOST:
        return "lost contact with another process"
    return f"failed with exit code {code}"


class _Process:
    """One process, and what it writes."""

    def __init__(
        self, member: Member, logs: Path, selector: selectors.BaseSelector, show: Callable[[str], None]
    ) -> None:
        self.member = member
        self.told: deque[str] = deque(maxlen=_TOLD_LINES)
        self.never_met = False
        self._show = show
        self._log = open(logs / f"process-{member.index}.log", "a", encoding="utf-8")  # noqa: SIM115 - see close
        self.popen = subprocess.Popen(
            member.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**member.environment, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        self._write(f"--- {datetime.now(UTC).isoformat(timespec='seconds')} process {self.popen.pid} ---")
        _Lines(self.popen.stdout, selector, self._say)
        _Lines(self.popen.stderr, selector, self._complain)

    def kill(self) -> None:
        """The process and whatever it started."""
        if self.popen.poll() is None:
            os.killpg(self.popen.pid, signal.SIGKILL)

    def close(self) -> None:
        self.popen.wait()
        self._log.close()

    def _say(self, line: str) -> None:
        self._write(line)
        # Process 0 sets its words apart with empty lines; the runtime writes some anywhere.
        if not any(noise in line for noise in _NOISE) and (line or self.member.index == 0):
            self._show(f"[{self.member.index}] {line}")

    def _complain(self, line: str) -> None:
        self._write(line)
        self.told.append(line)
        # The call in which the runtime aborts a process that waits for the others in vain.
        self.never_met = self.never_met or "RegisterTask" in line

    def _write(self, line: str) -> None:
        self._log.write(line + "\n")
        self._log.flush()


class _Lines:
    """Reads a pipe line by line, whenever the selector finds something in it, and closes it at its end."""

    def __init__(self, pipe: IO[bytes] | None, selector: selectors.BaseSelector, take: Callable[[str], None]) -> None:
        assert pipe is not None
        self._pipe, self._selector, self._take = pipe, selector, take
        self._rest = b""
        selector.register(pipe, selectors.EVENT_READ, self)

    def __call__(self) -> None:
        found = os.read(self._pipe.fileno(), 1 << 16)
        *lines, self._rest = (self._rest + found).split(b"\n")
        if not found:
            lines += [self._rest] if self._rest else []
            self._selector.unregister(self._pipe)
            self._pipe.close()
        for line in lines:
            self._take(line.decode("utf-8", "replace"))


class _Forwarding:
    """Hands SIGTERM and SIGINT on to processes, those included that start after the signal came."""

    def __init__(self) -> None:
        self.received = 0
        self._targets: list[subprocess.Popen] = []

    def to(self, target: subprocess.Popen) -> None:
        self._targets.append(target)
        if self.received:
            target.send_signal(self.received)

    def __enter__(self) -> "_Forwarding":
        self._before = {s: signal.signal(s, self._hand_on) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for target in self._targets:
            target.send_signal(number)
