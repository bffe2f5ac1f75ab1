"""Rotary position embeddings, and the ways in which checkpoints stretch them (arXiv:2104.09864)."""

import math
from typing import Any

import torch
from torch import Tensor

from litgpt.config import Config


class Rope:
    """The angles by which positions turn queries and keys.

    Not a module: its table stays in fp32 whatever dtype the model is cast to, and it survives a model made on the meta device.

    Args:
        config: Names the base, the rotated share of a head and the scaling.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.kinds = set(config.rope_indices or [0]) if config.rope_n_elem else {None}
        scaling = config.rope_adjustments or {}
        self.depends_on_length = bool(scaling.get("dynamic")) or "long_factor" in scaling
        self.tables: dict[tuple[torch.device, int], tuple[Tensor, float]] = {}

    def rotations(self, positions: Tensor, length: int, dtype: torch.dtype) -> dict[int | None, tuple[Tensor, Tensor] | None]:
        """Return for each kind of angles that layers turn by what `rotation` says; None for layers that do not turn."""
        return {kind: None if kind is None else self.rotation(positions, length, dtype, kind) for kind in self.kinds}

    def rotation(self, positions: Tensor, length: int, dtype: torch.dtype, kind: int = 0) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, each (..., T, 1, n), of positions (..., T); the first sine of a pair is negated, see `rotated`.

        Args:
            positions: Whole numbers; negative ones are padding and get any angle.
            length: How long the sequence may get; only dynamic scaling and LongRoPE look at it.
            dtype: Of the result. The angles are computed in fp32.
            kind: 0 for the global base, 1 for the local one.
        """
        frequencies, scale = self._table(positions.device, length, kind)
        angles = (positions.unsqueeze(-1) * frequencies).unsqueeze(-2)  # (..., T, 1, n / 2)
        cosines, sines = angles.cos() * scale, angles.sin() * scale
        pairs = (cosines, cosines), (-sines, sines)
        if self.config.rope_interleave:
            return tuple(torch.stack(pair, -1).flatten(-2).to(dtype) for pair in pairs)
        return tuple(torch.cat(pair, -1).to(dtype) for pair in pairs)

    def query_scale(self, positions: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Return what queries (..., T, H, D) are multiplied by, where it grows with the position as in Llama 4; else None."""
        scaling = self.config.rope_adjustments or {}
        if not scaling.get("llama_4_scaling_beta"):
            return None
        turns = (positions.clamp(min=0) / scaling["original_max_seq_len"]).floor()
        return (1 + scaling["llama_4_scaling_beta"] * turns.log1p()).view(*positions.shape, 1, 1).to(dtype)

    def _table(self, device: torch.device, length: int, kind: int) -> tuple[Tensor, float]:
        if self.depends_on_length and kind == 0:
            frequencies, scale = inverse_frequencies(self.config, length)
            return frequencies.to(device), scale
        if (device, kind) not in self.tables:
            frequencies, scale = inverse_frequencies(self.config, local=kind == 1)
            self.tables[device, kind] = frequencies.to(device), scale
        return self.tables[device, kind]


def rotated(x: Tensor, rotation: tuple[Tensor, Tensor], interleave: bool = False) -> Tensor:
    """Turn each pair of the first n features of x (B, T, H, D) by its token's angle; the rest passes through.

    Args:
        x: Queries or keys.
        rotation: What `Rope.rotation` returns.
        interleave: Pairs are neighbours, instead of features n / 2 apart.
    """
    cosines, sines = rotation
    n = cosines.size(-1)
    turning = x if n == x.size(-1) else x[..., :n]
    if interleave:
        swapped = turning.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        first, second = turning.chunk(2, dim=-1)
        swapped = torch.cat((second, first), dim=-1)
    turned = torch.addcmul(turning * cosines, swapped, sines)
    return turned if n == x.size(-1) else torch.cat((turned, x[..., n:]), dim=-1)


def inverse_frequencies(config: Config, length: int | None = None, local: bool = False) -> tuple[Tensor, float]:
    """Return the radians per position of each pair, (rope_n_elem / 2,) in fp32 on the CPU, and the factor for cosines and sines.

    Args:
        config: `rope_adjustments` names the scaling: none, linear (`factor` alone), dynamic, llama3, yarn or longrope.
        length: The longest sequence of this chain of calls; only dynamic scaling and LongRoPE look at it.
        local: Of the local base, which is never scaled.
    """
    n = config.rope_n_elem
    if local:
        return _frequencies(n, float(config.rope_local_base_freq)), 1.0
    base = float(config.rope_base)
    plain = _frequencies(n, base) / config.rope_condense_ratio
    scaling = config.rope_adjustments
    if not scaling:
        return plain, 1.0
    if scaling.get("dynamic"):
        return _dynamic(n, base, scaling["factor"], config.block_size, length or config.block_size), 1.0
    if "low_freq_factor" in scaling:
        return _llama3(plain, scaling, config.block_size), 1.0
    if "long_factor" in scaling:
        return _longrope(plain, scaling, config.block_size, length or config.block_size)
    if "beta_fast" in scaling or scaling.get("rope_type") == "yarn":
        return _yarn(plain, n, base, scaling, config.block_size)
    return plain / scaling["factor"], 1.0


def _frequencies(n: int, base: float) -> Tensor:
    return 1.0 / base ** (torch.arange(0, n, 2, dtype=torch.int64, device="cpu").float() / n)


def _dynamic(n: int, base: float, factor: float, trained: int, length: int) -> Tensor:
    """NTK-aware scaling that grows with the sequence: the base is raised so that the slowest pair just covers it."""
    longer = factor * max(length, trained) / trained - (factor - 1)
    return _frequencies(n, base * longer ** (n / (n - 2)))


def _llama3(plain: Tensor, scaling: dict[str, Any], block_size: int) -> Tensor:
    """Llama 3.1: slow pairs are stretched, fast ones kept, and those between blended."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = (scaling.get("original_max_seq_len") or block_size) * plain / (2 * math.pi)  # over the context of pretraining
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * plain / scaling["factor"] + kept * plain


def _longrope(plain: Tensor, scaling: dict[str, Any], block_size: int, length: int) -> tuple[Tensor, float]:
    """LongRoPE (arXiv:2402.13753): each pair has its own factor, one within the context of pretraining and one for longer sequences."""
    trained = scaling.get("original_max_seq_len") or block_size
    factors = torch.tensor(scaling["long_factor" if length > trained else "short_factor"], dtype=torch.float32, device="cpu")
    longer = scaling.get("factor") or block_size / trained
    scale = scaling.get("attention_factor")
    if scale is None:
        scale = math.sqrt(1 + math.log(longer) / math.log(trained)) if longer > 1 else 1.0
    return plain / factors, scale


def _yarn(plain: Tensor, n: int, base: float, scaling: dict[str, Any], block_size: int) -> tuple[Tensor, float]:
    """YaRN (arXiv:2309.00071): pairs that turn often are kept, those that never turn once are stretched, with a ramp between."""
    trained = scaling.get("original_max_seq_len") or block_size
    factor = scaling.get("factor") or block_size / trained

    def pair_of(turns: float) -> float:
        """Return which pair makes so many turns over the context of pretraining."""
        return n * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = pair_of(scaling.get("beta_fast") or 32), pair_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, n - 1)
    ramp = (torch.arange(n // 2, device="cpu").float() - first) / max(last - first, 0.001)
    stretched = ramp.clamp(0, 1)
    return plain / factor * stretched + plain * (1 - stretched), _yarn_scale(factor, scaling)


def _yarn_scale(factor: float, scaling: dict[str, Any]) -> float:
    def temperature(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return temperature(scaling["mscale"]) / temperature(scaling["mscale_all_dim"])
    return temperature(1.0)
