"""A byte-level text corpus from the sources of Python's standard library, and a byte tokenizer; no downloads.

Token ids 0..255 are the byte values; the special tokens ``SEPARATOR`` and ``PAD`` follow.
"""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SEPARATOR = 256  # before every document and after the last one; also the begin and end token of generation
PAD = 257
VOCAB_SIZE = 258

# Folders of installed packages, tests, tables and generated data, which are not source code of the library.
SKIPPED_FOLDERS = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "lib2to3", "pydoc_data", "turtledemo")
)
SMALLEST_FILE = 256  # bytes; most smaller files are empty __init__.py files
HELD_OUT_SHARE = 16  # one file in 16 is held out


@dataclass(frozen=True)
class Corpus:
    """A text split by file.

    Attributes:
        train: token ids, int16 ``[train tokens]``, each document preceded by ``SEPARATOR``, one more at the end.
        held_out: the same for the held-out documents.
        train_files: number of documents in ``train``.
        held_out_files: number of documents in ``held_out``.
    """

    train: np.ndarray
    held_out: np.ndarray
    train_files: int
    held_out_files: int


def standard_library(root: Path | None = None, *, smallest_part: int = 65_536) -> Corpus:
    """Read the Python standard library's sources, in path order, and split them by file.

    A file is held out when sha256 of its path below ``root`` is 0 modulo 16: the split depends on names alone.

    Args:
        root: folder to read; the running interpreter's standard library if None.
        smallest_part: minimum size of the train and of the held-out text, in bytes.

    Raises:
        ValueError: the sources are missing (some systems ship bytecode only) or too few.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if is_skipped(name) or len(text := path.read_bytes()) < SMALLEST_FILE:
            continue
        parts[is_held_out(name)].append(text)
    for part, documents in zip(("train", "held-out"), (parts[False], parts[True]), strict=True):
        size = sum(map(len, documents))
        if size < smallest_part or not documents:
            raise ValueError(
                f"root: expected a standard library with sources, at least {smallest_part} bytes of {part} text, "
                f"got {size} bytes in {len(documents)} files below {root}; install the interpreter's .py files"
            )
    return Corpus(encode(parts[False]), encode(parts[True]), len(parts[False]), len(parts[True]))


def is_skipped(name: Path) -> bool:
    """Whether the corpus excludes a file, named relative to the library's root."""
    return any(folder in SKIPPED_FOLDERS or folder.startswith("config-") for folder in name.parts[:-1])


def is_held_out(name: Path) -> bool:
    """Whether a file, named relative to the library's root, belongs to the held-out part."""
    return int(hashlib.sha256(name.as_posix().encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0


def encode(documents: list[bytes]) -> np.ndarray:
    """Concatenate documents into int16 token ids ``[tokens]``, a ``SEPARATOR`` before each and one at the end."""
    separator = np.array([SEPARATOR], np.int16)
    pieces = [piece for text in documents for piece in (separator, np.frombuffer(text, np.uint8).astype(np.int16))]
    return np.concatenate([*pieces, separator])


def byte_tokenizer(*, max_length: int | None = None) -> "PreTrainedTokenizerFast":
    """Build the byte tokenizer: byte-level BPE without merges, so that id = byte value; nothing is downloaded.

    Every text (str) encodes to its UTF-8 bytes and decodes to itself; special tokens are never parsed from text.

    Args:
        max_length: maximum input length of the model, in tokens; None for no limit.

    Returns:
        The tokenizer, with ``VOCAB_SIZE`` tokens; ``save_pretrained`` works.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(vocab={symbol: byte for byte, symbol in enumerate(byte_symbols())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end, pad = (AddedToken(text, special=True, normalized=False) for text in ("<|endoftext|>", "<|pad|>"))
    tokenizer.add_special_tokens([end, pad])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=end,
        eos_token=end,
        pad_token=pad,
        padding_side="left",
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        **({} if max_length is None else {"model_max_length": max_length}),
    )


def byte_symbols() -> list[str]:
    """Return the printable character for each byte in a byte-level vocabulary (GPT-2's table), by byte value.

    A printable Latin-1 character represents itself; the other bytes get the characters from code point 256 in order.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = set(ByteLevel.alphabet())
    substitutes = iter(sorted(symbol for symbol in alphabet if ord(symbol) > 255))
    return [chr(byte) if chr(byte) in alphabet else next(substitutes) for byte in range(256)]
