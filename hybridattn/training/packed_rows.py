"""Pack documents into rows of equal length without padding, in an order that only a seed determines; resumable.

Every row is full: the rest of a document that does not fit becomes a separate sequence in the next row. The offsets of
all sequences are in ``cu_seq_lens_q``, so that no token attends to another sequence.
"""

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

TOKENIZED_TOGETHER = 32  # documents
EMPTY = "expected at least one token, got none; set skip_empty to skip empty documents"


@dataclass(frozen=True)
class Place:
    """Position in a stream of documents, as JSON values; resuming reads at most one block of documents again.

    Attributes:
        passes: complete passes over the data.
        block: blocks of this pass before the current one.
        source: state of the source at the start of the current block; None at the start of a pass.
        document: documents of the block before the current one, in shuffled order.
        token: tokens of the current document that are already used.
    """

    passes: int = 0
    block: int = 0
    source: dict[str, Any] | None = None
    document: int = 0
    token: int = 0


class Row(NamedTuple):
    """A packed row.

    Attributes:
        tokens: token ids, int64 ``[length]``.
        lengths: lengths of the row's sequences, in tokens.
        place: position in the stream after this row.
    """

    tokens: np.ndarray
    lengths: list[int]
    place: Place


class PackedBatches(IterableDataset):
    """Endless iterator over the micro-batches of one process.

    All processes read the same rows, and each takes its share. The rows of an optimiser step therefore depend neither
    on the number of processes nor on the number of micro-batches.

    Every batch has ``input_ids``, ``labels`` and ``position_ids``, int64 ``[1, rows * length]``; ``cu_seq_lens_q`` and
    ``cu_seq_lens_k``, int32 ``[sequences + 1]``; ``max_length_q`` and ``max_length_k``; and ``place``, the position in
    the stream after the batch, the same on all processes. The first label of each sequence is -100, since no token
    predicts it.

    Args:
        source: a ``datasets.IterableDataset`` of documents.
        tokenizer: tokenizer of the texts; its begin and end tokens, if it has them, surround each document.
        column: column of the source, with texts or with lists of token ids, which are used unchanged.
        vocab_size: vocabulary size of the model.
        length: tokens per row.
        rows: rows per process and micro-batch.
        block: number of documents that are read ahead and shuffled; 1 keeps the source's order.
        seed: seed of the shuffling.
        skip_empty: skip documents without tokens instead of raising.
        process, processes: index of this process, and number of processes.

    Raises:
        ValueError: during iteration: no documents, a document that has no tokens or is neither text nor token ids, or a
            token id outside the vocabulary.
    """

    def __init__(
        self,
        source: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        column: str,
        vocab_size: int,
        length: int,
        rows: int,
        block: int = 1000,
        seed: int = 0,
        skip_empty: bool = False,
        process: int = 0,
        processes: int = 1,
    ):
        for name, value in {"length": length, "rows": rows, "shuffle": block}.items():
            if value < 1:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        self.source, self.tokenizer, self.column = source, tokenizer, column
        self.vocab_size, self.length, self.rows, self.block = vocab_size, length, rows, block
        self.seed, self.skip_empty, self.process, self.processes = seed, skip_empty, process, processes
        self.place = Place()
        self.start = source.state_dict()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rows = self._rows()
        while True:
            step = list(islice(rows, self.rows * self.processes))
            own = step[self.process * self.rows :][: self.rows]
            yield {**batch(own), "place": asdict(step[-1].place)}

    def _rows(self) -> Iterator[Row]:
        pieces: list[np.ndarray] = []
        filled = 0
        for tokens, place in self._documents():
            start = place.token
            while start < len(tokens):
                pieces.append(tokens[start : start + self.length - filled])
                start += len(pieces[-1])
                filled += len(pieces[-1])
                if filled == self.length:
                    yield Row(np.concatenate(pieces), [len(x) for x in pieces], replace(place, token=start))
                    pieces, filled = [], 0

    def _documents(self) -> Iterator[tuple[np.ndarray, Place]]:
        """Yield the token ids of every document from ``self.place`` on, with the document's position."""
        place = self.place
        found = place != Place()  # whether any document had tokens; true for a resumed run
        while True:
            self.source.load_state_dict(copy.deepcopy(place.source or self.start))
            documents = iter(self.source)
            while block := list(islice(documents, self.block)):
                order = np.random.default_rng((self.seed, place.passes, place.block)).permutation(len(block))
                for first in range(place.document, len(block), TOKENIZED_TOGETHER):
                    chosen = order[first : first + TOKENIZED_TOGETHER]
                    numbers = [place.block * self.block + int(i) for i in chosen]
                    for i, tokens in enumerate(self._tokenize([block[i] for i in chosen], numbers), first):
                        found = found or len(tokens) > 0
                        yield tokens, place if i == place.document else replace(place, document=i, token=0)
                place = Place(place.passes, place.block + 1, copy.deepcopy(self.source.state_dict()))
            if place.block == 0 or not found:
                raise ValueError(f"data: expected at least one document{' with tokens' * (not found)}, got none")
            place = Place(place.passes + 1)

    def _tokenize(self, documents: list[dict[str, Any]], numbers: list[int]) -> Iterator[np.ndarray]:
        """Yield the int64 token ids of each document; an empty array for an empty document with ``skip_empty``."""
        values = [document.get(self.column) for document in documents]
        texts = [value for value in values if isinstance(value, str)]
        encoded = iter(self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else [])
        begin, end = ([] if x is None else [x] for x in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id))
        for value, number in zip(values, numbers, strict=True):
            self._check(value, number)
            ids = next(encoded) if isinstance(value, str) else value
            if not ids and not self.skip_empty:
                raise ValueError(f"data: document {number}: {EMPTY}")
            tokens = np.array([*begin, *ids, *end] if ids and isinstance(value, str) else ids, np.int64)
            if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
                raise ValueError(
                    f"data: document {number}: expected token ids below vocab_size {self.vocab_size}, "
                    f"got {tokens.min()} to {tokens.max()}"
                )
            yield tokens

    def check(self) -> None:
        """Check the documents of the first block, and read a row.

        Raises:
            ValueError: as during iteration; or the source is not readable, or does not have the column.
        """
        self.source.load_state_dict(copy.deepcopy(self.start))
        try:
            documents = list(islice(self.source, self.block))
        except Exception as error:  # readers of damaged files raise many classes of errors
            raise ValueError(f"data: expected readable documents, got {error}") from error
        if documents and self.column not in documents[0]:
            raise ValueError(f"column: expected one of {sorted(documents[0])}, got {self.column!r}")
        for number, document in enumerate(documents):
            self._check(document.get(self.column), number)
        next(self._rows())

    def _check(self, value: Any, number: int) -> None:
        if not isinstance(value, str | list):
            raise ValueError(
                f"data: document {number}: expected text or token ids in column {self.column!r}, got {value!r:.50}"
            )
        if isinstance(value, list) and not set(map(type, value)) <= {int}:
            raise ValueError(f"data: document {number}: expected integers as token ids, got {value!r:.50}")
        if not value and not self.skip_empty:
            raise ValueError(f"data: document {number}: {EMPTY}")


def batch(rows: list[Row]) -> dict[str, Any]:
    """Concatenate rows into the inputs of a model; see `PackedBatches`."""
    tokens = torch.from_numpy(np.concatenate([row.tokens for row in rows]))
    lengths = np.concatenate([row.lengths for row in rows])
    ends = np.concatenate([[0], np.cumsum(lengths)])
    labels = tokens.clone()
    labels[ends[:-1]] = -100
    offsets = torch.from_numpy(ends.astype(np.int32))
    longest = int(lengths.max())
    return {
        "input_ids": tokens[None],
        "labels": labels[None],
        "position_ids": torch.from_numpy(np.arange(len(tokens)) - np.repeat(ends[:-1], lengths))[None],
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets,
        "max_length_q": longest,
        "max_length_k": longest,
    }
