"""Exports in fewer bits: nearly the same answers, held to the model's on labelled pictures."""

import json
import shutil
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from common.data.lookup import Labelled
from common.deploy import graphs
from common.deploy.calibration import Calibration, Point
from common.deploy.export import lines, write_graphs
from common.deploy.model import load
from common.deploy.reduced import STATIC, Reduction, compare, draw, reduce_graphs
from common.deploy.runtime import EarlyExit
from common.deploy.shared_weights import share_weights
from common.evaluate.tasks import Settings
from tests.common.towers import NAMES, pictures, tiny_directory


@pytest.fixture
def exported(folder, monkeypatch):
    """Exports of the same model take their graphs in fp32 from ``folder``: making them anew takes most of the time."""

    def copied(chains, form, files):
        for file in (*files, files[0].parent / graphs.WEIGHTS):
            shutil.copy(folder / file.name, file)
        return [graphs.onnx_graph(file) for file in files]

    monkeypatch.setattr(graphs, "export_stages", copied)
    monkeypatch.setattr(graphs, "_seconds", lambda chain, images: 0.5)


def product(file, arrays, shape=("batch", 64)):
    """An ONNX graph of x [B,64] times each of the weights in turn, written with them. shape: of the result."""
    weights = [numpy_helper.from_array(array, f"w{place}") for place, array in enumerate(arrays)]
    names = ["x", *(f"h{place}" for place in range(1, len(arrays))), "y"]
    nodes = [
        helper.make_node("MatMul", [names[place], f"w{place}"], [names[place + 1]], f"n{place}", "/home/me/x.py")
        for place in range(len(arrays))
    ]
    shapes = {"x": ("batch", 64), "y": shape}
    ends = [helper.make_tensor_value_info(end, TensorProto.FLOAT, some) for end, some in shapes.items()]
    graph = helper.make_graph(nodes, "product", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), file)


def result(file, x):
    """What onnxruntime makes of x."""
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


@pytest.fixture
def products(tmp_path):
    """Two graphs that share their weights' file, and what they compute on the CPU in fp64."""
    random = np.random.default_rng(0)
    shared, own = random.normal(size=(2, 64, 64)).astype(np.float32)
    files = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    for file, arrays in zip(files, ([shared], [shared, own]), strict=True):
        product(file, arrays)
    share_weights(files, tmp_path / "weights.bin")
    x = random.normal(size=(5, 64)).astype(np.float32)
    return files, x, [x @ shared.astype(float), x @ shared.astype(float) @ own]


def test_what_two_graphs_hold_stands_in_the_file_once(products, tmp_path):
    files, x, expected = products
    assert {path.name for path in tmp_path.iterdir()} == {"a.onnx", "b.onnx", "weights.bin"}
    assert (tmp_path / "weights.bin").stat().st_size == 2 * 64 * 64 * 4
    for file, wanted in zip(files, expected, strict=True):
        np.testing.assert_allclose(result(file, x), wanted, atol=1e-3)
        assert b"/home/me" not in file.read_bytes()


@pytest.mark.parametrize(("dtype", "size", "error"), [("int8", 1, 0.03), ("fp16", 2, 1e-3), ("bf16", 2, 0.01)])
def test_fewer_bits_are_fewer_bytes_and_nearly_the_same(products, tmp_path, dtype, size, error):
    files, x, expected = products
    reduce_graphs([files], dtype)
    assert {path.name for path in tmp_path.iterdir()} == {"a.onnx", "b.onnx", "weights.bin"}
    assert (tmp_path / "weights.bin").stat().st_size < 2 * 64 * 64 * size + 1024
    for file, wanted in zip(files, expected, strict=True):
        assert np.abs(result(file, x) - wanted).max() < error * np.abs(wanted).max()


