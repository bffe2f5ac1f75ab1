"""What the model remembers of a conversation changes how much it computes, never what it says."""

import json
from pathlib import Path

import pytest
import torch
from speaking import make_tokenizer
from tiny import tiny_config

from litgpt.chat import conversation as talking
from litgpt.chat.conversation import Conversation, read_conversation
from litgpt.config import Config
from litgpt.errors import UserError
from litgpt.generate.run import Speaker
from litgpt.generate.sampling import RowState
from litgpt.model import GPT
from litgpt.prompts import find_prompt_style
from litgpt.tokenizer import Tokenizer

FAMILIES = ["llama", "gemma3_text", "qwen3_next", "deepseek_v3"]  # whole rows, windows, a state that cannot be rewound, latents
PROMPTS = ["What food do llamas eat?", "你好", "Once upon a time there was a llama.", "Why?"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return folder, make_tokenizer(folder)


@pytest.fixture(scope="module", params=FAMILIES)
def speaker(request, tokenizer):
    return make_speaker(request.param, *tokenizer)


@pytest.fixture(scope="module")
def llama(tokenizer):
    return make_speaker("llama", *tokenizer)


def make_speaker(family: str, folder: Path, vocab_size: int, context: int = 1024, **changes) -> Speaker:
    torch.manual_seed(3)
    config: Config = tiny_config(family, vocab_size=vocab_size, padded_vocab_size=vocab_size, block_size=context, **changes)
    model = GPT(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "conv" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    tokenizer = Tokenizer(folder)
    return Speaker(folder, model, tokenizer, find_prompt_style(folder, tokenizer, config=config))


def talk(speaker, n=12, **sampling):
    return Conversation(speaker, RowState(**(dict(temperature=0.0) | sampling)), n)


def fresh_tokens(speaker, messages, n=12, **sampling):
    """The oracle: a conversation that remembers nothing yet is told all messages, the last of which it answers."""
    new = talk(speaker, n, **sampling)
    *new.messages, prompt = messages
    "".join(new.answer(prompt["content"]))
    assert new.turn.answer.n_reused == 0
    return new.turn.answer.made


class Fed:
    """Counts the tokens of each call of a model."""

    def __init__(self, model):
        self.calls = []
        self.handle = model.register_forward_pre_hook(lambda _, args: self.calls.append(args[0].numel()))

    def __enter__(self):
        return self.calls

    def __exit__(self, *_):
        self.handle.remove()


@pytest.fixture(params=[2048, 32], ids=["long rings", "short rings"])
def chunk(request, monkeypatch):
    """How much a window remembers beside itself: with little it cannot be rewound freely."""
    monkeypatch.setattr(talking, "CHUNK", request.param)
    return request.param


def test_every_turn_makes_the_tokens_of_a_fresh_conversation_and_feeds_only_what_is_new(speaker, chunk):
    chat = talk(speaker)
    has_windows, has_states = speaker.model.config.family == "gemma3_text", speaker.model.config.family == "qwen3_next"
    assert chat.batch.cache.rewinds_freely == (not has_states and (chunk > 32 or not has_windows))
    for prompt in PROMPTS:
        messages = [*chat.messages, {"role": "user", "content": prompt}]
        with Fed(speaker.model) as calls:
            "".join(chat.answer(prompt))
        answer = chat.turn.answer
        assert sum(calls) == len(answer.prompt) - answer.n_reused + len(answer.made) - 1
        assert answer.made == fresh_tokens(speaker, messages)


def test_an_answer_is_fed_again_only_from_where_its_text_is_spelt_otherwise(llama):
    chat = talk(llama)
    "".join(chat.answer("Hello"))
    made = chat.turn.answer
    "".join(chat.answer("And then?"))
    spelt = llama.encode(chat.messages[:-1])
    known = [*made.prompt, *made.made[:-1]]
    n_same = next((i for i, (a, b) in enumerate(zip(known, spelt, strict=False)) if a != b), len(known))
    assert chat.turn.answer.n_reused == n_same >= len(made.prompt)


@pytest.mark.parametrize("step", [1, 3, 6])
def test_a_turn_that_was_broken_off_does_not_change_the_next_one(speaker, chunk, step):
    chat = talk(speaker)
    "".join(chat.answer(PROMPTS[0]))
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == step:
            raise KeyboardInterrupt

    handle = speaker.model.transformer.h[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(chat.answer(PROMPTS[2]))
    handle.remove()
    for prompt in PROMPTS[1:3]:
        messages = [*chat.messages, {"role": "user", "content": prompt}]
        "".join(chat.answer(prompt))
        assert chat.turn.answer.made == fresh_tokens(speaker, messages)


def test_a_second_interrupt_while_the_first_is_tidied_up_does_not_change_the_next_turn(llama, monkeypatch):
    chat = talk(llama)
    answer = chat.answer(PROMPTS[0])
    next(answer)
    with monkeypatch.context() as patch:
        patch.setattr(chat.batch, "leave", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            answer.close()
    messages = [*chat.messages, {"role": "user", "content": "Go on"}]
    "".join(chat.answer("Go on"))
    assert chat.turn.answer.made == fresh_tokens(llama, messages)
    "".join(chat.answer("And on"))
    assert chat.turn.answer.n_reused > 0


def test_penalties_know_the_whole_conversation(llama):
    sampling = dict(repetition_penalty=1.7)
    chat = talk(llama, **sampling)
    for prompt in PROMPTS:
        messages = [*chat.messages, {"role": "user", "content": prompt}]
        "".join(chat.answer(prompt))
        assert chat.turn.answer.made == fresh_tokens(llama, messages, **sampling)


def test_a_memory_that_grows_still_knows_what_it_knew(llama, monkeypatch):
    monkeypatch.setattr(talking, "FIRST_LENGTH", 64)
    chat, n_grown = talk(llama), 0
    for prompt in PROMPTS * 3:
        before = chat.batch.cache.length
        messages = [*chat.messages, {"role": "user", "content": prompt}]
        n_known = chat.batch.cache.lengths[0]
        "".join(chat.answer(prompt))
        assert chat.turn.answer.made == fresh_tokens(llama, messages)
        if 0 < n_known and chat.batch.cache.length > before:
            n_grown += 1
            assert chat.turn.answer.n_reused > 0
    assert n_grown >= 2


def test_a_memory_that_grows_forgets_angles_that_followed_from_its_size(tokenizer, monkeypatch):
    monkeypatch.setattr(talking, "FIRST_LENGTH", 64)
    longrope = dict(short_factor=[1.0] * 4, long_factor=[9.0, 7.0, 5.0, 3.0], original_max_seq_len=64)
    speaker = make_speaker("llama", *tokenizer, rope_adjustments=longrope)
    chat = talk(speaker)
    for prompt in PROMPTS * 2:
        messages = [*chat.messages, {"role": "user", "content": prompt}]
        "".join(chat.answer(prompt))
        assert chat.turn.answer.made == fresh_tokens(speaker, messages)
    assert chat.batch.cache.length > 64 and chat.turn.answer.n_reused > 0


def test_an_answer_is_made_again_from_what_is_remembered(llama):
    chat = talk(llama, temperature=1.0, seed=5)
    "".join(chat.answer(PROMPTS[0]))
    first = chat.turn.answer.made
    assert chat.undo() == PROMPTS[0] and chat.messages == []
    with Fed(llama.model) as calls:
        "".join(chat.answer(PROMPTS[0]))
    assert calls[0] == 1
    assert chat.turn.answer.made != first


def test_there_may_be_nothing_to_undo(llama):
    assert talk(llama).undo() is None


def test_another_setting_does_not_begin_the_draws_anew_but_a_seed_does(llama):
    chat = talk(llama, temperature=1.0, seed=5)
    start = chat.row.generator.getstate()
    "".join(chat.answer(PROMPTS[0]))
    first, generator = chat.turn.answer.made, chat.row.generator
    chat.set_sampling("top_k", 7)
    assert chat.row.generator is generator and chat.row.generator.getstate() != start and chat.row.top_k == 7
    chat.set_sampling("top_k", None)
    chat.set_sampling("seed", 5)
    assert chat.row.generator.getstate() == start
    chat.undo()
    "".join(chat.answer(PROMPTS[0]))
    assert chat.turn.answer.made == first
    with pytest.raises(UserError, match="top_p"):
        chat.set_sampling("top_p", 2.0)
    assert chat.row.top_p == 1.0


def test_a_saved_conversation_goes_on_as_it_would_have(llama, tmp_path):
    chat, other = talk(llama), talk(llama)
    chat.sys_prompt = "Be brief. 你好"
    for prompt in PROMPTS[:2]:
        "".join(chat.answer(prompt))
    chat.save(tmp_path / "chat.json")
    "".join(other.answer("Something else"))
    other.load(tmp_path / "chat.json")
    assert (other.messages, other.sys_prompt) == (chat.messages, chat.sys_prompt)
    assert "".join(other.answer("Why?")) == "".join(chat.answer("Why?"))
    chat.sys_prompt = None
    chat.save(tmp_path / "chat.json")
    other.load(tmp_path / "chat.json")
    assert other.sys_prompt is None


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("3", "does not hold one conversation"),
        ("[]", "does not hold one conversation"),
        (json.dumps([{"messages": [USER, ASSISTANT]}] * 2), "does not hold one conversation"),
        (json.dumps({"messages": []}), "must be a list of messages"),
        (json.dumps({"instruction": "a", "output": "b"}), "must be a list of messages"),
        (json.dumps({"messages": [USER]}), "no message of the role `assistant`"),
        (json.dumps({"messages": [ASSISTANT, USER]}), "do not take turns"),
        (json.dumps({"messages": [USER, USER, ASSISTANT]}), "do not take turns"),
        (json.dumps({"messages": [USER, ASSISTANT, {"role": "system", "content": "c"}]}), "do not take turns"),
        (json.dumps({"messages": [USER, {"role": "assistant", "content": None}]}), "content"),
    ],
)
def test_a_file_that_holds_no_conversation_is_refused_in_one_sentence(content, message, tmp_path):
    file = tmp_path / "chat.json"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        read_conversation(file)


def test_one_record_is_a_conversation_with_or_without_a_list_around_it(tmp_path):
    file = tmp_path / "chat.json"
    for content in ({"messages": [USER, ASSISTANT]}, [{"messages": [USER, ASSISTANT]}]):
        file.write_text(json.dumps(content))
        assert read_conversation(file) == [USER, ASSISTANT]
    with pytest.raises(UserError, match="nowhere"):
        read_conversation(tmp_path / "nowhere.json")
