"""The commands that README shows with their output: what is run, and what of it is shown."""

import shlex
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks.together import deploy
from common.cli import COMMANDS
from common.paths import runs_directory


def test_every_step_is_a_command_that_exists():
    words = [shlex.split(line, comments=True) for lines in deploy.STEPS for line in lines]
    commands = [line[1:] for line in words if line[0] == "effclip"]
    assert {line[0] for line in commands} == {"classify", "calibrate", "convert", "export"}
    for name, *others in commands:
        import_module(COMMANDS[name]).parser().parse_args(others)


def test_a_reader_sees_commands_and_the_beginning_of_tables():
    rows = "picture,label\n" + "".join(f"{n}.png,cat\n" for n in range(9))
    error = "the embedded WaveCLIP: it knows\nclassifying ━━━ 100%\n9 pictures in 1.0 s\n"
    printed = {"out": rows, "error": error}
    quiet = {"out": "", "error": ""}
    stated = {"names": 970, "rule": "emoji", "reported_on": "test", "chosen_on": "val"}
    stated |= {"device": "CPU", "threads": 2, "torch": "2"}
    python = {"lines": ["print(1)"], "language": "python", "printed": [{**quiet, "out": "1\n"}]}
    steps = [
        python,
        {"lines": ["effclip classify x"], "printed": [printed]},
        {"lines": ["rm -rf y", "effclip convert x y"], "printed": [quiet, {**quiet, "out": "saved: x\ny: a\n"}]},
    ]
    found = deploy.render({"steps": steps, "conditions": stated})["md"]
    assert "```bash\neffclip classify x\n```" in found and "```bash\nrm -rf y\neffclip convert x y\n```" in found
    assert found.startswith("```python\nprint(1)\n```\n\n```text\n1\n```")
    assert "```text\nthe embedded WaveCLIP: it knows\npicture,label\n0.png,cat\n" in found
    assert "3.png,cat\n...\n9 pictures in 1.0 s\n```" in found and "```text\nsaved: x\ny: a\n```" in found
    assert deploy.in_python({"steps": steps}) == "```python\nprint(1)\n```\n\n```text\n1\n```\n"
    assert "4.png" not in found and "━" not in found and "970 names" in found
    assert deploy.costs({"steps": steps}) == "Not run: `python -m benchmarks deploy`.\n"
    assert deploy.missing({"steps": steps}) == [("what the models cost on every engine", "make reproduce-deploy")]
    measured = {"missing": {"OpenVINO": "pip install openvino"}, "tables": {}}
    both = deploy.render({"steps": steps, "conditions": stated, "costs": measured})["md"]
    assert both == f"{found}\nNot measured: OpenVINO (pip install openvino).\n"
    assert deploy.missing({"costs": measured}) == []


def test_it_runs_beside_the_checkout_and_names_what_failed(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EFFCLIP_RUNS", "runs")
    (tmp_path / "runs" / "data").mkdir(parents=True)
    (tmp_path / "runs" / "data" / "packed").touch()
    (tmp_path / "runs" / "calibrations").mkdir()
    with deploy._like_the_checkout():
        assert Path("benchmarks", "weights").is_dir() and Path.cwd() != tmp_path
        assert [path.name for path in runs_directory().iterdir()] == ["data"], "no earlier calibration"
        assert (runs_directory() / "data" / "packed").is_file()
    assert Path.cwd() == tmp_path and runs_directory() == Path("runs")
    with pytest.raises(ValueError, match=r"effclip classify nowhere: exit code 1; it said: .*no picture and no folder"):
        deploy._printed("effclip classify nowhere", smoke=False)
