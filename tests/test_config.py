import json
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml
from tiny import facts, tiny_config

from litgpt.config import Config, configs, family_of, find_multiple, known_names, name_to_config
from litgpt.errors import MissingFile, UserError
from litgpt.families import FAMILIES

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
SMALL = dict(n_layer=2, n_embd=32, n_head=4, vocab_size=60, block_size=16)


def litgpts_yaml(path, **changes):
    """A model_config.yaml as LitGPT dumps it: every field of its own, set or not."""
    ours = {key: value for key, value in Config(**SMALL).to_litgpt().items()}
    path.write_text(yaml.safe_dump(ours | dict(attn_bias=False) | changes))
    return path


# Fields


def test_what_is_none_is_derived():
    config = Config(**SMALL, padding_multiple=64)
    assert (config.head_size, config.n_query_groups, config.intermediate_size, config.padded_vocab_size) == (8, 4, 128, 64)
    assert (config.attn_bias, config.attn_proj_bias, config.mlp_bias) == (True, True, True)
    assert config.rope_n_elem == 2 and config.qkv_sizes == [32, 32, 32] and config.windows == (None, None)
    assert config.mixers == ["attention"] * 2
    assert replace(config, n_layer=1).mixers == ["attention"]


def test_the_vocabulary_is_at_most_its_padded_size():
    assert Config(**SMALL, padded_vocab_size=50).vocab_size == 50
    assert [find_multiple(n, 5) for n in (0, 1, 5, 6)] == [0, 5, 5, 10]


def test_layers_have_windows_where_the_indices_say():
    config = Config(**SMALL | dict(n_layer=3), sliding_window_size=4, sliding_window_indices=[1, 0, 1, 1])
    assert config.windows == (4, None, 4) and config.sliding_window_indices == [1, 0, 1]
    assert Config(**SMALL, sliding_window_size=4).windows == (4, 4)


def test_queries_keys_and_values_are_sized_by_their_heads():
    assert Config(**SMALL, n_query_groups=2, head_size=16).qkv_sizes == [64, 32, 32]


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(n_embd=33), "`n_embd` is a multiple of `n_head`"),
        (dict(n_query_groups=3), "`n_head` is a multiple of `n_query_groups`, but got 4 and 3"),
        (dict(n_layer=0), "`n_layer` is a positive whole number of at most 10000, but got 0"),
        (dict(n_layer=None), "`n_layer` is a positive whole number"),
        (dict(n_embd=32.5), "`n_embd` is a positive whole number"),
        (dict(n_head="many"), "`n_head` is a positive whole number.*, but got 'many'"),
        (dict(bias="yes"), "`bias` is true or false, but got 'yes'"),
        (dict(rope_base=True), "`rope_base` is a positive number"),
        (dict(rotary_percentage=25), "`rotary_percentage` is a share between 0 and 1, but got 25"),
        (dict(mlp_class_name="LLamaMLP"), "Did you mean 'LLaMAMLP'"),
        (dict(mlp_class_name="LLaMAMLP"), "needs an `intermediate_size`"),
        (dict(norm_class_name="BatchNorm"), "`norm_class_name` is one of LayerNorm, RMSNorm"),
        (dict(gelu_approximate="erf"), "`gelu_approximate` is one of none, tanh"),
        (dict(sliding_window_size=4, sliding_window_indices=[1]), "got 1 for 2 layers"),
        (dict(sliding_window_size=4, sliding_window_indices=[1, 2]), "holds 2, but allowed are: 0, 1"),
        (dict(mixers=["attention", "convolution"]), "'convolution'"),
        (dict(rope_adjustments=dict(factr=2)), "no key 'factr'. Did you mean 'factor'"),
        (dict(rope_adjustments=dict(factor=2, low_freq_factor=1)), "lacks a value"),
        (dict(rope_adjustments=dict(factor="2x")), "`factor` in `rope_adjustments` is a number above 0, but got '2x'"),
        (dict(rope_adjustments=3), "`rope_adjustments` is a mapping or null"),
        (dict(padding_multiple=0), "`padding_multiple` is a positive whole number"),
        (dict(family="lama"), "`family` is one of llama"),
    ],
)
def test_wrong_values_are_refused(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        Config(**SMALL | changes)


# Names


def test_a_name_may_be_ours_that_of_the_hub_or_with_its_organisation():
    expected = Config.from_name("Llama-3.1-8B-Instruct")
    for name in ("Meta-Llama-3.1-8B-Instruct", "meta-llama/Meta-Llama-3.1-8B-Instruct"):
        assert Config.from_name(name) == expected
    assert expected.hf_config == dict(org="meta-llama", name="Meta-Llama-3.1-8B-Instruct")
    assert Config.from_name("pythia-14m", n_layer=2).n_layer == 2


def test_an_unknown_name_is_answered_by_the_nearest():
    with pytest.raises(UserError, match=r"'SmolLM2-135M-Instrct' is not.*Did you mean 'SmolLM2-135M-Instruct'.*litgpt download list"):
        Config.from_name("SmolLM2-135M-Instrct")
    with pytest.raises(UserError, match="no field 'n_layers'. Did you mean 'n_layer'"):
        Config.from_name("pythia-14m", n_layers=2)


def test_configs_made_from_the_same_name_share_nothing():
    Config.from_name("Llama-3.2-1B").rope_adjustments["factor"] = 1.0
    assert Config.from_name("Llama-3.2-1B").rope_adjustments["factor"] == 32.0


def test_known_names_are_hub_ids_in_the_order_of_the_alphabet():
    names = known_names()
    assert names == sorted(names, key=str.lower) and len(names) == len(configs) == len(name_to_config)
    assert "TinyLlama/TinyLlama-1.1B-Chat-v1.0" in names and all(name.count("/") == 1 for name in names)


def test_importing_the_config_is_quick():
    code = "import time; start = time.perf_counter(); import litgpt.config; print(time.perf_counter() - start)"
    times = [float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout) for _ in range(3)]
    assert min(times) < 0.3  # takes 0.05 s on a quiet machine


