"""Training with compiled blocks: the loss and gradients of plain ones, and as many graphs after two packed rows as after many."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from tiny import tiny_config
from torch import Tensor, nn

from litgpt.adapter_v2 import add_adapter_v2
from litgpt.data.packing import Microbatch, end_to_end
from litgpt.generate.memory import compile_blocks
from litgpt.launch import launch_fabric
from litgpt.model import GPT
from litgpt.training import forward_backward

LENGTHS = [[5, 9, 3], [4, 4], [12, 2, 2, 2, 6], [1, 30], [40]]  # of the texts in each row
KINDS: dict[str, tuple[str, int, Callable[[GPT], Any], dict[str, Any]]] = {  # family, layers, what is trained, the model's attributes
    "all of it": ("llama", 1, lambda model: model, {}),
    "balanced experts, computed again": ("mixtral", 1, lambda model: model, dict(expert_balance=0.1, n_recomputed=1)),
    "Adapter v2": ("llama", 3, partial(add_adapter_v2, seed=0), {}),
}


@pytest.fixture(scope="module")
def fabric() -> Fabric:
    return launch_fabric(accelerator="cpu")


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def built(kind: str) -> GPT:
    """A tiny model; what is trained of it has begun to learn, for much of that starts at zero."""
    family, n_layer, prepare, attributes = KINDS[kind]
    torch.manual_seed(0)
    model = GPT(tiny_config(family, n_layer=n_layer))
    prepare(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    for name, value in attributes.items():
        setattr(model, name, value)
    return model.train()


def packed_rows() -> list[Microbatch]:
    draw = torch.Generator().manual_seed(1)
    texts = [[torch.randint(90, (n + 1,), generator=draw) for n in lengths] for lengths in LENGTHS]
    return [end_to_end([{"input_ids": ids, "labels": ids} for ids in row]) for row in texts]


def passes(fabric: Fabric, model: GPT, after: Callable[[], Any] = lambda: None) -> list[tuple[float, dict[str, Tensor]]]:
    """The loss and the gradients of each row, each of which is a step."""
    found, wrapped = [], fabric.setup_module(model)
    for row in packed_rows():
        loss = forward_backward(fabric, wrapped, [row], row.n_tokens).item()
        found.append((loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
        wrapped.zero_grad()
        after()
    return found


def check_compiled(fabric: Fabric, kind: str, backend: str) -> None:
    """Compare each row. The graphs of the first one serve it alone, so they need not be made machine code of."""
    compiled, graphs, counts = built(kind), [], []

    def counting(graph: nn.Module, inputs: Sequence[Tensor]) -> Callable:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend if counts else "aot_eager")(graph, inputs)

    compile_blocks(compiled, backend=counting, dynamic=None)  # as a run does
    found = passes(fabric, compiled, lambda: counts.append(len(graphs)))
    for (loss, gradients), (expected, plain) in zip(found, passes(fabric, built(kind)), strict=True):
        assert loss == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(gradients, plain, rtol=1e-5, atol=1e-5)
    assert 0 < counts[0] < counts[1] == counts[-1], "the second row shows which sizes change"


@pytest.mark.parametrize("kind", list(KINDS)[1:])
def test_compiled_blocks_have_the_loss_and_gradients_of_plain_ones_and_few_graphs(fabric: Fabric, kind: str):
    check_compiled(fabric, kind, "aot_eager")


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_so_do_blocks_that_are_compiled_to_machine_code(fabric: Fabric):
    check_compiled(fabric, "all of it", "inductor")
