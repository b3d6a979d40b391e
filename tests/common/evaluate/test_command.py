"""`effclip evaluate` from the command line to the result files, on a miniature of the embedded benchmark."""

import json

import pytest
import torch

from common.adaptive import paths_of
from common.cli import main
from common.clip import CLIP
from common.data.embedded import module as embedded
from common.data.lookup import source
from common.evaluate import tasks
from common.evaluate.accuracy import zero_shot
from common.evaluate.points import Point, completed, images_at, mean_macs
from common.flops import count_macs
from common.models import load_model
from common.reducer_registry import named, setting_for
from common.reduction import ReducedTower
from common.tiles import TiledTower
from common.zeroshot import embed_prompts, fill
from patchrank.reducers import DivPrune
from tests.common.fresh import answers
from tests.readme import ROOT

TEACHER = ROOT / "benchmarks" / "weights" / "shapes_clip.safetensors"
ALL = "zeroshot,retrieval,linear-probe"


@pytest.fixture
def model(miniature):
    """A random CLIP over the embedded vocabulary, on a few pictures a split."""
    return miniature


def evaluate(model, *others):
    return main(["evaluate", "--model", model, "--data", "embedded", "--device", "cpu", *others])


def results(folder):
    return {file.name: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}


def test_three_tasks_then_nothing_to_do(model, tmp_path, capsys, monkeypatch):
    assert evaluate(model, "--tasks", ALL) == 0
    printed = capsys.readouterr().out
    assert "peak memory: " in printed and "text to image R@1" in printed
    written = results(tmp_path / "runs" / "evaluations")
    by_task = {result["task"]: result for result in written.values()}
    assert set(by_task) == set(ALL.split(",")) and len(written) == 3
    for task, samples in {"zeroshot": 12, "retrieval": 9, "linear-probe": 12}.items():
        conditions = by_task[task]["conditions"]
        assert conditions["samples"] == by_task[task]["metrics"]["samples"] == samples
        assert (conditions["dtype"], conditions["scale"], conditions["limit"]) == ("float32", "embedded", None)
        assert conditions["files"]["random.safetensors"] == conditions["weights"]["image"]
        assert {"revision", "clean", "torch", "date", "device"} <= conditions.keys()
    assert {"templates_hash", "class_names_hash"} <= by_task["zeroshot"]["conditions"].keys()
    for name in ("zero_shot", "retrieval", "linear_probe"):
        monkeypatch.setattr(tasks, name, lambda *_: pytest.fail("computed again"))
    assert evaluate(model, "--tasks", ALL) == 0
    assert capsys.readouterr().out.count("done before") == 3
    assert results(tmp_path / "runs" / "evaluations") == written


def test_a_folder_that_cannot_be_written_into_is_said_before_the_work(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tasks, "zero_shot", lambda *_: pytest.fail("measured in vain"))
    (tmp_path / "file").touch()
    assert evaluate(model, "--out", str(tmp_path / "file" / "results")) == 1
    assert "nothing can be written into" in capsys.readouterr().err


def test_workers_and_batches_change_nothing(model, tmp_path):
    metrics = []
    for n, (workers, batch) in enumerate((("0", "1"), ("0", "5"), ("2", "64"))):
        out = tmp_path / str(n)
        assert evaluate(str(TEACHER), "--workers", workers, "--batch-size", batch, "--out", str(out)) == 0
        metrics += [result["metrics"] for result in results(out).values()]
    assert metrics[0] == metrics[1] == metrics[2]
    assert 0.2 < metrics[0]["top1"] <= 1, "the committed teacher knows most of these pictures"


@pytest.mark.parametrize(
    ("data", "revision", "models"),
    [("embedded", 2, ("shapes_clip", "shapes_waveclip")), ("embedded-1", 1, ("embedded_clip",))],
)
def test_each_revision_is_data_for_its_own_models(data, revision, models, monkeypatch, tmp_path):
    monkeypatch.setitem(embedded.SPLITS, revision, {"val": (30, 15)})
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path / "runs"))
    clip, *students = (str(TEACHER.with_name(f"{name}.safetensors")) for name in models)
    for line in ([clip], *([wave, "--text-model", clip] for wave in students)):
        assert evaluate(*line, "--data", data, "--split", "val", "--workers", "0", "--out", str(tmp_path)) == 0
    written = results(tmp_path).values()
    assert {(result["data"], result["conditions"]["scale"]) for result in written} == {(data, "embedded")}
    assert all(result["metrics"]["samples"] == 30 and result["metrics"]["top1"] > 0.4 for result in written)


