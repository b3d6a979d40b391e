"""A bad value on a command line is one sentence with its mend, before torch is imported."""

import argparse

import pytest

from common.arguments import folder_for_results, whole_number
from tests.common.fresh import answers

COMMANDS = {
    "classify": ["x.jpg"],
    "calibrate": ["--data", "embedded"],
    "evaluate": ["--model", "m", "--data", "embedded"],
    "sweep": ["--model", "m", "--data", "embedded"],
    "export": ["m", "--format", "onnx"],
}
WHOLE, GMACS = "must be a whole number of 1 or more", "must be a number of GMACs above 0, such as 0.02"
CONFIDENCE = "must be a confidence in [0, 1], such as 0.5"
DTYPES = "(choose from 'float32', 'bfloat16', 'float16')"
BAD = [
    ("classify", "--batch-size", "0", WHOLE),
    ("classify", "--workers", "-1", WHOLE),
    ("classify", "--topk", "0", "is neither a number of classes nor all"),
    ("classify", "--threshold", "3", CONFIDENCE),
    ("classify", "--threshold", "nan", CONFIDENCE),
    ("classify", "--gmacs", "nan", GMACS),
    ("classify", "--dtype", "int8", DTYPES),
    ("calibrate", "--gmacs", "0", GMACS),
    ("calibrate", "--accuracy", "60", "must be a fraction in (0, 1), such as 0.60"),
    ("calibrate", "--limit", "0", WHOLE),
    ("calibrate", "--batch-size", "many", WHOLE),
    ("calibrate", "--workers", "-1", "must be a whole number of 0 or more"),
    ("evaluate", "--batch-size", "0", WHOLE),
    ("evaluate", "--workers", "-1", "must be a whole number of 0 or more"),
    ("evaluate", "--image-size", "-3", WHOLE),
    ("evaluate", "--dtype", "int8", DTYPES),
    ("sweep", "--limit", "0", WHOLE),
    ("sweep", "--dtype", "int8", DTYPES),
    ("export", "--keep", "0.5,nan", "must be a share of the tokens in (0, 1], such as 0.5"),
    ("export", "--limit", "0", WHOLE),
    ("export", "--dtype", "int7", "'int8', 'int8-static')"),
]


def test_a_bad_value_is_answered_at_once():
    found = answers([[command, *COMMANDS[command], option, value] for command, option, value, _ in BAD])
    for (command, option, value, mend), answer in zip(BAD, found, strict=True):
        sentence = answer.printed.splitlines()[-1]
        assert answer.code == 2 and "torch" not in answer.imported
        assert sentence.startswith(f"effclip {command}: error: argument {option}: ") and sentence.endswith(mend)
        assert repr(value.split(",")[-1]) in sentence


def test_a_good_value_is_itself(tmp_path):
    assert whole_number(1)("64") == 64
    assert folder_for_results(str(tmp_path / "new")) == tmp_path / "new"


def test_results_do_not_go_into_a_file(tmp_path):
    (tmp_path / "rows.csv").touch()
    with pytest.raises(argparse.ArgumentTypeError, match=r"rows\.csv' is a file; name a folder"):
        folder_for_results(str(tmp_path / "rows.csv"))
