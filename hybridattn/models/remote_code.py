"""Remote-code module in checkpoints, so that ``trust_remote_code=True`` opens them without ``import hybridattn``.

transformers runs the module of the checkpoint that ``auto_map`` in its configuration names. The module only imports the
classes of the installed package.
"""

import os
from pathlib import Path

MODULE = "hybridattn_classes"
AUTO_CLASSES = {
    "AutoConfig": "Config",
    "AutoModel": "Model",
    "AutoModelForCausalLM": "ForCausalLM",
    "AutoModelForSequenceClassification": "ForSequenceClassification",
}


def auto_map(family: str) -> dict[str, str]:
    """Return ``auto_map``: Auto class -> module and name of the class, for class names that begin with ``family``."""
    return {auto: f"{MODULE}.{family}{ending}" for auto, ending in AUTO_CLASSES.items()}


def write(folder: str | os.PathLike, family: str) -> None:
    """Write the module into the checkpoint ``folder``; ``family`` is the prefix of the class names."""
    names = "".join(f"    {family}{ending},\n" for ending in AUTO_CLASSES.values())
    Path(folder, f"{MODULE}.py").write_text(
        f'"""The classes of this checkpoint: `pip install hybridattn`."""\n\nfrom hybridattn import (\n{names})\n'
    )
