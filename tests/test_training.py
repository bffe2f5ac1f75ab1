"""The step, the run state and what ranks agree on, on one process and on two."""

import json
import math
import os
import random
import shutil
import signal
import sys
import time
import warnings
from itertools import islice
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric
from safetensors import safe_open

from litgpt import names, run_state, training
from litgpt.args import EvalArgs, OptimizerArgs, TrainArgs
from litgpt.errors import MissingFile, UserError
from litgpt.launch import launch_fabric
from litgpt.optim import FirstNonFinite, make_optimizer

sys.path.insert(0, str(Path(__file__).parent))
import workers


@pytest.fixture(scope="module")
def fabric() -> Fabric:
    return launch_fabric(accelerator="cpu")


def on_ranks(*cases: tuple[str, dict]) -> list[list]:
    """What each case returned on the first of two ranks, after checking that the second returned the same."""
    ours, theirs = workers.run_ranks("several", 2, cases=list(cases))
    assert ours == theirs, "ranks drifted apart"
    return ours


def close(ours, theirs, tolerance: float) -> None:
    as_tensor = lambda value: torch.tensor(list(value.values()) if isinstance(value, dict) else value, dtype=torch.float64)  # noqa: E731
    torch.testing.assert_close(as_tensor(ours), as_tensor(theirs), rtol=tolerance, atol=tolerance)


def assert_same_run(run: dict, reference: dict, tolerance: float) -> None:
    close(run["losses"], {step: reference["losses"][step] for step in run["losses"]}, tolerance)
    for name, weight in reference["weights"].items():
        close(run["weights"][name], weight, tolerance)
    assert run["total_tokens"] == reference["total_tokens"]


# How a batch is cut


def gradients(fabric: Fabric, dtype: torch.dtype, micro_batch_size: int, by_mean: bool = False) -> tuple[float, torch.Tensor]:
    model = fabric.setup_module(workers.build().to(dtype))
    microbatches = training.microbatches_of(workers.samples(8), micro_batch_size)
    n_targets = sum(int((microbatch.targets != -100).sum()) for microbatch in microbatches)
    if by_mean:
        losses = [model(ids, targets=targets) for ids, targets, *_ in microbatches]
        sum(nll / n.clamp(min=1) / len(losses) for nll, n, _ in losses).backward()
        return 0.0, torch.cat([p.grad.flatten() for p in model.parameters()])
    loss = training.forward_backward(fabric, model, microbatches, n_targets)
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_how_a_batch_is_cut_changes_neither_loss_nor_gradients(fabric, dtype, tolerance):
    (loss, whole), *others = [gradients(fabric, dtype, size) for size in (8, 1, 2, 4)]
    for other_loss, other in others:
        assert abs(other_loss - loss) < tolerance * abs(loss)
        assert (other - whole).norm() < tolerance * whole.norm()


def test_control_the_mean_of_microbatch_means_is_another_gradient(fabric):
    _, whole = gradients(fabric, torch.float64, 8)
    _, averaged = gradients(fabric, torch.float64, 2, by_mean=True)
    assert (averaged - whole).norm() > 0.01 * whole.norm()


def test_gradients_are_those_of_the_mean_over_all_targets(fabric):
    model = workers.build().double()
    ids, targets, *_ = training.padded(workers.samples(8))
    torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten()).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(gradients(fabric, torch.float64, 3)[1], expected, rtol=1e-10, atol=1e-12)


def test_the_auxiliary_loss_is_weighted_by_the_targets_of_its_microbatch(fabric):
    weight = torch.nn.Parameter(torch.tensor(2.0))

    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = weight

        def forward(self, ids, targets):
            n = (targets != -100).sum()
            return self.weight * 0, n, self.weight * ids.sum()

    batches = [training.Microbatch(torch.tensor([[a]]), torch.full((1, n), 1)) for a, n in ((3, 1), (5, 3))]
    training.forward_backward(fabric, fabric.setup_module(Experts()), batches, 4)
    assert weight.grad.item() == (3 * 1 + 5 * 3) / 4


