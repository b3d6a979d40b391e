"""Two processes equal one with the joined batch, for every loss, through PyTorch's own DDP."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from common.clip import CLIP
from common.contrastive import info_nce
from mlip.declip import DeCLIPPretraining
from mlip.filip import FILIPPretraining
from mlip.pretraining import MLIPPretraining
from mlip.slip import SLIPPretraining
from tests.common.ranks import on_two_ranks

SLIP = {"training": SLIPPretraining, "hidden_width": 12, "projection_width": 6}
ALIKE = {
    "slip": SLIP,
    "slip in two parts": {**SLIP, "parts": 2},
    "declip's clip term": {
        "training": DeCLIPPretraining,
        "neighbour_weight": 0.0,
        "simsiam_weight": 0.0,
        "masking_weight": 0.0,
    },
    "mlip": {"label_smoothing": 0.1},
    "masked words": {"masking_weight": 0.5},
    "declip's masked words": {"training": DeCLIPPretraining, "neighbour_weight": 0.0, "simsiam_weight": 0.0},
    "filip": {"frequency_matching": "filip", "spatial_matching": "filip"},
    "filip with keys": {"training": FILIPPretraining, "token_dim": 12, "keys": 2},
    "neighbours": {"neighbour_weight": 0.5, "neighbour_queue": 9, "neighbour_form": "symmetric"},
    "in two parts": {
        "neighbour_weight": 0.5,
        "neighbour_queue": 9,
        "neighbour_form": "symmetric",
        "spatial_matching": "filip",
        "parts": 2,
    },
    "spatial alone": {"frequency_weight": 0.0, "frequency_token_weight": 0.0},
}
"""Losses that see all ranks, so that two processes equal one with the joined batch."""
APART = {
    "neighbours of each rank": {"neighbour_weight": 0.5, "neighbour_queue": 9},
    "declip": {"training": DeCLIPPretraining, "neighbour_queue": 9, "masking_weight": 0.0},
}
"""Those with something of each rank alone: its queue, or SimSiam's batch normalisation."""
ROWS = {**ALIKE, **APART}
NORMED = 5e-4
"""Rounding that batch normalisation of a few rows magnifies; gradients there are up to 9."""
STEPS = 2  # the second batch finds the first one in the queue
CAPTIONS = ["cat", "a dog", "bird", "a red cat on the dog", "the green bird of the blue dog", "cat"]