# Files


@EVERY_FAMILY
def test_what_is_saved_comes_back(family, tmp_path):
    config = tiny_config(family, rope_adjustments=dict(factor=2.0), attn_bias=False)
    config.save(tmp_path)
    assert Config.from_file(tmp_path / "model_config.yaml") == config
    assert Config.from_checkpoint(tmp_path, block_size=7).block_size == 7


def test_litgpts_files_are_read(tmp_path):
    config = Config.from_file(litgpts_yaml(tmp_path / "model_config.yaml"))
    assert config == Config(**SMALL) and config.attn_bias, "LitGPT's `attn_bias: false` beside `bias: true` is no statement"
    qkv_only = Config.from_file(litgpts_yaml(tmp_path / "model_config.yaml", bias=False, attn_bias=True))
    assert (qkv_only.attn_bias, qkv_only.attn_proj_bias, qkv_only.mlp_bias) == (True, False, False)
    small_eps = tmp_path / "eps.yaml"
    small_eps.write_text("n_layer: 2\nnorm_eps: 1e-6\n")
    assert Config.from_file(small_eps).norm_eps == 1e-6, "YAML takes 1e-6 for text"


def test_damaged_files_are_refused(tmp_path):
    file = tmp_path / "model_config.yaml"
    for text, sentence in (
        ("", "is empty"),
        ("[1, 2]", "holds a list"),
        ("a: [", "not valid YAML"),
        ("n_layerz: 2", "no field 'n_layerz'. Did you mean 'n_layer'"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=sentence) as error:
            Config.from_checkpoint(tmp_path)
        assert str(file) in str(error.value) and "\n" not in str(error.value)
    for text, sentence in (("{", "not valid JSON"), ("[]", "holds a list"), ("{}", "no `model_type`")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=sentence) as error:
            Config.from_checkpoint(tmp_path)
        assert "config.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"hidden_size": "foo"}, r"`hidden_size` \(our `n_embd`\) is a positive whole number"),
        ({"num_key_value_heads": 3}, r"`num_attention_heads` \(our `n_head`\) is a multiple of `num_key_value_heads` \(our `n_query_"),
        ({"vocab_size": 0}, "`vocab_size` is a positive whole number"),
        ({"rope_scaling": 5}, "`rope_parameters` is 5"),
        ({"model_type": "strange"}, "says the `model_type` is 'strange'"),
    ],
)
def test_wrong_values_in_config_json_are_named_with_the_file_and_as_they_are_spelled_there(tmp_path, changes, sentence):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("llama").to_hf() | changes))
    with pytest.raises(UserError, match=sentence) as error:
        Config.from_checkpoint(tmp_path)
    assert str(error.value).startswith(str(tmp_path / "config.json")) and str(error.value).count("config.json") < 3


