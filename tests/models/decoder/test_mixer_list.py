"""Lists of mixers: patterns, entries with options of one layer, aliases."""

from typing import Any

import pytest

from hybridattn.models.decoder.mixer_list import LayerMixer, expand, layer_mixers, shared_options

LOCAL = {"mixer": "window", "window": 4}


def test_patterns_repeat_and_are_cut():
    assert expand("1 full : 2 gla", 6) == ["full", "gla", "gla"] * 2
    assert expand("1 full : 2 gla", 4) == ["full", "gla", "gla", "full"]
    assert expand("2 gla:1 window") == ["gla", "gla", "window"]
    assert expand("1 full : 2 gla", 2) == ["full", "gla"]


def test_aliases_stand_for_entries():
    aliases: dict[str, Any] = {"local": LOCAL, "plain": {"mixer": "gla"}, "softmax": "full"}
    assert expand("1 local : 1 plain : 1 softmax", aliases=aliases) == [LOCAL, "gla", "full"]
    assert expand(["local", {"mixer": "gla"}], 2, aliases) == [LOCAL, "gla"]


def test_options_of_a_layer_override_the_defaults_of_its_name():
    layers = layer_mixers(["window", LOCAL], {"window": {"window": 8, "num_heads": 2}})
    assert layers == [("window", {"window": 8, "num_heads": 2}), ("window", {"window": 4, "num_heads": 2})]


def test_shared_options_is_the_inverse_of_layer_mixers():
    layers = [LayerMixer("window", {"window": 8}), LayerMixer("gla", {"num_heads": 2}), LayerMixer("window", {})]
    mixers, defaults = shared_options([*layers, layers[1]])
    assert mixers == [{"mixer": "window", "window": 8}, "gla", {"mixer": "window"}, "gla"]
    assert defaults == {"gla": {"num_heads": 2}}
    assert layer_mixers(mixers, defaults) == [*layers, layers[1]]


@pytest.mark.parametrize(
    ("mixers", "options", "named"),
    [
        *((pattern, {}, "mixers: expected a pattern") for pattern in ("full : gla", "0 full", "1 full, 2 gla", "")),
        ([], {}, r"mixers: expected a list with a mixer for each layer, got \[\]"),
        (["gla"], {"num_layers": 2}, r"num_hidden_layers: expected 1 \(one per mixer\), got 2"),
        (["gla", {"window": 4}], {}, r"mixers\[1\]: expected a name or {\"mixer\": name, ..options}, got"),
        (["gla", 3], {}, r"mixers\[1\]: expected a name .* got 3"),
        ("1 local", {"aliases": {"local": {"window": 4}}}, r"mixer_aliases\['local'\]: expected a name"),
    ],
)
def test_errors_name_wrong_entries(mixers: Any, options: Any, named: str):
    with pytest.raises(ValueError, match=named):
        expand(mixers, **options)
