"""Optimizers by name, the schedule against its formulas, clipping on one process (on two: test_training)."""

import math

import pytest
import torch

from litgpt.adamw import CompactAdamW
from litgpt.args import OptimizerArgs, TrainArgs
from litgpt.errors import UserError
from litgpt.optim import (
    FirstNonFinite,
    check_schedule,
    clip_gradients,
    learning_rate,
    make_optimizer,
    set_learning_rate,
    warmup_steps,
)


def layer() -> torch.nn.Module:
    return torch.nn.Linear(3, 2)


# Optimizers


@pytest.mark.parametrize("name", ["AdamW", "torch.optim.AdamW", "torch.optim.adamw.AdamW"])
def test_a_class_goes_by_its_name_or_its_path(name):
    optimizer = make_optimizer(OptimizerArgs(name, lr=0.1, betas=(0.8, 0.9), init_args={"eps": 1e-3}), layer())
    assert type(optimizer) is torch.optim.AdamW
    assert (optimizer.defaults["lr"], optimizer.defaults["betas"], optimizer.defaults["eps"]) == (0.1, (0.8, 0.9), 1e-3)


def test_a_class_gets_only_the_arguments_it_takes():
    optimizer = make_optimizer(OptimizerArgs("SGD", lr=0.1, init_args={"momentum": 0.9}), layer())
    assert type(optimizer) is torch.optim.SGD and optimizer.defaults["momentum"] == 0.9 and "betas" not in optimizer.defaults
    assert type(make_optimizer(OptimizerArgs("Rprop"), layer())) is torch.optim.Rprop  # no weight decay either


def test_weights_decay_and_norms_and_biases_do_not():
    model = layer()
    before = [p.detach().clone() for p in (model.weight, model.bias)]
    optimizer = make_optimizer(OptimizerArgs(lr=0.1, weight_decay=0.5), model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before[0] * (1 - 0.1 * 0.5))
    assert torch.equal(model.bias, before[1])


def test_only_what_is_trained_is_in_the_optimizer():
    model = layer()
    model.weight.requires_grad_(False)
    optimizer = make_optimizer(OptimizerArgs(), model)
    assert [p for group in optimizer.param_groups for p in group["params"]] == [model.bias]
    with pytest.raises(UserError, match="frozen"):
        make_optimizer(OptimizerArgs(), model.requires_grad_(False))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (OptimizerArgs("AdmW"), "Did you mean 'AdamW'"),
        (OptimizerArgs("torch.optim.Adamm"), "Did you mean 'Adam"),
        (OptimizerArgs("no_such_package.Adam"), "cannot be imported"),
        (OptimizerArgs("math.sqrt"), "no class of optimizers"),
        (OptimizerArgs("math.nothing"), "no class of optimizers"),
        (OptimizerArgs(init_args={"epsilon": 1}), "'epsilon', which AdamW does not take"),
        (OptimizerArgs(betas=(1.5, 0.9)), "refuses"),
        (OptimizerArgs(lr=-1.0), "refuses"),
        (OptimizerArgs("..AdamW"), "or an import path, but got '..AdamW'"),
        (OptimizerArgs(".AdamW"), "or an import path"),
        (OptimizerArgs(""), "or an import path"),
        (OptimizerArgs("LBFGS"), "LBFGS computes the loss several times"),
        (OptimizerArgs("SparseAdam"), "wants sparse gradients"),
        (OptimizerArgs(init_args={"differentiable": True}), "differentiable"),
        (OptimizerArgs(init_args={"capturable": True}), "is for GPUs"),
        (OptimizerArgs(weight_decay=math.inf), "`weight_decay` is a finite number"),
        (OptimizerArgs(betas=(0.9, math.nan)), "`betas` is a finite number"),
        (OptimizerArgs("SGD", lr=math.nan), "`lr` is a finite number"),
        (OptimizerArgs(init_args={"eps": math.nan}), "`eps` is a finite number"),
        (OptimizerArgs(state="8bits"), "`optimizer.state` is one of full, bf16, 8bit, but got '8bits'. Did you mean '8bit'"),
        (OptimizerArgs("SGD", state="bf16"), "`optimizer.state` bf16 is for AdamW and Adam, but the optimizer is SGD. Use full."),
        (
            OptimizerArgs(state="8bit", init_args={"amsgrad": True}),
            "'amsgrad', which AdamW with `optimizer.state` 8bit does not take. It takes lr, betas, eps, weight_decay\\.",
        ),
        (OptimizerArgs(init_args={"params": []}), "'params', which AdamW does not take"),
        (OptimizerArgs(state="8bit", betas=(0.9, 1.0)), "refuses"),
    ],
    ids=str,
)
def test_a_wrong_optimizer_is_one_sentence(args, words):
    with pytest.raises(UserError, match=words):
        make_optimizer(args, layer())


