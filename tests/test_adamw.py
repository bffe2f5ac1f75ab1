"""AdamW with small averages against torch's with large ones."""

import math

import pytest
import torch
from torch import Tensor, nn

from litgpt.adamw import FORMATS, CompactAdamW

KINDS = ["bf16", "8bit"]


def averages(optimizer: CompactAdamW, parameter: Tensor, state: str) -> tuple[Tensor, Tensor]:
    """What an optimizer remembers of a matrix, in fp32."""
    return FORMATS[state][1](optimizer.state[parameter])


def trained(optimizer_of, n_steps: int = 200) -> tuple[Tensor, list[float]]:
    """A small network that learns from noisy batches: how far its weights moved, and its losses."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 300), nn.Tanh(), nn.Linear(300, 5))
    truth = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5))
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    optimizer, losses = optimizer_of(model.parameters()), []
    for _ in range(n_steps):
        x = torch.randn(32, 20)
        loss = (model(x) - 3 * truth(x).detach()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.cat([p.detach().flatten() for p in model.parameters()]) - start, losses


@pytest.mark.parametrize("beta_2", [0.95, 0.999])
@pytest.mark.parametrize(("state", "tolerance"), [("bf16", 0.02), ("8bit", 0.08)])
def test_training_takes_the_way_that_it_takes_with_large_averages(state: str, tolerance: float, beta_2: float):
    settings = dict(lr=3e-3, betas=(0.9, beta_2), weight_decay=0.01)
    way, losses = trained(lambda parameters: torch.optim.AdamW(parameters, **settings))
    ours, our_losses = trained(lambda parameters: CompactAdamW(parameters, state=state, **settings))
    assert losses[-1] < 0.2 * losses[0]
    assert (ours - way).norm() < tolerance * way.norm()
    assert sum(our_losses[-50:]) == pytest.approx(sum(losses[-50:]), rel=tolerance)


@pytest.mark.parametrize("state", KINDS)
def test_a_large_gradient_is_forgotten_as_fast_as_with_large_averages(state: str):
    """At a rate of 0.999, one step changes an average by less than half of what lies between two bf16 numbers."""
    weight = nn.Parameter(torch.zeros(8, 512))
    optimizer = CompactAdamW([weight], lr=0.0, betas=(0.9, 0.999), state=state)
    torch.manual_seed(0)
    v, nearest = torch.zeros(8, 512), torch.zeros(8, 512, dtype=torch.bfloat16)
    for step in range(1000):
        weight.grad = torch.randn(8, 512) * (1.0 if step < 100 else 1e-3)
        weight.grad[:, :32] += 0.5  # which keep the scale of their blocks
        optimizer.step()
        v = v * 0.999 + 0.001 * weight.grad.square()
        nearest = (nearest.float() * 0.999 + 0.001 * weight.grad.square()).bfloat16()
    found = averages(optimizer, weight, state)[1]
    ratio = found[:, 32:].sqrt().mean() / v[:, 32:].sqrt().mean()
    assert 0.9 < ratio < 1.1
    assert nearest[:, 32:].float().sqrt().mean() > 1.3 * v[:, 32:].sqrt().mean(), "control: rounding to the nearest does not forget"


@pytest.mark.parametrize("state", KINDS)
@pytest.mark.parametrize(("kind", "decoupled"), [(torch.optim.AdamW, True), (torch.optim.Adam, False)])
def test_weights_of_one_dimension_and_first_steps_equal_torchs(state: str, kind: type, decoupled: bool):
    torch.manual_seed(0)
    settings = dict(lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    start = [torch.randn(7), torch.randn(6, 300), torch.randn(2, 3, 5)]
    ours, theirs = ([nn.Parameter(tensor.clone()) for tensor in start] for _ in range(2))
    mine, other = CompactAdamW(ours, state=state, decoupled=decoupled, **settings), kind(theirs, **settings)
    for step in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        mine.step()
        other.step()
        for a, b in zip(ours[: 3 if step == 0 else 1], theirs, strict=False):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n_columns", [1, 5, 255, 256, 257, 513, 1000])
@pytest.mark.parametrize("state", KINDS)
def test_what_is_written_is_read_again_within_half_a_percent_of_the_largest_number(state: str, n_columns: int):
    torch.manual_seed(0)
    parameter, (new, read, write) = torch.zeros(50, n_columns), FORMATS[state]
    m, v = torch.randn(50, n_columns) * torch.logspace(-4, 4, 50)[:, None], torch.rand(50, n_columns)
    held, sums = new(parameter), torch.zeros(2, 50, n_columns)
    assert all(tensor.eq(0).all() for tensor in read(held))
    thresholds = torch.linspace(0, 1, 101)[:-1]
    for threshold in thresholds:
        write(held, m.clone(), v.clone(), threshold.expand(n_columns))
        sums += torch.stack(read(held)) / len(thresholds)
        for one, whole in zip(read(held), (m, v), strict=True):
            assert ((one - whole).abs().amax(1) <= 0.02 * whole.abs().amax(1)).all()
    for mean, whole in zip(sums, (m, v), strict=True):  # over all thresholds nothing is lost
        assert ((mean - whole).abs().amax(1) <= 0.0005 * whole.abs().amax(1)).all()


def test_a_tiny_gradient_beside_a_huge_one_makes_no_huge_step():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(8, 256))
    optimizer = CompactAdamW([weight], lr=1.0, betas=(0.9, 0.95), state="8bit")
    for _ in range(50):
        before = weight.detach().clone()
        weight.grad = torch.randn(8, 256) * torch.logspace(-12, 0, 256)
        optimizer.step()
        assert (weight - before).abs().max() < 6  # torch's is at most 1 / sqrt(1 - 0.95)


@pytest.mark.parametrize("state", KINDS)
def test_averages_take_a_half_or_a_quarter_of_the_memory(state: str):
    weight = nn.Parameter(torch.zeros(64, 1024))
    weight.grad = torch.ones_like(weight)
    sizes = {}
    for name, optimizer in (("full", torch.optim.AdamW([weight])), (state, CompactAdamW([weight], state=state))):
        optimizer.step()
        sizes[name] = sum(value.numel() * value.element_size() for value in optimizer.state[weight].values() if isinstance(value, Tensor))
    assert sizes[state] <= sizes["full"] * {"bf16": 0.5, "8bit": 0.26}[state]


@pytest.mark.parametrize("state", KINDS)
def test_a_weight_that_is_changed_in_parts_is_changed_as_its_rows_alone(state: str):
    torch.manual_seed(0)
    start = torch.randn(300, 1000)  # more than one part holds
    whole, upper, lower = (nn.Parameter(part.clone()) for part in (start, start[:130], start[130:]))
    one, two = CompactAdamW([whole], state=state), CompactAdamW([upper, lower], state=state)
    for _ in range(3):
        whole.grad = torch.randn(300, 1000)
        upper.grad, lower.grad = whole.grad[:130].clone(), whole.grad[130:].clone()
        one.step()
        two.step()
    assert torch.equal(whole, torch.cat([upper, lower]))


def test_weights_in_bf16_are_trained_too():
    weight = nn.Parameter(torch.ones(4, 300, dtype=torch.bfloat16))
    weight.grad = torch.ones_like(weight)
    CompactAdamW([weight], lr=0.25, state="8bit").step()
    assert weight.dtype == torch.bfloat16 and weight.eq(0.75).all()


def test_what_is_not_finite_is_not_hidden():
    for state in KINDS:
        weight = nn.Parameter(torch.ones(4, 300))
        weight.grad = torch.ones_like(weight)
        weight.grad[2, 7] = math.nan
        CompactAdamW([weight], state=state).step()
        assert not weight[2, 7].isfinite() and weight[0].isfinite().all()
