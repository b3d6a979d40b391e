"""Files and folders appear whole or not at all, and runs go where the environment says."""

from pathlib import Path

import pytest

from common.paths import check_writable, runs_directory, written_whole


def test_a_file_has_its_name_only_at_the_end(tmp_path):
    path = tmp_path / "new" / "result.json"
    with written_whole(path) as temporary:
        temporary.write_text("{}")
        assert not path.exists()
    assert path.read_text() == "{}" and list(path.parent.iterdir()) == [path]


def test_a_file_replaces_the_one_before(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")
    with written_whole(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_a_folder_is_written_the_same_way(tmp_path):
    path = tmp_path / "shards"
    with written_whole(path) as temporary:
        temporary.mkdir()
        (temporary / "000.tar").touch()
    assert [file.name for file in path.iterdir()] == ["000.tar"]


@pytest.mark.parametrize("begin", [Path.touch, Path.mkdir, lambda path: None], ids=["file", "folder", "nothing"])
def test_an_error_leaves_nothing_behind(tmp_path, begin):
    def fail():
        with written_whole(tmp_path / "result") as temporary:
            begin(temporary)
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_into_is_said_before_the_work(tmp_path):
    check_writable(tmp_path / "new" / "folder", "name another")
    assert not list((tmp_path / "new" / "folder").iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"nothing can be written into .*file/below: Not a directory; name another"):
        check_writable(tmp_path / "file" / "below", "name another")


def test_runs_directory_is_the_environments_or_runs(monkeypatch):
    monkeypatch.setenv("EFFCLIP_RUNS", "elsewhere")
    assert runs_directory() == Path("elsewhere")
    monkeypatch.setenv("EFFCLIP_RUNS", "")
    assert runs_directory() == Path("runs")
