"""A user's own pictures, and the few shots that are drawn from any labels."""

from collections import Counter

import pytest

from common.data.classification import few_shot, loader, own_set, own_split, split_folders
from common.preprocess import Preprocess
from common.zeroshot import PHOTO
from tests.common.data.miniature import paint, write_text


@pytest.fixture
def folder(tmp_path):
    for name, grays in {"b_cat": [3, 4], "a_dog": [1, 2]}.items():
        for gray in grays:
            paint(tmp_path / f"own/{name}/{gray}.png", gray)
    return tmp_path / "own"


def grays(found):
    return [(image.getpixel((0, 0))[0], label) for image, label in (found[index] for index in range(len(found)))]


def test_folders_are_classes_in_alphabetical_order(folder):
    found = own_set(folder)
    assert grays(found) == [(1, 0), (2, 0), (3, 1), (4, 1)] and found.keys[0] == "a_dog/1.png"
    assert (found.class_names, found.templates, found.metric) == (["a dog", "b cat"], PHOTO, "accuracy")
    (batch,) = loader(found, Preprocess(4), batch_size=8)
    assert batch["label"].tolist() == [0, 0, 1, 1] and batch["image"].shape == (4, 3, 4, 4)


def test_names_and_prompts_of_ones_own(folder, tmp_path):
    write_text(tmp_path / "names.txt", "hot_dog", "", "cat")
    found = own_set(folder, tmp_path / "names.txt", ["{} here", "{} there"], "mean_per_class")
    assert found.class_names == ["hot_dog", "cat"]
    assert (found.templates, found.metric) == (("{} here", "{} there"), "mean_per_class")


def test_a_subset_keeps_pictures_labels_and_keys_together(folder):
    whole = own_set(folder)
    part = whole.subset([3, 0])
    assert grays(part) == [(4, 1), (1, 0)] and part.keys == [whole.keys[3], whole.keys[0]]
    assert part.class_names == whole.class_names and len(whole) == 4
    (batch,) = loader(part, Preprocess(4), batch_size=8)
    assert batch["label"].tolist() == [1, 0] and batch["key"] == part.keys


@pytest.mark.parametrize(("end", "comma"), [("csv", ","), ("tsv", "\t")])
def test_tables_of_paths(end, comma, folder, tmp_path):
    rows = [("own/b_cat/3.png", 0, "cat"), ("own/a_dog/1.png", 1, "dog"), ("own/b_cat/4.png", 0, "cat")]
    table = tmp_path / f"table.{end}"
    write_text(tmp_path / "names.txt", "cat", "dog", "bird")
    write_text(table, comma.join(("path", "label")), *(f"{path}{comma}{label}" for path, label, _ in rows))
    found = own_set(table, tmp_path / "names.txt")
    assert grays(found) == [(3, 0), (1, 1), (4, 0)] and found.class_names == ["cat", "dog", "bird"]
    assert found.keys[0] == "own/b_cat/3.png"
    write_text(table, comma.join(("class", "path")), *(f"{name}{comma}{path}" for path, _, name in rows))
    assert own_set(table).class_names == ["cat", "dog"] and own_set(table).labels == [0, 1, 0]
    write_text(tmp_path / "names.txt", "dog", "cat")
    assert own_set(table, tmp_path / "names.txt").labels == [1, 0, 1]


