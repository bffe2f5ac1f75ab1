import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import transformers
from tiny import facts, tiny_config
from transformers import AutoConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from litgpt.config import Config, configs, known_names, prompt_of
from litgpt.errors import UserError
from litgpt.families import FAMILIES
from litgpt.families.family import expand
from litgpt.families.tables import GATED_MLPS, GELUS
from litgpt.prompts import prompt_styles
from litgpt.rope import inverse_frequencies

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
PLAIN = [family for family in FAMILIES.values() if facts(family).PLAIN_ROPE]
WHERE_ROPE_IS_PLAIN = pytest.mark.parametrize("family", PLAIN, ids=[family.model_type for family in PLAIN])
IDENTITY = ("name", "hf_config", "vocab_size", "padding_multiple", "bias")  # fields that config.json does not hold


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()


def loaded(mapping, folder):
    """What transformers makes of a config.json."""
    (folder / "config.json").write_text(json.dumps(mapping))
    return AutoConfig.from_pretrained(folder).to_dict()


def model_fields(config):
    return {name: value for name, value in config.to_dict().items() if name not in IDENTITY}


# Fields


@EVERY_FAMILY
def test_what_is_left_out_means_what_it_means_in_transformers(family):
    full = AutoConfig.for_model(family.model_type).to_dict()
    assert Config.from_hf({"model_type": family.model_type}) == Config.from_hf(full)


@EVERY_FAMILY
def test_transformers_reads_what_we_write(family, tmp_path):
    config = tiny_config(family)
    assert model_fields(Config.from_hf(loaded(config.to_hf(), tmp_path))) == model_fields(config)


@EVERY_FAMILY
def test_both_spellings_mean_the_same(family, tmp_path):
    old = facts(family).OLD | dict(model_type=family.model_type)
    new = loaded(old, tmp_path)
    assert not facts(family).PLAIN_ROPE or ("rope_parameters" in new and "rope_theta" not in new)
    assert model_fields(Config.from_hf(old)) == model_fields(Config.from_hf(new))


@EVERY_FAMILY
@pytest.mark.parametrize("generation", [4, 5])
def test_an_export_says_what_its_source_said(family, generation, tmp_path):
    source = deepcopy(facts(family).OLD) | dict(model_type=family.model_type, some_note="kept", auto_map={"AutoConfig": "code.py"})
    if generation == 5:
        source = json.loads(AutoConfig.for_model(**source).to_json_string(use_diff=True)) | dict(some_note="kept")
    before = loaded({key: value for key, value in source.items() if key != "auto_map"}, tmp_path)
    exported = Config.from_hf(source).to_hf(source)
    after = loaded(exported, tmp_path)
    assert {k: v for k, v in after.items() if k != "transformers_version"} == {
        k: v for k, v in before.items() if k != "transformers_version"
    }
    assert exported["some_note"] == "kept" and "auto_map" not in exported
    assert exported.get("torch_dtype") == source.get("torch_dtype")


def same_but_silent(source):
    """A config.json, then the same without each of its entries in turn: those of mappings within it too."""
    yield source
    for key, value in source.items():
        yield {other: said for other, said in source.items() if other != key}
        for inner in value if isinstance(value, dict) else ():
            yield source | {key: {other: said for other, said in value.items() if other != inner}}


@EVERY_FAMILY
@pytest.mark.parametrize("generation", [4, 5])
def test_an_export_leaves_out_what_its_source_does_and_says_the_same(family, generation, tmp_path):
    whole, compared = deepcopy(facts(family).OLD), 0
    if generation == 5:
        whole = AutoConfig.for_model(**deepcopy(whole), model_type=family.model_type).to_dict()
        whole.pop("model_type")
    whole = {key: value for key, value in whole.items() if value is not None}
    for said in same_but_silent(whole):
        source = said | dict(model_type=family.model_type)
        try:
            before = loaded(source, tmp_path)
            config = Config.from_hf(source)
        except Exception:  # neither transformers nor we have to read it without that entry
            continue
        exported = config.to_hf(source)
        after = loaded(exported, tmp_path)
        beside = {"transformers_version"} | ({"architectures"} - said.keys())  # other programs need that one
        assert {k: v for k, v in after.items() if k not in beside} == {k: v for k, v in before.items() if k not in beside}
        assert model_fields(Config.from_hf(exported)) == model_fields(config)
        compared += 1
    assert compared > len(whole) / 2


