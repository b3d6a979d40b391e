"""Golden rankings of whole data sets, computed once and stored on disk by content.

Shapes: B images of a batch, P images in all, N patch tokens, C classes.
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.adapters import AdaptedTower
from common.conditions import state_digest
from common.paths import runs_directory, written_whole
from common.tower import ImageTower
from patchrank.golden import golden_macs, golden_ranking
from patchrank.scores import Score, check_score

_VERSION = 1  # of the stored orders' meaning; orders of another version are not read


@dataclass(frozen=True)
class Rankings:
    """The golden orders of P images.  places: the row of each image by its key.  orders: int16 [P,N]."""

    places: dict[str, int]
    orders: Tensor

    def __len__(self) -> int:
        return len(self.places)

    def of(self, keys: Sequence[str]) -> Tensor:
        """Orders [B,N] (long, most important patch first) of images by their keys. ValueError: a key not ranked."""
        unknown = [key for key in keys if key not in self.places]
        if unknown:
            raise ValueError(
                f"{len(unknown)} of {len(keys)} pictures were not ranked, such as {unknown[0]!r}; rank the loader that "
                "gives them"
            )
        return self.orders[[self.places[key] for key in keys]].long()


def ranked(
    tower: ImageTower | AdaptedTower,
    batches: Iterable[Mapping[str, Any]],
    score: Score = "feature",
    *,
    folder: str | Path | None = None,
    save_every: float = 60.0,
    progress: bool = True,
    **settings: Any,
) -> Rankings:
    """The golden ranking of every image of a loader, from disk if it was computed before.

    batches: {"image" [B,3,S,S], "key", and "label" for the label-driven score}, as the suite's data modules give them.
        A ranking belongs to a view: take the evaluation view, ``data.dataloader("train", train=False)``.
    folder: where orders are stored; default ``golden`` in $EFFCLIP_RUNS. A hash of tower and settings names a
        subfolder, and a hash of an image's pixels names its order, so new keys or another order of the data cost
        nothing. Processes may share the folder.
    save_every: seconds between writes of new orders. A run that was killed continues from its last write.
    progress: show a progress bar with the cost per image (an upper bound for several rounds).
    settings: of ``golden_ranking``, except ``labels``. It runs in the tower's precision, without autocast.
    ValueError: batches without keys or needed labels; two different images under one key.
    """
    device = next(tower.parameters()).device
    store = _Store(Path(folder or runs_directory() / "golden") / settings_key(tower, score, **settings), save_every)
    needs = ("key", "label") if score == "label" else ("key",)
    places: dict[str, str] = {}
    try:
        for batch in track(batches, description=_description(tower, settings), disable=not progress):
            for needed in needs:
                if needed not in batch:
                    raise ValueError(
                        f"a batch with {sorted(batch)} has no {needed!r}, by which rankings with score {score!r} are "
                        "stored; take a loader of this suite's data modules"
                    )
            labels = batch["label"] if score == "label" else None
            digests = picture_digests(batch["image"], labels)
            new = [row for row, digest in enumerate(digests) if digest not in store.places]
            if new:
                new_labels = None if labels is None else labels[new].to(device)
                new_images = batch["image"][new].to(device)
                with torch.autocast(device.type, enabled=False):
                    ranking = golden_ranking(tower, new_images, score, labels=new_labels, **settings)
                store.add([digests[row] for row in new], ranking.order)
            for key, digest in zip(batch["key"], digests, strict=True):
                if places.setdefault(key, digest) != digest:
                    raise ValueError(f"two different pictures are called {key!r}; keys must tell pictures apart")
    finally:
        store.save()
    if not places:
        raise ValueError("the loader gave no batch; check the data path and that the split is not empty")
    rows = [store.places[digest] for digest in places.values()]
    return Rankings({key: row for row, key in enumerate(places)}, store.orders()[rows])


def _description(tower: ImageTower | AdaptedTower, settings: Mapping[str, Any]) -> str:
    if isinstance(tower, AdaptedTower):
        return "golden rankings"  # their cost has no closed form
    counted = ("prune_layer", "block", "stride", "rounds", "removed_per_round")
    cost = golden_macs(tower, **{name: settings[name] for name in counted if name in settings}) / 1e9
    bound = "at most " if settings.get("rounds", 1) > 1 else ""
    return f"golden rankings ({bound}{cost:.4g} GMACs a picture)"


def settings_key(tower: ImageTower | AdaptedTower, score: Score, **settings: Any) -> str:
    """16 hex digits that depend on all that a ranking depends on, except the image: weights and settings.

    A default that is spelled out changes nothing, nor does ``memory``.
    """
    bound = inspect.signature(golden_ranking).bind(tower, None, score, **settings)
    bound.apply_defaults()
    check_score(score, {**bound.arguments, "labels": "come with the batches"})
    key = {k: v for k, v in bound.arguments.items() if k not in ("tower", "images", "score", "labels", "memory")}
    classes, scale = key.pop("class_embeddings"), key.pop("logit_scale")
    if score != "feature":
        key["classes"] = [picture_digests(classes[None])[0], float(scale)]
    if isinstance(tower, AdaptedTower):
        # What the weights do not tell: the kinds of parts, and their heads.
        heads = [part.num_heads for part in tower.modules() if hasattr(part, "num_heads")]
        kind: dict[str, Any] = {"tower": repr(tower), "heads": heads}
    else:
        activation, attention = tower.transformer.resblocks[0].mlp.gelu, tower.transformer.resblocks[0].attn
        kind = {"heads": attention.heads, "gelu": type(activation).__name__}
    key |= {"version": _VERSION, "score": score, **kind}
    return state_digest(tower, json.dumps(key, sort_keys=True))


def picture_digests(images: Tensor, labels: Tensor | None = None) -> list[str]:
    """64 hex digits for each of images [B,...] and its label (long [B]), equal only for equal values."""
    kind = f"{images.dtype} {tuple(images.shape[1:])}"
    salts = [kind] * len(images) if labels is None else [f"{kind} {label}" for label in labels.tolist()]
    rows = images.detach().cpu().contiguous().flatten(1).view(torch.uint8).numpy()
    return [sha256(salt.encode() + row.tobytes()).hexdigest() for salt, row in zip(salts, rows, strict=True)]


class _Store:
    """Orders by digest: the files of a folder, each written once, and the orders not yet written."""

    def __init__(self, folder: Path, save_every: float) -> None:
        self.folder, self.save_every, self._last = folder, save_every, time.monotonic()
        self.places: dict[str, int] = {}
        self._parts: list[Tensor] = []
        self._unsaved: list[str] = []
        for file in sorted(folder.glob("*.safetensors")):
            stored = load_file(file)
            self._append([row.tobytes().hex() for row in stored["digests"].numpy()], stored["orders"])

    def _append(self, digests: Sequence[str], orders: Tensor) -> None:
        first = sum(map(len, self._parts))
        self.places.update((digest, row) for row, digest in enumerate(digests, first))
        self._parts.append(orders)

    def add(self, digests: Sequence[str], orders: Tensor) -> None:
        """Add orders [B,N], and write new ones if ``save_every`` seconds have passed."""
        self._append(digests, orders.to("cpu", torch.int16))
        self._unsaved += digests
        if time.monotonic() - self._last >= self.save_every:
            self.save()

    def orders(self) -> Tensor:
        """All orders, int16 [P,N], in the rows of ``places``."""
        return torch.cat(self._parts)

    def save(self) -> None:
        """Write what is new, whole or not at all, under a name of its own: processes may share the folder."""
        if self._unsaved:
            raw = b"".join(map(bytes.fromhex, self._unsaved))
            digests = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(len(self._unsaved), -1)
            file = self.folder / f"{sha256(raw).hexdigest()[:16]}.safetensors"
            with written_whole(file) as unfinished:
                save_file({"digests": digests, "orders": self.orders()[-len(digests) :].contiguous()}, unfinished)
        self._unsaved, self._last = [], time.monotonic()
