"""Recoverable Compression: what stands out stays, what is like a class is recovered, the rest merges.

Shapes: B images, N tokens, K patch tokens, R left, M merged, n others, D width, E joint dim, C classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from common.precision import wide, without_autocast
from common.reducer_registry import reducer
from common.reduction import ReductionContext
from patchrank.reducers.base import Call, Keeping, in_order, most, readout_of
from patchrank.reducers.dpc_knn import density_peaks
from patchrank.reducers.groups import merge_groups, numbered

_NAME = "recoverable-compression"


@reducer(
    _NAME,
    "Recoverable Compression",
    needs=("class token", "readout", "texts"),
    source="Chen et al., AAAI 2025 (Recoverable Compression), from its public descriptions",
    licence="no code could be obtained",
    differs="There one question guides the choice in front of a language model, behind the whole tower; here the "
    "classes' embeddings do, inside the tower, where a patch's readout is the less like any text the earlier the "
    "block: take a late one. There a dynamic threshold sets the number of tokens, which differs from picture to "
    "picture; here R is fixed, and the threshold only divides R - M between the first two steps. Ours are the rule for "
    "outliers with t = 1, the greatest similarity over the classes, M = R / 10, and clusters by density peaks.",
    build=lambda setting: {
        setting.layer: RecoverableCompression(setting.keep, readout_of(setting, _NAME, class_token=True), setting.texts)
    },
)
class RecoverableCompression(Keeping):
    """Keep what stands out to the class token, recover what is like a class, and merge the others into M tokens.

    p = f(x), where f is the tower's last norm and projection. First, patches of outlying v_j = p_class·p_j stay: those
    above the picture's mean of v by t standard deviations, the highest first, at most R - M. Then, until there are
    R - M, patches of the highest s_j = max over the classes c of cos(p_j, text_c) are recovered. The n others form M
    clusters of p, as `dpc-knn` does, and each becomes the mean of its tokens, by size. Kept tokens come first, in their
    order.

    The texts choose the tokens, so a picture's embedding depends on the classes: it has one for each set of classes.

    readout: f, tokens [B,K,D] -> [B,K,E].
    texts: embeddings [C,E] of the classes, of any length.
    threshold: t.
    merged: M's share of R; at least one token.
    ValueError: texts that are no rows, or a share outside (0, 1).
    """

    neighbours = 5

    def __init__(
        self,
        keep: float,
        readout: Callable[[Tensor], Tensor],
        texts: Tensor,
        threshold: float = 1.0,
        merged: float = 0.1,
    ) -> None:
        super().__init__(keep)
        if texts.ndim != 2 or not len(texts):
            raise ValueError(f"texts of shape {tuple(texts.shape)} are no embeddings [C,E]; give a row for each class")
        if not 0 < merged < 1:
            raise ValueError(f"merged {merged} is not in (0, 1); it is a share of the tokens that are left")
        self.readout, self.threshold, self.merged = readout, threshold, merged
        self.register_buffer("texts", F.normalize(wide(texts.detach()), dim=-1), persistent=False)

    def split(self, patches: int) -> tuple[int, int]:
        """R - M and M of ``patches``."""
        left = int(self.left(patches))  # a traced size is a tensor
        if left == patches:
            return left, 0
        merged = max(1, round(self.merged * left))
        return left - merged, merged

    def macs(self, call: Call) -> int:
        """The readout of all patches and the class token, its products, and the distances of the others.

        (K + 1)(5D + DE) + KE + KCE + n²E.
        """
        kept, merged = self.split(call.patches)
        if not merged:
            return 0
        others, embed = call.patches - kept, call.embed_dim
        readout = (call.patches + 1) * call.width * (5 + embed)
        return readout + call.patches * embed * (1 + len(self.texts)) + others**2 * embed

    def ranked(self, class_token: Tensor, patches: Tensor) -> Tensor:
        """All places (long [B,K]), outliers of v first by v, then the others by s; p of the class [B,E] and [B,K,E].

        ValueError: texts of another joint dim.
        """
        if patches.shape[-1] != self.texts.shape[-1]:
            raise ValueError(
                f"texts of {self.texts.shape[-1]} numbers do not fit a tower whose embeddings have "
                f"{patches.shape[-1]}; give those of its own text tower"
            )
        seen = (patches @ class_token[..., None]).squeeze(-1)
        limit = seen.mean(1, keepdim=True) + self.threshold * seen.std(1, correction=0, keepdim=True)
        outlying = seen > limit
        said = (F.normalize(patches, dim=-1) @ self.texts.to(patches).T).amax(-1)
        places = most(torch.where(outlying, seen, said), patches.shape[1])
        # Sorting is stable: each of the two groups stays in its order.
        return places.gather(1, most(outlying.gather(1, places).to(seen), patches.shape[1]))

    def forward(self, x: Tensor, context: ReductionContext) -> tuple[Tensor, ReductionContext]:
        """x [B,N,D] -> x with R patch tokens: the kept ones in the order of their places, then the merged ones."""
        patches = context.patches(x)
        kept, merged = self.split(patches.shape[1])
        if not merged:
            return x, context
        with torch.no_grad():
            read = wide(self.readout(torch.cat([x[:, :1], patches], dim=1)))
            with without_autocast(x):
                places = self.ranked(read[:, 0], read[:, 1:])
                first, others = in_order(places[:, :kept]), in_order(places[:, kept:])
                rest = read[:, 1:].gather(1, others[..., None].expand(-1, -1, read.shape[-1]))
                cluster = density_peaks(rest, merged, self.neighbours)
            group = numbered((first, torch.arange(kept, device=x.device)), (others, kept + cluster))
        return merge_groups(x, context, group, kept + merged)
