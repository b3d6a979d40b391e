"""The commands that README shows with their output: what is run, and what of it is shown."""

import shlex
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks import deploy
from common.cli import COMMANDS


def test_every_step_is_a_command_that_exists():
    words = [shlex.split(line, comments=True) for lines in deploy.STEPS for line in lines]
    commands = [line[1:] for line in words if line[0] == "effclip"]
    assert {line[0] for line in commands} == {"classify", "calibrate", "convert", "export"}
    for name, *others in commands:
        import_module(COMMANDS[name]).parser().parse_args(others)


def test_a_reader_sees_commands_and_the_beginning_of_tables():
    rows = "picture,label\n" + "".join(f"{n}.png,cat\n" for n in range(9))
    error = "the embedded WaveCLIP: it knows\nclassifying ━━━ 100%\n9 pictures in 1.0 s\n"
    printed = {"out": rows, "error": error, "seconds": 1.0}
    quiet = {"out": "", "error": "", "seconds": 0.0}
    stated = {"names": 970, "rule": "emoji", "reported_on": "test", "chosen_on": "val"}
    stated |= {"device": "CPU", "threads": 2, "torch": "2"}
    steps = [
        {"lines": ["effclip classify x"], "printed": [printed]},
        {"lines": ["rm -rf y", "effclip convert x y"], "printed": [quiet, {**quiet, "out": "saved: /home\ny: a\n"}]},
    ]
    found = deploy.render({"steps": steps, "conditions": stated})["md"]
    assert "```bash\neffclip classify x\n```" in found and "```bash\nrm -rf y\neffclip convert x y\n```" in found
    assert "```text\nthe embedded WaveCLIP: it knows\npicture,label\n0.png,cat\n" in found
    assert "3.png,cat\n...\n9 pictures in 1.0 s\n```" in found and "```text\ny: a\n```" in found
    assert "4.png" not in found and "━" not in found and "/home" not in found and "970 names" in found


def test_it_runs_beside_the_checkout_and_names_what_failed(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EFFCLIP_RUNS", "runs")
    with deploy._like_the_checkout():
        assert Path("benchmarks", "weights").is_dir() and Path.cwd() != tmp_path
    assert Path.cwd() == tmp_path
    with pytest.raises(ValueError, match=r"effclip classify nowhere: exit code 1; it said: .*no picture and no folder"):
        deploy._printed("effclip classify nowhere", smoke=False)
