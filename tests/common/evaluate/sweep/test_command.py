"""`effclip sweep` from the command line to its files: what it measures, resumes, refuses and chooses."""

import csv
import json
import re

import pytest
import torch
from PIL import Image

from common.adaptive import paths_of
from common.data.lookup import source
from common.evaluate.sweep import pictures as shown
from common.evaluate.sweep import scoring
from common.flops import count_macs
from common.models import load_model
from common.reducer_registry import named, setting_for
from common.reduction import ReducedTower
from common.tiles import TiledTower
from common.zeroshot import embed_prompts
from patchrank.reducers import ClassAttention, DivPrune, EViT
from tests.common.fresh import answers as fresh_answers
from tests.common.towers import NAMES, tiny_directory

KEEP = ["--keep", "0.75,0.5"]


def result(folder):
    return json.loads((folder / "sweep.json").read_text())


@torch.no_grad()
def answers(model, tower, data):
    """Whether ``tower`` names each test picture rightly, computed from the library alone."""
    clip, test = load_model(model).images, source(data, "zeroshot", "test")
    classes = embed_prompts(clip, [f"a {name}" for name in test.class_names])
    batches = test.loader(clip.preprocess, 64, 0)
    return torch.cat([(tower(b["image"]) @ classes.T).argmax(-1) == b["label"] for b in batches])


def test_rows_are_the_reducers_own_accuracy_and_cost(model, data, sweep, tmp_path):
    names = ["divprune", "evit", "evit-averaged", "class-attention-after"]
    assert sweep(model, "--reducers", ",".join(names), *KEEP, "--place", "1") == 0
    rows = {(row["reducer"], row["keep"]): row for row in result(tmp_path / "out")["rows"]}
    assert list(rows) == [("whole model", None), *[(name, keep) for name in names for keep in (0.75, 0.5)]]
    tower = load_model(model).images.image_tower
    whole = answers(model, tower, data)
    image = torch.zeros(1, 3, 32, 32)
    for (name, keep), places in {
        ("whole model", None): {},
        ("divprune", 0.5): {1: DivPrune(0.5)},
        ("evit", 0.75): {(1, "middle"): EViT(0.75)},
        ("evit-averaged", 0.75): {(1, "middle"): EViT(0.75, "averaged")},
        ("class-attention-after", 0.5): {(1, "after"): ClassAttention(0.5)},
    }.items():
        reduced, row = ReducedTower(tower, places), rows[name, keep]
        correct = answers(model, reduced, data)
        macs = count_macs(reduced, image)
        assert row["top1"] == correct.double().mean() and row["samples"] == 24
        assert (row["gmacs"], row["gmacs_paper"]) == (macs.gmacs, macs.gmacs_paper)
        if places:
            assert row["difference"] == pytest.approx(float(correct.double().mean() - whole.double().mean()))
            assert row["of_whole"] == macs.gmacs / count_macs(tower, image).gmacs


@torch.no_grad()
def test_a_reducer_reads_the_classes_of_the_sweep(model, data, sweep, tmp_path):
    """Also where a budget, which no other setting is within, is checked before a picture is read."""
    clip = load_model(model).images
    tower, image = clip.image_tower, torch.zeros(1, 3, 32, 32)
    classes = embed_prompts(clip, [f"a {name}" for name in source(data, "zeroshot", "test").class_names])
    places = named("recoverable-compression").reducers(setting_for(tower, 0.5, 0, texts=classes))
    reduced = ReducedTower(tower, places)
    macs = count_macs(reduced, image)
    line = ["--reducers", "recoverable-compression", "--keep", "0.5", "--budget", f"{macs.gmacs}"]
    assert macs.gmacs < count_macs(tower, image).gmacs and sweep(model, *line) == 0
    row = result(tmp_path / "out")["rows"][1]
    assert row["gmacs"] == macs.gmacs
    journal = [json.loads(line) for line in (tmp_path / "out" / "points.jsonl").read_text().splitlines()[1:]]
    (on_test,) = (record for record in journal if record["split"] == "test" and record["point"]["reducer"])
    assert on_test["top1"] == answers(model, reduced, data).double().mean()


