"""Downloads that are continued, checked, and there whole or not at all."""

import errno
import hashlib
import json
import multiprocessing
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from litgpt.data import download
from litgpt.data.download import download_if_missing
from litgpt.errors import UserError

CONTENTS = json.dumps([{"instruction": f"Say {i}.", "input": "", "output": str(i)} for i in range(10_000)]).encode()
MIDDLE = 200_000  # bytes


class Server(ThreadingHTTPServer):
    """Serves one file, in the ways that servers do.

    Attributes:
        contents: What it serves.
        tag: Names the version of that; None does not.
        ranges: Whether parts are served.
        span: How the part that is served is described, by its start and all bytes.
        skipped: How many bytes a part begins too late.
        says_length: Whether the length is announced.
        cuts: The connections that are broken in the middle, from now on.
        asked: The `Range` header of each request, or None.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.contents, self.tag, self.ranges, self.says_length, self.cuts, self.asked = CONTENTS, '"1"', True, True, 0, []
        self.span, self.skipped = "bytes {}-{}/{}", 0
        self.url = f"http://127.0.0.1:{self.server_port}/file"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_GET(self):
        server = self.server
        server.asked.append(self.headers.get("Range"))
        if self.path == "/missing":
            self.send_error(404)
            return
        span = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "") if server.ranges else None
        start = int(span[1]) + server.skipped if span and self.headers.get("If-Range") == server.tag else 0
        body = server.contents[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", server.span.format(start, len(server.contents) - 1, len(server.contents)))
        if server.tag:
            self.send_header("ETag", server.tag)
        if server.says_length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        server.cuts -= 1
        self.wfile.write(body[:MIDDLE] if server.cuts >= 0 else body)


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "data" / "file.json"


def left_beside(target: Path) -> set[str]:
    return {path.name for path in target.parent.iterdir()} - {download.LOCK, target.name}


class Killed(BaseException):
    """Stands for the end of the process: no code of ours catches it."""


def die_after(n_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next download end as if its process were killed once so many bytes are written."""

    @contextmanager
    def counting(name, size, done):
        def advance(more):
            nonlocal done
            done += more
            if done >= n_bytes:
                raise Killed

        yield advance

    monkeypatch.setattr(download, "progress", counting)


def test_a_file_is_downloaded_once(target, server):
    for _ in range(2):
        download_if_missing(target, server.url)
        assert target.read_bytes() == CONTENTS
    assert server.asked == [None] and not left_beside(target)


def test_a_broken_connection_is_continued_at_once(target, server):
    server.cuts = 2
    download_if_missing(target, server.url)
    assert target.read_bytes() == CONTENTS and not left_beside(target)
    assert server.asked == [None, f"bytes={MIDDLE}-", f"bytes={2 * MIDDLE}-"]


def test_what_a_killed_process_has_downloaded_is_not_downloaded_again(target, server, monkeypatch):
    with monkeypatch.context() as dying:
        die_after(100_000, dying)
        with pytest.raises(Killed):
            download_if_missing(target, server.url)
    assert not target.exists() and len(left_beside(target)) == 2
    download_if_missing(target, server.url)
    first, second = server.asked
    assert first is None and int(second.removeprefix("bytes=").removesuffix("-")) >= 100_000
    assert target.read_bytes() == CONTENTS and not left_beside(target)


def test_a_process_that_is_killed_before_the_last_step_leaves_nothing_to_download(target, server, monkeypatch):
    with monkeypatch.context() as dying:
        die_after(len(CONTENTS), dying)
        with pytest.raises(Killed):
            download_if_missing(target, server.url)
    download_if_missing(target, server.url)
    assert server.asked == [None] and target.read_bytes() == CONTENTS


@pytest.mark.parametrize("change", ["other contents", "other address", "no ranges", "damaged note"])
def test_a_part_of_another_version_is_never_continued(target, server, monkeypatch, change):
    with monkeypatch.context() as dying:
        die_after(100_000, dying)
        with pytest.raises(Killed):
            download_if_missing(target, server.url)
    url = server.url
    if change == "other contents":
        server.contents, server.tag = CONTENTS.replace(b"Say", b"Sing"), '"2"'
    elif change == "other address":
        url += "?other"
        server.contents = CONTENTS.replace(b"Say", b"Sing")
    elif change == "no ranges":
        server.ranges = False
    else:
        next(target.parent.glob("*.json")).write_text('{"url": ')
    download_if_missing(target, url)
    assert target.read_bytes() == server.contents and not left_beside(target)


def test_a_part_of_which_the_server_does_not_say_the_whole_is_continued(target, server):
    server.cuts, server.span = 1, "bytes {}-{}/*"
    download_if_missing(target, server.url)
    assert target.read_bytes() == CONTENTS and server.asked == [None, f"bytes={MIDDLE}-"]


