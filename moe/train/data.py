"""From a corpus to batches: tokenized once, packed into rows, shuffled, split over processes, exactly resumable."""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np

from moe.model.config import ConfigError, divisors, require_positive
from moe.train.corpus import DataError, open_corpus
from moe.train.token_cache import TokenStream, open_token_cache
from moe.train.tokenizer import Tokenizer, load_tokenizer, train_tokenizer


class Batch(NamedTuple):
    """One step's rows, or this process's part of them: numpy arrays on the host, jax.Arrays once placed.

    tokens_BT: i32.
    targets_BT: i32, the next token of each.
    positions_BT: i32, from 0 in each document (a document that began in an earlier row starts at 0 as well).
    segments_BT: i32, the document of each token, counted from 1 within the row; 0 is padding.
    weights_BT: f32, 1 where the target belongs to the same document, else 0.
    """

    tokens_BT: Any
    targets_BT: Any
    positions_BT: Any
    segments_BT: Any
    weights_BT: Any


@dataclass(frozen=True)
class DataConfig:
    """
    paths: files, folders and globs of .txt, .md, .py, .jsonl (field "text") and .parquet (column "text"); () is the
        default corpus (moe/train/corpus.py).
    tokenizer: a tokenizer.json; None trains a byte-level BPE of the model's vocab_size on the corpus.
    sequence_length: T, tokens a row.
    batch_size: B, rows of one step over all devices.
    held_out: share of the documents kept for validation, chosen by their text.
    cache: folder of the tokenized corpora.
    """

    paths: tuple[str, ...] = ()
    tokenizer: str | None = None
    sequence_length: int = 256
    batch_size: int = 16
    held_out: float = 0.01
    cache: str = ".cache/data"

    def __post_init__(self) -> None:
        require_positive(self, "sequence_length", "batch_size", area="data.")
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"data.held_out={self.held_out}: give a share from 0 (no validation) to below 1")
        if isinstance(self.paths, str):
            raise ConfigError(f"data.paths={self.paths!r}: give a tuple of paths, ({self.paths!r},)")


class BatchIterator(Protocol):
    """Endless batches; its state is plain JSON and names the next batch exactly."""

    def __next__(self) -> Batch: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


class Statistics(NamedTuple):
    """Of the tokenized corpus.

    documents: all of them. tokens, bytes: of the training part; a document's end counts as a token.
    validation_tokens: of the validation part.
    unigram_entropy: nats per predicted token of the training part: the loss of a model that knows how often each
        token occurs and nothing else.
    """

    documents: int
    tokens: int
    bytes: int
    validation_tokens: int
    unigram_entropy: float


@dataclass(frozen=True)
class Data:
    """A run's data, as this process sees it."""

    tokenizer: Tokenizer
    statistics: Statistics
    train: BatchIterator
    validation: Callable[[], Iterator[Batch]]


