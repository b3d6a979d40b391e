"""Two processes equal one with the joined batch, for every loss, through PyTorch's own DDP."""

import json
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from common.clip import CLIP
from mlip.pretraining import MLIPPretraining

ROWS = {
    "mlip": {"label_smoothing": 0.1},
    "filip": {"frequency_matching": "filip", "spatial_matching": "filip"},
    "neighbours": {"neighbour_weight": 0.5, "neighbour_queue": 9},
    "in two parts": {"neighbour_weight": 0.5, "neighbour_queue": 9, "spatial_matching": "filip", "parts": 2},
    "spatial alone": {"frequency_weight": 0.0, "frequency_token_weight": 0.0},
}
STEPS = 2  # the second batch finds the first one in the queue
CAPTIONS = ["cat", "a dog", "bird", "a red cat on the dog", "the green bird of the blue dog", "cat"]


class Loss(nn.Module):
    """The loss as a forward pass, which is what DDP watches."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, batch):
        return self.module.loss(batch)


def gradients(architecture, options, rows, wrap):
    """The gradient of each parameter after each of some batches, of which this process has the rows."""
    torch.manual_seed(0)
    module = MLIPPretraining(architecture, frequency_layers=1, keep_rates={2: 0.5}, **options)
    loss = wrap(Loss(module))
    generator = torch.Generator().manual_seed(1)
    result = []
    for step in range(STEPS):
        captions = CAPTIONS[step:] + CAPTIONS[:step]
        batch = {
            "image": torch.randn(6, 3, 32, 32, generator=generator)[rows],
            "text": module.clip.tokenizer(captions[rows], longest=True),  # as wide as this process's own captions
            "caption_id": torch.tensor([len(caption) for caption in captions])[rows],
        }
        module.zero_grad()
        loss(batch).backward()
        result.append({name: p.grad.clone() for name, p in module.named_parameters() if p.requires_grad})
    return result


def one_rank(rank, folder):
    """Three of the six pairs of every batch; writes the gradients that DDP made."""
    store = {"init_method": f"file://{folder}/store", "timeout": timedelta(minutes=5)}
    distributed.init_process_group("gloo", rank=rank, world_size=2, **store)
    rows = slice(3 * rank, 3 * rank + 3)
    result = {name: gradients(f"{folder}/tiny.json", ROWS[name], rows, DistributedDataParallel) for name in ROWS}
    torch.save(result, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both processes found, and the architecture's file."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "tiny.json").write_text(json.dumps(CLIP.tiny().architecture))
    with subprocess.Popen([sys.executable, __file__, "1", str(folder)]) as other:
        one_rank(0, folder)
    assert other.returncode == 0
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)], str(folder / "tiny.json")


@pytest.mark.parametrize("name", ROWS)
def test_two_processes_equal_one_with_the_joined_batch(ranks, name):
    result, architecture = ranks
    expected = gradients(architecture, {**ROWS[name], "parts": 1}, slice(None), lambda loss: loss)
    for rank in range(2):
        for step in range(STEPS):
            assert result[rank][name][step].keys() == expected[step].keys()
            for key, gradient in expected[step].items():
                torch.testing.assert_close(result[rank][name][step][key], gradient, atol=1e-5, rtol=0, msg=key)


if __name__ == "__main__":  # the process that the test starts beside its own
    one_rank(int(sys.argv[1]), sys.argv[2])
