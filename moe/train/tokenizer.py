"""Text to token ids and back: byte-level BPE, trained on the corpus or loaded from a tokenizer.json."""

from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from moe.model.config import ConfigError
from moe.train.corpus import DataError

PAD, EOS = "<|pad|>", "<|eos|>"
# The release's chat format: <|startoftext|>system<|extra_4|>user<|extra_0|>assistant<|eos|>.
START, AFTER_USER, AFTER_SYSTEM = "<|startoftext|>", "<|extra_0|>", "<|extra_4|>"
SPECIAL = (PAD, EOS, START, AFTER_USER, AFTER_SYSTEM)

# Long documents are encoded in pieces cut after a line's end, so that one huge file is encoded on all cores and in
# bounded memory. Decoding the pieces' tokens one after the other gives the text exactly.
_PIECE = 1 << 16


class Tokenizer:
    """Byte-level BPE (as in GPT-2): any text has tokens, and decode(encode(text)) == text.

    A special token's name in the text is encoded as ordinary text, so no document can end another one.
    """

    def __init__(self, inner: tokenizers.Tokenizer, name: str):
        """inner: the wrapped tokenizer. name: what error messages call it. Raises DataError without <|eos|>."""
        inner.encode_special_tokens = True
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self._name = name
        self.eos = self.special(EOS)
        # Padding has weight 0 and segment 0, so any id serves; a loaded tokenizer need not have one of its own.
        pad = inner.token_to_id(PAD)
        self.pad: int = self.eos if pad is None else pad

    @property
    def size(self) -> int:
        """One more than the largest id, special tokens included."""
        return max(self._inner.get_vocab(with_added_tokens=True).values()) + 1

    def special(self, token: str) -> int:
        """The id of a special token such as EOS. Raises DataError where the vocabulary lacks it."""
        found = self._inner.token_to_id(token)
        if found is None:
            raise DataError(f"{self._name}: the vocabulary has no {token}; add it there as a special token")
        return found

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; no special token is added."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, on all cores."""
        pieces = [list(_pieces(text)) for text in texts]
        flat = iter(self._inner.encode_batch_fast([p for ps in pieces for p in ps], add_special_tokens=False))
        return [[token for _ in ps for token in next(flat).ids] for ps in pieces]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`, special tokens by name. Bytes that are no UTF-8 become U+FFFD."""
        return self._inner.decode(list(tokens), skip_special_tokens=False)

    def to_json(self) -> str:
        """The contents of a tokenizer.json."""
        return self._inner.to_str()

    def save(self, path: Path | str) -> None:
        """Writes a tokenizer.json, which `load_tokenizer` and other tools of the field read."""
        Path(path).write_text(self.to_json(), "utf-8")


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of at most `vocab_size` ids: 5 special ones, 256 bytes, and merges as the documents suggest.

    The same documents give the same tokenizer. A small corpus may have fewer merges to offer than were asked for.
    Raises ConfigError for a vocabulary too small to hold all bytes.
    """
    least = len(SPECIAL) + 256
    if vocab_size < least:
        raise ConfigError(f"vocab_size={vocab_size}: a byte-level tokenizer needs at least {least} ids")
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator((piece for text in documents for piece in _pieces(text)), trainer)
    return Tokenizer(inner, "the trained tokenizer")


def load_tokenizer(path: Path | str, vocab_size: int) -> Tokenizer:
    """The tokenizer of a tokenizer.json, which must fit a model of `vocab_size` ids. Raises DataError."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"{file}: no such tokenizer file; give a tokenizer.json, or None to train one on the corpus")
    try:
        inner = tokenizers.Tokenizer.from_str(file.read_text("utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{file}: not a readable tokenizer.json ({error}); get it again, or train one") from None
    tokenizer = Tokenizer(inner, str(file))
    if tokenizer.size > vocab_size:
        raise DataError(
            f"{file}: its ids reach {tokenizer.size - 1}, but the model has vocab_size={vocab_size}; "
            f"set model.vocab_size to at least {tokenizer.size}, or load a smaller tokenizer"
        )
    return tokenizer


def _pieces(text: str):
    """`text` in pieces of about 64 Ki characters, each but the last ending with a line, where lines allow it."""
    begin = 0
    while len(text) - begin > _PIECE:
        end = text.find("\n", begin + _PIECE) + 1 or len(text)
        yield text[begin:end]
        begin = end
    yield text[begin:]
