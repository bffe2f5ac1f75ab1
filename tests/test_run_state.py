"""Step folders as users damage them: none is taken for a whole one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import workers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from litgpt import names, run_state
from litgpt.args import OptimizerArgs
from litgpt.errors import MissingFile, UserError
from litgpt.optim import make_optimizer, set_learning_rate
from litgpt.weight_files import read_raw

DCP = "DCP_SHARDING_INFO"  # torch's name for where slices begin


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A step of a tiny run that trains everything."""
    folder = tmp_path_factory.mktemp("run")
    workers.train(n_steps=2, save_every=2, out_dir=str(folder))
    return run_state.latest_step(folder)


@pytest.fixture
def saved(whole, tmp_path) -> Path:
    """A copy of it, to be damaged."""
    shutil.copytree(whole, tmp_path / whole.name)
    return tmp_path / whole.name


def load(folder: Path) -> dict:
    fabric, model, optimizer = workers.set_up()
    return run_state.load_run_state(fabric, folder, model, optimizer)


@pytest.mark.parametrize("state", ["full", "bf16", "8bit"])
@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_averages_in_few_bits_go_on_bit_for_bit_and_learning_rates_are_those_of_this_run(tmp_path, name, state):
    def steps(numbers: range, ratio: float, folder: Path | None = None) -> list[torch.Tensor]:
        fabric, model, _ = workers.set_up()
        args = OptimizerArgs(name, lr=1e-2, state=state, weight_decay=0.1)
        optimizer = fabric.setup_optimizers(make_optimizer(args, model, {"attn": ratio}))
        if folder is not None:
            run_state.load_run_state(fabric, folder, model, optimizer)
        for step in numbers:
            torch.manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            set_learning_rate(optimizer, 1e-3 * step)
            optimizer.step()
        assert {group["lr"] for group in optimizer.param_groups} == {1e-3 * step, 1e-3 * step * ratio}
        run_state.save_run_state(fabric, tmp_path / "step-000003", model, optimizer, {})
        return [parameter.detach() for parameter in model.parameters()]

    steps(range(1, 4), ratio=2.0)
    resumed = steps(range(4, 7), ratio=2.0, folder=tmp_path / "step-000003")
    assert all(map(torch.equal, resumed, steps(range(1, 7), ratio=2.0)))
    steps(range(4, 7), ratio=4.0, folder=tmp_path / "step-000003")


class Counting(torch.optim.SGD):
    """An optimizer that counts among what it calls its defaults, as Prodigy does."""

    def __init__(self, weights, lr=1e-3, weight_decay=0.0):
        super().__init__(weights, lr=lr, weight_decay=weight_decay)
        self.defaults["k"] = 0
        for group in self.param_groups:
            group["k"] = 0

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            group["k"] += 1


def test_what_an_optimizer_counts_in_its_groups_goes_on_and_its_settings_are_those_of_this_run(tmp_path):
    def counted(rate: float, folder: Path | None = None) -> list[tuple[int, float]]:
        fabric, model, _ = workers.set_up()
        optimizer = fabric.setup_optimizers(Counting(model.parameters(), lr=rate))
        if folder is not None:
            run_state.load_run_state(fabric, folder, model, optimizer)
        optimizer.step()
        run_state.save_run_state(fabric, tmp_path / "step-000001", model, optimizer, {})
        return [(group["k"], group["lr"]) for group in optimizer.param_groups]

    assert counted(0.1) == [(1, 0.1)]
    assert counted(0.2, tmp_path / "step-000001") == [(2, 0.2)]


def state_of(folder: Path) -> Path:
    return folder / names.RUN_STATE / names.STATE


def shard_of(folder: Path) -> Path:
    return folder / names.RUN_STATE / run_state.SHARD.format(0)


