"""The catalogue's classification sets, each against a miniature one in the format in which it is published."""

import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST, Flowers102

from common.data.catalogue import entry, names
from common.data.classification import classification_set, loader
from common.data.transforms import eval_transform, to_batch
from common.preprocess import Preprocess
from common.zeroshot import imagenet_names
from tests.common.data import miniature
from tests.common.data.miniature import SPLITS, TWO, paint, small, write_idx, write_split_json

WRITERS = {
    "food101": (miniature.write_food101, ["apple pie", "baby back ribs"]),
    "oxford_pets": (miniature.write_oxford_pets, ["Abyssinian", "American Bulldog"]),
    "stanford_cars": (miniature.write_stanford_cars, ["AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012"]),
    "dtd": (miniature.write_dtd, ["banded", "polka-dotted"]),
    "fgvc_aircraft": (miniature.write_fgvc_aircraft, ["707-320", "F/A-18"]),
    "sun397": (miniature.write_sun397, ["abbey", "outdoor apartment building"]),
}


def contents(found):
    """[(gray value, label), ...] of a data set."""
    pictures = [found[index] for index in range(len(found))]
    assert all(image.mode == "RGB" for image, _ in pictures)
    assert [label for _, label in pictures] == found.labels and len(set(found.keys)) == len(found)
    return [(image.getpixel((3, 3))[0], label) for image, label in pictures]


def check(of, root, written, class_names):
    """Every split holds the written pictures with their labels; splits add up."""
    for split, rows in written.items():
        found = classification_set(of, root, split)
        assert contents(found) == rows
        assert (found.class_names, found.metric, found.templates) == (class_names, of.metric, of.templates)
    together = classification_set(of, root, "+".join(written))
    assert contents(together) == [row for rows in written.values() for row in rows]


@pytest.mark.parametrize("name", WRITERS)
def test_sets_that_torchvision_or_text_files_describe(name, tmp_path):
    write, class_names = WRITERS[name]
    written = write(tmp_path)
    check(small(entry(name), written, 2), tmp_path, written, class_names)


def test_flowers(tmp_path, monkeypatch):
    written = miniature.write_flowers102(tmp_path, monkeypatch)
    of = small(entry("flowers102"), written, 102)
    assert set(of.rename) <= set(Flowers102.classes), "a name that is to be corrected is not torchvision's"
    check(of, tmp_path, written, [of.rename.get(name, name) for name in Flowers102.classes])


@pytest.mark.parametrize(
    ("name", "kind", "class_names"),
    [("cifar10", CIFAR10, ["airplane", "automobile"]), ("cifar100", CIFAR100, ["apple", "aquarium fish"])],
)
def test_cifar(name, kind, class_names, tmp_path, monkeypatch):
    written = miniature.write_cifar(tmp_path, monkeypatch, kind)
    of = small(entry(name), written, 2)
    check(of, tmp_path, written, class_names)
    (tmp_path / kind.base_folder / "meta").write_bytes(b"damaged")
    (tmp_path / kind.base_folder / "batches.meta").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"corrupted.*It needs https://www.cs.toronto.edu"):
        classification_set(of, tmp_path)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>" * 20])
def test_a_damaged_matlab_file_is_explained(content, tmp_path):
    miniature.write_stanford_cars(tmp_path)
    (tmp_path / "stanford_cars/cars_test_annos_withlabels.mat").write_bytes(content)
    with pytest.raises(ValueError, match=r"Stanford Cars \(test\).*It needs cars_train.tgz"):
        classification_set(small(entry("stanford_cars"), TWO, 2), tmp_path)


def test_an_unknown_pickle_is_never_opened(tmp_path, monkeypatch):
    """torchvision unpickles CIFAR's batches, so it must be by checksum alone."""
    miniature.write_cifar(tmp_path, monkeypatch, CIFAR10)
    (tmp_path / CIFAR10.base_folder / "test_batch").write_bytes(b"cos\nsystem\n(S'echo run'\ntR.")
    with pytest.raises(ValueError, match="not found or corrupted"):
        classification_set(small(entry("cifar10"), TWO, 2), tmp_path)


