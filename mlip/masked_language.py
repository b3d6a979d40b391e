"""Masked language modelling on CLIP's text tower, as DeCLIP has it (Li et al., 2022).

Shapes: B captions, T text tokens, D the tower's width, V its vocabulary, M masked tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.ranks import mean_over_ranks, of_this_rank
from common.tower import TextTower
from mlip.alignment import caption_mask


class MaskedLanguage(nn.Module):
    """BERT's task: tell the words that were taken out of a caption from those that stayed.

    15 % of the words are chosen. Of these, 80 % become the mask, 10 % another word, and 10 % stay as they are. The mask
    is the id V, one beyond the vocabulary. Its embedding belongs to this module, so the tower's vocabulary, by whose
    highest id a caption's end is found, is not changed. The tower is causal: a word is told from those before it and
    from what stands in its own place.

    width, vocab_size, context_length: the text tower's.  rate: share of the words that are chosen.
    """

    def __init__(self, width: int, vocab_size: int, context_length: int, rate: float = 0.15) -> None:
        super().__init__()
        self.vocab_size, self.context_length, self.rate = vocab_size, context_length, rate
        self.mask_embedding = nn.Parameter(0.02 * torch.randn(width))
        self.head = nn.Linear(width, vocab_size)

    @property
    def mask_id(self) -> int:
        """V, the id of a masked word."""
        return self.vocab_size

    @torch.no_grad()
    def corrupt(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids [B,T] -> corrupted ids [B,T], and which words were chosen, boolean [B,T].

        Start, end and padding are never chosen, and no word becomes start or end, the two highest ids.
        """
        end = F.one_hot(ids.argmax(1), ids.shape[1]).bool()
        lot, what = (self._drawn(torch.rand, ids) for _ in range(2))
        others = self._drawn(partial(torch.randint, self.vocab_size - 2), ids)
        chosen = caption_mask(ids) & ~end & (lot < self.rate)
        corrupted = torch.where(chosen & (what < 0.8), self.mask_id, ids)
        return torch.where(chosen & (what >= 0.9), others, corrupted), chosen

    def _drawn(self, draw: Callable[..., Tensor], ids: Tensor) -> Tensor:
        """A draw for every word of ids [B,T], another one on every rank.

        T is that of the batch's longest caption. A draw of T columns would have another size on each rank, so rows of
        one would lie in another's, and the ranks' generators would part. All ranks draw the whole context instead.
        """
        rows, length = ids.shape
        whole = of_this_rank(lambda count: draw((count, self.context_length), device=ids.device), rows)
        return whole[:, :length]

    def hidden(self, tower: TextTower, corrupted: Tensor) -> Tensor:
        """Corrupted ids [B,T] -> the tower's tokens [B,T,D] after its last norm."""
        masked = corrupted == self.mask_id
        x = tower.embed(corrupted.masked_fill(masked, 0))
        x = torch.where(masked[..., None], self.mask_embedding + tower.positional_embedding[: x.shape[1]], x)
        return tower.ln_final(tower.run_blocks(x, mask="causal"))

    def embedding(self, tower: TextTower, hidden: Tensor, ids: Tensor) -> Tensor:
        """Tokens [B,T,D] of ``hidden`` -> joint embeddings [B,E] of the captions' ends; ids [B,T], not corrupted."""
        return hidden[torch.arange(len(hidden), device=hidden.device), ids.argmax(1)] @ tower.text_projection

    def loss(self, hidden: Tensor, ids: Tensor, chosen: Tensor) -> Tensor:
        """Mean cross-entropy of the chosen words of all ranks -> scalar; 0 where there are none.

        hidden: [B,T,D].  ids: [B,T], not corrupted.  chosen: boolean [B,T].
        """
        logits = self.head(hidden[chosen]).float()  # [M,V]
        return mean_over_ranks(F.cross_entropy(logits, ids[chosen], reduction="sum"), len(logits))
