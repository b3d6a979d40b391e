"""Masked language modelling: what is masked, what the tower reads, and the loss against a loop."""

import math

import pytest
import torch

from common.clip import CLIP
from mlip.masked_language import MaskedLanguage


@pytest.fixture
def clip():
    torch.manual_seed(0)
    return CLIP.tiny()


def words(clip, copies=400):
    return clip.tokenizer(["a red cat on the dog", "a bird"] * copies, longest=True)


def test_fifteen_in_a_hundred_words_are_chosen_and_neither_start_nor_end_nor_padding(clip):
    torch.manual_seed(0)
    ids, vocabulary = words(clip), clip.text_tower.vocab_size
    corrupted, chosen = MaskedLanguage(64, vocabulary).corrupt(ids)
    place, end = torch.arange(ids.shape[1]), ids.argmax(1, keepdim=True)
    inner = (place > 0) & (place < end)
    assert not (chosen & ~inner).any() and torch.equal(corrupted[~chosen], ids[~chosen])
    assert chosen[inner].float().mean() == pytest.approx(0.15, abs=0.02)
    masked, kept = corrupted[chosen] == vocabulary, corrupted[chosen] == ids[chosen]
    assert masked.float().mean() == pytest.approx(0.8, abs=0.05)
    assert kept.float().mean() == pytest.approx(0.1 + 0.1 / (vocabulary - 2), abs=0.05)
    assert corrupted[chosen & (corrupted != vocabulary)].max() < vocabulary - 2


def test_ranks_that_are_seeded_alike_mask_other_words(monkeypatch, clip):
    """Two ranks choose what one would in the joined batch."""
    ids, head = words(clip, 4), MaskedLanguage(64, clip.text_tower.vocab_size)

    def corrupted(part, rank, ranks):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: ranks)
        torch.manual_seed(0)
        return head.corrupt(part)[0]

    both = torch.cat([corrupted(part, rank, 2) for rank, part in enumerate(ids.chunk(2))])
    assert torch.equal(both, corrupted(ids, 0, 1))


@torch.no_grad()
def test_without_a_mask_the_tower_reads_what_it_always_reads(clip):
    ids, tower = words(clip, 1), clip.text_tower
    hidden = MaskedLanguage(64, tower.vocab_size).hidden(tower, ids)
    torch.testing.assert_close(tower.text_projection.T @ hidden[0, ids[0].argmax()], tower(ids)[0])


@torch.no_grad()
def test_a_masked_word_is_read_as_the_mask_alone(clip):
    ids, tower = words(clip, 1), clip.text_tower
    masked = MaskedLanguage(64, tower.vocab_size)
    corrupted, other = ids.clone(), ids.clone()
    corrupted[0, 2] = masked.mask_id
    other[0, 2] = 3
    hidden = masked.hidden(tower, corrupted)
    tower.token_embedding.weight[3] = masked.mask_embedding  # now the mask, in the vocabulary
    torch.testing.assert_close(hidden[0], masked.hidden(tower, other)[0])


def test_the_loss_is_the_mean_cross_entropy_of_the_chosen_words(clip):
    torch.manual_seed(0)
    ids, masked = words(clip, 1), MaskedLanguage(64, clip.text_tower.vocab_size)
    hidden, chosen = torch.randn(*ids.shape, 64), torch.zeros(ids.shape, dtype=torch.bool)
    chosen[0, 1:4] = chosen[1, 2] = True
    terms = []
    for caption, place in chosen.nonzero().tolist():
        logits = masked.head(hidden[caption, place]).tolist()
        terms.append(math.log(sum(map(math.exp, logits))) - logits[ids[caption, place]])
    assert float(masked.loss(hidden, ids, chosen).detach()) == pytest.approx(sum(terms) / 4, rel=1e-5)


def test_a_batch_without_a_chosen_word_teaches_nothing(clip):
    ids, masked = words(clip, 1), MaskedLanguage(64, clip.text_tower.vocab_size)
    loss = masked.loss(torch.randn(*ids.shape, 64), ids, torch.zeros(ids.shape, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and masked.head.weight.grad.abs().sum() == 0
