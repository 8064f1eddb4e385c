"""What the site's reader of source code, griffe, has to be told about this package."""

import re
from pathlib import Path
from typing import Any

import griffe

# "    q, k: [B,T,H,K] .." and its further lines, which are indented by eight.
SEVERAL = re.compile(r"^    (\w+(?:(?:, | or )\w+)+): (.*(?:\n {8}.*)*)", flags=re.MULTILINE)
ONE = re.compile(r"^    (\w+): .*(?:\n {8}.*)*", flags=re.MULTILINE)


class Hybridattn(griffe.Extension):
    """Find folders without ``__init__.py``, and read the docstrings as they are written here."""

    def on_module_instance(self, *, mod: griffe.Module, **kwargs: Any) -> None:
        """griffe skips folders without ``__init__.py`` below a package, unless their modules are there already."""
        if mod.path == "hybridattn" and isinstance(mod.filepath, Path):
            for folder in sorted(mod.filepath.parent.iterdir()):
                if folder.is_dir() and not (folder / "__init__.py").exists():
                    mod.set_member(folder.name, griffe.Module(folder.name, filepath=folder / "__init__.py"))

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Give each of several names its own entry, and the fields of a configuration their types and defaults."""
        if obj.docstring is None:
            return
        text = SEVERAL.sub(_one_by_one, obj.docstring.value)
        text = re.sub(r"^    (Other arguments as in .*)$", r"\n\1", text, flags=re.MULTILINE)
        if obj.is_class and "__init__" not in obj.members:
            values = {name: field.value for name, field in obj.attributes.items() if field.value is not None}
            text = re.sub(r"^Args:$", "Attributes:", text, flags=re.MULTILINE)
            text = ONE.sub(lambda entry: entry[0] + _default(values.get(entry[1])), text)
        obj.docstring.value = text


def _one_by_one(entry: re.Match[str]) -> str:
    return "\n".join(f"    {name}: {entry[2]}" for name in re.split(", | or ", entry[1]))


def _default(value: Any) -> str:
    return "" if value is None or str(value).startswith("field(") else f" Default: ``{value}``."
