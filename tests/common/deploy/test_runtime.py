"""An exported folder alone: without torch it answers as the model does, and says what is wrong."""

import ast
import csv
import json
import os
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO, TextIOWrapper
from threading import Thread

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from common.data.images import open_picture
from common.data.transforms import eval_transform, to_batch
from common.deploy import predict
from common.deploy.graphs import onnx_graph
from common.deploy.runtime import EarlyExit
from common.deploy.standalone import standalone
from common.deploy.text_export import write_tokenizer
from common.deploy.words import Words
from common.preprocess import Preprocess
from common.tokenizer import Tokenizer
from tests.common.fresh import ROOT, WITHOUT_TORCH
from tests.common.towers import NAMES


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 24 pictures of many shapes, of which two are in a folder of their own and one is damaged."""
    place, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    (place / "inner").mkdir()
    for number in range(24):
        height, width = random.integers(20, 90, 2)
        colours = random.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        picture = Image.fromarray(colours).resize((int(width), int(height)), Image.Resampling.BICUBIC)
        picture.save(place / ("inner" if number > 21 else "") / f"{number:02}.png")
    (place / "07.png").write_bytes(b"no picture")
    (place / "notes.txt").touch()
    (place / ".hidden.png").touch()
    return place


@pytest.fixture
def threshold(model, photos):
    """A margin that about half of the pictures reach."""
    sound = [path for path in sorted(photos.rglob("*.png")) if path.name not in ("07.png", ".hidden.png")]
    how = model.model.preprocess
    images = to_batch([eval_transform(how)(open_picture(path), None) for path in sound], how)
    margins = model.paths.probabilities_of_all_paths(images, model.classes(NAMES, model.templates), model.scale)[1]
    return margins[0].sort().values[10:12].mean().item()


def edited(folder, target, **changes):
    """A copy of an export with other entries in its export.json."""
    shutil.copytree(folder, target)
    about = json.loads((target / "export.json").read_text())
    (target / "export.json").write_text(json.dumps(about | changes))
    return target


def test_predict_answers_as_the_model_where_there_is_no_torch(model, folder, photos, threshold, tmp_path):
    out = tmp_path / "rows.csv"
    line = [folder / "predict.py", photos, "--threshold", repr(threshold), "--out", out, "--batch-size", "7"]
    run = subprocess.run([sys.executable, "-I", "-c", WITHOUT_TORCH, *map(str, line)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows, answers = list(csv.DictReader(out.open())), model.classify(photos, threshold=threshold)
    assert len(rows) == 24 and [row["picture"] for row in rows] == [answer.picture for answer in answers]
    assert [row["label"] or None for row in rows] == [answer.label for answer in answers]
    assert [row["level"] for row in rows] == ["" if a.level is None else str(a.level) for a in answers]
    assert {row["level"] for row in rows} == {"0", "1", ""}
    for row, answer in zip(rows, answers, strict=True):
        assert bool(row["error"]) == bool(answer.error)
        if not answer.error:
            assert float(row["probability"]) == pytest.approx(answer.probability, abs=1e-5)
            assert float(row["gmacs"]) == pytest.approx(answer.gmacs, rel=1e-5)
    assert "1 that could not be read" in run.stderr and "stopped: " in run.stderr


def test_the_program_imports_nothing_of_the_suite():
    tree = ast.parse(standalone("common.deploy.predict"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    others = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    assert others == {"numpy", "PIL", "onnxruntime", "tokenizers", "ftfy"}


def test_the_library_imports_no_torch():
    code = (
        "import sys; from common.deploy.runtime import EarlyExit; print(*{'torch', 'torchvision'} & sys.modules.keys())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (run.returncode, run.stdout) == (0, "\n"), run.stderr


def test_levels_share_their_weights(model, folder):
    ours = (model.model.folder / "model.safetensors").stat().st_size
    assert (folder / "weights.bin").stat().st_size < 1.1 * ours
    about = json.loads((folder / "export.json").read_text())
    assert about["gate"] == {"confidence": "margin", "threshold": None} and about["embed_dim"] == 32
    assert b"site-packages" not in b"".join(path.read_bytes() for path in folder.glob("*.onnx")), (
        "paths of this machine"
    )


def test_threads_of_one_level_leave_the_cores_to_the_next(folder, monkeypatch):
    given, session = [], onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda file, options, **kw: given.append(options) or session(file, options, **kw),
    )
    EarlyExit(folder, threads=2)
    onnx_graph(folder / "level_0.onnx")
    assert [options.get_session_config_entry("session.force_spinning_stop") for options in given] == ["1", "1"]
    assert given[0].intra_op_num_threads == 2


def test_embeddings_and_json_lines(model, folder, photos, tmp_path):
    rows, vectors = tmp_path / "rows.jsonl", tmp_path / "z.npy"
    line = [str(photos), "--folder", str(folder), "--out", str(rows), "--embeddings", str(vectors)]
    assert predict.main(line) == 0 and predict.main([*line, "--strict"]) == 1
    answers, z = [json.loads(row) for row in rows.read_text().splitlines()], np.load(vectors)
    assert z.shape == (24, 32) and np.isnan(z[7]).all() and "none of JPEG" in answers[7]["error"]
    assert {answer["level"] for answer in answers} == {1, None}, "no threshold: all levels"
    how = model.model.preprocess
    images = to_batch([eval_transform(how)(open_picture(photos / "00.png"), None)], how)
    np.testing.assert_allclose(z[0], model.model.images.encode_image(images)[0].detach(), atol=1e-5)


def test_a_list_on_stdin_is_read_as_it_comes(folder, photos, monkeypatch, capsys):
    lines = f"{photos / '01.png'}\n\n{photos / 'gone.png'}\nhttps://example.org/a.png\n"
    monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO(lines.encode())))
    assert predict.main(["-", "--folder", str(folder), "--jsonl"]) == 0
    good, gone, url = map(json.loads, capsys.readouterr().out.splitlines())
    assert good["label"] in NAMES and "FileNotFoundError" in gone["error"] and "--allow-urls" in url["error"]


def test_a_program_that_is_stopped_leaves_no_unfinished_file(folder, photos, tmp_path):
    line = [sys.executable, folder / "predict.py", "-", "--out", tmp_path / "rows.csv"]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        program.stdin.write(f"{photos / '00.png'}\n")
        program.stdin.flush()
        assert "levels" in program.stderr.readline(), "it says how it runs, then it waits for more pictures"
        program.terminate()
        program.wait()
    assert program.returncode == 143 and not list(tmp_path.iterdir())


def test_a_damaged_folder_is_said_and_never_answers_wrongly(folder, tmp_path):
    whole = np.load(folder / "classes.npy")
    np.save(edited(folder, tmp_path / "few") / "classes.npy", whole[:1])
    with pytest.raises(ValueError, match=r"classes.npy holds .* export it anew"):
        EarlyExit(tmp_path / "few")
    about = json.loads((folder / "export.json").read_text())
    del about["gate"]
    for name, text in (("list", "[]"), ("cut", '{"version": 1'), ("gateless", json.dumps(about))):
        (edited(folder, tmp_path / name) / "export.json").write_text(text)
        with pytest.raises(ValueError, match=r"export.json is damaged .* export it anew"):
            EarlyExit(tmp_path / name)


def test_what_a_folder_holds_besides_pictures_is_left_out_aloud(folder, photos, tmp_path, capsys):
    shutil.copy(photos / "01.png", tmp_path)
    for name in ("a.heic", "b.avif", ".hidden.heic"):
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "pipe.png")
    assert predict.main([str(tmp_path), "--folder", str(folder)]) == 0
    answer = capsys.readouterr()
    assert "3 files left out: 1 .avif, 1 .heic, 1 pipe or device\n" in answer.err and answer.out.count("\n") == 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([""], "a path is empty"),
        (["{photos}", "--out", "{photos}.csv"], "is a folder; name a file"),
        (["{photos}", "--out", "x.csv", "--jsonl"], "--jsonl is for the screen"),
        (["{photos}.csv"], ".csv holds no picture (.jpg, .jpeg, "),
        (["{photos}.csv", "{photos}/01.png"], ".csv holds no picture (.jpg, .jpeg, "),
        (["{photos}", "--threads", "0"], "--threads 0 must be a number from 1 to 1,024"),
    ],
)
def test_mistakes_in_the_line_are_one_sentence(words, sentence, folder, photos, capsys):
    photos.with_name(f"{photos.name}.csv").mkdir(exist_ok=True)
    line = [word.format(photos=photos) for word in words]
    assert predict.main([*line, "--folder", str(folder)]) != 0
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("entry", "damage"),
    [
        ("preprocess", lambda about: about["preprocess"].pop("std")),
        ("gmacs", lambda about: about["gmacs"].pop()),
        ("stages", lambda about: about["stages"].clear()),
        ("stages", lambda about: about["stages"][1]["inputs"].pop()),
        ("gate", lambda about: about["gate"].update(threshold="0.3")),
        ("class_names", lambda about: about.update(class_names=None)),
        ("calibration", lambda about: about.update(calibration={"point": {}})),
    ],
)
def test_a_damaged_entry_is_named(entry, damage, folder, tmp_path):
    about = json.loads((folder / "export.json").read_text())
    damage(about)
    (tmp_path / "export.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=rf"export.json is damaged \({entry} is .*\); export it anew"):
        EarlyExit(tmp_path)


class OnePicture(BaseHTTPRequestHandler):
    """Serves one picture, and a way to a file of this machine."""

    def do_GET(self):
        if self.path == "/away":
            self.send_response(302)
            self.send_header("Location", "file:///etc/hostname")
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        Image.new("RGB", (40, 40), "red").save(self.wfile, "PNG")

    def log_message(self, *_):
        pass


def test_urls_are_fetched_only_when_allowed(folder, monkeypatch, capsys):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = HTTPServer(("127.0.0.1", 0), OnePicture)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    place = f"http://127.0.0.1:{server.server_port}"
    try:
        assert predict.main([f"{place}/red.png", "--folder", str(folder)]) == 1
        assert "is a URL; --allow-urls fetches it" in capsys.readouterr().err
        line = [f"{place}/red.png", f"{place}/away", "--allow-urls", "--folder", str(folder), "--jsonl"]
        assert predict.main(line) == 0
    finally:
        server.shutdown()
        server.server_close()
    red, away = map(json.loads, capsys.readouterr().out.splitlines())
    assert red["label"] in NAMES and "HTTPError" in away["error"]


@pytest.mark.parametrize(
    "how",
    [
        Preprocess(32),
        Preprocess(32, resize_mode="squash", interpolation="bilinear"),
        Preprocess(32, mean=(0.5, 0.4, 0.3), std=(0.5, 0.2, 0.1), resize_mode="longest", fill_color=127),
    ],
    ids=lambda how: how.resize_mode,
)
def test_pictures_are_prepared_to_the_bit(folder, photos, how, tmp_path):
    runtime = EarlyExit(folder)
    runtime.about["preprocess"] = vars(how)
    turned, deep = tmp_path / "turned.jpg", tmp_path / "deep.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(photos / "03.png").save(turned, exif=exif)
    Image.fromarray(np.arange(0, 2400, dtype=np.uint16).reshape(40, 60) * 27).save(deep)
    paths = [photos / "00.png", turned, deep]
    ours = to_batch([eval_transform(how)(open_picture(path), None) for path in paths], how).numpy()
    assert (runtime.normalised([runtime.pixels(path) for path in paths]) == ours).all()


@torch.no_grad()
def test_other_classes_need_no_torch(model, folder, photos):
    """Also a name with an article of its own, which is given no second one."""
    runtime, names = EarlyExit(folder), ["a bird on the cat", "blue dog"]
    runtime.name_classes(names, ["{a} {}", "the {}"])
    np.testing.assert_allclose(runtime.classes, model.classes(names, ["{a} {}", "the {}"]), atol=1e-5)
    answer, _ = next(runtime.classify([Image.open(photos / "00.png")]))
    assert answer.label in names and answer.error is None
    for words, message in (
        (["red cat", "zebra"], r"\['zebra'\] in 'a zebra' is not in this model's vocabulary of 12 ids"),
        (["red cat", "the " * 20], "22 tokens are more than 16"),
        (["red cat", "red cat"], "'red cat' twice"),
    ):
        with pytest.raises(ValueError, match=message):
            runtime.name_classes(words, ["{a} {}" if "zebra" in words else "{}"])


def test_the_tokenizer_is_open_clips(tmp_path):
    write_tokenizer(tmp_path / "tokenizer.json")
    theirs, ours = Words(tmp_path / "tokenizer.json", context=77), Tokenizer()
    for text in (
        "it's  DON'T we'll've 'S", "naïve Straße İstanbul ΣΊΣΥΦΟΣ", "a1b2 1234 ²½ １２３", "日本語 한국어 ไทย",
        "fish & chips", "R&amp;D &amp;amp; &#39;x&#39;", "sÃ© “quotes”… ﬁne", "👩‍👩‍👧 🏳️‍🌈 !!??",
        "a\tb\nc\u00a0d\u200be", "C++ c# www.x.com/?a=1&b=2", "'\u017f e\u0301 K\u0327",
    ):  # fmt: skip
        assert theirs.ids(text) == ours.ids(text), text
    for text in ("", " \n", "&nbsp;", "<start_of_text>", "word " * 80):
        with pytest.raises(ValueError, match=r"no words|a mark of|more than 77"):
            theirs.ids(text)


def test_a_budget_takes_the_calibrated_threshold(folder, tmp_path):
    costs = json.loads((folder / "export.json").read_text())["gmacs"]
    half = sum(costs) / 2
    point = {"setting": 0.25, "gmacs": half, "accuracy": 0.6}
    curve = [[0.0, costs[0], 0.5], [0.1, 0.9 * half, 0.55], [2.0, costs[1], 0.7]]
    runtime = EarlyExit(edited(folder, tmp_path / "x", calibration={"point": point, "curve": curve}))
    assert runtime.threshold_for(half) == 0.25 and runtime.threshold_for(0.95 * half) == 0.1
    assert runtime.threshold_for(costs[1]) == 2.0, "all levels"
    with pytest.raises(ValueError, match="GMACs at least; give that or more"):
        runtime.threshold_for(0.9 * costs[0])
    with pytest.raises(ValueError, match="exported without a calibration; run `effclip calibrate`"):
        EarlyExit(folder).threshold_for(half)


def test_mistakes_are_one_sentence(folder, photos, tmp_path, capsys):
    for line, message in (
        (["nowhere"], "no picture and no folder at"),
        ([str(photos), "--out", "rows.txt"], "rows.txt is no .csv or .jsonl file"),
        ([str(photos), "--labels", "cat"], "labels must be at least two different names"),
        ([str(photos), "--folder", str(tmp_path)], "has no export.json; `effclip export MODEL --format onnx`"),
    ):
        assert predict.main(["--folder", str(folder), *line]) == 1
        assert message in capsys.readouterr().err
    (edited(folder, tmp_path / "torn") / "weights.bin").unlink()
    with pytest.raises(ValueError, match=r"level_0.onnx cannot be run \(.*weights.bin.*\); export it anew"):
        EarlyExit(tmp_path / "torn")
    with pytest.raises(ValueError, match="threshold nan must be a margin"):
        EarlyExit(folder)(np.zeros((1, 3, 32, 32), np.float32), float("nan"))
    with pytest.raises(ValueError, match="version 99, and this code reads onnx in version 1 or 2; export it anew"):
        EarlyExit(edited(folder, tmp_path / "newer", version=99))


@pytest.mark.parametrize(
    ("option", "value", "mend"),
    [
        ("--batch-size", "0", "must be a whole number of 1 or more"),
        ("--workers", "-1", "must be a whole number of 1 or more"),
        ("--threshold", "nan", "must be a margin in [0, 1], or 2 for all levels"),
        ("--threshold", "1.5", "must be a margin in [0, 1], or 2 for all levels"),
        ("--threshold", "inf", "must be a margin in [0, 1], or 2 for all levels"),
        ("--gmacs", "nan", "must be a number of GMACs above 0, such as 0.02"),
    ],
)
def test_a_bad_value_is_answered_before_the_folder_is_opened(option, value, mend, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        predict.main(["x.jpg", "--folder", str(tmp_path / "nowhere"), option, value])
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: argument {option}: '{value}' {mend}\n")


def test_a_missing_provider_falls_back_aloud(folder, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.warns(UserWarning, match="CUDAExecutionProvider does not run here .* the CPU runs instead"):
        assert len(EarlyExit(folder, provider="cuda")(np.zeros((2, 3, 32, 32), np.float32)).levels) == 2
    with pytest.raises(ValueError, match="provider 'tpu' is none of cpu, cuda, openvino, coreml"):
        EarlyExit(folder, provider="tpu")