def test_other_settings_make_another_file(model, tmp_path):
    out = tmp_path / "out"
    assert evaluate(model, "--out", str(out)) == 0
    (tmp_path / "templates.txt").write_text("a {}\n\nan {}\n")
    for others in (
        ["--template", "an {}"],
        ["--template", str(tmp_path / "templates.txt")],
        ["--limit", "5"],
        ["--split", "unseen"],
        ["--split", "unseen-alone"],
        ["--dtype", "bfloat16"],
        ["--limit", "5"],
    ):
        assert evaluate(model, "--out", str(out), *others) == 0
    written = results(out).values()
    assert len(written) == 7, "one more for each setting but the repeated one"
    assert {(len(r["split"]), r["metrics"]["samples"]) for r in written} == {(4, 12), (4, 5), (6, 6), (12, 6)}
    assert len({result["conditions"]["templates_hash"] for result in written}) >= 3
    torch.manual_seed(1)
    other = CLIP.load(model)
    torch.nn.init.normal_(other.image_tower.proj)
    other.save(model)
    assert evaluate(model, "--out", str(out)) == 0
    assert len(results(out)) == 8, "other weights under the same name are another run"


@torch.no_grad()
def test_one_reducer_in_all_three_tasks(model, tmp_path, capsys):
    """Retrieval and probe read the reduced tower too: its cost is that of the tower, built by hand."""
    out = tmp_path / "out"
    line = ["--tasks", ALL, "--shots", "full", "--out", str(out)]
    assert evaluate(model, *line, "--reducer", "divprune", "--keep", "0.4") == 0
    reduced = ReducedTower(CLIP.load(model).image_tower, {0: DivPrune(0.4)})
    macs = count_macs(reduced, torch.zeros(1, 3, 24, 24))
    written = list(results(out).values())
    assert {result["task"] for result in written} == set(ALL.split(","))
    for result in written:
        assert result["model"] == "random divprune keep 0.4 place 0"
        assert (result["metrics"]["gmacs"], result["metrics"]["gmacs_paper"]) == (macs.gmacs, macs.gmacs_paper)
        assert result["conditions"]["point"] == {"reducer": "divprune", "keep": 0.4, "places": [0], "threshold": None}
    assert f"{macs.gmacs:.4g} GMACs a picture" in capsys.readouterr().out
    assert evaluate(model, "--out", str(out)) == 0
    assert len(results(out)) == 4, "the whole model is another result"


TEXT_GUIDED = ["--reducer", "recoverable-compression"]


@torch.no_grad()
def test_a_reducer_reads_the_classes_that_pictures_are_scored_against(model, tmp_path):
    """By hand: the prompts' embeddings choose the tokens; a budget counts them too."""
    line = ["--template", "a {}", "--out", str(tmp_path / "out")]
    assert evaluate(model, *line, *TEXT_GUIDED, "--keep", "0.5") == 0
    (result,) = results(tmp_path / "out").values()
    clip, test = CLIP.load(model).eval(), source("embedded", "zeroshot", "test")
    classes = embed_prompts(clip, [fill("a {}", name) for name in test.class_names])
    tower = clip.image_tower
    entry = named("recoverable-compression")
    reduced = ReducedTower(tower, entry.reducers(setting_for(tower, 0.5, 0, texts=classes)))
    expected = zero_shot(reduced, test.loader(clip.preprocess, 64, 0), classes)
    macs = count_macs(reduced, torch.zeros(1, 3, 24, 24))
    assert (result["metrics"]["top1"], result["metrics"]["top5"]) == (expected.top1, expected.top5)
    assert result["metrics"]["gmacs"] == macs.gmacs
    assert evaluate(model, *line, *TEXT_GUIDED, "--gmacs", f"{macs.gmacs}") == 0
    assert [result["metrics"]["gmacs"] for result in results(tmp_path / "out").values()] == [macs.gmacs] * 2


