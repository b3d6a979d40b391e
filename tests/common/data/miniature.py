"""Miniature data sets in the formats in which the real ones are published, some pictures each.

Every writer fills a root and gives {split: [(gray value, label), ...]}: picture n of a set is a square of gray value n.
"""

import gzip
import hashlib
import json
import pickle
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat
from timm.data import ImageNetInfo

SPLITS = {"train": [(0, 0), (1, 1), (2, 0)], "val": [(3, 1), (4, 0)], "test": [(5, 1), (6, 0), (7, 1)]}
TWO = {split: SPLITS[split] for split in ("train", "test")}


def small(entry, found: Mapping[str, list], num_classes: int, **options):
    """The entry with the counts of a miniature data set."""
    splits = {name: replace(entry.splits[name], count=len(rows)) for name, rows in found.items()}
    return replace(entry, splits=splits, num_classes=num_classes, options={**entry.options, **options})


def paint(file: Path, gray: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (12, 10), gray).save(file)


def write_text(file: Path, *lines: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines))


def write_food101(root: Path) -> dict:
    folders = ("apple_pie", "baby_back_ribs")
    for split, rows in TWO.items():
        for gray, label in rows:
            paint(root / f"food-101/images/{folders[label]}/{gray}.jpg", gray)
        listed = {folders[c]: [f"{folders[c]}/{gray}" for gray, label in rows if label == c] for c in (1, 0)}
        write_text(root / f"food-101/meta/{split}.json", json.dumps(listed))
    # torchvision goes through a split class by class, in the file's order
    return {split: sorted(rows, key=lambda row: -row[1]) for split, rows in TWO.items()}


def write_oxford_pets(root: Path) -> dict:
    breeds = ("Abyssinian", "american_bulldog")
    for split, rows in TWO.items():
        for gray, label in rows:
            paint(root / f"oxford-iiit-pet/images/{breeds[label]}_{gray}.jpg", gray)
        lines = [f"{breeds[label]}_{gray} {label + 1} {label + 1} 1" for gray, label in rows]
        write_text(root / f"oxford-iiit-pet/annotations/{'trainval' if split == 'train' else split}.txt", *lines)
    return TWO


def write_flowers102(root: Path, monkeypatch) -> dict:
    from torchvision.datasets import Flowers102

    monkeypatch.setattr(
        Flowers102, "_file_dict", {key: (name, None) for key, (name, _) in Flowers102._file_dict.items()}
    )
    labels = dict(row for rows in SPLITS.values() for row in rows)
    for gray in labels:
        paint(root / f"flowers-102/jpg/image_{gray + 1:05d}.jpg", gray)
    savemat(root / "flowers-102/imagelabels.mat", {"labels": [[labels[gray] + 1 for gray in sorted(labels)]]})
    ids = {
        key: [[gray + 1 for gray, _ in SPLITS[split]]]
        for key, split in {"trnid": "train", "valid": "val", "tstid": "test"}.items()
    }
    savemat(root / "flowers-102/setid.mat", ids)
    return SPLITS


def write_stanford_cars(root: Path) -> dict:
    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    files = {"train": base / "devkit/cars_train_annos.mat", "test": base / "cars_test_annos_withlabels.mat"}
    for split, rows in TWO.items():
        for gray, _ in rows:
            paint(base / f"cars_{split}/{gray:05d}.jpg", gray)
        fields = [("bbox_x1", "O"), ("class", "O"), ("fname", "O")]
        annotations = np.array([[(39, label + 1, f"{gray:05d}.jpg") for gray, label in rows]], dtype=fields)
        savemat(files[split], {"annotations": annotations})
    cars = np.array([["AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012"]], dtype=object)
    savemat(base / "devkit/cars_meta.mat", {"class_names": cars})
    return TWO


def write_dtd(root: Path) -> dict:
    textures = ("banded", "polka-dotted")
    for split, rows in SPLITS.items():
        paths = [f"{textures[label]}/{textures[label]}_{gray:04d}.jpg" for gray, label in rows]
        for path, (gray, _) in zip(paths, rows, strict=True):
            paint(root / "dtd/dtd/images" / path, gray)
        write_text(root / f"dtd/dtd/labels/{split}1.txt", *paths)
    return SPLITS


