"""Prompt tuning by short runs: what moves and what stays, the loss, and what comes out."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from patchrank import PatchRankTower, PromptedCLIP, Prompts
from tests.patchrank.short_runs import CLASSES, Pictures, fit, moved

pytestmark = pytest.mark.filterwarnings("ignore")


def loss_of(module):
    """The training loss of all twelve pictures at once."""
    module.log = lambda *_, **__: None
    return module.training_step({"image": Pictures().images(), "label": torch.arange(12) % 4}, 0).detach()


@pytest.mark.parametrize("kind", ["coupled", "independent", "text", "visual"])
def test_prompts_learn_the_shots_and_the_rest_stays_bit_equal(tuning, kind):
    module = tuning(kind=kind)
    _, before = fit(module, steps=40)
    trained = {f"model.tower.prompts.{name}" for name, _ in module.prompts.named_parameters()}
    assert moved(module, before) == trained
    after = loss_of(module)
    module.load_state_dict(before)
    assert after < loss_of(module)


def test_a_step_is_the_cross_entropy_of_the_zero_shot_scores(tuning):
    module = tuning()
    fit(module, steps=2)
    ids, labels, images = module.model.tokenizer(list(CLASSES)), torch.arange(12) % 4, Pictures().images()
    with torch.no_grad():
        z, classes = module.model.encode_image(images), module.model.encode_text(ids)
    odds = (module.model.logit_scale.exp() * z @ classes.T).softmax(-1)
    torch.testing.assert_close(loss_of(module), -odds[range(12), labels].log().mean())


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


def test_visual_prompts_are_tested_among_the_classes_of_the_data_at_hand(tuning):
    class Renamed(Pictures):
        class_prompts = tuple(reversed(CLASSES))

    module = tuning(kind="visual")
    trainer, _ = fit(module, steps=2)
    trainer.test(module, Renamed(), verbose=False)
    with torch.no_grad():
        torch.testing.assert_close(module._classes, module.model.encode_text(module.model.tokenizer(CLASSES[::-1])))


def test_a_predictors_checkpoint_is_what_prompts_are_tuned_with(predictor, tuning, tmp_path):
    ranks = predictor()
    trainer, _ = fit(ranks)
    trainer.save_checkpoint(tmp_path / "ranks.ckpt")
    module = tuning(predictor=str(tmp_path / "ranks.ckpt"), prompts=0, kind="text")
    with torch.no_grad():
        result = module.model.encode_image(Pictures().images(), normalize=False)
        torch.testing.assert_close(result, ranks.deployable()[0](Pictures().images()))


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


def test_prompts_are_refused_without_classes(tuning):
    class Unlabelled(Pictures):
        class_prompts = None

    with pytest.raises(ValueError, match="give data that has them"):
        fit(tuning(), data=Unlabelled())
