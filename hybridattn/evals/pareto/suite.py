"""Define and load suites: models, their training, and the measurements to make, from a YAML file or arguments."""

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
FORMS = ("mixers", "preset", "path", "config")  # the ways to define a model in a suite's file; exactly one is given
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Suite:
    """Everything that determines a run.

    Attributes:
        models: by name, ``model`` (see `models.definition`) and ``steps`` of training on MQAR, or None for no training.
            The first model is the baseline of speed comparisons.
        device: "cpu" or "cuda".
        dtype: dtype of the timed model; training is in fp32.
        threads: threads per operation on a CPU, for timings.
        rounds: number of rounds; every model is timed once in each.
        seconds: minimum total time of the samples of a timing in a round.
        procedure: a name in `mqar.PROCEDURES`.
        seeds: seeds of the models that are trained for each rate.
        rates: learning rates; the one with the best median recall counts.
        looks: steps between two tests of recall, the points of a learning curve.
        state: numbers of tokens after which the size of the cache is measured.
        prefill: prompt lengths in tokens, for one sequence.
        decode: (context in tokens, batch) of the timed decoding steps.
        graphs: whether to time decoding also with CUDA graphs.
        training: row lengths in tokens for forward and backward, for one sequence.
        memory: ``tokens`` of the prompts and ``budget`` in bytes for the search of the largest batch; None for none.

    Raises:
        ValueError: a wrong value; the message has the attribute, the expected and the given value.
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
        for name in self.models:  # matplotlib omits labels that start with _
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
        # YAML reads 1e-2 as a string, and 1.0e-2 as a number.
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
    """Read a suite from the package, by name, or from a YAML file.

    The file has the fields of `Suite` and ``shared``, default fields of the configurations of all models with
    ``mixers``. ``mixer_options`` are merged, without those of mixers that the model does not have. A model has one of
    ``mixers`` (a list or a pattern, with other fields of a configuration), ``preset``, ``path`` and ``config``; with
    ``mixers`` it may have ``steps`` of training.

    Raises:
        ValueError: no such suite, an unknown field, or a wrong value.
    """
    shipped = sorted(path.stem for path in SUITES.glob("*.yaml"))
    file = SUITES / f"{name}.yaml" if name in shipped else Path(name)
    if not file.is_file():
        raise ValueError(f"suite: expected one of {shipped} or a YAML file, got {name!r}")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: expected YAML, got an error: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("models"), dict):
        raise ValueError(f"{file}: expected a mapping with the field models, a mapping by name, got {content!r:.50}")
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
        raise ValueError(f"models: expected a valid configuration of {label!r}, got an error: {error}") from error
    used = {mixer.name for mixer in config.layer_mixers}
    given["mixer_options"] = {name: options for name, options in merged.items() if name in used}
    return {"model": {"config": given}, "steps": steps}
