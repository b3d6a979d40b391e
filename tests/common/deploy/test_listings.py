"""`effclip models` and `effclip datasets` name what the other commands take."""

from common.cli import main
from common.data import catalogue


def test_models_of_packages_and_of_open_clip(capsys):
    assert main(["models"]) == 0
    printed = capsys.readouterr().out
    assert "shapes_waveclip.safetensors\n    the embedded WaveCLIP" in printed and "patchrank" in printed
    assert main(["models", "vit-b-16-quickgelu"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("--model ViT-B-16-quickgelu --weights ") and "openai" in line
    assert main(["models", "AlexNet"]) == 1
    assert "no model of open_clip has 'AlexNet' in its name" in capsys.readouterr().err


def test_data_sets_with_their_splits(capsys):
    assert main(["datasets"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line[0] != " "}
    assert {"embedded", "embedded-1", *catalogue.names()} <= rows.keys()
    assert "test 20,000" in rows["embedded"] and "shape" in rows["embedded"] and "test 20,608" in rows["embedded-1"]
    assert "101 classes: " in rows["food101"] and "test 25,250" in rows["food101"]
    assert "retrieval: " in rows["flickr30k"]
