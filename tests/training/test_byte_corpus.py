import hashlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from hybridattn.training.byte_corpus import (
    PAD,
    SEPARATOR,
    VOCAB_SIZE,
    byte_symbols,
    byte_tokenizer,
    is_held_out,
    standard_library,
)

# Every byte that UTF-8 text can contain, white space in every shape, and the special tokens' own names.
TEXTS = [
    "",
    " leading,  double\n\n\ttab \r\n trailing ",
    "don't we'll\x00\x01\x7f",
    "<|endoftext|> is text and so is <|pad|>",
    "".join(map(chr, range(0x800))),
    "日本語 🎉 \u2028 \ufeff \U0010ffff",
]


@pytest.mark.parametrize("text", TEXTS)
def test_token_ids_are_bytes_and_decode_to_the_text(text: str, tmp_path: Path):
    byte_tokenizer(max_length=512).save_pretrained(tmp_path)
    for tokenizer in (byte_tokenizer(), AutoTokenizer.from_pretrained(tmp_path)):
        ids = tokenizer(text)["input_ids"]
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text


def test_special_tokens_follow_the_bytes():
    tokenizer = byte_tokenizer(max_length=512)
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (SEPARATOR, SEPARATOR, PAD)
    assert len(tokenizer) == VOCAB_SIZE
    assert tokenizer.model_max_length == 512
    assert tokenizer.decode([*b"a", SEPARATOR, *b"b", PAD], skip_special_tokens=True) == "ab"
    assert tokenizer(["a", "bcd"], padding=True)["input_ids"] == [[PAD, PAD, ord("a")], list(b"bcd")]


def test_every_byte_has_its_own_symbol():
    symbols = byte_symbols()
    assert len(set(symbols)) == 256
    assert symbols[ord("A")] == "A"
    assert symbols[ord(" ")] == "Ġ"
    assert symbols[ord("\n")] == "Ċ"


def test_standard_library_split_is_disjoint_and_repeatable():
    corpus, again = standard_library(), standard_library()
    assert np.array_equal(corpus.train, again.train)
    assert np.array_equal(corpus.held_out, again.held_out)
    train, held_out = documents(corpus.train), documents(corpus.held_out)
    assert len(train) == corpus.train_files > 10 * len(held_out)
    assert len(held_out) == corpus.held_out_files > 10
    assert not set(train) & set(held_out)
    assert any(b"def dumps(" in text for text in (*train, *held_out))


def documents(tokens: np.ndarray) -> list[bytes]:
    """The documents of a corpus part."""
    ends = np.flatnonzero(tokens == SEPARATOR)
    assert ends[0] == 0
    assert ends[-1] == len(tokens) - 1
    return [tokens[a + 1 : b].astype(np.uint8).tobytes() for a, b in pairwise(ends)]


def test_split_depends_on_the_name_alone():
    names = [Path(f"package/module{i}.py") for i in range(400)]
    for name in names:
        assert is_held_out(name) == (hashlib.sha256(name.as_posix().encode()).digest()[-1] % 16 == 0)
    assert 10 < sum(map(is_held_out, names)) < 40


def test_other_peoples_code_and_tests_are_left_out(tmp_path: Path):
    body = b"x = 1\n" * 100
    for i in range(40):
        write(tmp_path / f"module{i}.py", body)
    plain = standard_library(tmp_path, smallest_part=100)
    for name in ("site-packages/a.py", "json/test/b.py", "idlelib/idle_test/c.py", "config-3.11-x86_64/d.py", "e.txt"):
        write(tmp_path / name, body)
    write(tmp_path / "short.py", b"pass\n")
    assert standard_library(tmp_path, smallest_part=100).train_files == plain.train_files
    write(tmp_path / "json/decoder.py", body)
    files = standard_library(tmp_path, smallest_part=100)
    assert files.train_files + files.held_out_files == 41


def write(path: Path, body: bytes) -> None:
    """Write a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(body)


def test_missing_sources_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"root: expected .* sources.* got 0 bytes in 0 files below"):
        standard_library(tmp_path / "nowhere")
    write(tmp_path / "module.py", b"x = 1\n" * 100)
    with pytest.raises(ValueError, match="got 600 bytes in 1 files"):
        standard_library(tmp_path)
