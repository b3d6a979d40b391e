"""Every model under the tools that PyTorch offers for models: the results are those of the model itself."""

import copy
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from torch._inductor import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.ao.quantization import quantize_dynamic
from torch.utils._pytree import tree_leaves, tree_map

from common import inference
from common.clip import CLIP
from common.inference import optimize_for_inference
from common.reduction import ReducedTower
from mlip.guide import Guide
from mlip.tower import MLIPTower
from patchrank.predictor import RankPredictor
from patchrank.prompts import Prompts
from patchrank.reducers import ClassAttention, EViT, ToMe
from patchrank.tower import PatchRankTower
from tests.common.towers import pictures
from waveclip import WaveTower
from waveclip.reduced import ReducedWaveTower

SIZES = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "heads": 2, "embed_dim": 32}
IDS = torch.tensor([[7, 1, 9, *[0] * 13], [7, 2, 3, 9, *[0] * 12], [9, *[0] * 15]])


ELSEWHERE = """
import sys, torch
sys.modules["common"] = None
program = torch.export.load(sys.argv[1] + "/model.pt2")
answers = torch.utils._pytree.tree_leaves(program.module()(torch.load(sys.argv[1] + "/given.pt")))
torch.save(answers, sys.argv[1] + "/answers.pt")
"""


class Refine(nn.Module):
    """Both levels of a WaveTower, the second over the cache of the first."""

    def __init__(self, wave):
        super().__init__()
        self.wave = wave

    def forward(self, images):
        z, state = self.wave.begin(images)
        return z, self.wave.refine(state)[0]


def rank_tower(tower):
    prompts = Prompts("visual", 2, 2, 64, 64)
    return PatchRankTower(tower, RankPredictor.for_tower(tower), 0.5, 1, prompts)


def mlip_tower():
    guide = Guide(image_size=32, patch_size=16, width=16, depth=1, heads=2)
    return MLIPTower(**SIZES, frequency_layers=1, keep_rates={2: 0.5}, guide=guide, proportional_attention=True)


MODELS = {
    "image": lambda tower: tower,
    "optimized": optimize_for_inference,
    "wave": WaveTower.from_image_tower,
    "refine": lambda tower: Refine(WaveTower.from_image_tower(tower)),
    "reduced-levels": lambda tower: ReducedWaveTower(WaveTower.from_image_tower(tower), {1: {1: ClassAttention(0.5)}}),
    "evit": lambda tower: ReducedTower(tower, {(1, "middle"): EViT(0.5)}),
    "tome": lambda tower: ReducedTower(tower, {(0, "middle"): ToMe(4)}),
    "patchrank": rank_tower,
    "mlip": lambda tower: mlip_tower(),
}


@pytest.fixture(params=[*MODELS, "text"])
def model_and_input(request, monkeypatch):
    """A model in evaluation mode, and three pictures or texts for it."""
    monkeypatch.setattr(inference, "packed_is_faster", lambda dtype: True)
    torch.manual_seed(0)
    clip = CLIP.tiny()
    if request.param == "text":
        return clip.text_tower.eval(), IDS
    return MODELS[request.param](clip.image_tower).eval(), pictures(3)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_compile_makes_one_graph(model_and_input, bf16):
    model, given = model_and_input
    torch.compiler.reset()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        assert_same(torch.compile(model, fullgraph=True, backend="aot_eager")(given), model(given))


@torch.no_grad()
def test_export_is_strict(model_and_input):
    model, given = model_and_input
    assert_same(torch.export.export(model, (given,), strict=True).module()(given), model(given))


@torch.no_grad()
def test_jit_trace(model_and_input):
    model, given = model_and_input
    assert_same(torch.jit.trace(model, (given,), strict=False)(given), model(given))


@torch.no_grad()
def test_vmap_over_the_batch(model_and_input):
    model, given = model_and_input
    mapped = torch.func.vmap(model)(given[:, None])
    assert_same(tree_map(lambda z: z if z is None else z.squeeze(1), mapped), model(given))


