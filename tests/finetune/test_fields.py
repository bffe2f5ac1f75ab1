"""Every field of the options of a training does something: here is which test shows it, or the test itself."""

import ast
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.loggers import CSVLogger
from speaking import make_checkpoint

import litgpt.model
import litgpt.run
from litgpt import launch
from litgpt.args import EvalArgs, LogArgs, OptimizerArgs, TrainArgs
from litgpt.data import JSON
from litgpt.data.packing import Microbatch
from litgpt.errors import UserError
from litgpt.finetune import loop, lora
from litgpt.metrics import Journal

HERE = "finetune/test_fields.py"
FINETUNE, RUNS, LAUNCH = "finetune/test_finetune.py", "finetune/test_runs.py", "test_launch.py"
TO_A_SERVICE = (LAUNCH, "test_every_field_of_the_log_options_reaches_its_service")
SHOWN_BY = {  # field -> file, test
    TrainArgs: {
        "save_interval": (HERE, "test_steps_are_logged_saved_and_validated_at_their_intervals"),
        "log_interval": (HERE, "test_steps_are_logged_saved_and_validated_at_their_intervals"),
        "global_batch_size": (HERE, "test_a_step_sees_as_many_samples_as_asked_for"),
        "micro_batch_size": (HERE, "test_a_pass_sees_as_many_samples_as_asked_for_and_rows_grow_with_it"),
        "lr_warmup_steps": (HERE, "test_the_learning_rate_rises_and_falls_as_asked_for"),
        "lr_warmup_fraction": (HERE, "test_the_learning_rate_rises_and_falls_as_asked_for"),
        "lr_schedule": (HERE, "test_the_learning_rate_rises_and_falls_as_asked_for"),
        "epochs": (FINETUNE, "test_a_run_ends_at_its_first_limit"),
        "max_tokens": (FINETUNE, "test_a_run_stops_after_as_many_tokens_as_asked_for"),
        "max_steps": (FINETUNE, "test_a_run_ends_at_its_first_limit"),
        "max_time": (FINETUNE, "test_a_run_ends_when_its_time_is_over"),
        "max_seq_length": (HERE, "test_samples_are_cut_to_the_length_asked_for"),
        "tie_embeddings": (HERE, "test_a_model_that_is_tied_otherwise_is_refused"),
        "max_norm": (FINETUNE, "test_clipping_is_on_and_null_turns_it_off"),
        "min_lr": (HERE, "test_the_learning_rate_rises_and_falls_as_asked_for"),
        "packing": (HERE, "test_packing_leaves_no_padding_and_packs_steps_or_all_samples"),
        "activation_checkpointing": (HERE, "test_as_many_blocks_are_computed_again_as_asked_for_and_nothing_else_changes"),
        "keep_last": (RUNS, "test_as_many_steps_are_kept_as_asked_for_and_the_last_has_a_link"),
        "expert_balance": ("finetune/test_ranks.py", "test_balancing_experts_changes_what_is_learned_and_not_the_loss_that_is_logged"),
    },
    EvalArgs: {
        "interval": (HERE, "test_steps_are_logged_saved_and_validated_at_their_intervals"),
        "max_new_tokens": (HERE, "test_answers_are_shown_for_the_sample_and_in_the_length_asked_for"),
        "max_iters": (HERE, "test_a_validation_sees_as_many_microbatches_as_asked_for_but_for_the_final_one"),
        "initial_validation": (HERE, "test_steps_are_logged_saved_and_validated_at_their_intervals"),
        "final_validation": (HERE, "test_steps_are_logged_saved_and_validated_at_their_intervals"),
        "evaluate_example": (HERE, "test_answers_are_shown_for_the_sample_and_in_the_length_asked_for"),
        "save_best": (RUNS, "test_a_step_is_saved_whenever_it_is_the_best_so_far"),
        "patience": (RUNS, "test_a_run_ends_when_the_loss_has_not_fallen_for_as_long_as_allowed"),
    },
    LogArgs: {field.name: TO_A_SERVICE for field in fields(LogArgs)},
}
TESTS = Path(__file__).parents[1]
N_TRAINED, PEAK = 18, 1e-2  # of 20 samples


