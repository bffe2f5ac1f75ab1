"""The shape of the code is a contract too: who imports whom, how large things grow, and how fast we start."""

import ast
import re
import resource
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "litgpt"
FILES = sorted(PACKAGE.rglob("*.py"))

# A module imports from the lines above its own, from what stands left of a `·` in its line, and from its own folder.
LAYERS = """
names errors args weights · files families · config
tokenizer · prompts rope loss cache · attention experts · recurrent
model · lora adapter quantize · adapter_v2
translate dequantize hardware hub adamw · launch peft_format litgpt_layout weight_files · multimodal
checkpoint optim metrics data report · run_state · training run_folder run_log · run_inputs · run
scripts · generate
pretrain finetune eval
api · chat deploy · recipes · cli · __main__
"""
RANK = {
    name: (line, place)
    for line, text in enumerate(LAYERS.strip().splitlines())
    for place, names in enumerate(text.split("·"))
    for name in names.split()
}
BY_STRING = {"__init__", "cli"}  # these import ours by name, when it is asked for
STARTS_WITHOUT_TORCH = {"scripts/download.py"}  # `download list` answers at once, and what converts is loaded by name
NOT_EVERYWHERE = {"readline", "resource"}  # of the standard library, but missing on some systems
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
OPTIONAL = {re.match(r"[\w-]+", text)[0].replace("-", "_") for name, extra in EXTRAS.items() if name != "test" for text in extra}
ORACLES = {"transformers", "peft"}  # tests compare with them; the library never needs them


def part(path: Path) -> str:
    """The name under which the table lists a file."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def our_imports(path: Path, tree: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    """Yield what of ours the file imports, as the table lists it, whatever the form of the import."""
    folder = ["litgpt", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*folder[: len(folder) - node.level + 1]] if node.level else []
            base += (node.module or "").split(".") if node.module else []
            modules = [".".join([*base, alias.name]) for alias in node.names]
        else:
            continue
        for module in modules:
            first, *rest = module.split(".")
            if first == "litgpt":
                yield rest[0] if rest else "__init__", node


def complaints(path: Path, text: str) -> list[str]:
    """Everything about a file's imports that the contract forbids."""
    tree = ast.parse(text)
    own = part(path)
    if own not in {*RANK, "__init__"}:
        return [f"the table of layers does not know {own!r}"]
    found, top = [], [*tree.body, *(inner for node in tree.body if isinstance(node, ast.Try) for inner in node.body)]
    for name, node in our_imports(path, tree):
        if node not in top:
            found.append(f"line {node.lineno} hides an import of {name!r}: ours stand at the top of the file")
        if name not in RANK:
            found.append(f"line {node.lineno} imports {name!r}, which the table of layers does not know")
        elif name != own and (own == "__init__" or RANK[name] >= RANK[own]):
            found.append(f"line {node.lineno} imports {name!r}, which does not stand above {own!r}")
    found += [f"line {node.lineno} imports {name!r}, which is for tests" for name, node in outside_imports(tree) if name in ORACLES]
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found += [
                f"line {inner.lineno} imports {name!r} in a function"
                for name, inner in outside_imports(node)
                if name not in OPTIONAL | NOT_EVERYWHERE | {"litgpt"}
            ]
    if own not in BY_STRING and path.relative_to(PACKAGE).as_posix() not in STARTS_WITHOUT_TORCH:
        found += [f"line {node.lineno} loads a module of ours by string" for node in loads_by_string(tree) if "litgpt" in ast.unparse(node)]
    return found


def loads_by_string(tree: ast.AST) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield node


