"""Architectures, and the warnings and errors about launch rows."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from triton.runtime.errors import OutOfResources

from hybridattn.kernels.runtime import architectures
from hybridattn.kernels.runtime.backend import choose_backend


@pytest.fixture(autouse=True)
def nothing_warned_yet():
    architectures.warn_of_launch.cache_clear()
    architectures._warn_of_architecture.cache_clear()


@pytest.mark.parametrize(
    ("name", "served"),
    [
        ("sm_90", "sm_90"),
        ("sm_86", "sm_80"),
        ("sm_89", "sm_80"),
        ("sm_103", "sm_100"),
        ("sm_120", "sm_80"),
        ("gfx942", "gfx942"),
        ("gfx950", "gfx942"),
    ],
)
def test_nearest_architecture(name: str, served: str):
    assert architectures.nearest_architecture(name) == served


def test_the_interpreter_has_the_rows_of_sm_90():
    assert architectures.architecture(torch.device("cpu")) == "sm_90"


def test_a_verified_row_of_a_known_architecture_does_not_warn():
    architectures.warn_of_launch("sm_90", "step K16", True)


def warnings_of(*rows: tuple[str, str, bool]) -> list[str]:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for row in rows:
            architectures.warn_of_launch(*row)
    return [str(x.message) for x in warned]


def test_an_unverified_row_warns_once():
    warned = warnings_of(("sm_90", "step K16", False), ("sm_90", "step K16", False), ("sm_90", "step K32", False))
    expected = "launch row 'step {}' was compiled for sm_90 but not verified on that GPU"
    assert warned == [expected.format(k) for k in ("K16", "K32")]


def test_another_architecture_warns_once_for_all_rows():
    warned = warnings_of(("sm_89", "step K16", True), ("sm_89", "step K32", True), ("sm_89", "step K16", True))
    assert warned == ["no launch rows for sm_89: using those of sm_80"]


def test_a_row_that_does_not_fit_is_named():
    with pytest.raises(RuntimeError, match="launch row 'step K16' does not fit sm_90: out of resource: shared memory"):  # noqa: SIM117
        with architectures.launching("step K16", torch.zeros(1)):
            raise OutOfResources(300_000, 232_448, "shared memory")


LACKS = "k: expected a key dim of at most 256, got 300"


def test_the_torch_backend_on_a_gpu_warns_once():
    architectures.warn_of_torch.cache_clear()
    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for lacks in (
            "k: expected a key dim of at most 256, got 300",
            None,
            "k: expected a key dim of at most 256, got 300",
        ):
            chosen = choose_backend(None, on_gpu, lacks)
            assert chosen == ("triton" if lacks is None else "torch")
        choose_backend(None, SimpleNamespace(is_cuda=True, dtype=torch.float64), "q: expected float32, got float64")
    assert [str(x.message) for x in warned] == [f"{LACKS}: unsupported by the Triton kernels, using the torch backend"]
