"""Two processes that hold half of the parameters each train as one that holds them all."""

import pytest
import torch
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from common.clip import CLIP
from common.contrastive import info_nce
from common.sharding import shard
from common.testing import TINY_CAPTIONS
from tests.common.ranks import on_two_ranks


def train(clip, rows):
    """Two steps on the ``rows`` of six pairs; returns the losses."""
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))[rows]
    ids = clip.tokenizer(TINY_CAPTIONS)[rows]
    optimizer, losses = torch.optim.SGD(clip.parameters(), lr=0.1), []
    for _ in range(2):
        optimizer.zero_grad()
        loss = info_nce(*clip(images, ids))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def model():
    torch.manual_seed(0)
    return CLIP.tiny()


def one_rank(rank, folder):
    """Trains on three of the six pairs; rank 0 writes what both hold together."""
    clip = shard(model(), mesh=init_device_mesh("cpu", (2,)))
    assert all(isinstance(parameter, DTensor) for parameter in clip.parameters())
    losses = train(clip, slice(3 * rank, 3 * rank + 3))
    distributed.all_reduce(losses)
    with torch.no_grad():
        embedding = clip.encode_image(torch.ones(1, 3, 32, 32))
    state = get_model_state_dict(clip, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        torch.save({"losses": losses / 2, "state": state, "embedding": embedding}, f"{folder}/result.pt")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    on_two_ranks(one_rank, folder)
    return torch.load(folder / "result.pt", weights_only=True)


def test_two_steps_are_those_of_one_process(result):
    clip = model()
    torch.testing.assert_close(result["losses"], train(clip, slice(None)), atol=1e-5, rtol=0)
    for key, value in clip.state_dict().items():
        torch.testing.assert_close(result["state"][key].reshape(value.shape), value, atol=1e-5, rtol=0, msg=key)
    with torch.no_grad():
        expected = clip.encode_image(torch.ones(1, 3, 32, 32))
    torch.testing.assert_close(result["embedding"], expected, atol=1e-5, rtol=0)


def test_gathered_weights_load_and_save_as_ever(result, tmp_path):
    clip = CLIP.tiny()
    clip.load_weights(result["state"])
    assert result["state"]["logit_scale"].shape == (1,) and clip.logit_scale.shape == ()
    clip.save(tmp_path / "clip.safetensors")
    assert torch.equal(CLIP.load(tmp_path / "clip.safetensors").logit_scale, result["state"]["logit_scale"][0])
    assert clip.open_clip_state_dict()["logit_scale"].shape == ()
