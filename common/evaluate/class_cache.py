"""Class embeddings on disk, found again by their content.

Shapes: C classes, E joint dim, T text tokens.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.paths import runs_directory
from common.zeroshot import Template, class_embeddings, fill


def cache_key(
    weights: str, tokenizer: Callable[[list[str]], Tensor], class_names: Sequence[str], templates: Sequence[Template]
) -> str:
    """64 hex digits that name the class embeddings: by weights and by every prompt's ids, in order.

    The ids say all that names, templates and the tokenizer's vocabulary have to say.
    """
    found = sha256(f"{weights} {len(class_names)} {len(templates)}".encode())
    for prompts in _batches([fill(template, name) for name in class_names for template in templates], 512):
        ids = tokenizer(prompts)
        found.update(f"{tuple(ids.shape)}".encode())
        found.update(ids.numpy().tobytes())
    return found.hexdigest()


def cached_class_embeddings(
    texts: nn.Module,
    weights: str,
    class_names: Sequence[str],
    templates: Sequence[Template],
    folder: Path | None = None,
) -> Tensor:
    """The class embeddings [C,E] of ``common.zeroshot.class_embeddings`` in fp32, computed once for all runs.

    texts: has ``encode_text`` and ``tokenizer``.  weights: the hash of what it was loaded from.
    folder: where they stay; default: ``class_embeddings`` in $EFFCLIP_RUNS.
    """
    tokenizer = partial(texts.tokenizer, longest=True)
    file = (folder or runs_directory() / "class_embeddings") / (
        cache_key(weights, tokenizer, class_names, templates) + ".safetensors"
    )
    device = next(texts.parameters()).device
    if file.is_file():
        return load_file(file)["classes"].to(device)
    found = class_embeddings(texts.encode_text, tokenizer, class_names, templates, device=device)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}")
    save_file({"classes": found.cpu().contiguous()}, unfinished)
    unfinished.replace(file)
    return found


def _batches(texts: list[str], size: int) -> Iterator[list[str]]:
    return (texts[start : start + size] for start in range(0, len(texts), size))
