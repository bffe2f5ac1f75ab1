import io
import json
import re
import signal
import time

import pytest
import torch
from speaking import make_checkpoint

from litgpt.chat import base
from litgpt.chat import conversation as talking
from litgpt.chat.commands import COMMANDS, Chat, obey
from litgpt.chat.conversation import Conversation
from litgpt.cli import main as cli
from litgpt.errors import UserError
from litgpt.generate import memory
from litgpt.generate.decode import complete, stream_text
from litgpt.generate.run import load
from litgpt.generate.sampling import RowState


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("chat") / "tiny-llama", context=512)


@pytest.fixture(scope="module")
def speaker(folder):
    return load(folder, precision="32-true")


@pytest.fixture
def chat(folder, monkeypatch, capsys):
    """Run the command on lines of input; return what it printed."""

    def run(text, *flags):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert cli(["chat", str(folder), "--precision", "32-true", "--max_new_tokens", "8", "--temperature", "0", *flags]) == 0
        return capsys.readouterr()

    return run


def conversation(speaker, max_new_tokens=8):
    return Conversation(speaker, RowState(temperature=0.0), max_new_tokens)


def fed(speaker, monkeypatch):
    """Count the tokens of each call of the model."""
    calls = []
    handle = speaker.model.register_forward_pre_hook(lambda _, args: calls.append(args[0].numel()))
    return calls, handle


def fresh_answer(speaker, messages, n=8):
    """The oracle: no memory, the whole conversation as one prompt."""
    steps = complete(speaker.model, speaker.encode(messages), RowState(temperature=0.0), n, speaker.stop_tokens)
    return "".join(stream_text(speaker.tokenizer, steps))


def replies(out):
    return re.findall(r">> Reply: (.*?)\n(?=>> Prompt|$)", out, re.DOTALL)


def test_every_turn_is_answered_as_if_the_whole_conversation_were_one_prompt(speaker):
    talk, messages = conversation(speaker), []
    for prompt in ("Hello", "What food do llamas eat?", "你好 🙂", "Once more"):
        messages.append({"role": "user", "content": prompt})
        expected = fresh_answer(speaker, messages)
        assert "".join(talk.answer(prompt)) == expected
        messages.append({"role": "assistant", "content": expected})
    assert talk.messages == messages


def test_a_turn_feeds_only_what_the_memory_does_not_know(speaker, monkeypatch):
    talk = conversation(speaker)
    "".join(talk.answer("Tell me a long story about a llama that ate grass and hay."))
    n_before = talk.batch.cache.lengths[0]
    calls, handle = fed(speaker, monkeypatch)
    "".join(talk.answer("And then?"))
    handle.remove()
    whole = len(speaker.encode(talk.messages[:-1]))
    assert calls[0] < whole - n_before + 12  # the new turn, and what the answer's text is spelt anew by
    assert calls[0] == whole - talk.turn.answer.n_reused
    assert calls[1:] == [1] * (len(talk.turn.answer.made) - 1)


def test_the_command_chats_until_an_empty_line(chat, speaker, folder):
    first = fresh_answer(speaker, "Hello")
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": first}, {"role": "user", "content": "Again"}]
    out, err = chat("Hello\nAgain\n\nnever read\n")
    assert f"Now chatting with {folder.name}." in out
    assert replies(out) == [first, fresh_answer(speaker, messages)]
    assert len(re.findall(r"Time for inference: .* tokens/sec, \d+ tokens", err)) == 2


@pytest.mark.parametrize("end", ["", "!quit\n", "!exit\n", "/exit\n", "\n"], ids=["end of input", "!quit", "!exit", "/exit", "empty"])
def test_a_chat_ends_quietly(chat, end):
    out, err = chat("Hello\n" + end)
    assert len(replies(out)) == 1
    assert "Error" not in err


