"""Results of `effclip evaluate` as tables of models x data sets."""

import json
from itertools import permutations

import pytest

from benchmarks.__main__ import main
from benchmarks.together.evaluations import collect, markdown, recall_by_chance


def result(model="clip", data="embedded", split="test", task="zeroshot", metric="accuracy", value=0.5, **stated):
    metrics = {"samples": 1000, "top1": value, "top5": 1.0, "mean_per_class": value / 2, "interval": [0.4, 0.6]}
    if task == "retrieval":
        recalls = {"R@1": value, "R@5": 0.8, "R@10": 0.9, "interval": [0.4, 0.6]}
        metrics = {"samples": 1000, "texts": 5000, "image_to_text": recalls, "text_to_image": recalls}
    if task == "linear-probe":
        metrics = {"samples": 1000, "shots": {"4": metrics | {"deviation": 0.012, "draws": []}, "full": metrics}}
    stated = {"scale": "embedded", "revision": "abcdef0123456", "device": "CPU", "dtype": "float32"} | stated
    stated = {"limit": None, "samples": 1000, "weights": {"image": f"{model}-hash"}} | stated
    named = {"task": task, "model": model, "data": data, "split": split, "metric": metric}
    return named | {"metrics": metrics, "conditions": stated}


@pytest.fixture
def write(tmp_path):
    def write(*results):
        for number, found in enumerate(results):
            (tmp_path / "deep").mkdir(exist_ok=True)
            (tmp_path / "deep" / f"{number}.json").write_text(json.dumps(found))
        return tmp_path

    return write


def test_models_by_data_sets_with_averages_and_chance(write):
    folder = write(
        result(value=0.5, classes=252),
        result(data="pets", metric="mean_per_class", value=0.9, classes=37),
        result("wave", value=0.375, classes=252),
        {"name": "another file"},
    )
    text = markdown(collect([folder]))
    assert "| model | embedded test | pets test (mean per class) | average |" in text
    assert "| chance | 0.4 | 2.7 | – |" in text
    assert "| clip | 50.0 [40.0, 60.0] | 45.0 | 47.5 |" in text
    assert "| wave | 37.5 [40.0, 60.0] | not run | – |" in text
    assert "embedded test 1,000" in text and "abcdef0123;" in text


def test_splits_of_one_set_have_no_average(write):
    """They differ in how many names there are to guess."""
    text = markdown(collect([write(result(value=0.5, classes=252), result(split="unseen", value=0.25, classes=378))]))
    assert "| model | embedded test | embedded unseen |\n" in text and "| chance | 0.4 | 0.26 |" in text
    assert "| clip | 50.0 [40.0, 60.0] | 25.0 [40.0, 60.0] |" in text


@pytest.mark.parametrize(("rank", "candidates", "own"), [(1, 6, 1), (3, 6, 1), (2, 6, 2), (5, 6, 3), (10, 6, 1)])
def test_recall_by_chance_is_the_share_of_all_orders(rank, candidates, own):
    orders = list(permutations(range(candidates)))
    found = sum(any(right in order[:rank] for right in range(own)) for order in orders)
    assert recall_by_chance(rank, candidates, own) == pytest.approx(found / len(orders))


def test_retrieval_and_probe(write):
    text = markdown(collect([write(result(task="retrieval"), result(task="linear-probe"))]))
    assert "| chance | 0.1 | 0.5 | 1 | 0.1 | 0.5 | 1 |" in text
    assert "| clip | 50.0 [40.0, 60.0] | 80.0 | 90.0 | 50.0 [40.0, 60.0] | 80.0 | 90.0 |\n" in text
    assert "| clip, 4 shots | 50.0 ± 1.2 |" in text
    assert "| clip | 50.0 [40.0, 60.0] |" in text


def test_other_settings_and_weights_are_other_rows(write):
    folder = write(
        result(),
        result(dtype="bfloat16"),
        result(limit=500),
        result(template="a {}"),
        result(weights={"image": "ffff"}),
    )
    text = markdown(collect([folder]))
    for row in ("clip (clip-h)", "clip (clip-h), bfloat16", "clip (clip-h), 500 pictures", "clip (ffff)"):
        assert f"| {row} |" in text
    assert "| clip (clip-h), template a {} |" in text


def test_text_towers_features_and_splits_of_retrieval_are_told_apart(write):
    texts = [{"image": "same-hash", "text": side} for side in ("first-text", "other-text")]
    text = markdown(collect([write(*(result(weights=weights) for weights in texts))]))
    assert "| clip (first-) |" in text and "| clip (other-) |" in text
    probes = [result(task="linear-probe", features=features) for features in ("embedding", "penultimate")]
    assert "| clip, penultimate features, 4 shots |" in markdown(collect([write(*probes)]))
    text = markdown(collect([write(*(result(task="retrieval", split=split) for split in ("val", "test")))]))
    assert "embedded val I→T R@1" in text and "embedded test I→T R@1" in text


def test_refusals(write, tmp_path):
    with pytest.raises(ValueError, match="no folder"):
        collect([tmp_path / "none"])
    with pytest.raises(ValueError, match="no result of `effclip evaluate`"):
        collect([tmp_path])
    with pytest.raises(ValueError, match=r"0\.json and .*1\.json both give clip on embedded test"):
        markdown(collect([write(result(), result(value=0.6))]))


def test_as_a_command(write, tmp_path, capsys):
    folder = write(result())
    assert main(["evaluations", str(folder)]) == 0
    assert "| clip | 50.0" in capsys.readouterr().out
    assert main(["evaluations", str(folder), "--out", str(tmp_path / "table.md")]) == 0
    assert "| clip | 50.0" in (tmp_path / "table.md").read_text()
    assert main(["evaluations", str(tmp_path / "none")]) == 1
