import copy
import inspect
import json
import shutil
from dataclasses import fields
from itertools import groupby

import pytest
import torch
from templates import PUBLISHED, tokenizer_with

from litgpt.args import to_plain
from litgpt.config import Config
from litgpt.data import JSON, DataModule, SFTDataset, get_sft_collate_fn
from litgpt.data.base import NO_TARGET, SFTModule, highest_id, split
from litgpt.data.records import Record, messages_of
from litgpt.errors import UserError
from litgpt.prompts import ChatTemplate, PromptStyle, encode_prompt, find_prompt_style, prompt_styles
from litgpt.tokenizer import Tokenizer, named_tokens

TEMPLATES = {
    name: PUBLISHED[name]
    for name in ("qwen2_5", "qwen3", "llama3", "llama3_1", "gemma", "gemma3", "phi3", "lfm2", "deepseekv3", "qwen3_training", "smolvlm")
    if name in PUBLISHED
}
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


@pytest.mark.parametrize("style", ["qwen2.5", "phi-2", "forgetful"])
def test_the_last_answer_alone_is_trained_on_where_that_is_asked_for(tokenizer, style):
    """Also where a template keeps no earlier answer as it was, so that each one is a sample of its own."""
    forgetful = "{% for m in messages %}{{ m.role }}:{{ m.content if loop.last or m.role == 'user' else '-' }}</s>{% endfor %}"
    end = "{% if add_generation_prompt %}assistant:{% endif %}"
    style = ChatTemplate(forgetful + end) if style == "forgetful" else style
    every = SFTDataset([TWO_TURNS], tokenizer, style)
    last = SFTDataset([TWO_TURNS], tokenizer, style, train_on="last")
    [sample] = last
    assert torch.equal(sample["input_ids"], every[len(every) - 1]["input_ids"])
    assert answers(tokenizer, sample).strip() == "No." and last.n_targets == [int((sample["labels"] != -100).sum())]


