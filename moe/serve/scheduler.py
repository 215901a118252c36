"""Continuous batching: requests come and go while the engine steps; a slot that ends is filled at once."""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from moe.serve.engine import Engine
from moe.serve.sampling import Sampling
from moe.serve.text_stream import TextStream
from moe.serve.vocabulary import Vocabulary


class BusyError(RuntimeError):
    """More requests wait than the queue holds."""


class StoppedError(RuntimeError):
    """The engine failed, or was closed: nothing is computed any more."""


class Event(NamedTuple):
    """
    text: that may be shown now.
    tokens: generated so far.
    finish: "stop" or "length" in the last event, "error" where the engine failed; None before.
    """

    text: str
    tokens: int
    finish: str | None


@dataclass
class Request:
    """One text that is being continued. `deliver` is called from the scheduler's thread."""

    prompt: list[int]
    sampling: Sampling
    deliver: Callable[[Event], None]
    stream: TextStream
    tokens: int = 0
    cancelled: threading.Event = field(default_factory=threading.Event)


class Scheduler:
    """One thread that owns the engine. Requests are prefilled one by one, so that each has the shapes it has alone."""

    def __init__(self, engine: Engine, vocabulary: Vocabulary, *, queue_limit: int) -> None:
        self.engine, self.vocabulary, self.queue_limit = engine, vocabulary, queue_limit
        self._waiting: deque[Request] = deque()
        self._running: dict[int, Request] = {}
        self._change = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> tuple[int, int]:
        """Slots in use, and requests that wait for one."""
        with self._change:
            return len(self._running), len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether requests are still answered."""
        with self._change:
            return not self._closed

    def submit(self, prompt: list[int], sampling: Sampling, deliver: Callable[[Event], None]) -> Request:
        """Queues a request.

        Raises:
            ContextError: it does not fit.
            BusyError: the queue is full.
            StoppedError: nobody would answer.
        """
        self.engine.check(prompt, sampling)
        request = Request(prompt, sampling, deliver, TextStream(self.vocabulary, sampling.stop))
        with self._change:
            if self._closed:
                raise StoppedError("the engine stopped; see the server's log")
            if len(self._waiting) >= self.queue_limit:
                raise BusyError(f"{len(self._waiting)} requests are waiting already; try again later")
            self._waiting.append(request)
            self._change.notify()
        return request

    def cancel(self, request: Request) -> None:
        """Nobody reads the answer any more: its slot is freed before the next step. After the end it does nothing."""
        request.cancelled.set()
        with self._change:
            self._change.notify()

    def close(self) -> None:
        """Ends the thread after its step; unfinished requests get an "error" event."""
        with self._change:
            self._closed = True
            self._change.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._wait():
                self._drop_cancelled()
                self._admit()
                for slot, token in self.engine.step():
                    self._advance(slot, token)
        finally:
            with self._change:
                self._closed = True
                unfinished = [*self._running.values(), *self._waiting]
            for request in unfinished:
                request.deliver(Event("", request.tokens, "error"))

    def _wait(self) -> bool:
        """Until there is work; False when closed."""
        with self._change:
            self._change.wait_for(lambda: self._closed or self._waiting or self._running)
            return not self._closed

    def _drop_cancelled(self) -> None:
        with self._change:
            self._waiting = deque(request for request in self._waiting if not request.cancelled.is_set())
            for slot in [slot for slot, request in self._running.items() if request.cancelled.is_set()]:
                self._free(slot)

    def _admit(self) -> None:
        while self.engine.free:
            with self._change:
                if not self._waiting:
                    return
                request = self._waiting.popleft()
            ((slot, token),) = self.engine.admit([(request.prompt, request.sampling)])
            with self._change:
                self._running[slot] = request
            self._advance(slot, token)

    def _advance(self, slot: int, token: int) -> None:
        """Hands one new token's text over, and frees the slot at the end."""
        request = self._running[slot]
        if token in self.vocabulary.eos:
            self._end(slot, request.stream.finish(), "stop")
            return
        request.tokens += 1
        text = request.stream.push(token)
        if request.stream.stopped:
            self._end(slot, text, "stop")
        elif request.tokens == request.sampling.max_tokens:
            text += request.stream.finish()
            self._end(slot, text, "stop" if request.stream.stopped else "length")
        elif text:
            request.deliver(Event(text, request.tokens, None))

    def _end(self, slot: int, text: str, finish: str) -> None:
        with self._change:
            request = self._free(slot)
        request.deliver(Event(text, request.tokens, finish))

    def _free(self, slot: int) -> Request:
        self.engine.release(slot)
        return self._running.pop(slot)
