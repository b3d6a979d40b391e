"""A batch of captioned pictures of noise for the pretrainings of this package."""

import torch

from common.clip import CLIP
from common.testing import TINY_CAPTIONS


def caption(number):
    """The text of a sample of ``write_shards``, in the tiny CLIP's words."""
    return TINY_CAPTIONS[number % 6].encode()


def pairs(views=0, count=6):
    """Captioned pictures of the tiny CLIP's size, with further views."""
    generator = torch.Generator().manual_seed(1)
    pictures = [torch.randn(count, 3, 32, 32, generator=generator) for _ in range(1 + views)]
    return {
        "image": pictures[0],
        "image_views": pictures[1:],
        "text": CLIP.tiny().tokenizer(TINY_CAPTIONS[:count], longest=True),
        "caption_id": torch.arange(count),
    }
