"""Drives a headless Chromium by its DevTools protocol, to photograph and test the report page.

It needs no driver and no package: each message is JSON that ends with a zero byte, written to the browser's file
descriptor 3 and read from its 4.
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
"""Seconds to wait for an answer; on a busy machine the browser starts slowly."""
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
    """The path of the browser: $CHROMIUM, or the first of NAMES that is installed. ValueError: none is."""
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        raise ValueError(f"none of {', '.join(NAMES)} is installed; apt-get install chromium, or set CHROMIUM")
    return program


class Browser:
    """A running Chromium with an empty profile; a context manager."""

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
        """Call a method of the protocol and return its result; events meanwhile are appended to ``events``.

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
        """Wait for a new event of a session. TimeoutError: it does not happen."""
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
        """A tab with a loaded file. width, height: of its window in CSS pixels. phone: touch, two dots a pixel."""
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
        """The value of a JavaScript expression, as plain values. RuntimeError: it throws."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']['exception']['description']}")
        return answer["result"].get("value")

    def screenshot(self, file: Path) -> None:
        """Write the visible part of the page as PNG."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
