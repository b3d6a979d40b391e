"""FLIP: the loss of pictures whose dropped patches are really not there."""

import sys

import lightning
import pytest
import torch
import yaml
from torch.nn import functional as F

from common.cli import main
from common.contrastive import info_nce
from common.data.shards import ShardDataModule
from common.data.smoke import write_shards
from common.optim import parameter_groups
from common.pretraining import CLIPPretraining
from common.reduction import ReductionContext
from common.testing import tiny_architecture
from patchrank.flip import FLIPPretraining
from patchrank.reducers.random import RandomPerPicture
from tests.patchrank.pairs import caption, pairs
from tests.patchrank.short_runs import QUIET
from tests.readme import ROOT


@pytest.fixture
def make(tmp_path):
    architecture = tiny_architecture(tmp_path)

    def build(training=FLIPPretraining, **options):
        torch.manual_seed(0)
        return training(architecture=architecture, warmup_steps=1, **options)

    return build


@torch.no_grad()
def test_each_picture_shows_patches_of_its_own(make):
    """Of 16 patches a quarter, whatever the draw says, in every picture apart."""
    module, batch = make(keep=0.25).train(), pairs()
    torch.manual_seed(7)
    drawn = torch.rand(6, 16).argsort(dim=1, descending=True)[:, :4].tolist()
    tower, embeddings = module.clip.image_tower, []
    for picture, places in zip(batch["image"], drawn, strict=True):
        x = tower.embed(picture[None])[:, [0] + [1 + place for place in places]]
        embeddings.append(tower.pool(tower.run_blocks(x))[0])
    assert len({tuple(sorted(places)) for places in drawn}) > 1
    images = F.normalize(torch.stack(embeddings), dim=-1)
    expected = info_nce(images, module.clip.encode_text(batch["text"]), module.clip.logit_scale.exp())
    torch.manual_seed(7)
    torch.testing.assert_close(module.loss(batch), expected)
    assert not torch.allclose(module.loss(batch), expected, atol=1e-5)  # the next step draws anew


@torch.no_grad()
def test_ranks_draw_what_one_would_for_the_joined_batch(monkeypatch):
    x = torch.randn(6, 17, 8)

    def left(rows):
        part, context = x[rows], ReductionContext(torch.arange(16).expand(len(x[rows]), -1))
        torch.manual_seed(7)  # Lightning seeds all ranks alike
        return RandomPerPicture(0.25)(part, context)[0]

    joined = left(slice(6))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        own = slice(3 * rank, 3 * rank + 3)
        torch.testing.assert_close(left(own), joined[own], atol=0, rtol=0)


@torch.no_grad()
def test_whole_pictures_are_seen_in_evaluation_and_in_the_unmasked_tuning(make):
    batch, plain = pairs(), make(CLIPPretraining)
    images, _ = plain(batch["image"], batch["text"])
    torch.testing.assert_close(make(keep=0.5).eval()(batch["image"], batch["text"])[0], images, atol=0, rtol=0)
    torch.testing.assert_close(make(keep=1.0).train().loss(batch), plain.loss(batch), atol=0, rtol=0)


def test_parts_of_a_batch_have_the_loss_and_gradient_of_the_same_draws(make):
    """The second pass through a part must draw as the first did, or the gradient would be another loss's."""
    module, batch = make(keep=0.5, parts=2).train(), pairs()
    torch.manual_seed(3)
    module.loss(batch).backward()
    gradient = module.clip.image_tower.proj.grad.clone()
    module.zero_grad()
    torch.manual_seed(3)
    drawn = [torch.rand(3, 16).argsort(dim=1, descending=True)[:, :8] for _ in range(2)]
    x = module.clip.image_tower.embed(batch["image"])
    kept = torch.cat([torch.zeros(6, 1, dtype=torch.long), 1 + torch.cat(drawn)], dim=1)
    x = module.clip.image_tower.run_blocks(x.gather(1, kept[..., None].expand(-1, -1, 64)))
    images = F.normalize(module.clip.image_tower.pool(x), dim=-1)
    info_nce(images, module.clip.encode_text(batch["text"]), module.clip.logit_scale.exp()).backward()
    torch.testing.assert_close(gradient, module.clip.image_tower.proj.grad)


def test_a_short_run_masks_and_a_second_one_tunes_on_whole_pictures(make, tmp_path):
    shards = write_shards(tmp_path / "shards", shards=2, samples=8, txt=caption)
    architecture = str(tmp_path / "tiny.json")
    data = ShardDataModule(shards, shards, architecture=architecture, batch_size=4, num_workers=0, train_num_samples=16)
    module = make(keep=0.5, learning_rate=1e-3)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = lightning.Trainer(max_steps=4, max_epochs=-1, limit_val_batches=1, enable_checkpointing=False, **QUIET)
    trainer.fit(module, data)
    assert all(not torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert {"train_loss", "val_loss"} <= set(trainer.callback_metrics)
    module.clip.save(tmp_path / "flip.safetensors")
    tuned = make(keep=1.0, weights=str(tmp_path / "flip.safetensors"))
    torch.testing.assert_close(tuned.clip.image_tower.proj, module.clip.image_tower.proj)


@pytest.mark.parametrize("recipe", ["flip", "aclip"])
def test_the_smoke_overlay_runs_the_recipes_of_masked_pretraining(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["fit", "-c", f"patchrank/{recipe}.yaml", "-c", "patchrank/smoke.yaml"]) == 0
    assert list((tmp_path / "runs").rglob("last.ckpt"))


@pytest.mark.parametrize(("name", "epochs"), [("flip", 32), ("aclip", 25)])
def test_recipes_state_their_epochs(name, epochs):
    recipe = yaml.safe_load((ROOT / f"patchrank/{name}.yaml").read_text())
    pairs, batch = (recipe["data"]["init_args"][key] for key in ("train_num_samples", "global_batch_size"))
    assert recipe["trainer"]["max_steps"] == pairs * epochs // batch


def test_a_rate_is_a_share(make):
    with pytest.raises(ValueError, match=r"keep 0 is not in \(0, 1\]"):
        make(keep=0)


@pytest.mark.parametrize("name", ["flip", "aclip"])
def test_embedded_recipes_train_as_the_teacher_of_scenes_of_shape(name):
    """What the recipes say of themselves: data, optimiser and length are those of common/shapes_clip.yaml."""
    recipe, teacher = (
        yaml.safe_load((ROOT / path).read_text())
        for path in (f"patchrank/embedded_{name}.yaml", "common/shapes_clip.yaml")
    )
    shared = {"architecture", "learning_rate", "weight_decay", "warmup_steps", "optimizer"}
    mine, others = ({key: one["model"]["init_args"][key] for key in shared} for one in (recipe, teacher))
    assert mine == others
    data = recipe["data"]["init_args"]
    assert {key: value for key, value in data.items() if key != "image_views"} == teacher["data"]["init_args"]
    assert recipe["trainer"] == teacher["trainer"]


def test_muon_steps_the_blocks_where_a_recipe_asks_for_it(make):
    module = make(optimizer="muon")
    groups = parameter_groups(module, 1e-3, 0.1, optimizer=module.optimizer_name)
    assert module.hparams.optimizer == "muon" and any(group["muon"] for group in groups)