def outside_imports(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0], node


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards_and_stand_at_the_top(path):
    assert not complaints(path, path.read_text())


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("model.py", "import litgpt.cli", "does not stand above"),
        ("model.py", "import torch, litgpt.lora as lora", "does not stand above"),
        ("model.py", "from litgpt.checkpoint import load_model", "does not stand above"),
        ("model.py", "from litgpt import lora", "does not stand above"),
        ("model.py", "from . import lora", "does not stand above"),
        ("model.py", "from .lora import LoRALinear", "does not stand above"),
        ("finetune/lora.py", "from ..cli import main", "does not stand above"),
        ("finetune/lora.py", "from .. import pretrain", "does not stand above"),
        ("lora.py", "from litgpt import adapter", "does not stand above"),
        ("errors.py", "from litgpt.names import CONFIG", "does not stand above"),
        ("model.py", "import litgpt", "does not know"),
        ("model.py", "from litgpt import GPT", "does not know"),
        ("model.py", "from litgpt.utils import x", "does not know"),
        ("model.py", "def f():\n    from litgpt.config import Config", "hides an import"),
        ("model.py", "async def f():\n    import litgpt.config", "hides an import"),
        ("model.py", "if True:\n    from litgpt import config", "hides an import"),
        ("model.py", "class A:\n    from .config import Config", "hides an import"),
        ("model.py", "def f():\n    import numpy", "in a function"),
        ("model.py", "def f():\n    from transformers.x import y", "which is for tests"),
        ("model.py", "import importlib\ndef f():\n    importlib.import_module('litgpt.cli')", "by string"),
        ("utils.py", "", "does not know 'utils'"),
        ("helpers/x.py", "", "does not know 'helpers'"),
        ("model.py", "from litgpt.config import Config\nfrom . import names\nimport litgpt.rope\n\n\ndef f():\n    import pyarrow", None),
        ("finetune/lora.py", "from litgpt.finetune.loop import x\nfrom . import loop\nfrom ..model import GPT", None),
    ],
)
def test_every_form_of_import_is_seen(name, text, expected):
    found = complaints(PACKAGE / name, text)
    assert (not found) if expected is None else any(expected in complaint for complaint in found), found


def sizes(text: str) -> Iterator[tuple[str, int]]:
    """Yield every function and how many lines it has, docstring not counted: a command's may be a manual."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            yield node.name, body[-1].end_lineno - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert text.count("\n") <= 700, "split this file by subject"
    assert not {name: lines for name, lines in sizes(text) if lines > 60}


def test_asynchronous_functions_and_methods_count_too():
    long = "    x = 1\n" * 61
    text = f"async def one():\n{long}\nclass A:\n    async def two(self):\n" + "        x = 1\n" * 61
    assert dict(sizes(text)) == {"one": 61, "two": 61}


@pytest.mark.parametrize("path", [path for path in FILES if path.name == "__init__.py"], ids=lambda path: str(path.relative_to(PACKAGE)))
def test_init_files_only_list_names(path):
    for node in ast.parse(path.read_text()).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_lazy = isinstance(node, ast.FunctionDef) and node.name in ("__getattr__", "__dir__")
        is_list = isinstance(node, ast.Assign | ast.AnnAssign)
        assert is_docstring or is_lazy or is_list or isinstance(node, ast.Import | ast.ImportFrom), f"line {node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_named_by_their_subject(path):
    assert not {"utils", "helpers", "common", "manager", "misc"} & {name.removesuffix(".py") for name in path.relative_to(PACKAGE).parts}


# Start-up

HEAVY = ("torch", "lightning", "transformers", "numpy")
STARTS = {
    "import litgpt": "import litgpt",
    "litgpt -h": "from litgpt.cli import main; assert main(['-h']) == 0",
    "Config.from_name": "from litgpt import Config; Config.from_name('SmolLM2-135M-Instruct')",
    "download list": "from litgpt.cli import main; assert main(['download', 'list']) == 0",
}


def python(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True, cwd=ROOT)


@pytest.mark.parametrize("name", STARTS)
def test_what_needs_no_model_starts_without_torch_and_lightning(name):
    done = python("-c", f"import sys\n{STARTS[name]}\nsys.stderr.write(str([name for name in {HEAVY} if name in sys.modules]))")
    assert done.stderr == "[]"


def test_importing_us_prints_nothing():
    done = python("-c", "import litgpt\nlitgpt.LLM, litgpt.GPT, litgpt.Config, litgpt.PromptStyle, litgpt.Tokenizer")
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize(
    "words, budget", [(("-c", "import litgpt"), 0.2), (("-m", "litgpt", "-h"), 0.5)], ids=["import litgpt", "litgpt -h"]
)
def test_we_start_within_the_budget(words, budget):
    best = float("inf")
    for _ in range(8):  # seconds of the processor, of which a busy machine takes more too: the best of several counts
        start = processor_seconds()
        python(*words)
        best = min(best, processor_seconds() - start)
        if best < budget:
            return
    pytest.fail(f"{best:.2f} s")


def processor_seconds() -> float:
    """What all programs took that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
