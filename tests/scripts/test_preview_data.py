"""What `preview_data` shows of a data set: the tokens that are trained on, how long samples are, and what a step of them costs."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric
from speaking import make_checkpoint

from litgpt.args import TrainArgs
from litgpt.cli import run
from litgpt.config import Config
from litgpt.data import JSON, DataModule, Mix, TextFiles
from litgpt.errors import UserError
from litgpt.finetune.loop import read_samples
from litgpt.scripts.preview_data import costs, histogram, marks, pieces, preview_data, shown, statistics
from litgpt.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder without its weights, which are not needed."""
    folder = make_checkpoint(tmp_path_factory.mktemp("base"))
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("data") / "samples.json"
    made.write_text(json.dumps([{"instruction": f"Wo? {i}", "output": "Köln 🙂 " * (1 + i % 7)} for i in range(40)]))
    return made


def lines_of(base: Path, file: Path, capsys: pytest.CaptureFixture, *words: str) -> str:
    run(preview_data, "preview_data", [str(base), "--data", "JSON", "--data.json_path", str(file), *words])
    return capsys.readouterr().out


def test_what_is_trained_on_is_marked_and_special_tokens_are_seen(base, file, capsys):
    said = lines_of(base, file, capsys, "--n_samples", "1", "--data.val_split_fraction", "0.1")
    assert said.startswith("Sample 1 of 36: ")
    assert "<|im_start|>assistant\n⟦Köln 🙂 <|im_end|>⟧\n" in said
    assert said.count("⟦") == 1


@pytest.mark.parametrize("train_on, expected", [("all", "⟦|im_start|>user"), ("last", "⟦Köln"), ("assistant", "⟦Köln")])
def test_marks_follow_what_is_trained_on(base, file, capsys, train_on, expected):
    said = lines_of(base, file, capsys, "--n_samples", "1", "--data.train_on", train_on, "--data.val_split_fraction", "0.1")
    assert (expected in said) if train_on != "all" else said.count("⟦") == 1 and "user\nWo? 0" in said.split("⟦")[1]


