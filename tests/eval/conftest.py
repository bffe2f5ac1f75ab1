"""Checkpoints and tasks that all tests of evaluation share."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tasks import make_checkpoint, make_tasks
from torch.utils import collect_env


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Callable[..., Path]:
    """Makes a tiny random checkpoint, each once; see `make_checkpoint`."""
    folder, made = tmp_path_factory.mktemp("checkpoints"), {}

    def make(*kind: str | int) -> Path:
        if kind not in made:
            torch.manual_seed(1234)  # whichever test comes first
            made[kind] = make_checkpoint(folder / "-".join(map(str, ("tiny", *kind))), *kind)
        return made[kind]

    return make


@pytest.fixture(scope="session")
def tasks(tmp_path_factory) -> Path:
    """A folder with tasks."""
    return make_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(autouse=True)
def own_data_cache(tmp_path, monkeypatch):
    """What datasets keeps goes into the test's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(autouse=True)
def nothing_about_this_machine(monkeypatch):
    """Leave out of the results what lm-eval starts pip and ten other processes for, in each evaluation."""
    monkeypatch.setattr(collect_env, "get_pretty_env_info", lambda: "")
