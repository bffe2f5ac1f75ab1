"""Finetuning with Adapter and Adapter v2, from the command to every other command that takes what it leaves."""

import contextlib
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from finetune.run_and_kill import run_and_kill, run_on_ranks
from safetensors.torch import load_file, save_file
from speaking import make_tokenizer
from tiny import tiny_config
from torch import Tensor

from litgpt import LLM, cli, names
from litgpt.adapter_v2 import adapter_filter, is_new
from litgpt.args import EvalArgs, OptimizerArgs, TrainArgs
from litgpt.checkpoint import load_model, named_base, write_checkpoint
from litgpt.data import JSON
from litgpt.errors import MissingFile, UserError
from litgpt.finetune import adapter, adapter_v2, full, lora
from litgpt.generate import adapter as generate_adapter
from litgpt.generate import adapter_v2 as generate_adapter_v2
from litgpt.generate import full as generate_full
from litgpt.generate.run import load
from litgpt.model import GPT
from litgpt.prompts import Alpaca
from litgpt.quantize import is_quantized

METHODS = {"adapter": adapter, "adapter_v2": adapter_v2, "full": full}
COMMANDS = {"adapter": generate_adapter, "adapter_v2": generate_adapter_v2, "full": generate_full}
BOTH = ("adapter", "adapter_v2")
IDS = torch.arange(3, 43).view(2, 20)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    vocab = make_tokenizer(folder / "tokenizer")
    config = tiny_config("llama", n_layer=4, vocab_size=vocab, padded_vocab_size=vocab, block_size=256)
    torch.manual_seed(0)
    write_checkpoint(folder / "model", GPT(config).state_dict(), config, source=folder / "tokenizer")
    return folder / "model"


def arguments(samples: Path, out_dir: Path, **train) -> dict:
    return dict(
        out_dir=out_dir,
        precision="32-true",
        data=JSON(json_path=samples, val_split_fraction=0.1, prompt_style="alpaca"),
        train=TrainArgs(**dict(global_batch_size=4, micro_batch_size=2, max_steps=9, save_interval=3) | train),
        eval=EvalArgs(interval=1000, max_new_tokens=None, final_validation=False),
        optimizer=OptimizerArgs(lr=3e-2),
    )