@pytest.mark.parametrize(
    "mapping, sentence",
    [
        (dict(model_type="qwen2_moe", num_experts=0), r"^`num_experts` \(our `n_expert`\) is 0, but .* without are not supported"),
        (
            dict(model_type="qwen3_next", num_experts=3),
            r"^`n_expert_per_token` is 1 to `num_experts` \(our `n_expert`\), which is 3, but got 10",
        ),
        (dict(model_type="glm4", head_dim=12, partial_rotary_factor=0.25), r"`partial_rotary_factor` .* 0.25 of `head_dim` .* 12 is 3"),
    ],
)
def test_what_does_not_go_together_in_config_json_is_named_as_it_is_spelled_there(mapping, sentence):
    with pytest.raises(UserError, match=sentence):
        Config.from_hf(mapping)


def test_wrong_values_in_model_config_yaml_are_named_with_the_file(tmp_path):
    (tmp_path / "model_config.yaml").write_text("n_layer: foo\n")
    with pytest.raises(UserError, match="`n_layer` is a positive whole number") as error:
        Config.from_checkpoint(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'model_config.yaml'}: ")


def test_litgpt_is_told_the_length_of_pretraining_that_llama_3_needs():
    scaling = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    assert tiny_config("llama", rope_adjustments=scaling).to_litgpt()["rope_adjustments"] == scaling | dict(original_max_seq_len=128)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(MissingFile, match=r"neither config.json nor model_config.yaml"):
        Config.from_checkpoint(tmp_path)
    with pytest.raises(MissingFile, match=r"nowhere.yaml"):
        Config.from_file(tmp_path / "nowhere.yaml")


def test_config_json_counts_unless_only_litgpts_weights_are_there(tmp_path):
    config = tiny_config("llama", name="mine", hf_config=dict(org="me", name="mine"))
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    replace(config, n_layer=1).save(tmp_path)
    assert Config.from_checkpoint(tmp_path) == replace(config, padding_multiple=512)
    (tmp_path / "lit_model.pth").touch()
    assert Config.from_checkpoint(tmp_path).n_layer == 1
    (tmp_path / "model.safetensors").touch()
    assert Config.from_checkpoint(tmp_path).n_layer == 2


def test_a_download_is_known_by_its_place_and_its_architecture_never_is(tmp_path):
    folder = tmp_path / "meta-llama" / "Meta-Llama-3-8B"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(tiny_config("llama").to_hf()))
    config = Config.from_checkpoint(folder)
    assert config.name == "Llama-3-8B" and config.hf_config == dict(org="meta-llama", name="Meta-Llama-3-8B") and config.n_layer == 2
    elsewhere = folder.rename(tmp_path / "somewhere")
    assert Config.from_checkpoint(elsewhere).hf_config == {}


