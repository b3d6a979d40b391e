"""Numbers that sentences of README and docs state are those of the stored results."""

import json
import re
from functools import cache

import pytest

from benchmarks import RESULTS, ROOT

README, WAVECLIP, PHOTOS = "README.md", "docs/waveclip.md", "docs/photos.md"


@cache
def stored(name):
    result = json.loads((RESULTS / f"{name}.json").read_text())
    return result["embedded"] if name == "table2" else result


def line(name, row, key="rows"):
    """The line of a result that has ``row`` as its name."""
    (found,) = [each for each in stored(name)[key] if row in (each.get("row"), each.get("method"), each.get("data"))]
    return found


def percent(value, decimals=1):
    return f"{100 * value:.{decimals}f}"


def named(row):
    """A row's accuracy on scenes of shape."""
    return percent(line("waveclip-shapes", row)["accuracy"][0])


def accuracy(row):
    """A row's accuracy on CIFAR-10, a fraction."""
    return line("photos-cifar10", row)["accuracy"]


def photos(row):
    return percent(accuracy(row))


def lost(row):
    """What a row on scenes of shape lies below its teacher."""
    return f"{-100 * line('waveclip-shapes', row)['difference'][0]:.1f}"


def saving(name, method, reference):
    """The saved share with its interval, in whole %, then the accuracy difference in points."""
    (found,) = [each for each in stored(name)["savings"] if (each["method"], each["reference"]) == (method, reference)]
    return [percent(value, 0) for value in found["saved"]] + [f"{100 * value:+.1f}" for value in found["difference"]]


def ladder(row):
    (shapes,) = [each for each in stored("embedded-reference")["ladders"] if each["revision"] == 2]
    return percent(next(each for each in shapes["rows"] if each["row"] == row)["accuracy"])


def gates(measure, gate):
    """The extremes of a gate's values over the four shares."""
    values = [at["means"][measure][gate][0] for at in stored("waveclip-gates")["shares"]]
    return [percent(min(values), 0), percent(max(values), 0)]


def led(gate):
    """The extremes of the margin's lead in pictures refined alike."""
    values = [at["leads"]["moved"][gate]["difference"][0] for at in stored("waveclip-gates")["shares"]]
    return [percent(min(values)), percent(max(values))]


def refined(gate):
    """The extremes of the shares that a common threshold refines of the sets, where 15 % are asked for."""
    rows = [row["refined"] for row in stored("waveclip-gates")["shares"][0]["rows"] if row["gate"] == gate]
    return [percent(min(rows), 0), percent(max(rows), 0)]


def gain(data):
    """What refining every picture gains."""
    return percent(line("waveclip-gates", data, "refining")["gain"][0])


def ends(row):
    return [f"{100 * value:+.1f}" for value in line("waveclip-shapes", row)["difference"]]


