import os
import shutil
import subprocess
import sys

import pytest
import torch
from forked import fork, run_litgpt
from safetensors.torch import save_file
from speaking import make_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from litgpt import names
from litgpt.adapter_v2 import adapter_filter, add_adapter_v2
from litgpt.checkpoint import load_model, write_adapter
from litgpt.cli import main as cli
from litgpt.errors import UserError
from litgpt.generate import base, memory
from litgpt.generate.answers import Progress
from litgpt.generate.run import load
from litgpt.lora import LoRA, add_lora

PROMPT = "What food do llamas eat?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("generate") / "model")


@pytest.fixture(scope="module")
def speaker(folder):
    return load(folder, precision="32-true")


def run(folder, *flags):
    assert cli(["generate", str(folder), "--precision", "32-true", *flags]) == 0


def transformers_answer(folder, messages, n):
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    if isinstance(messages, str):
        ids = tokenizer(messages).input_ids
    else:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    made = theirs.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=n, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    return tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("prompt", ["Hello", " Two\nlines <|im_start|> 你好\n"])
def test_the_command_prints_the_prompt_as_given_and_in_a_new_line_the_greedy_answer_of_transformers(folder, capsys, prompt):
    run(folder, "--prompt", prompt, "--temperature", "0", "--max_new_tokens", "30")
    out, err = capsys.readouterr()
    assert out == f"{prompt}\n{transformers_answer(folder, [{'role': 'user', 'content': prompt}], 30)}\n"
    assert "tokens/sec" in err


def test_the_answer_of_a_base_model_goes_on_in_the_prompts_line(tmp_path, capsys):
    folder = make_checkpoint(tmp_path / "base", template=None)
    run(folder, "--prompt", PROMPT, "--temperature", "0", "--max_new_tokens", "30")
    assert capsys.readouterr().out == f"{PROMPT}{transformers_answer(folder, PROMPT, 30)}\n"


def test_samples_differ_and_are_the_same_in_the_next_run(folder, capsys):
    flags = ["--num_samples", "3", "--max_new_tokens", "12", "--temperature", "1.5"]
    run(folder, *flags)
    first, err = capsys.readouterr()
    assert [f"inference {i}:" in err for i in (1, 2, 3, 4)] == [True, True, True, False]
    run(folder, *flags)
    assert capsys.readouterr().out == first
    answers = first.split(PROMPT)[1:]
    assert len(answers) == len(set(answers)) == 3
    run(folder, *flags, "--seed", "7")
    assert capsys.readouterr().out != first


def test_the_system_prompt_is_part_of_the_prompt(folder, capsys):
    run(folder, "--sys_prompt", "Speak like a pirate.", "--max_new_tokens", "12", "--temperature", "0")
    messages = [{"role": "system", "content": "Speak like a pirate."}, {"role": "user", "content": PROMPT}]
    assert capsys.readouterr().out == f"{PROMPT}\n{transformers_answer(folder, messages, 12)}\n"


