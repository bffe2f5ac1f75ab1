"""`developer-docs/adding-a-family.md` is true: what it says, done in a copy of the project, adds a family that all tests accept."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from litgpt.families import FAMILIES

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "developer-docs" / "adding-a-family.md").read_text()
BLOCK = re.compile(r"^`([\w/.]+)`(?:, ([^\n]+))?\n\n```python\n(.*?)```", re.M | re.S)
COMMANDS = re.compile(r"^```bash\n(.*?)```", re.M | re.S)


def test_what_the_page_says_adds_a_family(tmp_path):
    assert "seed_oss" not in FAMILIES, "the page adds a family that is there: choose another one for it"
    for folder in ("litgpt", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    blocks = BLOCK.findall(PAGE)
    assert [where for _, where, _ in blocks] == ["", "after the other imports", "at the end of the list", ""]
    for path, where, code in blocks:
        file = tmp_path / path
        if not where:
            file.write_text(code)
            continue
        text, marker = file.read_text(), "\nFAMILIES: dict" if where == "after the other imports" else "    )\n}\n"
        assert text.count(marker) == 1
        file.write_text(text.replace(marker, code + marker))
    first, last = COMMANDS.findall(PAGE)
    facts = _run(first, tmp_path)
    assert "SeedOssConfig" in facts and "model.layers.0.self_attn.o_proj.weight" in facts
    report = _run(last.replace("pytest ", "pytest -q -p no:cacheprovider -p no:randomly "), tmp_path)
    assert re.search(r"^\d{2,} passed", report, re.M) and "failed" not in report, report[-3000:]


def _run(command: str, folder: Path) -> str:
    environment = os.environ | dict(PYTHONPATH=str(folder), PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}", OMP_NUM_THREADS="1")
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    return done.stdout + done.stderr
