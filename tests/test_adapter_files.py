"""What LitGPT's `finetune_adapter_v2` wrote: read, it computes what LitGPT computed."""

from pathlib import Path

import pytest
import torch
import yaml
from tiny import tiny_config
from torch import Tensor

from litgpt import names
from litgpt.adapter_v2 import AdapterV2Experts, add_adapter_v2
from litgpt.checkpoint import load_model, write_checkpoint
from litgpt.config import Config
from litgpt.errors import UserError
from litgpt.litgpt_layout import from_litgpt_names
from litgpt.model import GPT

H, G, D, P = 4, 2, 8, 10  # heads, query groups, features of a head, embeddings of a prefix
IDS = torch.arange(3, 27).view(2, 12)
LAYERS = {"attn.qkv": (H + 2 * G) * D, "attn.proj": 32, "mlp.fc_1": 48, "mlp.fc_2": 48, "mlp.proj": 32}


def litgpts_file(config: Config) -> dict[str, Tensor]:
    """What the file holds, by the names and shapes of LitGPT's interface page, section 2.2: random numbers."""
    made = {"lm_head.adapter_bias": 0.1 * torch.randn(96), "lm_head.adapter_scale": 1 + 0.3 * torch.randn(96)}
    made["transformer.ln_f.weight"] = 1 + 0.3 * torch.randn(32)
    for i in range(config.n_layer):
        block = f"transformer.h.{i}"
        made |= {f"{block}.{norm}.weight": 1 + 0.3 * torch.randn(32) for norm in ("norm_1", "norm_2")}
        for layer, size in LAYERS.items():
            made[f"{block}.{layer}.adapter_bias"] = 0.1 * torch.randn(size)
            made[f"{block}.{layer}.adapter_scale"] = 1 + 0.3 * torch.randn(size)
        if i >= 2:
            made[f"{block}.attn.adapter_wte.weight"] = torch.randn(P, 32)
            made[f"{block}.attn.gating_factor"] = torch.randn(1, 1, H, 1)
    return made


