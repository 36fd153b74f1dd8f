"""A hub that is down, silent or refuses: a one-line error after a limited time."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from configs import UserError
from configs.schema import SourceConfig
from data.corpus.hub import commit_of
from data.source_files import SourceKeys
from interop.source import download

KEYS = SourceKeys("data.sources[1].", "data.sources[1].path")

ASKS: dict[str, tuple[Callable[[], object], str]] = {
    "model": (
        lambda: download("somebody/it", "v1"),
        "source=somebody/it is not a folder, and ",
    ),
    "dataset": (
        lambda: commit_of(SourceConfig(source="hub", path="somebody/it"), KEYS),
        r"data\.sources\[1\]\.path='somebody/it' cannot be read: ",
    ),
}
ask = pytest.mark.parametrize("asked", ASKS)


@pytest.fixture(autouse=True)
def _empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))


@contextmanager
def hub(status: int, error_code: str) -> Iterator[str]:
    """Run a hub that gives this answer to every request."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # the name that http.server calls
            self.send_response(status)
            self.send_header("X-Error-Code", error_code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def refused(asked: str, endpoint: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a request ends in a one-line error."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    call, beginning = ASKS[asked]
    with pytest.raises(UserError, match=beginning + message) as caught:
        call()
    assert "\n" not in str(caught.value)


@ask
@pytest.mark.timeout(900)
def test_a_hub_that_never_answers(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system accepts connections for a listening socket."""
    monkeypatch.setattr("data.corpus.hub._TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        refused(
            asked, endpoint, rf"the hub at {endpoint} cannot be reached \(.*imeout", monkeypatch
        )


@ask
def test_a_network_that_is_down(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens on the port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
    message = rf"the hub at {endpoint} cannot be reached \(.*refused\); check the network"
    refused(asked, endpoint, message, monkeypatch)


@ask
def test_a_network_that_is_switched_off(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(asked, "http://127.0.0.1:1", "it is not cached, and HF_HUB_OFF", monkeypatch)


@ask
@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", "the hub has no such repository, or it is private"),
        (404, "RevisionNotFound", "the hub has it, but not this revision"),
        (403, "GatedRepo", "the hub requires access to it"),
        (500, "", r"the hub at \S+ answers with an error \(HTTPStatusError: .*500"),
    ],
)
def test_a_hub_that_refuses(
    asked: str, status: int, code: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub(status, code) as endpoint:
        refused(asked, endpoint, message, monkeypatch)


def test_an_invalid_repository_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"is not a folder, and it is not a valid repository name"):
        download("no folder, no name", None)
