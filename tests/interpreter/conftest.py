"""Kernels on a CPU, in Triton's interpreter: a pytest process of its own, since Triton reads TRITON_INTERPRET once.

    TRITON_INTERPRET=1 pytest tests/interpreter

Any other run collects nothing here. Shapes are tiny: the interpreter runs a program at a time, in NumPy. That
torch.empty is filled with NaN (tests/conftest.py) poisons every output.
"""

import os
from collections.abc import Iterator

import pytest

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def exact_bf16() -> Iterator[None]:
    from hybridattn.workshop.interpreter_bf16 import exact_bf16

    with exact_bf16():
        yield
