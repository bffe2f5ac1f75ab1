"""What single families need beyond the table-driven tests: wrapped models, layers that are skipped, entries that are refused."""

import json

import pytest
import torch
from oracle import our_model, pair, their_model
from safetensors.torch import load_file, save_file
from tiny import facts, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, Lfm2Config, Lfm2ForCausalLM, Mistral3Config, Mistral3ForConditionalGeneration

from litgpt.attention import Segments
from litgpt.checkpoint import load_model, write_checkpoint
from litgpt.config import Config, family_of
from litgpt.errors import UserError
from litgpt.model import GPT

EYES = dict(
    model_type="pixtral",
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    head_dim=8,
    intermediate_size=16,
    image_size=32,
    patch_size=8,
)


def with_eyes(model_type, **changes):
    """A multimodal model of transformers around a tiny text model."""
    text = tiny_config(model_type, **changes).to_hf()
    config = Mistral3Config(text_config=text, vision_config=EYES, tie_word_embeddings=text["tie_word_embeddings"])
    config._attn_implementation = "eager"
    model = Mistral3ForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("in_memory", [False, True], ids=["names in files", "names in memory"])
@pytest.mark.parametrize("model_type", ["mistral", "ministral3"])
@torch.no_grad()
def test_the_text_part_of_a_model_with_eyes_is_read(model_type, in_memory, tied, tmp_path):
    theirs = with_eyes(model_type, tie_embeddings=tied)
    theirs.save_pretrained(tmp_path)
    if in_memory:
        weights = {name: tensor.clone() for name, tensor in theirs.state_dict().items() if not (tied and name == "lm_head.weight")}
        save_file(weights, tmp_path / "model.safetensors")
    model, idx = load_model(tmp_path), torch.randint(96, (2, 19))
    assert model.config.family == model_type and model.config.tie_embeddings == tied
    torch.testing.assert_close(model(idx), theirs(input_ids=idx).logits, rtol=0, atol=2e-5)


def test_a_text_part_that_we_do_not_have_is_refused():
    mapping = dict(model_type="mistral3", text_config=dict(model_type="mistral4"))
    with pytest.raises(
        UserError, match="text model of 'mistral3' is a 'mistral4', which is not supported. Supported are: mistral, ministral3"
    ):
        Config.from_hf(mapping)


def test_a_model_whose_queries_grow_is_no_llama():
    config = tiny_config("ministral3")
    fields = {key: value for key, value in config.to_dict().items() if key != "family"}
    assert Config(**fields).family == "ministral3"
    assert "llama_4_scaling_beta" not in Config.from_hf(config.to_hf() | dict(model_type="llama", architectures=None)).rope_adjustments


OVERLOOKED = {  # entries that transformers 4 heeds and 5 does not
    "olmo3": (dict(rope_theta=500.0), dict(rope_base=500, rope_local_base_freq=None)),
    "gemma3_text": (dict(rope_scaling=dict(type="linear", factor=2.0)), dict(rope_adjustments=dict(factor=2.0))),
    "ministral3": (dict(rope_theta=55.0), dict(rope_base=55)),
}


