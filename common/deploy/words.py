"""CLIP's tokenizer without torch, from tokenizer.json; exported folders carry this module too."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path


class Words:
    """CLIP's tokenizer, from tokenizer.json.

    context: the most tokens of a text.  vocabulary: the ids that the model knows, ascending, each of which becomes its
    place in the list; None: all.
    """

    def __init__(self, file: Path, context: int, vocabulary: Sequence[int] | None = None) -> None:
        try:
            from tokenizers import Tokenizer
        except ModuleNotFoundError as error:
            raise ValueError("other class names need the package tokenizers: pip install tokenizers") from error
        try:
            self._tokenizer, self._context = Tokenizer.from_file(str(file)), context
        except Exception as error:  # the library raises no type of its own
            raise ValueError(f"{file} cannot be read ({error}); export it anew") from error
        self._places = None if vocabulary is None else {old: new for new, old in enumerate(vocabulary)}

    def ids(self, text: str) -> list[int]:
        """The ids of a text between its marks of start and end. ValueError: empty, too long, or unknown words."""
        cleaned = _clean(text)
        if not any(letter.isprintable() and not letter.isspace() for letter in cleaned):
            raise ValueError(f"the text {text!r} has no words")
        if "<start_of_text>" in cleaned or "<end_of_text>" in cleaned:
            raise ValueError(f"{text!r} spells a mark of the tokenizer's own; write it in other words")
        encoding = self._tokenizer.encode(cleaned)
        if len(encoding.ids) > self._context:
            raise ValueError(f"{len(encoding.ids)} tokens are more than {self._context}: {text!r}; shorten the text")
        if self._places is None:
            return encoding.ids
        pairs = zip(encoding.ids, encoding.tokens, strict=True)
        missing = [token.removesuffix("</w>") for id, token in pairs if id not in self._places]
        if missing:
            raise ValueError(
                f"{missing} in {text!r} is not in this model's vocabulary of {len(self._places)} ids; use words that "
                "it was trained with"
            )
        return [self._places[id] for id in encoding.ids]


def _clean(text: str) -> str:
    """CLIP's cleaning: broken encodings and entities mended, single spaces, small letters."""
    if not (text.isascii() and text.isprintable()) or re.search(r"&[#\w]", text):
        try:
            import ftfy
        except ModuleNotFoundError as error:
            raise ValueError(f"the text {text!r} needs the package ftfy: pip install ftfy") from error
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()