def every_class() -> list[str]:
    return [name for name, kind in vars(torch.optim).items() if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)]


@pytest.mark.parametrize("name", sorted({*every_class()} - {"Optimizer"}))
def test_every_optimizer_of_torch_makes_a_step_or_is_refused(name):
    model = torch.nn.Linear(3, 2, bias=False)  # Muon takes matrices only
    try:
        optimizer = make_optimizer(OptimizerArgs(name), model)
    except UserError:
        assert name in ("LBFGS", "SparseAdam")
        return
    before = model.weight.detach().clone()
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    assert not torch.equal(before, model.weight)


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adagrad"])
def test_foreach_takes_the_place_of_our_fused_steps(name):
    for foreach in (True, False, None):
        optimizer = make_optimizer(OptimizerArgs(name, init_args={"foreach": foreach}), layer())
        assert optimizer.defaults["fused"] is (None if foreach else True) and optimizer.defaults["foreach"] is foreach
    assert make_optimizer(OptimizerArgs(name, init_args={"fused": False}), layer()).defaults["fused"] is False


def test_the_learning_rate_is_set_in_all_groups():
    optimizer = make_optimizer(OptimizerArgs(), layer())
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


@pytest.mark.parametrize("state", ["bf16", "8bit"])
@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_adam_in_few_bits_gets_the_same_arguments(name, state):
    args = OptimizerArgs(name, lr=0.1, weight_decay=0.5, betas=(0.8, 0.9), state=state, init_args={"eps": 1e-3})
    optimizer = make_optimizer(args, layer())
    settings = dict(lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.5, state=state, decoupled=name == "AdamW")
    assert isinstance(optimizer, CompactAdamW) and optimizer.defaults == settings
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]


def test_parameters_get_the_ratio_of_the_last_part_that_their_name_has():
    model = torch.nn.ModuleDict({"a": layer(), "b": layer()})
    optimizer = make_optimizer(OptimizerArgs(lr=0.5, weight_decay=0.1), model, {"b.": 4.0, "b.bias": 8.0})
    set_learning_rate(optimizer, 0.25)
    found = {parameter: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for parameter in group["params"]}
    rates = {name: found[parameter] for name, parameter in model.named_parameters()}
    assert rates == {"a.weight": (0.25, 0.1), "a.bias": (0.25, 0.0), "b.weight": (1.0, 0.1), "b.bias": (2.0, 0.0)}


# The schedule


def test_the_rate_rises_in_a_line_to_its_peak():
    rates = [learning_rate(step, 1.0, 100, warmup=4) for step in range(1, 6)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and 0.99 < rates[4] < 1.0
    assert learning_rate(1, 1.0, 100) == 1.0, "without a warm-up the first step has the peak"


def test_the_rate_falls_by_the_formula():
    for step in range(10, 111, 10):
        done = (step - 10) / 100
        cosine = 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * done))
        assert learning_rate(step, 1.0, 110, 10, "cosine", 0.2) == pytest.approx(cosine, rel=1e-12)
        assert learning_rate(step, 1.0, 110, 10, "linear", 0.2) == pytest.approx(1 - 0.8 * done, rel=1e-12)
        assert learning_rate(step, 1.0, 110, 10, "constant", 0.2) == 1.0


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_the_last_step_and_all_after_it_have_the_smallest_rate(kind):
    assert [learning_rate(step, 1.0, 50, 5, kind) for step in (50, 51, 5000)] == [pytest.approx(0.1)] * 3
    assert learning_rate(50, 1.0, 50, 5, kind, min_lr=0.0) == pytest.approx(0.0, abs=1e-15)


def test_without_a_planned_end_the_rate_stays_at_its_peak():
    assert learning_rate(10**6, 1.0, None, 10) == 1.0


def test_no_step_has_rate_zero_however_short_the_run():
    for max_steps in range(1, 8):
        for warmup in range(9):
            rates = [learning_rate(step, 1.0, max_steps, warmup) for step in range(1, max_steps + 1)]
            assert all(0 < rate <= 1 for rate in rates)


