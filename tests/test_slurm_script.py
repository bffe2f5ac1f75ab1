"""The script for clusters, with stand-ins for the two programs of SLURM that it calls."""

import os
import subprocess
from pathlib import Path

import pytest

from litgpt import cli

SCRIPT = Path(__file__).parents[1] / "examples" / "slurm.sh"
SRUN = '#!/bin/bash\nprintf "%s\\n" "$@" > srun.txt\nexit "$CODE"\n'
SCONTROL = '#!/bin/bash\necho "$@" > scontrol.txt\n'


@pytest.fixture
def run_script(tmp_path, monkeypatch):
    """Runs the script in a job of two machines, in which the training ends with a code; returns the script's own."""
    monkeypatch.chdir(tmp_path)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "4", "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def run(code: int) -> int:
        return subprocess.run(["bash", SCRIPT], env=job | {"CODE": str(code)}, timeout=30).returncode

    return run


@pytest.mark.parametrize(("code", "goes_on"), [(138, True), (0, False), (1, False), (143, False)])
def test_a_job_is_queued_again_only_if_its_time_was_over(run_script, code, goes_on):
    assert run_script(code) == code
    assert Path("scontrol.txt").exists() == goes_on
    if goes_on:
        assert Path("scontrol.txt").read_text() == "requeue 7\n"


def test_the_command_is_one_that_we_know(run_script, capsys):
    run_script(0)
    _, program, *argv = Path("srun.txt").read_text().splitlines()
    assert program == ".venv/bin/litgpt"
    assert cli.main([*argv, "--print_config"]) == 0
    shown = capsys.readouterr().out
    assert all(line in shown for line in ("devices: 4\n", "num_nodes: 2\n", "strategy: fsdp\n", "resume: auto\n"))
