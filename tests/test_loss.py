import torch
import torch.nn.functional as F
from torch import nn

from litgpt.loss import token_nll


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


def test_a_frozen_head_gives_the_same_losses_and_gradients_and_is_called_once_a_chunk():
    head, hidden, targets = setup()
    weights = torch.randn(targets.shape, dtype=hidden.dtype)
    expected = torch.autograd.grad((token_nll(head, hidden, targets) * weights).sum(), hidden)[0]
    head.requires_grad_(False)
    calls = []
    head.register_forward_hook(lambda *_: calls.append(1))
    nll = token_nll(head, hidden, targets, chunk=7)
    ours = torch.autograd.grad((nll * weights).sum(), hidden)[0]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    assert len(calls) == 5 == -(-targets.numel() // 7)


def test_no_tensor_larger_than_a_chunk_of_logits_is_made():
    made = []
    head, hidden, targets = setup(torch.float32)
    whole = lambda h: made.append(h.shape[0]) or head(h)  # noqa: E731
    token_nll(whole, hidden, targets, chunk=4).sum().backward()
    assert max(made) == 4


def test_losses_of_bf16_logits_are_summed_in_fp32():
    head, hidden, targets = setup(torch.bfloat16)
    assert token_nll(head, hidden, targets).dtype == torch.float32


def test_a_batch_without_targets_has_loss_0_and_zero_gradients():
    head, hidden, targets = setup()
    loss = token_nll(head, hidden, torch.full_like(targets, -100)).sum()
    loss.backward()
    assert loss == 0 and hidden.grad.abs().max() == 0