@pytest.mark.parametrize("dtype", ["int8", STATIC])
def test_a_stack_of_weights_stays_in_fp32(tmp_path, dtype):
    """The patch embedding of a WaveCLIP is a product with a stack, by which ONNX Runtime does not multiply in int8."""
    random, file = np.random.default_rng(0), tmp_path / "a.onnx"
    matrix, stack = random.normal(size=(64, 64)).astype(np.float32), random.normal(size=(1, 64, 64)).astype(np.float32)
    x = random.normal(size=(5, 64)).astype(np.float32)
    product(file, [matrix, stack], (1, "batch", 64))
    share_weights([file], tmp_path / "weights.bin")
    reduce_graphs([[file]], dtype, [list(torch.from_numpy(x))])
    kinds = {tensor.name: tensor.data_type for tensor in onnx.load(file).graph.initializer}
    assert kinds["w1"] == TensorProto.FLOAT and "w0" not in kinds
    wanted = x @ matrix.astype(float) @ stack
    assert np.abs(result(file, x) - wanted).max() < 0.03 * np.abs(wanted).max()


def test_static_ranges_are_those_of_the_pictures(products, tmp_path):
    (file, _), x, (wanted, _) = products
    reduce_graphs([[file]], STATIC, [list(torch.from_numpy(x))])
    assert np.abs(result(file, x) - wanted).max() < 0.03 * np.abs(wanted).max()
    within = np.clip(10 * x, x.min(), x.max())
    np.testing.assert_allclose(result(file, 10 * x), result(file, within), atol=1e-3)


def test_a_later_graph_sees_what_the_ones_before_it_make(tmp_path):
    """The first graph gives z and a state 100 times larger, whose range the second one needs."""
    random = np.random.default_rng(0)
    weight, x = random.normal(size=(64, 64)).astype(np.float32), random.normal(size=(5, 64)).astype(np.float32)
    first, second = tmp_path / "a.onnx", tmp_path / "b.onnx"
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["z"], name="product"),
        helper.make_node("Mul", ["x", "hundred"], ["s"]),
    ]
    ends = {end: helper.make_tensor_value_info(end, TensorProto.FLOAT, ["batch", 64]) for end in "xzs"}
    weights = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.float32(100), "hundred")]
    graph = helper.make_graph(nodes, "first", [ends["x"]], [ends["z"], ends["s"]], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), first)
    product(second, [weight])
    share_weights([first, second], tmp_path / "weights.bin")
    reduce_graphs([[first, second]], STATIC, [list(torch.from_numpy(x))])
    wanted = 100 * x @ weight.astype(float)
    assert np.abs(result(second, 100 * x) - wanted).max() < 0.03 * np.abs(wanted).max()


def labelled(images, names=NAMES):
    """Pictures in two batches; a picture's label is its place modulo 3."""
    labels = torch.arange(len(images)) % 3
    keys = [f"{place}.png" for place in range(len(images))]
    batches = [{"image": images[x], "label": labels[x], "key": keys[x]} for x in (slice(8), slice(8, None))]
    return Labelled("val", names, ["a {}"], "accuracy", lambda *_: iter(batches))


def test_pictures_that_chose_ranges_are_not_compared(model, folder):
    images = pictures(20)
    reduction = Reduction(STATIC, labelled(images), 0.9, Settings())
    drawn = draw(model, reduction)
    assert len(drawn) == 10 and max(drawn) >= 10, "half of them, from anywhere"
    assert all((image == images[place]).all() for place, (image,) in drawn.items())
    result, outcomes = compare(model, folder, reduction, drawn.keys())
    assert result["pictures"] == 10 == len(outcomes.correct)
    with pytest.raises(ValueError, match=r"the data has 1 picture\(s\), and int8-static needs two"):
        draw(model, Reduction(STATIC, labelled(images[:1]), 0.9, Settings()))


