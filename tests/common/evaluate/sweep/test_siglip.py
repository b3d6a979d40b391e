"""`effclip sweep` on a model of SigLIP's shape: no class token, a pooling head, a bias beside the logits' scale."""

import json

import open_clip
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from common.data.lookup import source
from common.models import load_model
from common.reducer_registry import installed_reducers
from tests.common.foreign import TIMM

SIGLIP = {
    "embed_dim": TIMM["embed_dim"],
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": TIMM["img_size"],
        "timm_model_name": "vit_base_patch16_siglip_224",
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    },
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1, "pool_type": "last"},
}
"""open_clip's description of ViT-B-16-SigLIP with small numbers; its words are CLIP's, which need no file."""


@pytest.fixture
def siglip(tmp_path, monkeypatch):
    """A folder as open_clip writes them, of random weights; timm's trunk of that name has three blocks here."""

    def trunk(name, num_classes, global_pool, pretrained):
        assert name == SIGLIP["vision_cfg"]["timm_model_name"] and not pretrained
        return VisionTransformer(**TIMM | {"num_classes": num_classes}, class_token=False, global_pool=global_pool)

    monkeypatch.setattr(timm, "create_model", trunk)
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path / "runs"))
    torch.manual_seed(0)
    towers = {name: SIGLIP[name] for name in ("embed_dim", "vision_cfg", "text_cfg", "init_logit_bias")}
    model = open_clip.CustomTextCLIP(**towers)
    folder = tmp_path / "siglip"
    folder.mkdir()
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    described = {"model_cfg": SIGLIP, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    return str(folder)


def rows_of(folder):
    return json.loads((folder / "sweep.json").read_text())["rows"]


@torch.no_grad()
def test_every_reducer_has_a_row_or_a_reason(siglip, data, sweep, tmp_path):
    assert sweep(siglip, "--reducers", "all", "--keep", "0.5", "--template", "a {}") == 0
    whole, *others = rows_of(tmp_path / "out")
    measured = {row["reducer"]: row for row in others if "samples" in row}
    reasons = {row["reducer"]: row["reason"] for row in others if "samples" not in row}
    needs = {name: set(entry.needs) for name, entry in installed_reducers().items()}
    assert measured.keys() | reasons.keys() == needs.keys()
    assert reasons.keys() == {"recoverable-compression", *(name for name in needs if "training" in needs[name])}
    assert "this tower has no class token; take" in reasons["recoverable-compression"]
    assert all(row["samples"] == 24 for row in measured.values())
    # A readout is a whole pooling head here.
    assert all(row["gmacs"] < whole["gmacs"] for name, row in measured.items() if "readout" not in needs[name])

    loaded, test = load_model(siglip), source(data, "zeroshot", "test")
    clip, tokenizer = loaded.images.model, open_clip.get_tokenizer(f"local-dir:{siglip}")
    classes = clip.encode_text(tokenizer([f"a {name}" for name in test.class_names]), normalize=True)
    batches = test.loader(loaded.preprocess, 64, 0)
    right = [(clip.encode_image(batch["image"]) @ classes.T).argmax(-1) == batch["label"] for batch in batches]
    assert whole["top1"] == torch.cat(right).double().mean(), "that of open_clip's own code"
