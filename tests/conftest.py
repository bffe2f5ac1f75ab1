"""Settings that all tests share."""

import gc
import os
from collections.abc import Generator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest
import torch


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect tests, but no garbage: what is imported, a million objects, stays, and looking through it took a third of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True)
def one_thread_and_fixed_seed():
    """Tests run two at a time on two cores, and random models must be the same everywhere."""
    torch.set_num_threads(1)
    torch.manual_seed(1234)
