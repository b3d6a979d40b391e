"""Tables 1, 2 and 4: the paper's means, and cells filled from results of `effclip evaluate`."""

import json
from statistics import fmean

import pytest

from benchmarks.mlip.paper_scale import MODELS
from benchmarks.mlip.tables_1_2_4 import TABLES
from benchmarks.printed import paper_numbers
from benchmarks.registry import benchmark
from common.data import catalogue
from tests.readme import ROOT


def result(model, data, task, value, metric="accuracy", features="penultimate", **changed):
    """What `effclip evaluate` writes, as far as the tables read it."""
    numbers = {"top1": value, metric: value, "mean_per_class": value}
    if task == "linear-probe":
        numbers = {"shots": {"4": {"top1": 0.0}, "full": numbers}}
    if task == "retrieval":
        recalls = {f"R@{k}": value + k / 100 for k in (1, 5, 10)}
        numbers = {"image_to_text": recalls, "text_to_image": recalls}
    named = {"model": model, "data": data, "task": task, "split": "test", "metric": metric}
    return named | {"metrics": numbers, "conditions": {"limit": None, "features": features}} | changed


@pytest.fixture
def evaluations(tmp_path, monkeypatch):
    """Writes results where `effclip evaluate` does."""
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path))
    folder = tmp_path / "evaluations"
    folder.mkdir()

    def write(*results):
        for number, result in enumerate(results):
            (folder / f"{number}.json").write_text(json.dumps(result))

    return write


def table(number):
    module = benchmark(f"mlip-table{number}").load()
    return module.render(json.loads(json.dumps(module.run(smoke=True))))["md"]


def test_the_papers_means_follow_from_its_numbers():
    """Rounding apart; of CLIP's linear probe the mean with ImageNet is printed 63.2 and is 62.95."""
    on_imagenet = {row["method"]: row["values"] for row in paper_numbers("mlip")["table1"]}
    for task, column in (("zeroshot", 0), ("linear_probe", 1)):
        for row in paper_numbers("mlip")[f"table2_{task}"]:
            *values, mean, with_imagenet = row["values"]
            assert fmean(values) == pytest.approx(mean, abs=0.08)
            imagenet = on_imagenet.get(f"{row['method']} B/32", [None, None])[column]
            if imagenet is not None:
                assert fmean([*values, imagenet]) == pytest.approx(
                    with_imagenet, abs=0.26 if row["method"] == "CLIP" else 0.11
                )


@pytest.mark.parametrize("number", TABLES)
def test_before_anything_is_run_all_our_cells_say_so(number, evaluations):
    text = table(number)
    for block in TABLES[number]:
        assert {column.data for column in block.columns} <= set(catalogue.names())
        for row in paper_numbers("mlip")[block.printed]:
            cells = ["–" if value is None else "not run" for value in row["values"]]
            ours = f"| {row['method']}, ours | {' | '.join(cells)} |"
            assert (ours in text) == ("model" in row)
            assert f"| {row['method']}, paper | {row['values'][0]:.1f} |" in text
            assert row.get("model") in (None, *MODELS)
    assert "`lightning fit -c mlip/yfcc15m.yaml" in text and "effclip evaluate --model" in text


def test_every_overlay_of_a_row_is_there():
    assert all((ROOT / file).is_file() for training in MODELS.values() for file in training.files)


def test_results_fill_their_cells(evaluations):
    evaluations(
        result("mlip-b16", "imagenet", "zeroshot", 0.4631),
        result("mlip-b16", "imagenet", "linear-probe", 0.77),
        result("mlip-b32", "imagenet", "zeroshot", 0.9, conditions={"limit": 100}),  # a quick look
        result("mlip-b32", "imagenet", "zeroshot", 0.9, split="val"),
        result("clip-b32", "coco", "retrieval", 0.2),
    )
    assert "| MLIP B/16, ours | 46.3 | 77.0 |" in table("1") and "| MLIP B/32, ours | not run | not run |" in table("1")
    line = next(line for line in table("4").splitlines() if line.startswith("| CLIP B/32, ours"))
    assert line.count("not run") == 6 and line.endswith("| 21.0 | 25.0 | 30.0 |")


def test_means_appear_when_all_of_their_sets_are_there(evaluations):
    names = [column.data for column in TABLES["2"][0].columns]
    metrics = {name: "mean_per_class" if name == "caltech101" else "accuracy" for name in names}
    whole = [result("mlip-b32", name, "zeroshot", 0.5, metrics[name]) for name in names]
    evaluations(*whole[:-1])
    cells = ["50.0"] * 10
    assert f"| MLIP, ours | {' | '.join([*cells, '50.0', 'not run'])} |" in table("2")
    evaluations(*whole[:-1], result("mlip-b32", "imagenet", "zeroshot", 0.61))
    assert f"| MLIP, ours | {' | '.join([*cells, '50.0', '51.0'])} |" in table("2")
    evaluations(*whole, whole[0])
    with pytest.raises(ValueError, match="2 results of zeroshot on cifar10 by mlip-b32"):
        table("2")
