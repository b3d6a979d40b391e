"""Both trainings by short runs of the Trainer: what moves and what stays, what is kept, what comes back."""

import functools
from types import SimpleNamespace

import lightning
import pytest
import torch
from lightning import LightningDataModule
from torch.nn import functional as F
from torch.utils.data import DataLoader

from common.clip import CLIP
from common.testing import TINY_CAPTIONS, tiny_architecture
from patchrank import PatchRankTower, PromptedCLIP, Prompts, PromptTuning, RankPredictorTraining
from patchrank.golden import golden_ranking
from patchrank.losses import kendall_tau, pruned_overlap

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
CLASSES = TINY_CAPTIONS[:4]
WARNINGS = pytest.mark.filterwarnings("ignore")


class Pictures(LightningDataModule):
    """Twelve pictures of noise, three of each of four classes, the same for training and evaluation."""

    class_prompts = tuple(CLASSES)
    class_names = tuple(text.removeprefix("a ") for text in CLASSES)

    def __init__(self, augment=False):
        super().__init__()
        self.augment = augment
        noise = torch.Generator().manual_seed(3)
        images = torch.randn(12, 3, 32, 32, generator=noise)
        self.samples = [{"image": image, "label": i % 4, "key": f"{i}"} for i, image in enumerate(images)]

    def dataloader(self, split, train=None):
        return DataLoader(self.samples, batch_size=6, shuffle=bool(train))

    def train_dataloader(self):
        return self.dataloader("train", train=True)

    def val_dataloader(self):
        return self.dataloader("val")

    test_dataloader = val_dataloader

    def images(self):
        return torch.stack([sample["image"] for sample in self.samples])


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Arguments that name the tiny CLIP with stored weights; rankings are kept in the test's folder."""
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))
    torch.manual_seed(0)
    CLIP.tiny().save(tmp_path / "clip.safetensors")
    return {"architecture": tiny_architecture(tmp_path), "weights": str(tmp_path / "clip.safetensors")}


def fit(module, steps=3, data=None):
    """The trainer after a few steps, and the module's weights before them."""
    lightning.seed_everything(0, verbose=False)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    trainer = lightning.Trainer(max_steps=steps, enable_checkpointing=False, **QUIET)
    trainer.fit(module, data or Pictures())
    return trainer, before


def moved(module, before):
    """Names of the weights that a run has changed."""
    return {key for key, value in module.state_dict().items() if not torch.equal(value, before[key])}


def loss_of(module):
    """The training loss of all twelve pictures at once."""
    module.log = lambda *_, **__: None
    return module.training_step({"image": Pictures().images(), "label": torch.arange(12) % 4}, 0).detach()


@pytest.fixture
def predictor(start):
    """Makes the module of a predictor's training on the tiny tower."""
    return lambda **options: RankPredictorTraining(
        **start | {"prune_layer": 1, "keep": 0.5, "warmup_steps": 1, "learning_rate": 1e-2} | options
    )


@pytest.fixture
def tuning(start, predictor, tmp_path):
    """Makes the module of a prompt tuning that prunes by a stored predictor."""
    ranks = predictor()
    tower, clip = ranks.deployable()
    tower.save(tmp_path / "tower.safetensors", clip.architecture)
    given = {"predictor": str(tmp_path / "tower.safetensors"), "keep": 0.5, "prune_layer": 1, "depth": 2}
    return lambda **options: PromptTuning(**start, **given | {"warmup_steps": 1, "learning_rate": 0.05} | options)


@WARNINGS
@pytest.mark.parametrize("loss", ["keep_set", "margin", "listwise"])
def test_the_predictor_learns_the_golden_rankings_and_the_clip_stays(predictor, loss):
    module, data = predictor(loss=loss), Pictures()
    _, before = fit(module, steps=60)
    changed = moved(module, before)
    assert changed and all(key.startswith("predictor.") for key in changed)
    order = golden_ranking(module.clip.image_tower, data.images(), prune_layer=1).order
    with torch.no_grad():
        scores = module(data.images())
    assert pruned_overlap(scores, order, 8).mean() > 0.8


@WARNINGS
def test_validation_and_test_state_overlap_and_tau(predictor):
    module, data = predictor(), Pictures()
    trainer, _ = fit(module)
    order = golden_ranking(module.clip.image_tower, data.images(), prune_layer=1).order
    with torch.no_grad():
        scores = module(data.images())
    expected = {"overlap": pruned_overlap(scores, order, 8).mean(), "tau": kendall_tau(scores, order).mean()}
    for split, run in (("val", trainer.validate), ("test", trainer.test)):
        (found,) = run(module, data, verbose=False)
        for name, value in expected.items():
            assert found[f"{split}_{name}"] == pytest.approx(value.item(), abs=1e-6)


@WARNINGS
def test_rankings_are_computed_on_first_use_alone(predictor, monkeypatch):
    fit(predictor())

    @functools.wraps(golden_ranking)
    def refuse(*_, **__):
        raise AssertionError("ranked again")

    monkeypatch.setattr("patchrank.golden_cache.golden_ranking", refuse)
    fit(predictor(loss="margin"))
    with pytest.raises(AssertionError, match="ranked again"):
        fit(predictor(block=1))


@WARNINGS
@pytest.mark.parametrize("score", ["label", "confidence"])
def test_rankings_may_preserve_the_classes(predictor, score):
    module = predictor(score=score)
    fit(module)
    classes = module.clip.encode_text(module.clip.tokenizer(list(CLASSES))).detach()
    labels = torch.arange(12) % 4
    scale, images = module.clip.logit_scale.exp(), Pictures().images()
    text = {"class_embeddings": classes, "logit_scale": scale, "labels": labels}
    expected = golden_ranking(module.clip.image_tower, images, score, prune_layer=1, **text)
    assert torch.equal(module._golden["train"].of([str(i) for i in range(12)]), expected.order)


