from dataclasses import replace

import pytest
import torch
from oracle import their_config
from tiny import EVERY_VARIANT, tiny_config
from transformers import AutoModelForCausalLM, FalconConfig, FalconForCausalLM

from litgpt.config import Config
from litgpt.errors import UserError
from litgpt.families import FAMILIES
from litgpt.model import GPT
from litgpt.translate import translate
from litgpt.weights import alternating, ignored, interleaved_qkv, parted, prefixed, same, skipped, stacked, transposed


def random_model(model_type, changes):
    """A transformers model with weights of its own in every parameter, and our config for it."""
    theirs = AutoModelForCausalLM.from_config(their_config(tiny_config(model_type, **changes)))
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    return theirs, Config.from_hf(theirs.config.to_dict())


def stored(model, tmp_path):
    """The weights as transformers stores them."""
    from safetensors.torch import load_file

    model.save_pretrained(tmp_path)
    return load_file(tmp_path / "model.safetensors")


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


@EVERY_VARIANT
def test_stored_weights_come_back_unchanged_and_fit_our_model(model_type, changes, tmp_path):
    model, config = random_model(model_type, changes)
    theirs = stored(model, tmp_path)
    ours = dict(translate(theirs.items(), config.rules, config, to_ours=True))
    with torch.device("meta"):
        expected = {name: p.shape for name, p in GPT(config).state_dict().items()}
    if config.tie_embeddings:
        del expected["lm_head.weight"]
    assert {name: tensor.shape for name, tensor in ours.items()} == expected
    assert_same(dict(translate(ours.items(), config.rules, config, to_ours=False)), theirs)


@EVERY_VARIANT
def test_our_random_weights_come_back_unchanged_whatever_their_order(model_type, changes):
    _, config = random_model(model_type, changes)
    ours = GPT(config).state_dict()
    theirs = dict(translate(ours.items(), config.rules, config, to_ours=False))
    back = dict(translate(reversed(theirs.items()), config.rules, config, to_ours=True))
    if config.tie_embeddings:
        del ours["lm_head.weight"]
    assert_same(back, ours)


@EVERY_VARIANT
def test_names_in_memory_are_understood_too(model_type, changes):
    model, config = random_model(model_type, changes)
    ours = dict(translate(model.state_dict().items(), config.rules, config, to_ours=True))
    assert torch.equal(ours["transformer.wte.weight"], model.get_input_embeddings().weight)
    assert config.tie_embeddings or torch.equal(ours["lm_head.weight"], model.get_output_embeddings().weight)


