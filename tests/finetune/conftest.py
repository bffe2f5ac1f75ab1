"""What the tests of finetuning share."""

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of ragged samples that can be learned by heart."""
    file = tmp_path_factory.mktemp("data") / "samples.json"
    file.write_text(json.dumps([{"instruction": f"Say {i}", "output": "yes " * (1 + i % 5)} for i in range(20)]))
    return file
