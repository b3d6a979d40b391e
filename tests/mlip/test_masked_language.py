"""Masked language modelling: what is masked, what the tower reads, and the loss against a loop."""

import math

import pytest
import torch
from torch.nn import functional as F

from common.clip import CLIP
from mlip.masked_language import MaskedLanguage


@pytest.fixture
def clip():
    torch.manual_seed(0)
    return CLIP.tiny()


def task(clip):
    tower = clip.text_tower
    return MaskedLanguage(64, tower.vocab_size, tower.context_length)


def words(clip, copies=400):
    return clip.tokenizer(["a red cat on the dog", "a bird"] * copies, longest=True)


def test_fifteen_in_a_hundred_words_are_chosen_and_neither_start_nor_end_nor_padding(clip):
    torch.manual_seed(0)
    ids, vocabulary = words(clip), clip.text_tower.vocab_size
    corrupted, chosen = task(clip).corrupt(ids)
    place, end = torch.arange(ids.shape[1]), ids.argmax(1, keepdim=True)
    inner = (place > 0) & (place < end)
    assert not (chosen & ~inner).any() and torch.equal(corrupted[~chosen], ids[~chosen])
    assert chosen[inner].float().mean() == pytest.approx(0.15, abs=0.02)
    masked, kept = corrupted[chosen] == vocabulary, corrupted[chosen] == ids[chosen]
    assert masked.float().mean() == pytest.approx(0.8, abs=0.05)
    assert kept.float().mean() == pytest.approx(0.1 + 0.1 / (vocabulary - 2), abs=0.05)
    assert corrupted[chosen & (corrupted != vocabulary)].max() < vocabulary - 2


@pytest.fixture
def corrupted(monkeypatch, clip):
    """Corrupts a part of a batch on one of so many ranks; all are seeded alike."""

    def on_rank(part, rank, ranks):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: ranks)
        head = task(clip)
        torch.manual_seed(0)
        return head.corrupt(part)[0]

    return on_rank


def test_ranks_that_are_seeded_alike_mask_other_words(clip, corrupted):
    """Two ranks choose what one would in the joined batch."""
    ids = words(clip, 4)
    both = torch.cat([corrupted(part, rank, 2) for rank, part in enumerate(ids.chunk(2))])
    assert torch.equal(both, corrupted(ids, 0, 1))


def test_so_do_ranks_whose_longest_captions_differ_in_length(clip, corrupted):
    short, long = clip.tokenizer(["a bird"] * 4, longest=True), words(clip, 2)
    padded = F.pad(short, (0, long.shape[1] - short.shape[1]))
    together = corrupted(torch.cat([padded, long]), 0, 1)
    generators = []
    for rank, part in enumerate((short, long)):
        assert torch.equal(corrupted(part, rank, 2), together[4 * rank : 4 * rank + 4, : part.shape[1]])
        generators.append(torch.get_rng_state())
    assert torch.equal(*generators)


@torch.no_grad()
def test_without_a_mask_the_tower_reads_what_it_always_reads(clip):
    ids, tower = words(clip, 1), clip.text_tower
    hidden = task(clip).hidden(tower, ids)
    torch.testing.assert_close(tower.text_projection.T @ hidden[0, ids[0].argmax()], tower(ids)[0])


@torch.no_grad()
def test_a_masked_word_is_read_as_the_mask_alone(clip):
    ids, tower = words(clip, 1), clip.text_tower
    masked = task(clip)
    corrupted, other = ids.clone(), ids.clone()
    corrupted[0, 2] = masked.mask_id
    other[0, 2] = 3
    hidden = masked.hidden(tower, corrupted)
    tower.token_embedding.weight[3] = masked.mask_embedding  # now the mask, in the vocabulary
    torch.testing.assert_close(hidden[0], masked.hidden(tower, other)[0])


def test_the_loss_is_the_mean_cross_entropy_of_the_chosen_words(clip):
    torch.manual_seed(0)
    ids, masked = words(clip, 1), task(clip)
    hidden, chosen = torch.randn(*ids.shape, 64), torch.zeros(ids.shape, dtype=torch.bool)
    chosen[0, 1:4] = chosen[1, 2] = True
    terms = []
    for caption, place in chosen.nonzero().tolist():
        logits = masked.head(hidden[caption, place]).tolist()
        terms.append(math.log(sum(map(math.exp, logits))) - logits[ids[caption, place]])
    assert float(masked.loss(hidden, ids, chosen).detach()) == pytest.approx(sum(terms) / 4, rel=1e-5)


def test_a_batch_without_a_chosen_word_teaches_nothing(clip):
    ids, masked = words(clip, 1), task(clip)
    loss = masked.loss(torch.randn(*ids.shape, 64), ids, torch.zeros(ids.shape, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and masked.head.weight.grad.abs().sum() == 0
