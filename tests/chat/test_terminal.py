"""The command in a real terminal (a pseudo-terminal, and a screen that obeys its escape sequences), and over a pipe."""

import json
import os
import pty
import re
import signal
import termios
import time

import pyte
import pytest
from chat.scripted import chat_in_process
from forked import fork
from pexpect import EOF
from pexpect.fdpexpect import fdspawn
from speaking import make_checkpoint

ASK = ">> Prompt: "
DONE = r"tokens/sec, \d+ tokens"
WORDS = " ".join(f"word{i}" for i in range(300))
MARKDOWN = """Some **bold text** and `code`.

# The title
- an item that is longer than the sixty columns that this terminal has
  - nested

```python
def f(*args): return 2 * 3 * 4
```

| animal | eats |
|---|--:|
| 你好 | **hay** |
| fox | mice |
"""
COMMANDS_THE_TERMINAL = "first \x1b[2J\x1b]0;title\x07\x9b31m\rlast \x1b[5;1Hend\b\b\b"
UNICODE = "Grüße, 你好世界, 🙂!"
SCRIPT = {"words": WORDS, "markdown": MARKDOWN, "hack": COMMANDS_THE_TERMINAL, "你好 🙂 é": UNICODE}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """What follows the name of the command whose answers are scripted."""
    folder = make_checkpoint(tmp_path_factory.mktemp("terminal") / "tiny-llama", context=4096)
    script = folder / "script.json"
    script.write_text(json.dumps(SCRIPT))
    return [str(script), str(folder), "--precision", "32-true", "--max_new_tokens", "1000"]


class Terminal:
    """A chat in a terminal, and what its screen shows."""

    def __init__(self, words, home, columns=60, lines=40, out=None, **environment):
        self.screen = pyte.Screen(columns, lines)
        self.stream = pyte.ByteStream(self.screen)
        self.received = b""
        inherited = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
        environment = {**inherited, "TERM": "xterm-256color", "HOME": str(home), **environment}
        ours, self.theirs = pty.openpty()
        termios.tcsetwinsize(ours, (lines, columns))
        self.home, name = home, os.ttyname(self.theirs)
        self.process = fork(chat_in_process, words, home, (name, str(out or name), name), environment)
        self.keys = fdspawn(ours, timeout=100)
        self.keys.logfile_read = self
        if out is None:
            self.expect(ASK)

    def write(self, data):
        self.received += data
        self.stream.feed(data)

    def flush(self):
        pass

    def expect(self, pattern):
        self.keys.expect(pattern)

    def type(self, keys, until=r"\.\. "):
        self.keys.send(keys)
        self.expect(until)

    def say(self, text, until=DONE):
        """Enter a line, and wait until it is answered."""
        self.type(f"{text}\r", until)
        self.expect(ASK)

    def reply(self):
        """The lines of the newest answer."""
        lines = [line.rstrip() for line in self.screen.display]
        start = max(i for i, line in enumerate(lines) if line.startswith(">> Reply:"))
        return lines[start : next(i for i, line in enumerate(lines) if i > start and line.startswith("Time for inference"))]

    def cells(self, text):
        """The cells of the screen where a text stands."""
        row, line = next((i, line) for i, line in enumerate(self.screen.display) if text in line)
        return [self.screen.buffer[row][line.index(text) + i] for i in range(len(text))]

    def saved(self):
        """What was said, as /save writes it."""
        self.say("/save chat.json", "Saved")
        file = self.home / "chat.json"
        [record] = json.loads(file.read_text())
        file.unlink()
        return [message["content"] for message in record["messages"]]

    def end(self, keys):
        self.keys.send(keys)
        return self.exit_code()

    def exit_code(self):
        """Wait for the end."""
        os.close(self.theirs)  # or it would have no end
        self.expect(EOF)
        self.process.join(30)
        self.modes = termios.tcgetattr(self.keys.child_fd)
        return self.process.exitcode


@pytest.fixture(scope="module")
def begin(words, tmp_path_factory):
    """Begin a chat in a terminal; at the end nothing of it runs on."""
    begun = []

    def begin(*flags, **settings):
        begun.append(Terminal([*words, *flags], tmp_path_factory.mktemp("home"), **settings))
        return begun[-1]

    yield begin
    for chat in begun:
        chat.process.kill()
        chat.process.join()
        chat.keys.close()


@pytest.fixture(scope="module")
def shared(begin):
    """One process for many tests: it takes seconds to start."""
    chats = []

    def running():
        if not chats or not chats[-1].process.is_alive():
            chats.append(begin())
        return chats[-1]

    return running


@pytest.fixture
def chat(shared):
    """A chat that begins."""
    chat = shared()
    termios.tcsetwinsize(chat.keys.child_fd, (40, 60))
    chat.say("/clear", "anew")
    chat.screen.reset()
    chat.received = b""
    chat.say("/help", "Show this")
    return chat


def test_markdown_is_rendered(chat):
    chat.say("markdown")
    assert chat.reply() == [
        ">> Reply: Some bold text and code.",
        "",
        "The title",
        "• an item that is longer than the sixty columns that this",
        "  terminal has",
        "  • nested",
        "",
        "def f(*args): return 2 * 3 * 4",
        "",
        "animal   eats",
        "─────────────",
        "你好      hay",
        "fox      mice",
    ]
    assert all(cell.bold for cell in chat.cells("bold text") + chat.cells("The title") + chat.cells("eats"))
    assert all(cell.fg == "cyan" for cell in chat.cells("code") + chat.cells("def f"))
    assert not any(cell.bold or cell.fg != "default" for cell in chat.cells("Some") + chat.cells("mice") + chat.cells(ASK))


