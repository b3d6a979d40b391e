"""What a model of the scenes of shape is asked: which texts a split's pictures are told apart by."""

import torch

from benchmarks.training import shapes
from common.data.embedded.module import EmbeddedDataModule, scene
from common.data.embedded.shapes import class_names


def test_held_out_names_are_told_apart_among_themselves():
    data = EmbeddedDataModule("common/shapes_clip.json", revision=2)
    prompts, first = shapes.candidates("unseen", data)
    assert prompts == [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in class_names("unseen")]
    label = scene("unseen", 5, 2)[0].main.label
    (batch,) = shapes.labelled([{"label": torch.tensor([label])}], first)
    assert prompts[batch["label"]].split(" ", 1)[1] == class_names("all")[label]


def test_a_retrieval_picture_is_to_find_its_own_caption(monkeypatch):
    monkeypatch.setattr(shapes, "indices", lambda split, revision: [3, 4, 6])
    prompts, first = shapes.candidates("retrieval", EmbeddedDataModule("common/shapes_clip.json", revision=2))
    assert prompts == [scene("retrieval", index, 2)[1] for index in (3, 4, 6)]
    batches = [{"label": torch.tensor([9, 9])}, {"label": torch.tensor([9])}]
    assert [batch["label"].tolist() for batch in shapes.labelled(batches, first)] == [[0, 1], [2]]
