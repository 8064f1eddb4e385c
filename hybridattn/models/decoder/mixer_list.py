"""Parsing of the ``mixers`` field: names, entries with options for one layer, aliases and patterns."""

import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

Entry = str | dict[str, Any]  # a mixer's name, or {"mixer": name, **options for this layer}


class LayerMixer(NamedTuple):
    """The mixer of one layer: its name and all its options."""

    name: str
    options: dict[str, Any]


def expand(
    mixers: str | Sequence[Entry], num_layers: int | None = None, aliases: Mapping[str, Entry] | None = None
) -> list[Entry]:
    """Expand a pattern and replace aliases; return one entry for each layer.

    Args:
        mixers: an entry or an alias for each layer, or a pattern of their names (see ``expand_pattern``).
        num_layers: number of layers; for a list it must be the list's length.
        aliases: additional names of entries.

    Raises:
        ValueError: a pattern, an entry or an alias has a wrong form, or the list does not have ``num_layers`` entries.
    """
    aliases = aliases or {}
    if isinstance(mixers, str):
        mixers = expand_pattern(mixers, num_layers)
    if not mixers:
        raise ValueError(f"mixers: expected a list with a mixer for each layer, got {mixers!r}")
    if num_layers not in (None, len(mixers)):
        raise ValueError(f"num_hidden_layers: expected {len(mixers)} (one per mixer), got {num_layers}")
    for alias, entry in aliases.items():
        _check_entry(f"mixer_aliases[{alias!r}]", entry)
    for layer, entry in enumerate(mixers):
        _check_entry(f"mixers[{layer}]", entry)
    entries = [aliases.get(entry, entry) if isinstance(entry, str) else entry for entry in mixers]
    return [_shortest(deepcopy(entry)) for entry in entries]  # an alias may name several layers


def expand_pattern(pattern: str, num_layers: int | None = None) -> list[str]:
    """Return the names that a pattern such as ``"1 full : 7 gla"`` stands for.

    The pattern is repeated, and its last repetition cut, to ``num_layers``. By default it is used once.

    Raises:
        ValueError: the pattern is not a list of "count name" between colons.
    """
    period: list[str] = []
    for part in pattern.split(":"):
        match = re.fullmatch(r"\s*([1-9]\d*)\s+([\w-]+)\s*", part)
        if match is None:
            raise ValueError(f"mixers: expected a pattern like '1 full : 7 gla', got {pattern!r}")
        period += [match[2]] * int(match[1])
    return [period[layer % len(period)] for layer in range(num_layers or len(period))]


def layer_mixers(mixers: Sequence[Entry], defaults: Mapping[str, dict[str, Any]]) -> list[LayerMixer]:
    """Return the mixer of each layer; an entry's options override the defaults of its name."""
    found = []
    for entry in mixers:
        own = {"mixer": entry} if isinstance(entry, str) else entry
        options = {name: value for name, value in own.items() if name != "mixer"}
        found.append(LayerMixer(own["mixer"], {**defaults.get(own["mixer"], {}), **options}))
    return found


def shared_options(layers: Iterable[LayerMixer]) -> tuple[list[Entry], dict[str, dict[str, Any]]]:
    """Return ``mixers`` and ``mixer_options`` for these layers: the inverse of ``layer_mixers``.

    Options that all layers of a name share become the defaults of that name; otherwise each entry holds its options.
    """
    layers = list(layers)
    defaults = {
        name: options
        for name, options in layers
        if all(other.options == options for other in layers if other.name == name)
    }
    return [name if name in defaults else {"mixer": name, **options} for name, options in layers], defaults


def describe(entry: Entry) -> str:
    """Return an entry as text, such as ``window (window=512)``."""
    if isinstance(entry, str):
        return entry
    options = ", ".join(f"{name}={value}" for name, value in entry.items() if name != "mixer")
    return f"{entry['mixer']} ({options})" if options else entry["mixer"]


def _check_entry(argument: str, entry: Any) -> None:
    if isinstance(entry, str):
        return
    if not isinstance(entry, dict) or not isinstance(entry.get("mixer"), str):
        raise ValueError(f'{argument}: expected a name or {{"mixer": name, ..options}}, got {entry!r}')


def _shortest(entry: Entry) -> Entry:
    """Return an entry without options as its name."""
    return entry if isinstance(entry, str) or len(entry) > 1 else entry["mixer"]