@torch.no_grad()
def test_larger_pictures_are_seen_in_tiles(model, tmp_path):
    """Whole, or with a budget; the cost is that of the tiles, built by hand."""
    line = ["--image-size", "48", "--out", str(tmp_path / "out")]
    assert evaluate(model, *line) == 0
    assert evaluate(model, *line, "--reducer", "hired", "--keep", "0.5", "--place", "0") == 0
    whole, budget = sorted(results(tmp_path / "out").values(), key=lambda result: len(result["model"]))
    assert (whole["model"], budget["model"]) == ("random 48 px", "random 48 px hired keep 0.5 place 0")
    assert whole["conditions"]["preprocess"]["size"] == budget["conditions"]["preprocess"]["size"] == 48
    tower = CLIP.load(model).image_tower
    tiled = TiledTower(tower, 48, named("hired").reducers(setting_for(tower, 0.5, 0, 2)))
    for result, images in ((whole, TiledTower(tower, 48)), (budget, tiled)):
        assert result["metrics"]["gmacs"] == count_macs(images, torch.zeros(1, 3, 48, 48)).gmacs


def test_a_model_with_levels_is_not_shown_tiles(model, capsys):
    wave = str(TEACHER.with_name("shapes_waveclip.safetensors"))
    assert evaluate(wave, "--text-model", model, "--image-size", "96") == 1
    assert "--image-size 96: tiles need one whole tower; leave it out (" in capsys.readouterr().err


def test_a_budget_takes_the_greatest_keep_rate_within_it(model, tmp_path):
    tower, image = CLIP.load(model).image_tower, torch.zeros(1, 3, 24, 24)
    budget = 0.8 * count_macs(tower, image).gmacs
    assert evaluate(model, "--reducer", "divprune", "--gmacs", f"{budget}", "--out", str(tmp_path)) == 0
    (result,) = results(tmp_path).values()
    keep = result["conditions"]["point"]["keep"]
    assert result["metrics"]["gmacs"] <= budget < count_macs(tower, image).gmacs
    more = ReducedTower(tower, {0: DivPrune(keep + 0.01)})
    assert count_macs(more, image).gmacs > budget


def test_a_budget_is_met_above_the_rates_that_leave_a_reducer_too_little():
    """TCA merges tokens into four: of 36 patches, rates below about 0.2 leave none as they are."""
    model = load_model(str(TEACHER))

    def cost(keep):
        return mean_macs(images_at(model, Point("tca", keep, (1,))), 48).gmacs

    with pytest.raises(ValueError, match="take more patches"):
        cost(0.12)  # the budget's search comes by here
    keep = completed(model, Point("tca"), cost(0.2)).keep
    assert cost(keep) == cost(0.2) < cost(keep + 0.01)


