"""A disk cache of class embeddings, keyed by content: the weights and the tokens of every prompt.

Shapes: C classes, E joint dim, T text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from hashlib import sha256
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.paths import runs_directory, written_whole
from common.zeroshot import Template, class_embeddings, fill

_PROMPTS_AT_A_TIME = 512


def cache_key(
    weights: str, tokenizer: Callable[[list[str]], Tensor], class_names: Sequence[str], templates: Sequence[Template]
) -> str:
    """64 hex digits that name the class embeddings, from the weights' hash and every prompt's ids, in order.

    The ids depend on the names, the templates and the tokenizer's vocabulary, so the key changes with each of them.
    ValueError: a prompt that the tokenizer refuses; where it takes the names alone, the message points to --template.
    """
    key = sha256(f"{weights} {len(class_names)} {len(templates)}".encode())
    prompts = [fill(template, name) for name in class_names for template in templates]
    for start in range(0, len(prompts), _PROMPTS_AT_A_TIME):
        try:
            ids = tokenizer(prompts[start : start + _PROMPTS_AT_A_TIME])
        except ValueError as error:
            if "vocabulary" in str(error) and _takes(tokenizer, class_names):
                raise ValueError(f'{error}; other prompts: --template "{{}}"') from error
            raise
        key.update(f"{tuple(ids.shape)}".encode())
        key.update(ids.numpy().tobytes())
    return key.hexdigest()


def _takes(tokenizer: Callable[[list[str]], Tensor], texts: Sequence[str]) -> bool:
    """Whether a tokenizer refuses none of the texts."""
    try:
        tokenizer(list(texts))
    except ValueError:
        return False
    return True


def cached_class_embeddings(
    texts: nn.Module,
    weights: str,
    class_names: Sequence[str],
    templates: Sequence[Template],
    folder: Path | None = None,
) -> Tensor:
    """The class embeddings [C,E] of ``common.zeroshot.class_embeddings`` in fp32, computed once for all runs.

    texts: a text model with ``encode_text`` and ``tokenizer``.  weights: a hash of its weights.
    folder: the cache; default: ``class_embeddings`` in $EFFCLIP_RUNS.
    """
    tokenizer = partial(texts.tokenizer, longest=True)
    file = (folder or runs_directory() / "class_embeddings") / (
        cache_key(weights, tokenizer, class_names, templates) + ".safetensors"
    )
    device = next(texts.parameters()).device
    if file.is_file():
        with suppress(SafetensorError, KeyError):  # a damaged file is computed anew and written over
            return load_file(file)["classes"].to(device)
    classes = class_embeddings(texts.encode_text, tokenizer, class_names, templates, device=device)
    with written_whole(file) as temporary:
        save_file({"classes": classes.cpu().contiguous()}, temporary)
    return classes
