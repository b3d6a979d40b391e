"""Small foreign towers with random weights, one for each family that ``common.adapters`` knows."""

from dataclasses import replace
from functools import partial

import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem, HybridEmbed
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from timm.models.vitamin import GeGluMlp, MbConvStages, VitCfg
from torch import nn
from torch.nn import functional as F

OPEN_CLIP = {
    "image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "heads": 2, "mlp_ratio": 2.0, "output_dim": 16,
}  # fmt: skip
TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 16}
HYBRID = {**TIMM, "patch_size": 1}
EVA02 = {"qkv_fused": False, "mlp_ratio": 8 / 3, "swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True}
ROTARY = {"use_rot_pos_emb": True, "ref_feat_shape": (4, 4)}


def _projected(trunk):
    """The trunk in open_clip's ``TimmModel``, with its linear projection and without the trunk's own."""
    trunk.reset_classifier(0)
    model = TimmModel.__new__(TimmModel)
    nn.Module.__init__(model)
    model.trunk, model.head = trunk, nn.Sequential(nn.Dropout(0.0), nn.Linear(trunk.num_features, 16, bias=False))
    return model


def _hybrid_stem():
    stem = ConvStem(channels=(8, 8, 32), stride=(2, 2, 2), kernel_size=(2, 2, 2), padding=0)
    return partial(HybridEmbed, backbone=stem, proj=False)


def _vitamin_stem():
    stages = MbConvStages(VitCfg(embed_dim=(8, 16, 32), depths=(1, 1, 1), stem_width=8))
    return partial(HybridEmbed, backbone=stages, proj=False)


FAMILIES = {
    "CLIP": lambda: VisionTransformer(**OPEN_CLIP),
    "CLIP with layer scale": lambda: VisionTransformer(**OPEN_CLIP, ls_init_value=0.1, patch_dropout=0.5),
    "CLIP with custom blocks": lambda: VisionTransformer(
        **OPEN_CLIP, qk_norm=True, scale_heads=True, scale_attn_inner=True, scale_attn=True, scale_fc=True
    ),
    "CLIPA": lambda: VisionTransformer(**OPEN_CLIP, no_ln_pre=True, pool_type="avg", final_ln_after_pool=True),
    "CLIP, mean of normed tokens": lambda: VisionTransformer(**OPEN_CLIP, pool_type="avg"),
    "CoCa": lambda: VisionTransformer(**OPEN_CLIP, attentional_pool=True, attn_pooler_queries=5, attn_pooler_heads=4),
    "CLIP of timm": lambda: TimmVisionTransformer(**TIMM, pre_norm=True),
    "registers": lambda: TimmVisionTransformer(**TIMM, reg_tokens=3, qk_norm=True, init_values=0.1),
    "registers alone": lambda: TimmVisionTransformer(**TIMM, class_token=False, reg_tokens=3, global_pool="map"),
    "SigLIP": lambda: TimmVisionTransformer(**TIMM, class_token=False, global_pool="map"),
    "gap": lambda: _projected(TimmVisionTransformer(**TIMM, class_token=False, global_pool="avg", init_values=0.1)),
    "MobileCLIP-B": lambda: TimmVisionTransformer(**HYBRID, no_embed_class=True, embed_layer=_hybrid_stem()),
    "ViTamin": lambda: _projected(
        TimmVisionTransformer(
            **{**HYBRID, "img_size": 64}, class_token=False, global_pool="avg", mlp_layer=GeGluMlp, mlp_ratio=2.0,
            embed_layer=_vitamin_stem(),
        )
    ),
    "relative positions": lambda: VisionTransformerRelPos(
        **TIMM, class_token=True, global_pool="token", rel_pos_dim=8, init_values=0.1
    ),
    "relative table, shared": lambda: VisionTransformerRelPos(**TIMM, rel_pos_type="bias", shared_rel_pos=True),
    "EVA": lambda: Eva(**TIMM, global_pool="token", init_values=0.1),
    "EVA, post-norm": lambda: Eva(**TIMM, global_pool="token", use_post_norm=True),
    "EVA02": lambda: Eva(**TIMM, **EVA02, **ROTARY, global_pool="token"),
    "PE": lambda: Eva(
        **TIMM, **ROTARY, attn_type="rope", global_pool="map", use_pre_transformer_norm=True, rope_grid_offset=1.0,
        rope_grid_indexing="xy", attn_pool_num_heads=4, attn_pool_mlp_ratio=4.0,
    ),
}  # fmt: skip
"""Name -> a builder of a tower of 3 blocks and width 32, E = 16, on a grid of 4 patches a side."""


def foreign(name, seed=0):
    """A tower of a family in double precision, with every weight drawn, so that no part is an identity or a zero."""
    torch.manual_seed(seed)
    tower = FAMILIES[name]().double().eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return tower


def twice(x, context):
    """A reducer: the first eight tokens, each of them two times."""
    return context.select(x, torch.arange(8).repeat_interleave(2).expand(len(x), -1))


def once(x, context):
    """A reducer: the first eight tokens, each with the size of two."""
    x, context = context.select(x, torch.arange(8).expand(len(x), -1))
    bias = F.pad(torch.full((len(x), 1, 1, 8), 2.0, dtype=x.dtype).log(), (context.leading, 0))
    return x, replace(context, sizes=torch.full((len(x), 8), 2.0), bias=bias)
