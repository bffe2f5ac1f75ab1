"""What every save is: a folder that transformers loads without a word, with tokenizer, chat template and stop tokens."""

import json
import logging
import warnings
import weakref

import pytest
import torch
import vocabularies
from oracle import pair
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from speaking import make_checkpoint
from tiny import EVERY_FAMILY, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from litgpt import cli, names
from litgpt.checkpoint import load_model, write_checkpoint
from litgpt.errors import UserError
from litgpt.model import GPT
from litgpt.scripts.cast import cast_weights
from litgpt.weight_files import shard_bytes, stored_dtype, write_shards

TEMPLATE = "{% for message in messages %}{{ message.content }}\r\n{% endfor %}"


@pytest.fixture
def said():
    """What transformers warns of meanwhile."""
    found = []

    class Kept(logging.Handler):
        def emit(self, record):
            found.append(record.getMessage())

    handler, logger = Kept(logging.WARNING), logging.getLogger("transformers")
    logger.addHandler(handler)
    with warnings.catch_warnings(record=True) as caught:
        yield found
    logger.removeHandler(handler)
    found += [str(warning.message) for warning in caught]


def source_of(folder, family, **changes):
    """A checkpoint of transformers with everything beside the weights."""
    config = tiny_config(family, **changes)
    ours, theirs = pair(config)
    theirs.save_pretrained(folder)
    vocabularies.write(folder, "byte_level", turns=False, tokenizer_class="PreTrainedTokenizerFast")
    (folder / names.CHAT_TEMPLATE).write_bytes(TEMPLATE.encode())
    (folder / names.GENERATION_CONFIG).write_text(
        json.dumps({"eos_token_id": [5, 2], "bos_token_id": 1, "do_sample": True, "temperature": 0.5})
    )
    return ours, theirs


@EVERY_FAMILY
@pytest.mark.parametrize("origin", ["a source", "none"])
def test_transformers_loads_every_export_without_a_word(family, origin, tmp_path, said):
    source = tmp_path / "source"
    model, theirs = source_of(source, family)
    write_checkpoint(tmp_path / "out", model.state_dict(), model.config, source=source if origin == "a source" else None)
    said.clear()  # of transformers' own save
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert not said
    expected = theirs.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
    if origin == "a source":
        for name in (names.TOKENIZER_JSON, names.TOKENIZER_CONFIG, names.CHAT_TEMPLATE, names.GENERATION_CONFIG):
            assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes(), name
        assert again.generation_config.eos_token_id == [5, 2]
        assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template.replace("\r", "") == TEMPLATE.replace("\r", "")


def test_stop_tokens_are_written_where_the_source_does_not_say_them(tmp_path):
    folder = make_checkpoint(tmp_path / "model")
    assert not (folder / names.GENERATION_CONFIG).exists()
    assert cli.main(["convert_from_litgpt", str(folder), str(tmp_path / "out")]) == 0
    end = AutoTokenizer.from_pretrained(folder).eos_token_id
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == end
    (folder / names.GENERATION_CONFIG).write_text('{"eos_token_id": 0, "top_k": 7}')
    assert cli.main(["convert_from_litgpt", str(folder), str(tmp_path / "more")]) == 0
    again = GenerationConfig.from_pretrained(tmp_path / "more")
    assert sorted(again.eos_token_id) == sorted([0, end]) and again.top_k == 7
    (folder / names.TOKENIZER_JSON).unlink()
    (folder / names.GENERATION_CONFIG).unlink()
    described = json.loads((folder / names.CONFIG).read_text()) | {"eos_token_id": 7}
    (folder / names.CONFIG).write_text(json.dumps(described))
    assert cli.main(["convert_from_litgpt", str(folder), str(tmp_path / "plain")]) == 0
    assert GenerationConfig.from_pretrained(tmp_path / "plain").eos_token_id == 7


def test_what_ends_an_answer_in_litgpts_prompt_style_is_a_stop_token(tmp_path):
    folder = vocabularies.write(tmp_path / "lit", "byte_level")
    config = tiny_config("llama", vocab_size=640, padded_vocab_size=640)
    torch.save(GPT(config).state_dict(), folder / names.LIT_WEIGHTS)
    config.save(folder)
    for style in ("ChatML", "Llama3", "made.up.Style"):
        (folder / names.PROMPT_STYLE).write_text(f"class_path: {'' if '.' in style else 'litgpt.prompts.'}{style}\n")
        assert cli.main(["convert_from_litgpt", str(folder), str(tmp_path / style)]) == 0
        assert (tmp_path / style / names.PROMPT_STYLE).read_bytes() == (folder / names.PROMPT_STYLE).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "Llama3")
    ends = {style: GenerationConfig.from_pretrained(tmp_path / style).eos_token_id for style in ("ChatML", "Llama3", "made.up.Style")}
    end = tokenizer.convert_tokens_to_ids("</s>")
    assert ends["Llama3"] == [end, tokenizer.convert_tokens_to_ids("<|eot_id|>")] and ends["made.up.Style"] == end


# Files of weights


