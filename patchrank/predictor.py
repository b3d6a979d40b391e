"""The predictor of Phase II: a small mixer that ranks patch tokens from what enters the block where they are pruned.

Shapes: B images, N patch tokens, D width.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from common.adapters import AdaptedTower
from common.checkpoints import read_plain, training_arguments
from common.precision import wide_linear
from common.tower import ImageTower
from common.weights import read_record, read_state_dict, save_model

CHANNELS = 64
_PREFIX = "predictor."


class RankPredictor(nn.Module):
    """Scores for every patch token, high = keep: 46,246 parameters at ViT-B/16's 197 tokens, 7.3 M multiply-adds.

    Neighbouring channels are averaged down to 64 (or the greatest divisor of D below), which needs no weights. One
    MLP-Mixer block mixes the tokens (class token included; hidden width 32) and the channels (hidden width 256). A
    linear head scores each patch token. The released code feeds the predictor another network's last layer. Here it
    reads the tokens that are about to be pruned, since those cost nothing more.

    width: D.  tokens: P + N, fixed by the mixer.  leading: P, the class token (in other libraries' towers also none,
        or registers), which gets no score.
    """

    def __init__(self, width: int = 768, tokens: int = 197, leading: int = 1) -> None:
        from timm.models.mlp_mixer import MixerBlock  # with torchvision, as slow to import as torch

        super().__init__()
        self.width, self.tokens, self.leading = width, tokens, leading
        self.channels = max(part for part in range(1, CHANNELS + 1) if width % part == 0)
        self.mixer = MixerBlock(self.channels, tokens, mlp_ratio=(0.5, 4.0))
        self.head = nn.Linear(self.channels, 1)

    @classmethod
    def for_tower(cls, tower: ImageTower | AdaptedTower) -> RankPredictor:
        """A predictor with random weights for the tokens of an image tower."""
        return cls(tower.width, tower.leading + tower.grid**2, tower.leading)

    @property
    def macs(self) -> int:
        """Multiply-adds of one picture: two norms, the two maps of each mixing, and the head."""
        by_token, by_channel = (mlp.fc1.out_features for mlp in (self.mixer.mlp_tokens, self.mixer.mlp_channels))
        mixing = 2 * self.tokens * self.channels * (5 + by_token + by_channel)
        return mixing + (self.tokens - self.leading) * self.channels

    def forward(self, x: Tensor) -> Tensor:
        """x [B,P+N,D], leading tokens first -> scores [B,N], in fp32 at least.

        ValueError: other than the tokens it was built for.
        """
        if x.shape[1:] != (self.tokens, self.width):
            raise ValueError(f"{tuple(x.shape[1:])} tokens given to a predictor for {(self.tokens, self.width)}")
        x = x.unflatten(-1, (self.channels, -1)).mean(-1)
        # Tied scores would keep the first rows of the picture.
        return wide_linear(self.head, self.mixer(x)[:, self.leading :]).squeeze(-1)


def save_predictor(
    predictor: RankPredictor, path: str | Path, prune_layer: int, dtype: torch.dtype = torch.float16
) -> None:
    """Write a predictor alone (below 100 kB) for ``load_predictor``.  prune_layer: the block whose tokens it reads."""
    alone = nn.ModuleDict({_PREFIX.rstrip("."): predictor})
    save_model(alone, path, {"patchrank": {"prune_layer": prune_layer}}, dtype)


def load_predictor(path: str | Path, tower: ImageTower | AdaptedTower, prune_layer: int) -> RankPredictor:
    """The predictor in a checkpoint of ``RankPredictorTraining`` or in a file of ``PatchRankTower`` or its own.

    ValueError: no such file, one of another kind, or a predictor of another tower or of another block's tokens.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        trained_for, state = read_record(path).get("patchrank", {}), read_state_dict(str(path))
    else:
        checkpoint = read_plain(path)
        trained_for, state = training_arguments(checkpoint), checkpoint.get("state_dict", {})
    state = {key.removeprefix(_PREFIX): value for key, value in state.items() if key.startswith(_PREFIX)}
    if not state or "prune_layer" not in trained_for:
        raise ValueError(f"{path} holds no predictor; train one with lightning fit -c patchrank/predictor.yaml")
    if trained_for["prune_layer"] != prune_layer:
        raise ValueError(
            f"the predictor of {path} reads the tokens before block {trained_for['prune_layer']}; pruning before "
            f"block {prune_layer} needs one that was trained there"
        )
    predictor = RankPredictor.for_tower(tower)
    try:
        predictor.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"the predictor of {path} is of another image tower: {str(error)[:300]}") from error
    return predictor
