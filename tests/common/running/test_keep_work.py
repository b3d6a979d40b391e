"""When a run saves by itself: by the clock, where it stops, and never in the middle of a step."""

import signal
from types import SimpleNamespace

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from benchmarks import ROOT
from common import keep_work
from common.keep_work import KeepWork


class Run(SimpleNamespace):
    """As much of a trainer as the callback asks; it counts the saves by their step."""

    def __init__(self, **changes):
        strategy = SimpleNamespace(broadcast=lambda x: x, checkpoint_io=SimpleNamespace(failing=False))
        given = {"world_size": 1, "accumulate_grad_batches": 1, "fast_dev_run": False, "strategy": strategy}
        state = SimpleNamespace(fn="fit")
        super().__init__(**given | changes, global_step=0, saved=[], state=state, sanity_checking=False)
        self.checkpoint_callbacks, self.log_dir, self.default_root_dir = [], "runs", "runs"
        self.callback = KeepWork(minutes=changes.get("minutes", 10))
        self.callback.on_train_start(self, None)

    def save_checkpoint(self, path, weights_only):
        self.saved.append(self.global_step)
        self.callback.on_save_checkpoint(self, None, {})

    def batch(self, step):
        """A batch ends, after which so many steps are done."""
        self.global_step = step
        self.callback.on_train_batch_end(self, None, None, None, 0)


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """No signal handler stays behind; what is said goes into a list."""
    said = []
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(keep_work, "rank_zero_info", said.append)
    return said


def test_it_saves_when_it_is_time_and_not_before(monkeypatch):
    run = Run(minutes=10)
    run.batch(1)
    assert not run.saved
    later = keep_work.time.monotonic() + 601
    monkeypatch.setattr(keep_work.time, "monotonic", lambda: later)
    run.batch(2)
    assert run.saved == [2]


@pytest.mark.parametrize(("processes", "saved"), [(1, [7]), (2, [])])
def test_an_error_of_one_process_of_several_saves_nothing_since_the_others_would_wait(processes, saved, quiet):
    run = Run(world_size=processes)
    run.global_step = 7
    run.callback.on_exception(run, None, ValueError("too many damaged pictures"))
    assert run.saved == saved and not quiet


def test_no_recipe_saves_at_an_error_by_itself():
    packages = ("common", "waveclip", "mlip", "patchrank")
    recipes = [file for package in packages for file in (ROOT / package).glob("*.yaml")]
    assert len(recipes) > 40 and not [file for file in recipes if "save_on_exception" in file.read_text()]


@pytest.mark.parametrize("stop", [SIGTERMException(), KeyboardInterrupt()])
def test_a_stopped_run_says_where_it_goes_on(stop, quiet):
    run = Run()
    run.batch(5)
    run.callback.on_exception(run, None, stop)
    assert run.saved == [5] and quiet == ["stopped after step 5; --ckpt_path last goes on from there"]


def test_a_stopped_run_that_could_not_save_says_so(quiet):
    run = Run(world_size=2)
    run.callback.on_exception(run, None, KeyboardInterrupt())  # before its first step
    assert quiet.pop() == "stopped after step 0; nothing was saved"
    run.global_step = 5
    run.callback.on_exception(run, None, KeyboardInterrupt())
    run.callback._saved_step = 3
    run.callback.on_exception(run, None, KeyboardInterrupt())
    assert not run.saved
    assert quiet == [
        "stopped after step 5; nothing was saved",
        "stopped after step 5; the last checkpoint is of step 3",
    ]


def test_no_checkpoint_holds_a_part_of_the_batches_of_one_step(monkeypatch):
    run = Run(accumulate_grad_batches=2, minutes=1e-9)
    run.batch(0)  # the first of two batches
    run.callback.on_exception(run, None, SIGTERMException())
    assert not run.saved
    run.batch(1)
    assert run.saved == [1]
    run.batch(1)
    run.callback._signal = signal.SIGINT
    run.callback.on_train_batch_end(run, None, None, None, 0)  # still in the middle: it waits
    with pytest.raises(KeyboardInterrupt):
        run.batch(2)
