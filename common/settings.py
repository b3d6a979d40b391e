"""Two configurations side by side."""

from __future__ import annotations

from typing import Any


def flattened(settings: Any, prefix: str = "") -> dict[str, Any]:
    """{"model.init_args.learning_rate": 0.001, ...}: the leaves of nested dicts by their dotted names."""
    if not isinstance(settings, dict) or not settings:
        return {prefix: settings}
    leaves: dict[str, Any] = {}
    for name, value in settings.items():
        leaves |= flattened(value, f"{prefix}.{name}" if prefix else str(name))
    return leaves


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Every setting whose value differs, "NAME was VALUE, is VALUE"; one that is missing counts as None."""
    old, new = flattened(before), flattened(now)
    return [
        f"{name} was {old.get(name)!r}, is {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