@WHERE_ROPE_IS_PLAIN
def test_an_export_has_the_spellings_of_both_generations(family):
    written = tiny_config(family, rope_base=777, rope_adjustments=dict(factor=2.0)).to_hf()
    old_base = "rotary_emb_base" if family.model_type == "gpt_neox" else "rope_theta"
    assert written[old_base] == written["rope_parameters"]["rope_theta"] == 777
    assert written["rope_scaling"] == dict(rope_type="linear", factor=2.0)
    assert written["rope_scaling"].items() <= written["rope_parameters"].items()


@WHERE_ROPE_IS_PLAIN
def test_a_changed_field_is_exported_in_place_of_the_sources(family, tmp_path):
    source = facts(family).OLD | dict(model_type=family.model_type)
    config = replace(Config.from_hf(source), padded_vocab_size=640, rope_base=123, rope_adjustments=None)
    exported = Config.from_hf(loaded(config.to_hf(source), tmp_path))
    assert (exported.padded_vocab_size, exported.rope_base, exported.rope_adjustments) == (640, 123, None)


def test_of_another_models_config_only_the_token_ids_are_kept():
    written = tiny_config("llama").to_hf(facts("gpt_neox").OLD | dict(model_type="gpt_neox", eos_token_id=7))
    assert written == tiny_config("llama").to_hf() | dict(eos_token_id=7)


SCALINGS = {
    "linear": dict(factor=2.0),
    "dynamic": dict(factor=2.0),
    "llama3": dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    "yarn": dict(factor=4.0, original_max_position_embeddings=64),
    "yarn with all": dict(
        factor=4.0, original_max_position_embeddings=64, beta_fast=16, beta_slow=2, mscale=0.7, mscale_all_dim=0.5, truncate=False
    ),
    "yarn with a factor of its own": dict(factor=4.0, attention_factor=1.3),
}


@WHERE_ROPE_IS_PLAIN
@pytest.mark.parametrize("name", SCALINGS)
def test_every_scaling_is_kept_and_turns_as_in_transformers(family, name, tmp_path):
    kind = name.split()[0]
    source = tiny_config(family, block_size=256, n_embd=64).to_hf() | dict(rope_scaling=dict(rope_type=kind, **SCALINGS[name]))
    source.pop("rope_parameters")
    config = Config.from_hf(source)
    described = loaded(config.to_hf(), tmp_path)
    assert SCALINGS[name].items() <= described["rope_parameters"].items()
    theirs = AutoConfig.from_pretrained(tmp_path)
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu", **dict(seq_len=400) if kind == "dynamic" else {})
    ours, our_factor = inverse_frequencies(config, 400)
    torch.testing.assert_close(ours, frequencies, rtol=1e-6, atol=0)
    assert our_factor == pytest.approx(factor)


OUTSIDE = {  # what stands in the mapping, where the length of pretraining stands outside of it
    "llama3": SCALINGS["llama3"],
    "llama3 without": {key: value for key, value in SCALINGS["llama3"].items() if key != "original_max_position_embeddings"},
    "yarn": SCALINGS["yarn"],
    "yarn without": dict(factor=4.0),
    "dynamic": SCALINGS["yarn"],  # which has no such length
}


@pytest.mark.parametrize("family", [FAMILIES[name] for name in ("llama", "mistral", "qwen2", "gemma", "gpt_neox")])
@pytest.mark.parametrize("outside", [32, None])
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("name", OUTSIDE)
def test_a_length_of_pretraining_outside_of_the_scaling_counts_more(family, name, spelling, outside, tmp_path):
    kind = name.split()[0]
    source = tiny_config(family, block_size=256, n_embd=64).to_hf()
    source = {key: value for key, value in source.items() if key not in ("rope_scaling", "rope_parameters")}
    source |= {spelling: dict(rope_type=kind, **OUTSIDE[name])} | (
        {} if outside is None else dict(original_max_position_embeddings=outside)
    )
    config = Config.from_hf(source)
    for mapping in (source, config.to_hf(source), config.to_hf()):
        loaded(mapping, tmp_path)
        theirs = AutoConfig.from_pretrained(tmp_path)
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu", **dict(seq_len=400) if kind == "dynamic" else {})
        ours, our_factor = inverse_frequencies(config, 400)
        torch.testing.assert_close(ours, frequencies, rtol=1e-6, atol=0)
        assert our_factor == pytest.approx(factor)
        assert model_fields(Config.from_hf(mapping)) == model_fields(config)


