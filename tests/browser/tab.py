"""What a person does with an open page and meets there: keys, what assistive technology reads, and errors."""

from typing import Any

from benchmarks.report.browser import Tab

KEYS = {"Tab": 9, "Enter": 13, "PageUp": 33, "PageDown": 34, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}
"""The keys of ``press`` with their codes."""


def press(tab: Tab, key: str, times: int = 1) -> None:
    """Press a key as a person does; see KEYS."""
    written = {"text": "\r"} if key == "Enter" else {}  # buttons act on what a key writes
    for _ in range(times):
        for kind, more in (("keyDown" if written else "rawKeyDown", written), ("keyUp", {})):
            named = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
            tab.call("Input.dispatchKeyEvent", type=kind, **named, **more)


def accessible(tab: Tab, role: str) -> list[dict[str, Any]]:
    """Name, value and description of the elements with a role, as assistive technology reads them."""
    nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
    shown = [node for node in nodes if not node["ignored"] and node.get("role", {}).get("value") == role]
    parts = ("name", "value", "description")
    return [{part: node.get(part, {}).get("value", "") for part in parts} for node in shown]


def troubles(tab: Tab) -> list[str]:
    """The page's logged errors and exceptions, and the network addresses that it requested."""
    params: dict[str, list[Any]] = {}
    for event in tab.browser.events:
        if event.get("sessionId") == tab.session:
            params.setdefault(event["method"], []).append(event["params"])
    errors = [param["entry"]["text"] for param in params.get("Log.entryAdded", [])]
    errors += [str(param) for param in params.get("Runtime.exceptionThrown", [])]
    requested = [param["request"]["url"] for param in params.get("Network.requestWillBeSent", [])]
    return errors + [url for url in requested if not url.startswith(("file:", "data:"))]
