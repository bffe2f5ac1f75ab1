import copy
import inspect
import json
import shutil
from dataclasses import fields

import pytest
import torch

from litgpt.config import Config
from litgpt.data import DataModule, SFTDataset, get_sft_collate_fn
from litgpt.data.base import SFTModule, highest_id, messages_of, split
from litgpt.errors import UserError
from litgpt.prompts import PromptStyle, encode_prompt, find_prompt_style, prompt_styles
from litgpt.tokenizer import Tokenizer

RECORDS = [
    {"instruction": "Add 2 and 3.", "output": "5"},
    {"instruction": "Translate.", "input": "cat", "output": "chat"},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]},
]
TWO_TURNS = {
    "messages": [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "No."},
    ]
}


class Records(SFTModule):
    """A data set of two lists."""

    def records(self):
        return RECORDS[:2], RECORDS[2:]


def answers(tokenizer, sample):
    return tokenizer.decode(sample["input_ids"][sample["labels"] != -100])


@pytest.mark.parametrize("style", ["alpaca", "qwen2.5", "phi-2"])
def test_a_sample_is_the_served_prompt_and_the_answer(tokenizer, style):
    dataset = SFTDataset(RECORDS, tokenizer, style)
    for index, sample in enumerate(dataset):
        messages, answer = dataset.example(index)
        prompt = encode_prompt(dataset.prompt_style, tokenizer, messages)
        ids, labels = sample["input_ids"], sample["labels"]
        assert ids.dtype == labels.dtype == torch.int64
        assert ids[: len(prompt)].tolist() == prompt
        assert (labels[: len(prompt)] == -100).all()
        answered = tokenizer.decode(ids[len(prompt) :])
        assert answered.removeprefix(" ").startswith(answer)  # a style whose prompts end with a colon has a space there
        assert labels[len(prompt)] == ids[len(prompt)]
    assert len(dataset) == 3 and dataset.lengths == [len(sample["input_ids"]) for sample in dataset]


def test_the_input_reaches_the_prompt_of_every_style(tokenizer):
    for style in ("alpaca", "phi-2"):
        text = tokenizer.decode(SFTDataset(RECORDS, tokenizer, style)[1]["input_ids"])
        assert "Translate." in text and "cat" in text


def test_prompts_are_trained_on_where_they_are_not_masked(tokenizer):
    for sample in SFTDataset(RECORDS, tokenizer, "alpaca", mask_prompt=False):
        assert torch.equal(sample["input_ids"], sample["labels"])


def test_all_answers_of_a_conversation_are_trained_on(tokenizer):
    sample = SFTDataset([TWO_TURNS], tokenizer, "qwen2.5", ignore_index=-1)[0]
    trained = tokenizer.decode(sample["input_ids"][sample["labels"] != -1])
    assert "Yes." in trained and "No." in trained and "?" not in trained


def test_each_sample_is_encoded_once(tokenizer, monkeypatch):
    calls = []
    encode = tokenizer.offsets
    monkeypatch.setattr(tokenizer, "offsets", lambda text, *rest, **more: calls.append(text) or encode(text, *rest, **more))
    dataset = SFTDataset(RECORDS, tokenizer, "alpaca")
    after_setup = len(calls)
    for _ in range(3):
        list(dataset)
    assert len(calls) == after_setup


def test_long_samples_are_cut_and_those_without_an_answer_dropped(tokenizer, caplog):
    records = [{"instruction": "x" * n, "output": "y" * 30} for n in (1, 20, 200)]
    whole = SFTDataset(records, tokenizer, "default")
    assert whole.n_cut == whole.n_dropped == 0 and not caplog.records
    dataset = SFTDataset(records, tokenizer, "default", max_seq_length=40)
    assert len(dataset) == 2 and dataset.n_dropped == 1 and dataset.n_cut == 2
    assert torch.equal(dataset[1]["input_ids"], whole[1]["input_ids"][:40])
    assert torch.equal(dataset[1]["labels"], whole[1]["labels"][:40])
    assert len(caplog.records) == 2 and "1 of 3 samples had nothing left" in caplog.text
    assert dataset.data[2] is records[2]


def test_data_without_any_answer_within_the_length_is_refused(tokenizer):
    data = Records(prompt_style="alpaca")
    data.connect(tokenizer, max_seq_length=5)
    with pytest.raises(UserError, match="nothing to train on"):
        data.setup()


