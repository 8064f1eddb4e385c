"""README and the pages of docs/: their code runs, and the commands, names and links in them exist."""

import inspect
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer.main

import hybridattn
from hybridattn.cli import app
from hybridattn.evals.pareto.suite import load
from hybridattn.training.arguments import parse

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
PROSE = ["README.md", "CONTRIBUTING.md", "DESIGN.md", "CHANGELOG.md", "examples/README.md"]
FENCED = re.compile(r"```(\w*)\n(.*?)```", flags=re.DOTALL)
COMMAND = re.compile(r"^hybridattn (kernels [a-z]+|[a-z]+)([^\n#]*)", flags=re.MULTILINE)


def blocks(text: str) -> list[str]:
    """The Python of a page, block by block."""
    return [code for kind, code in FENCED.findall(text) if kind == "python"]


@pytest.mark.parametrize("code", blocks(README), ids=range(len(blocks(README))))
def test_block_of_readme_runs_alone(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize(
    "page",
    [pytest.param(x, marks=pytest.mark.slow if x == "training.md" else ()) for x in DOCS if blocks(DOCS[x])],
)
def test_blocks_of_a_page_run_one_after_the_other(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code in blocks(DOCS[page]):
        exec(compile(code, page, "exec"), names)


def commands(group: Any = None, prefix: str = "") -> dict[str, Any]:
    """Every verb of `hybridattn`, with its command."""
    found: dict[str, Any] = {}
    for name, command in (group or typer.main.get_command(app)).commands.items():
        found |= commands(command, f"{name} ") if hasattr(command, "commands") else {prefix + name: command}
    return found


def named_commands() -> list[tuple[str, str]]:
    """(verb, rest of the line) of every `hybridattn` command in a block, in an indented line or between backticks."""
    text = "\n".join([README, *DOCS.values()])
    fenced = "".join(code for _, code in FENCED.findall(text))
    rest = FENCED.sub("", text)
    lines = [*re.findall(r"^    (hybridattn .*)", rest, flags=re.MULTILINE), *re.findall(r"`(hybridattn [^`]*)`", rest)]
    return COMMAND.findall("\n".join([fenced.replace("\\\n", " "), *(line.replace("\n", " ") for line in lines)]))


def test_every_command_is_named_and_every_named_command_exists():
    assert {verb for verb, _ in named_commands()} == set(commands())


def test_named_flags_exist():
    """Of all commands but those that pass unknown flags on."""
    known = commands()
    for verb, rest in named_commands():
        if not known[verb].context_settings.get("ignore_unknown_options"):
            flags = {option for parameter in known[verb].params for option in parameter.opts}
            assert set(re.findall(r"--[a-z][\w-]*", rest)) <= flags, verb


def test_the_api_pages_have_every_public_name():
    objects = {}
    for path in re.findall(r"^::: (\S+)$", "\n".join(DOCS.values()), flags=re.MULTILINE):
        module, _, name = path.rpartition(".")
        objects[name] = getattr(import_module(module), name)
    public = {name: getattr(hybridattn, name) for name in hybridattn.__all__ if name != "__version__"}
    assert {name: objects.get(name) for name in public} == public
    assert all(inspect.getdoc(value) for value in objects.values())


@pytest.mark.parametrize("page", [*PROSE, *(f"docs/{name}" for name in DOCS)])
def test_links_lead_to_files_and_headings(page: str):
    """Links to names of the API are for the site's builder to check."""
    text = FENCED.sub("", (ROOT / page).read_text(encoding="utf-8"))
    for path, anchor in re.findall(r"\]\((?!\w+:)([^)\s#]*)#?([^)\s]*)\)", text):
        target = ((ROOT / page).parent / path) if path else ROOT / page
        assert target.exists(), path
        if anchor and not anchor.startswith("hybridattn."):
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\s-]", "", x).strip().lower().replace(" ", "-") for x in headings}


@pytest.mark.slow
def test_the_site_opens_without_a_network(tmp_path: Path):
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = [*tmp_path.glob("*.html")]
    assert {"index.html", "DESIGN.html", "CONTRIBUTING.html"} < {path.name for path in pages}
    for page in pages:
        loaded = re.findall(r"<(?:script|img|link|iframe)\b[^>]*(?:src|href)=[\"']?([^\"'\s>]+)", page.read_text())
        assert not [url for url in loaded if re.match(r"(\w+:)?//", url)]


def test_configurations_can_be_read(tmp_path: Path):
    readers = {"training.md": lambda file: parse([file]), "benchmarks.md": load}
    pages = {page for page, text in DOCS.items() if "```yaml" in text}
    assert pages == set(readers)
    for page in pages:
        for number, code in enumerate(code for kind, code in FENCED.findall(DOCS[page]) if kind == "yaml"):
            file = tmp_path / f"{number}-{page}.yaml"
            file.write_text(code, encoding="utf-8")
            assert readers[page](str(file))
