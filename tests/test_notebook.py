"""The notebook runs from top to bottom, without a network and without Jupyter."""

import json

from tests.readme import ROOT


def test_first_steps_run_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "docs" / "first_steps.ipynb").read_text())["cells"]
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, "it is committed without outputs"
            exec("".join(cell["source"]), names)
    printed = capsys.readouterr().out
    assert "is not in this model's vocabulary" in printed
    accuracies = [names["measure"](threshold) for threshold in (0.0, 1.0)]
    assert accuracies[0][2] == 1 and accuracies[1][2] == 0 and accuracies[0][1] < accuracies[1][1]
