"""Table 2's architectures against open_clip, and TinyCLIP's released key layout."""

import copy
from dataclasses import replace

import open_clip
import pytest
import torch

from benchmarks.waveclip.rivals import BASELINES, tinyclip_architecture, tinyclip_key, weights_file
from common.clip import CLIP
from common.flops import count_macs

SMALL_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}


def released_tinyclip(clip: torch.nn.Module) -> dict:
    """A checkpoint in the layout of TinyCLIP's releases, from an open_clip model's weights."""
    state = {}
    for key, value in clip.state_dict().items():
        part = "_image_encoder" if key.startswith("visual.") else "_text_encoder"
        part = "_logit_scale" if key == "logit_scale" else part
        if key != "attn_mask":  # not saved: TinyCLIP's mask is not persistent
            state[f"{part}.module.{key}"] = value.clone()
    return {"epoch": 25, "name": "TinyCLIP", "state_dict": state}


def test_a_tower_for_counting_is_the_same_but_for_its_weights():
    row = replace(BASELINES["tinyclip-vit-8m-16"], architecture=tinyclip_architecture(1, 64, 1, 64))
    drawn, counted, picture = row.build().image_tower, row.countable_tower(), torch.zeros(1, 3, 224, 224)
    assert {key: value.shape for key, value in drawn.state_dict().items()} == {
        key: value.shape for key, value in counted.state_dict().items()
    }
    assert count_macs(drawn, picture) == count_macs(counted, picture)


def test_tinyclip_layout(tmp_path):
    name = "tinyclip-vit-8m-16"
    row = BASELINES[name]
    theirs = open_clip.CLIP(**row.architecture).eval()
    torch.save(released_tinyclip(theirs), tmp_path / f"{name}.pt")
    ours = row.build(weights_file(tmp_path, name))
    ids = ours.tokenizer(["a photo of a cat.", "two words"])
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours.image_tower(images), theirs.encode_image(images), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours.text_tower(ids), theirs.encode_text(ids), atol=1e-5, rtol=1e-4)
    assert torch.equal(ours.logit_scale, theirs.logit_scale)


def test_tinyclip_keys():
    for ours, theirs in {
        "_image_encoder.module.visual.conv1.weight": "visual.conv1.weight",
        "image_encoder_without_ddp.visual.proj": "visual.proj",
        "_text_encoder.module.transformer.resblocks.0.ln_1.bias": "transformer.resblocks.0.ln_1.bias",
        "_logit_scale.module.logit_scale": "logit_scale",
        "_logit_scale.logit_scale": "logit_scale",
        "logit_scale": "logit_scale",
        "visual.proj": "visual.proj",
    }.items():
        assert tinyclip_key(ours) == theirs


def test_mobileclip_is_folded_without_changing_its_answers(tmp_path):
    """Also that its file is read strictly."""
    architecture = copy.deepcopy(BASELINES["mobileclip-s2"].architecture)
    architecture["vision_cfg"]["image_size"] = 64
    architecture["text_cfg"] = SMALL_TEXT
    theirs = open_clip.CustomTextCLIP(**{key: architecture[key] for key in ("embed_dim", "vision_cfg", "text_cfg")})
    images = torch.randn(2, 3, 64, 64)
    theirs.train()(images, torch.zeros(2, 77, dtype=torch.long))  # moves the batch statistics off their start
    torch.save(theirs.state_dict(), tmp_path / "mobileclip-s2.pt")
    ours = replace(BASELINES["mobileclip-s2"], architecture=architecture).build(tmp_path / "mobileclip-s2.pt")
    assert len(ours.model.visual.state_dict()) < len(theirs.visual.state_dict()), "its branches are folded"
    with torch.no_grad():
        expected = theirs.eval().encode_image(images, normalize=True)
        torch.testing.assert_close(ours.encode_image(images), expected, atol=1e-4, rtol=1e-3)
    torch.save({"visual.nothing": torch.zeros(1)}, tmp_path / "mobileclip-s2.pt")
    with pytest.raises(ValueError, match="does not fit this architecture"):
        replace(BASELINES["mobileclip-s2"], architecture=architecture).build(tmp_path / "mobileclip-s2.pt")


def test_a_file_that_records_itself(tmp_path):
    """It settles the activation; another architecture is refused."""
    small = tinyclip_architecture(1, 64, 1, 64)
    row = replace(BASELINES["clip-vit-b-16"], architecture={**small, "quick_gelu": True})
    CLIP({**small, "quick_gelu": False}).save(tmp_path / "clip-vit-b-16.safetensors")
    assert not row.build(tmp_path / "clip-vit-b-16.safetensors").quick_gelu
    assert row.build().quick_gelu
    other = replace(row, architecture=tinyclip_architecture(2, 64, 1, 64))
    with pytest.raises(ValueError, match="records vision_cfg"):
        other.build(tmp_path / "clip-vit-b-16.safetensors")


def test_one_file_a_row(tmp_path):
    assert weights_file(tmp_path, "mobileclip-b") is None
    for suffix in (".pt", ".bin"):
        (tmp_path / f"mobileclip-b{suffix}").touch()
    with pytest.raises(ValueError, match="keep one"):
        weights_file(tmp_path, "mobileclip-b")
