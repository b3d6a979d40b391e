"""Tar files as they come: what is a sample, what is not, and archives that end where they should not."""

import io
import tarfile

import pytest

from common.data import tar
from common.data.account import Account
from common.data.tar import Shard, count_headers, is_remote, read_shard


def pairs(first, last):
    return [
        (f"{n}.{kind}", content) for n in range(first, last) for kind, content in (("jpg", b"pixels"), ("txt", b"a"))
    ]


def write(path, members, **links):
    with tarfile.open(path, "w") as file:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            file.addfile(header, io.BytesIO(content))
        for name, target in links.items():
            header = tarfile.TarInfo(f"{name}.txt")
            header.type, header.linkname = tarfile.LNKTYPE, target
            file.addfile(header)
    return path


def read(path, samples=None):
    account = Account()
    keys = [sample["__key__"] for sample in read_shard(Shard(str(path), samples), account)]
    return keys, account


def test_a_sample_is_a_run_of_members_with_one_key(tmp_path):
    path = write(tmp_path / "0.tar", [("a/1.JPG", b"x"), ("a/1.txt", b"y"), ("b/1.txt", b"z")])
    (first, second) = read_shard(Shard(str(path), None), Account())
    assert first == {"__key__": "a/1", "jpg": b"x", "txt": b"y"} and second == {"__key__": "b/1", "txt": b"z"}


def test_members_of_file_managers_are_no_samples(tmp_path):
    twins = [(f"./._{n}.jpg", b"\0\5\x16\7") for n in range(3)] + [("__MACOSX/0.jpg", b""), ("x/.DS_Store", b"")]
    path = write(tmp_path / "0.tar", [*twins, *pairs(0, 3), ("0000.gif", b"GIF89a")])
    keys, account = read(path)
    assert keys == ["0", "1", "2"] and count_headers(str(path)) == 3
    assert account.ignored == {"system file": 5, "kind that is not read": 1} and account.bad == 0


def test_folders_in_a_tar_are_no_samples(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as file:
        header = tarfile.TarInfo("a.b.jpg")
        header.type = tarfile.DIRTYPE
        file.addfile(header)
    assert read(tmp_path / "0.tar")[0] == [] and count_headers(str(tmp_path / "0.tar")) == 0


def test_a_member_that_comes_twice_costs_its_sample_alone(tmp_path):
    keys, account = read(write(tmp_path / "0.tar", [*pairs(0, 2), ("1.jpg", b"again"), *pairs(2, 4)]))
    assert keys == ["0", "2", "3"] and account.rejected == {"repeated key": 1}


def test_members_that_are_apart_are_counted_and_explained(tmp_path):
    members = [(f"{n}.jpg", b"x") for n in range(3)] + [(f"{n}.txt", b"a") for n in range(3)]
    keys, account = read(write(tmp_path / "0.tar", members))
    assert keys == ["0", "1", "2"] and account.rejected == {"repeated key": 3} and "--sort=name" in account.last


def test_a_link_is_named(tmp_path):
    keys, account = read(write(tmp_path / "0.tar", [*pairs(0, 1), ("1.jpg", b"x")], **{"1": "0.txt"}))
    assert (
        keys == ["0", "1"] and account.ignored == {"link in a tar": 1} and "1.txt" in account.examples["link in a tar"]
    )


def test_joined_archives_are_read_to_their_end(tmp_path):
    parts = [write(tmp_path / f"{n}.tar", pairs(n, n + 2)).read_bytes() for n in (0, 2)]
    (tmp_path / "both.tar").write_bytes(b"".join(parts))
    keys, account = read(tmp_path / "both.tar")
    assert keys == ["0", "1", "2", "3"] and account.bad == 0


@pytest.mark.parametrize("kind", ["w", "w:gz"])
def test_a_cut_archive_counts_all_that_it_lacks(tmp_path, kind):
    with tarfile.open(tmp_path / "0.tar", kind) as file:
        for n in range(8):
            for name, content in ((f"{n}.jpg", bytes(range(256)) * (n + 1)), (f"{n}.txt", b"a")):
                header = tarfile.TarInfo(name)
                header.size = len(content)
                file.addfile(header, io.BytesIO(content))
    whole = (tmp_path / "0.tar").read_bytes()
    for size in (0, 1, 10, 300, len(whole) // 2, len(whole) - (11000 if kind == "w" else 60)):
        (tmp_path / "cut.tar").write_bytes(whole[: max(0, size)])
        keys, account = read(tmp_path / "cut.tar", samples=8)
        assert account.bad == max(1, 8 - len(keys)), size
        assert set(account.rejected) == {"damaged shard"}
        if keys:
            assert "instead of 8" in account.last


def test_a_damaged_header_is_no_end(tmp_path):
    content = bytearray(write(tmp_path / "0.tar", pairs(0, 4)).read_bytes())
    content[8 * 512] ^= 0xFF  # the header of the third sample's picture: the second one may be incomplete
    (tmp_path / "0.tar").write_bytes(content)
    keys, account = read(tmp_path / "0.tar", samples=4)
    assert keys == ["0"] and account.rejected == {"damaged shard": 3} and "damaged at byte" in account.last


@pytest.mark.parametrize(
    ("url", "remote"),
    [("s3://b/0.tar", True), ("pipe:cat 0.tar", True), ("/a/2024-01-01T12:00:00/0.tar", False), ("c:0.tar", False)],
)
def test_what_is_remote(url, remote):
    assert is_remote(url) == remote


class Connection(io.BytesIO):
    """A connection that fails after ``size`` bytes."""

    def __init__(self, content, size):
        super().__init__(content)
        self.left = size

    def read(self, size=-1):
        if self.left <= 0:
            raise OSError("connection reset")
        self.left -= max(size, 0)
        return super().read(size)


def test_a_broken_connection_is_opened_again_and_goes_on(tmp_path, monkeypatch):
    content = write(tmp_path / "0.tar", pairs(0, 40)).read_bytes()
    sizes = iter([25_000, 40_000, 10**9])
    monkeypatch.setattr(tar, "_PAUSE", 0)
    monkeypatch.setattr(tar, "open_url", lambda url: Connection(content, next(sizes)))
    keys, account = read("http://host/0.tar")
    assert keys == [str(n) for n in range(40)] and account.bad == 0


def test_a_dead_connection_stops_the_run(monkeypatch):
    tries = []
    monkeypatch.setattr(tar, "_PAUSE", 0)
    monkeypatch.setattr(tar, "open_url", lambda url: Connection(b"", tries.append(url) or 0))
    with pytest.raises(ValueError, match=r"http://host/0\.tar cannot be read \(connection reset\), tried 3 times"):
        read("http://host/0.tar")
    assert len(tries) == 3