def test_ctrl_c_at_the_prompt_ends_the_chat(speaker, monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    base.interact(conversation(speaker))
    assert capsys.readouterr().out == "\n"


@pytest.mark.parametrize("call", [1, 2, 4])
def test_ctrl_c_stops_only_the_answer_and_what_was_said_is_remembered(speaker, monkeypatch, capsys, call):
    talk, calls = conversation(speaker), []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt

    handle = speaker.model.transformer.h[1].register_forward_hook(interrupt)
    base.process_prompt("Hello", talk)
    handle.remove()
    [said] = re.findall(r">> Reply: (.*)\n", capsys.readouterr().out, re.DOTALL)
    assert fresh_answer(speaker, "Hello").startswith(said)
    history = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": said}] if said else []
    assert talk.messages == history
    expected = fresh_answer(speaker, [*history, {"role": "user", "content": "Go on"}])
    assert "".join(talk.answer("Go on")) == expected


def test_many_ctrl_c_stop_one_answer_and_a_later_one_ends_the_chat(speaker, monkeypatch, capsys):
    began = time.perf_counter()
    talk, typed = conversation(speaker, 50), iter(["Hello", "late", "Again", "later", "never read"])

    def type_line(_):
        line = next(typed)
        if line == "late":  # just behind the answer that was stopped, however slow the machine
            assert talk.stopped_at > began
            talk.stopped_at = time.perf_counter()
            raise KeyboardInterrupt
        if line == "later":
            talk.stopped_at -= base.GRACE
            raise KeyboardInterrupt
        return line

    def hammer(*_):
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("builtins.input", type_line)
    handle = speaker.model.transformer.h[0].register_forward_hook(hammer)
    before = signal.getsignal(signal.SIGINT)
    base.interact(talk)
    handle.remove()
    assert signal.getsignal(signal.SIGINT) is before
    assert next(typed) == "never read"
    assert capsys.readouterr().out == ">> Reply: \n\n>> Reply: \n\n"


def test_clear_forgets_the_conversation(chat, speaker):
    out, _ = chat("Hello\n/clear\nHello\n")
    assert replies(out.replace("The conversation starts anew.\n", "")) == [fresh_answer(speaker, "Hello")] * 2


def test_system_sets_the_system_prompt_from_then_on(chat, speaker):
    out, _ = chat("/system Answer in rhymes.\nHello\n/system\n/clear\nHello\n")
    system = [{"role": "system", "content": "Answer in rhymes."}, {"role": "user", "content": "Hello"}]
    answers = re.findall(r">> Reply: (.*?)\n>> Prompt", out, re.DOTALL)
    assert answers == [fresh_answer(speaker, system), fresh_answer(speaker, "Hello")]


def test_save_writes_messages_that_finetuning_can_read(chat, speaker, tmp_path):
    file = tmp_path / "chat.json"
    typed = f"/system Be brief.\nHello\n/save {file}\n/save\n/save {tmp_path}/no/such/folder.json\n/save ~no-such-user/x\n"
    out, _ = chat(f"{typed}/clear\n/save {file}\n")
    [record] = json.loads(file.read_text(encoding="utf-8"))
    assert [message["role"] for message in record["messages"]] == ["system", "user", "assistant"]
    assert "Saved 2 messages" in out
    assert "could not be written: No such file" in out
    assert "~no-such-user/x could not be written" in out and ".." not in out
    assert "Nothing was said yet" in out


def test_load_goes_on_from_what_was_saved(chat, speaker, tmp_path):
    file = tmp_path / "chat.json"
    out, _ = chat(f"Hello\n/save {file}\n/clear\n/load {file}\nAgain\n/load\n/load {tmp_path}/nowhere.json\n/load {tmp_path}\n")
    first = fresh_answer(speaker, "Hello")
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": first}, {"role": "user", "content": "Again"}]
    assert f">> Reply: {fresh_answer(speaker, messages)}\n>> Prompt: Say which file" in out
    assert "goes on from the 2 messages" in out
    assert out.count("nowhere.json") == 1 and "Traceback" not in out


def test_undo_forgets_the_newest_turn(chat, speaker):
    out, _ = chat("Hello\nSomething else\n/undo\nAgain\n/undo\n/undo\n/undo\n")
    first = fresh_answer(speaker, "Hello")
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": first}, {"role": "user", "content": "Again"}]
    assert f">> Reply: {fresh_answer(speaker, messages)}\n>> Prompt: The newest turn is forgotten.\n" in out
    assert out.endswith("There is no turn to forget.\n>> Prompt: \n")


def test_regenerate_answers_the_newest_prompt_again(chat, speaker):
    out, _ = chat("/regenerate\nHello\n/regenerate\n")
    assert out.count("There is no answer yet") == 1
    assert replies(out.replace("There is no answer yet to make again.\n", "")) == [fresh_answer(speaker, "Hello")] * 2
    out, _ = chat("Hello\n/regenerate\n", "--temperature", "5", "--top_k", "null")
    first, second = replies(out)
    assert first != second


def test_a_second_try_that_says_nothing_leaves_the_first_answer(speaker, monkeypatch):
    talk = conversation(speaker)
    "".join(talk.answer("Hello"))
    before = list(talk.messages)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = speaker.model.register_forward_pre_hook(interrupt)
    assert obey(Chat(talk), "/regenerate")
    handle.remove()
    assert talk.messages == before


def test_set_shows_and_changes_settings(chat):
    out, err = chat("/set max_new_tokens 3\nHello\n/set top_k null\n/set min_p=0.5\n/set\n")
    assert ", 3 tokens" in err
    shown = dict(line.split() for line in out.rpartition(">> Prompt: temperature")[2].splitlines()[1:-1])
    assert shown == {
        "top_k": "null",
        "top_p": "1.0",
        "min_p": "0.5",
        "repetition_penalty": "1.0",
        "presence_penalty": "0.0",
        "frequency_penalty": "0.0",
        "seed": "1234",
        "max_new_tokens": "3",
    }


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("/set temprature 1", "no setting 'temprature'. Did you mean 'temperature'?"),
        ("/set temperature hot", "`temperature` is a number, but got 'hot'"),
        ("/set temperature -1", "`temperature` must be 0 or more"),
        ("/set temperature nan", "`temperature` must be 0 or more"),
        ("/set temperature null", "`temperature` is a number, but got 'null'"),
        ("/set top_k 1.5", "`top_k` is a whole number, but got '1.5'"),
        ("/set max_new_tokens 0", "`max_new_tokens` must be at least 1"),
        ("/set seed null", "`seed` is a whole number"),
    ],
)
def test_a_setting_that_cannot_be_is_one_sentence_and_the_chat_goes_on(chat, speaker, typed, message):
    out, _ = chat(f"{typed}\nHello\n")
    assert message in out
    assert f">> Reply: {fresh_answer(speaker, 'Hello')}\n" in out


