"""Pictures with several captions each, for retrieval in both directions.

Shapes: M pictures.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from common.data import catalogue
from common.data.catalogue import Entry
from common.data.pictures import PictureSet
from common.data.tables import read_json

_KEYS = {"filename", "split", "sentences"}


class RetrievalSet(PictureSet):
    """M different pictures: item i is (PIL image in RGB, its captions).

    captions: M lists of one or more strings.  keys: M names, unique. For batches see ``pictures.loader``.
    """

    def __init__(self, pictures: list[str], captions: list[list[str]], root: Path) -> None:
        super().__init__(pictures, root)
        self.captions = captions

    def __getitem__(self, index: int) -> tuple[Image.Image, list[str]]:
        return self.picture(index), self.captions[index]


def retrieval_set(entry: Entry | str, root: str | Path, karpathy_json: str | Path, split: str = "test") -> RetrievalSet:
    """A retrieval set of the catalogue in Karpathy's split; incomplete data is refused.

    entry: its name or an Entry.  root: the folder with the pictures, laid out as ``Entry.get`` describes.
    karpathy_json: Karpathy's file of captions, such as ``dataset_coco.json``.
    ValueError: an unknown set or split; a file that is missing or of another set; missing pictures.
    """
    if isinstance(entry, str):
        entry = catalogue.entry(entry)
    if entry.task != "retrieval":
        raise ValueError(f"{entry.title} has no captions; {', '.join(catalogue.names('retrieval'))} have")
    if split not in entry.splits:
        raise ValueError(f"{entry.title} has the splits {list(entry.splits)}, not {split!r}")
    root, file = (Path(path).expanduser().absolute() for path in (root, karpathy_json))
    try:
        return _read(entry, root, file, split)
    except (ValueError, OSError, KeyError) as error:
        reason = str(error).rstrip(".")
        raise ValueError(f"{entry.title} ({split}) in {root}, {file}: {reason}. It needs {entry.get}") from error


def _read(entry: Entry, root: Path, file: Path, split: str) -> RetrievalSet:
    wanted = 'Karpathy\'s {"images": [{"filename", "split", "sentences": [{"raw"}]}, ...]}'
    data = read_json(file, dict, wanted)
    items = data.get("images")
    if not isinstance(items, list) or not all(isinstance(item, dict) and item.keys() >= _KEYS for item in items):
        keys = sorted(items[0]) if isinstance(items, list) and items and isinstance(items[0], dict) else sorted(data)
        raise ValueError(f"this file has {', '.join(map(str, keys[:6]))}; it should be {wanted}")
    if data.get("dataset", entry.name) != entry.name:
        raise ValueError(f"these are the captions of {data['dataset']!r}")
    parts, count = entry.splits[split].options["parts"], entry.splits[split].count
    items = [item for item in items if item["split"] in parts]
    if len(items) != count:
        raise ValueError(f"{len(items)} pictures of {split!r} are listed where {count} belong")
    names = [f"{item['filepath']}/{item['filename']}" if item.get("filepath") else item["filename"] for item in items]
    captions = [[sentence["raw"].strip() for sentence in item["sentences"] or ()] for item in items]
    bare = [name for name, texts in zip(names, captions, strict=True) if not texts or not all(texts)]
    if bare:
        raise ValueError(f"{bare[0]} has no caption or an empty one")
    folder = next((root / place for place in entry.options["pictures"] if (root / place / names[0]).is_file()), None)
    if folder is None:
        raise ValueError(f"{names[0]} is in none of the folders {', '.join(entry.options['pictures'])}")
    return RetrievalSet([str(folder / name) for name in names], captions, root)
