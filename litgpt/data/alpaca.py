"""The Alpaca data set, cleaned: 52 thousand instructions with answers."""

import os
import shutil
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

from litgpt.data.base import SFTModule, split
from litgpt.data.json_data import load_split
from litgpt.errors import UserError
from litgpt.names import PARTIAL

URL = "https://raw.githubusercontent.com/tloen/alpaca-lora/main/alpaca_data_cleaned_archive.json"
SCHEMES = ("https", "http", "file")
TIMEOUT = 30.0  # seconds without an answer


@dataclass(eq=False)
class Alpaca(SFTModule):
    """The cleaned Alpaca data set: 52 thousand instructions with answers, downloaded once."""

    val_split_fraction: float = 0.03865  # 2000 samples
    """The share of the samples to validate on."""
    download_dir: Path = Path("./data/alpaca")
    """The folder that the file is kept in."""
    file_url: str = URL
    """Where the file comes from."""
    file_name: str = "alpaca_data_cleaned_archive.json"
    """The file's name in that folder."""

    def prepare_data(self) -> None:
        """Download the file, unless it is there."""
        download_if_missing(Path(self.download_dir) / self.file_name, self.file_url)

    def records(self) -> tuple[list[dict], list[dict]]:
        """The samples to train on and those to validate on."""
        return split(load_split(Path(self.download_dir) / self.file_name), self.val_split_fraction, self.seed)


def download_if_missing(file_path: Path, file_url: str) -> None:
    """Fetch a file, unless it is there. It appears whole or not at all.

    Args:
        file_path: Where it goes.
        file_url: Where it comes from.

    Raises:
        UserError: It cannot be fetched or written.
    """
    file_path = Path(file_path)
    if file_path.exists():
        return
    partial = file_path.with_name(f"{file_path.name}.{os.getpid()}{PARTIAL}")
    way_out = f"Or save it yourself as {file_path}."
    if urlsplit(file_url).scheme not in SCHEMES:
        raise UserError(f"{file_url!r} is not an address to download from: it must begin with {' or '.join(SCHEMES)} and `://`.")
    try:
        with urlopen(file_url, timeout=TIMEOUT) as response:  # its name comes from a flag, never from a checkpoint
            file_path.parent.mkdir(parents=True, exist_ok=True)
            expected = response.headers.get("Content-Length")
            with open(partial, "wb") as file:
                shutil.copyfileobj(response, file)
                file.flush()
                os.fsync(file.fileno())
        size = partial.stat().st_size
        if expected is not None and size != int(expected):
            raise UserError(f"The download of {file_url} broke off after {size} of {expected} bytes. Try again. {way_out}")
        partial.replace(file_path)
    except HTTPError as error:
        raise UserError(f"{file_url} cannot be downloaded: the server answers {error.code} {error.reason}. {way_out}") from None
    except (URLError, HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(f"{file_url} cannot be downloaded: {reason}. Check the network. {way_out}") from None
    except OSError as error:
        raise UserError(f"{file_path} cannot be written: {error.strerror}.") from None
    finally:
        if partial.exists():
            partial.unlink()