def test_stats_say_what_was_remembered(chat, speaker):
    out, _ = chat("/stats\nHello\nAgain\n/stats\n")
    assert out.startswith("turns               0\n", out.index("turns"))
    assert re.search(r"turns +2\ncontext +\d+ of 512 tokens\nnewest prompt +\d+ tokens, of which [1-9]\d* were remembered\n", out)


def test_lines_that_end_in_a_backslash_and_quotes_make_one_prompt(chat, speaker):
    expected = fresh_answer(speaker, "First line\n\nthird line")
    assert replies(chat("First line\\\n\\\nthird line\n")[0]) == [expected]
    assert replies(chat('"""First line\n\nthird line"""\n')[0]) == [expected]
    assert replies(chat('"""\nFirst line\n\nthird line\n"""\n')[0]) == [expected]
    assert replies(chat('"""Hello"""\n')[0]) == [fresh_answer(speaker, "Hello")]
    assert replies(chat("Hello\\")[0]) == [fresh_answer(speaker, "Hello")]  # the end of input ends the prompt
    assert replies(chat('"""Hello')[0]) == [fresh_answer(speaker, "Hello")]


def test_help_lists_commands_and_an_unknown_command_names_the_nearest(chat):
    out, _ = chat("/help\n/cleer\n/etc/passwd is a file\n")
    assert all(name in out for name in COMMANDS)
    assert "There is no command /cleer. Did you mean '/clear'?" in out
    assert len(replies(out)) == 1  # a path is no command


def test_multiline_prompts_end_with_submit(chat, speaker):
    out, _ = chat("First line\n\nthird line\n!submit\n/help\nleft over", "--multiline", "true")
    expected = fresh_answer(speaker, "First line\n\nthird line")
    assert f">> Reply: {expected}\n>> Prompt: /clear" in out
    assert out.count(">> Reply:") == 2  # the end of input sends what was typed
    out, _ = chat("First line\n!quit\n", "--multiline", "true")
    assert ">> Reply" not in out


def test_submit_is_explained_where_every_line_is_sent(chat, speaker):
    out, _ = chat("!submit\nHello\n !SUBMIT \n")
    assert out.count("Without `--multiline true` every line is sent at once") == 2
    assert re.findall(r">> Reply: (.*?)\n>> Prompt", out, re.DOTALL) == [fresh_answer(speaker, "Hello")]


def test_a_full_context_forgets_the_oldest_turns_with_a_note(tmp_path, capsys):
    speaker = load(make_checkpoint(tmp_path / "short", context=96), precision="32-true")
    talk = conversation(speaker, max_new_tokens=20)
    for i in range(8):
        assert "".join(talk.answer(f"This is question {i}: what is it?")) is not None
        assert len(talk.turn.answer.prompt) + talk.turn.n_tokens <= 96
    assert "forgets the oldest 1 turn" in capsys.readouterr().err
    assert talk.messages[0]["content"] != "This is question 0: what is it?"
    messages = talk.messages[:-1]
    assert talk.messages[-1]["content"] == fresh_answer(speaker, messages, 20)


