"""Files as users damage them: every one is a sentence, never a traceback."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_config
from tokenizers import Tokenizer as FastTokenizer
from vocabularies import write

from litgpt import names
from litgpt.checkpoint import (
    copy_side_files,
    has_lora,
    load_lora,
    load_model,
    write_adapter,
    write_checkpoint,
)
from litgpt.data.tokens import open_store
from litgpt.errors import MissingFile, UserError
from litgpt.files import MAX_DEPTH, OURS, atomic_folder, indexed_files, read_json, read_text, read_yaml
from litgpt.lora import LoRA, LoRALinear, add_lora
from litgpt.model import GPT
from litgpt.prompts.choose import find_prompt_style, load_prompt_style
from litgpt.scripts.download import check_files, find_checkpoint
from litgpt.tokenizer import Tokenizer
from litgpt.weight_files import hf_weight_files, stored_dtype, write_shards

DEEP = "[" * 100_000
HUGE = '{"a": ' + "1" * 5000 + "}"
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 20)}]\n" for i in range(1, 12))


def refused(call, *words: str) -> str:
    """Return the one sentence with which a call is refused, which holds the words."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message, message
    assert all(word in message for word in words), message
    return message


# ---- one reader for JSON, one for YAML


@pytest.mark.parametrize(
    "content, words",
    [
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe{}", "not text in UTF-8, from byte 0"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b"[]", "holds a list, but must hold a JSON object"),
        (b"5", "holds a number"),
        (b"null", "is empty"),
        (DEEP.encode(), "nested too deep"),
        (b'{"a": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", "nested too deep"),
        (HUGE.encode(), "thousands of digits"),
        (b'{"a": "\\ud800"}', "half a character"),
        (b'{"a": [{"\\ud800": 1}]}', "half a character"),
    ],
)
@pytest.mark.parametrize("repair", [False, True])
def test_json_that_is_no_object_is_refused(tmp_path, content, words, repair):
    file = tmp_path / "x.json"
    file.write_bytes(content)
    refused(lambda: read_json(file, repair=repair, way="Burn it."), str(file), words, "Burn it.")


@pytest.mark.parametrize(
    "text, words",
    [
        ("a: [", "not valid YAML"),
        ("", "is empty"),
        ("[1]", "holds a list, but must hold a mapping"),
        ("1", "holds a number, but must hold a mapping"),
        ("a: 1\nb: 2\na: 3", "the key 'a' stands there twice"),
        ("a: {b: 1, b: 1}", "the key 'b' stands there twice"),
        ("a: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("a: 2024-99-99", "not valid YAML"),
        ("!!timestamp x", "not valid YAML"),
        ("a: !!bool x", "not valid YAML"),
        ("a: !!int ''", "not valid YAML"),
        ("a: " + "1" * 5000, "not valid YAML"),
        ("1: 2", "its key 1 is no text"),
        ("{[1]: 2}", "not valid YAML"),
        ("\0", "not valid YAML"),
        ("[" * 3000, "nested too deep"),
        ("a: &a [*a]", "nested too deep"),
        (BOMB, "repeats its parts too often"),
    ],
)
def test_yaml_that_is_no_mapping_is_refused(tmp_path, text, words):
    file = tmp_path / "x.yaml"
    file.write_text(text)
    refused(lambda: read_yaml(file, way="Burn it."), str(file), words, "Burn it.")


def test_what_is_well_is_read_and_what_is_not_there_is_empty(tmp_path):
    for value in ({}, {"a": [1, {"b": None}], "日本": "😀", "c": 1e400}, {"a": ["x" * 1000] * 1000}):
        (tmp_path / "x.json").write_text(json.dumps(value))
        assert read_json(tmp_path / "x.json") == read_json(tmp_path / "x.json", repair=True) == value
    (tmp_path / "x.yaml").write_text("a: &a [1, 2]\nb: *a\nc: 2024-01-01")
    assert read_yaml(tmp_path / "x.yaml")["b"] == [1, 2]
    assert read_json(tmp_path / "no.json") == read_yaml(tmp_path / "no.yaml") == {}
    with pytest.raises(MissingFile, match=r"no\.txt"):
        read_text(tmp_path / "no.txt")


@pytest.mark.parametrize(
    "content, words",
    [
        ("[]", "holds a list"),
        ("{}", "`weight_map`"),
        ('{"weight_map": {}}', "`weight_map`"),
        ('{"weight_map": []}', "`weight_map`"),
        ('{"weight_map": {"w": 5}}', "names 5"),
        ('{"weight_map": {"w": "../x"}}', "names '../x'"),
    ],
)
def test_a_damaged_index_is_refused_also_by_what_reads_weights(tmp_path, content, words):
    for name in (names.SAFETENSORS_INDEX, names.BIN_INDEX):
        (tmp_path / name).write_text(content)
        refused(lambda name=name: indexed_files(tmp_path / name), name, words)
        refused(lambda: hf_weight_files(tmp_path), name, words)
        (tmp_path / name).unlink()


# ---- what the system refuses


def forbid(monkeypatch, *forbidden: str) -> None:
    """Let files of these names be what `chmod 000` makes of them for everyone but root, as which tests may run."""
    really = open

    def denied(path, *args, **options):
        if isinstance(path, str | Path) and Path(path).name in forbidden:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return really(path, *args, **options)

    monkeypatch.setattr("io.open", denied)
    monkeypatch.setattr("builtins.open", denied)


READERS = {
    names.TOKENIZER_JSON: [Tokenizer, check_files],
    names.TOKENIZER_CONFIG: [Tokenizer],
    names.GENERATION_CONFIG: [Tokenizer],
    names.SAFETENSORS: [load_model, stored_dtype, check_files, find_checkpoint],
    names.PROMPT_STYLE: [load_prompt_style],
    "pytorch_model-1.bin": [check_files],
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A whole checkpoint directory."""
    folder = write(tmp_path / "checkpoint", "byte_level")
    config = tiny_config("llama")
    weights = GPT(config).state_dict()
    write_checkpoint(tmp_path / "weights", weights, config)
    for file in (tmp_path / "weights").iterdir():
        file.rename(folder / file.name)
    (folder / names.GENERATION_CONFIG).write_text("{}")
    (folder / names.PROMPT_STYLE).write_text("class_path: litgpt.prompts.Alpaca")
    return folder


@pytest.mark.parametrize("name", READERS)
def test_a_file_that_may_not_be_read_is_not_called_damaged(folder, monkeypatch, name):
    (folder / "pytorch_model-1.bin").write_bytes(b"x")
    forbid(monkeypatch, name)
    for read in READERS[name]:
        assert "damaged" not in refused(lambda read=read: read(folder), str(folder / name), "may not be read", "permissions")


def test_side_files_that_may_not_be_read_are_named_instead_of_their_copies(folder, tmp_path, monkeypatch):
    forbid(monkeypatch, names.TOKENIZER_JSON)
    with pytest.raises(UserError, match="may not be read"), atomic_folder(tmp_path / "copy") as partial:
        copy_side_files(folder, partial)
    assert not list(tmp_path.glob("copy*"))


LONG = "x" * 300


def test_names_that_are_too_long_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    for name in (LONG, f"checkpoints/{LONG}", f"{LONG}.gguf", "/".join(["x" * 200] * 25)):
        refused(lambda name=name: find_checkpoint(name), "xxx", "more than a name may have")
    refused(lambda: Tokenizer(tmp_path / LONG), "more than a name may have")

    def make(path):
        with atomic_folder(path):
            pass

    for name in (LONG, "x" * 252):  # of the second only what is written first is too long
        refused(lambda name=name: make(tmp_path / name), "could not be written", "longer than the system allows")
    (tmp_path / "file").touch()
    refused(lambda: make(tmp_path / "file" / "below"), "could not be written", "a part of its path is a file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "file"]


# ---- folders that appear whole


@pytest.mark.parametrize("name", ["out.tmp", "out.old.tmp"])
def test_a_users_folder_is_never_taken_for_a_left_over(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "precious").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()

    def make():
        with atomic_folder(tmp_path / "out", overwrite=True) as partial:
            (partial / "new").touch()

    refused(make, str(tmp_path / name), "is in the way", "Move it")
    assert (tmp_path / name / "precious").read_text() == "mine" and (tmp_path / "out" / "old").exists()


@pytest.mark.parametrize("name", ["out.tmp", "out.old.tmp"])
def test_a_file_or_link_with_a_name_that_is_needed_stays(tmp_path, name):
    def make():
        with atomic_folder(tmp_path / "out"):
            pass

    (tmp_path / name).write_text("mine")
    refused(make, "is in the way")
    assert (tmp_path / name).read_text() == "mine"
    (tmp_path / name).unlink()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    refused(make, "is in the way")
    assert (tmp_path / name).is_symlink() and (tmp_path / "elsewhere").is_dir()


def test_what_a_killed_program_left_is_replaced(tmp_path):
    for name in ("out.tmp", "out.old.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / OURS).touch()
        (tmp_path / name / "half").touch()
    with atomic_folder(tmp_path / "out") as partial:
        (partial / "new").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]


def test_a_file_is_not_overwritten_by_a_folder_and_a_link_keeps_its_place(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="already exists"), atomic_folder(tmp_path / "file", overwrite=True):
        pass
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "old").touch()
    (tmp_path / "link").symlink_to(tmp_path / "far")
    with atomic_folder(tmp_path / "link", overwrite=True) as partial:
        (partial / "new").touch()
    assert (tmp_path / "link").is_symlink() and [path.name for path in (tmp_path / "far").iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["far", "file", "link"]


# ---- tokenizers and prompt styles


@pytest.mark.parametrize(
    "name, content, words",
    [
        (names.GENERATION_CONFIG, {"eos_token_id": [99999999999]}, "`eos_token_id` holds 99999999999"),
        (names.GENERATION_CONFIG, {"eos_token_id": "</s>"}, "`eos_token_id` holds '</s>'"),
        (names.GENERATION_CONFIG, {"bos_token_id": [1.5]}, "`bos_token_id` holds 1.5"),
        (names.GENERATION_CONFIG, {"eos_token_id": {"a": 1}}, "`eos_token_id` holds {'a': 1}"),
        (names.GENERATION_CONFIG, {"eos_token_id": True}, "`eos_token_id` holds True"),
        (names.CONFIG, {"eos_token_id": "x"}, "`eos_token_id` holds 'x'"),
        (names.CONFIG, {"text_config": [1]}, "`text_config` is a list"),
        (names.CONFIG, {"text_config": {"eos_token_id": [None]}}, "`eos_token_id` holds None"),
        (names.TOKENIZER_CONFIG, {"additional_special_tokens": 5}, "`additional_special_tokens` is 5"),
        (names.TOKENIZER_CONFIG, {"additional_special_tokens": "<s>"}, "`additional_special_tokens` is '<s>'"),
        (names.TOKENIZER_CONFIG, {"extra_special_tokens": 5}, "`extra_special_tokens` is 5"),
        (names.TOKENIZER_CONFIG, {"eos_token": "\ud800"}, "half a character"),
        (names.TOKENIZER_CONFIG, {"eos_token": 5}, "`eos_token` is 5"),
        (names.TOKENIZER_CONFIG, {"bos_token": ["<s>"]}, "`bos_token` is ['<s>']"),
        (names.SPECIAL_TOKENS_MAP, {"eos_token": {"content": 5}}, "`eos_token` is {'content': 5}"),
        (names.SPECIAL_TOKENS_MAP, [], "holds a list"),
    ],
)
@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_a_tokenizers_files_with_values_of_the_wrong_type_are_named(tmp_path, kind, name, content, words):
    write(tmp_path, kind)
    (tmp_path / name).write_text(json.dumps(content))
    refused(lambda: Tokenizer(tmp_path), str(tmp_path / name), words)


def test_the_ends_in_config_json_are_checked_beside_those_that_count(tmp_path):
    write(tmp_path, "byte_level")
    (tmp_path / names.GENERATION_CONFIG).write_text(json.dumps({"eos_token_id": 2}))
    (tmp_path / names.CONFIG).write_text(json.dumps({"eos_token_id": "foo"}))
    refused(lambda: Tokenizer(tmp_path), str(tmp_path / names.CONFIG), "`eos_token_id` holds 'foo'")


@pytest.mark.parametrize("template", [7, {"default": 7}, [{"name": "default", "template": 7}]])
def test_a_chat_template_that_is_no_text_is_named(tmp_path, template):
    write(tmp_path, "byte_level")
    (tmp_path / names.TOKENIZER_CONFIG).write_text(json.dumps({"chat_template": template}))
    refused(lambda: find_prompt_style(tmp_path), str(tmp_path / names.TOKENIZER_CONFIG), "`chat_template` is 7, not a text")


def test_of_several_chat_templates_the_default_counts_however_they_are_written(tmp_path):
    write(tmp_path, "byte_level")
    both = {"tool_use": "tools", "default": "plain"}
    for templates in (both, [dict(name=name, template=text) for name, text in both.items()]):
        (tmp_path / names.TOKENIZER_CONFIG).write_text(json.dumps({"chat_template": templates}))
        assert find_prompt_style(tmp_path).apply("x") == "plain"


@pytest.mark.parametrize(
    "name, content, words",
    [
        (names.ADDED_TOKENS, {"<mine>": "x"}, "gives '<mine>' the number 'x'"),
        (names.ADDED_TOKENS, {"<mine>": -1}, "gives '<mine>' the number -1"),
        (names.TOKENIZER_CONFIG, {"added_tokens_decoder": [5]}, "`added_tokens_decoder`"),
        (names.TOKENIZER_CONFIG, {"added_tokens_decoder": {"x": "<a>"}}, "`added_tokens_decoder`"),
        (names.TOKENIZER_CONFIG, {"added_tokens_decoder": {"9" * 5000: "<a>"}}, "`added_tokens_decoder`"),
        (names.TOKENIZER_CONFIG, {"added_tokens_decoder": {"700": 5}}, "`added_tokens_decoder`"),
    ],
)
def test_added_tokens_of_the_wrong_type_are_named(tmp_path, name, content, words):
    write(tmp_path, "sentencepiece")
    (tmp_path / name).write_text(json.dumps(content))
    refused(lambda: Tokenizer(tmp_path), str(tmp_path / name), words)


def test_ids_of_no_token_are_no_ends_and_no_text(tmp_path):
    (write(tmp_path, "byte_level", eos_token=None) / names.GENERATION_CONFIG).write_text('{"eos_token_id": [-1, 2, 999999]}')
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.eos_ids == (2,) and tokenizer.text(2**40) is None and tokenizer.decode([2**40, -1]) == ""


def test_a_tokenizer_that_cannot_encode_a_text_says_so(tmp_path):
    write(tmp_path, "metaspace")
    described = json.loads((tmp_path / names.TOKENIZER_JSON).read_text())
    described["model"] |= {"unk_id": None, "byte_fallback": False}
    (tmp_path / names.TOKENIZER_JSON).write_text(json.dumps(described))
    refused(lambda: Tokenizer(tmp_path).ids("日本"), "cannot encode '日本'")


@pytest.mark.parametrize(
    "text, words",
    [
        ("class_path: [1]", "`class_path` is [1]"),
        ("class_path: litgpt.prompts.ChatTemplate\ninit_args: 5", "arguments of a prompt style"),
        ("class_path: litgpt.prompts.ChatTemplate\ninit_args: {1: 2}", "arguments of a prompt style"),
        ("class_path: litgpt.prompts.ChatTemplate\ninit_args: {variables: 5}", "`variables` of a chat template"),
        ("class_path: litgpt.prompts.ChatTemplate\ninit_args: {variables: {1: 2}}", "`variables` of a chat template"),
        (BOMB + "class_path: litgpt.prompts.Alpaca", "repeats its parts"),
    ],
)
def test_a_prompt_style_with_values_of_the_wrong_type_is_refused(tmp_path, text, words):
    write(tmp_path, "byte_level", chat_template="{{ messages[0].content }}")
    (tmp_path / names.PROMPT_STYLE).write_text(text)
    refused(lambda: find_prompt_style(tmp_path), words)


def test_a_tokenizer_is_parsed_once_where_a_checkpoint_is_looked_up(folder, monkeypatch):
    parsed = []

    class Counting:
        @staticmethod
        def from_str(text):
            parsed.append(text)
            return FastTokenizer.from_str(text)

    monkeypatch.setattr("litgpt.tokenizer.FastTokenizer", Counting)
    monkeypatch.setattr("litgpt.scripts.download.tokenizers.Tokenizer", Counting)
    Tokenizer(find_checkpoint(folder))
    assert len(parsed) == 1


# ---- weights


def complex_weight(weights):
    return weights | {"lm_head.weight": weights["lm_head.weight"].to(torch.complex64)}


def integer_weight(weights):
    return weights | {"lm_head.weight": weights["lm_head.weight"].to(torch.int32)}


def sparse_weight(weights):
    return weights | {"lm_head.weight": weights["lm_head.weight"].to_sparse()}


def sparse_part(weights):
    return weights | {"model.layers.0.self_attn.q_proj.weight": weights["model.layers.0.self_attn.q_proj.weight"].to_sparse()}


@pytest.mark.parametrize(
    "damage, file, words",
    [
        (complex_weight, names.SAFETENSORS, "complex numbers"),
        (complex_weight, names.BIN, "complex numbers"),
        (integer_weight, names.SAFETENSORS, "not of floating-point numbers"),
        (integer_weight, names.BIN, "not of floating-point numbers"),
        (sparse_weight, names.BIN, "sparse"),
        (sparse_part, names.BIN, "sparse"),
    ],
)
def test_weights_that_are_no_dense_real_numbers_are_refused(folder, damage, file, words):
    weights = damage(load_file(folder / names.SAFETENSORS))
    (folder / names.SAFETENSORS).unlink()
    save_file(weights, folder / file) if file == names.SAFETENSORS else torch.save(weights, folder / file)
    refused(lambda: load_model(folder), words)


def header_of(path: Path, change) -> None:
    """Rewrite the header of a safetensors file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = change(json.loads(content[8 : 8 + length])).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


def moved_ends(header):
    return json.dumps(header | {"lm_head.weight": header["lm_head.weight"] | {"data_offsets": [0, 10**15]}})


def other_ends(header):
    return json.dumps(header | {"lm_head.weight": header["lm_head.weight"] | {"data_offsets": ["a", 1.5]}})


@pytest.mark.parametrize(
    "change",
    [moved_ends, other_ends, lambda header: DEEP, lambda header: "[]", lambda header: '{"a": 5}', lambda header: HUGE],
    ids=["beyond the file", "no numbers", "deep", "a list", "no entry", "a huge number"],
)
def test_a_safetensors_header_that_is_wrong_is_refused_by_all_readers(folder, change):
    header_of(folder / names.SAFETENSORS, change)
    for read in (check_files, find_checkpoint, load_model, stored_dtype):
        refused(lambda read=read: read(folder), str(folder / names.SAFETENSORS), "damaged", "download it again")


def test_a_header_that_claims_to_be_longer_than_the_file_is_refused(folder):
    file = folder / names.SAFETENSORS
    file.write_bytes((2**62).to_bytes(8, "little") + file.read_bytes()[8:])
    for read in (check_files, load_model):
        refused(lambda read=read: read(folder), str(file), "damaged")


def test_a_weight_in_two_files_is_refused(folder):
    (folder / names.SAFETENSORS).rename(folder / "a.safetensors")
    save_file({"lm_head.weight": torch.zeros(96, 32)}, folder / "b.safetensors")
    refused(lambda: load_model(folder), "b.safetensors and a.safetensors both hold the weight 'lm_head.weight'")
    index = {"weight_map": {"lm_head.weight": "a.safetensors", "model.norm.weight": "b.safetensors"}}
    (folder / names.SAFETENSORS_INDEX).write_text(json.dumps(index))
    refused(lambda: load_model(folder), "both hold the weight 'lm_head.weight'")


def test_headers_alone_say_the_type_of_weights_and_whether_they_are_lora(folder, tmp_path, monkeypatch):
    (tmp_path / "shards").mkdir()
    tensors = {"a": torch.zeros(100, dtype=torch.bfloat16), "b": torch.zeros(60), "c": torch.zeros(900, dtype=torch.int64)}
    write_shards(tmp_path / "shards", iter(tensors.items()), max_bytes=300)
    torch.save(tensors, tmp_path / names.LIT_WEIGHTS)
    step = tmp_path / "step"
    (step / names.RUN_STATE).mkdir(parents=True)
    (step / names.RUN_STATE / names.STATE).write_text("{}")
    shard = {"lora_A": torch.zeros(3, dtype=torch.float16), "optimizer/lora_A/exp_avg": torch.zeros(999)}
    save_file(shard, step / names.RUN_STATE / "shard-00000.safetensors")
    for reader in ("read_step", "read_files"):
        monkeypatch.setattr(f"litgpt.weight_files.{reader}", lambda *_: pytest.fail("whole tensors are read"))
    assert stored_dtype(tmp_path / "shards") == stored_dtype(tmp_path) == torch.bfloat16
    assert stored_dtype(step) == torch.float16 and has_lora(step) and not has_lora(folder)


# ---- LoRA


@pytest.fixture
def adapter(folder, tmp_path) -> Path:
    """An adapter of PEFT's layout beside the base in `folder`."""
    model = load_model(folder)
    settings = LoRA(r=2, dropout=0.0)
    add_lora(model, settings)
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            torch.nn.init.normal_(layer.lora_B)
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", model, settings, str(folder))
    load_lora(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    "content, words",
    [
        ([], "holds a list"),
        ({"lora_alpha": None}, "`lora_alpha` None"),
        ({"lora_alpha": "16"}, "`lora_alpha` '16'"),
        ({"lora_alpha": True}, "`lora_alpha` True"),
        ({"lora_alpha": float("nan")}, "`lora_alpha` nan"),
        ({"alpha_pattern": "x"}, "`alpha_pattern`"),
        ({"alpha_pattern": {"q_proj": "x"}}, "`lora_alpha` 'x'"),
        ({"alpha_pattern": {"(": 1}}, "the pattern '('"),
        ({"base_model_name_or_path": 5}, "The base model 5"),
        ({"base_model_name_or_path": LONG}, "more than a name may have"),
        ({"peft_type": ["LORA"]}, "not a plain LoRA adapter"),
    ],
)
def test_settings_of_an_adapter_of_the_wrong_type_are_refused(adapter, content, words):
    file = adapter / names.ADAPTER_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | content if isinstance(content, dict) else content))
    refused(lambda: load_lora(adapter), words)


@pytest.mark.parametrize(
    "of, value, words",
    [
        ("A", torch.zeros(2), "which is no LoRA update"),
        ("A", torch.zeros(0, 32), "which is no LoRA update"),
        ("A", torch.zeros(3, 32), "which is no LoRA update"),
        ("A", torch.zeros(2, 32, dtype=torch.int64), "which is no LoRA update"),
        ("A", torch.zeros(2, 5), "but in the base model its shape is"),
        ("B", torch.zeros(1, 2), "but in the base model its shape is"),
        ("B", torch.zeros(32, 2, dtype=torch.complex64), "complex numbers"),
    ],
)
def test_factors_that_fit_no_layer_are_refused(adapter, of, value, words):
    tensors = load_file(adapter / names.ADAPTER_WEIGHTS)
    name = next(name for name in tensors if name.endswith(f"lora_{of}.weight"))
    save_file(tensors | {name: value}, adapter / names.ADAPTER_WEIGHTS)
    refused(lambda: load_lora(adapter), words)


def test_an_adapter_without_its_weights_is_missing_a_file(adapter):
    (adapter / names.ADAPTER_WEIGHTS).unlink()
    with pytest.raises(MissingFile, match=names.ADAPTER_WEIGHTS):
        load_lora(adapter)


@pytest.mark.parametrize(
    "text, words",
    [
        ("lora_r: x", "`lora_r` is an integer, but got 'x'"),
        ("lora_r: true", "`lora_r` is an integer"),
        ("lora_r: 2.5", "`lora_r` is an integer"),
        ("lora_alpha: null", "`lora_alpha` is a number, but got None"),
        ("lora_alpha: .inf", "`lora_alpha` is a number, but got inf"),
        ("lora_dropout: []", "`lora_dropout` is a number"),
        ("lora_query: 1", "`lora_query` is true or false"),
        ("lora_what: 1", "`lora_what`, which is no option"),
        ("checkpoint_dir: 5", "The base model 5"),
        ("[]", "holds a list"),
        ("1: 2", "its key 1 is no text"),
        ("a: [", "not valid YAML"),
    ],
)
def test_options_of_a_lora_run_of_the_wrong_type_are_refused(folder, tmp_path, text, words):
    (tmp_path / "tuned").mkdir()
    torch.save({"x.lora_A": torch.zeros(1)}, tmp_path / "tuned" / names.LIT_LORA)
    needed = "" if text[0] == "[" or "checkpoint_dir" in text else f"checkpoint_dir: {folder}\n"
    (tmp_path / "tuned" / names.HYPERPARAMETERS).write_text(needed + text)
    refused(lambda: load_lora(tmp_path / "tuned"), words)


# ---- token stores


@pytest.mark.parametrize(
    "index, words",
    [
        ([], "holds a list"),
        ({}, "is damaged"),
        ({"dtype": "foo"}, "is damaged"),
        ({"dtype": ["uint16"]}, "is damaged"),
        ({"dtype": "bool"}, "is damaged"),
        ({"n_tokens": "4"}, "is damaged"),
        ({"n_tokens": -1}, "is damaged"),
        ({"n_documents": 5}, "is damaged"),
        ({"n_documents": None}, "is damaged"),
    ],
)
def test_a_token_store_with_another_index_is_refused(tmp_path, index, words):
    def build():
        return open_store(tmp_path, "key", [[1, 2], [3, 4]], lambda document: (document, [0]), vocab_size=100)

    build()
    file = tmp_path / "key" / "index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | index if index and isinstance(index, dict) else index))
    refused(build, str(tmp_path / "key"), words, "built anew")


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin"])
@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(b""), Path.unlink, lambda file: file.write_bytes(b"x" * 999)])
def test_a_token_store_with_other_files_is_refused(tmp_path, name, damage):
    def build():
        return open_store(tmp_path, "key", [[1, 2], [3, 4]], lambda document: (document, [0]), vocab_size=100)

    build()
    damage(tmp_path / "key" / name)
    refused(build, str(tmp_path / "key"), "is damaged", "built anew")


def test_yaml_may_name_a_part_again_and_override_what_it_merges(tmp_path):
    (tmp_path / "x.yaml").write_text("a: &a {b: 1, c: 2}\nd: {<<: *a, b: 3}\n")
    assert read_yaml(tmp_path / "x.yaml") == {"a": {"b": 1, "c": 2}, "d": {"b": 3, "c": 2}}


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which nobody can write")
def test_a_folder_that_cannot_be_made_is_one_sentence():
    def make():
        with atomic_folder(Path("/proc/nowhere/folder")):
            pass

    refused(make, "/proc/nowhere/folder could not be written: ")
