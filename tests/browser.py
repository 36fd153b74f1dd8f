"""A page in headless Chromium, for tests that need a browser; driven over its debugging protocol.

TensorBoard draws with WebGL, so without a GPU Chromium needs its software renderer.
"""

import asyncio
import base64
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
_PATIENCE_S = 60.0
_FLAGS = (
    "--headless=new",
    "--no-sandbox",  # containers have none
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--no-first-run",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
    "--window-size=1600,1000",
)


class Page:
    """An open page."""

    def __init__(self, address: str) -> None:
        self._address = address

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript is now; None if it fails."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        return answer["result"].get("value")

    def wait_for(self, expression: str, patience_s: float = _PATIENCE_S) -> None:
        """Until it is true."""
        deadline = time.monotonic() + patience_s
        while not self.value(expression):
            assert time.monotonic() < deadline, (expression, self.value("document.body.innerText"))
            time.sleep(0.5)

    def picture(self) -> bytes:
        """A PNG of what is in view."""
        return base64.b64decode(self._call("Page.captureScreenshot")["data"])

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return asyncio.run(_call(self._address, method, parameters))


async def _call(address: str, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(address, max_msg_size=0) as socket,
    ):
        await socket.send_json({"id": 1, "method": method, "params": parameters})
        while True:  # events come in between
            message = json.loads((await socket.receive(timeout=_PATIENCE_S)).data)
            if message.get("id") == 1:
                result: dict[str, Any] = message["result"]
                return result


async def _pages(port: int) -> list[dict[str, Any]]:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{port}/json/list") as answer,
    ):
        targets: list[dict[str, Any]] = await answer.json()
    return [target for target in targets if target["type"] == "page"]


@contextmanager
def browse(url: str) -> Iterator[Page]:
    """Open a page in a Chromium of its own."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", url],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            said = Path(profile, "DevToolsActivePort")
            deadline = time.monotonic() + _PATIENCE_S
            while not (said.exists() and "\n" in said.read_text()):
                assert process.poll() is None, f"Chromium ended with {process.returncode}"
                assert time.monotonic() < deadline, "Chromium has not started"
                time.sleep(0.1)
            (page,) = asyncio.run(_pages(int(said.read_text().splitlines()[0])))
            yield Page(page["webSocketDebuggerUrl"])
        finally:
            process.terminate()
            process.wait(timeout=_PATIENCE_S)
