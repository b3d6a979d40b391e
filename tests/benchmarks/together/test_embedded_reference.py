"""The reference ladder: what a histogram sees, and that colours tell names in revision 1 alone."""

import json
from random import Random

import numpy as np
import torch

from benchmarks import RESULTS, ROOT
from benchmarks.together import embedded_reference
from benchmarks.together.embedded_reference import TOWERS, Tower, first_pictures, ladder, missing, render, sentence
from benchmarks.together.reference_ladder import FULL, FULL_IN_GREY, GREY, HALF, RGB, colour_histogram, train_mlp
from common.clip import load_architecture
from common.data.embedded.module import scenes_of
from mlip.model import MLIP

NAMES = 20
"""Names of the small experiments below."""


def drawn(revision, split, count):
    """Features of scenes of a revision's first names, and their labels."""
    draw, labels = scenes_of(revision).draw_scene, range(NAMES)
    scenes = [draw(Random(f"{split}/{index}"), index % NAMES, labels) for index in range(count)]
    features = np.stack([colour_histogram(np.asarray(scene.render())) for scene in scenes])
    return torch.from_numpy(features).float(), torch.arange(count) % NAMES


def test_colours_tell_the_names_of_revision_1_and_not_those_of_revision_2():
    """Twenty names, 800 pictures to learn from: chance is 5 %."""
    accuracies = {}
    for revision in (1, 2):
        (known, labels), (asked, answers) = drawn(revision, "train", 800), drawn(revision, "val", 200)
        accuracies[revision] = (train_mlp(known, labels)(asked).argmax(-1) == answers).float().mean()
    assert accuracies[1] > 0.7 and accuracies[2] < 0.35


def test_a_tower_without_weights_is_not_run_and_says_how_it_is_trained(monkeypatch, tmp_path):
    towers = (Tower(FULL, tmp_path / "none.safetensors", "lightning fit -c common/shapes_clip.yaml"),)
    monkeypatch.setitem(TOWERS, 2, towers)
    block = ladder(2, count=20, trained_on=20)
    assert block["names"] == 252 and block["rows"][0] == {"row": "chance", "accuracy": 1 / 252}
    result = {"ladders": [block], "conditions": {"trained_on": 20, "dtype": "float32", "device": "CPU", "torch": "2"}}
    assert list(missing(result)) == [("revision 2: teacher", "lightning fit -c common/shapes_clip.yaml")]
    text = render(result)["md"]
    assert "| teacher | not run: `lightning fit -c common/shapes_clip.yaml` |" in text
    assert "numbers of val (20 pictures); nothing here reads test" in text and "one training seed" in text
    assert f"| {HALF} | – |" in text and f"| {FULL_IN_GREY} | – |" in text


def test_a_clip_that_mlips_training_made_is_measured(monkeypatch, tmp_path):
    """Its file is an MLIP without MLIP's parts; the CLIP of revision 3 is one."""
    torch.manual_seed(0)
    weights = tmp_path / "clip.safetensors"
    MLIP(load_architecture(str(ROOT / "mlip/textures.json"))).save(weights)
    monkeypatch.setitem(TOWERS, 3, (Tower(FULL, weights, ""), Tower(FULL_IN_GREY, weights, "", in_grey=True)))
    rows = {row["row"]: row for row in ladder(3, count=4, trained_on=20)["rows"]}
    assert all(0 <= rows[name]["accuracy"] <= 1 for name in (FULL, FULL_IN_GREY))


def test_the_note_says_that_revision_3s_clip_teaches_nothing_where_it_stands_in_the_row():
    result = json.loads((RESULTS / "embedded-reference.json").read_text())
    *_, third = result["ladders"]
    note = "Revision 3's CLIP, in the rows of teachers, is the plain CLIP of MLIP's experiment and teaches nothing."
    for rows, said in ((third["rows"][:3], False), ([{"row": FULL, "command": "train"}], True)):
        text = render(result | {"ladders": [third | {"rows": rows}]})["md"]
        assert (note in text) is said


def test_no_row_reads_the_test_pictures(monkeypatch):
    splits = []

    def record(split, count, revision, view=48):
        splits.append(split)
        return first_pictures("val", 4, revision, view)

    monkeypatch.setattr(embedded_reference, "first_pictures", record)
    for revision in TOWERS:
        monkeypatch.setitem(TOWERS, revision, ())
        ladder(revision, count=4, trained_on=4)
    assert set(splits) == {"train", "val"}


def test_names_follow_from_shape_in_revision_2():
    """Colours alone stay below a quarter of the teacher, which keeps half of its accuracy without them."""
    _, second, _ = json.loads((RESULTS / "embedded-reference.json").read_text())["ladders"]
    accuracy = {row["row"]: row.get("accuracy") for row in second["rows"]}
    assert max(accuracy[RGB], accuracy[GREY]) < accuracy[FULL] / 4
    assert accuracy[FULL_IN_GREY] > accuracy[FULL] / 2
    assert 0.65 < accuracy[FULL] < 0.85  # room both ways


def test_readme_repeats_the_stored_ladder():
    _, shapes, _ = json.loads((RESULTS / "embedded-reference.json").read_text())["ladders"]
    text = (ROOT / "README.md").read_text()
    accuracy = {row["row"]: row["accuracy"] for row in shapes["rows"]}
    for name in (RGB, FULL, FULL_IN_GREY):
        assert f"{100 * accuracy[name]:.1f} %" in text, f"README lacks {name}"


def test_the_ladder_in_one_sentence_leaves_out_what_was_not_run(monkeypatch, tmp_path):
    rows = [{"row": "chance", "accuracy": 0.004}, {"row": "teacher", "accuracy": 0.77}, {"row": HALF, "command": "x"}]
    (tmp_path / "embedded-reference.json").write_text(json.dumps({"ladders": [{"revision": 2, "rows": rows}]}))
    monkeypatch.setattr(embedded_reference, "RESULTS", tmp_path)
    assert sentence().endswith(": chance 0.4; teacher 77.0.")
