"""A stand-in for the server of wandb 0.31, on this machine: as little of it as its client needs.

Found by writing down what the client (wandb-core) asks for. Runs are kept by their id as the real
server would have them: history by line, summary, configuration, files. Artifacts are declined,
which costs the client nothing but a line in its log: a table is a file of the run as well.
"""

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

KEY = "local" + 35 * "0"  # any forty characters


@dataclass
class StoredRun:
    """What the server has of a run."""

    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    exit_code: int | None = None

    @property
    def steps(self) -> list[int]:
        """Of each row, in the order of the history."""
        return [row["step"] for row in self.history]


class WandbServer(ThreadingHTTPServer):
    """Answers at `url` from `with serve() as server:` on."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.runs: dict[str, StoredRun] = {}
        self.requests: list[str] = []  # everything that anyone has said to it
        self.answers = True
        self.stops = False  # whether somebody has pressed the run's stop button
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up, or is killed, is not worth a word."""

    def graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The answer to one query."""
        kind = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name = kind.group(1) if kind else query
        run = self.runs.get(variables.get("name", ""))
        project = {"id": "P", "name": variables.get("project"), "entity": {"id": "E", "name": "me"}}
        if name == "Viewer":
            user = {"id": "U", "entity": "me", "username": "me", "email": "", "flags": "{}"}
            return {"data": {"viewer": {**user, "teams": {"edges": []}}}}
        if name == "RunResumeStatus":
            bucket = run and _as_resumed(variables["name"], run)
            return {"data": {"model": {**project, "bucket": bucket}}}
        if name == "UpsertBucket":
            is_new = run is None
            run = self.runs.setdefault(variables["name"], StoredRun())
            if variables["config"]:
                run.config = json.loads(variables["config"])
            bucket = {
                "description": None,
                "sweepName": None,
                "id": f"ID-{variables['name']}",
                "name": variables["name"],
                "displayName": variables["displayName"],
                "config": json.dumps(run.config),
                "historyLineCount": len(run.history),
                "project": project,
            }
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": is_new}}}
        if name == "CreateRunFiles":
            place = f"{self.url}/upload/{variables['run']}"
            files = [{"name": file, "uploadUrl": f"{place}/{file}"} for file in variables["files"]]
            return {"data": {"createRunFiles": {"runID": "R", "uploadHeaders": [], "files": files}}}
        if name == "ArtifactType":  # of an artifact that is not there
            return {"data": {"project": {"artifact": None}}}
        return {"errors": [{"message": f"the stand-in has no {name}"}]}

    def file_stream(self, run: StoredRun, body: dict[str, Any]) -> None:
        """Rows and summary as they come, each with the line at which it begins."""
        for name, new in body.get("files", {}).items():
            lines = [json.loads(line) for line in new["content"]]
            if name == "wandb-history.jsonl":
                run.history[new["offset"] :] = lines
            elif name == "wandb-summary.json":
                run.summary = lines[-1]
        if body.get("complete"):
            run.exit_code = body["exitcode"]


def _as_resumed(name: str, run: StoredRun) -> dict[str, Any]:
    return {
        "id": f"ID-{name}",
        "name": name,
        "displayName": name,
        "summaryMetrics": json.dumps(run.summary),
        "historyLineCount": len(run.history),
        "logLineCount": 0,
        "eventsLineCount": 0,
        "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]),
        "eventsTail": "[]",
        "config": json.dumps(run.config),
        "tags": [],
        "notes": None,
        "wandbConfig": json.dumps({"t": 1}),  # says that the run has begun
    }


class _Handler(BaseHTTPRequestHandler):
    server: WandbServer
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode(
            "utf-8", "replace"
        )
        server = self.server
        with server.lock:
            server.requests.append(f"{self.command} {self.path}\n{self.headers}\n{body}")
        while not server.answers:
            time.sleep(0.1)
        answer: dict[str, Any] = {}
        with server.lock:
            if self.path == "/graphql":
                asked = json.loads(body)
                answer = server.graphql(asked["query"], asked.get("variables") or {})
            elif stream := re.fullmatch(r"/files/me/[^/]+/([^/]+)/file_stream", self.path):
                server.file_stream(server.runs[stream.group(1)], json.loads(body))
                answer = {"stopped": server.stops}
            elif upload := re.fullmatch(r"/upload/([^/]+)/(.+)", self.path):
                server.runs[upload.group(1)].files[upload.group(2)] = body
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = _answer  # noqa: N815 - names that http.server asks for

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: stderr is the tests'."""


@contextmanager
def serve() -> Iterator[WandbServer]:
    """A server in a thread of this process; within it, `server.url` answers."""
    server = WandbServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.answers = True
        server.shutdown()
        server.server_close()
        thread.join()


def logs(folder: Path) -> list[Path]:
    """The files that wandb has left, one a launch, the oldest first."""
    return sorted(
        folder.glob("wandb/*run-*/run-*.wandb"), key=lambda log: log.parent.name.split("run-")[1]
    )


def records(log: Path, kind: str) -> list[Any]:
    """What is in one, as far as wandb itself can read it."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    return [line[kind] for line in lines if line["type"] == kind]


def sync(folder: Path, *options: str) -> None:
    """Send what is there to the server, as a person does it."""
    command = [sys.executable, "-m", "wandb", "sync", "--yes", *options, str(folder / "wandb")]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=60, cwd=folder)
