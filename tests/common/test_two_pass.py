"""A batch in parts against the batch at once: gradients, over two processes too, and what stays in memory."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parallel import DistributedDataParallel

from common.clip import CLIP
from common.pretraining import CLIPPretraining
from common.testing import TINY_CAPTIONS, tiny_architecture
from common.two_pass import in_parts
from tests.common.ranks import on_two_ranks


class Loss(nn.Module):
    """The loss as a forward pass, which is what DDP watches."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, batch):
        return self.module.loss(batch)


def training(architecture, parts):
    """A tiny CLIP's training in float64, so that 1e-6 is far above rounding."""
    torch.manual_seed(0)
    return CLIPPretraining(architecture, label_smoothing=0.1, parts=parts).double()


def pairs(rows=slice(None)):
    """Some of six captioned pictures; the last caption counts as the first."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(6, 3, 32, 32, generator=generator, dtype=torch.float64)
    text = CLIP.tiny().tokenizer(list(TINY_CAPTIONS))
    return {"image": images[rows], "text": text[rows], "caption_id": torch.tensor([0, 1, 2, 3, 4, 0])[rows]}


def gradients(architecture, parts, rows=slice(None), wrap=lambda loss: loss):
    """The gradient of each parameter after one batch, of which this process has the rows."""
    module = training(architecture, parts)
    loss = wrap(Loss(module))  # DDP's hooks live as long as it does
    loss(pairs(rows)).backward()
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def assert_equal(gradients, expected):
    """Equal to a millionth of each parameter's largest entry."""
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        bound = 1e-6 * gradient.abs().max()
        assert (gradients[name] - gradient).abs().max() <= bound, name


@pytest.mark.parametrize("parts", [2, 4, 6])
def test_gradients_equal_those_of_one_large_batch(tmp_path, parts):
    """Four parts of six pairs are unequal: two, two, one and one."""
    architecture = tiny_architecture(tmp_path)
    assert_equal(gradients(architecture, parts), gradients(architecture, 1))


def one_rank(rank, folder):
    """Three of the six pairs in two parts; writes the gradients that DDP made."""
    rows = slice(3 * rank, 3 * rank + 3)
    result = gradients(f"{folder}/tiny.json", 2, rows, DistributedDataParallel)
    torch.save(result, f"{folder}/{rank}.pt")


def test_two_processes_in_parts_equal_one_large_batch(tmp_path):
    architecture = tiny_architecture(tmp_path)
    on_two_ranks(one_rank, tmp_path)
    expected = gradients(architecture, 1)
    for rank in range(2):
        assert_equal(torch.load(tmp_path / f"{rank}.pt", weights_only=True), expected)


def test_activations_are_made_again_part_by_part(tmp_path):
    """The forward pass saves a twentieth of what it would, and the backward pass begins with the last part."""
    saved, sizes, seen = [], {}, []
    for parts in (1, 3):
        module = training(tiny_architecture(tmp_path), parts)
        module.clip.image_tower.register_forward_pre_hook(lambda tower, inputs: seen.append(inputs[0][:, 0, 0, 0]))
        with saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda tensor: tensor):
            loss = module.loss(pairs())
        sizes[parts] = sum(saved)
        saved.clear()
    assert sizes[3] < sizes[1] / 20
    loss.backward()
    first = pairs()["image"][:, 0, 0, 0]
    expected = [first, *first.split(2), *reversed(first.split(2))]
    assert all(torch.equal(*both) for both in zip(seen, expected, strict=True))


def test_refused_parts(tmp_path):
    with pytest.raises(ValueError, match="parts 0 is not positive"):
        training(tiny_architecture(tmp_path), 0)
    with pytest.raises(ValueError, match="parts 7 of a batch of 6 pairs would be empty; set parts to 6 at most"):
        in_parts(lambda rows: [rows], 7, torch.zeros(6, 2))
