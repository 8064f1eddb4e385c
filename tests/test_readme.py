"""The README's examples, run as written."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_there_are_examples():
    assert len(EXAMPLES) == 5


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example_runs_as_written(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.slow
def test_commands_exist(run_python):
    """Every `hybridattn <verb>` that README names is a verb of the command."""
    verbs = set(
        re.findall(r"^    hybridattn ((?:kernels )?[a-z]+)", README.read_text(encoding="utf-8"), flags=re.MULTILINE)
    )
    assert verbs == {
        "convert",
        "demo",
        "eval",
        "info",
        "linearize",
        "pareto",
        "report",
        "throughput",
        "train",
        "kernels bench",
        "kernels check",
        "kernels compile",
        "kernels tune",
        "env",
    }
    run_python(f"""
from hybridattn.cli import main
for verb in {sorted(verbs)}:
    try:
        main([*verb.split(), "--help"])
    except SystemExit as ended:
        assert not ended.code, verb
""")
