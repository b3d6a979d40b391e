"""Every evaluation on test leaves a line, and is counted by the model's contents."""

import json

import pytest

from benchmarks import RESULTS, read_log
from benchmarks.registry import benchmark, results
from benchmarks.together import embedded_reference


@pytest.fixture
def weights(tmp_path, monkeypatch):
    monkeypatch.setattr(read_log, "LOG", tmp_path / "results" / "test-reads.jsonl")
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"some weights")
    return file


def test_reads_are_counted_by_data_set_and_contents(weights):
    assert read_log.reads(weights, "embedded") == 0
    for table, data in (("table2", "embedded"), ("frontier", "embedded"), ("photos", "cifar10")):
        read_log.record(table, data, [weights])
    assert (read_log.reads(weights, "embedded"), read_log.reads(weights, "cifar10")) == (2, 1)
    weights.write_bytes(b"other weights")
    assert read_log.reads(weights, "embedded") == 0


def test_a_line_says_when_what_and_with_which_model(weights):
    read_log.record("table2", "embedded", [weights])
    (line,) = map(json.loads, read_log.LOG.read_text().splitlines())
    assert line.keys() == {"date", "revision", "table", "data", "models"}
    assert list(line["models"]) == ["model.safetensors"]


def test_results_elsewhere_have_a_log_of_their_own(weights, tmp_path):
    log = tmp_path / "elsewhere" / "test-reads.jsonl"
    read_log.record("photos", "cats", [weights], log)
    assert (read_log.reads(weights, "cats", log), read_log.reads(weights, "cats")) == (1, 0)


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path):
    paths = [tmp_path / "run-0" / "weights.safetensors", tmp_path / "run-1" / "weights.safetensors"]
    for path in paths:
        path.parent.mkdir()
        path.write_bytes(path.parent.name.encode())
    digests = read_log.digests(paths)
    assert list(digests) == ["run-0/weights.safetensors", "run-1/weights.safetensors"]
    assert len(set(digests.values())) == 2


def test_reads_of_a_set_count_whatever_the_models(weights):
    for contents in (b"first", b"second"):
        weights.write_bytes(contents)
        read_log.record("a table", "cats", [weights])
    assert (read_log.reads_of_all("cats"), read_log.reads_of_all("dogs")) == (2, 0)


ON_SHAPES = (
    *("table2", "waveclip-fig1", "waveclip-fig4", "waveclip-shapes", "waveclip-gates", "frontier", "fewer-patches"),
    *("patchrank-table1", "patchrank-fig1", "patchrank-fig5", "embedded-models", "deploy"),
)


@pytest.mark.parametrize("name", ON_SHAPES)
def test_every_page_on_scenes_of_shape_has_the_reference_ladder(name):
    for result in results(name, RESULTS):
        assert embedded_reference.sentence() in benchmark(name).load().render(result)["md"], result["name"]


@pytest.mark.parametrize("name", ["patchrank-fig5", "runtime", "deploy"])
def test_a_page_says_how_often_its_test_pictures_had_been_read_where_that_is_stored(name):
    (result, *_) = results(name, RESULTS)
    for found in (result, *result.get("costs", {"tables": {}})["tables"].values()):
        found["conditions"]["reads_of_test"] = 7
    assert "with whatever models: 7." in benchmark(name).load().render(result)["md"]
