"""Pretrain a small hybrid on a folder of text files, with the trainer of `hybridattn train`.

Run it with `python examples/pretrain.py [FOLDER]`; without a folder it writes one, of Python's own documentation. It
needs `pip install -e '.[train]'`. Interrupt it and start it again: it resumes from its last checkpoint.
"""

import pydoc
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybridattn.training.train import main

CONFIG = """
config:
  vocab_size: 258
  hidden_size: 96
  mixers: "1 window : 1 gla"
  num_hidden_layers: 4
  mixer_options: {window: {num_heads: 2, window: 64}, gla: {num_heads: 2, key_dim: 16}}
  input_conv_size: 4
  initializer: fan_in
tokenizer: bytes
length: 256
per_device_train_batch_size: 8
max_steps: 60
learning_rate: 5e-3
warmup_steps: 10
save_steps: 30
logging_steps: 15
report_to: none
"""


def write_texts(folder: Path) -> Path:
    """Texts to train on, one file each, of modules that every Python has."""
    folder.mkdir(exist_ok=True)
    for name in ("argparse", "collections", "datetime", "decimal", "email", "fractions", "json", "pathlib", "random"):
        (folder / f"{name}.txt").write_text(pydoc.plain(pydoc.render_doc(name)), encoding="utf-8")
    return folder


if __name__ == "__main__":
    texts = Path(sys.argv[1]) if len(sys.argv) > 1 else write_texts(Path("texts"))
    Path("pretrain.yaml").write_text(CONFIG, encoding="utf-8")
    # The same as: hybridattn train pretrain.yaml --data texts --output_dir runs/pretrain
    if code := main(["pretrain.yaml", "--data", str(texts), "--output_dir", "runs/pretrain"]):
        sys.exit(code)

    tokenizer = AutoTokenizer.from_pretrained("runs/pretrain")
    model = AutoModelForCausalLM.from_pretrained("runs/pretrain")
    torch.manual_seed(0)
    prompt = tokenizer("class ", add_special_tokens=False, return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=80, do_sample=True, temperature=0.7)
    print(tokenizer.decode(tokens[0]))
