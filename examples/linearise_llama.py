"""A tiny Llama becomes a hybrid: swap its mixers, transfer its attention, then LoRA.

Run it with `python examples/linearise_llama.py`. It needs `pip install -e '.[train]'`. The Llama is made on the
spot, and all budgets are tiny: every stage runs, but the losses mean nothing, and recovery may exceed 100 %.
"""

import argparse
import inspect
import json
import sys
import tarfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from hybridattn.evals.linearize import linearize
from hybridattn.training.train import main

LLAMA, HYBRID = Path("runs/llama"), Path("runs/hybrid")
DATA = ["--data", "texts.txt", "--eval_data", "held_out.txt", "--eval_rows", "16", "--length", "128"]
QUIET = ["--report_to", "none", "--logging_steps", "10"]

if __name__ == "__main__":
    Path("texts.txt").write_text(inspect.getsource(tarfile), encoding="utf-8")
    Path("held_out.txt").write_text(inspect.getsource(argparse), encoding="utf-8")

    # A byte-level Llama of 4 layers, as `hybridattn train tiny_llama` makes it, with fewer steps.
    steps = ["--max_steps", "40", "--eval_strategy", "no", "--save_strategy", "no"]
    if main(["tiny_llama", "--output_dir", str(LLAMA), *steps, *DATA, *QUIET]):
        sys.exit("pretraining failed")

    # The same as: hybridattn linearize runs/llama runs/hybrid --pattern "1 full : 3 gla" --transfer_tokens 10240 ..
    code = linearize(
        LLAMA,
        HYBRID,
        [*DATA, *QUIET],
        pattern="1 full : 3 gla",
        transfer_tokens=10_240,
        lora_tokens=5_120,
        transfer_learning_rate=1e-2,
        lora_learning_rate=1e-3,
    )
    if code:
        sys.exit(code)
    print((HYBRID / "report.md").read_text(encoding="utf-8"))

    model = AutoModelForCausalLM.from_pretrained(HYBRID)
    assert model.config.mixers == ["full", "gla", "gla", "gla"]
    prompt = torch.tensor([list(b"def read_file(")])
    text = model.generate(prompt, max_new_tokens=40, do_sample=False)[0].tolist()
    print("a continuation:", bytes(token for token in text if token < 256))
    print("results.json has", ", ".join(json.loads((HYBRID / "results.json").read_text())))
