"""A stand-in for the server of wandb 0.31 that answers the requests its client (wandb-core) makes.

Keeps runs by id as the real server would: history, summary, configuration, files.
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
    """The server's copy of a run."""

    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    exit_code: int | None = None

    @property
    def steps(self) -> list[int]:
        """Steps of the training rows, in the order of the history."""
        return [row["step"] for row in self.history if "train/loss" in row]


class WandbServer(ThreadingHTTPServer):
    """Answers at `url` inside `with serve() as server:`."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.runs: dict[str, StoredRun] = {}
        self.deleted: set[str] = set()  # ids that the server rejects for good
        self.requests: list[str] = []  # with headers and body
        self.answers = True
        self.stops = False  # whether someone has pressed the run's stop button
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that hang up or are killed."""

    def graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Answer one query."""
        kind = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name = kind.group(1) if kind else query
        run = self.runs.get(variables.get("name", ""))
        project = {"id": "P", "name": variables.get("project"), "entity": {"id": "E", "name": "me"}}
        if name == "Viewer":
            user = {"id": "U", "entity": "me", "username": "me", "email": "", "flags": "{}"}
            return {"data": {"viewer": {**user, "teams": {"edges": []}}}}
        if name == "RunResumeStatus":
            bucket = run and _resume_status(variables["name"], run)
            return {"data": {"model": {**project, "bucket": bucket}}}
        if name == "UpsertBucket":
            if variables["name"] in self.deleted:
                return {"errors": [{"message": "this run was deleted"}], "status": 409}
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
        return {"errors": [{"message": f"the stand-in does not implement {name}"}]}

    def file_stream(self, run: StoredRun, body: dict[str, Any]) -> None:
        """Store rows, which come with the line at which they begin, and the summary."""
        for name, new in body.get("files", {}).items():
            lines = [json.loads(line) for line in new["content"]]
            if name == "wandb-history.jsonl":
                run.history[new["offset"] :] = lines
            elif name == "wandb-summary.json":
                run.summary = lines[-1]
        if body.get("complete"):
            run.exit_code = body["exitcode"]


def _resume_status(name: str, run: StoredRun) -> dict[str, Any]:
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
        "wandbConfig": json.dumps({"t": 1}),  # marks the run as started
    }


class _Handler(BaseHTTPRequestHandler):
    server: WandbServer
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body, server = content.decode("utf-8", "replace"), self.server
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
        self.send_response(answer.pop("status", 200))
        content = json.dumps(answer).encode()
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = _answer  # noqa: N815 - names required by http.server

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: stderr belongs to the tests."""


@contextmanager
def serve() -> Iterator[WandbServer]:
    """Run a server in a thread of this process."""
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
    """Return the files that wandb has written, one per launch, oldest first."""
    return sorted(
        folder.glob("wandb/*run-*/run-*.wandb"), key=lambda log: log.parent.name.split("run-")[1]
    )


def records(log: Path, kind: str) -> list[Any]:
    """Return the records of one kind that wandb's own reader finds in a file."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    return [line[kind] for line in lines if line["type"] == kind]


def sync(folder: Path, *options: str) -> None:
    """Upload the files of a run folder with `wandb sync`."""
    command = [sys.executable, "-m", "wandb", "sync", "--yes", *options, str(folder / "wandb")]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300, cwd=folder)
