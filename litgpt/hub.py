"""Talk to the Hugging Face hub: what a repository holds, which files to take, downloads that go on where they stopped, clear errors."""

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, get_token, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from litgpt import names
from litgpt.errors import MissingFile, UserError, disk_error
from litgpt.files import indexed_files

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # ORG/NAME
OTHER_WEIGHTS = (
    "consolidated",
    "training_args",
    "adapter_",
    "optimizer",
    "scheduler",
    "rng_state",
)  # not the model in Hugging Face's layout
TOKEN = re.compile("[!-~]+")  # what the header of a request can carry
COMMIT = "commit"  # in a folder that is being downloaded: names the version that its files are of
PAUSES = (1, 2, 5, 10, 20)  # seconds between attempts that bring nothing new
SECONDS_BETWEEN_LINES = 10
RUN_AGAIN = "Run the same command again: it goes on where it stopped."


class NotOnHub(MissingFile):
    """The hub has no such repository, or could not be asked."""


@dataclass(frozen=True)
class Repository:
    """A model on the hub, at one commit."""

    id: str
    revision: str
    sizes: dict[str, int]  # bytes of each file that lies at the top
    token: str | None

    def fetch(self, file: str, folder: Path) -> Path:
        """Download one file and return where it lies. What an earlier attempt has downloaded of it is not downloaded again.

        The hub's own package starts anew after an interruption (huggingface_hub issue 4196), so the bytes are fetched here.

        Args:
            file: One of `sizes`.
            folder: Holds nothing but files of this repository; those of another commit are removed.

        Raises:
            UserError: The file is behind a gate, the connection broke for good, or the disk is full.
        """
        with clear_errors(self.id, self.token, f"The download of {file} from {self.id}"):
            if folder.is_dir() and not _is_of(folder, self.revision):
                discard(folder)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / COMMIT).write_text(self.revision)
            target, partial = folder / file, folder / (file + names.PARTIAL)
            if target.exists() and _size(target) == self.sizes[file]:
                return target
            try:
                with progress(file, self.sizes[file], _size(partial)) as advance:
                    self._complete(file, partial, advance)
                partial.rename(target)
            finally:
                if [left.name for left in folder.iterdir()] == [COMMIT]:  # nothing came
                    shutil.rmtree(folder)
        return target

    def _complete(self, file: str, partial: Path, advance: Callable[[int], None]) -> None:
        """Append to a part of a file until it is whole, in as many attempts as bring it further."""
        idle = 0
        while (before := _size(partial)) < self.sizes[file] or not partial.exists():
            try:
                self._append(file, partial, advance)
            except (HTTPError, OSError) as error:
                refused = isinstance(error, HfHubHTTPError) and error.response.status_code < 500 and error.response.status_code != 429
                local = isinstance(error, OSError) and not isinstance(error, HTTPError | ConnectionError | TimeoutError)
                idle = 0 if _size(partial) > before else idle + 1
                if refused or local or idle > len(PAUSES):
                    raise
                if idle:
                    time.sleep(PAUSES[idle - 1])

    def _append(self, file: str, partial: Path, advance: Callable[[int], None]) -> None:
        start = _size(partial)
        headers = build_hf_headers(token=self.token) | {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        url = hf_hub_url(self.id, file, revision=self.revision, endpoint=endpoint())
        with get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=30) as response:
            if response.is_error:
                response.read()
            hf_raise_for_status(response)
            if start and response.status_code != 206:  # the server gives only whole files
                advance(-start)
                start = 0
            with partial.open("r+b" if partial.exists() else "wb") as opened:
                opened.truncate(start)
                opened.seek(start)
                for chunk in response.iter_raw():  # as they arrive: chunks of a fixed size would be lost half filled
                    opened.write(chunk)
                    advance(len(chunk))
        if start == _size(partial) < self.sizes[file]:
            raise ConnectionError("the hub sent nothing")

    def side_files(self) -> list[str]:
        """Return the names of config and tokenizer files, those first that say whether the rest is of use."""
        wanted = (names.CONFIG, names.GENERATION_CONFIG, *names.TOKENIZER_FILES, *names.PROCESSOR_FILES)
        return [name for name in wanted if name in self.sizes]

    def weight_files(self, folder: Path) -> list[str]:
        """Return the names of the files that hold the weights: safetensors, else `.bin`; an index, which is fetched, comes first.

        Args:
            folder: Where an index is downloaded to.

        Raises:
            MissingFile: There are none.
        """
        for index, single, suffix in (
            (names.SAFETENSORS_INDEX, names.SAFETENSORS, ".safetensors"),
            (names.BIN_INDEX, names.BIN, ".bin"),
        ):
            if index in self.sizes:
                return [index, *self._indexed(self.fetch(index, folder))]
            if single in self.sizes:
                return [single]
            if found := [name for name in sorted(self.sizes) if name.endswith(suffix) and not name.startswith(OTHER_WEIGHTS)]:
                return found
        raise MissingFile(f"{self.id} on the hub holds no weights that can be read: neither *.safetensors nor *.bin.")

    def _indexed(self, index: Path) -> list[str]:
        files = indexed_files(index)
        if unknown := [name for name in files if name not in self.sizes]:
            raise MissingFile(f"{index.name} in {self.id} names {unknown[0]!r}, which is not on the hub.")
        return files