def test_a_model_cannot_command_the_terminal(chat):
    chat.say("hack")
    assert chat.screen.title == ""
    assert chat.reply() == [">> Reply: first [2J]0;title31mlast [5;1Hend"]
    assert chat.cells("/help")


def test_ctrl_c_stops_only_the_answer(chat):
    chat.type("words\r", "word9 ")
    for _ in range(5):  # hammered on
        chat.keys.send("\x03")
        time.sleep(0.01)
    chat.expect(DONE)
    chat.expect(ASK)
    time.sleep(0.7)
    chat.say("Again")
    question, answer, *others = chat.saved()
    assert question == "words" and answer.startswith("word0 word1") and len(answer) < len(WORDS)
    assert others == ["Again", "Fine."]


def test_several_lines_are_one_prompt(chat):
    chat.type("first\\\r")
    chat.say("second")
    for line in ('"""def f():', "", "    return 1"):
        chat.type(f"{line}\r")
    chat.say('"""')
    chat.keys.send("\x1b[200~pasted\n\n  lines\n\x1b[201~")
    chat.say("")
    assert chat.saved()[::2] == ["first\nsecond", "def f():\n\n    return 1", "pasted\n\n  lines"]


def test_arrows_recall_and_edit_what_was_typed(chat):
    chat.say("Hello wrld")
    chat.keys.send("\x1b[A" + "\x1b[D" * 3 + "o")
    chat.say("")
    assert chat.saved()[::2] == ["Hello wrld", "Hello world"]


def test_unicode_is_read_and_shown(chat):
    chat.say("你好 🙂 é")
    assert chat.saved() == ["你好 🙂 é", UNICODE]
    assert "".join(chat.reply()[0].split()) == "".join(f">>Reply:{UNICODE}".split())


def test_lines_end_between_words_also_when_the_window_changes(chat):
    chat.type("words\r", "word60 ")
    termios.tcsetwinsize(chat.keys.child_fd, (30, 25))
    chat.expect(DONE)
    chat.expect(ASK)
    text = chat.received.decode().partition(">> Reply: ")[2].partition("Time for")[0]
    lines = text.split("\r\n")[:-1]
    assert "\x1b" not in text and all(re.fullmatch(r"(word\d+ ?)+", line) for line in lines)
    wide = [line for line in lines if len(line) > 25]
    narrow = lines[len(wide) :]
    assert len(wide) > 5 and len(narrow) > 50 and max(map(len, wide)) <= 60 and max(map(len, narrow)) <= 25


def test_ctrl_d_ends_the_chat_and_the_terminal_is_as_it_was(begin, shared):
    chat = shared()
    chat.say("Hello")
    assert not termios.tcgetattr(chat.keys.child_fd)[3] & termios.ICANON  # keys are read one by one
    assert chat.end("\x04") == 0
    assert chat.modes[3] & termios.ICANON and chat.modes[3] & termios.ECHO
    assert chat.received.count(b"\x1b[?2004h") == chat.received.count(b"\x1b[?2004l")  # of readline: pastes are marked


def test_with_multiline_submit_sends_and_ctrl_c_at_the_prompt_ends(begin):
    chat = begin("--multiline", "true", "--markdown", "false")
    for line in ("markdown", "", "last"):
        chat.type(f"{line}\r")
    chat.say("!submit")
    assert chat.saved()[0] == "markdown\n\nlast"
    chat.type("markdown\r")
    chat.say("!submit")
    assert ">> Reply: Some **bold text** and `code`." in chat.reply()
    assert chat.end("\x03") == 0


def test_a_killed_chat_leaves_nothing(begin):
    chat = begin(TERM="dumb")
    chat.say("markdown")
    assert b"**bold text**" in chat.received and b"\x1b" not in chat.received  # this terminal knows no more
    chat.type("words\r", "word9 ")
    group = os.getpgid(chat.process.pid)
    chat.process.kill()
    assert chat.exit_code() == -signal.SIGKILL
    assert os.listdir(chat.home) == []
    with pytest.raises(ProcessLookupError):
        os.killpg(group, 0)


def test_over_a_pipe_the_output_is_exact(words, tmp_path):
    typed = 'markdown\n"""\ntwo\nlines"""\nhack\n/undo\n!quit\n'
    keys, pipe, errors = (tmp_path / name for name in ("keys", "pipe", "errors"))
    keys.write_text(typed)
    os.mkfifo(pipe)
    process = fork(chat_in_process, words, tmp_path, (str(keys), str(pipe), str(errors)), dict(os.environ))
    shown = pipe.read_bytes().decode()
    process.join(30)
    greeting = "To end the chat, enter an empty line, !quit or !exit. Ctrl-C stops an answer. /help shows more.\n"
    replies = "".join(f">> Prompt: >> Reply: {answer}\n" for answer in (MARKDOWN, "Fine.", COMMANDS_THE_TERMINAL))
    assert shown == f"Now chatting with tiny-llama.\n{greeting}{replies}>> Prompt: The newest turn is forgotten.\n>> Prompt: "
    assert process.exitcode == 0 and len(re.findall(DONE, errors.read_text())) == 3


def test_what_is_typed_in_a_terminal_may_be_answered_into_a_file(begin, tmp_path):
    file = tmp_path / "out.txt"
    chat = begin(out=file)
    chat.type("markdown\r", DONE)
    assert chat.end("\x04") == 0
    assert f">> Reply: {MARKDOWN}\n" in file.read_text()
    assert "\x1b" not in file.read_text()
