"""Files from the web: fetched once, continued after an interruption, checked, and there whole or not at all."""

import hashlib
import json
import os
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from huggingface_hub.utils import WeakFileLock

from litgpt.errors import UserError
from litgpt.files import cannot_write, is_file
from litgpt.hub import progress
from litgpt.names import PARTIAL

SCHEMES = ("https", "http", "file")
TIMEOUT = 30.0  # seconds without an answer
CHUNK = 1 << 16
LOCK = ".lock"  # in a folder that is downloaded into


def download_if_missing(file_path: Path, file_url: str, sha256: str | None = None) -> None:
    """Fetch a file, unless it is there. It appears whole or not at all, and an interrupted download goes on where it stopped.

    What has come so far lies beside it, and is continued if the server says that the file is still the same. Files that end in
    `.json` or `.jsonl` must be that. Of several processes that want the same file, one downloads it.

    Args:
        file_path: Where it goes.
        file_url: Where it comes from.
        sha256: The digest that it must have, in hexadecimal digits.

    Raises:
        UserError: It cannot be fetched or written, or is not what it should be.
    """
    file_path = Path(file_path)
    if is_file(file_path):
        return
    if urlsplit(file_url).scheme not in SCHEMES:
        raise UserError(f"{file_url!r} is not an address to download from: it must begin with {' or '.join(SCHEMES)} and `://`.")
    way_out = f"Or save it yourself as {file_path}."
    try:
        file_path.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(file_path.parent / LOCK):
            if not file_path.exists():
                Download(file_url, file_path).run(sha256)
    except HTTPError as error:
        raise UserError(f"{file_url} cannot be downloaded: the server answers {error.code} {error.reason}. {way_out}") from None
    except (URLError, HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(f"{file_url} cannot be downloaded: {reason}. Check the network. {way_out}") from None
    except OSError as error:
        raise cannot_write(file_path, error) from None


class Download:
    """One file on its way: what has come of it, and which version of the file that belongs to.

    Args:
        url: Where it comes from.
        target: Where it goes. What has come lies beside it, and beside that what the server said of the file.
    """

    def __init__(self, url: str, target: Path) -> None:
        self.url, self.target = url, target
        self.partial = target.with_name(target.name + PARTIAL)
        self.version_file = target.with_name(target.name + PARTIAL + ".json")
        self.version = self._noted_version()

    def run(self, sha256: str | None) -> None:
        """Fetch the file, in as many attempts as bring it further, check it, and give it its name."""
        whole = bool(self.version) and self._n_bytes() == self.version["size"]
        while not whole:
            before = self._n_bytes()
            broke = self._attempt()
            if broke is not None and self._n_bytes() <= before:
                size = "" if self.version["size"] is None else f" of {self.version['size']}"
                raise UserError(
                    f"The download of {self.url} broke off after {self._n_bytes()}{size} bytes ({broke}). "
                    f"Run the same command again, which goes on there if the server allows it. Or save it yourself as {self.target}."
                )
            whole = broke is None
        try:
            self._check(sha256)
        except UserError:
            self._discard()
            raise
        self.partial.replace(self.target)
        self._discard()

    def _attempt(self) -> str | None:
        """Append what the server sends; return how it broke off, or None if the server has sent all it wanted to."""
        start = self._n_bytes() if self.version.get("tag") else 0
        headers = {"Range": f"bytes={start}-", "If-Range": self.version["tag"]} if start else {}
        with urlopen(Request(self.url, headers=headers), timeout=TIMEOUT) as response:  # the address is a flag's, never a checkpoint's
            if start and response.status == 206:
                span, size = response.headers.get("Content-Range") or "", self.version["size"]
                if not (span.startswith(f"bytes {start}-") and span.endswith((f"/{size}", "/*"))):  # another part than was asked for
                    self._discard()
                    return self._attempt()
            else:
                start = 0  # the file has changed, or the server gives whole files only
                self._begin(response.headers)
            size = self.version["size"]
            with self.partial.open("r+b" if start else "wb") as file, progress(self.target.name, size or 0, start) as advance:
                file.seek(start)
                while True:
                    try:
                        chunk = response.read(CHUNK)
                    except (HTTPException, OSError) as error:  # of the network, whatever its kind; those of the disk are raised below
                        return str(error) or type(error).__name__
                    if not chunk:
                        break
                    file.write(chunk)
                    advance(len(chunk))
                file.flush()
                os.fsync(file.fileno())
        return None if size is None or self._n_bytes() == size else "the connection was closed"

    def _begin(self, headers: Mapping[str, str]) -> None:
        """Start from nothing, and note which version of the file the server sends."""
        self._discard()
        tag, length = headers.get("ETag"), headers.get("Content-Length")
        tag = headers.get("Last-Modified") if tag is None or tag.startswith("W/") else tag  # a weak tag names no bytes
        self.version = {"url": self.url, "tag": tag, "size": int(length) if length is not None else None}
        if tag is not None and length is not None:
            self.version_file.write_text(json.dumps(self.version))

    def _noted_version(self) -> dict[str, Any]:
        try:
            version = json.loads(self.version_file.read_text())
        except (FileNotFoundError, ValueError):  # the second: of a program that was killed while writing it
            return {}
        usable = isinstance(version, dict) and version.get("url") == self.url and self._n_bytes() <= version["size"]
        return version if usable else {}

    def _n_bytes(self) -> int:
        return self.partial.stat().st_size if self.partial.exists() else 0

    def _check(self, sha256: str | None) -> None:
        if sha256 is not None:
            with self.partial.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != sha256.lower():
                raise UserError(f"{self.url} sent another file than it should: its SHA-256 is {found}, not {sha256}. Try again later.")
        try:
            if self.target.suffix == ".json":
                json.loads(self.partial.read_bytes())
            elif self.target.suffix == ".jsonl":
                with self.partial.open("rb") as lines:
                    for line in filter(bytes.strip, lines):
                        json.loads(line)
        except (ValueError, RecursionError):
            with self.partial.open("rb") as file:
                start = file.read(40).decode(errors="replace")
            kind = "JSON lines" if self.target.suffix == ".jsonl" else "JSON"
            raise UserError(
                f"{self.url} sent something that is not valid {kind}: it begins with {start!r}. Open the address in a browser to see what "
                f"it is, and save the file yourself as {self.target}."
            ) from None

    def _discard(self) -> None:
        self.partial.unlink(missing_ok=True)
        self.version_file.unlink(missing_ok=True)
        self.version = {}