def test_samples_are_shifted_padded_on_the_right_and_sorted_by_length():
    short, long = torch.tensor([7]), dict(input_ids=torch.tensor([1, 2, 3, 4]), labels=torch.tensor([-100, -100, 3, 4]))
    (batch,) = training.microbatches_of([short, long, torch.tensor([5, 6])], 4)
    assert batch.ids.tolist() == [[1, 2, 3], [5, 0, 0], [7, 0, 0]]
    assert batch.targets.tolist() == [[-100, 3, 4], [6, -100, -100], [-100, -100, -100]]
    assert batch.n_tokens == 5
    assert [len(batch.ids) for batch in training.microbatches_of([short] * 5, 2)] == [2, 2, 1]


# Ranks


def test_two_ranks_train_as_one_does_also_with_uneven_and_with_no_data_on_one():
    even, uneven, one_idle = (dict(batch=n, n_steps=5) for n in (8, 7, 1))  # samples a step
    settings = [("full", even), ("full", uneven), ("full", one_idle), ("lora", uneven), ("full", dict(uneven, packing=False))]
    cases = [("train", dict(strategy=strategy, method=method, **sizes)) for strategy in ("ddp", "fsdp") for method, sizes in settings]
    references = [workers.train(method=method, **sizes | dict(packing=False)) for method, sizes in settings] * 2
    for run, reference in zip(on_ranks(*cases), references, strict=True):
        assert_same_run(run, reference, 2e-5)
        close(run["norms"], reference["norms"], 1e-4)


def test_clipping_equals_torchs_in_every_layout():
    for method in ("full", "lora"):
        norm, grads = workers.clip(method=method, by_torch=True)
        assert norm > 0.1
        layouts = [dict(strategy="ddp"), dict(strategy="fsdp"), dict(strategy="fsdp", offload=True)]
        for other_norm, other in [workers.clip(method=method)] + on_ranks(*(("clip", dict(method=method) | layout) for layout in layouts)):
            assert other_norm == pytest.approx(norm, rel=1e-5)
            for name, grad in grads.items():
                close(other[name], grad, 1e-6)


def test_validation_is_the_mean_over_all_targets_whatever_the_layout():
    ids, targets, *_ = training.padded(workers.samples(9, seed=3))
    model = workers.build().eval()
    expected = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten()).item()
    layouts = [dict(), dict(packing=False), dict(sized=False)]
    cases = [("validate", dict(strategy=strategy, micro=micro)) for strategy in ("ddp", "fsdp") for micro in (1, 4)]
    cases += [("validate", dict(micro=2, **layout)) for layout in layouts]
    for loss in [*(workers.validate(micro=3, **layout) for layout in layouts), *on_ranks(*cases)]:
        assert loss == pytest.approx(expected, rel=1e-6)
    ids, targets, *_ = training.padded(workers.samples(9, seed=3)[:4])
    first = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten()).item()
    assert workers.validate(micro=2, max_iters=2) == pytest.approx(first, rel=1e-6)
    assert on_ranks(("validate", dict(micro=2, max_iters=2))) == [pytest.approx(first, rel=1e-6)]


def test_validation_leaves_the_model_in_the_mode_it_was_in(fabric):
    for mode in (True, False):
        model = fabric.setup_module(workers.build()).train(mode)
        training.validate(fabric, model, [training.padded(workers.samples(3))])
        assert model.training == mode


def test_dtypes_after_setup_are_what_the_precision_says():
    plain, mixed = dict(trained=["float32"], state=["float32"], tables=["float32"]), dict(products=["bfloat16"])
    expected = {
        ("full", "32-true"): plain | dict(frozen=[], products=["float32"]),
        ("full", "bf16-mixed"): plain | dict(frozen=[]) | mixed,
        ("full", "bf16-true"): dict(trained=["bfloat16"], state=["bfloat16"], tables=["float32"], frozen=[]) | mixed,
        ("lora", "32-true"): plain | dict(frozen=["float32"], products=["float32"]),
        ("lora", "bf16-mixed"): plain | dict(frozen=["float32"]) | mixed,
        ("lora", "bf16-true"): plain | dict(frozen=["bfloat16"]) | mixed,
    }
    chosen = [("lora", "bf16-true"), ("lora", "bf16-mixed"), ("full", "bf16-mixed")]
    for (method, precision), wanted in expected.items():
        assert workers.dtypes(method=method, precision=precision) == wanted, (method, precision)
    found = on_ranks(*(("dtypes", dict(strategy="fsdp", method=method, precision=precision)) for method, precision in chosen))
    assert found == [expected[key] for key in chosen]