@pytest.mark.parametrize("model_type", OVERLOOKED)
@torch.no_grad()
def test_an_export_says_what_transformers_overlooks_so_that_it_does_not(model_type):
    entries, fields = OVERLOOKED[model_type]
    source = tiny_config(model_type).to_hf()
    for key in ("rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq"):
        source.pop(key, None)
    config = Config.from_hf(source | entries)
    assert {name: getattr(config, name) for name in fields} == fields
    exported = AutoConfig.for_model(**config.to_hf(source | entries) | dict(pad_token_id=None))
    theirs = AutoModelForCausalLM.from_config(exported, dtype=torch.float32, attn_implementation="eager").eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    theirs.tie_weights()
    idx = torch.randint(96, (2, 19))
    torch.testing.assert_close(our_model(theirs, config)(idx), theirs(idx).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("parameters", [dict(rope_type="default"), dict(rope_type="linear", factor=2.0)], ids=["default", "linear"])
def test_queries_that_grow_without_yarn_are_refused(parameters):
    source = dict(model_type="ministral3", rope_parameters=parameters | dict(llama_4_scaling_beta=0.1, original_max_position_embeddings=8))
    with pytest.raises(UserError, match=f"`llama_4_scaling_beta` is 0.1 in config.json beside the `rope_type` '{parameters['rope_type']}'"):
        Config.from_hf(source)


def with_further_layers(model_type, folder, extra):
    """A checkpoint that also holds layers which predict tokens further ahead."""
    theirs = their_model(tiny_config(model_type))
    theirs.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | extra(weights), folder / "model.safetensors", metadata={"format": "pt"})
    return theirs


FURTHER = {
    "deepseek_v3": lambda weights: (
        {name.replace("layers.2.", "layers.3."): tensor.clone() for name, tensor in weights.items() if "layers.2." in name}
        | {f"model.layers.3.{part}.weight": torch.ones(2) for part in ("eh_proj", "enorm", "hnorm", "shared_head.norm", "shared_head.head")}
    ),
    "qwen3_next": lambda weights: {"mtp.fc.weight": torch.ones(2), "mtp.layers.0.input_layernorm.weight": torch.ones(2)},
}


