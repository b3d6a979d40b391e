"""Where runs go, and which checkpoint a command begins with."""

import os
from pathlib import Path

import pytest

from common.run_folder import RunOptions, continued, job, newest_checkpoint, option_value, root, take_options

SLURM = ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_JOB_NAME", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    """EFFCLIP_RUNS, outside of any job."""
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    for name in SLURM:
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def written(path, time):
    """An empty checkpoint of a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (time, time))
    return path


def test_options_leave_the_line_to_lightning():
    line = ["fit", "-c", "waveclip/shapes.yaml", "--name=first", "--trainer.max_steps", "4"]
    options, rest = take_options(line)
    assert options == RunOptions("waveclip-shapes", "first")
    assert rest == ["fit", "-c", "waveclip/shapes.yaml", "--trainer.max_steps", "4"]
    assert take_options(["fit", "--config=mine/new.yaml", "--resume", "x"])[0] == RunOptions("new", "x", resume=True)
    assert take_options(["test", "--random-weights"])[0].random_weights


def test_a_runs_own_configuration_is_its_recipe(runs):
    saved = runs / "waveclip-shapes" / "first" / "version_0" / "config.yaml"
    assert take_options(["fit", "-c", str(saved)])[0].recipe == "waveclip-shapes"


@pytest.mark.parametrize("words", [["--name"], ["--name", "../x"], ["--name", "a", "--resume", "a"]])
def test_names_that_are_refused(words):
    with pytest.raises(ValueError, match="--name"):
        take_options(["fit", *words])


def test_a_root_for_each_run(runs, monkeypatch):
    assert root(RunOptions("mlip-cc3m", "first"), None) == runs / "mlip-cc3m" / "first"
    assert root(RunOptions("mlip-cc3m"), None) == runs / "mlip-cc3m"
    assert root(RunOptions("mlip-cc3m"), "/elsewhere") == Path("/elsewhere")
    with pytest.raises(ValueError, match="already says where"):
        root(RunOptions("mlip-cc3m", "first"), "/elsewhere")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert root(RunOptions("mlip-cc3m"), None) == runs / "mlip-cc3m" / "17"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "16")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert root(RunOptions("mlip-cc3m"), None) == runs / "mlip-cc3m" / "16_3"
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    assert job() is None


def test_last_is_the_newest_of_the_root(runs):
    written(runs / "r" / "a" / "version_0" / "checkpoints" / "last.ckpt", 1)
    newest = written(runs / "r" / "b" / "version_1" / "checkpoints" / "last.ckpt", 2)
    assert newest_checkpoint(runs / "r") == newest
    assert continued("fit", RunOptions("r"), runs / "r", "last") == (str(newest), True)
    assert continued("test", RunOptions("r", "b", resume=True), runs / "r" / "b", None) == (str(newest), True)


def test_what_cannot_be_continued_says_so(runs):
    written(runs / "r" / "a" / "last.ckpt", 1)
    with pytest.raises(ValueError, match=r"no checkpoint below .*/b \(there are a\)"):
        continued("fit", RunOptions("r", "b", resume=True), runs / "r" / "b", None)
    with pytest.raises(ValueError, match=r"'a' is there already .* --resume a goes on"):
        continued("fit", RunOptions("r", "a"), runs / "r" / "a", None)
    with pytest.raises(ValueError, match="known only to the run itself"):
        continued("fit", RunOptions("r"), runs / "r", "best")
    with pytest.raises(ValueError, match="web address"):
        continued("fit", RunOptions("r"), runs / "r", "https://example.org/a.ckpt")


def test_a_requeued_job_goes_on_and_a_new_one_takes_no_strangers(runs, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    own = written(runs / "r" / "17" / "last.ckpt", 1)
    assert continued("fit", RunOptions("r"), runs / "r" / "17", None) == (str(own), False)
    shared = runs / "shared"
    written(shared / "hpc_ckpt_1.ckpt", 1)
    with pytest.raises(ValueError, match=r"another job's hpc_ckpt_1\.ckpt"):
        continued("fit", RunOptions("r"), shared, None)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert continued("fit", RunOptions("r"), shared, None)[1] is False


def test_an_option_has_its_value_after_a_blank_or_a_sign():
    assert option_value(["fit", "--ckpt_path", "a"], "--ckpt_path") == "a"
    assert option_value(["fit", "--ckpt_path=b"], "--ckpt_path") == "b"
    assert option_value(["fit", "--ckpt_path"], "--ckpt_path") is None