def test_answers_are_compared_on_labelled_pictures(model, folder):
    images, labels = pictures(12), torch.arange(12) % 3
    data = labelled(images)
    found, outcomes = compare(model, folder, Reduction("int8", data, 0.9, Settings()))
    assert found["pictures"] == 12 and len(found["levels"]) == 2
    assert all(level["agreement"] == 1 and level["difference"] == (0.0, 0.0, 0.0) for level in found["levels"])
    scores, margin = model.paths.probabilities_of_all_paths(images, model.classes(NAMES, model.templates), model.scale)
    assert (outcomes.correct == (scores.argmax(-1) == labels).T.numpy()).all()
    np.testing.assert_allclose(outcomes.confidence, margin.T, atol=1e-5)
    with pytest.raises(ValueError, match=r"100.00 % of 12 labels at level 0 are those of the model, fewer than 110 %"):
        compare(model, folder, Reduction("int8", data, 1.1, Settings()))


def test_other_classes_are_refused_before_anything_is_written(model, tmp_path):
    others = Reduction("int8", labelled(pictures(12), ["cat", "dog"]), 0.9, Settings())
    with pytest.raises(ValueError, match="the data has 2 classes, and the export 3, or others"):
        write_graphs(model, "onnx", tmp_path / "int8", NAMES, reduction=others)
    assert not any(tmp_path.iterdir())


def test_an_early_level_is_held_to_the_models_answers_too(model, folder, monkeypatch):
    """All pictures reach the last level, which would hide what an early one says."""
    whole = EarlyExit.all_levels
    monkeypatch.setattr(EarlyExit, "all_levels", lambda self, images: [-whole(self, images)[0], whole(self, images)[1]])
    with pytest.raises(ValueError, match=r"in int8 .* of 20 labels at level 0 are those of the model, fewer than 90 %"):
        compare(model, folder, Reduction("int8", labelled(pictures(20)), 0.9, Settings()))


def test_each_model_of_a_folder_has_ranges_of_its_own_pictures(products, tmp_path):
    """The second graph follows on nothing: it sees other pictures, which are 100 times as large."""
    files, x, (first, second) = products
    reduce_graphs([[file] for file in files], STATIC, [list(torch.from_numpy(x)), list(torch.from_numpy(100 * x))])
    assert np.abs(result(files[0], x) - first).max() < 0.03 * np.abs(first).max()
    assert np.abs(result(files[1], 100 * x) - 100 * second).max() < 0.03 * np.abs(100 * second).max()
    assert {path.name for path in tmp_path.iterdir()} == {"a.onnx", "b.onnx", "weights.bin"}


def test_an_export_in_static_int8_says_what_it_was_compared_on_and_chooses_its_threshold(exported, tmp_path):
    place, out = tiny_directory(tmp_path / "model"), tmp_path / "static"
    costs, weights = (model := load(place, device="cpu")).costs, model.model.weights
    budget = sum(costs) / 2
    point, wish = Point(0.3, budget, 0.5, (budget, budget), (0.5, 0.5)), {"gmacs": budget, "accuracy": None}
    Calibration("threshold", wish, point, [], 99, costs, weights, "of others", {}).write(place / "calibration.json")
    model, reduction = load(place, device="cpu"), Reduction(STATIC, labelled(pictures(20)), 0.5, Settings())
    report = write_graphs(model, "onnx", out, texts=False, reduction=reduction)
    assert report["compared"]["pictures"] == report["compared"]["range_pictures"] == 10
    assert report["bytes"][STATIC] < report["bytes"]["fp32"]
    printed = "\n".join(lines(report))
    assert f"{STATIC}, compared on 10 pictures; 10 other pictures chose the ranges\nto level_0: " in printed
    anew = json.loads((out / "export.json").read_text())["calibration"]
    assert anew["wish"] == wish and anew["pictures"] == 10 and anew["point"]["gmacs"] == pytest.approx(budget)
    assert report["gate"]["threshold"] == anew["point"]["setting"] != 0.3 and report["calibrated_on_these_classes"]
    kept = [node.op_type for node in onnx.load(out / "level_0.onnx").graph.node]
    assert "LayerNormalization" in kept and "Softmax" in kept and "QuantizeLinear" in kept
    with pytest.raises(ValueError, match=r"in int8-static .* fewer than 110 %"):
        write_graphs(model, "onnx", tmp_path / "refused", texts=False, reduction=replace(reduction, min_agreement=1.1))
    assert not (tmp_path / "refused").exists()