def test_a_threshold_costs_what_its_exits_cost(monkeypatch, tmp_path):
    """The packaged WaveCLIP on a few pictures: the mean by the shares of its two levels."""
    monkeypatch.setitem(embedded.SPLITS, 2, {"test": (40, 20)})
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path / "runs"))
    wave = str(TEACHER.with_name("shapes_waveclip.safetensors"))
    line = ["--limit", "40", "--threshold", "0.2", "--workers", "0", "--out", str(tmp_path)]
    assert evaluate(wave, *line) == 0
    (result,) = results(tmp_path).values()
    metrics = result["metrics"]
    coarse, fine = paths_of(load_model(wave).images).costs(48)
    first, second = metrics["exits"]
    assert 0 < first < 1 and metrics["gmacs"] == pytest.approx(first * coarse + second * fine)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (["--reducer", "tome"], "--reducer tome needs --keep, the share of tokens that stay, or --gmacs"),
        (["--reducer", "tom", "--keep", "0.5"], "no reducer 'tom'; did you mean tome? there are atc"),
        (["--reducer", "tome", "--keep", "0.5", "--gmacs", "1"], "are three ways to say one thing; give one of them"),
        (
            [*TEXT_GUIDED, "--keep", "0.5", "--tasks", "zeroshot,retrieval"],
            "recoverable-compression chooses tokens by the classes' texts, so a picture has no embedding of its own; ",
        ),
        ([*TEXT_GUIDED, "--keep", "0.5", "--tasks", "linear-probe"], "so a picture has no embedding of its own; "),
        (["--keep", "0.5"], "random prunes no tokens by itself; name a reducer"),
        (["--place", "1"], "--place 1 is the block of a reducer; name it with --reducer"),
        (["--gmacs", "1"], "random has no keep rate that this could set; name a --reducer"),
        (["--threshold", "0.5"], "random has no levels to stop at; leave it out"),
        (["--threshold", "2"], "--threshold 2: confidence lies in [0, 1]"),
        (["--threshold", "0.5", "--tasks", "retrieval"], "stops by the classes of zeroshot; take --tasks zeroshot"),
        (["--reducer", "tome", "--gmacs", "0.00001"], "a picture costs"),
        (["--reducer", "tome", "--keep", "0.5", "--place", "7"], "places [7]: the blocks of this tower are 0 to "),
        (["--reducer", "diffrate", "--keep", "0"], "--keep 0: the share of the tokens that stay lies in (0, 1]"),
        (["--image-size", "40"], "pictures of 40 px cannot be cut into tiles of the tower's 24 px; use 48 or 72"),
        (
            ["--image-size", "48", "--reducer", "tome", "--keep", "0.5"],
            "tome has no budget over the tiles of a picture",
        ),
        (["--reducer", "tome", "--gmacs", "nan"], "--gmacs nan must be a number of GMACs above 0"),
        (
            ["--tasks", "zeroshot,segments"],
            "no task 'segments'; the tasks are zeroshot, retrieval, linear-probe",
        ),
        (["--data", "imagnet"], "no data called 'imagnet', and no file or folder; did you mean imagenet? there are"),
        (["--data", "food101", "--root", "/none"], "Food-101 (test) in /none: there is no such folder. It needs http"),
        (["--split", "tset"], "no split 'tset' for zeroshot; it has ['test', "),
        (["--tasks", "linear-probe", "--shots", "1,few"], "'few' is neither a number"),
        (["--tasks", "linear-probe", "--seeds", "0"], "--seeds 0 must be at least 1"),
        (["--shots", "4"], "--shots 4 is read by linear-probe alone; add it to --tasks, or leave it out"),
        (["--tasks", "retrieval", "--template", "a {}"], "--template a {} is read by zeroshot alone"),
        (["--captions", "none.json"], "--captions none.json is read by retrieval alone"),
        (["--class-names", "none.txt"], "is for a folder or table of your own; embedded has names, leave it out"),
        (["--reducer", "tca", "--gmacs", "0.00001"], "a picture costs"),
        (["--template", "a photo"], "has no {} for the class name"),
        (["--template", "none.txt"], "no templates at"),
        (["--template", "a photo of a {}"], 'whole vocabulary; other prompts: --template "{}"'),
        (["--data", "embeded"], "no file or folder; did you mean embedded? there are embedded"),
        (["--model", "nowhere.safetensors"], "no weights at"),
        (["--weights", "openai"], "belong to open_clip names"),
    ],
)
def test_a_users_mistake_is_one_line(model, others, message, capsys):
    assert evaluate(model, *others) == 1
    error = capsys.readouterr().err
    assert error.startswith("effclip evaluate: error: ") and error.count("\n") == 1
    assert message in error


def test_a_probe_of_features_that_a_model_lacks_is_refused_before_the_first_task(model, monkeypatch, capsys):
    monkeypatch.setattr(tasks, "zero_shot", lambda *_: pytest.fail("computed before the probe was checked"))
    wave = str(TEACHER.with_name("shapes_waveclip.safetensors"))
    assert evaluate(wave, "--tasks", "zeroshot,linear-probe", "--features", "penultimate") == 1
    assert "gives embeddings alone, not what is before its projection" in capsys.readouterr().err


def test_a_misspelt_reducer_is_answered_before_the_model_and_the_data_are_opened(model, monkeypatch, capsys):
    for opened in ("common.models.load_model", "common.data.lookup.source"):
        monkeypatch.setattr(opened, lambda *arguments, **named: pytest.fail("opened before the name was checked"))
    assert evaluate(model, "--reducer", "tom", "--keep", "0.5") == 1
    assert "no reducer 'tom'; did you mean tome? there are atc" in capsys.readouterr().err


def test_help_and_mistakes_in_the_line_need_no_torch():
    lines = (
        (["--help"], 0, "--text-model"),
        (["--model", "m"], 2, "--data"),
        (["--model", "m", "--data", "embedded", "--tasks", "x"], 1, "linear-probe"),
    )
    found = answers([["evaluate", *arguments] for arguments, _, _ in lines])
    for (_, code, words), answer in zip(lines, found, strict=True):
        assert answer.code == code, answer.printed[-2000:]
        assert words in answer.printed and "torch" not in answer.imported
