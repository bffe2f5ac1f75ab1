"""LitGPT's own layout of weights."""

import pytest
import torch
import yaml
from tiny import tiny_config

from litgpt.checkpoint import load_model, write_checkpoint
from litgpt.config import Config
from litgpt.errors import UserError
from litgpt.litgpt_layout import from_litgpt_names, to_litgpt_names
from litgpt.model import GPT
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint

MOE = dict(n_layer=2, n_embd=32, n_head=4, vocab_size=96, padded_vocab_size=96, n_expert=4, n_expert_per_token=2, bias=False)
MOE |= dict(mlp_class_name="LLaMAMoE", norm_class_name="RMSNorm", intermediate_size=24, parallel_residual=False)
LATENT = dict(q_lora_rank=12, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8)
GROUPS = dict(n_expert_groups=2, n_topk_groups=1, expert_scores="sigmoid", n_shared_expert=2, first_k_dense_replace=1)
CONFIGS = {"experts": MOE, "latents and groups": MOE | GROUPS | dict(latent_attention=LATENT)}
EVERY_CONFIG = pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)


def litgpts_weights(model):
    """The names and shapes that LitGPT's model of this config has, from its interface page, with our model's numbers."""
    weights, made = dict(model.state_dict()), {}
    for i in range(model.config.n_layer):
        mlp, attn = f"transformer.h.{i}.mlp", f"transformer.h.{i}.attn"
        if f"{mlp}.experts.gate_up" in weights:
            gate_up, down = weights.pop(f"{mlp}.experts.gate_up"), weights.pop(f"{mlp}.experts.down")
            for e in range(model.config.n_expert):
                made[f"{mlp}.experts.{e}.fc_1.weight"] = gate_up[e, :24].clone()
                made[f"{mlp}.experts.{e}.fc_2.weight"] = gate_up[e, 24:].clone()
                made[f"{mlp}.experts.{e}.proj.weight"] = down[e].clone()
        for ours, theirs in {
            f"{mlp}.correction": f"{mlp}.gate.e_score_correction_bias",
            **{f"{mlp}.shared.{x}.weight": f"{mlp}.shared_experts.{x}.weight" for x in ("fc_1", "fc_2", "proj")},
            **{f"{attn}.{x}.weight": f"{attn}.{x}_proj.weight" for x in ("q_a", "q_b", "kv_b")},
            f"{attn}.kv_a.weight": f"{attn}.kv_a_proj_with_mqa.weight",
        }.items():
            if ours in weights:
                made[theirs] = weights.pop(ours)
    return weights | made


@EVERY_CONFIG
def test_names_are_those_of_litgpt_and_come_back(fields):
    model = GPT(Config(**fields))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    expected = litgpts_weights(model)
    written = dict(to_litgpt_names(model.state_dict().items(), model.config))
    assert written.keys() == expected.keys() and not any("gate_up" in name for name in written)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in written.items())
    back = dict(from_litgpt_names(reversed(written.items()), model.config))
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, back[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
@EVERY_CONFIG
def test_a_folder_of_litgpts_with_experts_is_loaded(fields, tmp_path):
    model = GPT(Config(**fields | dict(norm_topk_prob=True))).eval()
    torch.save(litgpts_weights(model), tmp_path / "lit_model.pth")
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump(model.config.to_litgpt()))
    idx = torch.randint(96, (2, 7))
    torch.testing.assert_close(load_model(tmp_path)(idx), model(idx), rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_litgpts_files_written_beside_a_checkpoint_have_its_names_and_load_alone(model_type, tmp_path):
    config = tiny_config(model_type, expert_indices=None)
    model = GPT(config).eval()
    write_checkpoint(tmp_path / "hf", model.state_dict(), config)
    convert_hf_checkpoint(tmp_path / "hf")
    (tmp_path / "lit").mkdir()
    for name in ("lit_model.pth", "model_config.yaml"):
        (tmp_path / "hf" / name).rename(tmp_path / "lit" / name)
    stored = torch.load(tmp_path / "lit" / "lit_model.pth", weights_only=True)
    assert "transformer.h.1.mlp.experts.3.fc_2.weight" in stored and not any("gate_up" in name for name in stored)
    idx = torch.randint(96, (2, 7))
    torch.testing.assert_close(load_model(tmp_path / "lit")(idx), model(idx), rtol=0, atol=1e-6)


def test_a_missing_expert_is_named():
    model = GPT(Config(**MOE))
    weights = litgpts_weights(model)
    del weights["transformer.h.1.mlp.experts.2.fc_1.weight"]
    with pytest.raises(UserError, match="'transformer.h.1.mlp.experts.2.fc_1.weight' is missing"):
        list(from_litgpt_names(weights.items(), model.config))


def test_weights_of_a_model_without_experts_keep_their_names():
    model = GPT(tiny_config("llama"))
    for convert in (to_litgpt_names, from_litgpt_names):
        assert dict(convert(model.state_dict().items(), model.config)).keys() == model.state_dict().keys()