@pytest.mark.parametrize("wrong", [{"skipped": 40}, {"span": "bytes {}-{}/7"}, {"span": "lines {}-{}/{}"}], ids=str)
def test_a_part_that_was_not_asked_for_is_never_taken_for_the_whole(tmp_path, server, wrong):
    """As JSON lines, some last lines of a file would be a file."""
    server.contents = b"\n".join(b'{"number": %06d}' % (i + 100_000) for i in range(20_000))
    server.cuts = 1
    vars(server).update(wrong)
    download_if_missing(tmp_path / "a.jsonl", server.url)
    assert (tmp_path / "a.jsonl").read_bytes() == server.contents
    assert server.asked == [None, f"bytes={MIDDLE}-", None]


def test_a_network_that_is_gone_is_not_the_disks_fault(target, server, monkeypatch):
    def gone(self, size):
        raise OSError(errno.EHOSTUNREACH, "No route to host")

    monkeypatch.setattr("http.client.HTTPResponse.read", gone)
    with pytest.raises(UserError, match="broke off after 0 of .* bytes .*No route to host.*Run the same command again"):
        download_if_missing(target, server.url)


@pytest.mark.parametrize("tag", [None, 'W/"1"'])
def test_without_a_tag_that_names_bytes_a_download_starts_over(target, server, tag):
    server.tag, server.cuts = tag, 1
    with pytest.raises(UserError, match=f"broke off after {MIDDLE} of {len(CONTENTS)} bytes") as caught:
        server.cuts = 2
        download_if_missing(target, server.url)
    assert "Run the same command again" in str(caught.value) and str(target) in str(caught.value) and server.url in str(caught.value)
    download_if_missing(target, server.url)
    assert target.read_bytes() == CONTENTS and set(server.asked) == {None}


def test_a_file_of_unknown_length_is_downloaded(target, server):
    server.says_length = False
    download_if_missing(target, server.url)
    assert target.read_bytes() == CONTENTS and not left_beside(target)


def test_a_file_of_unknown_length_that_is_cut_off_is_no_json(target, server):
    server.says_length, server.cuts = False, 1
    with pytest.raises(UserError, match="not valid JSON: it begins with"):
        download_if_missing(target, server.url)
    assert not target.exists() and not left_beside(target)


def test_a_page_in_the_place_of_a_file_is_refused(tmp_path, server):
    server.contents = b"<!DOCTYPE html><p>Log in first."
    for name, kind in (("a.json", "JSON"), ("a.jsonl", "JSON lines")):
        with pytest.raises(UserError, match=f"not valid {kind}: it begins with '<!DOCTYPE html>"):
            download_if_missing(tmp_path / name, server.url)
    download_if_missing(tmp_path / "a.html", server.url)
    server.contents = b'{"a": 1}\n\n{"a": 2}\n'
    download_if_missing(tmp_path / "a.jsonl", server.url)
    assert {path.name for path in tmp_path.iterdir()} - {download.LOCK} == {"a.html", "a.jsonl"}


def test_a_wrong_checksum_is_refused_and_a_right_one_is_not(target, server):
    with pytest.raises(UserError, match="its SHA-256 is .*, not 0000") as caught:
        download_if_missing(target, server.url, sha256="0" * 64)
    assert not target.exists() and not left_beside(target) and server.url in str(caught.value)
    download_if_missing(target, server.url, sha256=hashlib.sha256(CONTENTS).hexdigest().upper())
    assert target.read_bytes() == CONTENTS


def test_a_file_that_the_server_lacks_is_one_sentence(target, server):
    with pytest.raises(UserError, match="answers 404") as caught:
        download_if_missing(target, server.url.replace("file", "missing"))
    assert str(target) in str(caught.value) and not left_beside(target)


def test_an_address_where_nobody_answers_is_one_sentence(target, server):
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=f"cannot be downloaded.*Check the network. Or save it yourself as {target}."):
        download_if_missing(target, server.url)


def test_two_processes_that_want_a_file_download_it_once(target, server):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=download_if_missing, args=(target, server.url)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert server.asked == [None] and target.read_bytes() == CONTENTS


def test_a_local_file_may_be_the_source(tmp_path):
    (tmp_path / "source.json").write_bytes(CONTENTS)
    download_if_missing(tmp_path / "file.json", (tmp_path / "source.json").as_uri())
    assert (tmp_path / "file.json").read_bytes() == CONTENTS
    with pytest.raises(UserError, match="cannot be downloaded"):
        download_if_missing(tmp_path / "other.json", (tmp_path / "nowhere.json").as_uri())


def test_what_is_no_address_is_refused(target):
    with pytest.raises(UserError, match="must begin with https or http or file"):
        download_if_missing(target, "alpaca.json")
    assert not target.parent.exists()


def test_a_name_that_is_too_long_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="its .* characters are more than a name may have"):
        download_if_missing(tmp_path / ("a" * 300) / "file.json", "https://example.com/file.json")


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "source.json").write_bytes(CONTENTS)
    with pytest.raises(UserError, match="could not be written: .*Choose another"):
        download_if_missing(tmp_path / "source.json" / "file.json", (tmp_path / "source.json").as_uri())