@pytest.fixture(scope="module")
def runs(base: Path, samples: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each method."""
    place = tmp_path_factory.mktemp("runs")
    for name, module in METHODS.items():
        module.setup(base, **arguments(samples, place / name))
    return {name: place / name for name in METHODS}


def logits_of(folder: Path, **options) -> Tensor:
    with torch.inference_mode():
        return load_model(folder, **options)(IDS)


@pytest.mark.parametrize("method", BOTH)
def test_final_holds_what_was_trained_and_names_its_base(runs, base: Path, method: str):
    final = runs[method] / "final"
    files = {names.OWN_ADAPTER, names.OWN_ADAPTER_BASE, names.CONFIG, names.LIT_CONFIG, names.TOKENIZER_JSON, names.PROMPT_STYLE}
    assert files | {names.HYPERPARAMETERS} <= {file.name for file in final.iterdir()}
    assert yaml.safe_load((final / names.OWN_ADAPTER_BASE).read_text()) == {"checkpoint_dir": str(base)}
    stored = load_file(final / names.OWN_ADAPTER)
    chosen = is_new if method == "adapter" else lambda name: adapter_filter(name, None)
    assert all(map(chosen, stored)) and {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert "transformer.h.3.attn.adapter_wte.weight" in stored and ("lm_head.adapter_scale" in stored) == (method == "adapter_v2")


@pytest.mark.parametrize("method", BOTH)
def test_the_last_step_is_the_same_model_as_final_and_another_one_than_the_base(runs, base: Path, method: str):
    final, (*_, last) = runs[method] / "final", sorted(runs[method].glob("step-*"))
    assert (logits_of(final) - logits_of(base)).abs().max() > 1e-2
    assert last.name == "step-000009"
    torch.testing.assert_close(logits_of(last), logits_of(final), rtol=0, atol=0)
    torch.testing.assert_close(logits_of(base, adapter=final), logits_of(final), rtol=0, atol=0)
    parts = load_model(final, dtype=torch.bfloat16)
    kinds = {parameter.dtype for name, parameter in parts.named_parameters() if is_new(name)}
    assert kinds == {torch.float32}, "a scale near 1 has two digits in 16 bits"
    assert {parameter.dtype for name, parameter in parts.named_parameters() if not is_new(name)} == {torch.bfloat16}
    assert (parts(IDS).float() - logits_of(final)).abs().max() < 0.2


@pytest.mark.parametrize("method", BOTH)
def test_a_run_that_was_killed_goes_on_bit_for_bit(runs, base: Path, samples: Path, tmp_path: Path, method: str):
    options = arguments(samples, tmp_path / "out")
    assert run_and_kill(METHODS[method].__name__, 5, base, **options) == -9
    assert [folder.name for folder in (tmp_path / "out").glob("step-*")] == ["step-000003"]
    METHODS[method].setup(base, resume=True, **options)
    done, expected = (load_file(out / "final" / names.OWN_ADAPTER) for out in (tmp_path / "out", runs[method]))
    assert done.keys() == expected.keys() and all(torch.equal(done[name], expected[name]) for name in done)


@pytest.mark.parametrize(("method", "fits"), [("adapter", True), ("adapter_v2", False)])
def test_two_ranks_learn_the_same_as_one(base: Path, samples: Path, runs, tmp_path: Path, method: str, fits: bool):
    options = arguments(samples, tmp_path / "both")
    assert run_on_ranks(METHODS[method].__name__, 2, base, fits=fits, **options) == [0, 0]
    alone, both = (load_file(folder / "final" / names.OWN_ADAPTER) for folder in (runs[method], tmp_path / "both"))
    assert alone.keys() == both.keys()
    torch.testing.assert_close(logits_of(tmp_path / "both" / "final"), logits_of(runs[method] / "final"), rtol=0, atol=1e-3)


# Other commands


SHORT = ["--max_new_tokens", "6", "--temperature", "0", "--precision", "32-true"]


@pytest.mark.parametrize("method", BOTH)
def test_every_command_takes_the_folder_in_the_place_of_a_model(
    runs, base: Path, samples: Path, tmp_path: Path, method: str, capsys, monkeypatch: pytest.MonkeyPatch
):
    final = runs[method] / "final"
    llm = LLM.load(final, distribute=None)
    llm.distribute(precision="32-true")
    expected = llm.generate("Say 3", max_new_tokens=6, temperature=0.0)
    assert isinstance(load(final).style, Alpaca)
    capsys.readouterr()
    assert cli.main(["generate", str(final), "--prompt", "Say 3", *SHORT]) == 0
    assert capsys.readouterr().out == f"Say 3\n{expected}\n"
    assert cli.main(["generate", str(base), "--prompt", "Say 3", *SHORT, "--adapter", str(final)]) == 0
    assert capsys.readouterr().out == f"Say 3\n{expected}\n"
    said = iter(["Say 3", ""])
    monkeypatch.setattr("builtins.input", lambda *_: next(said))
    assert cli.main(["chat", str(final), *SHORT]) == 0
    assert expected in capsys.readouterr().out
    (tmp_path / "text.txt").write_text("yes yes yes")
    found = []
    for folder in (final, base):
        assert cli.main(["perplexity", str(folder), "--data", str(tmp_path / "text.txt"), "--dtype", "float32"]) == 0
        found.append(capsys.readouterr().out)
    assert found[0] != found[1]


@pytest.mark.parametrize("method", BOTH)
def test_what_cannot_be_merged_is_refused_in_one_sentence(runs, tmp_path: Path, method: str, capsys):
    final = runs[method] / "final"
    commands = [["convert_from_litgpt", str(final), str(tmp_path / "out")], ["merge_lora", str(final)]]
    commands += [["convert_to_litgpt", str(final)], ["export_gguf", str(final), str(tmp_path / "model.gguf")]]
    commands += [["add_tokens", str(final), "--out_dir", str(tmp_path / "out"), "--tokens", '["<new>"]']]
    for words in commands:
        assert cli.main(words) == 2, words
        line = capsys.readouterr().err.strip()
        assert "what Adapter trained" in line and "\n" not in line, words
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="what Adapter trained"):
        LLM.load(final).save(tmp_path / "out")


@pytest.mark.parametrize("moved", ["nowhere", "."], ids=["nowhere", "into itself"])
def test_a_base_that_has_moved_is_named_in_one_sentence_that_says_how_to_go_on(runs, base: Path, tmp_path: Path, capsys, moved: str):
    shutil.copytree(runs["adapter"] / "final", tmp_path / "final")
    (tmp_path / "final" / names.OWN_ADAPTER_BASE).write_text(f"checkpoint_dir: {moved}\n")
    with contextlib.chdir(tmp_path / "final"):
        assert cli.main(["generate", str(tmp_path / "final")]) == 2
    assert f"'{moved}' of {tmp_path}/final is not there. Name it with: generate DIR --adapter" in capsys.readouterr().err
    assert cli.main(["generate", str(base), "--adapter", str(tmp_path / "final"), *SHORT]) == 0


def test_a_base_that_has_moved_is_named_the_same_way_beside_a_step_and_litgpts_adapter(runs, tmp_path: Path):
    step, litgpts = shutil.copytree(runs["adapter"] / "step-000009", tmp_path / "step"), tmp_path / "litgpts"
    litgpts.mkdir()
    (litgpts / names.LIT_ADAPTER_V2).touch()
    for folder in (step, litgpts):
        (folder / names.HYPERPARAMETERS).write_text("checkpoint_dir: nowhere\n")
        with pytest.raises(MissingFile, match=f"Name it with: generate DIR --adapter {folder}"):
            named_base(folder)


@pytest.mark.parametrize("module", [adapter, lora], ids=["adapter", "lora"])
def test_what_was_trained_finds_its_base_from_another_folder(module, base: Path, samples: Path, tmp_path: Path):
    with contextlib.chdir(base.parent):
        module.setup(Path(base.name), **arguments(samples, tmp_path / "out", max_steps=1, save_interval=1))
    beside = tmp_path / "out" / "final" / (names.ADAPTER if module is lora else "")
    with contextlib.chdir(tmp_path):
        torch.testing.assert_close(logits_of(beside), logits_of(tmp_path / "out" / "step-000001"), rtol=0, atol=1e-5)


def test_an_adapter_of_another_model_is_refused(runs, base: Path, tmp_path: Path):
    config = tiny_config("llama", n_layer=3)
    write_checkpoint(tmp_path / "other", GPT(config).state_dict(), config)
    for method in BOTH:
        with pytest.raises(UserError, match="does not fit the base model"):
            load_model(tmp_path / "other", adapter=runs[method] / "final")


@pytest.mark.parametrize("method", BOTH)
def test_a_base_in_four_bits_keeps_its_adapter_in_fp32_and_its_head_plain(runs, method: str):
    speaker, plain = load(runs[method] / "final", quantize="bnb.nf4", precision="bf16-true"), load(runs[method] / "final")
    assert is_quantized(speaker.model)
    head = speaker.model.lm_head
    assert type(getattr(head, "linear", head)) is type(getattr(plain.model.lm_head, "linear", plain.model.lm_head))
    assert {parameter.dtype for name, parameter in speaker.model.named_parameters() if is_new(name)} == {torch.float32}
    with torch.inference_mode():
        logits, expected = speaker.model(IDS).float(), plain.model(IDS).float()
    assert torch.cosine_similarity(logits, expected, dim=-1).min() > 0.9


@pytest.mark.parametrize("method", BOTH)
def test_a_base_can_be_held_in_four_bits_while_its_adapter_is_trained(base: Path, samples: Path, tmp_path: Path, method: str):
    METHODS[method].setup(base, quantize="bnb.nf4", **arguments(samples, tmp_path / "out", max_steps=2))
    assert (logits_of(tmp_path / "out" / "final") - logits_of(base)).abs().max() > 0


@pytest.mark.parametrize("method", BOTH)
def test_no_run_begins_with_what_an_adapter_holds(runs, samples: Path, tmp_path: Path, method: str):
    with pytest.raises(UserError, match="what Adapter trained beside a model"):
        METHODS[method].setup(runs[method] / "final", **arguments(samples, tmp_path / "out"))


@pytest.mark.parametrize("method", BOTH)
def test_validate_checks_an_adapter_against_its_base(runs, tmp_path: Path, method: str, capsys):
    final = shutil.copytree(runs[method] / "final", tmp_path / "final")
    assert cli.main(["validate", str(final), "--check_values", "true"]) == 0
    out = capsys.readouterr().out
    assert "what Adapter trained beside another model" in out and "the updates fit their base" in out
    stored = load_file(final / names.OWN_ADAPTER)
    stored["transformer.h.2.attn.gating_factor"][0, 0, 0, 0] = torch.nan
    save_file(stored, final / names.OWN_ADAPTER)
    assert cli.main(["validate", str(final), "--check_values", "true"]) == 2
    assert "'transformer.h.2.attn.gating_factor' hold numbers that are not finite" in "".join(capsys.readouterr())
    save_file({name: tensor for name, tensor in stored.items() if "gating" not in name}, final / names.OWN_ADAPTER)
    assert cli.main(["validate", str(final)]) == 2
    assert "does not fit the base model" in "".join(capsys.readouterr())


# Commands that only answer


@pytest.mark.parametrize("method", METHODS)
def test_the_commands_that_litgpt_has_for_each_method_print_the_answer_alone(runs, base: Path, method: str, capsys):
    path = "finetuned_path" if method == "full" else "adapter_path"
    final = runs[method] / "final"
    file = final / (names.SAFETENSORS if method == "full" else names.OWN_ADAPTER)
    llm = LLM.load(final, distribute=None)
    llm.distribute(precision="32-true")
    given = [{"role": "user", "content": "Say", "input": "3"}]
    expected = llm.generate(given, max_new_tokens=6, temperature=0.0)
    main = COMMANDS[method].main
    capsys.readouterr()
    options = dict(input="3", max_new_tokens=6, temperature=0.0, precision="32-true")
    main(base, "Say", **{path: final}, **options)
    assert capsys.readouterr().out == f"{expected}\n"
    if method != "full":
        main(base, "Say", **{path: file}, **options)
        assert capsys.readouterr().out == f"{expected}\n"
    with pytest.raises(UserError, match=f"`{path}` is a folder that finetune_{method} wrote"):
        main(base, "Say", **{path: final / names.CONFIG})
    with pytest.raises(MissingFile, match=f"There is no folder.*`{path}` is one that finetune_{method} wrote"):
        main(base, "Say", **{path: final / "nowhere"})