def test_a_prompt_longer_than_the_context_is_said_and_the_chat_goes_on(chat, speaker):
    out, err = chat("llama " * 900 + "\nHello\n")
    assert "context is 512 tokens" in err
    assert replies(out)[-1] == fresh_answer(speaker, "Hello")


def test_the_memory_grows_with_the_conversation(speaker, monkeypatch):
    monkeypatch.setattr(talking, "FIRST_LENGTH", 32)
    talk, messages = conversation(speaker), []
    for i in range(5):
        messages.append({"role": "user", "content": f"Question {i}"})
        messages.append({"role": "assistant", "content": "".join(talk.answer(f"Question {i}"))})
        assert messages[-1]["content"] == fresh_answer(speaker, messages[:-1])
    assert 32 < talk.batch.cache.length <= 512


def test_a_cut_answer_says_so(chat):
    _, err = chat("Hello\n", "--max_new_tokens", "2")
    assert "--max_new_tokens allows for longer ones" in err
    _, err = chat("llama " * 245 + "\n", "--max_new_tokens", "9999")
    assert "where the model's context of 512 tokens is full" in err and "--max_new_tokens" not in err


# Streams


@pytest.fixture
def terminal(folder, monkeypatch, capsys):
    """Chat in a terminal of some encoding; return the bytes that it got, and what went to standard error."""

    def run(typed, encoding, errors="strict"):
        shown = io.BytesIO()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed), encoding=encoding, errors=errors))
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(shown, encoding=encoding, errors=errors))
        assert cli(["chat", str(folder), "--precision", "32-true", "--max_new_tokens", "8", "--temperature", "0"]) == 0
        return shown.getvalue(), capsys.readouterr().err

    return run


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # PYTHONIOENCODING=ascii and LC_ALL=C
def test_an_ascii_terminal_shows_question_marks_and_may_send_utf_8(terminal, speaker, errors):
    expected = fresh_answer(speaker, "Grüße 🙂")
    assert not expected.isascii()
    shown, _ = terminal("Grüße 🙂\n".encode(), "ascii", errors)
    assert replies(shown.decode("ascii"))[0] == expected.encode("ascii", "replace").decode()


def test_bytes_that_are_no_text_are_refused_and_the_chat_goes_on(terminal, speaker, tmp_path):
    file = tmp_path / "chat.json"
    typed = b"caf\xe9\nHello\n/system caf\xe9\n/save %s\n/system\n/save %s\n" % (bytes(file), bytes(file))
    shown, err = terminal(typed, "utf-8")
    assert "UTF-8" in err and "Traceback" not in err
    assert fresh_answer(speaker, "Hello") in shown.decode()
    assert b"could not be written" in shown and len(json.loads(file.read_text())[0]["messages"]) == 2


def test_closed_streams_end_the_chat(folder, monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(f"sys.{name}", None)
    assert cli(["chat", str(folder), "--precision", "32-true"]) == 0
    assert cli(["chat", str(folder), "--top_k", "0"]) == 2


def test_a_memory_that_cannot_fit_is_said_and_the_chat_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "device_memory_gb", lambda device: 1.0)
    speaker = load(make_checkpoint(tmp_path / "vast", context=2**30), precision="32-true")
    talk = conversation(speaker, max_new_tokens=10**9)
    base.process_prompt("Hello", talk)
    assert "Lower `max_new_tokens`" in capsys.readouterr().err
    talk.max_new_tokens = 8
    assert "".join(talk.answer("Hello")) == fresh_answer(speaker, "Hello")


@pytest.mark.parametrize(("flag", "value"), [("--top_p", "7"), ("--max_new_tokens", "0"), ("--top_k", "0"), ("--quantize", "bnb.nf3")])
def test_bad_flags_are_refused_before_the_model_is_loaded(flag, value, tmp_path, capsys):
    assert cli(["chat", str(tmp_path / "nowhere"), flag, value]) == 2
    assert re.search(rf"`(--)?{flag[2:]}`", capsys.readouterr().err.splitlines()[-1])


def test_generate_yields_tokens_without_prompt_and_stop(speaker):
    prompt = torch.tensor([5, 6, 7])
    tokens = list(base.generate(speaker.model, prompt, 12, temperature=0.0))
    assert len(tokens) == 9
    stop = [[tokens[4].item()]]
    ended = list(base.generate(speaker.model, prompt, 12, temperature=0.0, stop_tokens=stop))
    assert ended == tokens[: tokens.index(tokens[4])]


def test_an_answer_needs_room(speaker):
    with pytest.raises(UserError, match="context"):
        list(conversation(speaker).answer("llama " * 900))
