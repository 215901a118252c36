"""Tokens as they come, into text that may be shown at once: never half a character, never half a stop text."""

from collections.abc import Sequence

from moe.serve.vocabulary import Vocabulary

_REPLACEMENT = "\ufffd"
_CONTEXT = 16
"""Tokens decoded again before a new one: a character may need the bytes of several."""


class TextStream:
    """One answer's text.

    Attributes:
        stopped: whether a stop text has come; nothing more is to be shown then.
    """

    def __init__(self, vocabulary: Vocabulary, stop: Sequence[str] = ()) -> None:
        self._vocabulary, self._stop = vocabulary, tuple(stop)
        self._tokens: list[int] = []
        self._settled = 0
        """Tokens whose text has gone into `_held` or out."""
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that may be shown after one token more; often empty for a while."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        before, now = self._decoded(self._settled), self._decoded(len(self._tokens))
        if now.endswith(_REPLACEMENT) and len(self._tokens) - self._settled < _CONTEXT:
            return ""
        self._held += now[len(before) :]
        self._settled = len(self._tokens)
        return self._release()

    def finish(self) -> str:
        """What was held back, when no token follows."""
        if self.stopped:
            return ""
        before, now = self._decoded(self._settled), self._decoded(len(self._tokens))
        self._held += now[len(before) :]
        self._settled = len(self._tokens)
        shown = self._release()
        if not self.stopped:
            shown, self._held = shown + self._held, ""
        return shown

    def _decoded(self, end: int) -> str:
        start = max(0, self._settled - _CONTEXT)
        return self._vocabulary.decode(self._tokens[start:end])

    def _release(self) -> str:
        found = [place for place in (self._held.find(text) for text in self._stop) if place >= 0]
        if found:
            shown, self._held, self.stopped = self._held[: min(found)], "", True
            return shown
        # The end of the text may be the beginning of a stop text.
        keep = max((_overlap(self._held, text) for text in self._stop), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