def test_a_changed_length_of_pretraining_is_changed_wherever_it_stands(tmp_path):
    scaling = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
    source = tiny_config("llama").to_hf() | dict(rope_scaling=scaling, rope_parameters=scaling, original_max_position_embeddings=32)
    config = Config.from_hf(source)
    changed = replace(config, rope_adjustments=config.rope_adjustments | dict(original_max_seq_len=48)).to_hf(source)
    places = (changed, changed["rope_scaling"], changed["rope_parameters"])
    assert [place["original_max_position_embeddings"] for place in places] == [48, 48, 48]
    plain = replace(config, rope_adjustments=dict(factor=3.0)).to_hf(source)
    assert Config.from_hf(loaded(plain, tmp_path)).rope_adjustments == dict(factor=3.0)


def test_a_base_inside_the_scaling_is_refused_unless_it_stands_beside_it_too():
    source = tiny_config("llama", rope_base=500).to_hf()
    inside = dict(rope_scaling=dict(rope_type="linear", factor=2.0, rope_theta=77.0), rope_parameters=None)
    with pytest.raises(UserError, match="`rope_scaling` holds a `rope_theta` of 77.0"):
        Config.from_hf(source | inside)
    assert Config.from_hf(source | inside | dict(rope_theta=77.0)).rope_base == 77


def test_other_scalings_are_refused():
    base = tiny_config("llama").to_hf()
    for wrong, sentence in (
        (dict(rope_type="su2", factor=2.0), "`rope_type` is 'su2'.*Supported are: default, linear"),
        (dict(rope_type="longrope", factor=2.0), "needs 'short_factor'"),
        (dict(rope_type="llama3", factor=2.0), "needs 'low_freq_factor'"),
        (dict(full_attention=dict(rope_type="default")), "one set of values for all layers"),
    ):
        with pytest.raises(UserError, match=sentence):
            Config.from_hf(base | dict(rope_scaling=wrong))


def test_activations_are_what_transformers_calls_so():
    x = torch.linspace(-4, 4, 101)
    for name, approximate in GELUS.items():
        torch.testing.assert_close(ACT2FN[name](x), torch.nn.functional.gelu(x, approximate=approximate), rtol=0, atol=1e-6)
    for name in GATED_MLPS:
        torch.testing.assert_close(ACT2FN[name](x), torch.nn.functional.silu(x))


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if facts(name).ACTIVATION is not None])
def test_an_activation_that_we_do_not_have_is_refused(model_type):
    entry = facts(model_type).ACTIVATION
    with pytest.raises(UserError, match=f"`{entry}` is 'relu2'"):
        Config.from_hf({"model_type": model_type, entry: "relu2"})


def test_the_text_part_of_a_multimodal_model_is_read_and_written_back(monkeypatch):
    family = replace(FAMILIES["llama"], wrappers=("looking_llama",))
    monkeypatch.setitem(FAMILIES, "llama", family)
    text = tiny_config("llama").to_hf()
    source = {"model_type": "looking_llama", "architectures": ["LookingLlama"], "vision_config": {"size": 3}, "text_config": text}
    config = Config.from_hf(source)
    assert model_fields(config) == model_fields(tiny_config("llama"))
    assert config.to_hf(source) == source
    assert config.to_hf()["model_type"] == "llama"
    text.pop("head_dim")  # what it leaves out, and what is all left out
    assert Config.from_hf(source).to_hf(source) == source
    empty = source | {"text_config": None}
    assert Config.from_hf(empty).to_hf(empty) == source | {"text_config": {}}


# What was published


def test_names_and_hub_ids_are_unique():
    assert len({config["name"] for config in configs}) == len({*known_names()}) == len(configs)


@pytest.mark.parametrize("published", configs, ids=lambda config: config["name"])
def test_every_published_checkpoint_is_written_by_its_family_and_comes_back(published, tmp_path):
    config = Config.from_name(published["name"])
    assert config.family == published["family"]
    described = loaded(config.to_hf(), tmp_path)
    assert described["vocab_size"] == config.padded_vocab_size >= config.vocab_size
    assert model_fields(Config.from_hf(described)) == model_fields(config)


@EVERY_FAMILY
def test_every_pattern_of_a_brand_names_something_published(family):
    for brand in family.brands:
        names = [name for pattern in brand.sizes for name in expand(pattern)]
        assert len(names) == len(set(names))
        styles = brand.prompt if isinstance(brand.prompt, dict) else {}
        for pattern in [*styles, *brand.published_as, *brand.also]:
            assert set(expand(pattern)) <= set(names)


