"""The demo's language model: train a small hybrid on text, score it against n-gram models, save, reload and sample."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hybridattn.evals.text import bits
from hybridattn.models.decoder import HybridAttnConfig, HybridAttnForCausalLM
from hybridattn.training import small_loop
from hybridattn.training.byte_corpus import PAD, SEPARATOR, VOCAB_SIZE, Corpus, byte_tokenizer, standard_library

SECONDS = 60  # training time
PROMPT = 'def read_file(path):\n    """'
NEW_TOKENS = 256

# 0.8 million parameters: a larger model scores worse after the same training time.
OPTIONS = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "mixers": ["gla", "window", "gla", "window"],
    "mixer_options": {
        "gla": {"num_heads": 2, "key_dim": 32, "gate_rank": 16, "gate_bias_range": [0.0, 4.0]},
        "window": {"num_heads": 2, "window": 64},
    },
    "input_conv_size": 4,
    "mlp": "swiglu",
    "intermediate_size": 344,
    "initializer": "fan_in",
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
    "bos_token_id": SEPARATOR,
    "eos_token_id": SEPARATOR,
    "pad_token_id": PAD,
}

# The code with which a user would load a saved model. It runs in a new process.
RELOAD = """
import json, sys, time
import hybridattn, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, prompt, new_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)  # one token at a time is too little work for two
torch.manual_seed(0)
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
inputs = tokenizer(prompt, return_tensors="pt")
options = {"do_sample": True, "temperature": 0.8, "eos_token_id": None}
model.generate(**inputs, **options, max_new_tokens=8)
start = time.perf_counter()
tokens = model.generate(**inputs, **options, max_new_tokens=new_tokens)[0]
seconds = time.perf_counter() - start
json.dump({"text": tokenizer.decode(tokens), "tokens_per_second": new_tokens / seconds, "threads": 1}, sys.stdout)
"""


def measure(folder: Path, *, steps: int | None = None) -> dict[str, Any]:
    """Train on the standard library's sources, score the model and n-gram models on held-out files, save and sample.

    Args:
        folder: folder in which the model and its tokenizer are saved.
        steps: training steps, instead of `SECONDS` of training.

    Returns:
        JSON values: ``mixers``, ``parameters``, ``corpus`` (bytes and files), ``training`` (`small_loop.train`),
        ``bits_per_byte`` of the model and of the orders 0 to 4, ``scored_bytes``, ``continuation`` (text, speed).

    Raises:
        ValueError: the interpreter was installed without the sources of its library.
        RuntimeError: a new process cannot load the saved model.
    """
    corpus = standard_library()
    torch.manual_seed(0)
    model = HybridAttnForCausalLM(HybridAttnConfig(**OPTIONS))
    training = small_loop.train(model, corpus.train, steps=steps, seconds=SECONDS if steps is None else None)
    windows = bits.scored_windows(corpus.held_out)
    scores = {"model": bits.model_bits_per_byte(model, windows)}
    baselines = bits.ngram_bits_per_byte(corpus.train, corpus.held_out, windows)
    scores |= {f"order {order}": score for order, score in enumerate(baselines)}
    model.save_pretrained(folder)
    byte_tokenizer(max_length=model.config.max_position_embeddings).save_pretrained(folder)
    return {
        "mixers": OPTIONS["mixers"],
        "parameters": model.num_parameters(),
        "corpus": describe(corpus),
        "training": {**training, "threads": torch.get_num_threads(), "bf16": small_loop.has_native_bf16()},
        "bits_per_byte": scores,
        "scored_bytes": int(windows.scored.sum()),
        "continuation": continuation(folder),
    }


def configuration(steps: int | None) -> dict[str, Any]:
    """Return everything that determines the result of `measure`, as JSON values."""
    budget = {"steps": steps, "seconds": SECONDS if steps is None else None}
    return {"model": OPTIONS, "recipe": asdict(small_loop.Recipe()), **budget}


def describe(corpus: Corpus) -> dict[str, int]:
    """Return the numbers of bytes and files in both parts of a corpus."""
    return {
        "train_bytes": int((corpus.train != SEPARATOR).sum()),
        "train_files": corpus.train_files,
        "held_out_bytes": int((corpus.held_out != SEPARATOR).sum()),
        "held_out_files": corpus.held_out_files,
    }


def continuation(folder: Path) -> dict[str, Any]:
    """Load a saved model in a new process with the Auto classes and sample from it.

    Returns:
        ``text`` (prompt and continuation), ``tokens_per_second``, ``threads``.

    Raises:
        RuntimeError: the process failed; the message ends with its stderr.
    """
    command = [sys.executable, "-c", RELOAD, str(folder), PROMPT, str(NEW_TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(
            f"model: expected a new process to load {folder}, got an error: {done.stderr.strip()[-2000:]}"
        )
    return json.loads(done.stdout)