def test_imagenet_wherever_it_stands(tmp_path):
    written = miniature.write_imagenet(tmp_path / "val")
    of = small(entry("imagenet"), written, 1000)
    check(of, tmp_path, written, list(imagenet_names()))
    place = tmp_path / "val"
    for new in (tmp_path / "imagenet/val", tmp_path / "imagenet/images/val"):
        new.parent.mkdir()
        place = place.rename(new)
        assert classification_set(of, tmp_path).keys[0].startswith(str(new.relative_to(tmp_path)))
    shutil.rmtree(place / "n01440764")
    with pytest.raises(ValueError, match=r"999 folders .* not the classes of imagenet-1k"):
        classification_set(of, tmp_path)


def test_imagenet_in_numbered_folders_is_refused(tmp_path):
    written = miniature.write_imagenet(tmp_path / "val", [str(number) for number in range(1000)])
    with pytest.raises(ValueError, match=r"1000 folders \(0, 1, 2, ...\)"):
        classification_set(small(entry("imagenet"), written, 1000), tmp_path)


def test_caltech101_is_split_by_its_seed(tmp_path):
    base, counts = miniature.write_caltech101(tmp_path)
    of = small(entry("caltech101"), {"train": range(6), "test": range(6)}, 3, shots=2)
    train, test = (classification_set(of, tmp_path, split) for split in ("train", "test"))
    assert train.class_names == ["background", "centered face", "accordion"] and train.metric == "mean_per_class"
    assert sorted(train.labels) == [0, 0, 1, 1, 2, 2] and sorted(test.labels) == [0, 0, 0, 1, 1, 2]
    assert set(train.keys) | set(test.keys) == {
        f"caltech101/101_ObjectCategories/{folder}/image_{number + 1:04d}.jpg"
        for folder, count in counts
        for number in range(count)
    }
    assert train.keys == classification_set(of, tmp_path, "train").keys
    (base / "accordion/image_0004.png").write_bytes((base / "accordion/image_0001.jpg").read_bytes())
    with pytest.raises(ValueError, match="7 pictures of 'test' were found where 6 belong"):
        classification_set(of, tmp_path)


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("folder", [".", "FashionMNIST/raw", "usr/share/datasets/fashion-mnist"])
def test_fashion_mnist_in_every_layout(folder, end, tmp_path):
    for split, prefix in {"train": "train", "test": "t10k"}.items():
        write_idx(tmp_path / folder, end, prefix, TWO[split])
    of = small(entry("fashion_mnist"), TWO, 10)
    assert set(of.rename) == set(FashionMNIST.classes)
    check(of, tmp_path, TWO, [of.rename[name] for name in FashionMNIST.classes])
    (images,) = (tmp_path / folder).glob("t10k-images*")
    images.write_bytes(images.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte(.gz is damaged| is no whole idx file)"):
        classification_set(of, tmp_path)
    images.unlink()
    with pytest.raises(ValueError, match=r"no FashionMNIST/raw/t10k-.* nor t10k-.*Debian's package"):
        classification_set(of, tmp_path)


def test_download_happens_on_request_alone(tmp_path, monkeypatch):
    asked = []

    def download(self):
        asked.append(self.root)
        for split, prefix in {"train": "train", "test": "t10k"}.items():
            write_idx(tmp_path / "new/FashionMNIST/raw", "", prefix, TWO[split])

    monkeypatch.setattr(FashionMNIST, "download", download)
    of = small(entry("fashion_mnist"), TWO, 10)
    with pytest.raises(ValueError, match="there is no such folder"):
        classification_set(of, tmp_path / "new")
    assert not asked
    assert contents(classification_set(of, tmp_path / "new", download=True)) == TWO["test"] and len(asked) == 1
    assert contents(classification_set(of, tmp_path / "new")) == TWO["test"] and len(asked) == 1


COOP = [name for name in names("classification") if entry(name, "coop").reader == "split_json"]


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("name", COOP)
def test_coop_splits(name, place, tmp_path):
    of = entry(name, "coop")
    written = write_split_json(
        tmp_path, of.options["file"][place], of.options["pictures"][place], ("Apply_Eye_Makeup", "abbey")
    )
    of = small(of, written, 2)
    check(of, tmp_path, written, ["Apply Eye Makeup", "abbey"])
    (tmp_path / of.options["file"][place]).unlink()
    with pytest.raises(ValueError, match=r"there is no .*split_zhou_.*json.*It needs .*DATASETS.md"):
        classification_set(of, tmp_path)


def test_coop_names_must_number_the_classes(tmp_path):
    of = entry("ucf101")
    file = tmp_path / of.options["file"][0]
    write_split_json(tmp_path, of.options["file"][0], of.options["pictures"][0], ("a", "b"))
    file.write_text(file.read_text().replace(", 1, ", ", 2, "))
    with pytest.raises(ValueError, match="2 labels up to 2"):
        classification_set(small(of, SPLITS, 2), tmp_path)


@pytest.fixture
def textures(tmp_path):
    miniature.write_dtd(tmp_path)
    return tmp_path, small(entry("dtd"), SPLITS, 2)


def test_a_set_that_torchvision_reads_names_no_option_of_torchvision(tmp_path):
    with pytest.raises(ValueError, match=rf"^Food-101 \(test\) is not in {tmp_path}\. It needs http.*food-101/images"):
        classification_set("food101", tmp_path)


def test_missing_and_partial_data_say_what_to_download(textures):
    root, of = textures
    cases = [
        ((of, root / "elsewhere"), "there is no such folder. It needs https://www.robots"),
        (("dtd", root), "3 pictures of 'test' were found where 1880 belong. It needs https"),
        ((replace(of, num_classes=47), root), "2 classes instead of 47"),
        ((of, root, "validation"), r"has the splits \['train', 'val', 'test'\]"),
        ((of, root, "val+val"), "and sums of them"),
        (("coco", root), "is for retrieval; classes have caltech101"),
        (("imagenet", root, "test", "mlip", True), "cannot be downloaded by a program; get the ILSVRC2012 archives"),
        (("stanford_cars", root, "test", "mlip", True), "cannot be downloaded anymore. It needs cars_train.tgz"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            classification_set(*arguments)
    (root / "dtd/dtd/images/banded/banded_0006.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 pictures are missing, such as .*banded_0006.jpg"):
        classification_set(of, root)
    (root / "dtd/dtd/labels/test1.txt").unlink()
    with pytest.raises(ValueError, match=r"No such file.*test1.txt.*dtd-r1.0.1.tar.gz"):
        classification_set(of, root)


def test_a_picture_listed_twice_is_refused(textures):
    root, of = textures
    file = root / "dtd/dtd/labels/test1.txt"
    lines = file.read_text().split()
    file.write_text("\n".join([lines[0], lines[1], lines[0]]))
    with pytest.raises(ValueError, match=r"1 pictures .* listed more than once"):
        classification_set(of, root)


def test_a_damaged_picture_is_named(textures):
    root, of = textures
    file = root / "dtd/dtd/images/banded/banded_0006.jpg"
    file.write_bytes(file.read_bytes()[:100])
    found = classification_set(of, root)
    with pytest.raises(ValueError, match=r"banded_0006.jpg is no picture that can be read"):
        found[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_reads_every_picture_once(workers, textures):
    root, of = textures
    paint(root / "dtd/dtd/images/banded/banded_0006.jpg", 200)
    found = classification_set(of, root, "train+val+test")
    batches = loader(found, Preprocess(6), batch_size=3, num_workers=workers)
    read = list(batches)
    assert len(batches) == len(read) == 3
    assert [key for batch in read for key in batch["key"]] == found.keys
    assert torch.cat([batch["label"] for batch in read]).tolist() == found.labels
    images = torch.cat([batch["image"] for batch in read])
    transform = eval_transform(Preprocess(6))
    expected = to_batch([transform(found.picture(index), None) for index in range(len(found))], Preprocess(6))
    assert images.shape == (8, 3, 6, 6) and images.dtype == torch.float32 and torch.equal(images, expected)


def test_gray_and_transparent_pictures_become_rgb(textures):
    root, of = textures
    Image.new("P", (9, 9)).save(root / "dtd/dtd/images/banded/banded_0006.jpg", "PNG")
    assert classification_set(of, root)[1][0].mode == "RGB"
