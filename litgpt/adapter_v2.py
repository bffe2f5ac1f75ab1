"""LLaMA-Adapter V2 (arXiv:2304.15010): prefixes as in `litgpt.adapter`, and of every linear layer a scale and a bias, and all norms.

A linear layer becomes y = scale * (W x + b + bias), with scale 1 and bias 0 at first, for each of its output features. The layers of
experts are such layers too: each expert has scales and biases of its own. Embeddings and convolutions stay as they are.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from litgpt import model as base_model
from litgpt.adapter import Block, CausalSelfAttention, Config, add_prefix, add_prefixes  # noqa: F401
from litgpt.adapter import adapter_filter as prefix_filter
from litgpt.experts import Experts, Rows
from litgpt.lora import device_of, take_inside

PREFIX = re.compile(r"transformer\.h\.(\d+)\.attn\.adapter_wte\.weight")


class AdapterV2Linear(nn.Module):
    """A frozen linear layer, and a trainable scale and bias of each feature of its output.

    Args:
        linear: The layer, or any that has `in_features`, `out_features` and `weight` (quantized).
    """

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        self.in_features, self.out_features = linear.in_features, linear.out_features
        like = dict(device=device_of(linear), dtype=torch.float32)
        self.adapter_bias = nn.Parameter(torch.zeros(self.out_features, **like))
        self.adapter_scale = nn.Parameter(torch.ones(self.out_features, **like))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        bias = self.adapter_scale * self.adapter_bias
        return torch.addcmul(bias, y, self.adapter_scale).to(y.dtype)  # in fp32: in 16 bits a scale near 1 has two digits

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Take the weights of a plain linear layer under their own names."""
        take_inside(state_dict, prefix, "linear", ("weight", "bias"))
        super()._load_from_state_dict(state_dict, prefix, *args)


class AdapterV2Experts(Experts):
    """Frozen experts, and trainable scales and biases of what each one's two matrices yield.

    Args:
        experts: The frozen ones.
    """

    def __init__(self, experts: Experts) -> None:
        nn.Module.__init__(self)
        self.base, self.n_expert, self.limit = experts, experts.n_expert, experts.limit
        for name, weight in (("up", experts.gate_up), ("down", experts.down)):
            like = dict(device=weight.device, dtype=torch.float32)
            setattr(self, f"adapter_{name}_bias", nn.Parameter(torch.zeros(weight.shape[:2], **like)))  # (E, out)
            setattr(self, f"adapter_{name}_scale", nn.Parameter(torch.ones(weight.shape[:2], **like)))

    @property
    def down_bias(self) -> Tensor:
        """What each expert's second matrix yields of nothing, (E, C): `mixed_bias` adds it up."""
        bias = self.adapter_down_bias if self.base.down_bias is None else self.adapter_down_bias + self.base.down_bias
        return bias * self.adapter_down_scale

    def project_up(self, x: Tensor, rows: Rows) -> Tensor:
        y = self.base.project_up(x, rows)
        bias, scale = (F.embedding(rows.experts, x) for x in (self.adapter_up_scale * self.adapter_up_bias, self.adapter_up_scale))
        return torch.addcmul(bias, y, scale).to(y.dtype)

    def project_down(self, x: Tensor, rows: Rows) -> Tensor:
        y = self.base.project_down(x, rows)
        return (y * F.embedding(rows.experts, self.adapter_down_scale)).to(y.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Take the weights of plain experts under their own names."""
        take_inside(state_dict, prefix, "base", self.base._parameters)
        super()._load_from_state_dict(state_dict, prefix, *args)


def add_scales(model: nn.Module) -> None:
    """Give every linear layer of a model, and every expert, scales and biases."""
    layers = list(model.named_modules())
    inside = tuple(f"{name}." for name, layer in layers if isinstance(layer, Experts))  # quantized experts are made of linear layers
    for name, layer in layers:
        if isinstance(layer, Experts):
            model.set_submodule(name, AdapterV2Experts(layer))
        elif isinstance(layer, nn.Linear) and not name.startswith(inside):
            model.set_submodule(name, AdapterV2Linear(layer))


def add_adapter_v2(model: base_model.GPT, seed: int = 1337) -> None:
    """Add to a model all that Adapter v2 trains, and freeze the rest.

    Models of one or two layers, and layers without plain attention, get no prefixes.

    Args:
        model: Computes as before.
        seed: Decides what the prefixes begin as.
    """
    add_prefixes(model, seed)
    add_scales(model)
    mark_only_adapter_v2_as_trainable(model)


def mark_only_adapter_v2_as_trainable(model: nn.Module) -> None:
    """Freeze everything but prefixes, gates, scales, biases beside them, and norms."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = adapter_filter(name, parameter)


def adapter_filter(key: str, value: Any) -> bool:
    """Say whether an entry of a state dict is trained: all norms are, wherever in the model they are."""
    return is_new(key) or any(piece == "ln_f" or "norm" in piece for piece in key.split("."))


def is_new(name: str) -> bool:
    """Say whether a parameter is one that the model itself does not have."""
    return any(piece.startswith("adapter_") or piece == "gating_factor" for piece in name.split("."))


def add_stored(model: base_model.GPT, stored: Mapping[str, Tensor], grouped: bool = False) -> bool:
    """Add to a model what a file of Adapter or Adapter v2 holds, and return whether it fits. What is new in the model stays in fp32.

    Norms that the file lacks stay the model's own: LitGPT trains `norm_1`, `norm_2` and `ln_f` alone.

    Args:
        model: The one that the file was trained beside.
        stored: What it holds, under our names.
        grouped: Whether LitGPT trained it when its models had the rows of all queries, then of all keys, then of all values, as ours
            have. It then takes the wrong rows for the keys and values of a prefix: it looks for them behind the queries of each query
            group, where they were before. Nor does it normalise those keys. All else in the file has learned to live with that.
    """
    mixers, is_v2 = model.config.mixers, any(name.endswith("_scale") for name in stored)
    for name, tensor in stored.items():
        if match := PREFIX.fullmatch(name):
            if int(match[1]) >= len(mixers) or mixers[int(match[1])] != "attention" or not tensor.ndim:
                return False
            attn = model.transformer.h[int(match[1])].attn
            add_prefix(attn, len(tensor))
            attn.grouped = grouped
    if is_v2:
        add_scales(model)
    belongs = adapter_filter if is_v2 else prefix_filter
    expected = {name: parameter for name, parameter in model.named_parameters() if belongs(name, parameter)}
    missing = {name for name in expected.keys() - stored.keys() if not is_v2 or is_new(name)}
    if missing or stored.keys() - expected.keys():
        return False
    if any(tensor.shape != expected[name].shape or not tensor.is_floating_point() for name, tensor in stored.items()):
        return False
    for name, tensor in stored.items():
        expected[name].data = tensor.to(expected[name])
    return True


class GPT(base_model.GPT):
    """A `GPT` with prefixes as its config says, and scales and biases; see `mark_only_adapter_v2_as_trainable`."""

    block_class = Block

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        add_scales(self)

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "GPT":
        """Return a randomly initialised model of a known name, see `Config.from_name`."""
        return cls(Config.from_name(name, **overrides))