def test_larger_pictures_are_compared_with_all_of_their_tiles(model, data, sweep, tmp_path):
    names = "class-attention,globalcom2,hired,tome"
    assert sweep(model, "--image-size", "64", "--reducers", names, "--keep", "0.5", "--place", "0") == 0
    whole, *budgets, refused = result(tmp_path / "out")["rows"]
    image = torch.zeros(1, 3, 64, 64)
    assert whole["gmacs"] == count_macs(TiledTower(load_model(model).images.image_tower, 64), image).gmacs
    assert [row["reducer"] for row in budgets] == names.split(",")[:3]
    assert all(row["gmacs"] < whole["gmacs"] and row["difference"] is not None for row in budgets)
    assert "tome has no budget over the tiles of a picture" in refused["reason"]


def test_every_file_is_written_and_opens(model, sweep, tmp_path, capsys):
    assert sweep(model, "--reducers", "tome,centre-crop,dynamicvit", *KEEP, timed="1,8") == 0
    out = tmp_path / "out"
    assert "tome" in capsys.readouterr().out
    with open(out / "sweep.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["reducer"] for row in rows] == ["whole model", "tome", "tome", *["centre-crop"] * 2, "dynamicvit"]
    for row in rows[:-1]:
        for column in ("images_per_second_batch_1", "images_per_second_batch_8", "faster_batch_8", "memory_mb"):
            assert float(row[column]) > 0
    assert rows[0]["faster_batch_8"] == "1.0"
    assert rows[-1]["keep"] == "0.75 0.5" and rows[-1]["reason"].startswith("dynamicvit is trained")
    assert result(out)["conditions"]["scale"] == "own data"
    with Image.open(out / "sweep.png") as image:
        image.load()
    assert "<svg" in (out / "sweep.svg").read_text()
    assert "- `dynamicvit` (keep 0.75, 0.5; place 0): dynamicvit is trained" in (out / "sweep.md").read_text()
    page = (out / "sweep.html").read_text()
    stored = json.loads(re.search(r'id="sweep-data">(.*?)</script>', page, re.S)[1])
    assert stored["rows"] == result(out)["rows"] and "<!--" not in page


def test_a_reducer_of_one_keep_rate_is_measured_there_once(model, sweep, tmp_path, capsys):
    assert sweep(model, "--reducers", "half-resolution,random", *KEEP, "--place", "1") == 0
    rows = [(row["reducer"], row["keep"]) for row in result(tmp_path / "out")["rows"][1:]]
    assert rows == [("half-resolution", 0.25), ("random", 0.75), ("random", 0.5)]
    said = "half-resolution keeps 0.25 of the patches whatever --keep says; it is measured there\n"
    assert capsys.readouterr().out.startswith(said)


def test_keep_rates_of_one_schedule_are_measured_once(model, sweep, tmp_path, capsys):
    """In blocks 1 and 2 of 2: DiffRate's largest schedule is the nearest at 0.9 and 0.8, its smallest at 0.1."""
    assert sweep(model, "--reducers", "diffrate,divprune", "--keep", "0.9,0.8,0.1", "--place", "0") == 0
    rows = [(row["reducer"], row["keep"]) for row in result(tmp_path / "out")["rows"][1:]]
    assert rows == [("diffrate", 0.9), ("diffrate", 0.1), *[("divprune", keep) for keep in (0.9, 0.8, 0.1)]]
    said = "diffrate, keep 0.8, place 0 is the same setting as keep 0.9; it is measured there\n"
    assert capsys.readouterr().out.startswith(said)


def test_an_interrupted_sweep_goes_on_to_the_same_result(model, sweep, tmp_path, monkeypatch, capsys):
    line = ["--reducers", "random-per-picture,divprune", *KEEP]
    assert sweep(model, *line, out="at once") == 0
    measured, observed = [], scoring.observed

    def stop_at_the_third(*arguments):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(arguments)
        return observed(*arguments)

    monkeypatch.setattr(scoring, "observed", stop_at_the_third)
    assert sweep(model, *line) == 130
    journal = tmp_path / "out" / "points.jsonl"
    assert len(journal.read_text().splitlines()) == 3, "the header and two points"
    journal.write_text(journal.read_text() + '{"split": "test", "po')  # the machine went off while it wrote
    monkeypatch.setattr(scoring, "observed", lambda *arguments: measured.append(arguments) or observed(*arguments))
    assert sweep(model, *line) == 0
    assert len(measured) == 5, "each point once, the whole model among them"
    assert result(tmp_path / "out")["rows"] == result(tmp_path / "at once")["rows"]
    monkeypatch.setattr(scoring, "observed", lambda *arguments: pytest.fail("measured again"))
    assert sweep(model, *line) == 0
    assert "wrote" in capsys.readouterr().out


def test_a_folder_takes_more_points_but_no_other_model_or_data(model, data, sweep, tmp_path, capsys):
    assert sweep(model, "--reducers", "tome", "--keep", "0.5") == 0
    assert sweep(model, "--reducers", "evit", "--keep", "0.5") == 0
    assert [row["reducer"] for row in result(tmp_path / "out")["rows"]] == ["whole model", "tome", "evit"]
    for others, message in (
        (["--dtype", "bfloat16"], "holds another sweep: dtype was 'float32', is 'bfloat16'"),
        (["--limit", "4"], "limit was None, is 4"),
        (["--data", f"{data}/val"], f"data was '{data}', is '{data}/val'"),
    ):
        assert sweep(model, *others) == 1
        assert message in capsys.readouterr().err
    assert sweep(str(tiny_directory(tmp_path / "wave")), "--template", "{a} {}") == 1
    assert "weights.image was" in capsys.readouterr().err
    Image.new("RGB", (32, 32)).save(f"{data}/test/{NAMES[0]}/more.png")
    assert sweep(model, "--reducers", "tome", "--keep", "0.5") == 1
    assert "holds a sweep over other pictures or prompts of test" in capsys.readouterr().err


def test_a_budget_is_spent_on_val_and_reported_on_test(model, data, sweep, tmp_path, capsys):
    budget = count_macs(load_model(model).images.image_tower, torch.zeros(1, 3, 32, 32)).gmacs * 0.8
    line = ["--reducers", "tome,divprune", "--keep", "0.9..0.3:0.2"]
    assert sweep(model, *line, "--budget", f"{budget}") == 0
    outcome = result(tmp_path / "out")
    fitting = [row for row in outcome["rows"] if row["gmacs"] <= budget]
    best = max(fitting, key=lambda row: (row["top1"], -row["gmacs"]))
    assert outcome["choice"].startswith(
        f"Within {budget:g} GMACs a picture, {best['reducer']}, keep {best['keep']}, place 0 is the best of "
        f"{len(fitting)} settings by top-1, 9 compared: {100 * best['top1']:.1f} ["
    )
    assert "On test, which had no part in the choice (24 pictures): " in outcome["choice"]
    journal = [json.loads(line) for line in (tmp_path / "out" / "points.jsonl").read_text().splitlines()[1:]]
    on_test = [record["point"] for record in journal if record["split"] == "test"]
    assert [point["reducer"] for point in on_test] == [None, best["reducer"]], "nothing else was measured on test"


def test_a_budget_out_of_reach_is_refused_before_a_picture_is_read(model, sweep, tmp_path, monkeypatch, capsys):
    """Twice: by reducers, which are counted exactly, and by levels, of which no picture runs fewer than the first."""
    monkeypatch.setattr(shown.Pictures, "__iter__", lambda pictures: pytest.fail("pictures were read"))
    clip, image = load_model(model).images, torch.zeros(1, 3, 32, 32)
    least = count_macs(ReducedTower(clip.image_tower, {0: DivPrune(0.3)}), image).gmacs
    line = ["--reducers", "divprune", "--keep", "0.5,0.3", "--budget", "0.00001"]
    assert sweep(model, *line) == 1
    error = capsys.readouterr().err
    assert f"--budget 1e-05: the cheapest of 3 settings costs {least:.4g} GMACs a picture; give that or more" in error
    wave = str(tiny_directory(tmp_path / "wave"))
    assert sweep(wave, "--threshold", "0.1..0.9", "--budget", "0.00001", out="levels") == 1
    coarse, _ = paths_of(load_model(wave).images).costs(32)
    assert f"settings costs {coarse:.4g} GMACs a picture" in capsys.readouterr().err


def test_a_budget_on_undivided_pictures_asks_for_folders(model, data, sweep, capsys):
    assert sweep(model, "--budget", "1", "--data", f"{data}/train") == 1
    error = capsys.readouterr().err
    assert "reports the best on 'all', which must be another split" in error and "Make folders val and test" in error


def test_levels_are_swept_by_their_threshold(sweep, tmp_path, capsys):
    model = str(tiny_directory(tmp_path / "wave"))
    assert sweep(model, "--threshold", "0,0.1,1", timed="8") == 0
    rows = result(tmp_path / "out")["rows"]
    assert [row["threshold"] for row in rows] == [None, 0.0, 0.1, 1.0] and rows[1]["reducer"] == "own"
    costs = [row["gmacs"] for row in rows]
    assert costs[1] < costs[2] < costs[3] == pytest.approx(costs[0]), "by the shares of pictures at each level"
    assert rows[3]["top1"] == rows[0]["top1"]
    assert sweep(model, "--reducers", "tome,own", "--keep", "0.5", "--threshold", "0.1", out="both") == 0
    capsys.readouterr()
    assert "runs level by level" in result(tmp_path / "both")["rows"][-1]["reason"]


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (["--keep", "0.5"], "keep 0.5: wave prunes no tokens by itself; give a threshold"),
        (["--place", "1"], "--place 1 is the block of a reducer; name it with --reducers"),
        (
            ["--reducers", "tome", "--threshold", "0.5"],
            "--threshold 0.5: it is wave's own; add own to --reducers tome",
        ),
    ],
)
def test_a_setting_that_would_change_nothing_is_refused(sweep, tmp_path, others, message, capsys):
    assert sweep(str(tiny_directory(tmp_path / "wave")), *others) == 1
    assert capsys.readouterr().err == f"effclip sweep: error: {message}\n"