@pytest.mark.parametrize("group", SHOWN_BY, ids=lambda group: group.__name__)
def test_every_field_is_shown_to_do_something_by_a_test_that_names_it(group: type):
    assert list(SHOWN_BY[group]) == [field.name for field in fields(group)], "a new field needs a test of its effect"
    for name, (file, test) in SHOWN_BY[group].items():
        text = (TESTS / file).read_text()
        found = {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
        assert test in found and name in text.replace("SHOWN_BY", ""), f"{group.__name__}.{name}: {file} has no {test}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture
def data(samples: Path) -> JSON:
    return JSON(samples, val_split_fraction=0.1, mask_prompt=False)


@pytest.fixture
def run(base: Path, data: JSON, tmp_path: Path) -> Callable[..., Path]:
    """Finetunes a tiny model with LoRA; returns the run's folder."""

    def run(train: dict = {}, eval: dict = {}, out_dir: str = "out", **options: Any) -> Path:  # noqa: B006
        train = dict(global_batch_size=4, micro_batch_size=2, epochs=1, save_interval=None) | train
        eval = dict(interval=1000, max_new_tokens=None, final_validation=False) | eval
        options = dict(data=data, precision="32-true", optimizer=OptimizerArgs(lr=PEAK), overwrite=True) | options
        lora.setup(base, out_dir=tmp_path / out_dir, train=TrainArgs(**train), eval=EvalArgs(**eval), **options)
        return tmp_path / out_dir

    return run


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[list[Microbatch]]:
    """The microbatches of each step, as they are trained on."""
    steps: list[list[Microbatch]] = []
    forward_backward = loop.forward_backward

    def recorded(fabric: Any, model: Any, microbatches: list[Microbatch], n_targets: int) -> Any:
        steps.append(microbatches)
        return forward_backward(fabric, model, microbatches, n_targets)

    monkeypatch.setattr(loop, "forward_backward", recorded)
    return steps


def rows(out_dir: Path, column: str) -> dict[int, Any]:
    """The values of one column of the run's journal, by step."""
    return {row["step"]: row[column] for row in Journal(out_dir / "logs" / "metrics.jsonl").rows() if column in row}


# What a step sees


def test_a_step_sees_as_many_samples_as_asked_for(run, fed):
    for size, sizes in ((4, [4, 4, 4, 4, 2]), (9, [9, 9])):
        run(train=dict(global_batch_size=size, packing=False))
        assert [sum(len(batch.ids) for batch in step) for step in fed] == sizes
        fed.clear()


def test_a_pass_sees_as_many_samples_as_asked_for_and_rows_grow_with_it(run, fed):
    run(train=dict(global_batch_size=9, micro_batch_size=4, packing=False))
    assert [[len(batch.ids) for batch in step] for step in fed] == [[4, 4, 1]] * 2
    longest = {}
    for micro_batch_size in (1, 3):
        fed.clear()
        run(train=dict(global_batch_size=9, micro_batch_size=micro_batch_size, max_seq_length=40))
        longest[micro_batch_size] = max(batch.ids.numel() for step in fed for batch in step)
    assert 20 < longest[1] <= 40 < longest[3] <= 120


def test_samples_are_cut_to_the_length_asked_for(run, data, fed):
    run()
    lengths = data.train_dataset.lengths
    for limit in (max(lengths), sorted(lengths)[len(lengths) // 2]):
        out_dir = run(train=dict(max_seq_length=limit))
        assert max(rows(out_dir, "total_tokens").values()) == sum(min(n, limit) - 1 for n in lengths)
        assert max(n for step in fed for batch in step for n in batch.lengths or batch.unpadded) <= max(lengths)
        assert max(data.train_dataset.lengths) == limit


def test_packing_leaves_no_padding_and_packs_steps_or_all_samples(run, data, fed):
    steps, padding = {}, {}
    for packing in (False, True, "global"):
        fed.clear()
        run(train=dict(packing=packing, global_batch_size=2, max_seq_length=60))
        steps[packing] = len(fed)
        padding[packing] = sum(batch.ids.numel() - batch.n_tokens for step in fed for batch in step)
    assert padding[False] > 0 == padding[True] == padding["global"]
    assert steps[False] == steps[True] == N_TRAINED / 2 > steps["global"], "two rows hold more than two samples"


# When something happens


def test_steps_are_logged_saved_and_validated_at_their_intervals(run):
    out_dir = run(
        train=dict(epochs=2, log_interval=2, save_interval=3, max_steps=7),
        eval=dict(interval=4, initial_validation=True, final_validation=True),
    )
    assert list(rows(out_dir, "loss")) == [2, 4, 6] and list(rows(out_dir, "val_loss")) == [0, 4, 7]
    assert sorted(path.name for path in out_dir.glob("step-*")) == ["step-000003", "step-000006"]
    out_dir = run(
        train=dict(epochs=2, log_interval=3, save_interval=None, max_steps=7),
        eval=dict(interval=3, initial_validation=False, final_validation=False),
    )
    assert list(rows(out_dir, "loss")) == [3, 6] == list(rows(out_dir, "val_loss")) and not list(out_dir.glob("step-*"))


@pytest.mark.parametrize(
    ("schedule", "shares"),  # of the peak, by step
    [
        (dict(lr_warmup_steps=4, lr_schedule="constant"), [0.25, 0.5, 0.75, 1, 1]),
        (dict(lr_warmup_fraction=0.4, lr_schedule="constant"), [0.5, 1, 1, 1, 1]),
        (dict(lr_warmup_steps=0, lr_schedule="linear"), [1, 0.775, 0.55, 0.325, 0.1]),
        (dict(lr_warmup_steps=0, lr_schedule="linear", min_lr=0.0), [1, 0.75, 0.5, 0.25, 0]),
        (dict(lr_warmup_steps=0, lr_schedule="cosine", min_lr=PEAK / 2), [1, 0.75 + 0.25 * 0.5**0.5, 0.75, 0.75 - 0.25 * 0.5**0.5, 0.5]),
    ],
    ids=str,
)
def test_the_learning_rate_rises_and_falls_as_asked_for(run, schedule: dict, shares: list[float]):
    assert list(rows(run(train=schedule), "learning_rate").values()) == pytest.approx([PEAK * share for share in shares])


def test_a_validation_sees_as_many_microbatches_as_asked_for_but_for_the_final_one(run, data, monkeypatch):
    seen: list[int] = []
    validate = litgpt.run.validate

    def counted(fabric: Any, model: Any, microbatches: Any) -> float:
        held = list(microbatches)
        seen.append(sum(len(batch.ids) for batch in held))
        return validate(fabric, model, held)

    monkeypatch.setattr(litgpt.run, "validate", counted)
    data.val_split_fraction = 0.5
    run(train=dict(packing=False, max_steps=2), eval=dict(interval=1, max_iters=3, final_validation=True))
    assert seen == [6, 6, 10]


def test_answers_are_shown_for_the_sample_and_in_the_length_asked_for(run, data, monkeypatch):
    lengths: list[int] = []
    complete = loop.complete

    def counted(*args: Any) -> Any:
        answer = list(complete(*args))
        lengths.append(sum(map(len, answer)))
        return answer

    monkeypatch.setattr(loop, "complete", counted)
    data.val_split_fraction = 0.5
    shown = {}
    for which in ("first", 3, "random"):
        out_dir = run(train=dict(max_steps=4), eval=dict(interval=1, max_new_tokens=3, evaluate_example=which))
        shown[which] = list(rows(out_dir, "prompt").values())
    prompts = [record["instruction"] for record in data.val_dataset.data]
    assert set(shown["first"]) == {prompts[0]} and set(shown[3]) == {prompts[3]}
    assert len(set(shown["random"])) > 1 and set(shown["random"]) <= set(prompts)
    assert max(lengths) == 3 and len(lengths) == 3 * len(shown["first"]) == 3 * (1 + 3), "also before the first step"
    assert not rows(run(train=dict(max_steps=1), eval=dict(interval=1, max_new_tokens=None)), "answer")


# The rest


def test_as_many_blocks_are_computed_again_as_asked_for_and_nothing_else_changes(run, fed, monkeypatch):
    again: list[Any] = []
    checkpoint = litgpt.model.checkpoint
    monkeypatch.setattr(litgpt.model, "checkpoint", lambda *args, **how: again.append(args) or checkpoint(*args, **how))
    found = {}
    for wanted, n_layer in (("none", 0), ("full", 2), (1.0, 0)):
        again.clear(), fed.clear()
        found[wanted] = rows(run(train=dict(activation_checkpointing=wanted, max_steps=2)), "loss")
        assert len(again) == n_layer * sum(map(len, fed))
    assert found["none"] == found["full"] == found[1.0]
    with pytest.raises(UserError, match="`train.activation_checkpointing` leaves a microbatch"):
        run(train=dict(activation_checkpointing=1e-6))


def test_a_model_that_is_tied_otherwise_is_refused(run):
    run(train=dict(tie_embeddings=False, max_steps=1))
    with pytest.raises(UserError, match="`train.tie_embeddings` is True, but the model is built the other way"):
        run(train=dict(tie_embeddings=True))


def test_the_options_of_loggers_reach_them_and_what_uploads_the_model(run, monkeypatch):
    made: list[tuple] = []
    sent: list[tuple] = []
    logger = lambda *args: made.append(args) or CSVLogger(args[0])  # noqa: E731
    monkeypatch.setitem(launch.LOGGERS, "mlflow", logger)
    monkeypatch.setattr(litgpt.run, "upload", lambda *args: sent.append(args))
    log = LogArgs(project="p")
    out_dir = run(train=dict(max_steps=1), logger_name="mlflow", log=log)
    assert [args[2] for args in made] == [log] and [args[1:] for args in sent] == [(out_dir / "final", log)]