def test_mistakes_are_explained(folder, tmp_path):
    names, table = tmp_path / "names.txt", tmp_path / "table.csv"
    write_text(names, "dog", "cat", "bird")

    def refused(message, *arguments, **options):
        with pytest.raises(ValueError, match=message):
            own_set(*arguments, **options)

    refused("3 class names do not fit the 2 classes", folder, names)
    refused("the metrics are .* not 'top1'", folder, metric="top1")
    refused("there is no class-name file", folder, tmp_path / "none.txt")
    write_text(tmp_path / "blank.txt", "")
    refused("blank.txt names no class; write one name a line, or leave it out", folder, tmp_path / "blank.txt")
    refused("neither a folder of class folders nor a .csv", tmp_path / "none.csv")
    refused("should hold one folder a class", folder / "a_dog")
    write_text(table, "own/a_dog/1.png,0")
    refused("header with 'path' and 'label' or 'class'", table)
    write_text(table, "path,label", "own/a_dog/1.png,0")
    refused("give a file with one class name a line", table)
    write_text(table, "path,label", "own/a_dog/1.png,3", "own/a_dog/2.png,one")
    refused("uses 3, one, not among the 3 classes", table, names)
    write_text(table, "path,class", "own/a_dog/1.png,wolf")
    refused("uses wolf, not among", table, names)
    write_text(table, "path,class", "own/a_dog/9.png,dog")
    refused(r"1 of 1 pictures are missing, such as .*own/a_dog/9.png", table, names)
    write_text(table, "path,class", "own/a_dog/1.png,")
    refused("line 2 of .*table.csv has no path or no class", table)
    write_text(table, "class,path", "dog")
    refused("line 2 of", table)


def test_folders_that_are_numbers_are_in_the_order_of_their_values(tmp_path, caplog):
    for number in range(12):
        paint(tmp_path / f"own/{number}/a.png", 10 * number)
    write_text(tmp_path / "names.txt", *(f"class {letter}" for letter in "abcdefghijkl"))
    result = own_set(tmp_path / "own", tmp_path / "names.txt")
    assert grays(result) == [(10 * number, number) for number in range(12)] and result.class_names[2] == "class c"
    assert "0 to 11 are in the order of their numbers" in caplog.text


@pytest.mark.parametrize(
    ("folders", "names", "message"),
    [
        (["1", "01"], "ab", "two folders of .* have one number"),
        (["c2", "c10"], "ab", r"the order of text or of numbers is not sure .*\(c10 is out of order\)"),
        (["cat", "dog"], ["dog", "cat"], "lists the folders of .* in another order"),
        (["cat", "dog"], ["pet", "pet"], "names two classes 'pet'"),
        (["cat", "cat "], None, "names two classes 'cat'"),
    ],
)
def test_names_that_may_not_fit_their_folders_are_refused(folders, names, message, tmp_path):
    for folder in folders:
        paint(tmp_path / f"own/{folder}/a.png", 1)
    if names:
        write_text(tmp_path / "names.txt", *names)
    with pytest.raises(ValueError, match=message):
        own_set(tmp_path / "own", tmp_path / "names.txt" if names else None)


def test_files_of_file_managers_are_counted_and_are_no_pictures(folder):
    for name in (".ipynb_checkpoints/1-checkpoint.png", "@eaDir/1.png", "__MACOSX/1.png", "a_dog/._1.png"):
        paint(folder / name, 9)
    (folder / "a_dog" / "1.heic").write_bytes(b"another kind")
    result = own_set(folder)
    assert result.class_names == ["a dog", "b cat"] and len(result) == 4
    assert result.account.ignored == {"system file": 4, "kind that is not read": 1}
    assert result.account.examples["kind that is not read"] == "1.heic"


def test_links_are_followed_and_loops_refused(folder, tmp_path):
    paint(tmp_path / "elsewhere/5.png", 5)
    (folder / "c_bird").symlink_to(tmp_path / "elsewhere")
    assert grays(own_set(folder))[-1] == (5, 2)
    (folder / "a_dog" / "up").symlink_to(folder)
    with pytest.raises(ValueError, match="is a link to a folder above it"):
        own_set(folder)
    (folder / "a_dog" / "up").unlink()
    (folder / "d_again").symlink_to(folder / "a_dog")
    with pytest.raises(ValueError, match="links to one folder"):
        own_set(folder)


