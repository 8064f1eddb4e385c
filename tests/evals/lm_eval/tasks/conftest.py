from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from hybridattn.evals.lm_eval.tasks import TASKS
from hybridattn.training.byte_corpus import byte_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


class Reader(LM):
    """A model of lm-eval that answers a prompt by a function of its text."""

    def __init__(self, answer: Callable[[str], str]):
        super().__init__()
        self.answer = answer

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        return [self.answer(request.args[0]) for request in requests]

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list:
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


@pytest.fixture
def evaluate() -> Callable[..., dict[str, Any]]:
    """evaluate(answer, tasks, folder=None, **metadata) -> lm-eval's results for a function from prompt to answer.

    `folder` holds further tasks.
    """

    def run(
        answer: Callable[[str], str], tasks: list[str], folder: Path | None = None, **metadata: Any
    ) -> dict[str, Any]:
        manager = TaskManager(
            include_path=[TASKS, *([folder] if folder else [])], include_defaults=False, metadata=metadata
        )
        results = simple_evaluate(model=Reader(answer), tasks=tasks, task_manager=manager, bootstrap_iters=0)
        assert results is not None
        return results

    return run
