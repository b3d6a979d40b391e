"""The benchmark as a folder of pictures."""

from common.data.embedded.folder import main


def test_a_file_in_place_of_the_folder_is_one_sentence(tmp_path, capsys):
    (tmp_path / "one.png").touch()
    assert main([str(tmp_path / "one.png"), "--pictures", "1"]) == 1
    assert capsys.readouterr().err.endswith("Not a directory; check the path\n")
