"""Checkpoints of a small part beside a frozen CLIP: what they hold, and what comes back."""

import lightning
import pytest
import torch
from torch.nn import functional as F

from patchrank import RankPredictorTraining
from patchrank.avit_training import AViTTraining
from patchrank.crossget_training import CrossGETTraining
from tests.patchrank.short_runs import QUIET, Pictures, fit, moved

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("which", ["predictor", "tuning"])
def test_a_checkpoint_holds_what_trains_and_gives_equal_outputs(which, request, tmp_path):
    module = request.getfixturevalue(which)()
    trainer, _ = fit(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert stored.keys() == {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    again = type(module).load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    with torch.no_grad():
        assert torch.equal(again(Pictures().images()), module(Pictures().images()))
    before = {key: value.clone() for key, value in again.state_dict().items()}
    further = lightning.Trainer(max_steps=5, enable_checkpointing=False, **QUIET)
    further.fit(again, Pictures(), ckpt_path=tmp_path / "a.ckpt")
    assert moved(again, before) == stored.keys() and further.global_step == 5


def test_random_frozen_weights_stay_in_a_checkpoint_since_nothing_else_knows_them(predictor, tmp_path):
    module = predictor(weights=None)
    trainer, _ = fit(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = RankPredictorTraining.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    with torch.no_grad():
        assert torch.equal(again(Pictures().images()), module(Pictures().images()))


@torch.no_grad()
@pytest.mark.parametrize(("training", "options"), [(CrossGETTraining, {"keep": 0.9}), (AViTTraining, {"depth": 2})])
def test_validation_and_test_measure_small_distances_in_mixed_precision_too(training, options, start):
    """Rounded to bf16, a cosine near 1 has steps of 0.004."""
    module, data = training(**start, **options).eval(), Pictures()
    trainer = lightning.Trainer(precision="bf16-mixed", enable_checkpointing=False, **QUIET)
    measured = [run(module, data, verbose=False)[0]["val_cosine"] for run in (trainer.validate, trainer.test)]
    distances = []
    for batch in data.val_dataloader():
        with torch.autocast("cpu", torch.bfloat16):
            z, whole = module(batch["image"]), module.clip.image_tower(batch["image"])
        distances.append(1 - F.cosine_similarity(z.double(), whole.double(), dim=-1))
    expected = torch.cat(distances).mean().item()
    assert expected < 0.05 and measured == pytest.approx([expected, expected], abs=1e-5)
