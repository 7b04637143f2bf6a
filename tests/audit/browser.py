"""A headless Chromium, spoken to through the pipe that its DevTools protocol offers."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# How long a condition may take to become true in the page, and any answer of the browser.
_CONDITION, _ANSWER = 60.0, 120.0


class Page:
    """One tab: what it logged and asked for is kept."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._session: str | None = None
        self._count, self._buffer = 0, b""
        self.events: list[dict[str, Any]] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.send("Page.setLifecycleEventsEnabled", enabled=True)
        # The page has the focus, whatever else the machine shows.
        self.send("Emulation.setFocusEmulationEnabled", enabled=True)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._count:
                assert "error" not in answer, (method, parameters, answer)
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _receive(self) -> dict[str, Any]:
        end = time.monotonic() + _ANSWER
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], max(end - time.monotonic(), 0))
            assert ready, "the browser does not answer"
            data = os.read(self._answers, 1 << 20)
            assert data, "the browser has ended"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def size(self, width: int, height: int, phone: bool = False) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)

    def open(self, path: Path) -> None:
        """Go to a page and wait until it, and no page before it, has loaded."""
        self.events.clear()
        loader = self.send("Page.navigate", url=path.as_uri())["loaderId"]
        loaded = {"name": "load", "loaderId": loader}
        while not any(loaded.items() <= event.get("params", {}).items() for event in self.events):
            self.events.append(self._receive())

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def expect(self, expression: str, value: Any) -> None:
        """Wait until a JavaScript expression has a value."""
        found = self.run(f"""new Promise(done => {{
            const end = performance.now() + {1000 * _CONDITION};
            const look = () => {{
                const found = {expression};
                if (JSON.stringify(found) === {json.dumps(json.dumps(value, separators=(",", ":"), ensure_ascii=False))}
                    || performance.now() > end) done(found);
                else setTimeout(look, 10);
            }};
            look();
        }})""")
        assert found == value, f"{expression} is {found!r}, not {value!r}"

    def press(self, key: str) -> None:
        code = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        shared = {"key": key, "windowsVirtualKeyCode": code.get(key, 0)}
        self.send("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **shared)
        self.send("Input.dispatchKeyEvent", type="keyUp", **shared)

    def type(self, text: str) -> None:
        self.send("Input.insertText", text=text)

    def choose(self, identity: str, value: str) -> None:
        """Set a control as a user would: its value, and the event that tells of it."""
        self.run(
            f"(() => {{ const control = document.getElementById({identity!r}); control.value = {value!r};"
            "control.dispatchEvent(new Event('input', {bubbles: true})); })()"
        )

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, and uncaught exceptions, since the page was opened."""
        self.run("1")
        found = []
        for event in self.events:
            method, parameters = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                found.append(json.dumps(parameters["exceptionDetails"]))
            elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
                found.append(parameters["entry"]["text"])
            elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
                found.append(json.dumps(parameters["args"]))
        return found

    def requests(self) -> list[str]:
        """Addresses that were asked for, embedded data left out."""
        self.run("1")
        sent = (event["params"]["request"]["url"] for event in self.events if event.get("method") == _SENT)
        return [url for url in sent if not url.startswith("data:")]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))


_SENT = "Network.requestWillBeSent"


@contextmanager
def browse(profile: Path) -> Iterator[Page]:
    """A browser with a fresh profile, ended afterwards."""
    assert CHROMIUM is not None, "there is no Chromium on this machine"
    command_read, command_write = os.pipe()
    answer_read, answer_write = os.pipe()
    # Chromium reads commands at 3 and writes answers at 4; none of the pipes may lie there itself.
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (command_read, answer_write)]

    def into_place() -> None:
        os.dup2(high[0], 3)
        os.dup2(high[1], 4)

    # Shared memory is scarce in containers, and a tab that runs out of it ends.
    quiet = ("--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--hide-scrollbars")
    options = ("--headless", "--no-sandbox", *quiet)
    process = subprocess.Popen(
        [CHROMIUM, *options, "--remote-debugging-pipe", f"--user-data-dir={profile}"],
        close_fds=False,
        preexec_fn=into_place,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for end in (command_read, answer_write, *high):
        os.close(end)
    try:
        yield Page(command_write, answer_read)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(command_write)
        os.close(answer_read)