def test_an_answer_that_the_context_cuts_is_announced(folder, capsys):
    run(folder, "--max_new_tokens", "5000", "--temperature", "2.0", "--top_k", "null")
    assert "256 tokens is full" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--top_p", "7"], "`top_p` is a probability, but got 7"),
        (["--temperature", "-1"], "`temperature` must be 0 or more"),
        (["--top_k", "0"], "`top_k` counts the tokens"),
        (["--max_new_tokens", "0"], "`max_new_tokens` must be at least 1"),
        (["--num_samples", "0"], "`num_samples` must be at least 1"),
        (["--prompt", "llama " * 400], "context is 256 tokens"),
        (["--quantize", "bnb.nf3"], "bnb.nf4"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(folder, capsys, flags, said):
    assert cli(["generate", str(folder), *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err.splitlines()[-1]
    assert "Traceback" not in err


def test_a_memory_that_cannot_fit_is_refused_in_one_sentence_before_it_is_made(tmp_path, capsys, monkeypatch):
    folder = make_checkpoint(tmp_path / "vast", context=2**30)
    monkeypatch.setattr(memory, "device_memory_gb", lambda device: 8.0)
    assert cli(["generate", str(folder), "--precision", "32-true", "--max_new_tokens", "1_000_000_000"]) == 2
    out, err = capsys.readouterr()
    n_prompt = len(load(folder, precision="32-true").encode(PROMPT))
    n_bytes = (1_000_000_000 + n_prompt) * 2 * 2 * 2 * 8 * 4  # layers, keys and values, groups, features, bytes
    assert out == ""
    assert f"remember {1_000_000_000 + n_prompt:,} tokens takes {n_bytes / 1e9:,.1f} GB, but" in err.splitlines()[-1]
    assert "has 8.0 GB" in err and "Lower `max_new_tokens`" in err
    run(folder, "--max_new_tokens", "3")


def test_nothing_is_added_to_updates_that_are_no_model(folder, tmp_path, capsys):
    model, settings = load_model(folder), LoRA(r=2, dropout=0.0)
    add_lora(model, settings)
    write_adapter(tmp_path / "lora", model, settings, str(folder))
    shutil.copytree(folder, tmp_path / "adapter", ignore=shutil.ignore_patterns("*.safetensors"))
    model = load_model(folder)
    add_adapter_v2(model)
    trained = {name: tensor for name, tensor in model.state_dict().items() if adapter_filter(name, tensor)}
    save_file(trained, tmp_path / "adapter" / names.OWN_ADAPTER)
    (tmp_path / "adapter" / names.OWN_ADAPTER_BASE).write_text(f"checkpoint_dir: {folder}\n")
    for updates in ("lora", "adapter"):
        run(tmp_path / updates, "--max_new_tokens", "3")
        capsys.readouterr()
        for more in ("lora", "adapter"):
            assert cli(["generate", str(tmp_path / updates), "--adapter", str(tmp_path / more)]) == 2
            [line] = capsys.readouterr().err.splitlines()
            assert f"{tmp_path / updates} holds what was trained beside a model, to which nothing else can be added" in line


# Streams


def test_a_reader_that_stops_early_ends_the_program_quietly(folder):
    words = ["generate", str(folder), "--prompt", "one\ntwo", "--num_samples", "50", "--max_new_tokens", "200"]
    process = subprocess.Popen([sys.executable, "-m", "litgpt", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"one\n"
    process.stdout.close()
    notes = process.stderr.read().decode().splitlines()
    process.stderr.close()
    assert process.wait() == 141
    assert all(line.startswith(("Loaded ", "Time for inference ")) for line in notes) and len(notes) < 50


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a disk that is always full")
@pytest.mark.parametrize("words", [["generate", "CKPT", "--max_new_tokens", "4"], ["finetune", "--help"], ["finetune", "--print_config"]])
@pytest.mark.parametrize("is_buffered", [True, False])
def test_output_that_cannot_be_written_is_one_sentence(folder, tmp_path, words, is_buffered):
    words = [str(folder) if word == "CKPT" else word for word in words]
    process = fork(run_litgpt, words, "/dev/full", tmp_path / "errors", is_buffered)
    process.join(60)
    errors = (tmp_path / "errors").read_text()
    lines = [line for line in errors.splitlines() if line and not line.startswith(("Loaded ", "Time for inference "))]
    assert process.exitcode == 2 and len(lines) == 1 and "could not be written: the disk is full" in lines[0], errors


def test_an_error_in_the_middle_of_an_answer_begins_its_own_line(folder, capsys, monkeypatch):
    def broken(model, replies, *args):
        yield Progress(replies[0], [65], replies[0].push([65]))
        raise UserError("Too bad.")

    monkeypatch.setattr(base, "write", broken)
    assert cli(["generate", str(folder), "--precision", "32-true"]) == 2
    out, err = capsys.readouterr()
    assert out.endswith("\n") and err.splitlines()[-1] == "litgpt: Too bad."


def test_closed_streams_are_no_error(folder):
    words = f"{sys.executable} -m litgpt generate {folder} --max_new_tokens 4"
    ascii_only = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"}
    done = subprocess.run(["sh", "-c", f"{words} <&- >&-"], capture_output=True, text=True, env=ascii_only)
    assert (done.returncode, done.stdout) == (0, "") and "tokens/sec" in done.stderr and "Traceback" not in done.stderr


# LitGPT's functions


def test_generate_returns_prompt_and_answer_and_the_end_token(speaker):
    prompt = torch.tensor([5, 6, 7])
    whole = base.generate(speaker.model, prompt, 15, temperature=0.0)
    assert whole.shape == (15,)
    assert torch.equal(whole[:3], prompt)
    assert torch.equal(base.generate(speaker.model, prompt, 15, temperature=0.0, include_prompt=False), whole[3:])
    eos = whole[8].item()
    ended = base.generate(speaker.model, prompt, 15, temperature=0.0, eos_id=eos)
    assert torch.equal(ended, whole[: 3 + whole[3:].tolist().index(eos) + 1])
    with pytest.raises(UserError, match="max_returned_tokens"):
        base.generate(speaker.model, prompt, 3)


def test_generate_fn_yields_tokens_without_the_stop_sequence_unless_it_is_wanted(speaker):
    prompt = torch.tensor([5, 6, 7])
    new = base.generate(speaker.model, prompt, 15, temperature=0.0, include_prompt=False)
    stop = [new[4:6].tolist()]
    kwargs = dict(temperature=0.0, stop_tokens=stop, include_prompt=False)
    without = torch.cat(list(base.generate_fn(speaker.model, prompt, 15, **kwargs, include_eos=False)))
    assert torch.equal(without, new[: len(without)])
    included = list(base.generate_fn(speaker.model, prompt, 15, **kwargs, include_eos=True))
    assert torch.equal(torch.cat(included), new[: len(without) + 2])
    assert all(token.shape == (1,) for token in included)


def test_a_batch_yields_the_tokens_of_each_row_alone(speaker):
    prompts = torch.tensor([[5, 6, 7], [8, 9, 10]])
    alone = [base.generate(speaker.model, prompt, 12, temperature=0.0) for prompt in prompts]
    kwargs = dict(sample_args=dict(temperature=0.0), include_prompt=True, include_eos=False)
    steps = list(base.batched_generate_fn(speaker.model, prompts, 12, **kwargs))
    assert [torch.equal(torch.cat(row), expected) for row, expected in zip(zip(*steps, strict=True), alone, strict=True)] == [True, True]
    stop = [[alone[0][7].item()]]
    ended = list(base.batched_generate_fn(speaker.model, prompts, 12, **kwargs, stop_tokens=stop))
    assert ended[-1][0] is None or ended[-1][1] is None


def test_sample_looks_at_the_last_position_of_the_first_sequence():
    logits = torch.randn(2, 3, 11)
    assert base.sample(logits, temperature=0.0).tolist() == [logits[0, -1].argmax().item()]
    assert base.sample(logits, top_k=1).shape == (1,)


def test_sample_top_p_leaves_the_likeliest_tokens():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert base.sample_top_p(logits, 0.7).isinf().tolist() == [[False, False, True, True]]
    assert base.sample_top_p(logits[0], 1.0).isinf().tolist() == [False] * 4


def test_one_draw_of_a_multinomial_is_one_index_per_row():
    probs = torch.eye(5)[[3, 1]]
    assert base.multinomial_num_samples_1(probs).tolist() == [[3], [1]]
