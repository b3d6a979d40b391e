"""A training that was killed, stopped, or met a full disk ends with the weights of one that was not.

Every run here is a process of its own, and every signal is a real one.
"""

import os
import subprocess

import pytest
import torch

from tests.common.running.command import STEPS, fill, fit, strike


@pytest.fixture(scope="module")
def unstopped(run, place):
    """The final weights of a run that nothing stopped, by its number of workers."""
    known = {}

    def of(workers):
        if workers not in known:
            name = f"unstopped{workers}"
            assert fit(run, place, name, workers).code == 0
            known[workers] = weights(place / name)
        return known[workers]

    return of


def checkpoints(folder):
    """All checkpoints below a folder, the newest first."""
    return sorted(folder.rglob("*.ckpt"), key=lambda path: -path.stat().st_mtime_ns)


def weights(folder):
    """The weights after the last step."""
    checkpoint = torch.load(checkpoints(folder)[0], weights_only=True)
    assert checkpoint["global_step"] == STEPS
    return checkpoint["state_dict"]


def assert_same(state, expected):
    """Bit for bit."""
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("number", "code"), [("SIGKILL", -9), ("SIGTERM", 143), ("SIGINT", 130)])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(run, place, unstopped, workers, number, code):
    name = f"{number}{workers}"
    stopped = fit(run, place, name, workers, *strike(5, number))
    assert stopped.code == code
    assert len(checkpoints(place / name)) >= 2
    resumed = fit(run, place, name, workers, "--ckpt_path", "last")
    assert resumed.code == 0 and "goes on from" in resumed.printed
    assert_same(weights(place / name), unstopped(workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_requeued_job_goes_on_with_its_own_run(run, place, unstopped, workers):
    name = f"job{workers}"
    scontrol = place / "bin" / "scontrol"
    scontrol.parent.mkdir(exist_ok=True)
    scontrol.write_text(f"#!/bin/sh\necho $@ > {place}/{name}.txt\n")
    scontrol.chmod(0o755)
    job = {"SLURM_JOB_ID": "17", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    job |= {"SLURM_JOB_NAME": "train", "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
    first = fit(run, place, name, workers, *strike(5, "SIGUSR1"), **job)
    assert first.code == 143, first.printed
    assert (place / f"{name}.txt").read_text() == "requeue 17\n"
    another = fit(run, place, name, workers, "--model.init_args.learning_rate", "0.5", **job)
    assert another.code == 1
    assert "learning_rate was 0.001, is 0.5" in another.printed and "another run's" in another.printed
    another = fit(run, place, name, workers, "--seed_everything", "5", **job)
    assert another.code == 1 and ", is 5" in another.printed and "another run's" in another.printed
    again = fit(run, place, name, workers, **job)
    assert again.code == 0 and "goes on from" in again.printed
    assert_same(weights(place / name), unstopped(workers))


@pytest.fixture
def disk(place, request):
    """A folder on a disk of 9 MB, where root may make one; elsewhere any folder."""
    folder = place / f"disk-{request.node.callspec.id}"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", folder], capture_output=True)
    yield folder
    if mounted.returncode == 0:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_disk_that_is_full_for_a_while_costs_nothing(run, place, disk, unstopped, workers):
    # Full after the first checkpoint; later the older of two would make room, and nothing would fail.
    ended = fit(run, place, disk.name, workers, *fill(disk, 1, 4))
    assert ended.code == 0 and ended.printed.count("no checkpoint at") == 3, ended.printed
    assert_same(weights(disk), unstopped(workers))
    assert all(torch.load(file, weights_only=True)["state_dict"] for file in checkpoints(disk))