def test_a_sample_is_shown_as_the_text_that_its_tokens_stand_for(base):
    tokenizer = Tokenizer(base)
    text = "<|im_start|>user\nGrüße 🙂🙃, 你好<|im_end|>\n"
    ids = tokenizer.encode(text).tolist()
    for trained in ([False] * len(ids), [True] * len(ids)):
        assert "".join(pieces(ids, trained, tokenizer)) == text
    sample = {"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)}
    assert shown(sample, tokenizer, "Title", None).plain.split("\n", 1)[1] == text
    assert str(shown(sample, tokenizer, "Title", None).spans[-1].style) == "green"


def test_colours_are_used_where_there_are_some(base, file, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    said = lines_of(base, file, capsys, "--n_samples", "1", "--data.val_split_fraction", "0.1")
    assert "\x1b[32mKöln 🙂 <|im_end|>\x1b[0m" in said and "⟦" not in said


def test_commands_to_the_terminal_are_shown_and_not_carried_out(base):
    tokenizer = Tokenizer(base)
    ids = tokenizer.encode("a\x1b[31mb")
    assert "a\\x1b[31mb" in shown({"input_ids": ids, "labels": ids}, tokenizer, "Title", None).plain


def test_statistics_count_every_sample(base, file):
    data = JSON(json_path=file, val_split_fraction=0.1, truncation="drop")
    data.connect(Tokenizer(base), 1, 60)
    data.setup()
    samples = data.train_dataset
    said = "\n".join(statistics(samples, data.val_dataset))
    lengths = sorted(samples.lengths)
    assert f"{len(lengths)} samples to train on, {len(data.val_dataset)} samples to validate on." in said
    assert f"shortest {lengths[0]}, mean {sum(lengths) / len(lengths):.1f}, median {lengths[(len(lengths) + 1) // 2 - 1]}" in said
    assert f"longest {lengths[-1]}; {sum(lengths):,} in all" in said and samples.n_dropped > 0
    assert f"{samples.n_dropped} samples left out" in said and f"Trained on: {sum(samples.n_targets):,} of them" in said


def test_the_tokens_that_a_mix_lost_are_those_of_all_its_sources(base, file):
    data = Mix([JSON(json_path=file, val_split_fraction=0.1)], weights=[1.0], n_samples=2)
    data.connect(Tokenizer(base), 1, 60)
    data.setup()
    [part] = data.train_dataset.parts
    *_, said = statistics(data.train_dataset, data.val_dataset)
    share = part.n_lost / (part.n_lost + sum(part.lengths))
    assert f"in all sources, drawn or not: {part.n_cut} samples cut" in said and f"; {share:.1%} of all tokens are lost" in said


@pytest.mark.parametrize("lengths", [[5], [3, 3, 3], list(range(1, 100)), [7, 1000]])
def test_the_bars_hold_every_sample_once(lengths):
    found = [re.fullmatch(r" *([\d,]+) to +([\d,]+) tokens  (#*) (\d+)", bar).groups() for bar in histogram(lengths)]
    assert len(found) <= 8 and sum(int(count) for *_, count in found) == len(lengths)
    for low, high, _, count in found:
        low, high = (int(border.replace(",", "")) for border in (low, high))
        assert sum(low <= length <= high for length in lengths) == int(count)


def test_padding_is_counted_for_each_way_to_lay_samples_out(base, file):
    data = JSON(json_path=file, val_split_fraction=0.1)
    data.connect(Tokenizer(base), 4, 256)
    data.setup()
    train = TrainArgs(global_batch_size=8, micro_batch_size=4, epochs=1, max_seq_length=256)
    said = list(costs(data.train_dataset, Config.from_checkpoint(base), train, seed=1))
    padded, packed, everything = (next(line for line in said if f"--train.packing {how} " in line) for how in ("false", "true", "global"))
    assert "0.0% of them padding" in packed and "0.0%" not in padded
    assert re.search(r"\d+ rows of 256 tokens in all, (9\d|8\d)\.\d% of which are filled", everything)
    assert all(re.search(rf"Training {name} in .*TFLOP a step.*GB|MB at most", " ".join(said)) for name in ("all parameters", "LoRA"))


@pytest.mark.parametrize("max_seq_length", [None, 200])
def test_rows_of_the_whole_data_set_are_those_of_finetuning(base, file, max_seq_length):
    train = TrainArgs(global_batch_size=3, micro_batch_size=1, epochs=1, packing="global", max_seq_length=max_seq_length)
    data, config = JSON(json_path=file, val_split_fraction=0.1), Config.from_checkpoint(base)
    rows, _ = read_samples(Fabric(accelerator="cpu", devices=1), data, Tokenizer(base), config, train)
    said = list(costs(data.train_dataset, config, train, seed=1))
    n_inputs = sum(rows.lengths) - len(data.train_dataset)  # no sample's last token goes into the model
    assert said[0] == f"A step of 3 rows has {n_inputs / -(-len(rows) // 3):,.0f} tokens on average."
    assert f"--train.packing global  {len(rows)} rows of {max_seq_length or max(data.train_dataset.lengths)} tokens in all" in said[3]


def test_letters_stand_for_marks_where_there_are_none():
    assert marks("utf-8") == ("⟦", "⟧") and marks("ascii") == marks(None) == marks("no such one") == ("[[", "]]")


def test_an_ascii_terminal_shows_the_samples(base, file, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace")
    monkeypatch.setattr(sys, "stdout", out)
    preview_data(base, data=JSON(json_path=file, val_split_fraction=0.1), n_samples=1)
    out.flush()
    assert b"[[K?ln ? <|im_end|>]]" in out.buffer.getvalue()


def test_a_closed_output_ends_the_command_quietly(base, file, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(BrokenPipeError):  # which `cli.main` makes exit code 141 of
        preview_data(base, data=JSON(json_path=file, val_split_fraction=0.1), n_samples=1)


def test_a_data_set_that_has_loaders_only_is_shown_as_finetuning_sees_it(base, file, capsys):
    class Mine(DataModule):
        def setup(self, stage=""):
            self.found = JSON(json_path=file, val_split_fraction=0.1)
            self.found.connect(self.tokenizer, self.batch_size, self.max_seq_length)
            self.found.setup()

        def train_dataloader(self):
            return self.found.train_dataloader()

        def val_dataloader(self):
            return self.found.val_dataloader()

    preview_data(base, data=Mine(), n_samples=1)
    assert "36 samples to train on, 4 samples to validate on." in capsys.readouterr().out


def test_wrong_arguments_are_one_sentence(base, file, tmp_path):
    data = JSON(json_path=file, val_split_fraction=0.1)
    with pytest.raises(UserError, match="`n_samples` is how many samples to show, but got -1"):
        preview_data(base, data=data, n_samples=-1)
    with pytest.raises(UserError, match="`train.global_batch_size` is a number of samples, but got null"):
        preview_data(base, data=data, train=TrainArgs(global_batch_size=None))
    with pytest.raises(UserError, match="`train.max_seq_length` is 1000, but the model's context is 256"):
        preview_data(base, data=data, train=TrainArgs(max_seq_length=1000))
    (tmp_path / "text.txt").write_text("Once upon a time. " * 300)
    with pytest.raises(UserError, match="TextFiles has no answers to learn"):
        preview_data(base, data=TextFiles(train_data_path=tmp_path / "text.txt"))