def test_a_class_without_a_picture_is_refused(folder):
    (folder / "empty").mkdir()
    (folder / "empty" / "a.heic").write_bytes(b"another kind")
    with pytest.raises(ValueError, match=r"empty holds no picture, 1 files ignored .*first a\.heic"):
        own_set(folder)


def test_spaces_around_a_class_do_not_make_another(folder, tmp_path):
    write_text(tmp_path / "table.csv", "path,class", "own/a_dog/1.png,dog ", "own/a_dog/2.png,dog")
    assert own_set(tmp_path / "table.csv").class_names == ["dog"]


def test_another_picture_or_another_root_is_another_version(folder, tmp_path):
    before = own_set(folder).version
    assert own_set(folder).version == before
    paint(folder / "a_dog/1.png", 200)
    changed = own_set(folder).version
    folder.rename(tmp_path / "moved")
    assert len({before, changed, own_set(tmp_path / "moved").version}) == 3


def test_few_shots_are_seeded_and_nested():
    labels = [index % 5 for index in range(100)] + [5, 5, 5]
    drawn = {shots: few_shot(labels, shots, seed=1) for shots in (1, 2, 4, 8, 16)}
    for shots, indices in drawn.items():
        assert indices == sorted(set(indices)) == few_shot(labels, shots, seed=1)
        expected = dict.fromkeys(range(5), shots) | {5: min(shots, 3)}
        assert Counter(labels[index] for index in indices) == expected
        assert shots == 16 or set(indices) < set(drawn[2 * shots])
    assert drawn[4] != few_shot(labels, 4, seed=2)
    with pytest.raises(ValueError, match="0 shots"):
        few_shot(labels, 0)


def painted(root, **classes):
    """A folder a class with so many pictures, of consecutive gray values."""
    gray = 0
    for name, pictures in classes.items():
        for _ in range(pictures):
            paint(root / name / f"{gray}.png", gray)
            gray += 1
    return root


def test_undivided_pictures_are_divided_class_by_class_and_always_alike(tmp_path):
    root = painted(tmp_path / "own", cat=20, dog=10)
    parts = {split: own_split(root, split) for split in ("train", "val", "test")}
    assert {split: Counter(part.labels) for split, part in parts.items()} == {
        "train": {0: 14, 1: 7},
        "val": {0: 2, 1: 1},
        "test": {0: 4, 1: 2},
    }
    keys = [key for part in parts.values() for key in part.keys]
    assert sorted(keys) == sorted(own_set(root).keys), "each picture is in one part"
    assert own_split(root, "val").keys == parts["val"].keys
    assert not split_folders(root)


def test_folders_of_splits_are_read_and_what_lacks_is_drawn_from_train(tmp_path):
    root = tmp_path / "own"
    painted(root / "train", cat=10, dog=10)
    painted(root / "test", cat=1, dog=2)
    (root / ".git").mkdir()
    write_text(root / "README.md", "about these pictures")
    assert split_folders(root) == ("test", "train")
    assert own_split(root, "test").keys == ["cat/0.png", "dog/1.png", "dog/2.png"]
    train, val = (own_split(root, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (18, 2) and not set(train.keys) & set(val.keys)
    painted(root / "val", cat=1, dog=1)
    assert len(own_split(root, "train")) == 20 and len(own_split(root, "val")) == 2


def test_a_class_called_train_is_no_split(tmp_path):
    assert not split_folders(painted(tmp_path, bus=1, train=1))


def test_splits_of_other_classes_and_small_classes_name_the_mend(tmp_path):
    painted(tmp_path / "own/train", cat=10, dog=10)
    painted(tmp_path / "own/test", cat=1)
    with pytest.raises(ValueError, match=r"own/test and .*own/train differ in their classes, such as 'dog'"):
        own_split(tmp_path / "own", "test")
    with pytest.raises(ValueError, match=r"class 'dog' of .*few has 2 pictures, too few to draw test and val from"):
        own_split(painted(tmp_path / "few", cat=9, dog=2), "train")
