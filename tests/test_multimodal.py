"""The text part of a multimodal Gemma 3, which is what most of its sizes were published as."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_config
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from litgpt.checkpoint import load_model
from litgpt.config import Config
from litgpt.errors import UserError
from litgpt.model import GPT
from litgpt.translate import translate

EYES = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
PUBLISHED = dict(  # all that the text_config of google/gemma-3-4b-it says
    hidden_size=2560,
    intermediate_size=10240,
    model_type="gemma3_text",
    num_hidden_layers=34,
    rope_scaling={"factor": 8.0, "rope_type": "linear"},
    sliding_window=1024,
)


def seeing_model(**changes):
    """A transformers model with eyes whose text part has random weights, large enough that every one of them matters."""
    text = tiny_config("gemma3_text", rope_adjustments=dict(factor=8.0), **changes).to_hf()
    tokens = dict(image_token_index=90, boi_token_index=91, eoi_token_index=92, mm_tokens_per_image=4)
    config = Gemma3Config(text_config=text, vision_config=EYES, tie_word_embeddings=text["tie_word_embeddings"], **tokens)
    model = Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    for parameter in model.model.language_model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.tie_weights()
    return model


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_text_part_computes_what_transformers_computes(tied, tmp_path):
    theirs = seeing_model(tie_embeddings=tied)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    idx = torch.randint(80, (2, 23))
    torch.testing.assert_close(ours(idx), theirs(idx).logits, rtol=0, atol=2e-5)
    assert ours.config.tie_embeddings is tied


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_names_in_files_and_in_memory_mean_the_same(tied, tmp_path):
    theirs = seeing_model(tie_embeddings=tied)
    theirs.save_pretrained(tmp_path)
    config = Config.from_checkpoint(tmp_path)
    in_files, in_memory = (
        dict(translate(weights.items(), config.rules, config, to_ours=True))
        for weights in (load_file(tmp_path / "model.safetensors"), theirs.state_dict())
    )
    with torch.device("meta"):
        expected = set(GPT(config).state_dict()) - ({"lm_head.weight"} if tied else set())
    assert in_files.keys() == in_memory.keys() - ({"lm_head.weight"} if tied else set()) == expected
    assert all(torch.equal(tensor, in_memory[name]) for name, tensor in in_files.items())


def test_what_is_left_out_of_a_published_text_config_is_the_known_checkpoints():
    source = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": PUBLISHED}
    config, known = Config.from_hf(source), Config.from_name("Gemma-3-4b-it")
    differing = {name for name, value in config.to_dict().items() if value != known.to_dict()[name]}
    assert differing <= {"name", "hf_config", "vocab_size", "padding_multiple"}
    assert json.loads(json.dumps(config.to_hf(source)))["text_config"] == PUBLISHED | {
        key: value for key, value in config.to_hf(source)["text_config"].items() if key not in PUBLISHED
    }


def test_flat_and_nested_bases_mean_the_same_and_what_we_lack_is_refused():
    written = tiny_config("gemma3_text", rope_adjustments=dict(factor=8.0)).to_hf()
    nested = {key: value for key, value in written.items() if key not in ("rope_theta", "rope_local_base_freq", "rope_scaling")}
    flat = {key: value for key, value in written.items() if key != "rope_parameters"}
    assert Config.from_hf(nested) == Config.from_hf(flat) == Config.from_hf(written)
    stretched = dict(rope_type="linear", factor=2.0)
    for wrong, sentence in (
        (dict(rope_parameters=dict(sliding_attention=stretched)), "stretches the positions of sliding_attention layers"),
        (dict(rope_parameters=stretched), "a mapping for each of full_attention and sliding_attention is expected"),
        (dict(rope_parameters=dict(full_attention=3)), "hold mappings in config.json"),
        (dict(use_bidirectional_attention=True), "`use_bidirectional_attention` is True"),
    ):
        with pytest.raises(UserError, match=sentence):
            Config.from_hf(written | wrong)
