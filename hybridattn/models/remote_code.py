"""What a checkpoint carries so that it opens in a program that never imported hybridattn.

With ``trust_remote_code=True`` transformers runs a module that lies in the checkpoint and is named in ``auto_map`` of
its configuration. Ours only imports the installed classes: the code itself comes with the package.
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
    """Auto class -> where its class is, for the classes whose names begin with ``family``."""
    return {auto: f"{MODULE}.{family}{ending}" for auto, ending in AUTO_CLASSES.items()}


def write(folder: str | os.PathLike, family: str) -> None:
    """Write the module into a checkpoint."""
    names = "".join(f"    {family}{ending},\n" for ending in AUTO_CLASSES.values())
    Path(folder, f"{MODULE}.py").write_text(
        f'"""The classes of this checkpoint: `pip install hybridattn`."""\n\nfrom hybridattn import (\n{names})\n'
    )
