"""Rankings of a whole data set: aligned with their keys, never computed twice, and surviving a kill."""

import functools
import shutil

import pytest
import torch
from torch.nn import functional as F

from common.adapters import adapt
from common.tower import ImageTower
from patchrank import golden_cache as rankings
from patchrank.golden import golden_ranking
from patchrank.golden_cache import ranked, settings_key
from tests.common.foreign import foreign

TOWER = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "heads": 2, "embed_dim": 16}
SETTINGS = {"prune_layer": 1, "block": 2, "progress": False}


@pytest.fixture
def tower():
    torch.manual_seed(0)
    return ImageTower(**TOWER).double().eval()


@pytest.fixture
def computed(monkeypatch):
    """How many pictures each call of ``golden_ranking`` got."""
    counts = []

    @functools.wraps(golden_ranking)
    def count(tower, images, *rest, **settings):
        counts.append(len(images))
        return golden_ranking(tower, images, *rest, **settings)

    monkeypatch.setattr(rankings, "golden_ranking", count)
    return counts


def pictures(count=7):
    return torch.randn(count, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def loader(batch_size=3, images=None):
    images = pictures() if images is None else images
    keys = [f"picture {row}" for row in range(len(images))]
    return [
        {"image": images[some], "key": [keys[row] for row in some], "label": some % 5}
        for some in torch.arange(len(images)).split(batch_size)
    ]


def test_orders_are_those_of_golden_ranking_by_key(tower, tmp_path):
    rankings = ranked(tower, loader(), folder=tmp_path, **SETTINGS)
    expected = golden_ranking(tower, pictures(), prune_layer=1).order
    assert len(rankings) == 7
    assert torch.equal(rankings.of([f"picture {row}" for row in range(7)]), expected)
    assert torch.equal(rankings.of(["picture 4", "picture 0", "picture 4"]), expected[[4, 0, 4]])
    with pytest.raises(ValueError, match="1 of 2 pictures were not ranked, such as 'picture 9'; rank the loader"):
        rankings.of(["picture 0", "picture 9"])


def test_a_second_time_everything_comes_from_disk(tower, tmp_path, computed):
    first = ranked(tower, loader(), folder=tmp_path, **SETTINGS)
    # Other batches, another order, other names: the pictures are the same.
    again = loader(2)[::-1]
    for batch in again:
        batch["key"] = [key.upper() for key in batch["key"]]
    second = ranked(tower, again, folder=tmp_path, **SETTINGS)
    assert computed == [3, 3, 1]
    for row in range(7):
        assert torch.equal(first.of([f"picture {row}"]), second.of([f"PICTURE {row}"]))


@pytest.mark.parametrize(("greedy", "cost"), [({}, "0.0"), ({"rounds": 2, "removed_per_round": 4}, "at most 0.0")])
def test_what_a_picture_costs_is_printed(tower, tmp_path, capsys, greedy, cost):
    ranked(tower, loader(), folder=tmp_path, prune_layer=1, **greedy)
    assert f"golden rankings ({cost}" in (printed := capsys.readouterr().out) and "GMACs a picture)" in printed


def test_after_a_kill_only_what_was_not_written_is_computed(tower, tmp_path, computed):
    """What a kill leaves is what stands in the folder at that moment."""

    def killed():
        for number, batch in enumerate(loader()):
            if number == 2:
                shutil.copytree(tmp_path / "run", tmp_path / "left")
            yield batch

    whole = ranked(tower, killed(), folder=tmp_path / "run", save_every=0, **SETTINGS)
    resumed = ranked(tower, loader(), folder=tmp_path / "left", **SETTINGS)
    assert computed == [3, 3, 1, 1]
    assert torch.equal(whole.orders, resumed.orders)
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".safetensors"]


