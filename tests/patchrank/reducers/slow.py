"""What the tests of reducers share: a small tower in double precision, and its blocks one picture at a time."""

import math

import torch
from torch.nn import functional as F

from common.attention import KVCache
from common.reduction import ReductionContext
from common.tower import ImageTower

TOWER = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "heads": 2, "embed_dim": 16}
PATCHES = 16


def small_tower():
    torch.manual_seed(0)
    return ImageTower(**TOWER).double().eval()


def images(count=2):
    return torch.randn(count, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def tokens(count=2, patches=PATCHES, width=6, seed=0):
    return torch.randn(count, 1 + patches, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plain(x):
    """The context of tokens that no reducer has changed."""
    return ReductionContext(torch.arange(x.shape[1] - 1).expand(len(x), -1))


def cosine(a, b):
    return float(torch.cosine_similarity(a, b, dim=0))


def slow_density_peaks(picture, count):
    """The groups of places around the density peaks of tokens [K,F], in the order of their centres."""
    places = range(len(picture))
    away = [[float((a - b).norm()) / picture.shape[1] ** 0.5 for b in picture] for a in picture]
    density = [math.exp(-sum(d**2 for d in sorted(line)[:5]) / min(5, len(picture))) for line in away]
    widest = max(max(line) for line in away)
    apart = [min((away[i][j] for j in places if density[j] > density[i]), default=widest) for i in places]
    centres = sorted(sorted(places, key=lambda i: -density[i] * apart[i])[:count])
    groups = {c: [c] for c in centres}
    for i in set(places) - set(centres):
        groups[min(centres, key=lambda c: away[i][c])].append(i)
    return [groups[c] for c in centres]


def slow_attention(block, x, sizes=None):
    """What attention adds to one picture's tokens x [N,D], its weights [H,N,N] and keys [H,N,D/H]; no fused kernel."""
    attention = block.attn
    query, key, value = projections(block, x)
    logits = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
    if sizes is not None:
        logits = logits + torch.tensor(sizes).double().log()
    weights = logits.softmax(-1)
    return attention.out_proj((weights @ value).transpose(0, 1).flatten(1)), weights, key


def projections(block, x):
    """Queries, keys and values [H,N,D/H] of one picture's tokens x [N,D]."""
    attention = block.attn
    qkv = F.linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)
    return [part.unflatten(-1, (attention.heads, -1)).transpose(0, 1) for part in qkv.chunk(3, -1)]


def class_row(block, x):
    """Attention [K] of the class token to the patches, mean over heads."""
    return slow_attention(block, x)[1][:, 0, 1:].mean(0)


def rest(tower, x, start):
    """One picture's tokens x [N,D] through the blocks from ``start`` on -> z [E]."""
    return tower.pool(tower.run_blocks(x[None], start=start))[0]


def at_middle(tower, reducer, count=2):
    """Run a reducer in the middle of the second block, on random tokens.

    Returns the block's input [B,N,D], the output of its attention [B,N,D], its keys of patches [B,H,1+K,D/H], and the
    reducer's context, which also holds its tokens as ``result``.
    """
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, 1 + PATCHES, TOWER["width"], dtype=torch.float64, generator=generator)
    block, cache = tower.transformer.resblocks[1], KVCache()
    y, keys = block.attend(x, None, cache, 1), cache.keys(1)
    positions = torch.arange(PATCHES).expand(count, -1)
    result, context = reducer(y, ReductionContext(positions, block=block, entered=x, keys=keys))
    return x, y, keys, Outcome(result, context)


class Outcome:
    """A reducer's tokens, ``result`` [B,N',D], beside all that their context holds."""

    def __init__(self, result, context):
        self.result, self.context = result, context

    def __getattr__(self, name):
        return getattr(self.context, name)
