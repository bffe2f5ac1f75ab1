"""Real runs on two processes over gloo: they learn what one process learns, and when one of them is killed the other ends too."""

import json
import signal
import socket
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import torch
from finetune.run_and_kill import run_on_ranks
from finetune.several import be_rank
from forked import fork
from safetensors.torch import load_file
from speaking import make_tokenizer
from tiny import tiny_config
from torch import Tensor

from litgpt.args import EvalArgs, OptimizerArgs, TrainArgs
from litgpt.checkpoint import write_checkpoint
from litgpt.data import JSON
from litgpt.finetune import adapter_v2, full, lora
from litgpt.metrics import Journal
from litgpt.model import GPT

N_STEPS, RATE = 20, 1e-3
METHODS: dict[str, tuple[Any, str, dict[str, Any], dict[str, Any]]] = {  # module, family, its options, those of `train`
    "lora": (lora, "llama", dict(lora_dropout=0.0), {}),
    "dora": (lora, "llama", dict(lora_dropout=0.0, lora_dora=True, lora_targets="all-linear"), {}),
    "full": (full, "llama", {}, {}),
    "adapter_v2": (adapter_v2, "llama", {}, {}),
    "experts": (full, "mixtral", {}, dict(expert_balance=0.5, micro_batch_size=1, packing=False)),  # balanced in each sample
}
LAYOUTS = {"ddp": dict(strategy="ddp"), "fsdp": dict(strategy="fsdp"), "offload": dict(strategy="fsdp", cpu_offload=True)}
PAIRS = [(method, layout) for method in METHODS for layout in ("ddp", "fsdp")] + [("dora", "offload"), ("full", "offload")]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of each family."""
    folder, found = tmp_path_factory.mktemp("bases"), {}
    vocab = make_tokenizer(folder / "tokenizer")
    for family in ("llama", "mixtral"):
        config = tiny_config(family, vocab_size=vocab, padded_vocab_size=vocab, block_size=256)
        torch.manual_seed(0)
        write_checkpoint(folder / family, GPT(config).state_dict(), config, source=folder / "tokenizer")
        found[family] = folder / family
    return found


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ragged samples. Of a step's five one rank gets three and the other two; the last step of an epoch leaves the other idle."""
    file = tmp_path_factory.mktemp("data") / "samples.json"
    file.write_text(json.dumps([{"instruction": f"Say {i}", "output": "yes " * (1 + i % 5)} for i in range(18)]))
    return file


def options(samples: Path, out_dir: Path, train: dict[str, Any], **more: Any) -> dict[str, Any]:
    train = dict(global_batch_size=5, micro_batch_size=2, max_steps=N_STEPS, save_interval=None) | train
    made = dict(out_dir=out_dir, precision="32-true", data=JSON(samples, val_split_fraction=0.1), train=TrainArgs(**train))
    made |= dict(eval=EvalArgs(interval=10, max_new_tokens=None, final_validation=False), optimizer=OptimizerArgs(lr=RATE))
    return made | more