def changed(folder: Path, change: Callable[[dict, dict], object]) -> None:
    """Rewrite the shard of a step after a change of its tensors and of where they begin."""
    tensors = load_file(shard_of(folder))
    with safe_open(shard_of(folder), "pt") as file:
        metadata = file.metadata()
    places = json.loads(metadata[DCP])
    change(tensors, places)
    save_file(tensors, shard_of(folder), metadata=metadata | {DCP: json.dumps(places)})


def test_a_whole_step_is_taken(saved):
    assert load(saved)["step"] == 2


@pytest.mark.parametrize("content", ["{}", "[]", "5", "{", "[" * 100_000, ""])
def test_a_state_that_is_no_state_is_refused(saved, content):
    state_of(saved).write_text(content)
    with pytest.raises(UserError, match=r"state.json is damaged.* Resume from another step\.$"):
        load(saved)


@pytest.mark.parametrize("key", ["counters", "tensors", "shards", "optimizer", "groups", "scaler", "machine"])
@pytest.mark.parametrize("value", ["x", None])
def test_a_part_of_the_state_that_is_missing_or_of_another_type_is_named(saved, key, value):
    state = json.loads(state_of(saved).read_text())
    state_of(saved).write_text(json.dumps({name: held for name, held in state.items() if name != key} | ({key: value} if value else {})))
    with pytest.raises(UserError, match=rf"state.json is damaged: its '{key}' is missing or of the wrong type"):
        load(saved)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"groups": []}, "holds 0 groups of weights, not 2"),
        ({"groups": [5]}, "groups of weights"),
        ({"optimizer": {"optimizer/nowhere/step": 3}}, "'optimizer/nowhere/step', which belongs to no trained weight"),
        ({"optimizer": {"optimizer/nowhere": 3}}, "'optimizer/nowhere', which belongs to no trained weight"),
        ({"tensors": ["optimizer/nowhere/exp_avg"]}, "lacks 1 tensors of the optimizer, first 'optimizer/nowhere/exp_avg'"),
        ({"shards": 2}, "of 2 files with tensors it holds 1"),
    ],
)
def test_a_state_that_does_not_fit_the_run_is_refused(saved, change, words):
    state_of(saved).write_text(json.dumps(json.loads(state_of(saved).read_text()) | change))
    with pytest.raises(UserError, match=words):
        load(saved)


def without_optimizer(tensors, places):
    for name in [name for name in tensors if name.startswith("optimizer/")]:
        del tensors[name]


def with_another_weights_memory(tensors, places):
    tensors["optimizer/nowhere/exp_avg"] = torch.zeros(3)
    places["optimizer/nowhere/exp_avg"] = {"saved_offsets": [0]}


def with_a_spoilt_generator(tensors, places):
    tensors["generator/0/python"] = torch.tensor(list(b"[1, 2"), dtype=torch.uint8)


def with_another_generator(tensors, places):
    tensors["generator/0/python"] = torch.tensor(list(b"[3, [1], null]"), dtype=torch.uint8)


@pytest.mark.parametrize(
    "change, words",
    [
        (without_optimizer, r"lacks \d+ tensors of the optimizer"),
        (with_another_weights_memory, "belongs to no trained weight"),
        (with_a_spoilt_generator, "no state of the random generators"),
        (with_another_generator, "no state of the random generators"),
        (lambda tensors, places: places.clear(), "does not say which parts"),
        (lambda tensors, places: places.update({name: [0] for name in tensors}), "does not say which parts"),
        (lambda tensors, places: places.update({name: {"saved_offsets": ["a"]} for name in tensors}), "does not say which parts"),
    ],
)
def test_tensors_that_are_missing_or_of_another_run_are_refused(saved, change, words):
    changed(saved, change)
    with pytest.raises(UserError, match=words):
        load(saved)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {DCP: "["}, {DCP: "[]"}, {DCP: "[" * 100_000}])
def test_a_file_that_does_not_say_which_slices_it_holds_is_refused_by_training_and_by_all_others(saved, metadata):
    save_file(load_file(shard_of(saved)), shard_of(saved), metadata=metadata)
    for read in (load, lambda folder: list(read_raw(folder))):
        with pytest.raises(UserError, match="does not say which parts of the tensors it holds"):
            read(saved)


