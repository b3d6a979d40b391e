"""A folder of results to make the report page of: the committed ones, with a WaveCLIP's outcomes made up."""

import json
import shutil
from pathlib import Path

import torch

from benchmarks.__main__ import RESULTS
from benchmarks.exits import Outcomes
from benchmarks.sweep import data_uri, margins, sweep
from benchmarks.wavecost import Cost
from common.flops import Macs

PICTURES = 500
COSTS = [Cost(tokens, Macs(gmacs, gmacs, 0.0, {}, 0)) for tokens, gmacs in ((10, 0.008), (38, 0.032))]


def outcomes():
    """Sure pictures are right, the others by chance; the fine level is right more often."""
    random = torch.Generator().manual_seed(0)
    margin, luck = torch.rand(PICTURES, generator=random), torch.rand(PICTURES, generator=random)
    coarse, fine = luck < 0.3 + 0.6 * margin, luck < 0.5 + 0.45 * margin
    fine[::29] = ~fine[::29]
    return Outcomes(margin, margin, coarse, fine, fine, coarse == fine)


def examples():
    """Seven pictures of noise, the surest first."""
    names = ["red apple", "fish", "a name <b>of</b> several words", "rocket", "key", "owl", "sun"]
    return [
        {
            "name": name,
            "guesses": [name if place % 2 else "mistaken", name if place % 3 else "still mistaken"],
            "margin": 0.95 - place / 7,
            "image": data_uri(torch.randn(3, 48, 48, generator=torch.Generator().manual_seed(place))),
        }
        for place, name in enumerate(names)
    ]


def write_results(folder: Path) -> dict:
    """Fill a folder and return what it has for the slider."""
    shutil.copytree(RESULTS, folder, dirs_exist_ok=True)
    file, of = folder / "waveclip-fig1.json", outcomes()
    result = json.loads(file.read_text()) | {
        "pictures": PICTURES,
        "teacher": {"gmacs": 0.03, "accuracy": 0.8},
        "sweep": sweep(of, COSTS),
        "margins": margins(of),
        "examples": examples(),
    }
    file.write_text(json.dumps(result))
    return result
