"""Validate the recall task ``hybridattn_kv``: check that it ranks small trained mixers as the literature does.

    python -m hybridattn.evals.lm_eval.mixer_ranking --out reports/order

This command trains one model per mix of mixers, in seconds to a minute on one thread. It scores each with
`hybridattn eval` on the task, at the loads of training and with twice as many pairs as any training row. The order in
the literature is full attention, hybrids, BASED, GLA, sliding window (Arora et al., "Simple linear attention language
models balance the recall-throughput tradeoff", 2024, arXiv:2402.18668, figures 2 and 3; Arora et al., "Just read
twice", 2024, arXiv:2407.05483, table 1).

Two simplifications make training possible without a GPU. Tokens are syllables, pairs of digits and single characters,
so that a key has three tokens and a value two. A training row queries all of its pairs, while the task queries one.
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
LINE_TOKENS = 7  # tokens of a pair: three syllables, the colon, two pairs of digits, the end of the line
LENGTH = 192  # tokens of test prompts with their answers, and maximum tokens of training prompts
BATCH = 32
POOL = 24  # batches per load, from which training draws repeatedly

MIXERS = {
    "full attention": (["conv", "full"], 350),
    "hybrid": (["conv", "full", "gla"], 400),
    "BASED": (["conv", "taylor", "window"], 600),
    "GLA": (["conv", "gla"], 500),
    "sliding window": (["conv", "window"], 300),
}
"""Mixers and training steps by name, from the highest to the lowest recall in the literature."""

OPTIONS = {
    "conv": {"kernel_size": 3, "expand": 0},
    "full": {"num_heads": 2, "rope_theta": None},
    "window": {"num_heads": 1, "rope_theta": None, "window": 16},
    "taylor": {"num_heads": 1, "key_dim": 16},
    "gla": {"num_heads": 1, "key_dim": 32, "gate_bias_range": [4.0, 8.0]},
}


def tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer whose tokens are syllables of the tasks' words, [space and] two digits, or single bytes."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    space = "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"  # ByteLevel's symbol for a space
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
    """Build a model of width 64 without MLPs."""
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
    """Return the context of a row of the task, followed by all of its pairs in another order."""
    context = kv.row(rng, cell)["prompt"].rpartition("\n")[0]
    pairs = re.findall(r"^[a-z]{6}: \d{4}$", context, re.MULTILINE)
    return "\n".join([context, *rng.sample(pairs, len(pairs))])


def training_rows(tokens: PreTrainedTokenizerFast, rng: Random, load: int) -> mqar.Rows:
    """Draw a batch of rows with ``load`` pairs, padded on the right; both tokens of every queried value are labels."""
    shortest = LINE_TOKENS * (load + 2) + ANSWER_TOKENS
    cells = [
        Cell(rng.randint(shortest, LENGTH), 0.5, load, "once", lambda text: len(tokens(text, verbose=False).input_ids))
        for _ in range(BATCH)
    ]
    rows = [torch.tensor(tokens(training_text(rng, cell), verbose=False).input_ids) for cell in cells]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    before_value = LINE_TOKENS * torch.arange(load) + 3  # distance from a row's end to the token before a value
    back = torch.stack([before_value, before_value - 1], -1).flatten()
    positions = torch.stack([len(row) - back for row in rows])
    return mqar.Rows(padded, positions, padded.gather(1, positions + 1))


def batches(tokens: PreTrainedTokenizerFast, seed: int) -> Iterator[mqar.Rows]:
    """Yield batches endlessly, cycling through the loads in rising order."""
    rng = Random(f"order {seed}")
    pools = [[training_rows(tokens, rng, load) for _ in range(POOL)] for load in LOADS]
    while True:
        for pool in pools:
            yield rng.choice(pool)


def train(mix: str, folder: Path, *, seed: int = 0) -> None:
    """Train one of `MIXERS` and save it with its tokenizer."""
    mixers, steps = MIXERS[mix]
    tokens = tokenizer()
    torch.manual_seed(seed)
    model = build(mixers, len(tokens))
    mqar.train(model, steps=steps, batches=batches(tokens, seed))
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)


def score(folder: Path, out: Path, *, rows_per_cell: int = 8) -> dict[str, float]:
    """Run `hybridattn eval` on a trained model, report to ``out``; return the share of correct answers by load."""
    from hybridattn.evals.lm_eval.evaluate import evaluate  # needs lm-eval
    from hybridattn.evals.lm_eval.scores import by

    sizes = {"loads": TEST_LOADS, "rows_per_cell": rows_per_cell}
    flags = ["--tasks", "hybridattn_kv", "--metadata", json.dumps(sizes), "--batch_size", "16", "--device", "cpu"]
    if not evaluate(str(folder), flags, lengths=[LENGTH], out=out):
        raise RuntimeError(f"{folder}: expected a model that passes the checks, got the failures printed above")
    (found,) = json.loads((out / "results.json").read_text(encoding="utf-8"))["tasks"].values()
    return {str(load): share for load, share in by(found["cells"], "load").items()}


def main() -> None:
    """Train and score every mix of mixers, and print a table."""
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
