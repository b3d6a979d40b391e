"""The table of architectures: one row of each kind, and that towers of one kind share their trial."""

import open_clip
import pytest
import torch

from benchmarks.together import architectures
from benchmarks.together.architectures import built, cut, image_side, render, rows, text_side, with_memory


def config_of(name):
    return open_clip.get_model_config(name)


def test_a_plain_vit_works_everywhere_and_halves_at_the_next_size():
    (row,) = rows(["ViT-S-32-alt"])
    gmacs = row.pop("GMACs")
    assert row == {
        "name": "ViT-S-32-alt", "load": "yes", "evaluate": "yes", "reduce": "yes", "golden": "yes",
        "wave": "at 256 px", "export": "yes",
    }  # fmt: skip
    width, tokens, depth = 384, 50, config_of("ViT-S-32-alt")["vision_cfg"]["layers"]
    block = 12 * width**2 * tokens + 2 * width * tokens**2 + 2 * 5 * width * tokens
    ends = 3 * 32 * 32 * width * 49 + 2 * 5 * width * tokens + width * 256
    assert round(1e9 * gmacs) == depth * block + ends


def test_towers_of_one_kind_share_a_trial_and_keep_their_own_sizes(monkeypatch):
    monkeypatch.setattr(architectures, "trial", lambda *_: dict.fromkeys(("embeds", "wave"), "yes"))
    trials = {}
    small, large = (image_side(config_of(name), trials) for name in ("ViT-S-32-alt", "ViT-S-16"))
    assert len(trials) == 1 and large["GMACs"] > 3 * small["GMACs"]
    assert (small["wave"], large["wave"]) == ("at 256 px", "yes")


def test_text_of_other_libraries_is_named():
    assert text_side("roberta-ViT-B-32", config_of("roberta-ViT-B-32")) == "text tower of transformers"
    assert text_side("ViT-B-16-SigLIP", config_of("ViT-B-16-SigLIP")) == "tokenizer of transformers"


@pytest.mark.parametrize(
    ("name", "why"),
    [("MobileCLIP2-S0", "no: convolutional"), ("swin_base_patch4_window7_224", "no: windows")],
)
def test_a_tower_without_patch_tokens_says_why(name, why, monkeypatch):
    monkeypatch.setattr(architectures, "exported", lambda *_: True)
    visual = built(config_of(name))
    cut(visual, 1)
    outcome = architectures.trial(config_of(name), visual, None)
    assert outcome == {"embeds": "yes", "export": "yes", **dict.fromkeys(("reduce", "golden", "wave"), why)}


def test_a_cut_tower_keeps_its_first_blocks_and_gets_memory():
    visual = built(config_of("PE-Core-T-16-384"), 64)
    assert cut(visual) == 12 and len(visual.trunk.blocks) == 2
    with_memory(visual)
    assert visual(torch.zeros(1, 3, 64, 64)).isfinite().all()


def test_the_table_has_a_column_for_all():
    row = dict.fromkeys(architectures.COLUMNS, "yes") | {"name": "ViT-X", "GMACs": 12.3456}
    lines = render({"rows": [row]})["md"].splitlines()
    assert lines[0].startswith("| architecture | load |") and lines[2].startswith("| ViT-X | yes | yes | 12.35 |")


def test_the_totals_name_the_reasons():
    row = dict.fromkeys(architectures.COLUMNS, "yes") | {"name": "ViT-X", "GMACs": 12.3456}
    text = render({"rows": [row, row | {"wave": "no: windows"}, row | {"wave": "no: windows"}]})["md"]
    assert "Of 3 architectures: load 3; evaluate 3; reduce 3; golden 3; wave 1 (2 no: windows); export 3." in text
