"""Checkpoints of a small part beside a frozen CLIP: what they hold, and what comes back."""

import lightning
import pytest
import torch

from patchrank import RankPredictorTraining
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
