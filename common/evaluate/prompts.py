"""The prompts of an evaluation: those of the data set, of the model, or of the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from common.arguments import read_templates

if TYPE_CHECKING:
    from common.data.lookup import Labelled
    from common.models import Model
    from common.zeroshot import Template

ENSEMBLE, SINGLE, OWN = "ensemble", "single", "own"
TEMPLATE_HELP = (
    f"{ENSEMBLE} (all of the data set's), {SINGLE} (its first), a text with {{}} for the class name, or a .txt file of "
    f"such lines; default: {ENSEMBLE}; for a folder or table of your own, which has none, the model's, and for a model "
    "of tuned prompts the templates that they were tuned for"
)
"""What --template takes."""


def chosen_templates(choice: str | None, data: Labelled, model: Model) -> tuple[str, tuple[Template, ...]]:
    """The name of the ``--template`` in force, and its templates for this model on this data set.

    A user's own pictures come without templates: theirs are the model's, or CLIP's single prompt.
    ValueError: no such file, or a text without {}.
    """
    from common.zeroshot import PHOTO

    own = model.templates or (() if data.templates else model.own_templates)
    if choice is None and own:
        return OWN, own
    written = tuple(data.templates) or PHOTO
    if choice in (None, ENSEMBLE):
        return ENSEMBLE, written
    if choice == SINGLE:
        return SINGLE, written[:1]
    return choice, read_templates(choice, f", {ENSEMBLE} or {SINGLE}")


def prompts_hash(templates: Sequence[Template], class_names: Sequence[str]) -> str:
    """16 hex digits that change with the templates; the prompts that a function makes identify it."""
    return value_hash([t if isinstance(t, str) else [t(name) for name in class_names] for t in templates])


def value_hash(value: Any) -> str:
    """16 hex digits that change with a plain value."""
    return sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()[:16]
