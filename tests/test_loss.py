import pytest
import torch
import torch.nn.functional as F
from torch import nn

from litgpt.lora import LoRALinear
from litgpt.loss import token_nll, total_nll


def setup(dtype=torch.float64):
    head = nn.Linear(8, 31, dtype=dtype)
    hidden = torch.randn(3, 10, 8, dtype=dtype, requires_grad=True)
    targets = torch.randint(31, (3, 10))
    targets[0, :4] = targets[2, 5:] = -100
    return head, hidden, targets


def test_chunks_of_any_size_equal_plain_cross_entropy_and_its_gradients():
    head, hidden, targets = setup()
    plain = F.cross_entropy(head(hidden).flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100).view_as(targets)
    weights = torch.randn_like(plain)  # token losses may be weighed by the caller
    expected = torch.autograd.grad((plain * weights).sum(), [hidden, *head.parameters()])
    for chunk in (1, 7, 29, 30, 1000):
        nll = token_nll(head, hidden, targets, chunk)
        torch.testing.assert_close(nll, plain, rtol=0, atol=1e-12)
        for ours, theirs in zip(torch.autograd.grad((nll * weights).sum(), [hidden, *head.parameters()]), expected):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("trained", [True, False], ids=["trained head", "frozen head"])
def test_the_sum_has_the_losses_and_gradients_of_all_tokens_and_calls_the_head_once_a_chunk(trained):
    head, hidden, targets = setup()
    head.requires_grad_(trained)
    wanted = [hidden, *(parameter for parameter in head.parameters() if trained)]
    expected = (token_nll(head, hidden, targets) * 0.3).sum()
    calls = []
    expected_gradients = torch.autograd.grad(expected, wanted)
    head.register_forward_hook(lambda *_: calls.append(1))
    total = total_nll(head, hidden, targets, chunk=7) * 0.3
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(total, wanted), expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert len(calls) == 3 == -(-int((targets != -100).sum()) // 7)


def test_a_second_backward_pass_through_the_sum_is_refused_rather_than_wrong():
    head, hidden, targets = setup()
    total = total_nll(head, hidden, targets)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_no_tensor_larger_than_a_chunk_of_logits_is_made():
    made = []
    head, hidden, targets = setup(torch.float32)
    whole = lambda h: made.append(h.shape[0]) or head(h)  # noqa: E731
    token_nll(whole, hidden, targets, chunk=4).sum().backward()
    head.register_forward_pre_hook(lambda _, inputs: made.append(inputs[0].shape[0]))
    total_nll(head, hidden, targets, chunk=4).backward()
    assert max(made) == 4 and len(made) > 10


def test_losses_of_bf16_logits_are_summed_in_fp32():
    head, hidden, targets = setup(torch.bfloat16)
    assert token_nll(head, hidden, targets).dtype == torch.float32


def test_a_batch_without_targets_has_loss_0_and_zero_gradients():
    head, hidden, targets = setup()
    loss = token_nll(head, hidden, torch.full_like(targets, -100)).sum()
    loss.backward()
    assert loss == 0 and hidden.grad.abs().max() == 0


@pytest.mark.parametrize("loss", [token_nll, total_nll])
@pytest.mark.parametrize("trained", [True, False], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("with_gradients", [True, False])
def test_what_is_ignored_never_reaches_the_head(loss, trained, with_gradients):
    head, hidden, targets = setup()
    head.requires_grad_(trained)
    seen = []
    head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    with torch.set_grad_enabled(with_gradients):
        nll = loss(head, hidden, targets, chunk=5)
    assert torch.equal(torch.cat(seen), hidden.detach().flatten(0, 1)[targets.flatten() != -100])
    if with_gradients:
        nll.sum().backward()
        assert hidden.grad[targets == -100].abs().max() == 0


@pytest.mark.parametrize("loss", [token_nll, total_nll])
@pytest.mark.parametrize("trained", [True, False], ids=["trained head", "frozen head"])
def test_a_head_in_bf16_on_a_cpu_gets_multiples_of_64_rows_and_the_ones_added_count_nothing(loss, trained):
    head, hidden, targets = setup(torch.bfloat16)
    head.requires_grad_(trained)
    seen = []
    head.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    exact = nn.Linear(8, 31, dtype=torch.float64)
    exact.load_state_dict(head.state_dict())
    precise = hidden.detach().double().requires_grad_()
    expected = F.cross_entropy(exact(precise).flatten(0, 1), targets.flatten(), reduction="sum")
    expected.backward()
    nll = loss(head, hidden, targets, chunk=128).sum()
    nll.backward()
    assert seen[:1] == [64] and set(seen) == {64}
    torch.testing.assert_close(nll.double(), expected, rtol=1e-2, atol=0)
    torch.testing.assert_close(hidden.grad.double(), precise.grad, rtol=0, atol=2e-2)
    assert hidden.grad[targets == -100].abs().max() == 0
    if trained:
        torch.testing.assert_close(head.weight.grad.double(), exact.weight.grad, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("loss", [token_nll, total_nll])
@pytest.mark.parametrize("trained", [True, False], ids=["trained head", "frozen head"])
def test_all_ranks_run_the_same_passes_when_one_has_no_target(loss, trained):
    head, hidden, targets = setup()
    head.requires_grad_(trained)
    calls = []
    head.register_forward_hook(lambda *_: calls.append(1))
    nll = loss(head, hidden, torch.full_like(targets, -100))
    nll.sum().backward()
    assert calls and nll.sum() == 0 and hidden.grad.abs().max() == 0
    assert not trained or all(parameter.grad.abs().max() == 0 for parameter in head.parameters())


def heads() -> dict[str, nn.Module]:
    wrapped = LoRALinear(nn.Linear(8, 31).requires_grad_(False), r=2, alpha=4)
    nn.init.normal_(wrapped.lora_B)
    frozen = nn.Linear(8, 31).requires_grad_(False)
    return {"plain": nn.Linear(8, 31), "no bias": nn.Linear(8, 31, bias=False), "LoRA": wrapped, "frozen": frozen}


FINISHES = {"as is": lambda x: x, "scaled": lambda x: x * 0.3, "capped": lambda x: (x * 2 / 5).tanh() * 5}


@pytest.mark.parametrize("name", heads())
@pytest.mark.parametrize("finish", FINISHES.values(), ids=FINISHES)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("total", [True, False], ids=["total", "tokens"])
def test_dropping_what_is_ignored_equals_the_plain_loss(name, finish, autocast, total):
    head, (_, hidden, targets) = heads()[name], setup(torch.float32)
    trained = [hidden, *(parameter for parameter in head.parameters() if parameter.requires_grad)]
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        logits = finish(head(hidden)).flatten(0, 1).float()
        plain = F.cross_entropy(logits, targets.flatten(), ignore_index=-100)
        ours = (total_nll if total else token_nll)(head, hidden, targets, chunk=6, finish=finish).sum() / (targets != -100).sum()
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=0)
    tolerance = {None: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[autocast]  # rounded, here of a chunk, there of all tokens
    for found, expected in zip(torch.autograd.grad(ours, trained), torch.autograd.grad(plain, trained), strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_a_head_that_is_the_embedding_gets_the_gradients_of_both():
    embedding, ids = nn.Embedding(31, 8), torch.randint(31, (2, 9))
    targets = torch.randint(31, (2, 9))
    targets[:, :5] = -100
    head = lambda x: F.linear(x, embedding.weight)  # noqa: E731
    plain = F.cross_entropy(head(embedding(ids)).flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    (expected,) = torch.autograd.grad(plain, embedding.weight)
    (found,) = torch.autograd.grad(token_nll(head, embedding(ids), targets, chunk=3).sum(), embedding.weight)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
