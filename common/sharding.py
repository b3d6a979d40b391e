"""A CLIP whose parameters are divided among processes, for loops of your own (PyTorch's FSDP2)."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from common.clip import CLIP
from common.tower import Block


def shard(clip: CLIP, **options: Any) -> CLIP:
    """Shard each block, and the rest as one group, with ``fully_shard``; returns the CLIP, now sharded.

    Call the model, ``encode_image`` or ``encode_text``; each gathers what it reads. Towers must run their blocks
    whole, as CLIP's do. ``logit_scale`` becomes one-dimensional, since FSDP2 shards no scalars. Files keep the scalar:
    ``torch.distributed.checkpoint.state_dict.get_model_state_dict`` gathers the weights, and ``CLIP.load_weights``
    reads them into a plain CLIP, which saves them.

    options: of ``fully_shard``, such as ``mesh`` and ``mp_policy``. The process group must be there.
    """
    clip.logit_scale = nn.Parameter(clip.logit_scale.detach().reshape(1))
    for block in [part for part in clip.modules() if isinstance(part, Block)]:
        fully_shard(block, **options)
    fully_shard(clip, **options)
    for method in ("encode_image", "encode_text"):
        register_fsdp_forward_method(clip, method)
    return clip