def open_data(
    config: DataConfig,
    *,
    vocab_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    report: Callable[[str], None] = lambda line: None,
) -> Data:
    """Opens the corpus, tokenizing it first where the cache does not hold it.

    Training rows are shuffled anew each epoch by `seed`. Each process gets a contiguous part of every batch, so the
    whole batch is the same for any number of processes.

    Raises:
        ConfigError: the batch does not divide over the processes, or the vocabulary is too small.
        DataError: the corpus cannot be read, or holds too little text.
    """
    if config.batch_size % process_count:
        raise ConfigError(
            f"data.batch_size={config.batch_size} does not divide over {process_count} processes: use a multiple of "
            f"{process_count}, or {divisors(config.batch_size)} processes"
        )
    corpus = open_corpus(config.paths)
    loaded = None if config.tokenizer is None else load_tokenizer(config.tokenizer, vocab_size)
    settings = [corpus.digest(), loaded.to_json() if loaded else f"bpe {vocab_size}", str(config.held_out)]
    key = hashlib.sha256("\0".join(settings).encode()).hexdigest()[:16]

    def tokenizer() -> Tokenizer:
        if loaded is None:
            report(f"training a tokenizer of {vocab_size} ids on {corpus.size / 1e6:.1f} MB")
        return loaded or train_tokenizer(corpus.documents(), vocab_size)

    cache = open_token_cache(Path(config.cache) / key, corpus.documents, tokenizer, config.held_out, report)
    T = config.sequence_length
    num_rows = (len(cache.train.tokens) - 1) // T
    if num_rows < 1:
        raise DataError(
            f"the corpus has {len(cache.train.tokens)} training tokens, fewer than one row of "
            f"data.sequence_length={T} and a target: give more text, or shorter rows"
        )
    share = config.batch_size // process_count
    mine = slice(process_index * share, (process_index + 1) * share)
    read = partial(pack, cache.train, T, cache.tokenizer.pad)
    # Row numbers are shuffled and batched whole; only this process's rows are read. Grain's endless repeat has no
    # length that fits a batch of 1, so the epochs are counted out instead.
    numbers = (
        grain.MapDataset.range(num_rows).seed(seed).shuffle().repeat((1 << 62) // num_rows).batch(config.batch_size)
    )
    train = iter(numbers.map(lambda rows_B: read(rows_B[mine])).to_iter_dataset())
    validation = partial(_validation_batches, cache.validation, config, cache.tokenizer.pad, mine)
    statistics = Statistics(
        cache.documents,
        len(cache.train.tokens),
        cache.train.num_bytes,
        len(cache.validation.tokens),
        _unigram_entropy(cache.train),
    )
    return Data(cache.tokenizer, statistics, train, validation)


def pack(stream: TokenStream, sequence_length: int, pad: int, rows_B: np.ndarray) -> Batch:
    """Rows by number: row r holds tokens r·T … r·T+T-1 of the stream, and predicts the ones behind each.

    What lies behind the stream's end is padding; a row may be padding entirely.
    """
    T = sequence_length
    places_BT = rows_B[:, None].astype(np.int64) * T + np.arange(T + 1)
    inside_BT = places_BT < len(stream.tokens)
    tokens_BT = np.where(inside_BT, stream.tokens[np.minimum(places_BT, len(stream.tokens) - 1)], pad).astype(np.int32)
    documents_BT = np.searchsorted(stream.starts, places_BT, side="right")
    inputs_BT = documents_BT[:, :-1]
    starts_BT = np.maximum(stream.starts[inputs_BT - 1], places_BT[:, :1])
    same_BT = (inputs_BT == documents_BT[:, 1:]) & inside_BT[:, 1:]
    return Batch(
        tokens_BT[:, :-1],
        tokens_BT[:, 1:],
        (places_BT[:, :-1] - starts_BT).astype(np.int32),
        np.where(inside_BT[:, :-1], inputs_BT - inputs_BT[:, :1] + 1, 0).astype(np.int32),
        same_BT.astype(np.float32),
    )


def _validation_batches(stream: TokenStream, config: DataConfig, pad: int, mine: slice) -> Iterator[Batch]:
    """All rows once, in order; the last batch is filled up with padding."""
    num_rows = math.ceil((len(stream.tokens) - 1) / config.sequence_length) if len(stream.tokens) else 0
    for first in range(0, num_rows, config.batch_size):
        rows_B = np.arange(first, first + config.batch_size)
        yield pack(stream, config.sequence_length, pad, rows_B[mine])


def _unigram_entropy(stream: TokenStream) -> float:
    """-Σ p ln p over the tokens that are predicted: all but each document's first."""
    counts_V = np.zeros(0, np.int64)
    for first in range(0, len(stream.tokens), 1 << 22):
        found_V = np.bincount(stream.tokens[first : first + (1 << 22)], minlength=len(counts_V))
        counts_V = found_V + np.pad(counts_V, (0, len(found_V) - len(counts_V)))
    counts_V -= np.bincount(stream.tokens[stream.starts], minlength=len(counts_V))
    probs_V = counts_V[counts_V > 0] / counts_V.sum()
    return float(-(probs_V * np.log(probs_V)).sum())