def test_a_step_that_lost_a_file_is_refused_by_training_and_by_all_others(saved):
    """Of two ranks the first's rows are gone; those of the second say that there is something before them."""

    def second_half(tensors, places):
        for name in tensors:
            if not name.startswith("generator/") and tensors[name].ndim:
                places[name]["saved_offsets"][0] = (len(tensors[name]) + 1) // 2
                tensors[name] = tensors[name][places[name]["saved_offsets"][0] :].clone()

    changed(saved, second_half)
    state_of(saved).write_text(json.dumps(json.loads(state_of(saved).read_text()) | {"shards": 2}))
    with pytest.raises(UserError, match="of 2 files with tensors it holds 1"):
        load(saved)
    with pytest.raises(UserError, match="lacks a part of the weight"):
        list(read_raw(saved))


def test_a_step_without_any_file_of_tensors_holds_no_weights(saved):
    shard_of(saved).unlink()
    for read in (load, lambda folder: list(read_raw(folder))):
        with pytest.raises(MissingFile, match="holds no weights"):
            read(saved)


@pytest.mark.parametrize("name", ["step-000002.tmp", "step-000002.old.tmp"])
def test_saving_deletes_no_folder_of_the_users(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "precious").write_text("mine")
    with pytest.raises(UserError, match=f"{name} is in the way"):
        workers.train(n_steps=2, save_every=2, out_dir=str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name / "precious").read_text() == "mine"


@pytest.mark.parametrize(("option", "with_weights"), [("fused", True), ("capturable", True), ("foreach", False)])
def test_what_an_optimizer_remembers_is_read_to_where_that_optimizer_wants_it(option: str, with_weights: bool):
    """The kernels of fused steps read the number of steps on the GPU, the others on the CPU. The device `meta` stands for a GPU."""
    weight = torch.nn.Parameter(torch.empty(4, 3, device="meta"))
    optimizer = torch.optim.AdamW([weight])
    optimizer.param_groups[0][option] = True
    sizes = {"step": (), "exp_avg": (4, 3), "row_var": (4, 1), "col_var": (1, 3), "mu_product": ()}
    saved = {
        f"optimizer/w/{key}": SimpleNamespace(size=torch.Size(size), properties=SimpleNamespace(dtype=torch.float32))
        for key, size in sizes.items()
    }
    places = run_state._places(SimpleNamespace(global_rank=0), saved, {"w": weight}, optimizer)
    assert {name: tuple(place.shape) for name, place in places.items()} == {"w": (4, 3)} | {f"optimizer/w/{k}": s for k, s in sizes.items()}
    assert (places.pop("optimizer/w/step").device.type == "meta") is with_weights
    assert {place.device.type for place in places.values()} == {"meta"}


def test_counters_are_replaced_at_once_and_nothing_else(saved, monkeypatch):
    state, others = state_of(saved), {path: path.stat().st_ino for path in saved.rglob("*") if path.name != names.STATE}
    before = json.loads(state.read_text())
    run_state.replace_counters(saved, before["counters"] | {"total_tokens": 7})
    assert json.loads(state.read_text()) == before | {"counters": before["counters"] | {"total_tokens": 7}}
    assert load(saved)["total_tokens"] == 7
    monkeypatch.setattr(run_state.os, "replace", lambda *paths: exec("raise OSError(28, 'No space left on device')"))
    with pytest.raises(UserError, match="step-000002 could not be written: the disk is full"):
        run_state.replace_counters(saved, {})
    assert load(saved)["total_tokens"] == 7 and {path: path.stat().st_ino for path in others} == others


def test_a_step_holds_nothing_but_its_own_files(whole):
    assert sorted(path.name for path in whole.iterdir()) == ["note", names.RUN_STATE]
