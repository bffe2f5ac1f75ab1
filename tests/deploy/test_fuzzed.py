"""Requests that nobody would write never break the server. The long run is in `tests/stress/test_serving.py`."""

import pytest
from deploy.process import TERM, make_endless, served

pytest.importorskip("schemathesis")

from deploy import fuzzing


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzzed")
    with served(make_endless(folder / "model"), folder, "--max_length", 64, "--max_rows", 4) as server:
        yield server
        server.wait_until_idle()
        server.signal(TERM)
        assert server.exit_code() == 0
        assert "Traceback" not in server.errors


def test_requests_drawn_from_the_description_are_answered_as_it_says(server):
    seen = fuzzing.fuzz_schema(server, n=8)
    assert seen[200] > 5 and seen[400] > 5


def test_spoiled_requests_are_answered_with_a_sentence(server):
    seen = fuzzing.fuzz_bodies(server, n=200)
    assert seen[200] > 5 and seen[400] > 20


def test_odd_paths_and_headers_reach_nothing(server):
    seen = fuzzing.fuzz_paths(server, n=200)
    assert {200, 400, 403, 404, 405} <= seen.keys()
