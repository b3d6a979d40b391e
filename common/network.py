"""Downloads of weights: within seconds it is clear whether there is a network."""

from __future__ import annotations

import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

LOCAL_WEIGHTS = (
    "give a local weights file instead of the tag (--weights FILE, or weights: FILE in a recipe), or HF_ENDPOINT for "
    "a mirror"
)
SECONDS = 8
"""How long the hub may take to answer; asking also finds the name's address, which has no limit of its own."""


@contextmanager
def downloads(what: str, mend: str) -> Iterator[None]:
    """A block that may download ``what`` from the model hub; without a network, only what is cached.

    ValueError: no network, and not cached, with ``mend``: what serves instead.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or reachable():
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    except Exception as error:  # whatever the libraries between make of it
        raise ValueError(f"{what} cannot be downloaded: {hub()} does not answer; {mend}") from error
    finally:
        constants.HF_HUB_OFFLINE = False


def hub() -> str:
    """The address of the model hub, or of its mirror."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def reachable(seconds: float = SECONDS) -> bool:
    """Whether the hub answers in time, through the proxies of the environment."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(hub(), method="HEAD"), timeout=seconds).close()
            answers.append(True)
        except urllib.error.HTTPError:
            answers.append(True)  # it said no, but it was there
        except (OSError, ValueError):
            answers.append(False)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    return bool(answers and answers[0])