@WARNINGS
def test_random_views_have_no_golden_ranking(predictor):
    with pytest.raises(ValueError, match="set the data's augment: false"):
        fit(predictor(), data=Pictures(augment=True))
    with pytest.raises(ValueError, match=r"keep 1\.0 prunes nothing of 16 patch tokens"):
        predictor(keep=1.0)
    with pytest.raises(ValueError, match="prune_layer 2 is none of the 2 blocks"):
        predictor(prune_layer=2)


@WARNINGS
@pytest.mark.parametrize("kind", ["coupled", "independent", "text", "visual"])
def test_prompts_learn_the_shots_and_the_rest_stays_bit_equal(tuning, kind):
    module = tuning(kind=kind)
    _, before = fit(module, steps=40)
    trained = {f"model.tower.prompts.{name}" for name, _ in module.prompts.named_parameters()}
    assert moved(module, before) == trained
    after = loss_of(module)
    module.load_state_dict(before)
    assert after < loss_of(module)


@WARNINGS
def test_a_step_is_the_cross_entropy_of_the_zero_shot_scores(tuning):
    module = tuning()
    fit(module, steps=2)
    ids, labels, images = module.model.tokenizer(list(CLASSES)), torch.arange(12) % 4, Pictures().images()
    with torch.no_grad():
        z, classes = module.model.encode_image(images), module.model.encode_text(ids)
    odds = (module.model.logit_scale.exp() * z @ classes.T).softmax(-1)
    torch.testing.assert_close(loss_of(module), -odds[range(12), labels].log().mean())


@WARNINGS
@pytest.mark.parametrize("depth", [1, 2])
def test_words_and_a_template_make_the_text_of_the_first_step(tuning, depth):
    module = tuning(kind="text", depth=depth, words="a red", template="bird {}", keep=1.0)
    module.trainer = SimpleNamespace(datamodule=Pictures())
    module.setup("fit")
    texts = module.model.tokenizer([f"a red bird {name}" for name in Pictures.class_names])
    with torch.no_grad():
        expected = F.normalize(module.model.text_tower(texts), dim=-1)
        torch.testing.assert_close(module.embed_classes(), expected, atol=1e-5, rtol=0)
    with pytest.warns(UserWarning, match="words 'a red' are ignored: kind visual"):
        tuning(kind="visual", words="a red")


@WARNINGS
def test_visual_prompts_are_tested_among_the_classes_of_the_data_at_hand(tuning):
    class Renamed(Pictures):
        class_prompts = tuple(reversed(CLASSES))

    module = tuning(kind="visual")
    trainer, _ = fit(module, steps=2)
    trainer.test(module, Renamed(), verbose=False)
    with torch.no_grad():
        torch.testing.assert_close(module._classes, module.model.encode_text(module.model.tokenizer(CLASSES[::-1])))


@WARNINGS
@pytest.mark.parametrize("which", ["predictor", "tuning"])
def test_a_checkpoint_holds_what_trains_and_gives_equal_outputs(which, request, tmp_path):
    module = request.getfixturevalue(which)()
    trainer, _ = fit(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert stored.keys() == {name for name, of in module.named_parameters() if of.requires_grad}
    again = type(module).load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    with torch.no_grad():
        assert torch.equal(again(Pictures().images()), module(Pictures().images()))
    before = {key: value.clone() for key, value in again.state_dict().items()}
    further = lightning.Trainer(max_steps=5, enable_checkpointing=False, **QUIET)
    further.fit(again, Pictures(), ckpt_path=tmp_path / "a.ckpt")
    assert moved(again, before) == stored.keys() and further.global_step == 5


@WARNINGS
def test_random_frozen_weights_stay_in_a_checkpoint_since_nothing_else_knows_them(predictor, tmp_path):
    module = predictor(weights=None)
    trainer, _ = fit(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = RankPredictorTraining.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    with torch.no_grad():
        assert torch.equal(again(Pictures().images()), module(Pictures().images()))


@WARNINGS
def test_a_predictors_checkpoint_is_what_prompts_are_tuned_with(predictor, tuning, tmp_path):
    ranks = predictor()
    trainer, _ = fit(ranks)
    trainer.save_checkpoint(tmp_path / "ranks.ckpt")
    module = tuning(predictor=str(tmp_path / "ranks.ckpt"), prompts=0, kind="text")
    with torch.no_grad():
        found = module.model.encode_image(Pictures().images(), normalize=False)
        torch.testing.assert_close(found, ranks.deployable()[0](Pictures().images()))


@WARNINGS
def test_the_export_and_the_checkpoint_give_equal_answers(tuning, tmp_path):
    module = tuning()
    fit(module)
    module.prompts.save(tmp_path / "prompts.safetensors")
    tower = module.model.tower
    learned = Prompts.load(tmp_path / "prompts.safetensors")
    again = PromptedCLIP(module.model, PatchRankTower(tower.tower, tower.predictor, 0.5, 1, learned))
    ids = again.tokenizer(list(CLASSES))
    with torch.no_grad():
        assert torch.equal(again.encode_image(Pictures().images()), module(Pictures().images()))
        assert torch.equal(again.encode_text(ids), module.model.encode_text(ids))


@WARNINGS
def test_prompts_are_refused_without_classes(tuning):
    class Unlabelled(Pictures):
        class_prompts = None

    with pytest.raises(ValueError, match="give data that has them"):
        fit(tuning(), data=Unlabelled())
