"""The server that a page of the documentation starts, in a process of its own."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress

READY = {"litgpt": "/ready", "python": "/health"}  # what is asked until it is answered with 200: ours, LitServe's


class PageServer:
    """Holds a port, and at most one server that listens on it.

    Attributes:
        port: What stands in the place of the page's 8000.
    """

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
        self.process: subprocess.Popen | None = None
        self.line = ""

    def start(self, line: str, program: str, argv: list[str], variables: dict[str, str]) -> None:
        """End the server before, if there is one, and start another in this folder; return when it is ready."""
        self.end()
        words = [sys.executable, "-m", "litgpt", *argv, "--port", str(self.port)] if program == "litgpt" else [sys.executable, *argv]
        environment = {**os.environ, **variables}
        with open("server.log", "wb") as log:
            self.process = subprocess.Popen(words, env=environment, start_new_session=True, stdout=log, stderr=log)
        self.line, deadline = line, time.monotonic() + 300
        while not self.is_ready(READY[program]):
            assert self.process.poll() is None and time.monotonic() < deadline, f"{line} is not ready: {self.log}"
            time.sleep(0.1)

    def is_ready(self, path: str) -> bool:
        with suppress(OSError, urllib.error.URLError):
            return urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5).status == 200
        return False

    @property
    def log(self) -> str:
        with open("server.log", errors="replace") as log:
            return log.read()

    def end(self) -> None:
        """End the server, ours as by Ctrl-C, which it has to obey in peace."""
        if self.process is not None and self.line.startswith("litgpt"):
            self.process.send_signal(signal.SIGINT)
            assert self.process.wait(60) == 0, f"{self.line} ended with {self.process.returncode}: {self.log}"
        self.kill()

    def kill(self) -> None:
        """Leave nothing of the server behind."""
        process, self.process = self.process, None
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_shell(line: str) -> str | None:
    """Return what is wrong about a line that other programs than ours run, or None if nothing is, or the program is not installed."""
    program = line.split()[0]
    if shutil.which(program) is None:
        return None
    line = line.replace("curl", "curl --silent --show-error --fail-with-body", 1) if program == "curl" else line
    done = subprocess.run(["bash", "-e", "-o", "pipefail", "-c", line], capture_output=True, text=True, timeout=120)
    return None if done.returncode == 0 else done.stdout + done.stderr