def test_a_transform_sees_a_copy(tokenizer):
    records = [{"inputs": "Say a.", "targets": "a"}]
    before = copy.deepcopy(records)

    def renamed(record):
        record["instruction"], record["output"] = record.pop("inputs"), record.pop("targets")
        return record

    dataset = SFTDataset(records, tokenizer, "alpaca", transform=renamed)
    assert answers(tokenizer, dataset[0]) == answers(tokenizer, dataset[0])
    assert records == before
    assert dataset.example(0) == ([{"role": "user", "content": "Say a."}], "a")


def test_a_style_of_ones_own_sees_instruction_and_input(tokenizer):
    class Mine(PromptStyle):
        def apply(self, prompt, *, sys_prompt=None, **kwargs):
            return f"{prompt}|{kwargs.get('input')}>"

    sample = SFTDataset(RECORDS[1:2], tokenizer, Mine())[0]
    assert tokenizer.decode(sample["input_ids"]).startswith("Translate.|cat>chat")


@pytest.mark.parametrize(
    "record, message",
    [
        ({"output": "x"}, "`instruction` is missing. It has the keys `output`"),
        ({"instruction": "x", "response": "y"}, "`output` is missing. It has the keys `instruction`, `response`"),
        ({"instruction": "x", "outputs": "y"}, "Did you mean 'outputs'"),
        ({}, "It has no keys"),
        ({"instruction": 3, "output": "x"}, "`instruction` must be text, but is 3"),
        ({"instruction": "x", "output": None}, "`output` must be text, but is None"),
        ({"instruction": "x", "input": ["y"], "output": "z"}, "`input` must be text"),
        ("text", "a mapping with the keys"),
        ({"messages": []}, "`messages` must be a list"),
        ({"messages": "text"}, "`messages` must be a list"),
        ({"messages": [{"role": "user"}]}, "`content` of message 1 in `messages` must be text, but is missing"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": 5}]}, "`content` of message 2"),
        ({"messages": ["x"]}, "`role` of message 1"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no message of the role `assistant`"),
        ({"conversations": [{"from": "human", "text": "x"}]}, "`value` of message 1 in `conversations`"),
    ],
)
def test_a_bad_record_is_described(tokenizer, record, message):
    with pytest.raises(UserError) as caught:
        messages_of(record)
    assert message in str(caught.value)
    with pytest.raises(UserError, match="Sample 1"):
        SFTDataset([RECORDS[0], record], tokenizer, "alpaca")


def test_turns_out_of_order_name_the_sample(tokenizer):
    messages = [{"role": "assistant", "content": "x"}, {"role": "assistant", "content": "y"}]
    with pytest.raises(UserError, match="Sample 0, {'messages'.*should be from 'user'"):
        SFTDataset([{"messages": messages}], tokenizer, "alpaca")


def test_other_keys_and_an_empty_input_do_not_matter():
    record = {"instruction": "x", "input": "", "output": "y", "prompt": "z", "id": 3}
    expected = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    assert messages_of(record) == messages_of(record | {"input": None}) == expected


def test_conversations_are_messages_by_another_name():
    record = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    assert messages_of(record) == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    "n, fraction, n_val", [(2, 0.05, 1), (2, 0.95, 1), (10, 0.1, 1), (100, 0.25, 25), (51760, 0.03865, 2001), (7, 0.5, 4)]
)
def test_a_split_leaves_nothing_out_and_follows_its_seed_alone(n, fraction, n_val):
    torch.manual_seed(1)
    train, val = split(range(n), fraction, seed=3)
    assert len(val) == n_val and sorted([*train, *val]) == list(range(n))
    assert train == sorted(train) and val == sorted(val)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert split(range(n), fraction, seed=3) == (train, val)
    assert torch.equal(torch.get_rng_state(), before)
    assert n < 50 or split(range(n), fraction, seed=4) != (train, val)


@pytest.mark.parametrize(
    "n, fraction, message", [(10, 1.0, "below 1"), (10, -1, "-1"), (1, 0.5, "only 1 sample.*to 0 to train without validation")]
)
def test_a_split_that_cannot_be_made_is_refused(n, fraction, message):
    with pytest.raises(UserError, match=message):
        split(range(n), fraction, seed=0)


@pytest.mark.parametrize("n", [1, 10])
def test_a_split_of_0_validates_on_nothing(n):
    assert split(range(n), 0, seed=0) == (list(range(n)), [])


def test_batches_are_padded_on_the_right():
    samples = [{"input_ids": torch.arange(1, n + 1), "labels": torch.arange(11, n + 11)} for n in (3, 1)]
    batch = get_sft_collate_fn(pad_id=9, ignore_index=-1)(samples)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [1, 9, 9]]
    assert batch["labels"].tolist() == [[11, 12, 13], [11, -1, -1]]
    assert get_sft_collate_fn(max_seq_length=2)(samples)["labels"].tolist() == [[11, 12], [11, -100]]