def test_a_grid_or_place_that_makes_no_sense_needs_no_torch(tmp_path):
    line = ["sweep", "--model", str(tmp_path), "--data", "embedded"]
    wrong = {("--keep", "0.9-0.3"): "no number and no range", ("--place", "6,3"): "give 3,6", ("--timed", "0"): "1,8"}
    found = fresh_answers([[*line, *others] for others in wrong])
    for (others, said), answer in zip(wrong.items(), found, strict=True):
        assert answer.code == 1 and said in answer.printed and "torch" not in answer.imported, others


def test_a_misspelt_reducer_is_answered_before_the_model_and_the_data_are_opened(model, sweep, monkeypatch, capsys):
    for opened in ("common.models.load_model", "common.data.lookup.source"):
        monkeypatch.setattr(opened, lambda *arguments, **named: pytest.fail("opened before the names were checked"))
    assert sweep(model, "--reducers", "tome,divprun") == 1
    assert "no reducer 'divprun'; did you mean divprune? there are atc" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (["--keep", "0.9-0.3"], "--keep 0.9-0.3: '0.9-0.3' is no number and no range; write 0.7, 0.7,0.5 or 0.9..0.3"),
        (["--reducers", "diffrate", "--keep", "0.5,0"], "--keep 0: the share of the tokens that stay lies in (0, 1]"),
        (["--threshold", "0.5,7"], "--threshold 7: confidence lies in [0, 1]"),
        (["--place", "0,7"], "places [0, 7]: the blocks of this tower are 0 to 1; give some of those"),
        (["--place", "1,0"], "--place 1,0: blocks stand in ascending order, each of them once; give 0,1"),
        (["--place", "third"], "--place third: 'third' is no number of a block"),
        (["--reducers", "divprun"], "no reducer 'divprun'; did you mean divprune? there are atc, ats, centre-crop"),
        (["--threshold", "0.5"], "threshold 0.5: model has no levels to stop at; leave it out"),
        (["--reducers", "own"], "--reducers own: model has neither levels nor a keep rate"),
        (["--timed", "0"], "--timed 0: '0' is no number of pictures; give such as 1,8, or no"),
        (["--budget", "-1"], "--budget -1 must be a number of GMACs above 0"),
        (["--budget", "1", "--split", "test"], "--budget compares settings on 'test' and reports the best on 'test'"),
    ],
)
def test_a_users_mistake_is_one_line(model, sweep, others, message, capsys):
    assert sweep(model, *others) == 1
    error = capsys.readouterr().err
    assert error.startswith("effclip sweep: error: ") and error.count("\n") == 1 and message in error