@pytest.mark.parametrize("model_type", FURTHER)
@torch.no_grad()
def test_layers_that_predict_further_ahead_are_skipped(model_type, tmp_path):
    theirs = with_further_layers(model_type, tmp_path, FURTHER[model_type])
    idx = torch.randint(96, (1, 9))
    torch.testing.assert_close(load_model(tmp_path)(idx), theirs(idx).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "model_type, entry, sentence",
    [
        ("deepseek_v3", dict(scoring_func="softmax"), "`scoring_func` is 'softmax'.*Supported is: 'sigmoid'"),
        ("deepseek_v3", dict(topk_method="greedy"), "`topk_method` is 'greedy'"),
        ("deepseek_v3", dict(moe_layer_freq=2), "`moe_layer_freq` is 2"),
        ("deepseek_v3", dict(n_shared_experts=0), "`n_shared_experts` are above 0"),
        ("deepseek_v3", dict(num_key_value_heads=2), "is `num_attention_heads` .* where keys are made from a latent, but got 2 and 4"),
        ("gpt_oss", dict(swiglu_alpha=1.0), "`swiglu_alpha` is 1.0"),
        ("lfm2", dict(layer_types=["conv", "mamba", "conv"]), "`layer_types` says for each of 3 layers"),
        ("lfm2", dict(layer_types=None, full_attn_idxs=3), "`full_attn_idxs` lists layers"),
        ("lfm2", dict(block_auto_adjust_ff_dim=True, block_multiple_of=0), "numbers above 0"),
        ("qwen3_next", dict(layer_types=["sliding_attention"] * 4), "full_attention, linear_attention"),
        ("qwen3_next", dict(decoder_sparse_step=0), "`decoder_sparse_step` is a number above 0"),
        ("qwen3_next", dict(linear_num_key_heads=3), "`n_value_heads` is a multiple of `n_key_heads`"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(model_type, entry, sentence):
    with pytest.raises(UserError, match=sentence):
        Config.from_hf(tiny_config(model_type).to_hf() | entry)


@pytest.mark.parametrize("said", [dict(), dict(block_auto_adjust_ff_dim=False), dict(block_ffn_dim_multiplier=1.3, block_multiple_of=32)])
def test_the_width_that_lfm2_adjusts_is_that_of_transformers(said):
    said = facts("lfm2").OLD | dict(model_type="lfm2", block_ff_dim=1000) | said
    theirs = Lfm2ForCausalLM(Lfm2Config(**said))
    assert Config.from_hf(said).intermediate_size == theirs.model.layers[0].feed_forward.w1.out_features


@pytest.mark.parametrize("model_type", ["gpt_oss", "ministral3"])
def test_positions_are_stretched_unless_the_file_says_otherwise(model_type, tmp_path):
    factor = 32 if model_type == "gpt_oss" else 16
    for said in (dict(), dict(rope_scaling=None), dict(rope_parameters=None)):
        said = dict(model_type=model_type) | said
        config = Config.from_hf(said)
        assert config.rope_adjustments["factor"] == factor
        assert AutoConfig.for_model(**config.to_hf(said)).rope_parameters["factor"] == factor
        assert config.rope_base == AutoConfig.for_model(**said).rope_parameters["rope_theta"]
    plain = tiny_config(model_type, rope_adjustments=None)
    assert plain.family is not None and AutoConfig.for_model(**plain.to_hf()).rope_parameters["rope_type"] == "default"


@torch.no_grad()
def test_a_model_of_one_kind_of_layer_is_computed_too():
    """transformers cannot run these."""
    for model_type, mixer in (("lfm2", "short_conv"), ("qwen3_next", "gated_delta")):
        config = tiny_config(model_type)
        config = tiny_config(model_type, mixers=[mixer] * config.n_layer)
        assert config.family == model_type and family_of(config).model_type == model_type
        model, idx = GPT(config).eval(), torch.randint(96, (2, 12))
        cache = model.new_cache(2, 12)
        pieces = [model(idx[:, :5], cache=cache), *(model(idx[:, t : t + 1], cache=cache) for t in range(5, 12))]
        torch.testing.assert_close(torch.cat(pieces, 1), model(idx), rtol=0, atol=1e-5)


@pytest.mark.parametrize("outside", [None, True, False], ids=["says nothing", "says tied", "says untied"])
@torch.no_grad()
def test_a_head_of_its_own_is_read_whatever_the_wrapper_says(outside, tmp_path):
    theirs = with_eyes("mistral", tie_embeddings=False)
    theirs.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text()) | dict(tie_word_embeddings=outside)
    (tmp_path / "config.json").write_text(json.dumps({key: value for key, value in described.items() if value is not None}))
    idx = torch.randint(96, (1, 9))
    torch.testing.assert_close(load_model(tmp_path)(idx), theirs(input_ids=idx).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("model_type", ["mistral", "ministral3"])
def test_a_model_with_eyes_is_exported_with_them(model_type, tmp_path):
    theirs = with_eyes(model_type)
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    write_checkpoint(tmp_path / "ours", model.state_dict(), model.config, source=tmp_path / "theirs")
    again = Mistral3ForConditionalGeneration.from_pretrained(tmp_path / "ours").state_dict()
    assert again.keys() == theirs.state_dict().keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in theirs.state_dict().items())


OTHER_MIXERS = pytest.mark.parametrize("model_type", ["deepseek_v3", "gpt_oss", "ministral3", "lfm2", "qwen3_next"])


def tiny_model(model_type, **changes):
    """Ours, with weights large enough that every one of them matters."""
    config = tiny_config(model_type, **changes)
    model = GPT(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, float("norm" in name and not config.norm_add_unit_offset), 0.2)
    return model


@OTHER_MIXERS
@pytest.mark.parametrize("by_ids", [False, True], ids=["by length", "by id"])
@torch.no_grad()
def test_packed_segments_equal_separate_rows(model_type, by_ids):
    model, lengths = tiny_model(model_type), [7, 1, 12]
    idx = torch.randint(96, (1, sum(lengths)))
    segments = Segments(lengths).without_lengths() if by_ids else Segments(lengths)
    separate = [model(piece)[0] for piece in idx.split(lengths, 1)]
    torch.testing.assert_close(model(idx, segments=segments)[0], torch.cat(separate), rtol=0, atol=2e-5)


@OTHER_MIXERS
@torch.no_grad()
def test_padding_leaves_the_other_tokens_as_they_are(model_type):
    model, idx = tiny_model(model_type), torch.randint(96, (1, 9))
    positions = torch.tensor([[-1, -1, *range(9), -1]])
    padded = torch.nn.functional.pad(idx, (2, 1))
    torch.testing.assert_close(model(padded, positions=positions)[:, 2:-1], model(idx), rtol=0, atol=2e-5)


@OTHER_MIXERS
@torch.no_grad()
def test_cached_rows_of_different_lengths_equal_a_full_pass(model_type):
    model, lengths = tiny_model(model_type), [19, 4, 11]
    rows = [torch.randint(96, (1, n)) for n in lengths]
    for packed in (False, True):
        cache, got = model.new_cache(3, 19, chunk=6), [[] for _ in rows]
        while any(counts := [min(6, n - have) for n, have in zip(lengths, cache.lengths)]):
            pieces = [row[:, have : have + n] for row, have, n in zip(rows, cache.lengths, counts)]
            widest = max(counts)
            idx = torch.cat(pieces, 1) if packed else torch.cat([torch.nn.functional.pad(p, (0, widest - p.size(1))) for p in pieces])
            logits = model(idx, cache=cache.span(counts, packed=packed))
            logits = logits[0].split(counts) if packed else [row[:n] for row, n in zip(logits, counts)]
            for into, piece in zip(got, logits):
                into.append(piece)
        for row, pieces in zip(rows, got):
            torch.testing.assert_close(torch.cat(pieces), model(row)[0], rtol=0, atol=2e-5)


KERNELS_OF_ONE = {
    "lfm2": dict(short_conv=facts("lfm2").TINY["short_conv"] | dict(kernel_size=1)),
    "qwen3_next": dict(gated_delta=facts("qwen3_next").TINY["gated_delta"] | dict(kernel_size=1)),
}


@pytest.mark.parametrize("rewind", [0, 3])
@pytest.mark.parametrize("model_type", KERNELS_OF_ONE)
@torch.no_grad()
def test_a_convolution_of_one_token_has_nothing_to_remember(model_type, rewind):
    model, idx = tiny_model(model_type, **KERNELS_OF_ONE[model_type]), torch.randint(96, (2, 12))
    cache = model.new_cache(2, 12, chunk=7, rewind=rewind)
    pieces = [model(piece, cache=cache) for piece in idx.split([7, 1, 4], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(idx), rtol=0, atol=2e-5)
    cache.restore(0, cache.snapshot(1))


@OTHER_MIXERS
@torch.no_grad()
def test_rows_are_truncated_saved_and_copied(model_type):
    model, idx, wrong = tiny_model(model_type), torch.randint(96, (1, 20)), torch.randint(96, (1, 3))
    expected, cache = model(idx)[0, 12:], model.new_cache(2, 24, chunk=12, rewind=4)
    model(idx[:, :12], cache=cache.span([12], rows=[1]))
    model(wrong, cache=cache.span([3], rows=[1]))
    assert cache.truncate(1, 12) == 12
    cache.copy(1, 0)
    saved = cache.snapshot(1)
    model(wrong, cache=cache.span([3], rows=[1]))
    cache.restore(1, saved)
    logits = model(idx[:, 12:].expand(2, -1), cache=cache)
    torch.testing.assert_close(logits, expected.expand(2, -1, -1), rtol=0, atol=2e-5)


@pytest.mark.parametrize("model_type", ["gpt_oss", "qwen3_next"])
def test_the_loss_of_uneven_experts_is_that_of_transformers(model_type):
    config = tiny_config(model_type)
    ours, theirs = pair(config)
    ours.expert_balance = 1.0
    idx = torch.randint(96, (2, 11))
    aux = theirs(idx, labels=idx, output_router_logits=True).aux_loss
    torch.testing.assert_close(ours(idx, targets=idx).aux, aux, rtol=1e-5, atol=0)
