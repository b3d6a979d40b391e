import os
import socket

import numpy as np
import pytest
import torch
from torch import distributed, multiprocessing
from torch.nn import functional as F

from common.clip import CLIP
from common.evaluate.accuracy import accuracy, paired_difference, wilson_interval, zero_shot


def batches(images, labels, size):
    for start in range(0, len(images), size):
        rows = range(start, min(start + size, len(images)))
        yield {
            "image": images[start : start + size],
            "label": labels[start : start + size],
            "key": [f"{i}" for i in rows],
        }


def test_zero_shot_equals_the_plain_sum():
    torch.manual_seed(0)
    clip = CLIP.tiny().train()
    images, labels = torch.randn(23, 3, 32, 32), torch.randint(0, 7, (23,))
    classes = F.normalize(torch.randn(7, 32), dim=-1)
    with torch.no_grad():
        order = (clip.eval().encode_image(images) @ classes.T).argsort(-1, descending=True)
    clip.train()
    result = zero_shot(clip, batches(images, labels, 5), classes)
    assert torch.equal(result.correct, order[:, 0] == labels)
    assert result.top1 == pytest.approx((order[:, 0] == labels).float().mean().item())
    assert result.top5 == pytest.approx((order[:, :5] == labels[:, None]).any(-1).float().mean().item())
    assert result.interval == wilson_interval(int(result.correct.sum()), 23)
    assert result.keys == tuple(str(i) for i in range(23))
    assert clip.training


def test_mean_per_class_leaves_out_what_is_not_shown():
    labels = torch.tensor([0, 0, 0, 2, 2, 5])
    guesses = torch.tensor([0, 0, 1, 2, 4, 3])
    score = accuracy(lambda images: images, [{"image": F.one_hot(guesses, 7), "label": labels}], 7)
    assert score.top1 == pytest.approx(3 / 6)
    assert score.mean_per_class == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


def _scores(images):
    return images.flatten(1)[:, :7]


def _pictures():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(41, 3, 4, 4, generator=generator), torch.randint(0, 7, (41,), generator=generator)


def _one_of_two(rank, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    images, labels = (part[:30] if rank == 0 else part[30:] for part in _pictures())
    score = accuracy(_scores, batches(images, labels, 8), 7)
    torch.save([score.top1, score.top5, score.mean_per_class, *score.interval, score.correct], f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_batch_size_and_processes_do_not_matter(tmp_path):
    (images, labels), whole = _pictures(), []
    for size in (1, 8, 41):
        score = accuracy(_scores, batches(images, labels, size), 7)
        whole.append([score.top1, score.top5, score.mean_per_class, *score.interval, score.correct])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.start_processes(_one_of_two, (port, str(tmp_path)), nprocs=2, start_method="fork")
    whole += [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for other in whole[1:]:
        assert other[:-1] == pytest.approx(whole[0][:-1])
        assert torch.equal(other[-1], whole[0][-1])


def test_fewer_than_five_classes():
    result = accuracy(lambda images: images, [{"image": torch.eye(3), "label": torch.tensor([0, 1, 0])}], 3)
    assert (result.top1, result.top5) == (pytest.approx(2 / 3), 1.0)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "no batch"),
        ([{"image": torch.eye(3)}], "no 'label'"),
        ([{"image": torch.eye(3), "label": torch.tensor([0, 1, 3])}], "do not fit 3 classes"),
        ([{"image": torch.full((3, 3), torch.nan), "label": torch.tensor([0, 1, 0])}], "not a number"),
    ],
)
def test_unusable_data(loader, message):
    with pytest.raises(ValueError, match=message):
        accuracy(lambda images: images, loader, 3)


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (10, 10), (3, 17), (601, 1000), (13000, 20000)])
def test_wilson_interval_by_its_definition(correct, total):
    """Its ends are the shares at which what was seen is 1.96 standard deviations away."""
    low, high = wilson_interval(correct, total)
    for end, extreme in ((low, correct == 0), (high, correct == total)):
        distance, deviation = abs(correct / total - end), (end * (1 - end) / total) ** 0.5
        assert distance == pytest.approx(0 if extreme else 1.959964 * deviation, rel=1e-6, abs=1e-12)
    assert 0 <= low <= correct / total + 1e-12
    assert correct / total - 1e-12 <= high <= 1


def test_wilson_interval_refuses_nonsense():
    for correct, total in ((1, 0), (5, 4), (-1, 4)):
        with pytest.raises(ValueError, match="not a proportion"):
            wilson_interval(correct, total)


def test_paired_difference_is_the_bootstrap_over_images():
    generator = np.random.default_rng(1)
    first, second = (torch.from_numpy(generator.random(400) < share) for share in (0.7, 0.62))
    difference, low, high = paired_difference(first, second)
    assert difference == pytest.approx(first.float().mean().item() - second.float().mean().item())
    steps = first.numpy().astype(float) - second.numpy()
    plain = steps[generator.integers(0, 400, (10_000, 400))].mean(1)
    assert (low, high) == pytest.approx(tuple(np.quantile(plain, [0.025, 0.975])), abs=0.006)
    assert paired_difference(first, second) == (difference, low, high)
    assert paired_difference(first, first) == (0, 0, 0)
    with pytest.raises(ValueError, match="one bool per image"):
        paired_difference(first, second[:5])
