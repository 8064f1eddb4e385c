"""Fine-tune a model with LoRA: a short pretraining on source code, then adapters for records of another kind.

Run it with `python examples/finetune_lora.py`. It needs `pip install -e '.[train]'`.
"""

import inspect
import json
import random
import sys
import tarfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybridattn.training.train import main

NAMES = ("Ada", "Alan", "Barbara", "Donald", "Edsger", "Grace", "John", "Niklaus")
SMALL = "--report_to none --eval_strategy no --logging_steps 10 --save_strategy no --length 128"


def write_records(file: Path) -> Path:
    """A data set as JSON lines, the format of `data: more.jsonl`."""
    draw = random.Random(0)
    lines = [{"text": f"name: {draw.choice(NAMES)}; number: {draw.randrange(1000):03}\n" * 2} for _ in range(400)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def held_out_loss(folder: str) -> float:
    """Nats per byte of a record that is not in the data."""
    tokens = AutoTokenizer.from_pretrained(folder)("name: Margaret; number: 512\n" * 2, return_tensors="pt").input_ids
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder)(tokens, labels=tokens).loss.item()


if __name__ == "__main__":
    Path("code.txt").write_text(inspect.getsource(tarfile), encoding="utf-8")
    records = write_records(Path("records.jsonl"))
    # The same as `hybridattn train tiny_cpu ..` and `hybridattn train finetune_lora --model runs/base ..`
    if main(["tiny_cpu", "--data", "code.txt", "--max_steps", "40", "--output_dir", "runs/base", *SMALL.split()]):
        sys.exit("pretraining failed")
    lora = ["--model", "runs/base", "--data", str(records), "--lora", '{"r": 8, "lora_alpha": 16}']
    steps = ["--split", "train", "--max_steps", "30", "--output_dir", "runs/lora", *SMALL.split()]
    if main(["finetune_lora", *lora, *steps]):
        sys.exit("fine-tuning failed")

    # runs/lora holds the merged model, runs/lora/adapter the adapters alone.
    before, after = held_out_loss("runs/base"), held_out_loss("runs/lora")
    adapter = Path("runs/lora/adapter/adapter_model.safetensors").stat().st_size
    whole = Path("runs/lora/model.safetensors").stat().st_size
    print(f"loss of a held-out record: {before:.2f} -> {after:.2f} nats per byte")
    print(f"adapters: {adapter:,} bytes; the merged model: {whole:,}")
    assert after < before
