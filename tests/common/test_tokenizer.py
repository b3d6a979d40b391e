"""The tokenizer against open_clip's, and its cut vocabulary."""

import open_clip
import pytest
import torch

from common import byte_pairs
from common.tokenizer import Tokenizer, encode

TEXTS = [
    "a photo of a cat",
    "An OWL, on a  wire!",
    "it's 3.5 metres &amp; café-au-lait",
    "naïve 北京 🦉",
    "x",
    "supercalifragilisticexpialidocious " * 3,
    "<start_of_text> We'LL've 1234 ½ &lt;b&gt; \u00a0\u200b ſ İ <END_OF_TEXT>",
]


@pytest.mark.parametrize("context_length", [77, 48])
def test_ids_equal_open_clips(context_length):
    expected = open_clip.get_tokenizer("ViT-B-16")(TEXTS, context_length=context_length)
    assert torch.equal(Tokenizer(context_length)(TEXTS), expected)


def test_every_id_is_spelt_as_open_clip_spells_it():
    spelling = open_clip.tokenizer.SimpleTokenizer().decode
    assert [byte_pairs.decode(number) for number in range(0, 49_408, 7)] == [
        spelling([number]) for number in range(0, 49_408, 7)
    ]
    for text in open_clip.IMAGENET_CLASSNAMES[:300]:
        assert encode(text)[1:-1] == open_clip.tokenizer.SimpleTokenizer.encode(open_clip.tokenizer._tokenizer, text)


def test_a_long_text_is_cut_before_its_end_only_when_asked():
    long = ["a very long caption " * 30]
    expected = open_clip.get_tokenizer("ViT-B-16")(long, context_length=16)
    assert torch.equal(Tokenizer(16)(long, truncate=True), expected)
    with pytest.raises(ValueError, match=r"122 tokens do not fit context_length 16: 'a very"):
        Tokenizer(16)(long)


def test_rows_as_wide_as_the_longest():
    ids = Tokenizer(77)(["a cat", "a cat on a mat"], longest=True)
    assert ids.shape == (2, 7) and torch.equal(ids, Tokenizer(77)(["a cat", "a cat on a mat"])[:, :7])
    assert Tokenizer(77)([]).shape == (0, 77)


def test_a_cut_vocabulary_renumbers_and_keeps_the_end_highest():
    vocabulary = sorted({*encode("a red cat"), *encode("dog")})
    tokenizer = Tokenizer(8, vocabulary)
    for text in ("a red cat", "dog a cat"):
        ids = tokenizer.ids(text)
        assert [vocabulary[i] for i in ids] == encode(text)
        assert ids[-1] == max(ids) == len(vocabulary) - 1
    assert tokenizer(["a cat"]).tolist() == [[*tokenizer.ids("a cat"), 0, 0, 0, 0]]


def test_what_cannot_be_said_is_named():
    tokenizer = Tokenizer(8, sorted(encode("a red cat")))
    with pytest.raises(ValueError, match=r"\['dog'\] in 'a dog' is not in this model's vocabulary of 5 ids"):
        tokenizer(["a red cat", "a dog"])
    for text in ("", " \n"):
        with pytest.raises(ValueError, match="empty text"):
            tokenizer([text])
    for vocabulary in ([3, 2], [2, 2]):
        with pytest.raises(ValueError, match="ascending order"):
            Tokenizer(8, vocabulary)
