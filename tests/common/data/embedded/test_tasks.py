"""The few-shot tasks: names of their own, styles that change the picture, always the same pictures."""

import numpy as np
import pytest
import torch
from PIL import ImageOps

from common.data.embedded import tasks as embedded_tasks
from common.data.embedded.scenes import class_names
from common.data.embedded.splits import scene, scenes_of
from common.data.embedded.tasks import NAMES, PER_NAME, STYLES, draw, embedded_task, task_labels
from common.data.embedded.twemoji import CANVAS, VIEW
from common.data.lookup import source, splits_of
from common.data.sources import few_shot
from common.preprocess import Preprocess
from common.zeroshot import fill


def test_each_style_has_a_hundred_seen_names_that_no_other_has():
    sets = [set(task_labels(style)) for style in STYLES]
    assert all(len(labels) == NAMES == 100 for labels in sets)
    assert len(set.union(*sets)) == 300 and max(set.union(*sets)) < len(class_names("seen"))
    assert task_labels("plain") == list(range(len(class_names("seen"))))


@pytest.mark.parametrize("style", STYLES)
def test_a_split_shows_every_name_equally_often_under_its_own_label(style):
    for split, shots in PER_NAME.items():
        found = embedded_task(style, split)
        assert len(found) == 100 * shots and len(set(found.keys)) == len(found)
        assert [found.labels.count(label) for label in range(100)] == [shots] * 100
        assert found.class_names == [class_names("seen")[label] for label in task_labels(style)]
    assert len(few_shot(embedded_task(style, "train").labels, 16)) == 1600


@pytest.mark.parametrize("style", STYLES)
def test_pictures_are_the_same_every_time_and_differ_between_splits(style):
    first = draw(style, "test", 7)
    assert first.shape == (VIEW, VIEW, 3) and first.dtype == np.uint8
    draw.cache_clear()
    assert np.array_equal(first, draw(style, "test", 7))
    assert not np.array_equal(first, draw(style, "train", 7))


@pytest.mark.parametrize("style", STYLES)
def test_a_style_is_a_shift_from_the_plain_picture(style, monkeypatch):
    monkeypatch.setattr(embedded_tasks, "STYLES", {**STYLES, style: lambda picture: picture})
    draw.cache_clear()
    plain = draw(style, "test", 3).astype(float)
    monkeypatch.undo()
    draw.cache_clear()
    styled = draw(style, "test", 3).astype(float)
    gray, styled_gray = plain.mean(-1), styled.mean(-1)
    sharpness = [np.abs(np.diff(picture)).mean() for picture in (gray, styled_gray)]
    if style == "sketch":
        lines = (styled - 0.8 * plain) / 0.2
        assert np.ptp(lines, axis=-1).max() < 12 and np.median(lines) > 200  # grey lines on white
    elif style == "colour":
        assert np.abs(plain.max(-1) - styled.max(-1)).max() <= 2 and np.abs(plain - styled).mean() > 1
    else:
        assert sharpness[1] < 0.8 * sharpness[0] and abs(gray.mean() - styled_gray.mean()) < 5


def test_shapes_are_all_seen_names_of_revision_2_in_scenes_that_none_of_its_splits_holds():
    names = scenes_of(2).class_names("seen")
    found = embedded_task("shapes", "test")
    assert found.class_names == names
    assert {found.labels.count(label) for label in range(len(names))} == {40}
    ours = {draw("shapes", split, index).tobytes() for split in PER_NAME for index in range(20)}
    assert len(ours) == 60
    view = (CANVAS - VIEW) // 2
    for split in ("train", "val", "test"):
        for index in range(20):
            picture, _ = scene(split, index, revision=2)
            assert np.asarray(ImageOps.crop(picture.render(), view)).tobytes() not in ours


def test_the_commands_find_the_tasks_by_name():
    assert splits_of("embedded-sketch", "zeroshot") == ("test", "val", "train")
    assert splits_of("embedded-sketch", "training") == ("train", "val")
    found = source("embedded-blur", "zeroshot", "val")
    assert fill(found.templates[0], "apple") == "an apple"
    batch = next(iter(found.loader(Preprocess(VIEW), 100, 0)))
    assert batch["image"].shape == (100, 3, VIEW, VIEW) and batch["label"].tolist() == list(range(100))
    assert torch.equal(batch["image"], next(iter(found.loader(Preprocess(VIEW), 100, 0)))["image"])


def test_the_pictures_of_a_split_come_to_an_end():
    pictures = embedded_task("sketch", "val").pictures
    with pytest.raises(IndexError):
        pictures[len(pictures)]


def test_what_is_not_there_is_named():
    with pytest.raises(ValueError, match="the embedded tasks are sketch, colour, blur, plain, shapes, not 'oil'"):
        embedded_task("oil")
    with pytest.raises(ValueError, match=r"have the splits \['train', 'val', 'test'\], not 'unseen'"):
        embedded_task("sketch", "unseen")
