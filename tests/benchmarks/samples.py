"""A folder of results to make the report page of: the committed ones, with those of two figures made up."""

import base64
import io
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks import RESULTS
from benchmarks.waveclip.costs import Cost
from benchmarks.waveclip.saving import Exits
from benchmarks.waveclip.sweep import data_uri, margins, sweep
from common.flops import Macs

PICTURES = 500
COSTS = [Cost(tokens, Macs(gmacs, gmacs, 0.0, {}, 0)) for tokens, gmacs in ((10, 0.008), (38, 0.032))]


def answers():
    """Confident images are right, the others by chance; the fine level is right more often."""
    random = torch.Generator().manual_seed(0)
    margin, luck = torch.rand(PICTURES, generator=random), torch.rand(PICTURES, generator=random)
    coarse, fine = luck < 0.3 + 0.6 * margin, luck < 0.5 + 0.45 * margin
    fine[::29] = ~fine[::29]
    return Exits(margin.numpy(), coarse.numpy(), fine.numpy(), fine.numpy())


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


def png(seed):
    """48 x 48 pixels of noise, PNG in base64."""
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def patches():
    """Two pictures of noise, and which of 36 patches three methods keep."""
    pictures = [png(place) for place in range(2)]
    kept = {"class attention": range(18), "golden ranking": range(0, 36, 2), "predictor": range(18, 36)}
    return {
        "name": "patchrank-fig4",
        "conditions": {"scale": "embedded", "keep": 0.5},
        "shown": [{"name": f"noise {place}", "png": picture} for place, picture in enumerate(pictures)],
        "grid": 6,
        "kept": {name: [list(places)] * 2 for name, places in kept.items()},
    }


def write_results(folder: Path) -> dict:
    """Fill a folder and return what it has for the slider."""
    shutil.copytree(RESULTS, folder, dirs_exist_ok=True)
    (folder / "patchrank-fig4.json").write_text(json.dumps(patches()))
    (folder / "patchrank-fig4.md").write_text("| method | lost |\n|---|---:|\n| predictor | 0.1 |\n")
    file, observed = folder / "waveclip-fig1.json", answers()
    result = json.loads(file.read_text()) | {
        "pictures": PICTURES,
        "teacher": {"gmacs": 0.03, "accuracy": 0.8},
        "sweep": sweep(observed, COSTS),
        "margins": margins(observed),
        "examples": examples(),
    }
    file.write_text(json.dumps(result))
    return result
