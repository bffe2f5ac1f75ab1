import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from litgpt.data import Alpaca
from litgpt.data.alpaca import download_if_missing
from litgpt.errors import UserError

RECORDS = json.dumps([{"instruction": f"Say {i}.", "input": "", "output": str(i)} for i in range(10)]).encode()


class Server(BaseHTTPRequestHandler):
    """Serves the records whole, cut off, or not at all."""

    def do_GET(self):
        self.server.n_requests += 1
        if self.path == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(RECORDS)))
        self.end_headers()
        self.wfile.write(RECORDS[:50] if self.path == "/cut" else RECORDS)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.n_requests = 0
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def url(server, path):
    return f"http://127.0.0.1:{server.server_port}{path}"


def test_the_data_is_downloaded_once_and_split(tmp_path, server, tokenizer):
    for _ in range(2):
        data = Alpaca(download_dir=tmp_path / "data", file_url=url(server, "/whole"), val_split_fraction=0.2, prompt_style="alpaca")
        data.connect(tokenizer, batch_size=2, max_seq_length=300)
        data.prepare_data()
        data.setup()
        assert (len(data.train_dataset), len(data.val_dataset)) == (8, 2)
    assert server.n_requests == 1
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["alpaca_data_cleaned_archive.json"]


@pytest.mark.parametrize("path, message", [("/missing", "answers 404"), ("/cut", "broke off after 50 of")])
def test_a_failed_download_names_address_and_way_out_and_leaves_nothing(tmp_path, server, path, message):
    target = tmp_path / "data" / "file.json"
    with pytest.raises(UserError) as caught:
        download_if_missing(target, url(server, path))
    assert message in str(caught.value)
    assert url(server, path) in str(caught.value) and str(target) in str(caught.value)
    assert not (tmp_path / "data").exists() or list((tmp_path / "data").iterdir()) == []


def test_an_address_where_nobody_answers_is_one_sentence(tmp_path, server):
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="cannot be downloaded.*Check the network"):
        download_if_missing(tmp_path / "file.json", url(server, "/whole"))


def test_a_local_file_may_be_the_source(tmp_path):
    (tmp_path / "source.json").write_bytes(RECORDS)
    download_if_missing(tmp_path / "file.json", (tmp_path / "source.json").as_uri())
    assert (tmp_path / "file.json").read_bytes() == RECORDS
    with pytest.raises(UserError, match="cannot be downloaded"):
        download_if_missing(tmp_path / "other.json", (tmp_path / "nowhere.json").as_uri())


def test_what_is_no_address_is_refused(tmp_path):
    with pytest.raises(UserError, match="must begin with https or http or file"):
        download_if_missing(tmp_path / "file.json", "alpaca.json")


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "source.json").write_bytes(RECORDS)
    with pytest.raises(UserError, match="cannot be written"):
        download_if_missing(tmp_path / "source.json" / "file.json", (tmp_path / "source.json").as_uri())