@EVERY_FAMILY
def test_every_prompt_style_is_registered(family):
    assert {row.prompt for row in family.published()} - {None} <= prompt_styles.keys()


ALSO = {
    "meta-llama/Llama-3.1-8B-Instruct": "meta-llama/Meta-Llama-3.1-8B-Instruct",
    "CohereForAI/c4ai-command-r-plus-08-2024": "CohereLabs/c4ai-command-r-plus-08-2024",
    "CohereForAI/aya-expanse-8b": "CohereLabs/aya-expanse-8b",
    "THUDM/GLM-Z1-32B-0414": "zai-org/GLM-Z1-32B-0414",
    "THUDM/GLM-4-32B-Base-0414": "zai-org/GLM-4-32B-Base-0414",
}


@pytest.mark.parametrize("other, listed", ALSO.items())
def test_a_checkpoint_that_the_hub_renamed_is_known_by_both_ids_and_listed_once(other, listed):
    assert Config.from_name(other) == Config.from_name(listed)
    assert prompt_of(other) == prompt_of(listed)
    assert listed in known_names() and other not in known_names()


def test_prompts_belong_to_exact_names():
    assert prompt_of("TinyLlama/TinyLlama-1.1B-Chat-v1.0") == prompt_of("tiny-llama-1.1b-chat") == "tinyllama"
    assert prompt_of("meta-llama/Llama-2-13b-chat-hf") == "llama2"
    assert prompt_of("Llama-3.2-1B-Instruct") == prompt_of("nvidia/Llama-3.1-Nemotron-70B-Instruct-HF") == "llama3"
    assert prompt_of("HuggingFaceTB/SmolLM2-135M-Instruct") == "smollm2"
    assert prompt_of("mistralai/Mistral-7B-Instruct-v0.3") == "mistral-v3"
    for base in ("SmolLM2-135M", "pythia-14m", "CodeLlama-7b-hf", "Llama-3.2-1B", "mine/Llama-3.2-1B-Instruct", "unheard-of"):
        assert prompt_of(base) is None


def test_heads_are_tied_where_the_publisher_ties_them():
    tied = {config["name"] for config in configs if config.get("tie_embeddings")}
    assert tied == {name for family in FAMILIES.values() for pattern in facts(family).TIED for name in expand(pattern)}


@pytest.mark.parametrize(
    "name, fields",
    {
        "Platypus2-70B": dict(n_query_groups=8),
        "CodeLlama-13b-Instruct-hf": dict(block_size=16384),
        "CodeLlama-70b-Python-hf": dict(block_size=4096, rope_base=10000),
        "CodeLlama-70b-hf": dict(block_size=16384, rope_base=1_000_000),
        "Mistral-7B-v0.1": dict(block_size=32768, sliding_window_size=4096),
        "Mistral-7B-v0.2": dict(block_size=32768, sliding_window_size=None),
        "LLaMA-2-7B-32K": dict(block_size=32768, rope_adjustments=dict(factor=8.0)),
        "pythia-14m": dict(block_size=2048),
        "pythia-31m": dict(block_size=2048),
        "Gemma-2b": dict(block_size=8192, norm_eps=1e-6),
        "Gemma-2-27b-it": dict(norm_eps=1e-6),
        "Gemma-3-1b-it": dict(block_size=32768, norm_eps=1e-6),
        "Phi-3-mini-4k-instruct": dict(sliding_window_size=2047),
        "Phi-3.5-mini-instruct": dict(block_size=131072, sliding_window_size=262144),
        "Qwen2.5-7B-Instruct": dict(block_size=32768),
        "Qwen2.5-72B-Instruct": dict(block_size=32768, norm_eps=1e-6),
        "Danube2-1.8b-chat": dict(block_size=8192, sliding_window_size=None),
    }.items(),
)
def test_values_that_litgpt_has_wrong_are_right(name, fields):
    config = Config.from_name(name)
    assert {key: getattr(config, key) for key in fields} == fields


def test_patterns_stand_for_all_their_names():
    assert expand("a") == ["a"]
    assert expand("a{,-b}") == ["a", "a-b"]
    assert expand("{x,y}-{1,2}") == ["x-1", "x-2", "y-1", "y-2"]
