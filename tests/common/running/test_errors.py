"""Sentences for errors that come from around the program."""

import errno
import os

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors import SafetensorError
from torch.utils.data import DataLoader, Dataset

from common import cli
from common.data.account import Account
from common.errors import sentence


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/data/a.csv"), "/data/a.csv: the disk is full; make room"),
        (OSError(errno.EROFS, "Read-only file system", "/data/a"), "/data/a: the disk can only be read; name another"),
        (PermissionError(errno.EACCES, "Permission denied", "/a"), "/a: permission denied; name another file"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a"), "a: No such file or directory; check"),
        (MisconfigurationException("No supported gpu backend found!\nmore"), "No supported gpu backend found!"),
        (ModuleNotFoundError("No module named 'wandb'", name="wandb"), "pip install '.[wandb]' in the checkout"),
        (SafetensorError("Error while deserializing header: header too small"), "fetch or write it again"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (RuntimeError("Found no NVIDIA driver on your system: CUDA"), "has no GPU; take --device cpu"),
    ],
)
def test_what_a_user_can_mend_has_a_sentence(error, text):
    assert text in sentence(error)


def test_a_fault_of_the_program_has_none():
    assert sentence(KeyError("a")) is None and sentence(ModuleNotFoundError("x", name="x")) is None


def test_the_cause_of_an_error_counts():
    error = RuntimeError("writing failed")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device", "/a")
    assert sentence(error).startswith("/a: the disk is full")


class Broken(Dataset):
    """Its samples are damaged."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        Account(limit=0.0).reject("shard.tar", "truncated")


class Buggy(Broken):
    """Its samples are a fault of somebody's program."""

    def __getitem__(self, index):
        raise KeyError("x")


def test_what_this_suite_says_in_a_worker_is_a_sentence():
    with pytest.raises(ValueError, match="Caught ValueError in DataLoader worker") as caught:
        next(iter(DataLoader(Broken(), num_workers=1)))
    assert sentence(caught.value).startswith("1 of 1 samples are damaged")
    with pytest.raises(KeyError) as caught:
        next(iter(DataLoader(Buggy(), num_workers=1)))
    assert sentence(caught.value) is None


def test_ctrl_c_is_one_line_and_130(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert cli._answered(interrupted, "effclip evaluate") == 130
    assert capsys.readouterr().err == "\neffclip evaluate: interrupted\n"


def test_debugging_shows_the_traceback(monkeypatch, capsys):
    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a")

    assert cli._answered(full, "effclip convert") == 1
    assert capsys.readouterr().err.startswith("effclip convert: error: /a: the disk is full")
    monkeypatch.setenv("EFFCLIP_DEBUG", "1")
    with pytest.raises(OSError, match="No space"):
        cli._answered(full, "effclip convert")