def test_control_fabrics_own_bf16_true_casts_what_is_trained_too():
    model = Fabric(accelerator="cpu", devices=1, precision="bf16-true").setup_module(workers.build("lora"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


# Stopping


def test_a_signal_to_one_rank_stops_all_at_one_step_and_is_saved(tmp_path):
    for strategy in ("ddp", "fsdp"):
        (run,) = on_ranks(("train", dict(n_steps=500, strategy=strategy, sigterm=[1, 5], out_dir=str(tmp_path / strategy))))
        assert 5 <= run["step"] <= 6 and run_state.latest_step(tmp_path / strategy).name == names.STEP.format(run["step"])


def test_a_nan_on_one_rank_stops_all_and_is_never_saved(tmp_path):
    with pytest.raises(RuntimeError) as caught:
        workers.run_ranks("train", 2, n_steps=500, strategy="fsdp", nan=[1, 5], save_every=3, out_dir=str(tmp_path))
    assert str(caught.value).count("The gradients of step 5 were not finite") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]


def test_a_stop_request_gives_the_signals_back():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    with training.StopRequest() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop
        assert signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM], "a second one must end the process"
        assert signal.getsignal(signal.SIGINT) is stop
    assert {number: signal.getsignal(number) for number in before} == before


def test_the_first_signal_is_answered_once_and_on_one_process_only(capfd):
    for answers in (True, False):
        with training.StopRequest(answers) as stop:
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGUSR1, "a scheduler reads from the exit code what it sent"
        out, err = capfd.readouterr()
        assert out == "" and err.count("Stopping after this step") == answers


def test_the_first_non_finite_norm_sticks():
    flag = FirstNonFinite("cpu")
    for step, norm in enumerate([1.0, float("inf"), 2.0, float("nan")], start=1):
        flag.update(torch.tensor(norm), step)
    assert flag.step() == 2
    with pytest.raises(UserError, match="step 2 "):
        flag.check()
    FirstNonFinite("cpu").check()


# Which samples


def test_every_epoch_sees_every_sample_once_in_an_order_of_its_own():
    drawn = list(islice(training.steps(10, 4, seed=3), 6))
    assert [(step.epoch, len(step.indices)) for step in drawn] == [(1, 4), (1, 4), (1, 2), (2, 4), (2, 4), (2, 2)]
    first, second = ([i for step in drawn if step.epoch == epoch for i in step.indices] for epoch in (1, 2))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert drawn == list(islice(training.steps(10, 4, seed=3), 6)) != list(islice(training.steps(10, 4, seed=4), 6))


def test_a_run_can_begin_at_any_step():
    for first in (1, 2, 3, 4, 900):
        resumed = list(islice(training.steps(10, 4, seed=3, first=first), 5))
        assert resumed == list(islice(training.steps(10, 4, seed=3), first - 1, first + 4))


def test_the_feed_begins_and_ends_where_it_is_told(fabric):
    feed = training.Feed(fabric, workers.samples(5), TrainArgs(global_batch_size=2, micro_batch_size=1), seed=0, first=3, last=6)
    fed = [(epoch, len(microbatches), agreed) for epoch, microbatches, agreed in feed]
    assert [(epoch, n) for epoch, n, _ in fed] == [(1, 1), (2, 2), (2, 2), (2, 1)] and not feed.stopped
    assert sum(agreed.n_tokens for _, _, agreed in fed[1:]) == sum(max(1, len(sample["labels"]) - 1) for sample in workers.samples(5))
    assert not list(training.Feed(fabric, workers.samples(5), TrainArgs(), seed=0, first=7, last=6))


def test_the_feed_stops_before_a_step_that_is_not_wanted(fabric):
    seen: list[int] = []
    feed = training.Feed(fabric, workers.samples(5), TrainArgs(global_batch_size=2), seed=0, wants_to_stop=lambda: len(seen) == 2)
    for epoch, _, _ in feed:
        seen.append(epoch)
        assert len(seen) <= 2, "one process stops after the step in which it was asked to"
    assert len(seen) == 2 and feed.stopped


