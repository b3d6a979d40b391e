"""The time of MLIP's training on this machine: a step beside plain CLIP's, and the matching of tokens within it.

Shapes: B pairs, K image tokens, T text tokens, E joint dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cells import table
from benchmarks.speed import engines
from common.clip import CLIP, load_architecture
from common.flops import count_macs
from common.pretraining import CLIPPretraining, ContrastivePretraining
from common.timing import alternate, ratio
from mlip.alignment import assign_tokens
from mlip.pretraining import MLIPPretraining
from mlip.tower import PAPER_LAYERS

PAIRS = 256
MATCHED = ((49, 20), (196, 77))
"""Image and text tokens of a pair: MLIP-B/16's last tokens with a caption of usual length, and the most possible."""
BATCH = 8
ROUNDS = 5


def measure(device: str, rounds: int, smoke: bool = False) -> dict[str, Any]:
    """Seconds of matching ``PAIRS`` pairs, and of one training step of either method, in alternating rounds."""
    calls = {f"{image} x {text}": matching(PAIRS, image, text, device) for image, text in MATCHED}
    return {
        "pairs": PAIRS,
        "matching": alternate(calls, rounds),
        "steps": [steps(dtype, device, smoke) for dtype in engines.dtypes(device)],
    }


def matching(pairs: int, image: int, text: int, device: str, dim: int = 512) -> Callable[[], Tensor]:
    """The assignment of ``text`` tokens to ``image`` tokens for each pair, from cosines on the device to indices.

    The tokens share a common vector, as trained tokens do, so that all cosines are around one half.
    """
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(dim, generator=generator)
    images, texts = (
        F.normalize(torch.randn(pairs, count, dim, generator=generator) + shared, dim=-1) for count in (image, text)
    )
    cosines = (texts @ images.transpose(1, 2)).flatten(0, 1).to(device)
    return lambda: assign_tokens(cosines, [text] * pairs)


def steps(dtype: torch.dtype, device: str, smoke: bool) -> dict[str, Any]:
    """One step of MLIP and of plain CLIP (forward, backward, clipped AdamW) at one batch size, and their costs.

    dtype: of the products; bfloat16 means autocast over fp32 weights, as in the recipes. The Guide is frozen and has
    DeiT-Tiny's size. ``macs_ratio`` is CLIP's forward multiply-adds (image, text) over MLIP's (image, text, Guide).
    """
    architecture = "common/smoke.json" if smoke else "ViT-B-16"
    layers = {"frequency_layers": 1, "keep_rates": {3: 0.5}} if smoke else PAPER_LAYERS[architecture]
    options = {key: layers[key] for key in ("frequency_layers", "keep_rates")}
    modules = {
        "mlip": MLIPPretraining(architecture, guide="random", **options).to(device),
        "clip": CLIPPretraining(architecture).to(device),
    }
    size = load_architecture(architecture)
    batch = 2 if smoke else BATCH if device == "cpu" else _largest_batch(modules.values(), size, dtype, device)
    pairs = _pairs(size, batch, device)
    measured = alternate(
        {name: train_step(module, pairs, dtype) for name, module in modules.items()}, 2 if smoke else ROUNDS
    )
    count = _tokens(modules["mlip"].clip, pairs)
    words = size["text_cfg"]["context_length"]
    alone = alternate({"matching": matching(batch, count, words - 1, device)}, 2 if smoke else ROUNDS)["matching"]
    gmacs = {name: _gmacs(module.clip, size) for name, module in modules.items()}
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "batch": batch,
        **measured,
        "ratio": ratio(measured["clip"], measured["mlip"]),
        "gmacs": gmacs,
        "macs_ratio": gmacs["clip"] / gmacs["mlip"],
        "matching": {"tokens": [count, words - 1], **alone, "share": alone["seconds"] / measured["mlip"]["seconds"]},
    }


def train_step(module: ContrastivePretraining, batch: dict[str, Tensor], dtype: torch.dtype) -> Callable[[], None]:
    """A call that trains the module by one step."""
    learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, 1e-4, foreach=True)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(batch["image"].device.type, dtype, enabled=dtype != torch.float32):
            loss = module.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()

    return step


def _pairs(size: dict[str, Any], batch: int, device: str) -> dict[str, Tensor]:
    """A batch of noise images with captions that fill the context."""
    pixels, words = size["vision_cfg"]["image_size"], size["text_cfg"]["context_length"]
    ids = torch.randint(1, size["text_cfg"]["vocab_size"] - 1, (batch, words))
    ids[:, -1] = size["text_cfg"]["vocab_size"] - 1
    pairs = {"image": torch.randn(batch, 3, pixels, pixels), "text": ids, "caption_id": torch.arange(batch)}
    return {name: value.to(device) for name, value in pairs.items()}


def _largest_batch(
    modules: Iterable[ContrastivePretraining], size: dict[str, Any], dtype: torch.dtype, device: str
) -> int:
    """The largest power of two of pairs with which every module's step fits in the memory of this GPU."""
    batch = BATCH
    while True:
        try:
            pairs = _pairs(size, 2 * batch, device)
            for step in [train_step(module, pairs, dtype) for module in modules]:
                step()
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            return batch
        batch *= 2


@torch.no_grad()
def _tokens(clip: CLIP, batch: dict[str, Tensor]) -> int:
    """The number of spatial tokens that MLIP's tower returns."""
    return clip.image_tower(batch["image"][:1]).spatial_tokens.shape[1]


def _gmacs(clip: CLIP, size: dict[str, Any]) -> float:
    """Forward multiply-adds of one pair, in 1e9."""
    clip = clip.to("cpu")
    pair = _pairs(size, 1, "cpu")
    return count_macs(clip.image_tower, pair["image"]).gmacs + count_macs(clip.text_tower, pair["text"]).gmacs


def parts(measured: dict[str, Any]) -> list[str]:
    """The result of ``measure`` as Markdown: a table, and what it counts."""
    head = [
        "step of ViT-B/16",
        "batch",
        "MLIP, s",
        "plain CLIP, s",
        "CLIP / MLIP",
        "of their GMACs",
        "matching's share",
    ]
    rows = []
    for row in measured["steps"]:
        spent = [f"{row[name]['seconds']:.2f}" for name in ("mlip", "clip")]
        shares = [f"{row['ratio']:.2f}", f"{row['macs_ratio']:.2f}", f"{100 * row['matching']['share']:.1f} %"]
        rows.append([row["dtype"], row["batch"], *spent, *shares])
    times = ", ".join(f"{1e3 * time['seconds']:.0f} ms at {size}" for size, time in measured["matching"].items())
    return [
        table(head, rows),
        "A step is forward, backward and clipped AdamW; its batch is the largest power of two that fits in a GPU's "
        f"memory, on a CPU {BATCH}. GMACs are of one pair forward, the Guide's included. Matching "
        f"{measured['pairs']} pairs one to one (image x text tokens) takes {times}.",
    ]