@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2), (6, 1)])
def test_interleaved_rows_come_apart_as_in_transformers_falcon(heads, groups):
    falcon = (
        FalconForCausalLM(
            FalconConfig(
                vocab_size=16,
                hidden_size=8 * heads,
                num_attention_heads=heads,
                num_kv_heads=groups,
                num_hidden_layers=1,
                new_decoder_architecture=True,
                bias=True,
            )
        )
        .transformer.h[0]
        .self_attention
    )
    config = Config(n_layer=1, n_embd=8 * heads, n_head=heads, n_query_groups=groups)
    rules = [interleaved_qkv("there.{}.*", "here.{}.*")]
    for leaf in ("weight", "bias"):
        fused = torch.randn_like(getattr(falcon.query_key_value, leaf))
        ((name, ours),) = translate([(f"there.3.{leaf}", fused)], rules, config, to_ours=True)
        assert name == f"here.3.{leaf}"
        as_tokens = fused.view(len(fused), -1).T.unsqueeze(0)  # (1, in, rows)
        q, k, v = (part[0].permute(1, 2, 0) for part in falcon._split_heads(as_tokens))  # (heads, D, in) each, keys and values repeated
        expected = torch.cat([q, k[:: heads // groups], v[:: heads // groups]]).flatten(0, 1)
        assert torch.equal(ours, expected.view_as(ours))
        assert_same(dict(translate([(name, ours)], rules, config, to_ours=False)), {f"there.3.{leaf}": fused})


def test_tensors_come_as_soon_as_their_parts_are_there():
    config = tiny_config("llama")
    seen = []

    def stream():
        for name, tensor in translate(GPT(config).state_dict().items(), config.rules, config, to_ours=False):
            seen.append(name)
            yield name, tensor

    for name, _ in translate(stream(), config.rules, config, to_ours=True):
        last = seen[-1]
        assert ("qkv" in name) == ("v_proj" in last), (name, last)


def test_parted_rows_are_halves():
    rules = [parted("gate_up.*", ["gate.*", "up.*"])]
    both = torch.randn(6, 2)
    ours = dict(translate([("gate_up.weight", both)], rules, tiny_config("llama"), to_ours=True))
    assert_same(ours, {"gate.weight": both[:3], "up.weight": both[3:]})
    assert_same(dict(translate(ours.items(), rules, tiny_config("llama"), to_ours=False)), {"gate_up.weight": both})


def test_other_prefixes_are_read_and_the_usual_one_is_written():
    rules = [same("model.norm.*", "ln.*"), prefixed("model.language_model.", "model."), prefixed("language_model.model.", "model.")]
    config, tensor = tiny_config("llama"), torch.ones(1)
    for prefix in ("model.", "model.language_model.", "language_model.model."):
        assert_same(dict(translate([(prefix + "norm.weight", tensor)], rules, config, to_ours=True)), {"ln.weight": tensor})
    assert_same(dict(translate([("ln.weight", tensor)], rules, config, to_ours=False)), {"model.norm.weight": tensor})


def test_ignored_weights_are_dropped():
    rules = [ignored("layers.{}.attention.bias"), same("layers.{}.attention.*", "here.{}.*")]
    stream = [("layers.12.attention.bias", torch.ones(1)), ("layers.12.attention.weight", torch.ones(2))]
    assert list(dict(translate(stream, rules, tiny_config("llama"), to_ours=True))) == ["here.12.weight"]


def test_a_tied_head_is_read_but_not_written():
    config = tiny_config("llama", tie_embeddings=True)
    head = [("lm_head.weight", torch.ones(96, 32))]
    assert [name for name, _ in translate(head, config.rules, config, to_ours=True)] == ["lm_head.weight"]
    assert list(translate(head, config.rules, config, to_ours=False)) == []


def test_a_config_that_no_family_expresses_keeps_our_names():
    config = tiny_config("llama", norm_class_name="LayerNorm", tie_embeddings=True)
    assert config.family is None
    ours = GPT(config).state_dict()
    theirs = dict(translate(ours.items(), config.rules, config, to_ours=False))
    assert_same(theirs, {name: tensor for name, tensor in ours.items() if name != "lm_head.weight"})


def test_an_unknown_weight_is_named():
    config = tiny_config("llama")
    with pytest.raises(UserError, match=r"holds a weight 'model.layers.0.strange.weight' that no llama model has.*ignored\("):
        list(translate([("model.layers.0.strange.weight", torch.ones(1))], config.rules, config, to_ours=True))


def test_a_missing_part_is_named():
    config = tiny_config("llama")
    theirs = dict(translate(GPT(config).state_dict().items(), config.rules, config, to_ours=False))
    del theirs["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(UserError, match=r"'model.layers.1.self_attn.k_proj.weight' is missing"):
        list(translate(theirs.items(), config.rules, config, to_ours=True))


SORTED_BY_ROWS = ("joined", "interleaved_qkv", "gated_qkv")


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if any(rule.kind in SORTED_BY_ROWS for rule in FAMILIES[name].rules)])
def test_rows_that_do_not_fit_the_config_are_refused(model_type):
    config = tiny_config(model_type)
    theirs = dict(translate(GPT(config).state_dict().items(), config.rules, config, to_ours=False))
    with pytest.raises(UserError, match="but the config makes it"):
        list(translate(theirs.items(), config.rules, replace(config, head_size=16), to_ours=True))


def test_weights_of_a_multimodal_models_other_parts_are_skipped():
    rules = [same("model.norm.*", "ln.*"), skipped("vision_tower.")]
    stream = [("vision_tower.norm.weight", torch.ones(2)), ("model.norm.weight", torch.ones(1))]
    assert_same(dict(translate(stream, rules, tiny_config("llama"), to_ours=True)), {"ln.weight": torch.ones(1)})


STACKS = {
    "stacked": (
        [stacked(["e.{}.{}.gate.weight", "e.{}.{}.up.weight"], "h.{}.gate_up", "n_expert")],
        lambda ours: {
            f"e.1.{e}.{part}.weight": ours[e, 3 * i : 3 * i + 3].clone() for e in range(4) for i, part in enumerate(("gate", "up"))
        },
    ),
    "alternating": (
        [alternating("e.{}.gate_up", "h.{}.gate_up")],
        lambda ours: {"e.1.gate_up": ours.view(4, 2, 3, 5).permute(0, 3, 2, 1).flatten(2)},
    ),
    "transposed": ([transposed("e.{}.gate_up", "h.{}.gate_up")], lambda ours: {"e.1.gate_up": ours.transpose(1, 2)}),
}


@pytest.mark.parametrize("kind", STACKS)
def test_stacks_of_experts_come_apart_and_together(kind):
    rules, expected = STACKS[kind]
    config = Config(n_layer=2, n_expert=4, n_expert_per_token=1, mlp_class_name="LLaMAMoE", intermediate_size=3, n_embd=32, n_head=4)
    ours = torch.randn(4, 6, 5)
    theirs = dict(translate([("h.1.gate_up", ours)], rules, config, to_ours=False))
    assert_same(theirs, expected(ours))
    assert_same(dict(translate(reversed(theirs.items()), rules, config, to_ours=True)), {"h.1.gate_up": ours})


def test_an_expert_too_few_or_too_many_is_named():
    rules = [stacked("e.{}.weight", "stack", "n_expert")]
    config = Config(n_layer=2, n_expert=2, n_expert_per_token=1, mlp_class_name="LLaMAMoE", intermediate_size=3, n_embd=32, n_head=4)
    weight = torch.ones(2, 2)
    with pytest.raises(UserError, match="'e.0.weight' is missing, without which 'e.1.weight'"):
        list(translate([("e.1.weight", weight)], rules, config, to_ours=True))
    with pytest.raises(UserError, match="'e.7.weight' is one of more than the config has, whose `n_expert` is 2"):
        list(translate([("e.0.weight", weight), ("e.7.weight", weight)], rules, config, to_ours=True))
    with pytest.raises(UserError, match=r"'e.1.weight' has the shape \(2, 3\), but 'e.0.weight' has"):
        list(translate([("e.0.weight", weight), ("e.1.weight", torch.ones(2, 3))], rules, config, to_ours=True))