def test_an_examples_prompt_ends_with_what_was_asked(tokenizer):
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    asked, *said = ({"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "One."), ("assistant", "Two.")))
    assert SFTDataset([{"messages": [asked, *said]}], tokenizer, ChatTemplate(template)).example(0) == ([asked], "One.")


def test_train_on_and_mask_prompt_say_the_same(tokenizer):
    def labels(**options):
        return [sample["labels"].tolist() for sample in SFTDataset([*RECORDS, TWO_TURNS], tokenizer, "alpaca", **options)]

    assert labels() == labels(mask_prompt=True) == labels(train_on="assistant") != labels(train_on="last")
    assert labels(mask_prompt=False) == labels(train_on="all") != labels()
    for train_on, mask_prompt, trained in (
        (None, None, "assistant"),
        (None, False, "all"),
        (None, True, "assistant"),
        ("last", True, "last"),
        ("all", None, "all"),
        ("all", False, "all"),
    ):
        data = Records(prompt_style="alpaca", train_on=train_on, mask_prompt=mask_prompt)
        data.connect(tokenizer)
        data.setup()
        assert (data.train_dataset.train_on, data.mask_prompt) == (trained, mask_prompt)
    for train_on, mask_prompt in (("all", True), ("assistant", False), ("last", False)):
        with pytest.raises(UserError, match=f"`mask_prompt` is {str(mask_prompt).lower()}, but `train_on` is '{train_on}'"):
            Records(train_on=train_on, mask_prompt=mask_prompt)
    for options, message in (
        ({"train_on": "asistant"}, "`train_on` must be one of 'assistant', 'last', 'all', but is 'asistant'. Did you mean 'assistant'"),
        ({"truncation": "rigth"}, "`truncation` must be one of 'drop', 'left', 'right', 'error', but is 'rigth'. Did you mean 'right'"),
    ):
        with pytest.raises(UserError, match=message):
            Records(**options)
        with pytest.raises(UserError, match=message):
            SFTDataset(RECORDS, tokenizer, "alpaca", **options)
    with pytest.raises(UserError, match="`mask_prompt` is false"):
        SFTDataset(RECORDS, tokenizer, "alpaca", mask_prompt=False, train_on="last")


def stopped(tokenizer, style, sample):
    """Where answers are trained on, each up to a token that ends a generation: their ids."""
    runs = [list(run) for trained, run in groupby(zip(*map(torch.Tensor.tolist, sample.values())), lambda pair: pair[1] != -100) if trained]
    stops = style.stop_tokens(tokenizer)
    for run in runs:
        ids = [i for i, _ in run]
        assert any(ids[at : at + len(stop)] == stop for stop in stops for at in range(1, len(ids))), tokenizer.decode(ids)
    return len(runs)


@pytest.fixture(scope="module")
def with_markup(tmp_path_factory):
    """A tokenizer that knows the tokens which end answers of styles and of templates."""
    ends = (style.end for style in prompt_styles.values() if style.end)
    return Tokenizer(tokenizer_with(tmp_path_factory.mktemp("markup"), TEMPLATES.values(), ends))


@pytest.mark.parametrize("name", prompt_styles)
def test_every_style_learns_the_token_that_ends_an_answer(tokenizer, with_markup, name):
    for known in (tokenizer, with_markup):  # the first has none of the style's own tokens
        dataset = SFTDataset([TWO_TURNS], known, name)
        assert stopped(known, dataset.prompt_style, dataset[0]) == 2


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_learns_the_token_that_ends_an_answer(with_markup, name):
    style = ChatTemplate(TEMPLATES[name], named_tokens(with_markup.checkpoint_dir))
    dataset = SFTDataset([TWO_TURNS], with_markup, style)
    assert sum(stopped(with_markup, style, sample) for sample in dataset) == 2
    assert all(text in with_markup.decode(dataset[-1]["input_ids"]) for text in ("One?", "Yes.", "Two?", "No."))


def test_an_answer_ends_with_eos_where_a_template_writes_nothing_behind_it(tokenizer):
    style = ChatTemplate(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    [sample] = SFTDataset(RECORDS[:1], tokenizer, style)
    assert sample["input_ids"][-1] == sample["labels"][-1] == tokenizer.eos_id
    assert answers(tokenizer, sample) == "5"


def test_a_token_that_ends_answers_is_learnt_even_if_a_template_does_not_mark_it(tokenizer):
    style = ChatTemplate("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}</s>\n{% endfor %}")
    [sample] = SFTDataset([TWO_TURNS], tokenizer, style)
    assert stopped(tokenizer, style, sample) == 2
    assert tokenizer.decode(sample["input_ids"][sample["labels"] == -100]) == "One?\n\nTwo?\n\n"


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
    assert len(dataset) == 2 and dataset.dropped[NO_TARGET] == [2] and dataset.cut == [1], "each is told of once"
    assert torch.equal(dataset[1]["input_ids"], whole[1]["input_ids"][:40])
    assert torch.equal(dataset[1]["labels"], whole[1]["labels"][:40])
    assert len(caplog.records) == 2 and "1 of 3 samples had nothing left" in caplog.text
    assert dataset.data[2] is records[2]


LONG = [{"instruction": "x" * n, "output": "y" * m} for n, m in ((1, 30), (30, 30), (1, 5), (30, 60))]


@pytest.mark.parametrize("truncation, lengths, n_cut, n_dropped", [("right", [32, 40, 7, 40], 2, 0), ("drop", [32, 7], 0, 2)])
def test_long_samples_are_handled_as_is_said(tokenizer, caplog, truncation, lengths, n_cut, n_dropped):
    whole = SFTDataset(LONG, tokenizer, "default")
    assert whole.lengths == [32, 61, 7, 91] and whole.n_targets == [31, 31, 6, 61] and whole.n_lost == 0
    dataset = SFTDataset(LONG, tokenizer, "default", max_seq_length=40, truncation=truncation)
    assert (dataset.lengths, dataset.n_cut, dataset.n_dropped) == (lengths, n_cut, n_dropped)
    assert dataset.n_targets == [int((sample["labels"][1:] != -100).sum()) for sample in dataset]
    assert dataset.n_lost == sum(whole.lengths) - sum(lengths)
    share = 100 * dataset.n_lost / sum(whole.lengths)
    [said] = [record.message for record in caplog.records]
    assert said.startswith("2 of 4 samples are longer than 40 tokens") and f"{share:.1f}% of all tokens" in said
    assert said.endswith(": Sample 1, Sample 3")


@pytest.mark.parametrize("with_begin", [True, False])
def test_what_loses_its_beginning_keeps_bos_and_the_end(tokenizer, with_begin):
    tokenizer.use_bos = with_begin
    whole = SFTDataset(LONG, tokenizer, "default")
    dataset = SFTDataset(LONG, tokenizer, "default", max_seq_length=40, truncation="left")
    assert dataset.n_cut == 2 and dataset.n_dropped == 0 and dataset.lengths[1] == dataset.lengths[3] == 40
    for sample, before in zip(dataset, whole):
        ids = before["input_ids"].tolist()
        expected = ids if len(ids) <= 40 else [tokenizer.bos_id, *ids[-39:]] if with_begin else ids[-40:]
        assert sample["input_ids"].tolist() == expected and sample["input_ids"][-1] == tokenizer.eos_id
        assert torch.equal(sample["labels"][-39:], before["labels"][-39:])


def test_a_sample_that_is_too_long_can_be_an_error_that_names_it(tokenizer):
    record = Record(LONG[1])
    record.place = "mine.json, record 7"
    with pytest.raises(UserError, match="^mine.json, record 7 is 61 tokens long, but `max_seq_length` is 40. Raise it"):
        SFTDataset([LONG[0], record], tokenizer, "default", max_seq_length=40, truncation="error")
    assert len(SFTDataset([LONG[0], record], tokenizer, "default", max_seq_length=61, truncation="error")) == 2


def test_samples_without_a_target_are_counted_and_named(tokenizer, caplog, monkeypatch):
    monkeypatch.setattr(tokenizer, "eos_id", None)  # an empty answer has nothing to learn, then
    records = [Record(instruction="x", output=text) for text in ("y", "", "z", "", "", "", "")]
    for number, record in enumerate(records, start=1):
        record.place = f"mine.json, record {number}"
    dataset = SFTDataset(records, tokenizer, "default")
    assert len(dataset) == 2 and dataset.n_dropped == 5 and dataset.n_cut == 0
    [said] = [record.message for record in caplog.records]
    named = ", ".join(f"mine.json, record {number}" for number in (2, 4, 5))
    assert said == f"5 of 7 samples had nothing left to train on and are dropped: {named}, ..."


def test_empty_answers_are_named(tokenizer, caplog):
    conversation = [*TWO_TURNS["messages"][:-1], {"role": "assistant", "content": " "}]
    records = [dict(instruction="x", output=""), dict(instruction="x", output="y"), dict(messages=conversation)]
    records += [dict(messages=[*conversation, *TWO_TURNS["messages"][-2:]])]
    for train_on, named in (("assistant", "Sample 0, Sample 2, Sample 3"), ("last", "Sample 0, Sample 2")):
        caplog.clear()
        assert len(SFTDataset(records, tokenizer, "default", train_on=train_on)) == 4
        [said] = [record.message for record in caplog.records]
        assert said == f"{named.count('S')} of 4 samples have an empty answer, which teaches to say nothing: {named}"


def test_a_conversation_may_be_cut_to_answers_and_to_none(tokenizer):
    n = len(SFTDataset([TWO_TURNS], tokenizer, "default", train_on="last")[0]["input_ids"])
    for max_seq_length, n_left in ((n, 1), (n - 5, 0)):
        dataset = SFTDataset([TWO_TURNS], tokenizer, "default", max_seq_length, train_on="last")
        assert len(dataset) == n_left and dataset.n_dropped == 1 - n_left


def test_data_without_any_answer_within_the_length_is_refused(tokenizer):
    data = Records(prompt_style="alpaca")
    data.connect(tokenizer, max_seq_length=5)
    with pytest.raises(UserError, match="nothing to train on"):
        data.setup()


def test_data_without_any_sample_is_refused(tokenizer):
    class Nothing(SFTModule):
        def records(self):
            return [], RECORDS

    data = Nothing(prompt_style="alpaca")
    data.connect(tokenizer)
    with pytest.raises(UserError, match="^Nothing has no samples to train on"):
        data.setup()
    assert len(SFTDataset([], tokenizer, "alpaca")) == 0


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


def test_roles_may_begin_with_a_capital_letter():
    said = messages_of(
        {"messages": [{"role": "User", "content": "a"}, {"role": "Assistant", "content": "b"}, {"role": "Judge", "content": "c"}]}
    )
    assert [message["role"] for message in said] == ["user", "assistant", "Judge"]
    said = messages_of({"conversations": [{"from": "Human", "value": "a"}, {"from": "GPT", "value": "b"}]})
    assert [message["role"] for message in said] == ["user", "assistant"]


@pytest.mark.parametrize(
    "record, message",
    [
        ({"output": "x"}, "`instruction` is missing. It has the keys `output`"),
        ({"instruction": "x", "answer": "y"}, "`output` is missing. It has the keys `instruction`, `answer`"),
        ({"prompt": "x"}, "`completion` is missing. It has the keys `prompt`"),
        ({"question": "x", "answer": 4}, "`answer` must be text, but is 4"),
        ({"prompt": "x", "completion": "y", "response": "z"}, "not clear what is asked and answered: `prompt` with `completion` or"),
        ({"instruction": "x", "output": "y", "response": "z"}, "not clear what is asked and answered: `instruction` with `output` or"),
        ({"system": "a", "messages": [{"role": "system", "content": "b"}, {"role": "assistant", "content": "c"}]}, "beside its messages"),
        ({"question": "x", "answer": "y", "input": "a", "context": "b"}, "`input` and `context` are different texts"),
        ({"instruction": "x", "output": "y", "system": 3}, "`system` must be text, but is 3"),
        ({"instruction": "x", "outputs": "y"}, "Did you mean 'outputs'"),
        ({}, "It has no keys"),
        ({"instruction": 3, "output": "x"}, "`instruction` must be text, but is 3"),
        ({"instruction": "x", "output": None}, "`output` must be text, but is None"),
        ({"instruction": "x", "input": ["y"], "output": "z"}, "`input` must be text"),
        ("text", "a mapping with the keys"),
        ({"messages": []}, "`messages` must be a list"),
        ({"messages": "text"}, "`messages` must be a list"),
        ({"messages": None, "id": 3}, "`messages` must be a list"),
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


@pytest.mark.parametrize(
    "record, expected",
    [
        ({"instruction": "a", "response": "b", "context": "c"}, ("a", "c", "b")),
        ({"prompt": "a", "completion": "b"}, ("a", None, "b")),
        ({"prompt": "a", "response": "b", "completion": None}, ("a", None, "b")),
        ({"question": "a", "answer": "b", "id": 3}, ("a", None, "b")),
        ({"instruction": "a", "output": "b", "prompt": "c", "completion": "d", "context": ""}, ("a", None, "b")),
    ],
)
def test_questions_and_answers_have_many_names(record, expected):
    user, answer = messages_of(record)
    assert (user["content"], user.get("input"), answer["content"]) == expected
    asked = {"role": "system", "content": "s"}
    assert messages_of(record | {"system_prompt": "s"}) == messages_of(record | {"system": "s"}) == [asked, user, answer]


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


def test_the_options_that_a_run_wrote_down_can_be_overridden():
    saved = to_plain(Records())["init_args"]
    assert saved["ignore_index"] == -100 and Records(**saved | {"train_on": "all"}).train_on == "all"


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


def test_validation_samples_of_which_none_is_left_are_told_of(tokenizer, tmp_path, caplog):
    (tmp_path / "train.json").write_text(json.dumps([{"instruction": "a", "output": "b"}]))
    (tmp_path / "val.json").write_text(json.dumps([{"instruction": "x" * 200, "output": "y"}]))
    data = JSON(tmp_path, prompt_style="default")
    data.connect(tokenizer=tokenizer, batch_size=1, max_seq_length=20)
    data.prepare_data()
    data.setup()
    assert "No validation sample is left, so this run validates nothing." in caplog.text