def test_the_warm_up_is_a_number_a_fraction_or_a_tenth_of_at_most_1000_steps():
    assert warmup_steps(TrainArgs(lr_warmup_steps=7), 50) == 7
    assert warmup_steps(TrainArgs(lr_warmup_fraction=0.25), 50) == 13
    assert [warmup_steps(TrainArgs(), n) for n in (5, 60, 1000, 10**6, None)] == [0, 6, 100, 100, 100]
    with pytest.warns(UserWarning, match="rises in all 5 steps"):
        assert warmup_steps(TrainArgs(lr_warmup_steps=100), 5) == 5
    assert warmup_steps(TrainArgs(lr_warmup_steps=100), 1) == 1
    with pytest.raises(UserError, match="lr_warmup_steps"):
        warmup_steps(TrainArgs(lr_warmup_fraction=0.5), None)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (dict(lr_warmup_steps=1, lr_warmup_fraction=0.1), "Give one of them"),
        (dict(lr_warmup_fraction=1.5), "between 0 and 1, but got 1.5"),
        (dict(lr_warmup_fraction=-0.1), "between 0 and 1"),
        (dict(lr_warmup_steps=-1), "got -1"),
        (dict(min_lr=2.0), "min_lr"),
        (dict(min_lr=math.nan), "min_lr"),
        (dict(min_lr=math.nan, lr_schedule="constant"), "min_lr"),
        (dict(lr_warmup_fraction=math.nan), "between 0 and 1"),
    ],
    ids=str,
)
def test_a_wrong_schedule_is_one_sentence(wrong, words):
    with pytest.raises(UserError, match=words):
        check_schedule(TrainArgs(**wrong), lr=1.0)
    check_schedule(TrainArgs(lr_warmup_steps=0, min_lr=0.5), lr=1.0)
    for lr in (0.0, math.nan, math.inf, None):
        with pytest.raises(UserError, match="positive"):
            check_schedule(TrainArgs(), lr=lr)


# Clipping


@pytest.mark.parametrize("max_norm", [0.1, 1e9])
def test_clipping_equals_torchs(max_norm):
    ours, theirs = layer(), layer()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        mine.grad = torch.randn_like(mine)
        other.grad = mine.grad.clone()
    norm = clip_gradients(ours, max_norm)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm))
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_without_a_limit_gradients_stay_and_their_norm_is_told():
    model = layer()
    model.weight.grad = torch.full((2, 3), 2.0)
    assert clip_gradients(model, None).item() == pytest.approx(math.sqrt(24)) and model.weight.grad.eq(2).all()
    assert clip_gradients(layer(), 1.0).item() == 0


def test_the_norm_of_small_gradients_is_summed_in_fp32():
    model = layer().bfloat16()
    model.weight.grad = torch.full((2, 3), 1.0, dtype=torch.bfloat16)
    assert clip_gradients(model, None).item() == pytest.approx(math.sqrt(6), rel=1e-6)


# What is not finite


def backward(spoilt: list[int], large: bool = False) -> tuple[torch.nn.Module, FirstNonFinite]:
    """Four layers of which some have gradients that are not finite, after they were clipped in step 3."""
    model = torch.nn.Sequential(*(torch.nn.Linear(3, 3, bias=False) for _ in range(4)))
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 1e30 if large else 1.0)
        if i in spoilt:
            parameter.grad[1, 2] = (math.nan, math.inf)[i % 2]
    flag = FirstNonFinite("cpu")
    clip_gradients(model, 1.0, flag, 3)
    return model, flag


@pytest.mark.parametrize("spoilt", [[2], [1], [0, 1, 2], [0, 2], [3], [0, 1, 2, 3]])
def test_the_layer_that_the_backward_pass_met_first_is_named(spoilt):
    with pytest.raises(UserError, match=rf"The gradients of step 3 were not finite, first that of '{max(spoilt)}.weight', so training"):
        backward(spoilt)[1].check()


def test_a_norm_that_is_too_large_to_be_a_number_is_not_finite():
    with pytest.raises(UserError, match=r"gradients of step 3 were not finite, first that of '3.weight'"):
        backward([], large=True)[1].check()


def test_the_first_step_sticks_and_its_samples_are_named():
    backward([])[1].check()
    model, flag = backward([1])
    flag.samples_of = lambda step: f"the samples of {step}"
    for parameter in model.parameters():
        parameter.grad.fill_(math.nan)
    clip_gradients(model, None, flag, 4)
    flag.update_loss(torch.tensor(math.inf), 4)
    assert flag.step() == 3
    with pytest.raises(UserError, match="step 3 were not finite, first that of '1.weight', on the samples of 3, so training stopped"):
        flag.check()


def test_a_loss_that_is_not_finite_is_named_before_the_gradients_of_its_step():
    model, flag = backward([0])
    flag.update_loss(torch.tensor(1.0), 2)
    flag.update_loss(torch.tensor(math.nan), 3)
    with pytest.raises(UserError, match=r"The loss of step 3 was not finite, so training stopped there"):
        flag.check()
