"""What a run tells: its speed, its progress by steps, its metrics, its size, and where its files are."""

import json
import logging
import warnings
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from common import throughput
from common.progress_bar import RunProgress
from common.run_log import RunLogger
from common.run_report import Sizes, quiet
from common.throughput import Throughput, images_of


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is moved."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(throughput.time, "monotonic", lambda: clock.now)
    return clock


def test_the_wait_for_data_is_the_time_between_steps(clock, caplog):
    speed, trainer = Throughput(settled=3), SimpleNamespace(world_size=2)
    caplog.set_level(logging.INFO)
    batch = {"image": torch.zeros(10, 3, 2, 2), "key": ["a"] * 10}
    speed.on_train_start(trainer, None)
    for _ in range(3):
        clock.now += 1.0  # waiting
        speed.on_train_batch_start(trainer, None, batch, 0)
        clock.now += 3.0  # working
        speed.on_train_batch_end(trainer, None, None, batch, 0)
    assert speed.first_batch == 1.0
    assert speed.waiting == pytest.approx(0.25)
    assert speed.images_per_second == pytest.approx(2 * 10 / 4)  # of both processes
    assert "first batch after 1.0 s; since then 5 images/s, and 25% of the time waits for data" in caplog.text
    speed.on_train_end(trainer, None)
    assert caplog.text.count("first batch after") == 1


def test_validation_is_no_wait(clock):
    speed, trainer, batch = Throughput(), SimpleNamespace(world_size=1), [torch.zeros(4, 2)]
    speed.on_train_start(trainer, None)
    for _ in range(2):
        speed.on_train_batch_start(trainer, None, batch, 0)
        clock.now += 1.0
        speed.on_train_batch_end(trainer, None, None, batch, 0)
        clock.now += 100.0
        speed.on_validation_end(trainer, None)
    assert speed.waiting == 0 and speed.images_per_second == pytest.approx(4)


@pytest.mark.parametrize(
    ("batch", "images"),
    [
        ({"image": torch.zeros(5, 3), "text": torch.zeros(9)}, 5),
        ([torch.zeros(4), torch.zeros(4)], 4),
        (torch.zeros(3, 2), 3),
        ("words", 0),
    ],
)
def test_images_of_a_batch(batch, images):
    assert images_of(batch) == images


class Steps(RunProgress):
    """Keeps what the bar shows after every step."""

    shown = ()

    def on_train_batch_end(self, trainer, pl_module, *arguments):
        super().on_train_batch_end(trainer, pl_module, *arguments)
        task = self.train_progress_bar
        self.shown = (*self.shown, (int(task.completed), task.total, task.description))
        self.seen = self.get_metrics(trainer, pl_module)


@pytest.mark.filterwarnings("ignore")
def test_the_bar_counts_the_steps_of_the_whole_run(tmp_path):
    bar = Steps()
    trainer = Trainer(
        max_steps=6,
        limit_train_batches=4,  # an epoch and a half
        accumulate_grad_batches=2,
        limit_val_batches=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[bar, Throughput()],
    )
    trainer.fit(BoringModel())
    steps = [completed for completed, _, _ in bar.shown]
    assert steps == sorted(steps) and steps[0] == 0 and steps[-1] == 6
    assert {total for _, total, _ in bar.shown} == {6}
    assert {"images/s", "data wait", "memory"} <= bar.seen.keys()


def test_metrics_are_lines_of_json_as_soon_as_they_are_logged(tmp_path):
    logger = RunLogger(tmp_path)
    logger.log_metrics({"loss": torch.tensor(2.5)}, 0)
    logger.log_metrics({"loss": float("nan")}, 1)
    lines = (tmp_path / "version_0" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 0, "loss": 2.5}, {"step": 1, "loss": None}]
    logger.save()
    assert (tmp_path / "version_0" / "metrics.csv").read_text().splitlines()[0] == "loss,step"
    assert RunLogger(tmp_path).version == 1  # a run that goes on deletes nothing


def test_a_full_disk_costs_the_metrics_and_not_the_run(tmp_path, caplog):
    logger = RunLogger(tmp_path)
    _ = logger.experiment
    (tmp_path / "version_0" / "metrics.jsonl").symlink_to("/dev/full")
    logger.log_metrics({"loss": 1.0}, 0)
    assert "metrics are not written to" in caplog.text and "No space left on device; the run goes on" in caplog.text


def test_sizes_are_told_without_a_count_of_flops(caplog):
    caplog.set_level(logging.INFO)
    data = [("Name", ["clip"]), ("Type", ["CLIP"]), ("Params", ["1.2 K"]), ("FLOPs", ["0"])]
    Sizes.summarize(data, 1234, 1000, 0.1, {}, total_flops=0)
    assert "1,234 parameters, 1,000 of them trained" in caplog.text and "FLOP" not in caplog.text


def test_notices_that_nobody_can_act_on_are_quiet():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        quiet()
        warnings.warn("`isinstance(treespec, LeafSpec)` is deprecated, use ...", FutureWarning, stacklevel=1)
        warnings.warn("your learning rate is odd", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in told] == ["your learning rate is odd"]