def test_unknown_architectures_are_refused_by_their_config():
    for mapping, sentence in (
        (dict(model_type="mamba9", architectures=["Mamba9ForCausalLM"]), r"'mamba9' \(Mamba9ForCausalLM\).*Supported are: llama"),
        (dict(model_type="llama", architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification.*LlamaForCausalLM"),
        (dict(model_type="llama", quantization_config=dict(quant_method="awq")), "'awq', which cannot be read"),
        (dict(model_type="llama", quantization_config="fp8"), "`quantization_config` is a mapping in config.json, but got 'fp8'"),
    ):
        with pytest.raises(UserError, match=sentence):
            Config.from_hf(mapping)
    assert Config.from_hf(dict(model_type="llama", architectures=["LLaMAForCausalLM"])).family == "llama"


DAMAGED = [None, -1, 0, "x", [], {}, {"a": 1}, True, 1.5, 1e30, [1], {"rope_type": [1]}, {"rope_type": "yarn", "factor": "k"}]


@EVERY_FAMILY
def test_a_damaged_entry_of_config_json_is_read_or_refused_but_never_crashes(family):
    whole = tiny_config(family).to_hf()
    for key in [*whole, "text_config", "quantization_config"]:
        for value in DAMAGED:
            try:
                Config.from_hf(whole | {key: value})
            except UserError as error:
                assert "\n" not in str(error)


# Families


@EVERY_FAMILY
def test_a_config_without_family_finds_its_own(family):
    config = tiny_config(family)
    assert family_of(config) is family
    fields = {key: value for key, value in config.to_dict().items() if key != "family"}
    assert Config(**fields) == config


INEXPRESSIBLE = {
    "n_query_groups": ("gpt_neox", dict(n_query_groups=2)),
    "norm_class_name": ("llama", dict(norm_class_name="LayerNorm")),
    "attn_proj_bias": ("llama", dict(attn_bias=False, attn_proj_bias=True)),
    "lm_head_bias": ("llama", dict(lm_head_bias=True)),
    "sliding_window_size": ("gpt_neox", dict(sliding_window_size=8)),
    "rope_condense_ratio": (
        "llama",
        dict(
            rope_condense_ratio=2,
            rope_adjustments=dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=64),
        ),
    ),
}


@pytest.mark.parametrize("field", INEXPRESSIBLE)
def test_a_config_that_no_family_expresses_is_saved_but_not_exported(field, tmp_path):
    model_type, changes = INEXPRESSIBLE[field]
    config = tiny_config(model_type, **changes)
    assert config.family is None and family_of(config) is None
    with pytest.raises(UserError, match=f"`{field}` is .*can be saved but not exported"):
        config.to_hf()
    own = json.loads(json.dumps(config.to_own() | dict(torch_dtype="float32", eos_token_id=2)))
    assert own["model_type"] == "litgpt"
    (tmp_path / "config.json").write_text(json.dumps(own))
    assert Config.from_checkpoint(tmp_path) == replace(config, name=tmp_path.name)


def test_condensed_positions_are_exported_as_linear_scaling():
    config = tiny_config("llama", rope_condense_ratio=4)
    assert config.family == "llama" and Config.from_hf(config.to_hf()).rope_adjustments == dict(factor=4.0)


def test_a_change_that_another_family_expresses_changes_the_family():
    assert tiny_config("mistral", sliding_window_size=None).family == "mistral"
    assert tiny_config("llama", sliding_window_size=8).family == "mistral"


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if facts(name).IN_LITGPT])
def test_litgpts_fields_are_read_back_by_litgpts_rules(model_type, tmp_path):
    config = tiny_config(model_type)
    kept, unsaid = config.to_litgpt(), dict(family=config.family, tie_embeddings=config.tie_embeddings)
    assert not {"family", "tie_embeddings", "mixers", "mlp_bias"} & kept.keys()
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump(kept))
    assert Config.from_file(tmp_path / "model_config.yaml").to_dict() | unsaid == config.to_dict()


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if not facts(name).IN_LITGPT])
def test_a_family_that_litgpt_does_not_have_is_not_written_for_it(model_type):
    with pytest.raises(UserError, match="LitGPT cannot express this config"):
        tiny_config(model_type).to_litgpt()


def test_what_litgpt_cannot_express_is_not_written_for_it():
    for changes, field in (
        (dict(attn_bias=True, attn_proj_bias=True), "mlp_bias"),
        (dict(rope_adjustments=dict(factor=2, dynamic=True)), "rope"),
    ):
        with pytest.raises(UserError, match=f"LitGPT cannot express this config, whose `{field}"):
            tiny_config("llama", **changes).to_litgpt()


def test_an_odd_number_of_rotated_features_is_refused():
    with pytest.raises(UserError, match="is 7. Choose an even"):
        Config(n_embd=28, n_head=4, rotary_percentage=1.0)
