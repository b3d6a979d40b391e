"""The text tower for a runtime without torch: an ONNX graph of any batch, and CLIP's tokenizer as tokenizer.json.

Shapes: B texts, T text tokens, E joint dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from common.byte_pairs import END
from common.deploy.graphs import need_onnx, onnx_graph, reason, write_onnx
from common.deploy.shared_weights import share_weights
from common.models import OpenClip
from common.stages import Stage
from common.tokenizer import Tokenizer

if TYPE_CHECKING:
    from common.deploy.model import Deployed

TOKENIZER = "tokenizer.json"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
"""What CLIP encodes piece by piece: English endings, letters, single digits, other marks."""


class _EncodeText(nn.Module):
    def __init__(self, texts: nn.Module) -> None:
        super().__init__()
        self.texts = texts

    def forward(self, ids: Tensor) -> tuple[Tensor]:
        """ids [B,T] -> (z [B,E],)."""
        return (self.texts.encode_text(ids),)


def words_of(texts: nn.Module) -> dict[str, Any] | None:
    """The settings of the runtime's ``Words``: context and vocabulary. None: the tokenizer is not CLIP's."""
    tokenizer, clip = (texts._tokenizer if isinstance(texts, OpenClip) else texts.tokenizer), _open_clips()
    if isinstance(tokenizer, Tokenizer):
        return {"context": tokenizer.context_length, "vocabulary": tokenizer.vocabulary}
    same = type(tokenizer) is type(clip) and all(
        getattr(tokenizer, name) == getattr(clip, name) for name in ("encoder", "clean_fn", "reduction_fn")
    )
    return {"context": tokenizer.context_length, "vocabulary": None} if same else None


@cache
def _open_clips() -> Any:
    """open_clip's tokenizer, whose tables the library takes."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def write_texts(
    members: Sequence[Deployed], folder: Path, wanted: bool
) -> tuple[list[dict[str, Any] | None], list[str], float]:
    """Write the text tower of each model, as text.onnx, or text_0.onnx and so on where there are several.

    folder: holds the class embeddings already.
    -> their entries in export.json, why one was left out, and the greatest difference of any graph.
    """
    rest, several = _rest(folder), len(members) > 1
    if not wanted:
        return [None] * len(members), [f"the text {'towers' if several else 'tower'}, by --no-text: {rest}"], 0.0
    entries, left_out, differences = [], [], [0.0]
    for place, member in enumerate(members):
        name, entry, reason = f"text_{place}" if several else "text", None, None
        texts = member.model.text_encoder()
        if words_of(texts) is None:
            reason = f"the text tower, whose tokenizer is not CLIP's: {rest}"
        else:
            try:
                entry, difference = export_texts(texts, folder, name)
                differences.append(difference)
            except ValueError as error:  # the image tower is worth having without it
                for path in folder.glob(f"{name}.*"):
                    path.unlink()
                reason = f"{error}; {rest}"
        entries.append(entry)
        left_out += [] if reason is None else [reason]
    return entries, list(dict.fromkeys(left_out)), max(differences)


def class_files(folder: Path) -> str:
    """The files of class embeddings in an exported folder, in words: one for each model. Empty: there is none."""
    return " and ".join(sorted(file.name for file in folder.glob("classes*.npy")))


def _rest(folder: Path) -> str:
    """The classes that a folder without a text tower knows."""
    files = class_files(folder)
    return f"the classes stay those of {files}" if files else "no classes were named, and none can be named later"


@torch.no_grad()
def export_texts(texts: nn.Module, folder: Path, name: str = "text") -> tuple[dict[str, Any], float]:
    """Write a text tower and its tokenizer -> their entry in export.json, and the greatest difference from the model.

    texts: has ``encode_text`` and CLIP's tokenizer.  name: of the graph and its weights, without the suffix.
    ValueError: the tower cannot be exported; with the reason.
    """
    need_onnx("tokenizers")
    file = folder / f"{name}.onnx"
    words = words_of(texts)
    own = not isinstance(texts, OpenClip)  # open_clip's towers take texts of the full length alone
    last = len(words["vocabulary"]) - 1 if words["vocabulary"] else END
    ids = torch.zeros(3, 6 if own else words["context"], dtype=torch.long)
    for row, length in enumerate((3, 4, 6)):
        ids[row, :length] = torch.arange(last - length + 1, last + 1)  # the last id ends a text
    shapes = {0: torch.export.Dim("texts")} | ({1: torch.export.Dim("tokens", max=words["context"])} if own else {})
    stage = Stage("text", _EncodeText(texts), ("ids",), ("text_embedding",))
    try:
        write_onnx(stage, (ids,), (shapes,), file)
    except Exception as error:
        raise ValueError(f"the text tower cannot be exported as onnx: {reason(error)}") from error
    share_weights([file], folder / f"{name}.bin")
    write_tokenizer(folder / TOKENIZER)
    graph = onnx_graph(file)
    shorter = [ids, ids[:1], ids[:2, :4] if own else ids[:2]]
    difference = max((graph(some)[0] - texts.encode_text(some)).abs().max().item() for some in shorter)
    entry = {"file": file.name, "tokenizer": TOKENIZER, "tokens": None if own else words["context"], "words": words}
    return entry, difference


def write_tokenizer(file: Path) -> None:
    """Write CLIP's byte-pair encoding with its whole vocabulary as a file of the library tokenizers.

    It marks start and end of a text. ``Words`` of the runtime cleans the text before.
    """
    from tokenizers import Regex, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Library

    clip = _open_clips()
    library = Library(models.BPE(clip.encoder, list(clip.bpe_ranks), end_of_word_suffix="</w>"))
    library.normalizer = normalizers.Sequence([normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    marks = [(name, clip.encoder[name]) for name in ("<start_of_text>", "<end_of_text>")]
    library.post_processor = processors.TemplateProcessing(
        single=f"{marks[0][0]} $A {marks[1][0]}", special_tokens=marks
    )
    library.save(str(file), pretty=False)
