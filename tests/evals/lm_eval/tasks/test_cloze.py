"""The published tasks, with local files of the same schema in place of the Hub's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hybridattn.evals.lm_eval.tasks import TASKS

ROWS = [
    {
        "context": "[DOC] [TLE] The Rhone meets the Saone in Lyon... The city where they meet is",
        "question": "The city where they meet is",
        "orig_question": "Where does the Rhone meet the Saone?:",
        "answers": ["Lugdunum", "Lyon"],
    },
    {
        "context": "The bridge was opened in 1932 and closed in 1951.",
        "question": "The bridge was closed in",
        "orig_question": "When was the bridge closed?",
        "answers": ["1951"],
    },
]
CONTEXTS = ["The Rhone meets the Saone in Lyon.", "The bridge was opened in 1932 and closed in 1951."]
ONCE = [f"{context} {row['question']}" for context, row in zip(CONTEXTS, ROWS, strict=True)]
TWICE = [
    f"Where does the Rhone meet the Saone? {CONTEXTS[0]}\n{ONCE[0]}",
    f"When was the bridge closed? {CONTEXTS[1]}\n{ONCE[1]}",
]


@pytest.mark.parametrize("task", sorted(path.stem for path in Path(TASKS).glob("based_*.yaml")))
def test_prompts_and_scores(
    task: str,
    evaluate: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "local.yaml").write_text(
        f"include: {TASKS / task}.yaml\n"
        "task: local\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{validation: {rows}}}}}\n"
    )
    answers = dict(zip(TWICE if task.endswith("_twice") else ONCE, [" lyon, France", " 1932"], strict=True))
    samples = evaluate(answers.__getitem__, ["local"], tmp_path)["samples"]["local"]
    assert [sample["contains"] for sample in samples] == [1.0, 0.0]
    assert [sample["arguments"][0][1]["until"] for sample in samples] == [["\n"], ["\n"]]


def test_tasks_of_the_hub_name_their_data():
    paths = {path.stem: path.read_text() for path in Path(TASKS).glob("based_*.yaml")}
    assert len(paths) == 10
    for task, text in paths.items():
        assert f"dataset_path: hazyresearch/{task.removesuffix('_twice')}\n" in text
