"""The catalogue: MLIP's Table 11 and CoOp's splits in numbers, and entries that readers and prompts can use."""

import inspect

import pytest

from common.data.catalogue import METRICS, PROTOCOLS, entry, names
from common.data.sources import READERS
from common.zeroshot import imagenet_names, imagenet_templates

# classes, train, test, metric of MLIP's Table 11; Caltech-101's test split is explained in its file
TABLE_11 = {
    "imagenet": (1000, 1_281_167, 50_000, "accuracy"),
    "caltech101": (102, 3060, 6085 - 1, "mean_per_class"),
    "cifar10": (10, 50_000, 10_000, "accuracy"),
    "cifar100": (100, 50_000, 10_000, "accuracy"),
    "dtd": (47, 3760, 1880, "accuracy"),
    "food101": (101, 75_750, 25_250, "accuracy"),
    "oxford_pets": (37, 3680, 3669, "mean_per_class"),
    "flowers102": (102, 2040, 6149, "mean_per_class"),
    "sun397": (397, 19_850, 19_850, "accuracy"),
    "fgvc_aircraft": (100, 6667, 3333, "mean_per_class"),
}
# classes, train, val, test of CoOp's appendix
COOP = {
    "caltech101": (100, 4128, 1649, 2465),
    "oxford_pets": (37, 2944, 736, 3669),
    "stanford_cars": (196, 6509, 1635, 8041),
    "flowers102": (102, 4093, 1633, 2463),
    "food101": (101, 50_500, 20_200, 30_300),
    "fgvc_aircraft": (100, 3334, 3333, 3333),
    "sun397": (397, 15_880, 3970, 19_850),
    "dtd": (47, 2820, 1128, 1692),
    "eurosat": (10, 13_500, 5400, 8100),
    "ucf101": (101, 7639, 1898, 3783),
}
# classes and test pictures by the sets' own papers; ObjectNet's are those of the classes that ImageNet has too
OTHERS = {
    "imagenet_v2": (1000, 10_000),
    "imagenet_r": (200, 30_000),
    "imagenet_a": (200, 7500),
    "imagenet_sketch": (1000, 50_889),
    "objectnet": (113, 18_574),
    "stl10": (10, 8000),
    "cub200": (200, 5794),
}


def test_twenty_three_sets():
    assert set(names("classification")) == {*TABLE_11, *COOP, *OTHERS, "fashion_mnist"}
    assert names("retrieval") == ["coco", "flickr30k"] and len(names()) == 23


@pytest.mark.parametrize("name", TABLE_11)
def test_mlip_protocol_is_table_11(name):
    found = entry(name)
    train = sum(split.count for part, split in found.splits.items() if part != "test")
    assert (found.num_classes, train, found.splits["test"].count, found.metric) == TABLE_11[name]


@pytest.mark.parametrize("name", OTHERS)
def test_sets_that_papers_of_clip_use(name):
    result = entry(name)
    assert (result.num_classes, result.splits["test"].count) == OTHERS[name] and result.metric == "accuracy"


@pytest.mark.parametrize("name", COOP)
def test_coop_protocol(name):
    found = entry(name, "coop")
    counts = tuple(found.splits[split].count for split in ("train", "val", "test"))
    assert (found.num_classes, *counts) == COOP[name]
    assert found.metric == "accuracy" and len(found.templates) == 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", names("classification"))
def test_entries_of_classification_are_usable(name, protocol):
    found = entry(name, protocol)
    assert (found.name, found.protocol, found.task) == (name, protocol, "classification")
    assert found.metric in METRICS and found.title and found.get
    assert found.templates and all(template.count("{}") == 1 for template in found.templates)
    assert {"test"} <= set(found.splits) <= {"train", "val", "test"}
    for split in found.splits.values():
        given = {**found.options, **split.options, **({"split": ""} if found.reader == "split_json" else {})}
        inspect.signature(READERS[found.reader]).bind("root", **given)


def test_imagenet_takes_names_and_prompts_from_open_clip():
    assert entry("imagenet").class_names == imagenet_names() and entry("imagenet").templates == imagenet_templates()
    assert entry("imagenet", "coop").templates == ("a photo of a {}.",)


def test_entries_of_retrieval():
    counts = {name: [split.count for split in entry(name).splits.values()] for name in names("retrieval")}
    assert counts == {"flickr30k": [29_000, 1014, 1000], "coco": [113_287, 5000, 5000]}
    assert {entry(name).reader for name in names("retrieval")} == {"karpathy"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("imagenet21k",), r"'imagenet21k' is not in the catalogue; did you mean imagenet\? it has caltech101, "),
        (("../catalogue/coco",), "is not in the catalogue"),
        (("dtd", "zhou"), r"the protocols are \('mlip', 'coop'\), not 'zhou'"),
    ],
)
def test_unknown_names_are_told_what_there_is(arguments, message):
    with pytest.raises(ValueError, match=message):
        entry(*arguments)
    with pytest.raises(ValueError, match="not for 'detection'"):
        names("detection")