def test_the_feed_counts_tokens_with_and_without_padding(fabric):
    data = [dict(input_ids=torch.arange(n), labels=torch.arange(n)) for n in (3, 9, 5)]
    for packing, n_slots in ((False, 24), (True, 14)):
        args = TrainArgs(global_batch_size=3, micro_batch_size=3, packing=packing)
        (_, _, agreed), *_ = training.Feed(fabric, data, args, seed=0, last=1)
        assert (agreed.n_targets, agreed.n_tokens, agreed.n_slots) == (14, 14, n_slots)


def test_the_feed_says_how_long_the_data_was_waited_for(fabric):
    class Slow(list):
        def __getitem__(self, i):
            time.sleep(0.02)
            return super().__getitem__(i)

    for _, _, agreed in training.Feed(fabric, Slow(workers.samples(4)), TrainArgs(global_batch_size=4), seed=0, last=1):
        assert 0.08 <= agreed.waited < 5


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_a_step_without_any_target_is_refused(fabric, packing):
    learnt = dict(input_ids=torch.arange(4), labels=torch.arange(4))
    masked = dict(input_ids=torch.arange(4), labels=torch.full((4,), -100))
    first = next(training.steps(2, 1, seed=0)).indices[0]
    data = [learnt, masked] if first == 0 else [masked, learnt]
    feed = training.Feed(fabric, data, TrainArgs(global_batch_size=1, packing=packing), seed=0, last=9)
    with pytest.raises(UserError, match="No sample of step 2 has a token to learn"):
        list(feed)
    assert len(list(training.Feed(fabric, data, TrainArgs(global_batch_size=2, packing=packing), seed=0, last=9))) == 9


def test_two_ranks_refuse_a_step_without_any_target_together():
    with pytest.raises(RuntimeError) as caught:
        workers.run_ranks("train", 2, batch=2, masked=True)
    assert str(caught.value).count("No sample of step 1 has a token to learn") == 2


def test_an_error_in_the_data_reaches_the_loop(fabric):
    class Broken(list):
        def __getitem__(self, i):
            raise UserError("record 3 is broken")

    with pytest.raises(UserError, match="record 3"):
        next(iter(training.Feed(fabric, Broken([1, 2]), TrainArgs(), seed=0)))
    with pytest.raises(UserError, match="no sample"):
        training.Feed(fabric, [], TrainArgs(), seed=0)


# Limits


def test_limits_count_the_last_smaller_step_of_each_epoch():
    of = lambda **limits: training.Limits.of(TrainArgs(global_batch_size=4, **limits), n_samples=10, tokens_per_sample=8)  # noqa: E731
    assert (of(epochs=2).last, of(epochs=2).max_steps) == (6, 6)
    assert of(epochs=2, max_steps=5).last == 5
    assert (of(max_tokens=160).last, of(max_tokens=160).max_steps) == (None, 6)  # twice through
    assert of(max_tokens=161).max_steps == 7
    assert of(max_tokens=161, max_steps=3).max_steps == 3
    assert (of(max_time=5.0).last, of(max_time=5.0).max_steps) == (None, None)
    assert of(max_tokens=160).reached(160) and not of(max_tokens=160).reached(159) and not of(epochs=1).reached(10**9)
    assert of(max_time=5.0).out_of_time(5.0) and not of(max_time=5.0).out_of_time(4.9)
    with pytest.raises(UserError, match="Nothing ends"):
        of()


NOT_POSITIVE = [dict(micro_batch_size=0), dict(epochs=-1), dict(max_time=0.0), dict(log_interval=0), dict(max_norm=0)]
NOT_FINITE = [dict(max_time=math.nan), dict(max_time=math.inf), dict(max_norm=math.nan)]


@pytest.mark.parametrize("wrong", NOT_POSITIVE + NOT_FINITE)
def test_a_limit_that_is_not_positive_is_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        training.check_limits(TrainArgs(**wrong), EvalArgs())
    training.check_limits(TrainArgs(max_norm=None), EvalArgs())


# Run state


