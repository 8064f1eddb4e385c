"""Suites: models, how they are trained, and what is measured of them, from a YAML file or from arguments."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError

from hybridattn.evals.recall import mqar
from hybridattn.evals.speed.models import configuration, definition
from hybridattn.models.decoder.configuration import without_models

SUITES = Path(__file__).parent / "suites"
FORMS = ("mixers", "preset", "path", "config")  # of a model in a suite's file
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Suite:
    """Everything that determines a run.

    Attributes:
        models: by name, ``model`` (see `models.definition`) and ``steps`` of training on MQAR, None for none. The first
            one is the baseline that speeds are compared with.
        device: "cpu" or "cuda".
        dtype: of the timed model; training is in fp32.
        threads: per operation, on a CPU, of everything that is timed.
        rounds: their number; every model is timed once in each.
        seconds: of samples per time and round at least.
        procedure: of `mqar.PROCEDURES`.
        seeds: models trained per rate.
        rates: learning rates; the one with the best median recall counts.
        looks: steps between two tests of recall, the points of a learning curve.
        state: tokens after which caches are measured.
        prefill: prompt lengths, one sequence.
        decode: (context, batch) of the timed steps.
        graphs: decode with CUDA graphs as well.
        training: row lengths of forward and backward, one sequence.
        memory: ``tokens`` and ``budget``, bytes of the largest batch; None: not measured.

    Raises:
        ValueError: a wrong value; the message names the attribute, what was expected and what was given.
    """

    models: dict[str, dict[str, Any]]
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    rounds: int = 5
    seconds: float = 0.2
    procedure: str = "recipe"
    seeds: Sequence[int] = (0,)
    rates: Sequence[float] = (1e-2,)
    looks: int = 50
    state: Sequence[int] = ()
    prefill: Sequence[int] = ()
    decode: Sequence[Sequence[int]] = ()
    graphs: bool = False
    training: Sequence[int] = ()
    memory: dict[str, int] | None = None

    def __post_init__(self) -> None:
        _expect("models", bool(self.models), "at least one", self.models)
        for name in self.models:  # in tables and pictures; matplotlib leaves names out that begin with _
            _expect("models", name.isprintable() and not name.startswith("_"), "printable names without _ first", name)
        _expect("device", self.device in ("cpu", "cuda"), "'cpu' or 'cuda'", self.device)
        _expect("dtype", str(self.dtype) in DTYPES, f"one of {sorted(DTYPES)}", self.dtype)
        _expect(
            "procedure", str(self.procedure) in mqar.PROCEDURES, f"one of {sorted(mqar.PROCEDURES)}", self.procedure
        )
        for name in ("threads", "rounds", "looks"):
            _expect(name, _is_positive(getattr(self, name)), "a positive integer", getattr(self, name))
        for name in ("state", "prefill", "training"):
            _expect(name, _are_positive(getattr(self, name)), "positive integers", getattr(self, name))
        pairs = _is_list(self.decode) and all(_are_positive(pair) and len(pair) == 2 for pair in self.decode)
        _expect("decode", pairs, "pairs (context, batch) of positive integers", self.decode)
        _expect(
            "seconds", _is_number(self.seconds) and 0 <= self.seconds < math.inf, "a number of at least 0", self.seconds
        )
        _expect("graphs", not self.graphs or self.device == "cuda", "false on a CPU", self.graphs)
        is_budget = self.memory is None or (
            isinstance(self.memory, dict)
            and set(self.memory) == {"tokens", "budget"}
            and _are_positive([*self.memory.values()])
        )
        _expect("memory", is_budget, "tokens and budget, positive integers", self.memory)
        _expect(
            "seeds",
            _is_list(self.seeds) and all(isinstance(x, int) and not isinstance(x, bool) for x in self.seeds),
            "integers",
            self.seeds,
        )
        # YAML takes 1e-2 for a text, and 1.0e-2 for a number.
        rates = _is_list(self.rates) and all(_is_number(rate) and 0 < rate < math.inf for rate in self.rates)
        _expect("rates", rates, "numbers above 0", self.rates)
        if any(entry["steps"] for entry in self.models.values()):
            _expect("seeds", bool(self.seeds), "at least one", self.seeds)
            _expect("rates", bool(self.rates), "at least one", self.rates)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _are_positive(values: Any) -> bool:
    return _is_list(values) and all(map(_is_positive, values))


def _expect(name: str, holds: bool, expected: str, value: Any) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def load(name: str) -> Suite:
    """Read a shipped suite, by name, or a YAML file.

    Its fields are those of `Suite`, and ``shared``, a configuration that every model with ``mixers`` takes what it does
    not say itself from; ``mixer_options`` are merged, and those of mixers it does not have left out. A model has
    ``mixers`` (a list or a pattern, beside other fields of a configuration), ``preset``, ``path`` or ``config``, and
    ``steps`` where it is to be trained.

    Raises:
        ValueError: no such suite, a field that there is not, or a wrong value.
    """
    shipped = sorted(path.stem for path in SUITES.glob("*.yaml"))
    file = SUITES / f"{name}.yaml" if name in shipped else Path(name)
    if not file.is_file():
        raise ValueError(f"suite: expected one of {shipped} or a YAML file, got {name!r}")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: expected YAML, got: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("models"), dict):
        raise ValueError(f"{file}: expected a mapping with models, by name")
    shared = content.pop("shared", {})
    _expect("shared", isinstance(shared, dict), "a mapping", shared)
    known = {each.name for each in fields(Suite)}
    if unknown := sorted(map(str, set(content) - known)):
        raise ValueError(f"{file}: expected fields of {sorted(known)}, got {unknown}")
    models = {str(label): _model(str(label), entry, shared) for label, entry in content.pop("models").items()}
    return Suite(models=models, **content)


def _model(label: str, entry: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    _expect("models", isinstance(entry, dict), f"a mapping of {label!r}", entry)
    entry = dict(entry)
    steps = entry.pop("steps", None)
    forms = [form for form in FORMS if form in entry]
    if len(forms) != 1 or (forms != ["mixers"] and len(entry) != 1):
        raise ValueError(f"models: expected {label!r} with one of {list(FORMS)}, got {sorted(entry)}")
    if forms != ["mixers"]:
        _expect("steps", steps is None, f"none where {forms[0]} is given ({label})", steps)
        return {"model": definition(entry), "steps": None}
    for each in (shared, entry):
        given = each.get("mixer_options", {})
        is_mapping = isinstance(given, dict) and all(isinstance(options, dict) for options in given.values())
        _expect("mixer_options", is_mapping, f"a mapping of mappings ({label})", given)
    wanted = entry["mixers"]
    _expect("mixers", isinstance(wanted, str | list), f"a list or a pattern ({label})", wanted)
    _expect("steps", steps is None or _is_positive(steps), f"a positive integer ({label})", steps)
    defaults, own = shared.get("mixer_options", {}), entry.get("mixer_options", {})
    merged = {name: defaults.get(name, {}) | own.get(name, {}) for name in defaults | own}
    given = {**shared, **entry, "mixer_options": merged}
    try:
        with without_models():
            config = configuration({"config": given})
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ValueError(f"models: expected a configuration of {label!r}, got: {error}") from error
    used = {mixer.name for mixer in config.layer_mixers}
    given["mixer_options"] = {name: options for name, options in merged.items() if name in used}
    return {"model": {"config": given}, "steps": steps}
