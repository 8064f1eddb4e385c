"""What the benchmark makes of mixers whose order is known: small models, trained on key-value pairs in text.

    python -m hybridattn.evals.lm_eval.mixer_ranking --out reports/order

trains one model per mix in seconds to a minute on one thread and scores each with `hybridattn eval` on the task
``hybridattn_kv``, at its own loads and on twice as many pairs as any training row had. The literature orders them full
attention, hybrids, BASED, GLA, sliding window (Arora et al., "Simple linear attention language models balance the
recall-throughput tradeoff", 2024, arXiv:2402.18668, figures 2 and 3; Arora et al., "Just read twice", 2024,
arXiv:2407.05483, table 1).

Two things make that possible without a GPU. Tokens are syllables, pairs of digits and single characters, so that a key
has three and a value two. And a training row asks for all of its pairs, one line after the other, where the task asks
for one.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hybridattn.evals.lm_eval.tasks import kv
from hybridattn.evals.lm_eval.tasks.facts import SYLLABLES
from hybridattn.evals.lm_eval.tasks.grid import ANSWER_TOKENS, Cell
from hybridattn.evals.recall import mqar
from hybridattn.models.decoder import HybridAttnConfig, HybridAttnForCausalLM

SEPARATOR, PAD = 0, 1
LOADS = (2, 4, 8)  # pairs of the training rows
TEST_LOADS = (4, 8, 16)
LINE_TOKENS = 7  # of a pair: three syllables, the colon, two pairs of digits, the end of the line
LENGTH = 192  # tokens of the prompts that are scored, answers included; training prompts have up to as many
BATCH = 32
POOL = 24  # batches per load that are drawn from again and again

MIXERS = {
    "full attention": (["conv", "full"], 350),
    "hybrid": (["conv", "full", "gla"], 400),
    "BASED": (["conv", "taylor", "window"], 600),
    "GLA": (["conv", "gla"], 500),
    "sliding window": (["conv", "window"], 300),
}
"""Mixers and training steps, by name, in the order of the literature."""

OPTIONS = {
    "conv": {"kernel_size": 3, "expand": 0},
    "full": {"num_heads": 2, "rope_theta": None},
    "window": {"num_heads": 1, "rope_theta": None, "window": 16},
    "taylor": {"num_heads": 1, "key_dim": 16},
    "gla": {"num_heads": 1, "key_dim": 32, "gate_bias_range": [4.0, 8.0]},
}


def tokenizer() -> PreTrainedTokenizerFast:
    """Syllables of the tasks' words, two digits, a space and two digits, or else single bytes."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    space = "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"  # how ByteLevel writes it
    digits = [f"{i:02}" for i in range(100)]
    merged = [*SYLLABLES, *digits, *(f"{space}{pair}" for pair in digits)]
    merges = [*((token[0], token[1]) for token in (*SYLLABLES, *digits)), *((space, pair) for pair in digits)]
    vocabulary = {token: i for i, token in enumerate(["<s>", "<pad>", *bytes_, *merged])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    pieces = Regex(r" ?\d\d|" + "|".join(SYLLABLES) + r"|.|\n")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pieces, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="<s>", pad_token="<pad>", model_max_length=LENGTH
    )


def build(mixers: list[str], vocab_size: int) -> HybridAttnForCausalLM:
    """A model without MLPs, 64 wide."""
    return HybridAttnForCausalLM(
        HybridAttnConfig(
            vocab_size=vocab_size,
            hidden_size=64,
            mixers=mixers,
            mixer_options={name: OPTIONS[name] for name in dict.fromkeys(mixers)},
            input_conv_size=4,
            mlp="none",
            initializer="fan_in",
            tie_word_embeddings=True,
            max_position_embeddings=LENGTH,
            bos_token_id=SEPARATOR,
            eos_token_id=SEPARATOR,
            pad_token_id=PAD,
        )
    )


def training_text(rng: Random, cell: Cell) -> str:
    """The context of a row of the task, then each of its pairs once more, in another order."""
    context = kv.row(rng, cell)["prompt"].rpartition("\n")[0]
    pairs = re.findall(r"^[a-z]{6}: \d{4}$", context, re.MULTILINE)
    return "\n".join([context, *rng.sample(pairs, len(pairs))])


def training_rows(tokens: PreTrainedTokenizerFast, rng: Random, load: int) -> mqar.Rows:
    """A batch of rows of ``load`` pairs, padded on the right, labels at both halves of every value asked for."""
    shortest = LINE_TOKENS * (load + 2) + ANSWER_TOKENS
    cells = [
        Cell(rng.randint(shortest, LENGTH), 0.5, load, "once", lambda text: len(tokens(text, verbose=False).input_ids))
        for _ in range(BATCH)
    ]
    rows = [torch.tensor(tokens(training_text(rng, cell), verbose=False).input_ids) for cell in cells]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    before_value = LINE_TOKENS * torch.arange(load) + 3  # tokens from the end of a row to before a value
    back = torch.stack([before_value, before_value - 1], -1).flatten()
    positions = torch.stack([len(row) - back for row in rows])
    return mqar.Rows(padded, positions, padded.gather(1, positions + 1))


def batches(tokens: PreTrainedTokenizerFast, seed: int) -> Iterator[mqar.Rows]:
    """Batches of rising load, in turn, without end."""
    rng = Random(f"order {seed}")
    pools = [[training_rows(tokens, rng, load) for _ in range(POOL)] for load in LOADS]
    while True:
        for pool in pools:
            yield rng.choice(pool)


def train(mix: str, folder: Path, *, seed: int = 0) -> None:
    """Train one of `MIXERS` and save it, with its tokenizer."""
    mixers, steps = MIXERS[mix]
    tokens = tokenizer()
    torch.manual_seed(seed)
    model = build(mixers, len(tokens))
    mqar.train(model, steps=steps, batches=batches(tokens, seed))
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)


def score(folder: Path, out: Path, *, rows_per_cell: int = 8) -> dict[str, float]:
    """`hybridattn eval` on a trained model: the share of answers that are right, by pairs; the report is in ``out``."""
    from hybridattn.evals.lm_eval.evaluate import evaluate  # needs lm-eval
    from hybridattn.evals.lm_eval.scores import by

    sizes = {"loads": TEST_LOADS, "rows_per_cell": rows_per_cell}
    flags = ["--tasks", "hybridattn_kv", "--metadata", json.dumps(sizes), "--batch_size", "16", "--device", "cpu"]
    if not evaluate(str(folder), flags, lengths=[LENGTH], out=out):
        raise RuntimeError(f"{folder}: expected a sound model, got the report above")
    (found,) = json.loads((out / "results.json").read_text(encoding="utf-8"))["tasks"].values()
    return {str(load): share for load, share in by(found["cells"], "load").items()}


def main() -> None:
    """Train and score every mix."""
    from hybridattn.measure.markdown import table

    parser = argparse.ArgumentParser(prog="python -m hybridattn.evals.lm_eval.mixer_ranking", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("reports/order"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {}
    for mix in MIXERS:
        folder = arguments.out / mix.replace(" ", "_")
        train(mix, folder / "model", seed=arguments.seed)
        found[mix] = score(folder / "model", folder / "report")
    heads = ["mix", *(f"{load} pairs" for load in TEST_LOADS)]
    print(table(heads, [[mix, *(f"{share:.3f}" for share in shares.values())] for mix, shares in found.items()]))


if __name__ == "__main__":
    main()
