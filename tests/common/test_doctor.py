"""`effclip doctor`: what it looks at, and that every fault comes with its mend."""

import importlib.metadata
from types import SimpleNamespace

import pytest

from common import doctor
from common.cli import main
from common.doctor import Finding, command_owner


def test_it_says_what_is_there(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))
    monkeypatch.setenv("EFFCLIP_DATA", str(tmp_path / "data"))
    main(["doctor"])
    printed = capsys.readouterr().out
    lines = {line.split("  ")[0] for line in printed.splitlines()}
    expected = {"python", "torch", "lightning", "lightning command", "device", "threads", "bfloat16", "runs"}
    assert expected <= lines and {"embedded benchmark", "food101", "effclip.models"} <= lines
    for found in (importlib.metadata.version("torch"), "CLIP", "wave", "nothing yet, done on first use", "not there: "):
        assert found in printed


@pytest.mark.parametrize(("mends", "code", "last"), [([None, None], 0, "all well"), ([None, "do x"], 1, "1 to mend")])
def test_a_fault_is_its_exit_code(monkeypatch, capsys, mends, code, last):
    monkeypatch.setattr(doctor, "findings", lambda: [Finding("part", "state", mend) for mend in mends])
    assert doctor.main([]) == code
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == last and sum("MEND: do x" in line for line in lines) == code


def scripts(monkeypatch, *others):
    """The `lightning` commands of other packages, as their metadata declares them."""
    points = [SimpleNamespace(value="common.cli:main", dist=SimpleNamespace(name="efficient-clip"))]
    points += [SimpleNamespace(value="other:main", dist=SimpleNamespace(name=name)) for name in others]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **selection: points)


def test_who_owns_the_command(monkeypatch, tmp_path):
    script = tmp_path / "lightning"
    scripts(monkeypatch)
    assert "pip install --force-reinstall --no-deps efficient-clip" in command_owner(script).mend
    script.write_text("#!/usr/bin/python\nfrom common.cli import main\n")
    assert command_owner(script) == Finding("lightning command", "ours")
    scripts(monkeypatch, "lightning-sdk")
    assert "ours; lightning-sdk installs one too" in command_owner(script).found
    script.write_text("#!/usr/bin/python\nfrom lightning_sdk.cli import main\n")
    taken = command_owner(script)
    assert taken.found.startswith("lightning-sdk's; `effclip`") and "--force-reinstall" in taken.mend


def test_versions_against_what_is_asked_for(monkeypatch):
    required = ["torch>=2.6", "lightning>=99", "no-such-package>=1", 'no-such-extra>=1; extra == "export"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: required)
    found = {finding.what: finding for finding in doctor.versions()}
    assert found["torch"].mend is None and found["lightning"].mend == "pip install 'lightning>=99'"
    assert found["no-such-package"].mend == "pip install 'no-such-package>=1'"
    assert found["no-such-extra"].mend is None and "[export]" in found["no-such-extra"].found
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: importlib.metadata.metadata("no-such-package"))
    (finding,) = doctor.versions()
    assert finding.found == "not installed" and "make setup" in finding.mend