def endpoint() -> str | None:
    """Return another hub's address, if the environment names one."""
    return os.environ.get("HF_ENDPOINT") or None


def find_repository(repo_id: str, access_token: str | None = None) -> Repository:
    """Ask the hub what a repository holds.

    Args:
        repo_id: `ORG/NAME`.
        access_token: For gated and private repositories; by default `HF_TOKEN`, or the one saved by `hf auth login`.

    Raises:
        NotOnHub: There is none of this name, or the hub cannot be reached.
        UserError: It is gated, or the token is refused.
    """
    token = access_token or _saved_token()
    if token is not None and not TOKEN.fullmatch(token):
        raise UserError("The access token holds characters that no token has. Copy it again into HF_TOKEN or --access_token.")
    with clear_errors(repo_id, token, f"Looking for {repo_id} on the hub", NotOnHub):
        info = HfApi(endpoint=endpoint(), token=token).model_info(repo_id, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or [] if "/" not in file.rfilename}
    return Repository(repo_id, info.sha or "main", sizes, token)


def _saved_token() -> str | None:
    try:
        return get_token()
    except (OSError, UnicodeDecodeError) as error:
        way = "Put the token into HF_TOKEN or --access_token, or save it again with: hf auth login"
        raise UserError(f"The access token that was saved on this machine cannot be read ({error}). {way}") from None


@contextmanager
def clear_errors(repo_id: str, token: str | None, action: str, unreachable: type[UserError] = UserError) -> Iterator[None]:
    """Turn what may happen between us and the hub into one sentence with the way out.

    Args:
        repo_id: The repository asked for.
        token: The one that was sent.
        action: What is being done, the beginning of a sentence.
        unreachable: The error to raise if there is no connection.
    """
    page = f"https://huggingface.co/{repo_id}"
    try:
        yield
    except GatedRepoError:
        if token is not None:
            raise UserError(f"{repo_id} is gated, and this access token has no rights to it. Ask for access on {page}.") from None
        way = f"Ask for access on {page}, make a token on https://huggingface.co/settings/tokens,"
        way += " and put it into the environment variable HF_TOKEN or pass it as --access_token."
        raise UserError(f"{repo_id} is gated: only those who were given access may download it. {way}") from None
    except (RepositoryNotFoundError, HFValidationError):
        private = "or it is private and this token has no rights to it" if token else "or it is private and needs an access token"
        raise NotOnHub(f"There is no {repo_id!r} on the hub, {private}.") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise UserError(f"The hub refused the access token (status {status}). Check HF_TOKEN or --access_token.") from None
        raise UserError(f"{action} failed: the hub answered with status {status}. {RUN_AGAIN}") from None
    except (HTTPError, OSError) as error:  # the second: no connection, no space, or a file that is shorter than announced
        if isinstance(error, UserError):
            raise
        if isinstance(error, OSError) and (message := disk_error(error)):
            raise UserError(f"{action} failed: {message}") from None
        way = "Check the network." if unreachable is NotOnHub else RUN_AGAIN
        raise unreachable(f"{action} failed: the connection broke or was refused ({_root(error)}). {way}") from None


def _root(error: BaseException) -> str:
    """Return what stands at the beginning of a chain of errors, in a few words."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return (str(error).strip() or type(error).__name__).splitlines()[0][:100]


def check_space(folder: Path, needed: int) -> None:
    """Refuse a download that the disk has no room for.

    Args:
        folder: Where it would go; need not exist yet.
        needed: Its size in bytes.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(f"The download needs {amount(needed)}, but the disk of {existing} has {amount(free)} left. Free some space.")


def amount(size: float) -> str:
    """Return a number of bytes as people say it."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


@contextmanager
def progress(file: str, size: int, done: int) -> Iterator[Callable[[int], None]]:
    """Show how a download gets on: as a bar on a terminal, elsewhere as a line now and then and one at the end.

    Args:
        file: What to call it.
        size: Its size in bytes.
        done: How much is there already.
    """
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(file, total=size, completed=done)
            yield lambda more: bar.advance(task, more)
        return
    shown = time.monotonic()

    def advance(more: int) -> None:
        nonlocal done, shown
        done += more
        if time.monotonic() - shown > SECONDS_BETWEEN_LINES:
            shown = time.monotonic()
            console.file.write(f"{file}: {amount(done)} of {amount(size)} ({done / max(1, size):.0%})\n")
            console.file.flush()

    yield advance
    console.file.write(f"{file}: {amount(size)}\n")
    console.file.flush()


def discard(folder: Path) -> None:
    """Delete what was downloaded into a folder.

    Raises:
        UserError: It is not one that was downloaded into.
    """
    if (folder / COMMIT).is_file():
        shutil.rmtree(folder)
    elif any(folder.iterdir()):
        raise UserError(f"{folder} is in the way, a name that is needed for the download. Move it, or delete it.")


def _is_of(folder: Path, revision: str) -> bool:
    return (folder / COMMIT).is_file() and (folder / COMMIT).read_text() == revision


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0
