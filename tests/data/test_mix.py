"""Several data sets as one: whose samples an epoch has, and that all the rest of a run can use it."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from lightning.fabric import Fabric

from litgpt.args import EvalArgs, to_plain
from litgpt.cli import make_parser, run
from litgpt.data import JSON, Alpaca2k, Dolly, Mix, TextFiles
from litgpt.data.mix import repeated, shares
from litgpt.errors import UserError
from litgpt.finetune import loop, lora
from litgpt.recipes import Options, rewritten
from litgpt.run_inputs import digest, prepared


def source(folder: Path, name: str, n: int, n_val: int = 2, **options) -> JSON:
    """A data set of n samples, with the answers NAME-0, NAME-1, ..., and n_val others."""
    (folder / name).mkdir()
    for part, count in (("train", n), ("val", n_val)):
        rows = [{"instruction": f"{name} {i}?", "output": f"{name}-{i}{'v' * (part == 'val')}"} for i in range(count)]
        (folder / name / f"{part}.json").write_text(json.dumps(rows))
    return JSON(folder / name, **{"prompt_style": "alpaca"} | options)


def ready(data: Mix, tokenizer, max_seq_length: int = 300) -> Mix:
    data.connect(tokenizer, batch_size=2, max_seq_length=max_seq_length)
    data.prepare_data()
    data.setup()
    return data


def answers(tokenizer, samples) -> list[str]:
    return [tokenizer.decode(s["labels"][s["labels"] != -100]).removesuffix("</s>") for s in (samples[i] for i in range(len(samples)))]


def test_without_weights_every_sample_is_there_once(tmp_path, tokenizer):
    data = ready(Mix([source(tmp_path, "a", 6), source(tmp_path, "b", 3)]), tokenizer)
    assert sorted(answers(tokenizer, data.train_dataset)) == [f"a-{i}" for i in range(6)] + [f"b-{i}" for i in range(3)]
    assert sorted(answers(tokenizer, data.val_dataset)) == ["a-0v", "a-1v", "b-0v", "b-1v"]


def test_each_source_gets_its_share_and_none_of_its_samples_twice_as_often_as_another(tmp_path, tokenizer):
    data = ready(Mix([source(tmp_path, "a", 20), source(tmp_path, "b", 4)], weights=[1, 3]), tokenizer)
    found = Counter(answers(tokenizer, data.train_dataset))
    times = {name: sorted(count for answer, count in found.items() if answer.startswith(name)) for name in "ab"}
    assert times == {"a": [1] * 6, "b": [4, 4, 5, 5]}  # of 24 samples
    assert len(data.val_dataset) == 4


def test_the_seed_decides_which_samples_are_drawn(tmp_path, tokenizer):
    sources = [source(tmp_path, "a", 40), source(tmp_path, "b", 40)]
    first, again, other = (
        sorted(answers(tokenizer, ready(Mix(sources, weights=[1, 1], n_samples=20, seed=seed), tokenizer).train_dataset))
        for seed in (1, 1, 2)
    )
    assert first == again != other and len(first) == 20 == len(set(first))


def test_any_beginning_has_each_sources_share(tmp_path, tokenizer):
    data = ready(Mix([source(tmp_path, "a", 30, 9), source(tmp_path, "b", 10, 3)]), tokenizer)
    for samples in (data.train_dataset, data.val_dataset):
        names = [answer[0] for answer in answers(tokenizer, samples)]
        for n in range(len(names)):
            assert abs(names[:n].count("b") - n / 4) <= 1


@pytest.mark.parametrize("weights", [[1, 1, 1], [0.7, 0.3], [0.1, 0.2, 0.3, 0.4], [1e-9, 1], [5, 3, 1]])
@pytest.mark.parametrize("total", [1, 7, 100])
def test_shares_are_less_than_one_sample_off_and_add_up(weights, total):
    counts = shares(weights, total)
    assert sum(counts) == total
    assert all(abs(count - total * weight / sum(weights)) < 1 for count, weight in zip(counts, weights))


def test_a_source_is_gone_through_whole_before_it_is_repeated():
    chosen = repeated(10, 27, torch.Generator().manual_seed(0)).tolist()
    assert chosen[:20] == [*range(10), *range(10)] and len(set(chosen[20:])) == 7


def test_each_source_keeps_its_own_settings(tmp_path, tokenizer):
    sources = [source(tmp_path, "a", 2, mask_prompt=False, prompt_style="phi-2"), source(tmp_path, "b", 2)]
    data = ready(Mix(sources), tokenizer)
    for sample in (data.train_dataset[i] for i in range(4)):
        assert ((sample["labels"] != -100).all()) == tokenizer.decode(sample["input_ids"]).startswith("Instruct: a")
    styles = [type(data.train_dataset.style_of(i)).__name__ for i in range(4)]
    assert styles == ["Phi2", "Phi2", "Alpaca", "Alpaca"] and type(data.train_dataset.prompt_style).__name__ == "Phi2"


def test_what_a_run_asks_of_its_samples_is_answered(tmp_path, tokenizer):
    data = Mix([source(tmp_path, "b", 3), source(tmp_path, "longer", 2), source(tmp_path, "c", 2)], weights=[1, 2, 1])
    samples = ready(data, tokenizer).train_dataset
    assert len(samples) == 7 and len(set(samples.lengths)) == 2
    assert samples.lengths == [len(samples[i]["input_ids"]) for i in range(7)]
    assert samples.n_targets == [int((samples[i]["labels"][1:] != -100).sum()) for i in range(7)]
    assert samples.highest_id == max(int(samples[i]["input_ids"].max()) for i in range(7))


def test_parts_are_told_apart_by_where_their_mappings_are(tmp_path, tokenizer):
    samples = ready(Mix([source(tmp_path, "b", 3), source(tmp_path, "c", 2), source(tmp_path, "d", 2)]), tokenizer).train_dataset
    assert [samples.example(i)[1] for i in range(7)] == ["b-0", "b-1", "b-2", "c-0", "c-1", "d-0", "d-1"]
    assert [samples.messages(i)[0]["content"] for i in (0, 3, 6)] == ["b 0?", "c 0?", "d 1?"]
    assert samples.place(4) == f"{tmp_path / 'c' / 'train.json'}, record 2"


def test_cut_and_dropped_samples_are_those_of_all_parts(tmp_path, tokenizer):
    first, second = (source(tmp_path, name, 0, prompt_style="phi-2", truncation=how) for name, how in (("a", "right"), ("b", "drop")))
    for part, texts in ((first, ["short", "long" * 90]), (second, ["long" * 90, "short"])):
        (part.json_path / "train.json").write_text(json.dumps([{"instruction": "Hi", "output": text} for text in texts]))
    samples = ready(Mix([first, second]), tokenizer, 60).train_dataset
    assert (samples.cut, samples.n_cut, samples.n_dropped, len(samples), len(samples.data)) == ([1], 1, 1, 3, 4)
    assert [index for indices in samples.dropped.values() for index in indices] == [2]
    assert samples.n_lost == sum(part.n_lost for part in samples.parts) > 0


def test_a_mix_may_be_a_source(tmp_path, tokenizer):
    inner = Mix([source(tmp_path, "a", 2), source(tmp_path, "b", 2)])
    data = ready(Mix([inner, source(tmp_path, "c", 4)], weights=[1, 1]), tokenizer)
    assert Counter(answer[0] for answer in answers(tokenizer, data.train_dataset)) == {"a": 2, "b": 2, "c": 4}
    assert data.train_dataset.example(7)[1] == "c-3"


def test_a_mix_without_held_out_samples_has_none_to_validate_on(tmp_path, tokenizer):
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": "a", "output": "b"}] * 3))
    data = ready(Mix([JSON(tmp_path / "a.json", val_split_fraction=0.0)] * 2), tokenizer)
    assert len(data.val_dataset) == 0 and len(data.train_dataset) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": []}, "`sources` names the data sets to mix, but is empty"),
        ({"weights": [1.0]}, r"one positive number for each of the 2 sources, but is \[1.0\]"),
        ({"weights": [1.0, 0.0]}, "one positive number for each of the 2 sources"),
        ({"weights": [1.0, float("inf")]}, "one positive number for each of the 2 sources"),
        ({"weights": [1.0, float("nan")]}, "one positive number for each of the 2 sources"),
        ({"n_samples": 5}, "`n_samples` 5 is how many samples `weights` share out"),
        ({"weights": [1.0, 1.0], "n_samples": 0}, "`n_samples` is a positive number, but is 0"),
    ],
)
def test_shares_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Mix(**{"sources": [Dolly(), Alpaca2k()]} | options)


def test_a_data_set_without_answers_is_refused(tmp_path, tokenizer):
    (tmp_path / "texts").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "texts" / name).write_text("Some text. " * 50)
    with pytest.raises(UserError, match="TextFiles has no instructions with answers, so it cannot be a part of a Mix"):
        ready(Mix([TextFiles(tmp_path / "texts"), source(tmp_path, "a", 2)]), tokenizer, 16)


# From the command line to a run


SOURCES = [{"class_path": "JSON", "init_args": {"json_path": "a.json", "prompt_style": "phi-2"}}, {"class_path": "litgpt.data.Dolly"}]


def parsed(*words: str) -> Mix:
    parser = make_parser(lora.setup, "finetune")
    return parser.instantiate(parser.parse_args(rewritten(Options(parser, "finetune"), ["m", *words], {}))).data


def test_sources_are_given_by_flags_and_by_recipes_and_written_down_again(tmp_path):
    (file := tmp_path / "mix.yaml").write_text(
        yaml.safe_dump({"data": {"class_path": "litgpt.data.Mix", "init_args": {"sources": SOURCES, "weights": [0.7, 0.3]}}})
    )
    by_flags = parsed("--data", "Mix", "--data.sources", json.dumps(SOURCES), "--data.weights", "[0.7, 0.3]")
    by_recipe = parsed("--config", str(file))
    (again := tmp_path / "hyperparameters.yaml").write_text(yaml.safe_dump(to_plain({"data": by_recipe})))
    for data in (by_flags, by_recipe, parsed("--config", str(again))):
        first, second = data.sources
        assert type(data) is Mix and type(first) is JSON and type(second) is Dolly and data.weights == [0.7, 0.3]
        assert (first.json_path, first.prompt_style) == (Path("a.json"), "phi-2")


def test_a_file_is_no_source_and_what_is_is_listed():
    with pytest.raises(UserError) as caught:
        run(lora.setup, "finetune", ["m", "--data", "Mix", "--data.sources", '["/a.json"]'])
    assert "`--data.sources` must be one of Alpaca, " in str(caught.value)
    assert str(caught.value).endswith("but got '/a.json'. Did you mean 'JSON'?")


def test_names_alone_may_be_sources():
    assert [type(source) for source in parsed("--data", "Mix", "--data.sources", '["Dolly", "Alpaca2k"]').sources] == [Dolly, Alpaca2k]


def test_finetuning_takes_a_mix(tmp_path, tokenizer):
    data = Mix([source(tmp_path, "a", 6, ignore_index=-1), source(tmp_path, "b", 3)], weights=[1, 1], ignore_index=-1)
    fabric = Fabric(accelerator="cpu", devices=1)
    data.ignore_index = -100  # as the loop does
    data.connect(tokenizer, 1, 300)
    samples, val_samples = prepared(fabric, data)
    shown = loop.samples_to_show(samples, val_samples, EvalArgs(max_new_tokens=5, evaluate_example=3))
    assert shown is val_samples and shown.example(3)[1] == "b-1v"
    assert digest(samples) == digest(samples) and all((samples[i]["labels"] != -1).all() for i in range(len(samples)))
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == batch["labels"].shape and len(batch["labels"]) == 1