def test_what_was_computed_before_an_error_is_kept(tower, tmp_path, computed):
    def broken():
        yield from loader()[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ranked(tower, broken(), folder=tmp_path, **SETTINGS)
    ranked(tower, loader(), folder=tmp_path, **SETTINGS)
    assert computed == [3, 3, 1]


def test_new_pictures_are_added_to_old_ones(tower, tmp_path, computed):
    ranked(tower, loader(), folder=tmp_path, **SETTINGS)
    more = torch.cat([torch.zeros(1, 3, 32, 32).double(), pictures()])
    rankings = ranked(tower, loader(4, more), folder=tmp_path, **SETTINGS)
    assert computed == [3, 3, 1, 1]
    assert torch.equal(rankings.of(["picture 1"]), golden_ranking(tower, pictures()[:1], prune_layer=1).order)


def test_the_key_is_what_a_ranking_depends_on(tower):
    classes = {"class_embeddings": F.normalize(torch.randn(5, 16), dim=-1), "logit_scale": 10.0}
    base = settings_key(tower, "feature")
    assert base == settings_key(tower, "feature", block=2, stride=1, memory=1, **classes)
    keys = [
        base,
        settings_key(tower, "feature", block=3),
        settings_key(tower, "feature", prune_layer=1),
        settings_key(tower, "feature", rounds=2, removed_per_round=4),
        settings_key(tower, "confidence", **classes),
        settings_key(tower, "label", **classes),
        settings_key(tower, "label", **{**classes, "logit_scale": 11.0}),
        settings_key(tower, "label", **{**classes, "class_embeddings": -classes["class_embeddings"]}),
        settings_key(ImageTower(**{**TOWER, "heads": 1}), "feature"),
        settings_key(ImageTower(**TOWER, quick_gelu=True), "feature"),
    ]
    with torch.no_grad():
        tower.proj[0, 0] += 1
    keys.append(settings_key(tower, "feature"))
    assert len(set(keys)) == len(keys)


def test_heads_and_activation_alone_change_the_key(tower):
    others = [ImageTower(**{**TOWER, "heads": 1}), ImageTower(**TOWER, quick_gelu=True)]
    for other in others:
        other.load_state_dict(tower.state_dict())
    assert len({settings_key(one, "feature") for one in (tower, *others)}) == 3


def test_label_driven_rankings_depend_on_the_label(tower, tmp_path, computed):
    settings = {
        "class_embeddings": F.normalize(torch.randn(5, 16, generator=torch.Generator().manual_seed(2)), dim=-1),
        "logit_scale": 10.0,
        **SETTINGS,
    }
    rankings = ranked(tower, loader(), "label", folder=tmp_path, **settings)
    other = loader()
    for batch in other:
        batch["label"] = (batch["label"] + 1) % 5
    changed = ranked(tower, other, "label", folder=tmp_path, **settings)
    assert computed == [3, 3, 1] * 2 and not torch.equal(rankings.orders, changed.orders)
    del settings["progress"]
    labels = torch.arange(7) % 5
    expected = golden_ranking(tower, pictures(), "label", labels=labels, **settings)
    assert torch.equal(rankings.orders.long(), expected.order)


def test_batches_must_name_their_pictures_apart(tower, tmp_path):
    with pytest.raises(ValueError, match=r"a batch with \['image'\] has no 'key'"):
        ranked(tower, [{"image": pictures()}], folder=tmp_path, **SETTINGS)
    given = {"class_embeddings": torch.eye(16), "logit_scale": 1.0, **SETTINGS}
    with pytest.raises(ValueError, match="has no 'label'"):
        ranked(tower, [{"image": pictures(), "key": list("abcdefg")}], "label", folder=tmp_path, **given)
    with pytest.raises(ValueError, match="two different pictures are called 'a'"):
        ranked(tower, [{"image": pictures(2), "key": ["a", "a"]}], folder=tmp_path, **SETTINGS)
    with pytest.raises(ValueError, match="gave no batch"):
        ranked(tower, [], folder=tmp_path, **SETTINGS)


def test_another_librarys_tower_is_ranked_and_stored_too(computed, tmp_path):
    for name in ("SigLIP", "EVA02"):
        tower = adapt(foreign(name))
        first = ranked(tower, loader(), folder=tmp_path, **SETTINGS)
        again = ranked(tower, loader(), folder=tmp_path, **{**SETTINGS, "progress": True})
        assert torch.equal(first.orders, again.orders)
    assert computed == [3, 3, 1] * 2
    tower, other = adapt(foreign("SigLIP")), adapt(foreign("SigLIP"))
    other.source.blocks[0].attn.num_heads = 4
    assert settings_key(tower, "feature") != settings_key(other, "feature")
