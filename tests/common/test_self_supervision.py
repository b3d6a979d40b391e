"""SimCLR, SimSiam and the batch normalisation over ranks, against loops and PyTorch's own."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from common.self_supervision import BatchNormOverRanks, SimSiam, perceptron, simclr
from tests.common.ranks import on_two_ranks


def views(count=4, width=6):
    torch.manual_seed(0)
    return torch.randn(count, width, requires_grad=True), torch.randn(count, width)


def cosine(a, b):
    return float(sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b))


@pytest.mark.parametrize("temperature", [0.1, 0.7])
def test_simclr_by_loops(temperature):
    """Every view of every picture picks its other view among all views but itself."""
    first, second = (view.tolist() for view in views())
    everything = [("first", i, z) for i, z in enumerate(first)] + [("second", i, z) for i, z in enumerate(second)]
    terms = []
    for side, picture, anchor in everything:
        mass = {
            (other, number): math.exp(cosine(anchor, z) / temperature)
            for other, number, z in everything
            if (other, number) != (side, picture)
        }
        positive = mass["second" if side == "first" else "first", picture]
        terms.append(-math.log(positive / sum(mass.values())))
    assert float(simclr(*views(), temperature).detach()) == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_simclr_is_least_for_equal_views():
    apart = torch.eye(4)
    assert simclr(apart, apart) < simclr(apart, apart.roll(1, 0))
    expected = math.log(1 + 6 * math.exp(-10))  # the positive at 1 / 0.1, six negatives at 0
    assert float(simclr(apart, apart)) == pytest.approx(expected, abs=1e-6)


def test_simsiam_is_minus_the_cosines_with_constant_projections():
    torch.manual_seed(0)
    simsiam, (first, second) = SimSiam(6, hidden=8), views()
    loss = simsiam(first, second)
    with torch.no_grad():
        z = [simsiam.projector(view) for view in (first, second)]
        p = [simsiam.predictor(projection) for projection in z]
    pairs = [(p[0], z[1]), (p[1], z[0])]
    cosines = [cosine(a, b) for ps, zs in pairs for a, b in zip(ps.tolist(), zs.tolist(), strict=True)]
    assert float(loss.detach()) == pytest.approx(-sum(cosines) / 8, rel=1e-4)


def test_no_gradient_flows_through_simsiams_projections():
    torch.manual_seed(0)
    simsiam, (first, second) = SimSiam(6, hidden=8), views()
    for parameter in simsiam.predictor.parameters():
        parameter.data.zero_()  # the prediction is one constant vector, so all that is left is the target's gradient
    simsiam.predictor[-1].bias.data[0] = 1.0
    simsiam(first, second).backward()
    assert first.grad.abs().max() == 0


def test_slips_head_is_two_hidden_layers_with_norm_and_a_linear_end():
    head = perceptron(768, 4096, 4096, 256, norm=BatchNormOverRanks)
    assert [type(layer).__name__ for layer in head] == [
        "Linear", "BatchNormOverRanks", "ReLU", "Linear", "BatchNormOverRanks", "ReLU", "Linear"
    ]  # fmt: skip
    assert [(layer.in_features, layer.out_features) for layer in head if isinstance(layer, nn.Linear)] == [
        (768, 4096),
        (4096, 4096),
        (4096, 256),
    ]


def test_on_one_rank_the_norm_is_pytorchs():
    torch.manual_seed(0)
    ours, theirs, x = BatchNormOverRanks(5), nn.BatchNorm1d(5), torch.randn(8, 5)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("layer", [BatchNormOverRanks(5), SimSiam(5, hidden=8)], ids=["over ranks", "SimSiam"])
def test_a_batch_of_one_picture_cannot_be_normalised(layer):
    one = torch.ones(1, 5)
    with pytest.raises(ValueError, match=r"a batch of 1 picture has no variance .*; make the data's batch_size 2"):
        layer(one) if isinstance(layer, BatchNormOverRanks) else layer(one, one)


def normed(norm, rows):
    """A norm after two batches of eight, of which it sees the rows: the last output, and all that it keeps."""
    norm = norm(5)
    for seed in range(2):
        x = 3 * torch.randn(8, 5, generator=torch.Generator().manual_seed(seed)) + 1
        output = norm(x[rows]).detach()
    return output, norm.state_dict()


def one_rank(rank, folder):
    """Four of the eight rows of each batch."""
    torch.save(normed(BatchNormOverRanks, slice(4 * rank, 4 * rank + 4)), f"{folder}/{rank}.pt")


def test_on_two_ranks_the_norm_is_pytorchs_of_all_rows_and_so_is_what_it_keeps_for_evaluation(tmp_path):
    on_two_ranks(one_rank, tmp_path)
    outputs, kept = zip(*(torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)), strict=True)
    expected, state = normed(nn.BatchNorm1d, slice(None))
    torch.testing.assert_close(torch.cat(outputs), expected, atol=1e-5, rtol=0)
    for rank in range(2):
        torch.testing.assert_close(dict(kept[rank]), dict(state), atol=1e-5, rtol=0)


def one_rank_of_bf16(rank, folder):
    norm = BatchNormOverRanks(5).bfloat16()
    output = norm(torch.arange(10.0).reshape(2, 5).bfloat16() + rank)
    torch.save([output.detach(), norm.running_mean], f"{folder}/{rank}.pt")


def test_on_two_ranks_a_norm_of_bf16_stays_in_bf16(tmp_path):
    on_two_ranks(one_rank_of_bf16, tmp_path)
    output, mean = torch.load(tmp_path / "0.pt", weights_only=True)
    assert output.dtype == mean.dtype == torch.bfloat16
    expected = 0.1 * (torch.arange(5) + 3.0)  # of rows that begin at 0, 5, 1 and 6; the momentum is 0.1
    torch.testing.assert_close(mean.float(), expected, atol=4e-3, rtol=0)


def test_simclr_moves_views_of_one_picture_together():
    first, second = views()
    simclr(first, second).backward()
    with torch.no_grad():
        moved = first - 0.1 * first.grad
        before, after = (F.cosine_similarity(view, second).mean() for view in (first, moved))
    assert after > before