STAGES = ["step", "bytes", "shard", "rename"]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_killed_runs_resume_bit_for_bit(tmp_path, method):
    args = dict(n_steps=12, save_every=2, method=method, dropout=0.1, noise=True)
    reference = workers.train(out_dir=str(tmp_path / "reference"), **args)
    draw = random.Random(7)
    for stage in STAGES:
        step = draw.randint(3, 12) if stage == "step" else 2 * draw.randint(2, 6)
        out_dir = str(tmp_path / stage)
        with pytest.raises(workers.Killed):
            workers.run_ranks("train", out_dir=out_dir, kill=[stage, step], **args)
        resumed = workers.train(out_dir=out_dir, resume="latest", **args)
        assert 3 <= resumed["first"] <= step
        assert resumed["losses"] == {k: v for k, v in reference["losses"].items() if k >= resumed["first"]}, (stage, step)
        assert resumed["weights"] == reference["weights"] and resumed["total_tokens"] == reference["total_tokens"]
        assert not [path for path in Path(out_dir).iterdir() if path.name.endswith(names.PARTIAL) and stage != "step"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_killed_runs_of_two_ranks_resume_bit_for_bit(tmp_path, strategy):
    args = dict(n_steps=8, save_every=2, method="lora", dropout=0.1, noise=strategy == "fsdp", strategy=strategy)
    with pytest.raises(workers.Killed):
        workers.run_ranks("train", 2, out_dir=str(tmp_path / "killed"), kill=["bytes", 6], **args)
    cases = [("train", args | dict(out_dir=str(tmp_path / "reference")))]
    cases += [("train", args | dict(out_dir=str(tmp_path / "killed"), resume="latest"))]
    for reference, resumed in workers.run_ranks("several", 2, cases=cases):
        assert resumed["first"] == 5 and resumed["weights"] == reference["weights"]
        assert resumed["losses"] == {k: v for k, v in reference["losses"].items() if k >= 5}


def test_a_run_can_resume_on_another_number_of_ranks(tmp_path):
    one, two, three = str(tmp_path / "one"), str(tmp_path / "two"), str(tmp_path / "three")
    reference = workers.train(packing=False)
    workers.train(n_steps=4, save_every=4, out_dir=one)
    cases = [dict(strategy="fsdp", out_dir=one, resume="latest"), dict(strategy="fsdp", n_steps=4, save_every=4, out_dir=two)]
    cases += [dict(strategy="ddp", n_steps=4, save_every=4, out_dir=three), dict(strategy="fsdp", out_dir=three, resume="latest")]
    onto_two, _, _, ddp_to_fsdp = on_ranks(*(("train", case) for case in cases))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        onto_one = workers.train(out_dir=two, resume="latest")
    assert any("processes 2, here 1" in str(warning.message) for warning in caught)
    for run in (onto_two, onto_one, ddp_to_fsdp):
        assert run["first"] == 5
        assert_same_run(run, reference, 1e-5)


@pytest.fixture
def saved(tmp_path) -> Path:
    workers.train(n_steps=2, save_every=2, out_dir=str(tmp_path), method="lora")
    return run_state.latest_step(tmp_path)


def load(folder: Path, **setup) -> dict:
    fabric, model, optimizer = workers.set_up(**dict(method="lora") | setup)
    return run_state.load_run_state(fabric, folder, model, optimizer)


def test_a_step_holds_what_is_trained_once_and_its_side_files(saved, tmp_path):
    with safe_open(saved / names.RUN_STATE / run_state.SHARD.format(0), "pt") as file:
        weights = {name for name in file.keys() if "/" not in name}  # noqa: SIM118
    assert weights == {name for name, parameter in workers.build("lora").named_parameters() if parameter.requires_grad}
    assert (saved / "note").read_text() == "hi"
    workers.train(n_steps=1, save_every=1, out_dir=str(tmp_path / "full"), kind="llama")  # whose head is its embedding
    with safe_open(tmp_path / "full" / "step-000001" / names.RUN_STATE / run_state.SHARD.format(0), "pt") as file:
        held = {name for name in file.keys() if "/" not in name}  # noqa: SIM118
    assert "transformer.wte.weight" in held and "lm_head.weight" not in held


def test_only_whole_steps_count_and_the_highest_wins(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "step-1000000")
    for broken in ("step-1000001.tmp", "step-1000002", "step-abc", "final"):
        (tmp_path / broken / names.RUN_STATE).mkdir(parents=True)
    (tmp_path / "step-1000001.tmp" / names.RUN_STATE / names.STATE).write_text("{}")
    assert run_state.latest_step(tmp_path).name == "step-1000000"
    assert run_state.latest_step(tmp_path / "nowhere") is None


def test_a_state_of_another_run_is_refused(saved, tmp_path):
    for setup, words in [(dict(method="full"), "differ in"), (dict(kind="neox"), "differ in|shape"), (dict(precision="32-true"), None)]:
        if words is None:
            assert load(saved, **setup)["step"] == 2
            continue
        with pytest.raises(UserError, match=words):
            load(saved, **setup)
    workers.train(n_steps=1, save_every=1, out_dir=str(tmp_path / "full"))
    with pytest.raises(UserError, match="--precision"):
        load(tmp_path / "full" / "step-000001", method="full", precision="bf16-true")


def test_a_damaged_or_missing_state_is_one_sentence(saved, tmp_path):
    with pytest.raises(MissingFile, match="no run state"):
        load(tmp_path / "nowhere")
    shard, state = saved / names.RUN_STATE / run_state.SHARD.format(0), saved / names.RUN_STATE / names.STATE
    size, text = shard.stat().st_size, state.read_text()
    for cut in (size - 1, size // 2, 100, 3, 0):
        os.truncate(shard, cut)
        with pytest.raises(UserError, match="damaged"):
            load(saved)
    state.write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match="damaged"):
        load(saved)


def test_another_machine_is_warned_about(saved):
    state = saved / names.RUN_STATE / names.STATE
    told = json.loads(state.read_text())
    told["machine"] |= {"threads": 64, "CPU instruction sets": "avx amx_tile"}
    state.write_text(json.dumps(told))
    with pytest.warns(UserWarning, match="'avx amx_tile', here .*threads 64, here 1"):
        load(saved)


def test_the_same_machine_is_not_warned_about(saved):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load(saved)


def test_a_resumed_optimizer_has_this_runs_settings_and_the_saved_state(saved):
    fabric, model, _ = workers.set_up("lora")
    optimizer = fabric.setup_optimizers(make_optimizer(OptimizerArgs(lr=3.0, weight_decay=0.5), model))
    run_state.load_run_state(fabric, saved, model, optimizer)
    assert optimizer.param_groups[0]["weight_decay"] == 0.5 and optimizer.param_groups[0]["lr"] == 3.0
    assert all(state["step"].item() == 2 for state in optimizer.state.values()) and len(optimizer.state) > 0


@pytest.mark.parametrize("optimizer", ["SGD", "RMSprop", "Adagrad", "NAdam", "Adafactor"])
def test_any_optimizer_resumes_bit_for_bit(tmp_path, optimizer):
    args = dict(out_dir=str(tmp_path), optimizer=optimizer)
    reference = workers.train(**args)
    workers.train(n_steps=4, save_every=4, **args)
    assert workers.train(resume="latest", **args)["weights"] == reference["weights"]


def test_a_disk_that_takes_no_more_bytes_is_one_sentence_and_leaves_nothing_behind(tmp_path):
    for n_bytes in (0, 100, 30_000):
        (message,) = workers.run_ranks("disk_quota", n_bytes=n_bytes, n_steps=2, save_every=2, out_dir=str(tmp_path))
        assert "step-000002 could not be written" in message and not list(tmp_path.iterdir())


def test_a_full_disk_on_one_rank_is_an_error_on_all(tmp_path):
    args = dict(n_steps=2, save_every=2, strategy="fsdp", out_dir=str(tmp_path))
    messages = workers.run_ranks("failing_write", 2, **args)
    assert all("the disk is full" in message for message in messages) and not list(tmp_path.iterdir())


def test_an_error_of_a_side_file_is_the_users_own_and_leaves_nothing(tmp_path, fabric):
    def side_files(folder: Path) -> None:
        raise UserError("no such tokenizer")

    model = fabric.setup_module(workers.build())
    optimizer = make_optimizer(OptimizerArgs(), model)
    with pytest.raises(UserError, match="^no such tokenizer$"):
        run_state.save_run_state(fabric, tmp_path / "step-000001", model, optimizer, {}, side_files)
    assert not list(tmp_path.iterdir())