class Loss(nn.Module):
    """The loss as a forward pass, which is what DDP watches."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, batch):
        return self.module.loss(batch)


def built(architecture, options):
    """The training of a row, with the same start everywhere."""
    torch.manual_seed(0)
    options = dict(options)
    training = options.pop("training", MLIPPretraining)
    tower = {"frequency_layers": 1, "keep_rates": {2: 0.5}} if training is MLIPPretraining else {}
    return training(architecture=architecture, **tower, **options)


def batches(module, rows):
    """Some batches of six pairs with two further views, of which a process has the rows."""
    generator = torch.Generator().manual_seed(1)
    views = 2 if isinstance(module, SLIPPretraining) else 1
    for step in range(STEPS):
        captions = CAPTIONS[step:] + CAPTIONS[:step]
        pictures = [torch.randn(6, 3, 32, 32, generator=generator)[rows] for _ in range(1 + views)]
        yield {
            "image": pictures[0],
            "image_views": pictures[1:],
            "text": module.clip.tokenizer(captions[rows], longest=True),  # as wide as this process's own captions
            "text_view": module.clip.tokenizer([f"on {caption}" for caption in captions[rows]], longest=True),
            "caption_id": torch.tensor([len(caption) for caption in captions])[rows],
        }


def gradients(architecture, options, rows, wrap):
    """The gradient of each parameter after each of some batches, of which this process has the rows."""
    module = built(architecture, options)
    loss = wrap(Loss(module))
    result = []
    for batch in batches(module, rows):
        module.zero_grad()
        loss(batch).backward()
        result.append({name: p.grad.clone() for name, p in module.named_parameters() if p.requires_grad})
    return result


def one_rank(rank, folder):
    """Three of the six pairs of every batch; writes the gradients that DDP made."""
    rows = slice(3 * rank, 3 * rank + 3)
    result = {name: gradients(f"{folder}/tiny.json", ROWS[name], rows, DistributedDataParallel) for name in ROWS}
    torch.save(result, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both processes found, and the architecture's file."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "tiny.json").write_text(json.dumps(CLIP.tiny().architecture))
    on_two_ranks(one_rank, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)], str(folder / "tiny.json")


@pytest.mark.parametrize("name", ALIKE)
def test_two_processes_equal_one_with_the_joined_batch(ranks, name):
    result, architecture = ranks
    expected = gradients(architecture, {**ROWS[name], "parts": 1}, slice(None), lambda loss: loss)
    atol = NORMED if "slip" in name else 1e-5
    for rank in range(2):
        for step in range(STEPS):
            assert result[rank][name][step].keys() == expected[step].keys()
            for key, gradient in expected[step].items():
                torch.testing.assert_close(result[rank][name][step][key], gradient, atol=atol, rtol=0, msg=key)


@pytest.mark.parametrize("name", APART)
def test_each_rank_has_its_own_queue_and_all_ranks_neighbours(ranks, name):
    """One process plays both ranks: their terms apart, where a rank's images choose among the neighbours of both."""
    result, architecture = ranks
    modules = [built(architecture, ROWS[name]) for _ in range(2)]
    modules[1].load_state_dict(modules[0].state_dict())
    module = modules[0]
    for step, batch in enumerate(batches(module, slice(None))):
        module.zero_grad()
        joined_loss(module, modules, batch).backward()
        for rank in range(2):
            for key, gradient in result[rank][name][step].items():
                expected = dict(module.named_parameters())[key].grad
                atol = NORMED if name == "declip" else 1e-5
                torch.testing.assert_close(gradient, expected, atol=atol, rtol=0, msg=key)


def joined_loss(module, queues, whole):
    """The mean loss of two ranks, computed in one process. queues: modules of which each has one rank's queue."""
    declip, scale = isinstance(module, DeCLIPPretraining), module.clip.logit_scale.exp()
    views = [whole["image"], *(whole["image_views"] if declip else [])]
    captions = [whole["text"], *([whole["text_view"]] if declip else [])]
    raw = [module.clip.encode_image(view, normalize=False) for view in views]
    texts = [module.clip.encode_text(ids) for ids in captions]
    losses = []
    for text in texts:
        chosen = [
            queue.neighbours.queue[queue.neighbours.nearest(part)].detach()
            for queue, part in zip(queues, text.split(3), strict=True)
        ]
        logits = [scale * F.normalize(view, dim=-1) @ torch.cat(chosen).T for view in raw]
        losses += [F.cross_entropy(rows, torch.arange(6)) for rows in logits]
    for text in reversed(texts):
        for queue, part in zip(queues, text.split(3), strict=True):
            queue.neighbours.push(part)
    neighbour = sum(losses) / len(losses)
    if not declip:
        weights, module.weights["neighbour"] = dict(module.weights), 0.0
        kept, module.neighbours = module.neighbours, None
        rest = module.loss(whole)
        module.weights, module.neighbours = weights, kept
        return rest + module.weights["neighbour"] * neighbour
    unit = [F.normalize(view, dim=-1) for view in raw]
    clip = sum(info_nce(image, text, scale, same=whole["caption_id"]) for image in unit for text in texts) / 4
    simsiam = [module.simsiam(raw[0][rows], raw[1][rows]) for rows in (slice(3), slice(3, 6))]
    return 0.4 * clip + 0.2 * neighbour + 0.2 * sum(simsiam) / 2
