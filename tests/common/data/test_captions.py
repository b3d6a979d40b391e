"""Captions that show nothing are refused; class names that ImageNet itself repeats are not."""

import pytest

from common.arguments import read_labels
from common.tokenizer import Tokenizer, is_empty
from common.zeroshot import imagenet_names


@pytest.mark.parametrize("text", ["", "  ", "\u200b", "\0\0", "&nbsp;", "\ufeff", "\x1b[0m", "&#8203;", "\u00a0"])
def test_a_text_that_cleans_to_nothing(text):
    assert is_empty(text)
    with pytest.raises(ValueError, match="an empty text has nothing to tokenise"):
        Tokenizer().ids(text)


@pytest.mark.parametrize("text", ["a", ".", "你", "😀", "&amp;", "a\0b", "two\nlines", "\ufeffa dog"])
def test_a_text_that_shows_something(text):
    assert not is_empty(text) and len(Tokenizer().ids(text)) > 2


def test_imagenets_own_names_are_accepted_though_two_are_equal(tmp_path):
    assert len(set(imagenet_names())) < 1000
    (tmp_path / "names.txt").write_text("\n".join(imagenet_names()))
    assert read_labels(None, str(tmp_path / "names.txt")) == list(imagenet_names())
    (tmp_path / "names.txt").write_text("cat\ndog\ncat")
    with pytest.raises(ValueError, match="not 'cat' twice"):
        read_labels(None, str(tmp_path / "names.txt"))
