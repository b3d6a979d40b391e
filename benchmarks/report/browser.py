"""A headless Chromium driven over two pipes by its DevTools protocol: what the report page is tested with.

No driver and no package: messages are JSON that ends with a zero byte, written to the browser's file descriptor 3 and
read from its 4.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE = 120.0
"""Seconds to wait for an answer before the browser counts as stuck; a busy machine starts it slowly."""
KEYS = {"Tab": 9, "Enter": 13, "PageUp": 33, "PageDown": 34, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}
"""Keys that ``Tab.press`` knows, with their codes."""
_FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    "--no-first-run",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)


def chromium() -> str:
    """The browser's program: $CHROMIUM, or the first that is installed. ValueError: none is."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        raise ValueError(f"none of {', '.join(NAMES)} is installed; apt-get install chromium, or set CHROMIUM")
    return found


class Browser:
    """A running Chromium with an empty profile; use it in a ``with``."""

    def __init__(self) -> None:
        self._profile = tempfile.mkdtemp(prefix="effclip-browser-")
        self._log = Path(self._profile) / "log"
        (its_in, self._to), (self._from, its_out) = os.pipe(), os.pipe()
        # Above 4, so that putting one in its place cannot overwrite the other.
        its = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (its_in, its_out)]
        # Chromium has no sandbox for root, whom containers run as; it opens files of ours alone.
        flags = [*_FLAGS, f"--user-data-dir={self._profile}", *["--no-sandbox"] * (os.geteuid() == 0)]
        files = [
            (os.POSIX_SPAWN_OPEN, 2, str(self._log), os.O_WRONLY | os.O_CREAT, 0o600),
            (os.POSIX_SPAWN_DUP2, its[0], 3),
            (os.POSIX_SPAWN_DUP2, its[1], 4),
        ]
        program = chromium()
        self._pid = os.posix_spawn(program, [program, *flags, "about:blank"], os.environ, file_actions=files)
        for end in (its_in, its_out, *its):
            os.close(end)
        self._read, self._number = b"", 0
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError, TimeoutError, RuntimeError):
            self.call("Browser.close")
        os.close(self._to)
        os.close(self._from)
        until = time.monotonic() + 10
        while os.waitpid(self._pid, os.WNOHANG) == (0, 0):
            if time.monotonic() > until:
                os.kill(self._pid, signal.SIGKILL)
            select.select([], [], [], 0.05)
        shutil.rmtree(self._profile, ignore_errors=True)

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result; what happens meanwhile goes to ``events``.

        RuntimeError: the browser refuses, or has ended.  TimeoutError: no answer.
        """
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {} if session is None else {"sessionId": session}
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        for answer in self._messages():
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self.events.append(answer)
        raise AssertionError("messages end by an error only")

    def wait(self, event: str, session: str) -> None:
        """Wait for an event of a session that did not happen before. TimeoutError: it does not happen."""
        for message in self._messages():
            self.events.append(message)
            if message.get("method") == event and message.get("sessionId") == session:
                return

    def _messages(self) -> Iterator[dict[str, Any]]:
        until = time.monotonic() + PATIENCE
        while True:
            while b"\0" not in self._read:
                ready, _, _ = select.select([self._from], [], [], max(0.0, until - time.monotonic()))
                if not ready:
                    raise TimeoutError(f"the browser did not answer within {PATIENCE:g} s")
                part = os.read(self._from, 1 << 20)
                if not part:
                    raise RuntimeError(f"the browser ended: {self._log.read_text(errors='replace')[-1000:]}")
                self._read += part
            message, _, self._read = self._read.partition(b"\0")
            yield json.loads(message)

    def open(self, page: Path, width: int = 1200, height: int = 900, *, phone: bool = False, dark: bool = False) -> Tab:
        """A tab that has loaded a file. width, height: of its window in CSS pixels; phone: by touch, two dots each."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        tab = Tab(self, self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        size = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        tab.call("Emulation.setDeviceMetricsOverride", **size)
        tab.call("Emulation.setEmulatedMedia", features=[scheme])
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            tab.call(f"{domain}.enable")
        tab.call("Page.navigate", url=page.absolute().as_uri())
        self.wait("Page.loadEventFired", tab.session)
        return tab


class Tab:
    """One loaded page."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session = browser, session

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A method of the protocol, on this page."""
        return self.browser.call(method, self.session, **parameters)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives, as plain values. RuntimeError: it throws."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']['exception']['description']}")
        return found["result"].get("value")

    def press(self, key: str, times: int = 1) -> None:
        """Press a key as a person does; see KEYS."""
        written = {"text": "\r"} if key == "Enter" else {}  # buttons act on what a key writes
        for _ in range(times):
            for kind, more in (("keyDown" if written else "rawKeyDown", written), ("keyUp", {})):
                named = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
                self.call("Input.dispatchKeyEvent", type=kind, **named, **more)

    def accessible(self, role: str) -> list[dict[str, Any]]:
        """What assistive technology is told of the elements with a role: each one's name, value and description."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        shown = [node for node in nodes if not node["ignored"] and node.get("role", {}).get("value") == role]
        told = ("name", "value", "description")
        return [{part: node.get(part, {}).get("value", "") for part in told} for node in shown]

    def troubles(self) -> list[str]:
        """What the page complained of, and what it asked any other place for."""
        own = [event for event in self.browser.events if event.get("sessionId") == self.session]
        said = [event["params"]["entry"]["text"] for event in own if event["method"] == "Log.entryAdded"]
        said += [str(event["params"]) for event in own if event["method"] == "Runtime.exceptionThrown"]
        asked = [event["params"]["request"]["url"] for event in own if event["method"] == "Network.requestWillBeSent"]
        return said + [url for url in asked if not url.startswith(("file:", "data:"))]

    def screenshot(self, file: Path) -> None:
        """What the window shows, as PNG."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
