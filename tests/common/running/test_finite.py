"""A step that is not finite stops every process before the optimiser takes it."""

import json

import lightning
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from common.finite import StopOnNonFinite

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "limit_val_batches": 0,
}


class Spoiled(BoringModel):
    """Its loss, or the gradient of its weights alone, is not finite at one step of one process."""

    def __init__(self, what, rank=0, folder=None):
        super().__init__()
        self.what, self.rank, self.folder = what, rank, folder

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)["loss"]
        if (batch_idx, self.global_rank) != (2, self.rank):
            return loss
        if self.what == "loss":
            return loss + torch.tensor(float("inf"))  # whose gradient is finite
        return loss + 0 * torch.sqrt(0 * self.layer.weight.sum())  # 0, whose gradient is NaN


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_the_weights_before_the_step_stay(what):
    module = Spoiled(what)
    trainer = lightning.Trainer(max_steps=5, callbacks=[StopOnNonFinite()], **QUIET)
    with pytest.raises(ValueError, match=r"step 3: the loss is .* gradient norm .* at learning rate 0\.1"):
        trainer.fit(module)
    assert trainer.global_step == 2
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


@pytest.mark.filterwarnings("ignore")
def test_gradients_that_a_loss_scaler_skips_are_left_to_it():
    stop = StopOnNonFinite()
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.grad = torch.tensor([float("inf")])
    optimizer = torch.optim.SGD([parameter], lr=0.1)

    class Scaling:
        world_size, global_step = 1, 0

        class precision_plugin:
            scaler = object()

    stop.on_before_backward(Scaling, None, torch.tensor(1.0))
    stop.on_before_optimizer_step(Scaling, None, optimizer)
    stop.on_before_backward(Scaling, None, torch.tensor(float("nan")))
    with pytest.raises(ValueError, match="the loss is nan"):
        stop.on_before_optimizer_step(Scaling, None, optimizer)


class Recording(StopOnNonFinite):
    """Writes down where a process stopped, and waits for the other, which the launcher would else end."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        try:
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
        except ValueError as error:
            file = pl_module.folder / f"{trainer.global_rank}.json"
            file.write_text(json.dumps([trainer.global_step, str(error)]))
            torch.distributed.barrier()
            raise


@pytest.mark.filterwarnings("ignore")
def test_all_processes_stop_at_the_same_step(tmp_path):
    trainer = lightning.Trainer(max_steps=5, devices=2, strategy="ddp_fork", callbacks=[Recording()], **QUIET)
    with pytest.raises(Exception, match=r"not finite|the loss is|terminated"):
        trainer.fit(Spoiled("loss", rank=1, folder=tmp_path))
    stopped = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [step for step, _ in stopped] == [2, 2]
    assert all("step 3" in text for _, text in stopped)
