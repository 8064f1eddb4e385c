"""Packed rows: no token is lost, no sequence depends on another, and a stream resumes at any position."""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from hybridattn.models.decoder import HybridAttnConfig, HybridAttnForCausalLM
from hybridattn.training.byte_corpus import SEPARATOR, byte_tokenizer
from hybridattn.training.packed_rows import PackedBatches, Place
from hybridattn.training.sources import open_documents


def batches(path: Path, **options) -> PackedBatches:
    defaults = {"column": "text", "vocab_size": 258, "length": 32, "rows": 2, "block": 3}
    return PackedBatches(open_documents(str(path)), byte_tokenizer(), **{**defaults, **options})


def write(path: Path, *documents) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def test_every_token_comes_once_in_a_pass(texts: Path):
    tokens = np.concatenate([x["input_ids"][0] for x in islice(batches(texts), 60)])
    documents = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    once = sum(len(text) + 2 for text in documents)
    seen = bytes(tokens[:once][tokens[:once] != SEPARATOR].astype(np.uint8)).decode()
    assert sorted(seen) == sorted("".join(documents))
    again = bytes(tokens[once : 2 * once][tokens[once : 2 * once] != SEPARATOR].astype(np.uint8)).decode()
    assert sorted(again) == sorted(seen)
    assert again != seen  # another order


def test_a_batch_says_where_its_sequences_are(texts: Path):
    for x in islice(batches(texts), 20):
        ends = x["cu_seq_lens_q"].tolist()
        assert (ends[0], ends[-1]) == (0, 64)
        assert 32 in ends  # a sequence never crosses the end of a row
        starts = torch.tensor(ends[:-1])
        assert (x["labels"][0, starts] == -100).all()
        assert (x["labels"] == -100).sum() == len(starts)
        assert (x["position_ids"][0, starts] == 0).all()
        assert x["max_length_q"] == max(np.diff(ends)) == x["position_ids"].max() + 1


def test_documents_do_not_depend_on_each_other(texts: Path):
    config = HybridAttnConfig(
        vocab_size=258,
        hidden_size=16,
        mixers=["gla", "full", "conv"],
        mixer_options={"gla": {"num_heads": 2}, "full": {"num_heads": 2}},
        input_conv_size=3,
    )
    model = HybridAttnForCausalLM(config).eval()
    x = next(iter(batches(texts)))
    x.pop("place")
    a, b = x["cu_seq_lens_q"][1:3].tolist()
    with torch.no_grad():
        logits = model(**x).logits[:, a:b]
        changed = torch.where(torch.arange(64) < a, (x["input_ids"] + 1) % 256, x["input_ids"])
        torch.testing.assert_close(model(**{**x, "input_ids": changed}).logits[:, a:b], logits)
        torch.testing.assert_close(model(x["input_ids"][:, a:b]).logits, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [1, 3, 100])
def test_a_stream_resumes_at_any_position(texts: Path, block: int):
    whole = list(islice(batches(texts, block=block), 12))
    for number in (0, 4, 9):
        rest = batches(texts, block=block)
        rest.place = Place(**json.loads(json.dumps(whole[number]["place"])))
        for x, y in zip(islice(rest, 2), whole[number + 1 :], strict=False):
            assert torch.equal(x["input_ids"], y["input_ids"])
            assert torch.equal(x["cu_seq_lens_q"], y["cu_seq_lens_q"])
            assert x["place"] == y["place"]


def test_processes_share_the_rows_of_one(texts: Path):
    one = list(islice(batches(texts, rows=4), 5))
    two = [list(islice(batches(texts, rows=2, process=i, processes=2), 5)) for i in range(2)]
    for x, left, right in zip(one, *two, strict=True):
        assert torch.equal(x["input_ids"], torch.cat((left["input_ids"], right["input_ids"]), 1))
        assert x["place"] == left["place"] == right["place"]


def test_token_ids_are_taken_as_they_are(tmp_path: Path):
    path = write(tmp_path / "ids.jsonl", list(range(40)), [7] * 24)  # a block of one document keeps this order
    x = next(iter(batches(path, block=1)))
    assert x["input_ids"][0].tolist() == [*range(40), *[7] * 24]
    assert x["cu_seq_lens_q"].tolist() == [0, 32, 40, 64]


def test_sources_that_cannot_be_read(tmp_path: Path, texts: Path):
    (tmp_path / "broken.jsonl").write_text('{"text": ')
    with pytest.raises(ValueError, match="expected readable documents"):
        batches(tmp_path / "broken.jsonl").check()
    with pytest.raises(ValueError, match=r"column: expected one of \['text'\], got 'body'"):
        batches(texts, column="body").check()


@pytest.mark.parametrize(
    ("documents", "named"),
    [
        (("text", ""), "document 1: expected at least one token"),
        (("text", None), "document 1: expected text or token ids in column 'text', got None"),
        (([1, 2], [1.5] * 40), "document 0: expected integers as token ids"),
        (([1, 2], [{"role": "user", "content": "text"}]), "document 1: expected integers as token ids"),
        (([1, 2], [3, None]), "document 1: expected integers as token ids"),
        (([1, 258], [3] * 40), "below vocab_size 258, got 1 to 258"),
    ],
)
def test_documents_that_cannot_be_trained_on(tmp_path: Path, documents, named: str):
    found = batches(write(tmp_path / "bad.jsonl", *documents))
    with pytest.raises(ValueError, match=named):
        found.check()


def test_nothing_but_empty_documents(tmp_path: Path):
    with pytest.raises(ValueError, match="data: expected at least one document with tokens, got none"):
        batches(write(tmp_path / "empty.jsonl", "", "", "", ""), skip_empty=True).check()


def test_empty_documents_can_be_left_out(tmp_path: Path):
    x = next(iter(batches(write(tmp_path / "some.jsonl", "", "a" * 62), skip_empty=True, block=1)))
    assert x["cu_seq_lens_q"].tolist() == [0, 32, 64]
