"""CLIP's byte-pair encoding: text -> ids of the full vocabulary of 49,408.

The ids are those of open_clip's tokenizer, whose merges are read from its package. Importing that package would also
import timm and torchvision, which takes as long as torch itself; a text needs neither.

Ids: 0 to 255 are bytes, 256 to 511 the same bytes at the end of a word, 512 + k is what the k-th merge joins; the last
two frame a text.
"""

from __future__ import annotations

import gzip
import html
import importlib.util
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path

import ftfy
import regex

START, END = 49_406, 49_407
"""Start-of-text and end-of-text."""
_MERGES = START - 512
_FRAMES = {"<start_of_text>": START, "<end_of_text>": END}
_WORD = regex.compile(
    rf"{'|'.join(_FRAMES)}|'(?:s|t|re|ve|m|ll|d)|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+",
    regex.IGNORECASE,  # lower case is not enough: a long s stays one, and counts as an s
)
_VISIBLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_BYTES = (*_VISIBLE, *(byte for byte in range(256) if byte not in _VISIBLE))
"""The byte of each id below 256."""


def cleaned(text: str) -> str:
    """The text with its encoding and HTML entities repaired, as CLIP reads it."""
    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


def encode(text: str) -> list[int]:
    """The ids of a text, framed by start-of-text and end-of-text."""
    return list(_text(text))


@lru_cache(maxsize=65_536)
def _text(text: str) -> tuple[int, ...]:
    words = _WORD.findall(" ".join(cleaned(text).split()).lower())
    return START, *(number for word in words for number in _word(word)), END


def decode(number: int) -> str:
    """The text of one id; bytes that are no text by themselves become replacement characters."""
    return _spellings()[number].decode(errors="replace")


@lru_cache(maxsize=65_536)
def _word(word: str) -> tuple[int, ...]:
    """The ids of a word: its bytes, of which neighbours are joined by the earliest merge until none fits."""
    if word in _FRAMES:
        return (_FRAMES[word],)
    places, merges = _places(), _merges()
    ids = [places[byte] for byte in word.encode()]
    ids[-1] += 256
    while True:
        joined = [merges.get(pair, END) for pair in pairwise(ids)]
        earliest = min(joined, default=END)
        if earliest == END:
            return tuple(ids)
        rest, ids, place = ids, [], 0
        while place < len(rest):
            fits = place < len(joined) and joined[place] == earliest
            ids.append(earliest if fits else rest[place])
            place += 2 if fits else 1


@cache
def _places() -> dict[int, int]:
    return {byte: place for place, byte in enumerate(_BYTES)}


@cache
def _merges() -> dict[tuple[int, int], int]:
    """(id, id) -> the id that a merge makes of them; a smaller one is merged earlier."""
    # The file writes a byte that cannot be seen as a letter beyond the 256th.
    unseen = len(_BYTES) - len(_VISIBLE)
    letters = [chr(byte) for byte in _VISIBLE] + [chr(256 + place) for place in range(unseen)]
    ids = {symbol: number for number, symbol in enumerate([*letters, *(f"{letter}</w>" for letter in letters)])}
    merges = {}
    for number, line in enumerate(_lines(), start=512):
        left, right = line.split()
        merges[ids[left], ids[right]] = ids[left + right] = number
    return merges


def _lines() -> list[str]:
    """The merges in open_clip's package, one a line, earliest first; a line about the file's version is before them."""
    package = importlib.util.find_spec("open_clip")  # does not import it
    file = Path(package.origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    return gzip.decompress(file.read_bytes()).decode().splitlines()[1 : _MERGES + 1]


@cache
def _spellings() -> list[bytes]:
    """The bytes of every id; a word ends in a space."""
    alone = [bytes([byte]) for byte in _BYTES]
    spellings = [*alone, *(letter + b" " for letter in alone)]
    for left, right in _merges():
        spellings.append(spellings[left] + spellings[right])
    return [*spellings, *(name.encode() for name in _FRAMES)]