@pytest.mark.parametrize(
    "text, expected",
    {"5GB": 5 * 10**9, "500MB": 5 * 10**8, "2GiB": 2 * 2**30, "1.5 kb": 1500, "12345": 12345, 12345: 12345, "7B": 7, "1TiB": 2**40}.items(),
)
def test_sizes_are_read_as_people_write_them(text, expected):
    assert shard_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "5XB", "-5GB", "0", "5 G B", "1e9", "5,5GB", "9" * 40, "0.1B"])
def test_other_sizes_are_one_sentence(text, tmp_path, capsys):
    with pytest.raises(UserError, match="`max_shard_size` is a size such as 5GB"):
        shard_bytes(text)
    folder = make_checkpoint(tmp_path / "model")
    capsys.readouterr()
    for argv in (["convert_from_litgpt", str(folder), str(tmp_path / "out")], ["merge_lora", str(folder)]):
        assert cli.main([*argv, f"--max_shard_size={text}"]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_model_above_the_size_is_written_in_shards_that_transformers_loads(tmp_path):
    folder = make_checkpoint(tmp_path / "model")
    assert cli.main(["convert_from_litgpt", str(folder), str(tmp_path / "out"), "--max_shard_size", "30KB"]) == 0
    files = list((tmp_path / "out").glob("model-*-of-*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < 33_000 or len(load_file(file)) == 1 for file in files)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    before = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.state_dict().items())


def test_files_of_mixed_types_are_what_the_package_reads(tmp_path):
    tensors = {
        "odd": torch.randn(3).bfloat16(),
        "wide": torch.randn(2, 5),
        "none": torch.empty(0, 4),
        "number": torch.tensor(3.0),
        "turned": torch.randn(4, 6).t(),
        "bits": torch.randn(7).to(torch.float8_e4m3fn),
        "counts": torch.arange(5),
        "flags": torch.tensor([True, False, True]),
    }
    write_shards(tmp_path, tensors.items())
    read = load_file(tmp_path / names.SAFETENSORS)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(*(side.reshape(-1).view(torch.uint8) for side in (read[name], tensor.contiguous()))), name
    with safe_open(tmp_path / names.SAFETENSORS, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    header = (tmp_path / names.SAFETENSORS).read_bytes()
    length = int.from_bytes(header[:8], "little")
    places = json.loads(header[8 : 8 + length])
    assert length % 8 == 0
    assert all(places[name]["data_offsets"][0] % tensor.element_size() == 0 for name, tensor in tensors.items())


def test_with_a_plan_one_tensor_is_held_at_a_time(tmp_path):
    alive = weakref.WeakSet()
    most = 0

    def stream():
        nonlocal most
        for i in range(20):
            tensor = torch.full((1000,), float(i))
            alive.add(tensor)
            most = max(most, len(alive))
            yield f"w{i}", tensor
            del tensor

    plan = [(f"w{i}", torch.empty(1000, device="meta")) for i in range(20)]
    write_shards(tmp_path, stream(), max_bytes=30_000, plan=plan)
    assert most <= 2  # the next one is made before the last one is let go
    found = {name: tensor for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert all(found[f"w{i}"].eq(i).all() for i in range(20)) and len(found) == 20


def test_the_correction_of_experts_stays_in_fp32_whatever_the_weights_are(tmp_path):
    config = tiny_config("deepseek_v3")
    weights = GPT(config).state_dict()
    corrections = [name for name in weights if name.endswith(".correction")]
    assert corrections
    for name in corrections:
        weights[name] = torch.randn_like(weights[name])
    write_checkpoint(tmp_path / "out", weights, config, dtype=torch.bfloat16)
    written = load_file(tmp_path / "out" / names.SAFETENSORS)
    exact = [tensor for tensor in written.values() if tensor.dtype != torch.bfloat16]
    assert len(exact) == len(corrections) and all(tensor.dtype == torch.float32 for tensor in exact)
    for dtype in (None, torch.bfloat16, torch.float16):
        read = load_model(tmp_path / "out", dtype).state_dict()
        assert all(read[name].dtype == torch.float32 and torch.equal(read[name], weights[name]) for name in corrections)
    save_file({name: tensor.bfloat16() for name, tensor in written.items()}, tmp_path / "out" / names.SAFETENSORS)
    read = load_model(tmp_path / "out").state_dict()
    assert all(read[name].dtype == torch.float32 for name in corrections)


def test_a_download_that_is_cast_keeps_the_correction_in_fp32(tmp_path):
    config = tiny_config("deepseek_v3")
    write_checkpoint(tmp_path / "out", GPT(config).state_dict(), config)
    cast_weights(tmp_path / "out", "bfloat16")
    kept = [name for name, tensor in load_file(tmp_path / "out" / names.SAFETENSORS).items() if tensor.dtype == torch.float32]
    assert kept and all(name.endswith("e_score_correction_bias") for name in kept)


def test_fp8_counts_as_what_it_becomes(tmp_path):
    save_file({"a": torch.zeros(100).to(torch.float8_e4m3fn), "b": torch.zeros(10)}, tmp_path / names.SAFETENSORS)
    assert stored_dtype(tmp_path) == torch.bfloat16
