"""Headless Chromium by its DevTools protocol: open a page, run JavaScript in it, take pictures."""

import asyncio
import base64
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
    "--no-first-run",
    "about:blank",
)


def executable() -> str | None:
    """Path of a Chromium, or None."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Tab:
    """One page. `errors` has what its console and its exceptions said."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse):
        self._socket, self._ids = socket, count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self.errors: list[str] = []
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for message in self._socket:
            body = json.loads(message.data)
            if (answer := self._answers.pop(body.get("id"), None)) is not None:
                answer.set_result(body)
            elif body.get("method") == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(body["params"]["exceptionDetails"]))
            elif body.get("method") == "Log.entryAdded":
                self.errors.append(body["params"]["entry"]["text"])

    async def send(self, method: str, **params: Any) -> Any:
        id, answer = next(self._ids), asyncio.get_running_loop().create_future()
        self._answers[id] = answer
        await self._socket.send_str(json.dumps({"id": id, "method": method, "params": params}))
        body = await asyncio.wait_for(answer, 60)
        assert "error" not in body, body
        return body["result"]

    async def open(self, url: str) -> None:
        for domain in ("Page", "Runtime", "Log"):
            await self.send(f"{domain}.enable")
        await self.send("Emulation.setFocusEmulationEnabled", enabled=True)
        await self.send("Page.navigate", url=url)

    async def run(self, code: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        result = await self.send(
            "Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    async def until(self, code: str, timeout_s: float = 20.0) -> Any:
        """The value of an expression once it is true, as the page sees every 10 ms."""
        # An element has no value outside the page: it counts as true.
        value = f"const value = {code}; return value instanceof Node || value"
        look = f"const look = () => {{ try {{ {value} }} catch {{}} }}"
        again = "const found = look(); found ? done(found) : setTimeout(again, 10)"
        promise = f"new Promise(done => {{ {look}; const again = () => {{ {again} }}; again() }})"
        try:
            return await asyncio.wait_for(self.run(promise), timeout_s)
        except TimeoutError:
            text = await self.run("document.body.innerText")
            raise AssertionError(f"never true: {code}\n{text}\n{self.errors}") from None

    async def size(self, width: int, height: int, dark: bool = False, still: bool = False) -> None:
        await self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        features = [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce" if still else "no-preference"},
        ]
        await self.send("Emulation.setEmulatedMedia", features=features)

    async def press(self, key: str, code: int = 0, text: str = "") -> None:
        named = {"key": key, "code": key, "windowsVirtualKeyCode": code, "text": text}
        await self.send("Input.dispatchKeyEvent", type="keyDown", **named)
        await self.send("Input.dispatchKeyEvent", type="keyUp", **{**named, "text": ""})

    async def picture(self, file: Path, whole: bool = False) -> None:
        shot = await self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(shot["data"]))


class Browser:
    """A Chromium that runs until `close`."""

    def __init__(self) -> None:
        self._home = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        folder = self._home.name  # its crash reporter needs a home, too
        self._process = subprocess.Popen(
            [str(executable()), f"--user-data-dir={folder}", *FLAGS],
            env={**os.environ, "HOME": folder},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stderr is not None
        listening = (re.search(r"ws://([\d.:]+)/", line) for line in self._process.stderr)
        self._at = next(f"http://{found[1]}" for found in listening if found)
        threading.Thread(target=self._process.stderr.read, daemon=True).start()

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(20)
        self._home.cleanup()

    @asynccontextmanager
    async def tab(
        self, url: str, width: int = 1280, height: int = 800, **media: bool
    ) -> AsyncIterator[Tab]:
        """A new tab at `url`, with a session storage of its own; `media` as in `Tab.size`."""
        async with aiohttp.ClientSession() as session:
            async with session.put(f"{self._at}/json/new?about:blank") as answer:
                target = await answer.json()
            socket_url = target["webSocketDebuggerUrl"]
            async with session.ws_connect(socket_url, max_msg_size=2**26) as socket:
                tab = Tab(socket)
                await tab.size(width, height, **media)
                await tab.open(url)
                yield tab
                await tab.send("Page.close")
