"""Load or create the models to measure, from a preset, a folder, a name on the Hub, or a configuration."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from hybridattn.measure.provenance import json_sha256
from hybridattn.models.decoder import HybridAttnConfig
from hybridattn.models.presets import PRESETS

WEIGHTS = ("*.safetensors", "*.bin")


def named(name: str) -> dict[str, Any]:
    """Return the definition for a name on the command line: a preset, or else a folder or a name on the Hub."""
    return {"preset": name} if name in PRESETS else {"path": name}


def definition(given: dict[str, Any]) -> dict[str, Any]:
    """Check a model's definition; for a local folder, add a hash of its files, so that changed files change the key.

    Args:
        given: exactly one of ``preset``, ``path`` and ``config``. A ``config`` has the fields of a configuration, with
            ``model_type`` for a model of transformers.

    Raises:
        ValueError: not exactly one of these, an unknown preset, or a folder without config.json.
    """
    forms = [form for form in ("preset", "path", "config") if form in given]
    if len(forms) != 1 or len(given) != 1:
        raise ValueError(f"model: expected one of preset, path and config, got {sorted(given)}")
    if not isinstance(given.get("path", ""), str):
        raise ValueError(f"path: expected a folder or a name on the Hub, got {given['path']!r}")
    if "preset" in given and str(given["preset"]) not in PRESETS:
        raise ValueError(f"preset: expected one of {sorted(PRESETS)}, got {given['preset']!r}")
    folder = Path(given.get("path", ""))
    if "path" not in given or not folder.exists():  # a path that does not exist may be a name on the Hub
        return given
    if not (folder / "config.json").is_file():
        raise ValueError(f"path: expected a folder with config.json, got {folder}")
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in _weights(folder)]
    return {**given, "files": json_sha256([(folder / "config.json").read_text(encoding="utf-8"), files])}


def configuration(given: dict[str, Any]) -> PreTrainedConfig:
    """Return the configuration of a model's definition."""
    if "preset" in given:
        return PRESETS[given["preset"]]()
    if "path" in given:
        return AutoConfig.from_pretrained(given["path"])
    fields = dict(given["config"])
    return AutoConfig.for_model(**fields) if "model_type" in fields else HybridAttnConfig(**fields)


def build(given: dict[str, Any], *, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> PreTrainedModel:
    """Load or create the model of a definition, in evaluation mode; random weights if none are stored.

    Raises:
        ValueError: there is no model at the path.
    """
    torch.manual_seed(seed)
    path = given.get("path")
    try:
        if path is not None and (not Path(path).exists() or _weights(Path(path))):
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        else:
            model = AutoModelForCausalLM.from_config(configuration(given), dtype=dtype)
    except OSError as error:
        raise ValueError(f"model: expected a preset, a folder or a name on the Hub, got {path!r}: {error}") from error
    return model.to(device).eval()  # pyright: ignore[reportArgumentType]


def _weights(folder: Path) -> list[Path]:
    return sorted(path for pattern in WEIGHTS for path in folder.glob(pattern))
