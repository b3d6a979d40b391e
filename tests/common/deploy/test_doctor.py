"""`effclip doctor`: what it looks at, and that every fault comes with its mend."""

import importlib
import importlib.metadata
import json
import shlex
from types import SimpleNamespace

import pytest

from common.cli import main
from common.data import retrieval
from common.data.catalogue import entry, names
from common.deploy import doctor
from common.deploy.doctor import Finding, catalogue_set, command_owner, recipe_variable

RECIPES = {"IMAGENET_SHARDS", "CC3M_SHARDS", "CC12M_SHARDS", "YFCC15M", "MLIP_GUIDE"}
"""What the packages' recipes read."""


def test_it_says_what_is_there(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))
    monkeypatch.setenv("EFFCLIP_DATA", str(tmp_path / "data"))
    main(["doctor"])
    printed = capsys.readouterr().out
    lines = {line.split("  ")[0] for line in printed.splitlines()}
    expected = {"python", "torch", "lightning", "lightning command", "device", "threads", "bfloat16", "runs"}
    expected |= {"embedded benchmark", "embedded-1 benchmark", "effclip.models", "effclip.packaged"}
    assert {*expected, *names(), *RECIPES} <= lines
    for found in (importlib.metadata.version("torch"), "CLIP", "wave", "nothing yet, done on first use", "not there: "):
        assert found in printed


@pytest.mark.parametrize(("mends", "code", "last"), [([None, None], 0, "all well"), ([None, "do x"], 1, "1 to mend")])
def test_a_fault_is_its_exit_code(monkeypatch, capsys, mends, code, last):
    monkeypatch.setattr(doctor, "findings", lambda: [Finding("part", "state", mend) for mend in mends])
    assert doctor.main([]) == code
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == last and sum("MEND: do x" in line for line in lines) == code


def test_what_recipes_train_on_is_looked_for(monkeypatch, tmp_path):
    monkeypatch.delenv("YFCC15M", raising=False)
    assert recipe_variable("YFCC15M") == Finding("YFCC15M", "not set; a recipe that needs it says so")
    (tmp_path / "00000.tar").touch()
    for said, found, fault in (
        (tmp_path, f"{tmp_path}, 1 tar files", False),
        (tmp_path / "00000.tar", str(tmp_path / "00000.tar"), False),
        ("https://host/yfcc", "https://host/yfcc", False),
        (tmp_path / "none", f"nothing at {tmp_path / 'none'}", True),
    ):
        monkeypatch.setenv("YFCC15M", str(said))
        finding = recipe_variable("YFCC15M")
        assert finding.found == found and (finding.mend is not None) == fault


def test_retrieval_sets_are_looked_for_with_their_captions_in_the_root(monkeypatch, tmp_path):
    missing = catalogue_set(entry("coco"), tmp_path).found
    assert missing.startswith(f"not there: MS-COCO (test) in {tmp_path}")
    asked = []
    monkeypatch.setattr(retrieval, "retrieval_set", lambda *said: asked.append(said) or range(1000))
    assert catalogue_set(entry("flickr30k"), tmp_path) == Finding("flickr30k", "1,000 pictures")
    assert asked == [(entry("flickr30k"), tmp_path, tmp_path / "dataset_flickr30k.json")]


def scripts(monkeypatch, *others):
    """The `lightning` commands of other packages, as their metadata declares them."""
    points = [SimpleNamespace(value="common.cli:main", dist=SimpleNamespace(name="efficient-clip"))]
    points += [SimpleNamespace(value="other:main", dist=SimpleNamespace(name=name)) for name in others]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **selection: points)


def test_who_owns_the_command(monkeypatch, tmp_path):
    script = tmp_path / "lightning"
    scripts(monkeypatch)
    assert "pip install --force-reinstall --no-deps" in command_owner(script).mend
    script.write_text("#!/usr/bin/python\nfrom common.cli import main\n")
    assert command_owner(script) == Finding("lightning command", "ours")
    scripts(monkeypatch, "lightning-sdk")
    assert "ours; lightning-sdk installs one too" in command_owner(script).found
    script.write_text("#!/usr/bin/python\nfrom lightning_sdk.cli import main\n")
    taken = command_owner(script)
    assert taken.found.startswith("lightning-sdk's; `effclip`") and "--force-reinstall" in taken.mend


@pytest.mark.parametrize(
    ("stated", "source"),
    [
        ({"url": "file:///home/me/my clip", "dir_info": {"editable": True}}, ["-e", "file:///home/me/my clip"]),
        ({"url": "file:///home/me/clip", "dir_info": {}}, ["file:///home/me/clip"]),
        ({"url": "https://host/clip", "vcs_info": {"vcs": "git", "commit_id": "1f"}}, ["git+https://host/clip@1f"]),
        (None, ["efficient-clip"]),
    ],
)
def test_the_repair_installs_from_where_it_was_installed(monkeypatch, stated, source):
    """From an index alone by its bare name, which a stranger may own there."""
    text = None if stated is None else json.dumps(stated)
    found = SimpleNamespace(read_text=lambda name: {"direct_url.json": text}[name])
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: found)
    assert shlex.split(doctor.repair()) == ["pip", "install", "--force-reinstall", "--no-deps", *source]


def test_without_an_installation_the_repair_is_to_install(monkeypatch):
    monkeypatch.setattr(doctor, "_OURS", "no-such-package")
    assert "make setup" in doctor.repair()


def test_a_package_that_cannot_be_imported_is_a_finding(monkeypatch):
    """A torch of another CUDA raises OSError on import, say; what needs it is not looked at then."""

    def broken(name):
        raise OSError("libcudart.so.13: cannot open shared object file\nmore")

    monkeypatch.setattr(importlib, "import_module", broken)
    *_, last = doctor.findings()
    assert last == Finding(
        "torch",
        "cannot be imported: libcudart.so.13: cannot open shared object file",
        "pip install --force-reinstall torch",
    )


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
