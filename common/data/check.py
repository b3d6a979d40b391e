"""Check that a recipe's data is complete: ``python -m common.data.check FILE.yaml`` (``make data-check CONFIG=...``).

The command prints the shards and samples of every split, compares both with the manifest, and draws a sheet of
samples as the model sees them. The exit code is 1 when something is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import yaml
from jsonargparse import ArgumentParser
from lightning import LightningDataModule
from PIL import Image, ImageDraw
from rich.progress import track

from common.data.account import Account
from common.data.packing import MANIFEST, digest
from common.data.reader import entry_of, manifests
from common.data.shards import ShardDataModule
from common.data.tar import Shard, is_remote, read_shard
from common.paths import runs_directory
from common.recipes import own_error, resolve_configs

SMALL = 2**31  # bytes of a split that are read in full without being asked to
COLUMNS, ROWS, TILE, TEXT = 6, 4, 160, 44  # a sheet: tiles across and down, pixels of a picture and of its caption


def load_data(configs: Sequence[str], overrides: Sequence[str] = ()) -> ShardDataModule:
    """The data module that recipes describe, later ones over earlier ones; ``overrides``: ``--data.KEY VALUE``.

    ValueError: no recipe, a recipe without shards, or an error of the data module's constructor.
    """
    sections = []
    for config in configs:
        recipe = yaml.safe_load(Path(resolve_configs(["-c", config])[1]).read_text())
        if not isinstance(recipe, dict):
            raise ValueError(f"{config} is not a recipe: it has no keys")
        sections += [f"--data={json.dumps(recipe['data'])}"] if recipe.get("data") else []
    if not sections:
        raise ValueError(f"{', '.join(configs)}: no data section; give the recipe, not only an overlay")
    parser = ArgumentParser(prog="check")
    parser.add_subclass_arguments(LightningDataModule, "data")
    data = parser.instantiate_classes(parser.parse_args([*sections, *overrides])).data
    if not isinstance(data, ShardDataModule):
        raise ValueError(f"{type(data).__name__} does not read shards; there is nothing to check here")
    return data


def compare(urls: Sequence[str], verify: bool | None = None) -> tuple[Account, list[str], list[str]]:
    """(account, remarks, problems) of shards, against the manifests beside the local ones.

    verify: read every byte, and compare sha256 (where no manifest lists a shard, read the tar). None: verify splits
        of at most 2 GB; of remote shards, so many as come to 2 GB, and the first sample of the others.
    """
    local = [Path(url) for url in urls if not is_remote(url)]
    problems = [f"{path} is missing" for path in local if not path.is_file()]
    local = [path for path in local if path.is_file()]
    remote = _Remote(verify)
    if verify is None:
        verify = sum(path.stat().st_size for path in local) <= SMALL
    known = manifests([str(path) for path in local])
    how = "every byte read" if verify else "sizes compared, contents not read (--verify does)"
    remarks = [f"{folder}: no {MANIFEST}" for folder in sorted({path.parent for path in local} - set(known))]
    for folder, about in known.items():
        variant = f" ({about['variant']})" if "variant" in about else ""
        remarks.append(f"{folder}: {about.get('source')}{variant}, {about.get('date')}")
        unused = sorted(set(about["shards"]) - {path.name for path in local if path.parent == folder})
        remarks += [f"{folder}: {len(unused)} more shards in the manifest, first {unused[0]}"] if unused else []
        problems += [f"{folder / name} is missing" for name in unused if not (folder / name).is_file()]

    remarks += [how] if local else []

    def check_local(path: Path) -> tuple[Account, str]:
        entry = entry_of(str(path), known)
        return _against_entry(path, entry, verify) if entry else _without_entry(path, path.parent in known, verify)

    far = [url for url in urls if is_remote(url)]
    with ThreadPoolExecutor() as pool:  # for local ones; of remote ones each must know what the ones before it read
        both = chain(pool.map(check_local, local), map(remote.check, far))
        results = list(track(both, "comparing", len(local) + len(far)))
    account = Account()
    for part, problem in results:
        account.add(part)
        problems += [problem] if problem else []
    remarks += remote.remarks()
    return account, remarks, problems


def _against_entry(path: Path, entry: dict[str, Any], verify: bool) -> tuple[Account, str]:
    size, account = path.stat().st_size, Account(delivered=entry["samples"])
    if size != entry.get("bytes", size):
        return account, f"{path} has {size} bytes, the manifest says {entry['bytes']}"
    if verify and digest(path)["sha256"] != entry["sha256"]:
        return account, f"{path}: its sha256 is not the manifest's, so its contents have changed"
    return account, ""


def _without_entry(path: Path, listed: bool, verify: bool) -> tuple[Account, str]:
    account = Account()
    account.delivered = sum(1 for _ in read_shard(Shard(str(path), None), account)) if verify else 0
    if account.bad:
        return account, f"damaged: {account.last}"
    return account, f"{path} is not in the manifest beside it" if listed else ""


class _Remote:
    """Checks remote shards one after another: in full up to SMALL bytes, then by their first sample alone."""

    def __init__(self, verify: bool | None) -> None:
        self.left = {None: SMALL, False: 0, True: sys.maxsize}[verify]
        self.opened = self.read = 0

    def check(self, url: str) -> tuple[Account, str]:
        account, whole = Account(), self.left > 0
        self.opened += 1
        try:
            for sample in islice(read_shard(Shard(url, None), account), None if whole else 1):
                account.delivered += 1
                self.left -= sum(len(value) for value in sample.values())
        except ValueError as error:
            return account, str(error)
        self.read += whole
        if not account.read:
            return account, f"{url} holds no sample"
        return account, f"damaged: {account.last}" if account.bad else ""

    def remarks(self) -> list[str]:
        """What was read of the remote shards."""
        if not self.opened:
            return []
        rest = self.opened - self.read
        return [f"{self.read} remote shards read to their end" + (f", {rest} not (--verify does)" if rest else "")]


def draw_sheet(data: ShardDataModule, split: str, urls: Sequence[str], file: Path) -> list[str]:
    """Write a PNG of samples from all over a split, as the model sees them; returns the decoding errors."""
    decoder = data.decoder(split)
    sheet = Image.new("RGB", (COLUMNS * TILE, ROWS * (TILE + TEXT)), "white")
    draw, problems = ImageDraw.Draw(sheet), []
    for place, raw in enumerate(islice(_spread(urls, COLUMNS * ROWS), COLUMNS * ROWS)):
        x, y = place % COLUMNS * TILE, place // COLUMNS * (TILE + TEXT)
        try:
            sample = decoder(raw, Random(0))
        except ValueError as error:
            problems.append(f"sample {raw['__key__']}: {error}")
            continue
        sheet.paste(Image.fromarray(np.asarray(sample["image"])).resize((TILE - 4, TILE - 4)), (x + 2, y + 2))
        words = raw["txt"].decode() if decoder.captions else f"label {sample.get('label')}"
        lines = textwrap.wrap(words.encode("ascii", "replace").decode(), 25)[:3]  # all that PIL's own font is sure of
        draw.multiline_text((x + 3, y + TILE), "\n".join(lines), fill="black", spacing=1)
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file)
    return problems


def _spread(urls: Sequence[str], number: int) -> Iterator[dict[str, Any]]:
    """At least ``number`` samples where the split has as many: a few from each of some shards spread over the list."""
    chosen = list(urls)[:: max(1, len(urls) // number)]
    per_shard = -(-number // max(1, len(chosen)))
    for url in chosen:
        with suppress(ValueError):  # a remote shard that cannot be read, which the comparison reports
            yield from islice(read_shard(Shard(url, None), Account()), per_shard)


def check(data: ShardDataModule, folder: Path, verify: bool | None = None) -> bool:
    """Print a report of every split and draw its sheet into ``folder``; True where nothing is wrong."""
    sound = bool(data.splits)
    for split in data.splits:
        urls = data.shard_urls(split)
        account, remarks, problems = compare(urls, verify)
        sheet = folder / f"{split}.png"
        problems += draw_sheet(data, split, [url for url in urls if is_remote(url) or Path(url).is_file()], sheet)
        print(f"{split}: {len(urls)} shards, {account.read or 'an unknown number of'} samples")
        print(*(f"  {remark}" for remark in [*remarks, str(account), f"samples to look at: {sheet}"]), sep="\n")
        print(*(f"  WRONG: {problem}\n" for problem in problems), sep="", end="")
        sound = sound and not problems
    print("all there" if sound else "something is wrong: see above" if data.splits else "the recipe names no shards")
    return sound


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0: complete, 1: something is missing or wrong, 2: wrong usage (SystemExit)."""
    parser = argparse.ArgumentParser(
        prog="python -m common.data.check",
        description="Compare a recipe's shards with their manifests and draw a sheet of samples.",
        epilog="Settings of the data may follow, as for lightning fit: --data.root FOLDER",
    )
    parser.add_argument("config", nargs="+", help="the recipe, and overlays on it")
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="read every byte and compare sha256 (default: for splits of at most 2 GB)",
    )
    args, overrides = parser.parse_known_args(argv)
    try:
        data = load_data(args.config, overrides)
        sound = check(data, runs_directory() / "data-check" / Path(args.config[0]).stem, args.verify)
    except ValueError as error:
        print(f"data-check: error: {own_error(error) or error}", file=sys.stderr)
        return 1
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
