"""Requests and answers of the OpenAI API, as JSON: what is asked, checked, and what is told.

Reference: the API's published description of /v1/completions and /v1/chat/completions.
"""

import json
import secrets
import time
from dataclasses import dataclass
from typing import Any

from moe.serve.chat import chat_tokens
from moe.serve.sampling import Sampling
from moe.serve.vocabulary import Vocabulary

WITHOUT_EFFECT = frozenset({"model", "user", "metadata", "store", "stream_options", "safety_identifier"})
ONLY = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Fields that would change the answer, and the values with which they do not."""
READ = frozenset(
    {
        *("prompt", "messages", "stream", "stop", "seed"),
        *("max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k"),
    }
)
DEFAULT_TOKENS = 128


class ApiError(Exception):
    """A request that is answered with an error. status: of HTTP; param: the field at fault."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": None}}


@dataclass(frozen=True)
class Asked:
    """A request that was understood: prompts as token ids, how to sample, and how to answer."""

    chat: bool
    prompts: list[list[int]]
    sampling: Sampling
    stream: bool
    include_usage: bool


def understand(body: bytes, vocabulary: Vocabulary, *, chat: bool) -> Asked:
    """
    Raises:
        ApiError: 400, naming the field.
        ChatError, SamplingError, ConfigError: the same, for the server to name.
    """
    try:
        fields = json.loads(body)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "the body is no JSON object")
    fields = {name: value for name, value in fields.items() if value is not None}
    for name, value in fields.items():
        if name in ONLY and value not in ONLY[name]:
            raise ApiError(400, f"{name}={value!r} is not implemented here; leave it out", name)
        if name not in ONLY and name not in READ and name not in WITHOUT_EFFECT:
            raise ApiError(400, f"{name} is not known here; leave it out", name)
    stream = fields.get("stream", False)
    options = fields.get("stream_options", {})
    if not isinstance(stream, bool) or not isinstance(options, dict):
        raise ApiError(400, "stream is true or false, and stream_options an object", "stream")
    prompts = _conversation(fields, vocabulary) if chat else _prompts(fields, vocabulary)
    return Asked(chat, prompts, _sampling(fields), stream, options.get("include_usage") is True)


def _conversation(fields: dict[str, Any], vocabulary: Vocabulary) -> list[list[int]]:
    messages = fields.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ApiError(400, 'messages: give a list of {"role": …, "content": …}', "messages")
    return [chat_tokens([_plain(message) for message in messages], vocabulary)]


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose content came in parts, as one text."""
    content = message.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise ApiError(400, "messages: only content of type text is understood", "messages")
        content = "".join(str(part.get("text", "")) for part in content)
    return {"role": message.get("role"), "content": content}


def _prompts(fields: dict[str, Any], vocabulary: Vocabulary) -> list[list[int]]:
    prompt = fields.get("prompt")
    if isinstance(prompt, str):
        return [vocabulary.encode(prompt)]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(token, int) and not isinstance(token, bool) for token in prompt):
            return [prompt]
        if all(isinstance(text, str) for text in prompt):
            return [vocabulary.encode(text) for text in prompt]
    raise ApiError(400, "prompt: give a text, a list of texts, or a list of token ids", "prompt")


def _sampling(fields: dict[str, Any]) -> Sampling:
    stop = fields.get("stop", [])
    if isinstance(stop, str):
        stop = [stop]
    if not isinstance(stop, list):
        raise ApiError(400, "stop: give a text or a list of texts", "stop")
    return Sampling(
        max_tokens=fields.get("max_completion_tokens", fields.get("max_tokens", DEFAULT_TOKENS)),
        temperature=fields.get("temperature", 1.0),
        top_k=fields.get("top_k", 0),
        top_p=fields.get("top_p", 1.0),
        seed=fields.get("seed", secrets.randbits(31)),
        stop=tuple(stop),
    )


class Answers:
    """The JSON of one request's answer, whole or in chunks."""

    def __init__(self, asked: Asked, model: str) -> None:
        self.asked = asked
        prefix, self.kind = ("chatcmpl", "chat.completion") if asked.chat else ("cmpl", "text_completion")
        self._common = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, texts: list[str], finish: list[str], tokens: int) -> dict[str, Any]:
        """The answer that is not streamed."""
        chat = self.asked.chat
        choices = [
            self._choice(number, {"message": {"role": "assistant", "content": text}} if chat else {"text": text}, end)
            for number, (text, end) in enumerate(zip(texts, finish, strict=True))
        ]
        return {**self._common, "object": self.kind, "choices": choices, "usage": self.usage(tokens)}

    def chunk(self, number: int, text: str, finish: str | None, *, first: bool = False) -> dict[str, Any]:
        """A part of choice `number`."""
        delta = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
        return self._chunk([self._choice(number, {"delta": delta} if self.asked.chat else {"text": text}, finish)])

    def usage_chunk(self, tokens: int) -> dict[str, Any]:
        """The last part, where it was asked for."""
        return {**self._chunk([]), "usage": self.usage(tokens)}

    def usage(self, tokens: int) -> dict[str, int]:
        prompt = sum(map(len, self.asked.prompts))
        return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.asked.chat else self.kind
        return {**self._common, "object": kind, "choices": choices}

    def _choice(self, number: int, content: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return {"index": number, **content, "logprobs": None, "finish_reason": finish}
