"""The doctor's look at disks, folders for files, and packages that hide ours."""

import sys
from types import SimpleNamespace

import pytest

from common.deploy import machine


def test_a_sound_machine_has_nothing_to_mend(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path / "later" / "runs"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: SimpleNamespace(free=5 * 2**30))
    answers = {what: (found, mend) for what, found, mend in machine.surroundings()}
    assert answers["runs"] == (f"{tmp_path}/later/runs, 5.0 GiB free", None)
    assert {mend for _, mend in answers.values()} == {None}


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**20))
    _, found, mend = machine.room("runs", tmp_path, "EFFCLIP_RUNS")
    assert "0.0 GiB free" in found and mend.startswith("make room there, or set EFFCLIP_RUNS")


def test_a_folder_that_takes_no_files_is_told():
    _, found, mend = machine.room("temporary files", machine.Path("/proc"), "TMPDIR")
    assert found.startswith("/proc: ") and mend == "set TMPDIR to a folder that takes files"


@pytest.mark.parametrize("name", ["common", "tests"])
def test_a_package_that_hides_ours_is_told(name, tmp_path, monkeypatch):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name)
    answers = {what: (found, mend) for what, found, mend in machine.hidden_packages()}
    found, mend = answers[f"package {name}"]
    assert found.startswith(f"{tmp_path} hides") and mend.startswith("run from")


def test_tests_that_another_distribution_left_in_site_packages_hide_nothing(tmp_path, monkeypatch):
    (tmp_path / "site-packages/tests").mkdir(parents=True)
    (tmp_path / "site-packages/tests/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    monkeypatch.delitem(sys.modules, "tests")
    assert list(machine.hidden_packages()) == []


def test_another_lightning_is_told(tmp_path, monkeypatch):
    (tmp_path / "lightning.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "lightning", raising=False)
    _, found, mend = machine.lightning_owner()
    assert found.startswith(f"{tmp_path}/lightning.py hides") and mend
