"""Talk to the Hugging Face hub: what a repository holds, which files to take, downloads that go on where they stopped, clear errors."""

import errno
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token, hf_hub_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, HTTPError, RepositoryNotFoundError
from tqdm import tqdm

from litgpt import names
from litgpt.errors import MissingFile, UserError

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # ORG/NAME
SECONDS_BETWEEN_LINES = 10
RUN_AGAIN = "Run the same command again: it goes on where it stopped."
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


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
        """Download one file, going on where an earlier attempt stopped, and return where it lies.

        Raises:
            UserError: The file is behind a gate, the connection broke, or the disk is full.
        """
        flat = None if sys.stderr.isatty() else FlatProgress
        with clear_errors(self.id, self.token, f"The download of {file} from {self.id}"):
            found = hf_hub_download(
                self.id, file, revision=self.revision, local_dir=folder, token=self.token, endpoint=endpoint(), tqdm_class=flat
            )
        return Path(found)

    def side_files(self) -> list[str]:
        """Return the names of config and tokenizer files, those first that say whether the rest is of use."""
        wanted = (names.CONFIG, names.GENERATION_CONFIG, *names.TOKENIZER_FILES)
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
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise UserError(f"The index of weights {index.name} in {self.id} is damaged.") from None
        if unknown := [name for name in files if name not in self.sizes]:
            raise MissingFile(f"{index.name} in {self.id} names {unknown[0]!r}, which is not on the hub.")
        return files


OTHER_WEIGHTS = (
    "consolidated",
    "training_args",
    "adapter_",
    "optimizer",
    "scheduler",
    "rng_state",
)  # not the model in Hugging Face's layout


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
    token = access_token or get_token()
    with clear_errors(repo_id, token, f"Looking for {repo_id} on the hub", NotOnHub):
        info = HfApi(endpoint=endpoint(), token=token).model_info(repo_id, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or [] if "/" not in file.rfilename}
    return Repository(repo_id, info.sha or "main", sizes, token)


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
        if error_number(error) in DISK_FULL:
            raise UserError(f"{action} failed: the disk is full. Free some space; what is there already is kept.") from None
        if isinstance(error, PermissionError):
            raise UserError(f"{action} failed: {error.filename} may not be written. Choose another folder.") from None
        raise unreachable(f"{action} failed: the connection broke or was refused ({_root(error)}). {RUN_AGAIN}") from None


def error_number(error: BaseException) -> int | None:
    """Return the operating system's number of an error, or None."""
    return getattr(error, "errno", None)


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


class FlatProgress(tqdm):
    """Reports a download in lines that stay readable in a file: one now and then, one at the end."""

    def __init__(self, *args: Any, **options: Any) -> None:
        options.pop("name", None)  # of the hub's own group of bars
        self.printed = time.monotonic()
        self.done = False
        super().__init__(*args, **options | {"file": sys.stderr, "mininterval": 1, "leave": False, "disable": False})

    def display(self, *args: Any, **options: Any) -> None:
        """Print a line if it is time to."""
        finished = bool(self.total) and self.n >= self.total
        if self.done or not (finished or time.monotonic() - self.printed > SECONDS_BETWEEN_LINES):
            return
        self.printed, self.done = time.monotonic(), finished
        share = f" of {amount(self.total)} ({self.n / self.total:.0%})" if self.total else ""
        print(f"{self.desc.rstrip(': ')}: {amount(self.n)}{share}", file=sys.stderr, flush=True)

    def clear(self, *args: Any, **options: Any) -> None:
        """There is no bar to wipe away."""

    def close(self) -> None:
        """Print the last line."""
        if not self.disable:
            self.display()
        self.disable = True
