"""`effclip sweep --task`: retrieval and linear probe under reduction, with the numbers of `effclip evaluate`."""

import csv
import json

import pytest
import torch

from common.cli import main
from common.evaluate import tasks
from common.evaluate.probe import fit
from common.evaluate.sweep import scoring
from tests.common.towers import tiny_directory


def sweep(model, task, out, *others):
    line = ["sweep", "--model", model, "--data", "embedded", "--task", task, "--reducers", "divprune", "--keep", "0.5"]
    return main([*line, "--timed", "no", "--workers", "0", "--device", "cpu", "--out", str(out), *others])


def evaluated(model, task, out, *others):
    """The metrics of `effclip evaluate`, at the reducer's setting."""
    line = ["evaluate", "--model", model, "--data", "embedded", "--tasks", task, "--workers", "0", "--device", "cpu"]
    assert main([*line, "--out", str(out), *others]) == 0
    (file,) = out.glob("*.json")
    return json.loads(file.read_text())["metrics"]


def table(out):
    with open(out / "sweep.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(autouse=True)
def _one_penalty(monkeypatch):
    """Probes of one penalty: the search among fifteen takes seconds, and both commands call the same."""

    def fit_one(train, val, with_val=True):
        both = tuple(map(torch.cat, zip(train, val, strict=True))) if with_val else train
        return fit(*both, 1.0), 1.0, {}

    monkeypatch.setattr(tasks, "fit_best", fit_one)


SETTING = ("--reducer", "divprune", "--keep", "0.5")


def test_retrieval_has_both_recalls_with_their_intervals(miniature, tmp_path):
    assert sweep(miniature, "retrieval", tmp_path / "out") == 0
    whole, reduced = table(tmp_path / "out")
    for row, setting in ((whole, ()), (reduced, SETTING)):
        metrics = evaluated(miniature, "retrieval", tmp_path / row["reducer"], *setting)
        for side in ("image_to_text", "text_to_image"):
            for k in (1, 5, 10):
                assert float(row[f"{side}_r{k}"]) == metrics[side][f"R@{k}"]
        assert [float(row["low"]), float(row["high"])] == metrics["image_to_text"]["interval"]
        ends = [float(row[f"text_to_image_r1_{end}"]) for end in ("low", "high")]
        assert ends == metrics["text_to_image"]["interval"]
    change = float(reduced["image_to_text_r1"]) - float(whole["image_to_text_r1"])
    assert float(reduced["difference"]) == pytest.approx(change)
    shown = (tmp_path / "out" / "sweep.md").read_text()
    assert "| image to text R@1, % [95 %] |" in shown and "| text to image R@1, % [95 %] |" in shown
    assert '"label": "image to text R@1"' in (tmp_path / "out" / "sweep.html").read_text()


def test_a_probe_learns_anew_at_every_setting(miniature, tmp_path):
    assert sweep(miniature, "linear-probe", tmp_path / "out") == 0
    whole, reduced = table(tmp_path / "out")
    for row, setting in ((whole, ()), (reduced, SETTING)):
        probe = evaluated(miniature, "linear-probe", tmp_path / row["reducer"], *setting)["shots"]["full"]
        for metric in ("top1", "top5", "mean_per_class"):
            assert float(row[metric]) == probe[metric]
        assert [float(row["low"]), float(row["high"])] == probe["interval"]
    shown = (tmp_path / "out" / "sweep.md").read_text()
    assert "Top-1 of a linear probe among" in shown
    assert "looks better than it is" in shown and "--budget" not in shown, "a probe takes none"


@pytest.mark.parametrize("task", ["retrieval", "linear-probe"])
def test_a_task_goes_on_where_it_stopped(miniature, tmp_path, monkeypatch, task, capsys):
    """After its first two settings, a third is measured alone; another task in the same folder is refused."""
    assert sweep(miniature, task, tmp_path / "out") == 0
    before, measured = table(tmp_path / "out"), []
    encoder = scoring.encoder
    monkeypatch.setattr(scoring, "encoder", lambda *arguments: measured.append(arguments) or encoder(*arguments))
    assert sweep(miniature, task, tmp_path / "out", "--keep", "0.5,0.75") == 0
    assert len(measured) == 1 and table(tmp_path / "out")[:2] == before
    assert sweep(miniature, "zeroshot", tmp_path / "out", "--template", "a {}") == 1
    assert f"task was '{task}', is None" in capsys.readouterr().err


def test_captions_are_embedded_once(miniature, tmp_path, monkeypatch):
    calls, embed = [], scoring.embedded_captions
    monkeypatch.setattr(scoring, "embedded_captions", lambda *arguments: calls.append(1) or embed(*arguments))
    assert sweep(miniature, "retrieval", tmp_path / "out", "--limit", "5", "--keep", "0.75,0.5") == 0
    assert len(calls) == 1 and {row["samples"] for row in table(tmp_path / "out")} == {"5"}


@pytest.mark.parametrize("task", ["retrieval", "linear-probe"])
def test_a_reducer_that_reads_classes_says_that_there_are_none(miniature, tmp_path, task):
    assert sweep(miniature, task, tmp_path / "out", "--reducers", "recoverable-compression") == 0
    whole, refused = table(tmp_path / "out")
    assert not whole["reason"] and "so a picture has no embedding of its own; classify" in refused["reason"]


@pytest.mark.parametrize(
    ("task", "others", "message"),
    [
        ("retrieval", ["--template", "a {}"], "--template a {} makes prompts of zeroshot; retrieval has none"),
        ("retrieval", ["--budget", "1"], "embedded has one split alone for retrieval, retrieval; leave --budget out"),
        ("linear-probe", ["--budget", "1"], "--budget chooses on val, on which a linear probe's penalty is chosen"),
    ],
)
def test_a_users_mistake_is_one_line(miniature, tmp_path, capsys, task, others, message):
    assert sweep(miniature, task, tmp_path / "out", *others) == 1
    error = capsys.readouterr().err
    assert error.startswith("effclip sweep: error: ") and error.count("\n") == 1 and message in error


def test_levels_stop_by_classes(miniature, tmp_path, capsys):
    wave = str(tiny_directory(tmp_path / "wave"))
    assert sweep(wave, "retrieval", tmp_path / "out") == 1
    assert "wave stops at a level by the classes of zeroshot; take --task zeroshot" in capsys.readouterr().err
