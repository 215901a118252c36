"""A conversation as tokens, in Hunyuan-Large's format."""

from collections.abc import Iterable, Mapping

from moe.serve.vocabulary import EOS, Vocabulary

START, AFTER_SYSTEM, AFTER_USER = "<|startoftext|>", "<|extra_4|>", "<|extra_0|>"


class ChatError(ValueError):
    """A conversation that has no place in the format: names the message and what would work."""


def chat_tokens(messages: Iterable[Mapping[str, str]], vocabulary: Vocabulary) -> list[int]:
    """<|startoftext|>system<|extra_4|>user<|extra_0|>assistant<|eos|>, and each later question opened by
    <|startoftext|> again (released tokenizer_config.json, chat_template).

    Args:
        messages: each with "role" ("system", only as the first; "user"; "assistant") and "content"; the last is the
            user's.

    Raises:
        ChatError: an empty conversation, an unknown role, or one out of turn.
        ConfigError: the vocabulary lacks one of the special tokens.
    """
    tokens: list[int] = []
    expected: tuple[str, ...] = ("system", "user")
    role = None
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in expected or not isinstance(content, str):
            raise ChatError(
                f"messages[{number}]: role {role!r} with content of type {type(content).__name__}; "
                f"a text by {' or '.join(expected)} is due here"
            )
        text = vocabulary.encode(content)
        if role == "assistant":
            tokens += [*text, vocabulary.special(EOS)]
        elif role == "system":
            tokens += [vocabulary.special(START), *text, vocabulary.special(AFTER_SYSTEM)]
        else:
            opened = number == 1 and expected == ("user",)
            start = [] if opened else [vocabulary.special(START)]
            tokens += [*start, *text, vocabulary.special(AFTER_USER)]
        expected = ("assistant",) if role == "user" else ("user",)
    if role != "user":
        raise ChatError("messages: the last one must be the user's; the model answers it")
    return tokens