def write_fgvc_aircraft(root: Path) -> dict:
    variants = ("707-320", "F/A-18")
    data = root / "fgvc-aircraft-2013b/data"
    write_text(data / "variants.txt", *variants)
    for split, rows in SPLITS.items():
        for gray, _ in rows:
            paint(data / f"images/{gray:07d}.jpg", gray)
        write_text(data / f"images_variant_{split}.txt", *(f"{gray:07d} {variants[label]}" for gray, label in rows))
    return SPLITS


def write_cifar(root: Path, monkeypatch, kind: type) -> dict:
    """CIFAR-10 or CIFAR-100 as pickled batches, whose checksums torchvision then expects."""
    hundred = kind.__name__ == "CIFAR100"
    base = root / kind.base_folder
    base.mkdir(parents=True)
    key = "fine_labels" if hundred else "labels"
    files = {"train": "train", "test": "test"} if hundred else {"train": "data_batch_1", "test": "test_batch"}
    batches = {
        files[split]: {
            "data": np.repeat([[gray] for gray, _ in rows], 3072, 1).astype(np.uint8),
            key: [c for _, c in rows],
        }
        for split, rows in TWO.items()
    }
    names = ["apple", "aquarium_fish"] if hundred else ["airplane", "automobile"]
    batches[kind.meta["filename"]] = {kind.meta["key"]: names}
    for name, content in batches.items():
        (base / name).write_bytes(pickle.dumps(content))
    sums = {name: hashlib.md5((base / name).read_bytes()).hexdigest() for name in batches}
    for split, name in files.items():
        monkeypatch.setattr(kind, f"{split}_list", [[name, sums[name]]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": sums[kind.meta["filename"]]})
    return TWO


def write_sun397(root: Path) -> dict:
    folders = ("/a/abbey", "/a/apartment_building/outdoor")
    write_text(root / "SUN397/ClassName.txt", *folders)
    for split, rows in TWO.items():
        paths = [f"{folders[label]}/sun_{gray}.jpg" for gray, label in rows]
        for path, (gray, _) in zip(paths, rows, strict=True):
            paint(root / f"SUN397{path}", gray)
        write_text(root / f"SUN397/{split.capitalize()}ing_01.txt", *paths)
    return TWO


def write_imagenet(base: Path, folders: list[str] | None = None) -> dict:
    """The validation folder with one picture in each of the 1,000 classes, gray as its number modulo 251."""
    wnids = list(ImageNetInfo("imagenet-1k").label_names())
    rows = [(label % 251, label) for label in range(1000)]
    for gray, label in rows:
        folder = base / (folders or wnids)[label]
        folder.mkdir(parents=True)
        paint(folder / "ILSVRC2012_val_1.png", gray)
    return {"test": rows}


def write_caltech101(root: Path) -> tuple[Path, list[tuple[str, int]]]:
    """101_ObjectCategories with three folders; gives it and (folder, number of pictures) in label order."""
    base = root / "caltech101/101_ObjectCategories"
    counts = [("BACKGROUND_Google", 5), ("Faces_easy", 4), ("accordion", 3)]
    for folder, count in counts:
        for number in range(count):
            paint(base / folder / f"image_{number + 1:04d}.jpg", number)
    (base / "BACKGROUND_Google/tmp").write_bytes(b"a picture without an ending")
    return base, counts


def write_idx(folder: Path, end: str, prefix: str, rows: list[tuple[int, int]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    images = np.stack([np.full((28, 28), gray, np.uint8) for gray, _ in rows])
    labels = np.array([label for _, label in rows], np.uint8)
    for kind, values in (("images", images), ("labels", labels)):
        head = struct.pack(f">{values.ndim + 1}I", 0x800 + values.ndim, *values.shape)
        content = head + values.tobytes()
        file = folder / f"{prefix}-{kind}-idx{values.ndim}-ubyte{end}"
        file.write_bytes(gzip.compress(content) if end == ".gz" else content)


def write_split_json(root: Path, file: str, pictures: str, names: tuple[str, str]) -> dict:
    """A ``split_zhou_*.json`` with the frames or photos that it lists."""
    data = {}
    for split, rows in SPLITS.items():
        data[split] = [[f"{names[label]}/{gray}.jpg", label, names[label]] for gray, label in rows]
        for (path, _, _), (gray, _) in zip(data[split], rows, strict=True):
            paint(root / pictures / path, gray)
    write_text(root / file, json.dumps(data))
    return SPLITS