def by_group(rows: Tensor) -> Tensor:
    """Rows that lie [all q | all k | all v] in LitGPT's older order: the queries, the key and the value of one group after the other."""
    q, k, v = rows.split((H * D, G * D, G * D))
    parts = [part.unflatten(0, (G, -1)) for part in (q, k, v)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def prefix_rows(rows: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """The keys and values (P, G, D) that LitGPT finds among what the projection makes of a prefix (P, (H + 2 G) D)."""
    if layout == "older":  # by then the projection's rows did lie by group
        rows = by_group(rows.T).T
    groups = rows.unflatten(1, (G, H // G + 2, D))
    return groups[:, :, -2], groups[:, :, -1]


def formula(w: dict[str, Tensor], config: Config, ids: Tensor, layout: str) -> Tensor:
    """The logits of one text, in float64, written from the formulas."""
    w = {name: tensor.double() for name, tensor in w.items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return w[f"{name}.adapter_scale"] * (x @ w[f"{name}.weight"].T + w[f"{name}.adapter_bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return w[f"{name}.weight"] * x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()

    def turned(x: Tensor) -> Tensor:  # (T, heads, D)
        angles = torch.arange(len(x))[:, None] * config.rope_base ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
        cos, sin, (a, b) = angles.cos()[:, None], angles.sin()[:, None], x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    x = w["transformer.wte.weight"][ids]
    hidden = torch.ones(len(ids), len(ids)).triu(1).bool()
    for i in range(config.n_layer):
        block = f"transformer.h.{i}"
        q, k, v = linear(f"{block}.attn.qkv", norm(f"{block}.norm_1", x)).split((H * D, G * D, G * D), -1)
        q, k, v = turned(q.unflatten(-1, (H, D))), turned(k.unflatten(-1, (G, D))), v.unflatten(-1, (G, D))
        y = torch.zeros_like(q)
        for head in range(H):
            group = head // (H // G)
            scores = (q[:, head] @ k[:, group].T / D**0.5).masked_fill(hidden, -torch.inf)
            y[:, head] = scores.softmax(-1) @ v[:, group]
            if i >= 2:
                keys, values = prefix_rows(linear(f"{block}.attn.qkv", w[f"{block}.attn.adapter_wte.weight"]), layout)
                gathered = (q[:, head] @ keys[:, group].T / D**0.5).softmax(-1) @ values[:, group]
                y[:, head] += w[f"{block}.attn.gating_factor"].flatten()[head] * gathered
        x = x + linear(f"{block}.attn.proj", y.flatten(1))
        normed = norm(f"{block}.norm_2", x)
        gate = linear(f"{block}.mlp.fc_1", normed)
        x = x + linear(f"{block}.mlp.proj", gate * gate.sigmoid() * linear(f"{block}.mlp.fc_2", normed))
    return linear("lm_head", norm("transformer.ln_f", x))


@pytest.fixture
def base(tmp_path: Path) -> tuple[Path, GPT]:
    config = tiny_config("llama", n_layer=4, tie_embeddings=False, rope_adjustments=None)
    model = GPT(config)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    write_checkpoint(tmp_path / "base", model.state_dict(), config)
    return tmp_path / "base", model


def litgpts_folder(place: Path, base: Path, weights: dict[str, Tensor], name: str = names.LIT_ADAPTER_V2) -> Path:
    place.mkdir()
    torch.save({"model": weights}, place / name)
    (place / names.HYPERPARAMETERS).write_text(yaml.safe_dump({"checkpoint_dir": str(base), "precision": "bf16-true"}))
    for file in (names.CONFIG, names.LIT_CONFIG):
        (place / file).write_bytes((base / file).read_bytes())
    return place


def as_older(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same under the older names and in the older order of rows."""
    older = {}
    for name, tensor in weights.items():
        if ".attn.qkv." in name:
            name, tensor = name.replace(".attn.qkv.", ".attn.attn."), by_group(tensor)
        older[name] = tensor.transpose(1, 2) if name.endswith("gating_factor") else tensor
    return older


@pytest.mark.parametrize("layout", ["of today", "older"])
def test_a_file_of_litgpts_has_the_logits_that_its_formulas_give(base: tuple[Path, GPT], tmp_path: Path, layout: str):
    folder, model = base
    trained = litgpts_file(model.config)
    made = litgpts_folder(tmp_path / "tuned", folder, as_older(trained) if layout == "older" else trained)
    with torch.inference_mode():
        found = {"its folder": load_model(made)(IDS), "the base with it": load_model(folder, adapter=made)(IDS)}
    expected = torch.stack([formula(model.state_dict() | trained, model.config, ids, layout) for ids in IDS])
    for where, logits in found.items():
        torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4, msg=where)
    other = "older" if layout == "of today" else "of today"
    mixed = torch.stack([formula(model.state_dict() | trained, model.config, ids, other) for ids in IDS])
    assert (mixed - expected).abs().max() > 0.1, "it matters which rows are the keys and values"


def test_experts_of_litgpts_file_get_their_scales_and_biases():
    config = tiny_config("mixtral", n_layer=1)
    model = GPT(config)
    add_adapter_v2(model)
    experts = model.transformer.h[0].mlp.experts
    assert isinstance(experts, AdapterV2Experts)
    theirs, expected = {}, {}
    for kind in ("bias", "scale"):
        for part, (size, leaves) in {"up": (config.moe_intermediate_size, ("fc_1", "fc_2")), "down": (32, ("proj",))}.items():
            rows = torch.randn(config.n_expert, size * len(leaves))
            expected[f"transformer.h.0.mlp.experts.adapter_{part}_{kind}"] = rows
            for e in range(config.n_expert):
                for leaf, values in zip(leaves, rows[e].split(size), strict=True):
                    theirs[f"transformer.h.0.mlp.experts.{e}.{leaf}.adapter_{kind}"] = values
        theirs[f"transformer.h.0.mlp.gate.adapter_{kind}"] = expected[f"transformer.h.0.mlp.gate.adapter_{kind}"] = torch.randn(4)
    ours = dict(from_litgpt_names(theirs.items(), config))
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert all(shapes[name] == tensor.shape for name, tensor in ours.items())


def test_litgpts_adapter_files_are_refused_in_one_sentence(base: tuple[Path, GPT], tmp_path: Path):
    weights = {name: tensor for name, tensor in litgpts_file(base[1].config).items() if "wte" in name or "gating" in name}
    made = litgpts_folder(tmp_path / "tuned", base[0], weights, names.LIT_ADAPTER)
    with pytest.raises(UserError, match="is of LitGPT's finetune_adapter, which never trains its prefixes.*Train it again"):
        load_model(made)


@pytest.mark.parametrize("what", ["a layer too many", "another width", "whole numbers", "half of it", "a weight of the base"])
def test_a_file_that_does_not_fit_is_refused(base: tuple[Path, GPT], tmp_path: Path, what: str):
    trained = litgpts_file(base[1].config)
    if what == "a layer too many":
        trained["transformer.h.9.attn.adapter_wte.weight"] = torch.randn(P, 32)
    elif what == "another width":
        trained["lm_head.adapter_scale"] = torch.randn(97)
    elif what == "whole numbers":
        trained["lm_head.adapter_scale"] = torch.ones(96, dtype=torch.int64)
    elif what == "half of it":
        del trained["transformer.h.2.attn.gating_factor"]
    else:
        trained["transformer.wte.weight"] = torch.randn(96, 32)
    made = litgpts_folder(tmp_path / "tuned", base[0], trained)
    with pytest.raises(UserError, match=f"in {made} does not fit the base model {base[0]}"):
        load_model(made)
