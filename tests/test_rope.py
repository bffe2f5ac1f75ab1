from dataclasses import replace

import pytest
import torch
from oracle import pair
from tiny import tiny_config
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from litgpt.config import Config
from litgpt.errors import UserError
from litgpt.families import FAMILIES
from litgpt.rope import Rope, inverse_frequencies

STRETCHED = [row.name for row in FAMILIES["phi3"].published() if row.fields.get("rope_adjustments")]
FACTORS = dict(short_factor=[1.5, 2.5], long_factor=[4.0, 7.0], original_max_seq_len=16)


@pytest.mark.parametrize("name", STRETCHED)
@pytest.mark.parametrize("length", [4096, 4097])
def test_published_longrope_turns_as_in_transformers(name, length):
    config = Config.from_name(name)
    theirs = AutoConfig.for_model(**config.to_hf())
    frequencies, scale = ROPE_INIT_FUNCTIONS["longrope"](theirs, "cpu", seq_len=length)
    ours, our_scale = inverse_frequencies(config, length)
    torch.testing.assert_close(ours, frequencies, rtol=1e-6, atol=0)
    assert our_scale == pytest.approx(scale) and our_scale > 1


@torch.no_grad()
@pytest.mark.parametrize("capacity", [16, 30], ids=["short", "long"])
def test_longrope_follows_the_caches_capacity_from_the_first_token_on(capacity):
    config = tiny_config("phi3", rope_adjustments=FACTORS)
    ours, theirs = pair(config)
    idx = torch.randint(config.vocab_size, (2, capacity))
    cache = ours.new_cache(2, capacity, chunk=7)
    logits = [ours(idx[:, :7], cache=cache), *(ours(idx[:, t : t + 1], cache=cache) for t in range(7, capacity))]
    torch.testing.assert_close(torch.cat(logits, 1), theirs(idx).logits, rtol=0, atol=2e-5)


@torch.no_grad()
def test_a_short_sequence_in_a_long_cache_has_the_long_factors():
    config = tiny_config("phi3", rope_adjustments=FACTORS)
    ours, _ = pair(config)
    idx = torch.randint(config.vocab_size, (1, 9))
    always_long = replace(config, rope_adjustments=FACTORS | dict(short_factor=FACTORS["long_factor"]))
    in_long_cache = ours(idx, cache=ours.new_cache(1, 30))
    assert not torch.allclose(in_long_cache, ours(idx), atol=1e-3)
    ours.rope = Rope(always_long)
    torch.testing.assert_close(in_long_cache, ours(idx), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_phi_3s_older_names_of_longrope_mean_the_same(kind, key):
    config = tiny_config("phi3", rope_adjustments=FACTORS)
    source = config.to_hf()
    assert source["rope_scaling"].keys() == {"type", "short_factor", "long_factor"}, "transformers 4 refuses further keys"
    source.pop("rope_parameters")
    source["rope_scaling"] = {key: kind} | {name: FACTORS[name] for name in ("short_factor", "long_factor")}
    read = Config.from_hf(source)
    assert read.rope_adjustments == config.rope_adjustments
    assert AutoConfig.for_model(**read.to_hf(source)).rope_parameters["original_max_position_embeddings"] == 16, "and transformers 5 `su`"


def test_the_length_of_phi_3s_pretraining_is_the_one_outside_the_scaling(tmp_path):
    source = tiny_config("phi3", rope_adjustments=FACTORS).to_hf()
    source["rope_parameters"]["original_max_position_embeddings"] = 99
    theirs = AutoConfig.for_model(**source)
    assert Config.from_hf(source).rope_adjustments["original_max_seq_len"] == 16
    assert theirs.rope_parameters["original_max_position_embeddings"] == 16


def test_a_wrong_longrope_is_refused():
    source = tiny_config("phi3", rope_adjustments=FACTORS).to_hf()
    for wrong, sentence in (
        (dict(type="linear", factor=2.0), "'linear' in config.json, but of Phi 3 models only"),
        (dict(type="longrope", short_factor=[1.0, 2.0]), "needs 'long_factor'"),
        (dict(type="longrope", short_factor=[1.0], long_factor=[1.0]), "each of 2 pairs that turn, but got 1"),
        (dict(type="longrope", short_factor=[1.0, 0], long_factor=[1.0, 2.0]), "list of numbers above 0"),
    ):
        with pytest.raises(UserError, match=sentence):
            Config.from_hf(source | dict(rope_scaling=wrong))
    assert tiny_config("phi3", rope_adjustments=dict(factor=2.0)).family is None


def test_layers_with_a_window_turn_by_the_local_base_that_is_never_stretched():
    config = tiny_config("gemma3_text", rope_adjustments=dict(factor=8.0))
    plain = tiny_config("gemma3_text", rope_base=config.rope_local_base_freq)
    local, scale = inverse_frequencies(config, local=True)
    assert torch.equal(local, inverse_frequencies(plain)[0]) and scale == 1.0
    assert config.turns == (1, 0, 1)
