"""One small server for all tests that only talk to it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from deploy.serving import Served, serving
from speaking import make_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny chat model with random weights."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="session")
def server(checkpoint: Path) -> Iterator[Served]:
    """A server of that model, for all tests that leave it as it is."""
    with serving(checkpoint) as served:
        yield served
