"""Checkpoints on disk: whole, two at a time, finite, and no failure of a save ends a run."""

import errno
import os

import pytest
import torch

from common import checkpoint_io
from common.checkpoint_io import SafeCheckpointIO, first_non_finite


def content(step):
    """A checkpoint of a step."""
    return {"global_step": step, "state_dict": {"weight": torch.full((3,), float(step))}}


def step_of(path):
    return torch.load(path, weights_only=True)["global_step"]


def test_the_file_before_stays_beside_the_new_one(tmp_path):
    io = SafeCheckpointIO()
    for step in (1, 2, 3):
        io.save_checkpoint(content(step), tmp_path / "last.ckpt")
    assert sorted(os.listdir(tmp_path)) == ["last-previous.ckpt", "last.ckpt"]
    assert step_of(tmp_path / "last.ckpt") == 3 and step_of(tmp_path / "last-previous.ckpt") == 2
    assert (io.saved, io.failed) == (3, 0)
    assert torch.equal(io.load_checkpoint(tmp_path / "last.ckpt")["state_dict"]["weight"], torch.full((3,), 3.0))


def test_where_there_are_no_links_the_file_before_is_renamed(tmp_path, monkeypatch):
    def no_link(self, target):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr("pathlib.Path.hardlink_to", no_link)
    io = SafeCheckpointIO()
    for step in (1, 2):
        io.save_checkpoint(content(step), tmp_path / "last.ckpt")
    assert step_of(tmp_path / "last.ckpt") == 2 and step_of(tmp_path / "last-previous.ckpt") == 1


def test_a_save_that_fails_leaves_the_old_file_and_the_next_one_succeeds(tmp_path, caplog):
    io = SafeCheckpointIO()
    io.save_checkpoint(content(1), tmp_path / "last.ckpt")
    (tmp_path / ".last.ckpt.part").symlink_to("/dev/full")  # every byte that is written there finds a full disk
    io.save_checkpoint(content(2), tmp_path / "last.ckpt")
    assert "last.ckpt: No space left on device; the run goes on and tries again" in caplog.text
    assert io.failing and step_of(tmp_path / "last.ckpt") == 1
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt"]
    io.save_checkpoint(content(3), tmp_path / "last.ckpt")
    assert not io.failing and (io.saved, io.failed) == (2, 1) and step_of(tmp_path / "last.ckpt") == 3


def test_a_disk_for_two_files_gives_up_the_older_one(tmp_path, monkeypatch):
    io, save = SafeCheckpointIO(), checkpoint_io._save_synced
    for step in (1, 2):
        io.save_checkpoint(content(step), tmp_path / "last.ckpt")

    def two_files_fit(checkpoint, file):
        if len(list(tmp_path.glob("*.ckpt"))) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(checkpoint, file)

    monkeypatch.setattr(checkpoint_io, "_save_synced", two_files_fit)
    io.save_checkpoint(content(3), tmp_path / "last.ckpt")
    assert io.failed == 0 and step_of(tmp_path / "last.ckpt") == 3 and step_of(tmp_path / "last-previous.ckpt") == 2


def test_what_a_failed_save_should_have_replaced_is_not_removed(tmp_path):
    io = SafeCheckpointIO()
    for name in ("best-a.ckpt", "last-previous.ckpt", "last.ckpt"):
        io.save_checkpoint(content(1), tmp_path / name)
    (tmp_path / ".best-b.ckpt.part").symlink_to("/dev/full")
    io.save_checkpoint(content(2), tmp_path / "best-b.ckpt")
    io.remove_checkpoint(tmp_path / "best-a.ckpt")
    io.save_checkpoint(content(3), tmp_path / "last.ckpt")
    assert step_of(tmp_path / "best-a.ckpt") == 1


def test_a_checkpoint_that_cannot_be_removed_does_not_end_the_run(tmp_path, monkeypatch):
    io = SafeCheckpointIO()
    for name in ("a.ckpt", "b.ckpt", "c.ckpt"):
        io.save_checkpoint(content(1), tmp_path / name)

    def read_only(self, missing_ok=False):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("pathlib.Path.unlink", read_only)
    io.remove_checkpoint(tmp_path / "a.ckpt")


def test_weights_that_are_not_finite_never_replace_finite_ones(tmp_path, caplog):
    io = SafeCheckpointIO()
    io.save_checkpoint(content(1), tmp_path / "last.ckpt")
    io.save_checkpoint(content(float("nan")), tmp_path / "last.ckpt")
    assert "the weights weight are not finite" in caplog.text
    assert step_of(tmp_path / "last.ckpt") == 1


def test_a_mask_of_minus_infinity_is_finite_enough():
    assert first_non_finite({"mask": torch.tensor([0.0, -torch.inf]), "steps": torch.tensor(3)}) is None
    assert first_non_finite({"a": torch.ones(1), "b": torch.tensor([torch.inf])}) == "b"


def test_two_files_stay_where_lightning_would_keep_one(tmp_path):
    io = SafeCheckpointIO()
    for step in (1, 2, 3):
        io.save_checkpoint(content(step), tmp_path / f"step={step}.ckpt")
        if step > 1:
            io.remove_checkpoint(tmp_path / f"step={step - 1}.ckpt")
    assert sorted(os.listdir(tmp_path)) == ["step=2.ckpt", "step=3.ckpt"]


@pytest.mark.parametrize("bytes_left", [0, 100])
def test_a_damaged_checkpoint_is_named(tmp_path, bytes_left):
    path = tmp_path / "last.ckpt"
    torch.save(content(1), path)
    path.write_bytes(path.read_bytes()[:bytes_left])
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged, or no checkpoint"):
        SafeCheckpointIO().load_checkpoint(path)