CASCADE, WAVE, LATER = "cascade of two CLIPs", "WaveCLIP", "WaveCLIP from the teacher trained on"
TRAINED_ON, HALF, COSINE = (
    "teacher, trained on",
    "half-resolution CLIP",
    "cosine distance alone, 100 % of the teacher's steps",
)
N = r"([+-]?\d+(?:\.\d+)?)"
STATED = [
    (README, f"half the resolution names {N} % after as many", lambda: [named(HALF)]),
    (README, f"the teacher trained on {N} %. Fine tokens", lambda: [named(TRAINED_ON)]),
    (
        README,
        f"names {N} % by its coarse level and {N} % by its fine one",
        lambda: [named(f"{LATER}, {level} level") for level in ("coarse", "fine")],
    ),
    *(
        (
            page,
            rf"nothing, saves {N} % \[{N}, {N}\] of the better one's multiply-adds at its accuracy "
            rf"\({N} \[{N}, {N}\] points\)",
            lambda: saving("waveclip-shapes", CASCADE, "teacher trained on"),
        )
        for page in (README, WAVECLIP)
    ),
    (
        README,
        rf"levels name {N} and {N} % \(teacher {N} %\)",
        lambda: [photos("WaveCLIP coarse-only"), photos("WaveCLIP full"), photos("teacher (dense)")],
    ),
    (
        README,
        f"coarse level and names {N} %, the teacher trained on {N} %",
        lambda: [photos(HALF), photos("teacher trained on")],
    ),
    (README, f"cascade saves {N} % at the teacher's", lambda: saving("photos-cifar10", CASCADE, "teacher")[:1]),
    (README, f"{N} to {N} points apart", lambda: gates("moved", "margin")),
    (
        README,
        f"colours names {N} % among 252 names, the teacher {N} %, and the teacher {N} % in grey",
        lambda: [ladder(row) for row in ("RGB histogram, MLP", "teacher", "teacher, grey pictures")],
    ),
    (README, f"half the resolution names {N} % after twice", lambda: [ladder("half-resolution tower")]),
    (WAVECLIP, rf"teacher is shown \({N} \[{N}, {N}\] points\)", lambda: ends(HALF)),
    (
        WAVECLIP,
        rf"names {N} points more \[{N}, {N}\]",
        lambda: [value.removeprefix("+") for value in ends(TRAINED_ON)],
    ),
    (
        WAVECLIP,
        f"levels stay {N} and {N} points below",
        lambda: [lost(f"{LATER}, {level} level") for level in ("coarse", "fine")],
    ),
    (
        WAVECLIP,
        f"leave {N} points for the coarse level and {N} for the fine one",
        lambda: [lost(f"{COSINE}, {level}") for level in ("coarse", "fine")],
    ),
    (WAVECLIP, f"threshold of it refines {N} to {N} % of the pictures otherwise", lambda: gates("moved", "margin")),
    (WAVECLIP, f"probability moves {N} to {N} points more", lambda: led("maximum probability")),
    (WAVECLIP, f"it is behind by {N} to {N} points", lambda: led("maximum probability above chance")),
    (WAVECLIP, f"the margin refines {N} to {N} % of a set", lambda: refined("margin")),
    (WAVECLIP, f"the maximum {N} to {N} %", lambda: refined("maximum probability")),
    (WAVECLIP, f"does win: {N} points on CIFAR-10 and {N} on", lambda: [gain("CIFAR-10"), gain("Fashion-MNIST")]),
    (
        WAVECLIP,
        rf"by {N} to {N} % of test \(three seeds; teacher {N} %\)",
        lambda: [photos("WaveCLIP full"), photos("WaveCLIP coarse-only"), photos("teacher (dense)")],
    ),
    (PHOTOS, rf"it saves {N} % \[{N}, {N}\]", lambda: saving("photos-cifar10", WAVE, "WaveCLIP's fine level")[:3]),
    (
        PHOTOS,
        f"coarse level costs, and names {N} points more",
        lambda: [percent(accuracy(HALF) - accuracy("WaveCLIP coarse-only"))],
    ),
]
"""Pages, what they state, and what is stored of it."""


@cache
def prose(page):
    """A page without its tables and code, in one line."""
    text = re.sub(r"<!-- table: .*?<!-- /table -->|```.*?```", "", (ROOT / page).read_text(), flags=re.S)
    return " ".join(text.split())


@pytest.mark.parametrize(("page", "stated", "measured"), STATED, ids=[f"{page}: {text}" for page, text, _ in STATED])
def test_a_sentence_states_what_is_stored(page, stated, measured):
    found = re.search(stated, prose(page))
    assert found, f"{page} says it in other words now; change this list too"
    assert list(found.groups()) == measured()


def test_no_decimal_of_the_readme_is_without_its_result():
    text = prose(README)
    for page, stated, _ in STATED:
        text = re.sub(stated, "", text) if page == README else text
    text = re.sub(r"\]\([^)]*\)|`[^`]*`", "", text)
    left = re.findall(r"(?<![\w.])\d+\.\d+ (?:%|points)", text)
    assert not left, f"{left} of README are in no line of this list"
