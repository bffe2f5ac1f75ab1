"""LitGPT's names of weights, as in `lit_model.pth`, where they are not ours: its experts are kept apart, ours are stacks."""

import re
from collections.abc import Iterable, Iterator

from torch import Tensor

from litgpt.config import Config
from litgpt.translate import find_rule, names_of, translate
from litgpt.weights import Rule, interleaved_qkv, same, stacked

MLP, ATTENTION = "transformer.h.{}.mlp", "transformer.h.{}.attn"
LITGPTS: list[Rule] = [
    stacked([f"{MLP}.experts.{{}}.{x}.weight" for x in ("fc_1", "fc_2")], f"{MLP}.experts.gate_up", "n_expert"),
    stacked(f"{MLP}.experts.{{}}.proj.weight", f"{MLP}.experts.down", "n_expert"),
    same(f"{MLP}.gate.e_score_correction_bias", f"{MLP}.correction"),
    *(same(f"{MLP}.shared_experts.{x}.*", f"{MLP}.shared.{x}.*") for x in ("fc_1", "fc_2", "proj")),
    *(same(f"{ATTENTION}.{x}_proj.*", f"{ATTENTION}.{x}.*") for x in ("q_a", "q_b", "kv_b")),
    same(f"{ATTENTION}.kv_a_proj_with_mqa.*", f"{ATTENTION}.kv_a.*"),
]
ADAPTER_V2: list[Rule] = [
    rule
    for kind in ("adapter_bias", "adapter_scale")
    for rule in (
        stacked([f"{MLP}.experts.{{}}.{x}.{kind}" for x in ("fc_1", "fc_2")], f"{MLP}.experts.{kind.replace('_', '_up_')}", "n_expert"),
        stacked(f"{MLP}.experts.{{}}.proj.{kind}", f"{MLP}.experts.{kind.replace('_', '_down_')}", "n_expert"),
        *(same(f"{MLP}.shared_experts.{x}.{kind}", f"{MLP}.shared.{x}.{kind}") for x in ("fc_1", "fc_2", "proj")),
    )
]
OLDER = [interleaved_qkv(f"{ATTENTION}.attn.{x}", f"{ATTENTION}.qkv.{x}") for x in ("*", "adapter_bias", "adapter_scale")]  # by query group


def from_litgpt_names(weights: Iterable[tuple[str, Tensor]], config: Config) -> Iterator[tuple[str, Tensor]]:
    """Yield weights, or what LoRA or Adapter v2 trains, under our names; what has another name already keeps it.

    Args:
        weights: Names and tensors as LitGPT, or an older version of it, stores them.
        config: Their architecture.

    Raises:
        UserError: An expert is missing, or rows do not fit the config.
    """

    def renamed() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            older = re.fullmatch(r"(.*\.attn)\.attn\.(.*)", name)
            if older is None:
                gates = name.endswith(".gating_factor") and tensor.ndim == 4  # once (1, H, 1, 1)
                yield name, tensor.reshape(1, 1, -1, 1) if gates else tensor
            elif older[2] in ("linear.weight", "linear.bias"):  # beside factors of LoRA
                yield name.replace(".linear.", "."), tensor
            elif older[2] in ("weight", "bias", "adapter_bias", "adapter_scale"):
                yield name, tensor
            else:  # A is stacked by q, k, v in both layouts, and so is B
                yield f"{older[1]}.qkv.{older[2]}", tensor

    return _translated(renamed(), [*LITGPTS, *ADAPTER_V2, *OLDER], config, to_ours=True)


def to_litgpt_names(weights: Iterable[tuple[str, Tensor]], config: Config) -> Iterator[tuple[str, Tensor]]:
    """Yield weights of ours under the names that LitGPT has for them.

    Args:
        weights: Names and tensors of a model.
        config: Its architecture.
    """
    return _translated(weights, LITGPTS, config, to_ours=False)


def _translated(weights: Iterable[tuple[str, Tensor]], rules: list[Rule], config: Config, to_ours: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield weights as the rules rename them, and those that no rule knows as they are."""
    names, pairs = names_of(rules, to_ours), list(weights)
    known = {name for name, _ in pairs if find_rule(name, names) is not None}
    yield from (pair for pair in pairs if pair[0] not in known)
    yield from translate((pair for pair in pairs if pair[0] in known), rules, config, to_ours)