def test_loaders_follow_the_seed_and_leave_torchs_generator_alone(tokenizer):
    class Many(Records):
        def records(self):
            return [{"instruction": str(i), "output": str(i)} for i in range(30)], RECORDS

    def batches(seed):
        data = Many(prompt_style="alpaca", seed=seed)
        data.connect(tokenizer, batch_size=4, max_seq_length=None)
        data.setup()
        before = torch.get_rng_state()
        found = [batch["input_ids"].tolist() for batch in data.train_dataloader()], list(data.val_dataloader())
        assert torch.equal(torch.get_rng_state(), before)
        return found

    train, val = batches(1)
    torch.manual_seed(0)
    assert batches(1)[0] == train != batches(2)[0]
    assert len(train) == 8 and len(train[0]) == 4
    assert val[0]["labels"].shape == val[0]["input_ids"].shape and len(val[0]["labels"]) == 3


def test_the_style_is_found_through_the_tokenizers_folder(tokenizer):
    data = Records()
    data.connect(tokenizer)
    data.setup()
    assert type(data.train_dataset.prompt_style).__name__ == "Alpaca"
    tokenizer_style = Records(prompt_style="phi-2")
    tokenizer_style.connect(tokenizer)
    tokenizer_style.setup()
    assert type(tokenizer_style.train_dataset.prompt_style).__name__ == "Phi2"


def test_a_known_checkpoint_is_trained_with_the_style_it_is_used_with(tokenizer_dir, tmp_path):
    folder = tmp_path / "checkpoints" / "garage-bAInd" / "Platypus2-7B"
    shutil.copytree(tokenizer_dir, folder)
    make_llama_config(folder)
    data = Records()
    data.connect(Tokenizer(folder))
    data.setup()
    served = find_prompt_style(folder, Tokenizer(folder), config=Config.from_checkpoint(folder))
    assert type(data.train_dataset.prompt_style) is type(served) is prompt_styles["platypus"]


def test_a_tokenizer_of_a_model_that_we_cannot_run_is_no_obstacle(tokenizer_dir, tmp_path):
    shutil.copytree(tokenizer_dir, tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text('{"model_type": "unheard-of"}')
    data = Records()
    data.connect(Tokenizer(tmp_path / "other"))
    data.setup()
    assert type(data.train_dataset.prompt_style) is prompt_styles["alpaca"]


def make_llama_config(folder):
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=300, rms_norm_eps=1e-5)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **size}))


def test_what_finetuning_does_not_follow_is_said():
    docs = {field.name: inspect.getsource(SFTModule).partition(f"    {field.name}:")[2].split('"""')[1] for field in fields(SFTModule)}
    assert "Finetuning always takes -100" in docs["ignore_index"]
    assert "training scripts put batches together without them" in docs["num_workers"]


def test_prompts_are_masked_by_default():
    assert Records().mask_prompt is True and Records().ignore_index == -100


def test_a_module_without_tokenizer_or_samples_says_so(tokenizer):
    with pytest.raises(UserError, match="needs a tokenizer"):
        Records().setup()
    with pytest.raises(UserError, match="no samples yet"):
        Records().train_dataloader()
    with pytest.raises(NotImplementedError, match="records"):
        data = SFTModule()
        data.connect(tokenizer)
        data.setup()


def test_a_data_set_of_ones_own_only_needs_loaders():
    class Mine(DataModule):
        def connect(self, tokenizer=None, batch_size=1, max_seq_length=None):
            self.length = max_seq_length

        def train_dataloader(self):
            return [torch.zeros(1, self.length)]

        def val_dataloader(self):
            return []

    data = Mine()
    data.connect(max_seq_length=7)
    data.prepare_data()
    data.setup()
    assert data.train_dataloader()[0].shape == (1, 7) and data.val_dataloader() == [] and data.train_dataset is None


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 10**30])
def test_a_seed_of_more_than_64_bits_is_one_sentence(seed: int):
    with pytest.raises(UserError, match="at most 64 bits"):
        split([1, 2, 3], 0.5, seed)
    for fitting in (0, -1, 2**64 - 1, -(2**63)):
        assert sorted(sum(split([1, 2, 3], 0.5, fitting), [])) == [1, 2, 3]


def test_the_highest_id_counts_added_tokens_and_gaps(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    assert highest_id(tokenizer) == 257  # a byte each, <s> and </s>
    text = tokenizer.text
    monkeypatch.setattr(tokenizer, "text", lambda i: "<far>" if i in (258, 900, 1800) else text(i))
    assert highest_id(tokenizer) == 1800