@torch.no_grad()
def test_a_deep_copy(model_and_input):
    model, given = model_and_input
    expected = model(given)
    other = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    assert_same(other(given), expected)


@torch.no_grad()
def test_dynamic_quantization_takes_every_linear_map(model_and_input):
    """Eight bits keep the direction of every embedding and token."""
    model, given = model_and_input
    quantized = quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not any(isinstance(part, nn.Linear) for part in quantized.modules())
    maps = sum(type(part) is nn.Linear for part in model.modules())
    assert maps == sum(type(part) is torch.ao.nn.quantized.dynamic.Linear for part in quantized.modules()) > 0
    for actual, expected in zip(*map(tree_leaves, (quantized(given), model(given))), strict=True):
        if expected is not None:
            assert torch.cosine_similarity(actual, expected, dim=-1).mean() > 0.9


@torch.no_grad()
def test_fake_tensors_leave_no_trace(model_and_input):
    """Shapes without values, as planners of memory ask for; the model then answers as before."""
    model, given = model_and_input
    expected = model(given)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        faked = model(mode.from_tensor(given))
    for fake, real in zip(*map(tree_leaves, (faked, expected)), strict=True):
        assert real is None or fake.shape == real.shape
    assert_same(model(given), expected)


def test_training_works_after_inference_mode(model_and_input):
    """Nothing that was made in inference mode is kept, which autograd would refuse."""
    model, given = model_and_input
    with torch.inference_mode():
        model(given)
    outputs = [z for z in tree_leaves(model(given)) if z is not None]
    sum(z.float().square().sum() for z in outputs).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)


@torch.no_grad()
@pytest.mark.parametrize("name", ["image", "refine"])
def test_an_exported_program_runs_where_this_suite_is_not(name, tmp_path):
    torch.manual_seed(0)
    model, given = MODELS[name](CLIP.tiny().image_tower).eval(), pictures(3)
    program = torch.export.export(model, (given,), strict=True, dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, tmp_path / "model.pt2")
    torch.save(given[:2], tmp_path / "given.pt")
    run = subprocess.run([sys.executable, "-I", "-c", ELSEWHERE, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert_same(tuple(torch.load(tmp_path / "answers.pt")), tuple(tree_leaves(model(given[:2]))))


@torch.no_grad()
@pytest.mark.parametrize("name", ["image", "refine"])
def test_inductor_freezes_the_weights(name, monkeypatch):
    froze = Mock(wraps=compile_fx.fw_compiler_freezing)
    monkeypatch.setattr(compile_fx, "fw_compiler_freezing", froze)
    torch.manual_seed(0)
    torch.compiler.reset()
    model, given = MODELS[name](CLIP.tiny().image_tower).eval(), pictures(3)
    expected = model(given)
    with torch._inductor.config.patch(freezing=True):
        assert_same(torch.compile(model, fullgraph=True)(given), expected)
    assert froze.called


@torch.no_grad()
@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchao_quantizes_every_linear_map(model_and_input, config):
    model, given = model_and_input
    torchao = pytest.importorskip("torchao.quantization")
    expected = model(given)
    torchao.quantize_(model, getattr(torchao, config)())
    maps = [part for part in model.modules() if type(part) is nn.Linear]
    assert maps and not any(type(part.weight) is nn.Parameter for part in maps)
    for actual, wanted in zip(*map(tree_leaves, (model(given), expected)), strict=True):
        if wanted is not None:
            assert torch.cosine_similarity(actual, wanted, dim=-1).mean() > 0.9


def test_jit_script_is_refused_with_the_mend(model_and_input):
    with pytest.raises(NotImplementedError, match=r"use torch\.export\.export, or torch\.jit\.trace on example inputs"):
        torch.jit.script(model_and_input[0])