@pytest.fixture(scope="module")
def runs(bases: dict[str, Path], samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each method on one process, and on two in several layouts."""
    place, shared = tmp_path_factory.mktemp("runs"), []
    for method, (module, family, own, train) in METHODS.items():
        module.setup(bases[family], **options(samples, place / method, train, **own))
        layouts = [layout for name, layout in PAIRS if name == method]
        flags = {layout: options(samples, place / f"{method} {layout}", train, **own, **LAYOUTS[layout]) for layout in layouts}
        shared += [(module.__name__, bases[family], made) for made in flags.values()]
    assert run_on_ranks("finetune.several", 2, *shared, timeout=300) == [0, 0]
    return place


def logged(out_dir: Path, column: str) -> list[float]:
    return [row[column] for row in Journal(out_dir / "logs" / "metrics.jsonl").rows() if column in row]


def learned(out_dir: Path) -> Tensor:
    """All numbers of what a run leaves."""
    files = sorted((out_dir / "final").rglob("*.safetensors"))
    return torch.cat([tensor.flatten() for file in files for _, tensor in sorted(load_file(file).items())])


@pytest.mark.parametrize(("method", "layout"), PAIRS)
def test_two_processes_learn_what_one_does_also_where_one_has_less_data_or_none(runs: Path, method: str, layout: str):
    alone, both = runs / method, runs / f"{method} {layout}"
    assert len(logged(alone, "loss")) == N_STEPS
    for column, tolerance in (("loss", 1e-5), ("val_loss", 1e-5), ("grad_norm", 1e-4), ("total_tokens", 0)):
        assert logged(both, column) == pytest.approx(logged(alone, column), rel=tolerance), column
    difference = (learned(both) - learned(alone)).abs().max()
    assert difference < 0.01 * RATE, "sums in another order cost a hundredth of what a number moves in one step, in all steps together"


def test_balancing_experts_changes_what_is_learned_and_not_the_loss_that_is_logged(
    runs: Path, bases: dict[str, Path], samples: Path, tmp_path: Path
):
    module, family, own, train = METHODS["experts"]
    module.setup(bases[family], **options(samples, tmp_path, train | dict(expert_balance=None, max_steps=2), **own))
    assert logged(tmp_path, "loss")[0] == logged(runs / "experts", "loss")[0]
    assert logged(tmp_path, "grad_norm")[0] < logged(runs / "experts", "grad_norm")[0]


def test_a_sharded_run_goes_on_from_a_step_whose_example_answer_was_not_told(bases: dict[str, Path], samples: Path, tmp_path: Path):
    """The answer is then what the model does first; `save_best` saves the step before it."""
    out_dir, shared = tmp_path / "out", []
    for n, resume in ((2, False), (3, out_dir / "step-000002")):
        made = options(samples, out_dir, dict(max_steps=n), strategy="fsdp", resume=resume)
        made["eval"] = EvalArgs(interval=2, max_new_tokens=2, save_best=True, final_validation=False)
        shared.append((full.__name__, bases["llama"], made))
    assert run_on_ranks("finetune.several", 2, *shared, timeout=120) == [0, 0]
    assert [row["step"] for row in Journal(out_dir / "logs" / "metrics.jsonl").rows() if "answer" in row] == [0, 2, 3]


# A process that is gone


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def on_two(words: list[str], said: Path, killed: int | None = None) -> tuple[list[int], list[str]]:
    """The exit codes of two processes of a command, one of which is killed within its fifth step, and what they say of errors."""
    port = free_port()
    ranks = [fork(be_rank, rank, 2, port, 5 if rank == killed else 0, words, said) for rank in (0, 1)]
    for rank in ranks:
        rank.join(120)
        rank.kill()
    return [rank.exitcode for rank in ranks], [(said / f"err-{rank}").read_text().strip() for rank in (0, 1)]


@pytest.mark.parametrize(("killed", "layout"), [(1, "ddp"), (0, "fsdp")])
def test_when_a_process_is_killed_the_other_ends_soon_with_one_line_and_the_run_goes_on(
    runs: Path, bases: dict[str, Path], samples: Path, tmp_path: Path, killed: int, layout: str
):
    flags = {"data": "JSON", "data.json_path": samples, "data.val_split_fraction": 0.1, "precision": "32-true", "devices": 2}
    flags |= {"train.global_batch_size": 5, "train.micro_batch_size": 2, "train.max_steps": N_STEPS, "train.save_interval": 3}
    flags |= {"eval.interval": 10, "eval.max_new_tokens": "null", "eval.final_validation": False, "optimizer.lr": RATE}
    flags |= {"out_dir": tmp_path / "out", "strategy": layout, "resume": "auto"}
    words = ["finetune_full", str(bases["llama"]), *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]
    began, other = monotonic(), 1 - killed
    codes, said = on_two(words, tmp_path, killed)
    assert monotonic() - began < 100 and (codes[killed], codes[other]) == (-signal.SIGKILL, 2)
    assert "Another process of this run ended" in said[other] and "Go on from step-000003 with `--resume true`" in said[other]
    assert "\n" not in said[other]
    assert on_two(words, tmp_path)[0] == [0, 0]
    assert logged(tmp_path / "out", "loss") == pytest.approx(logged(runs / "full", "loss"), rel=1e-5)
