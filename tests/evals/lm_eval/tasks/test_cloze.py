"""The published cloze tasks, on local files with the schema of the data on the Hub."""

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


def test_prompts_and_scores(evaluate: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tasks = sorted(path.stem for path in Path(TASKS).glob("based_*.yaml"))
    for task in tasks:
        (tmp_path / f"{task}.yaml").write_text(
            f"include: {TASKS / task}.yaml\n"
            f"task: local_{task}\n"
            "dataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{validation: {rows}}}}}\n"
        )
    answers = dict(zip(ONCE + TWICE, 2 * [" lyon, France", " 1932"], strict=True))
    found = evaluate(answers.__getitem__, [f"local_{task}" for task in tasks], tmp_path)["samples"]
    for task in tasks:
        samples = found[f"local_{task}"]
        prompts, options = zip(*(sample["arguments"][0] for sample in samples), strict=True)
        assert list(prompts) == (TWICE if task.endswith("_twice") else ONCE)
        assert [sample["contains"] for sample in samples] == [1.0, 0.0]
        assert [each["until"] for each in options] == [["\n"], ["\n"]]


def test_tasks_of_the_hub_name_their_data():
    paths = {path.stem: path.read_text() for path in Path(TASKS).glob("based_*.yaml")}
    assert len(paths) == 10
    for task, text in paths.items():
        assert f"dataset_path: hazyresearch/{task.removesuffix('_twice')}\n" in text
