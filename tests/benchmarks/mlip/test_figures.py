"""MLIP's figures and its Table 10 on tiny models: measures against slow references, and notes on what was run."""

import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from benchmarks.mlip import fig2 as mlip_fig2
from benchmarks.mlip import fig5 as mlip_fig5
from benchmarks.mlip import fig6 as mlip_fig6
from benchmarks.mlip import fig7 as mlip_fig7
from benchmarks.mlip import models as mlip_models
from benchmarks.mlip import table10 as mlip_table10
from benchmarks.mlip.fig2 import RandomRemoval, layer_similarity, removal, token_similarity
from benchmarks.mlip.fig6 import rings, spectra, whole
from benchmarks.mlip.models import BASELINE, GUIDE, MAKE, MODEL, needing
from benchmarks.printed import paper_numbers
from benchmarks.registry import benchmark
from common import directory
from common.clip import CLIP
from common.data.lookup import Captioned, Labelled
from common.reduction import ReductionContext
from common.testing import TINY_CAPTIONS
from mlip.fourier import LegoFilter
from mlip.guide import Guide
from mlip.model import MLIP
from mlip.tower import MLIPTower

SIZES = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 4, "heads": 2, "embed_dim": 16}


def test_token_similarity_is_the_mean_over_pairs():
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    for image, mean in zip(x, token_similarity(x), strict=True):
        pairs = [F.cosine_similarity(image[i], image[j], dim=0) for i in range(5) for j in range(i)]
        torch.testing.assert_close(mean, torch.stack(pairs).mean())


@torch.no_grad()
def test_similarity_is_read_after_every_layer_of_both_stages():
    torch.manual_seed(0)
    guide = Guide(image_size=16, patch_size=8, width=32, depth=1, heads=2)
    tower = MLIPTower(**SIZES, frequency_layers=1, keep_rates={3: 0.5}, guide=guide).eval()
    images = torch.randn(2, 3, 32, 32)
    similarities = layer_similarity(tower, images)
    x = tower.run_frequency(tower.embed(images))
    expected = [
        x[:, 1:],
        tower.vit.transformer.resblocks[0](x)[:, 1:],
        tower.run_blocks(x, tower.look(images))[0][:, 1:],
    ]
    for layer, tokens in zip((0, 1, 3), expected, strict=True):
        assert similarities[layer] == pytest.approx(token_similarity(tokens).mean().item(), abs=1e-5)
    assert len(similarities) == 4 and len(layer_similarity(tower, images)) == 4  # the hooks are gone


def test_random_removal_keeps_a_share_of_its_own_in_every_picture():
    x, places = torch.randn(6, 17, 4), torch.arange(16).expand(6, -1)
    y, context = RandomRemoval(0.5)(x, ReductionContext(places))
    assert y.shape == (6, 9, 4) and torch.equal(y[:, 0], x[:, 0])
    torch.testing.assert_close(y[:, 1:], x[:, 1:].gather(1, context.positions[..., None].expand(-1, -1, 4)))
    drawn = {tuple(sorted(kept)) for kept in context.positions.tolist()}
    assert len(drawn) == 6 and all(len(set(kept)) == 8 for kept in drawn)


def test_removing_nothing_changes_nothing(monkeypatch):
    clip = MLIP(CLIP.tiny().architecture).eval()
    batch = {"image": torch.randn(6, 3, 32, 32), "label": torch.arange(6)}
    monkeypatch.setattr(mlip_fig2, "KEEP", (1.0, 0.25))
    found = removal(clip, [batch], list(TINY_CAPTIONS))
    assert [(row["keep"], row["layer"]) for row in found["removed"]] == [(1.0, 1), (1.0, 2), (0.25, 1), (0.25, 2)]
    for row in found["removed"][:2]:
        assert row["accuracy"] == found["all"]["accuracy"] and row["against_all"] == (0, 0, 0)


def test_figure_2_renders():
    row = {"accuracy": 0.4, "interval": (0.3, 0.5), "pictures": 100}
    removed = [
        {"keep": keep, "layer": layer, **row, "against_all": (-0.1, -0.2, 0.0)}
        for keep in mlip_fig2.KEEP
        for layer in (1, 2)
    ]
    result = {
        "name": "mlip-fig2",
        "missing": [],
        "similarity": {"clip": [0.1, 0.2], "mlip": [0.3, 0.25]},
        "all": row,
        "removed": removed,
    }
    rendered = mlip_fig2.render(json.loads(json.dumps(result)))
    assert "| MLIP | 0.300 | 0.250 |" in rendered["md"] and "| 40.0 (-10.0 [-20.0, +0.0]) |" in rendered["md"]
    assert set(rendered["figures"]) == {"mlip-fig2"}


def test_figure_5_lists_the_best_pictures_of_each_caption():
    eye = torch.eye(12)
    found = mlip_fig5.answers(eye, eye + 0.1 * eye.roll(1, 1))
    assert found["recall"]["R@1"] == 1 and found["places"] == [1, 1, 1]
    assert [top[:2] for top in found["top"]] == [[0, 1], [1, 2], [2, 3]] and len(found["top"][0]) == 10
    captions = ["a sun", "a cat", "a dog"]
    result = {
        "name": "mlip-fig5",
        "missing": [],
        "pictures": 12,
        "captions": captions,
        "found": {"clip": found, "mlip": found},
    }
    rendered = mlip_fig5.render(json.loads(json.dumps(result)))
    assert "| MLIP | 100.0 | 100.0 | 100.0 | 1 | 1 | 1 |" in rendered["md"] and "(2) a cat" in rendered["md"]
    assert set(rendered["figures"]) == {"mlip-fig5"}


@pytest.mark.parametrize("grid", [2, 3, 6, 7])
def test_the_whole_spectrum_is_that_of_the_full_transform(grid):
    x = torch.randn(4, grid, grid, dtype=torch.float64)
    torch.testing.assert_close(whole(torch.fft.rfft2(x).abs()), torch.fft.fft2(x).abs())


def test_rings_and_what_an_untrained_filter_has():
    torch.manual_seed(0)
    found = spectra(LegoFilter(6, 256))
    assert list(found["rings"]) == ["0", "1", "2", "3", "4"] and len(found["channels"]) == 6
    assert found["start"]["rings"] == pytest.approx(found["rings"], rel=0.1)  # another draw of the same
    deviation = 0.02 * math.sqrt(2 * 2)  # of either part: 2² Σ cos² = 2K, by equation 10's factor
    assert found["rings"]["0"] == pytest.approx(deviation * math.sqrt(2 / math.pi), rel=0.1)  # real: half a normal
    assert found["rings"]["4"] < deviation * math.sqrt(math.pi / 2)  # some frequencies are tied to others
    assert np.shape(found["shown"]["piece 1"]) == np.shape(found["shown"]["filter"]) == (6, 6, 6)
    one = torch.zeros(4, 4, 1)
    one[0, 0], one[0, 2] = 3.0, 8.0  # at distances 0 and 2; eight cells are at 1 (and √2), three round to 2 (and √5)
    assert rings(one)["0"] == 3.0 and rings(one)["1"] == 0.0 and rings(one)["2"] > 0
    result = {"name": "mlip-fig6", "missing": [], "layers": [found]}
    rendered = mlip_fig6.render(json.loads(json.dumps(result)))
    assert "| 1 | 2 | at the start |" in rendered["md"] and set(rendered["figures"]) == {"mlip-fig6"}


def test_figure_7_maps_part_clusters_and_are_deterministic():
    labels = torch.arange(3).repeat_interleave(20)
    embeddings = F.normalize(torch.eye(3, 8)[labels] + 0.1 * torch.randn(60, 8), dim=-1)
    places = torch.tensor(mlip_fig7.tsne(embeddings))
    nearest = torch.cdist(places, places).fill_diagonal_(torch.inf).argmin(1)
    assert places.shape == (60, 2) and torch.equal(labels[nearest], labels)
    assert mlip_fig7.tsne(embeddings).tolist() == places.tolist()
    assert mlip_models.spread(range(7), 3) == [0, 2, 4] and mlip_models.spread(range(3), 7) == [0, 1, 2]


def test_figure_7_counts_neighbours_of_one_name():
    embeddings = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.3, 1.0]]), dim=-1)
    assert mlip_fig7.nearest_agrees(embeddings, torch.tensor([0, 0, 1, 0])).tolist() == [True, True, False, False]
    each = {"accuracy": 0.5, "interval": [0.2, 0.8]}
    result = {
        "name": "mlip-fig7",
        "missing": [],
        "names": ["sun", "cat"],
        "labels": [0, 0, 1, 1],
        "nearest": {"clip": each, "mlip": each},
        "difference": [0.01, -0.02, 0.04],
        "maps": {name: embeddings.tolist() for name in ("clip", "mlip")},
    }
    rendered = mlip_fig7.render(result)
    assert "| MLIP | 50.0 [20.0, 80.0] |" in rendered["md"] and "+1.0 points [-2.0, +4.0]" in rendered["md"]
    assert set(rendered["figures"]) == {"mlip-fig7"}


@pytest.mark.parametrize("name", ["mlip-fig2", "mlip-fig5", "mlip-fig6", "mlip-fig7", "mlip-table10"])
def test_without_weights_the_commands_that_make_them_are_named(name, monkeypatch, tmp_path):
    nowhere = {tmp_path / path.name: command for path, command in MAKE.items()}
    monkeypatch.setattr(mlip_models, "MAKE", nowhere)
    monkeypatch.setattr(mlip_models, "GUIDE", tmp_path / GUIDE.name)
    monkeypatch.setattr(mlip_models, "MODEL", tmp_path / MODEL.name)
    module = benchmark(name).load()
    for constant in ("GUIDE", "BASELINE", "MODEL"):
        if hasattr(module, constant):
            monkeypatch.setattr(module, constant, tmp_path / getattr(module, constant).name)
    result = module.run(smoke=True)
    text = module.render(json.loads(json.dumps(result)))["md"]
    assert text.startswith("Not run: `python -m benchmarks mlip-shapes-runs --only guide`") and text.endswith(
        f"`python -m benchmarks {name}`.\n"
    )
    assert ("--only mlip-0" in text) == (name != "mlip-table10")


def test_the_guide_is_asked_for_only_where_mlip_must_be_trained(monkeypatch, tmp_path):
    guide, clip, mlip = (tmp_path / path.name for path in (GUIDE, BASELINE, MODEL))
    monkeypatch.setattr(mlip_models, "MAKE", {guide: "guide", clip: "clip", mlip: "mlip"})
    monkeypatch.setattr(mlip_models, "GUIDE", guide)
    monkeypatch.setattr(mlip_models, "MODEL", mlip)

    def missing():
        return needing("mlip-figx", (clip, mlip), dict)["missing"]

    assert missing() == ["guide", "clip", "mlip"]
    mlip.write_bytes(b"x")
    assert missing() == ["clip"]
    clip.write_bytes(b"x")
    assert missing() == []


@pytest.fixture
def named(tmp_path, monkeypatch):
    """Model directories of a plain CLIP and of an MLIP that the environment names, and two sets of noise."""
    torch.manual_seed(0)
    plain, parts = CLIP.tiny(), MLIP(CLIP.tiny().architecture, frequency_layers=1, keep_rates={2: 0.5})
    for name, model in (("my-clip", plain), ("my-mlip", parts)):
        directory.write(tmp_path / name, model, None)
        monkeypatch.setenv(name[3:].upper(), str(tmp_path / name))
    monkeypatch.setenv("DATA", "cifar10")
    monkeypatch.setenv("EFFCLIP_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("OUT", raising=False)
    images, labels = torch.randn(60, 3, 32, 32), torch.arange(60) % 6

    def loader(preprocess, batch_size, workers):
        return (
            {"image": i, "label": n} for i, n in zip(images.split(batch_size), labels.split(batch_size), strict=True)
        )

    def source(name, task, split, place):
        if task == "retrieval":
            return Captioned("test", [[TINY_CAPTIONS[label], "another"] for label in labels], loader)
        return Labelled("test", [caption[2:] for caption in TINY_CAPTIONS], ("a {}",), "accuracy", loader)

    monkeypatch.setattr(mlip_models, "source", source)
    return tmp_path


@pytest.mark.parametrize("name", ["mlip-fig2", "mlip-fig5", "mlip-fig6", "mlip-fig7"])
def test_a_figure_shows_the_models_and_the_data_that_the_environment_names(name, named):
    maker = benchmark(name).load()
    result = json.loads(json.dumps(maker.run()))
    data = () if name == "mlip-fig6" else ("cifar10",)
    assert result["name"] == "-".join([name, *(["my-clip"] if data else []), "my-mlip", *data])
    assert result["conditions"]["scale"] == "paper" and "my-mlip" in result["conditions"]["weights"]
    rendered = maker.render(result)
    assert set(rendered["figures"]) == {result["name"]} and "my-mlip" in rendered["md"]
    assert "Embedded scale" not in rendered["md"] and maker.folder() == named / "runs" / "figures"


def test_models_that_do_not_fit_a_figure_are_refused(named, monkeypatch):
    fig2, fig6 = (benchmark(f"mlip-fig{number}").load() for number in (2, 6))
    clip, mlip = str(named / "my-clip"), str(named / "my-mlip")
    monkeypatch.setenv("MLIP", clip)
    with pytest.raises(ValueError, match="names a model without Fourier blocks"):
        fig6.run()
    monkeypatch.setenv("CLIP", mlip)
    with pytest.raises(ValueError, match="my-mlip is an MLIP with parts of its own"):
        fig2.run()
    monkeypatch.delenv("DATA")
    monkeypatch.delenv("MLIP")
    with pytest.raises(ValueError, match="set MLIP and DATA too"):
        fig2.run()


def test_what_is_needed_and_there_is_measured(tmp_path, monkeypatch):
    file = tmp_path / "weights"
    file.write_bytes(b"x")
    monkeypatch.setattr(mlip_models, "MAKE", {file: "make it"})
    result = needing("mlip-figx", (file,), lambda: {"found": 1}, dtype="float32")
    assert result["found"] == 1 and result["missing"] == [] and list(result["conditions"]["weights"]) == ["weights"]


def test_table_10_puts_time_and_accuracy_beside_the_papers():
    rows = [
        {"run": "clip", "seconds": 0.5, "of_reference": 1.0, "steps": 240, "seeds": 2, "accuracy": [0.35, 0.3, 0.4]},
        {"run": "mlip", "seconds": 0.25, "of_reference": 0.5, "steps": 240, "seeds": 0, "accuracy": None},
    ]
    stated = {"dtype": "bfloat16 autocast", "rounds": 7, "device": "CPU", "threads": 2, "torch": "2"}
    result = {"missing": [], "conditions": stated, "batch": 128, "rows": rows, "planned": 2}
    text = mlip_table10.render(result | {"paper": paper_numbers("mlip")["table10"]})["md"]
    assert "| MLIP | 18.4 | not run | 370 | not run | 1.59 | not run |" in text and "-c mlip/slip_cc3m.yaml`" in text
    assert "| clip | 0.500 | 1.00 | 2.00 | 2 | 35.0 [30.0, 40.0] | 17.5 |" in text
    assert "| mlip | 0.250 | 0.50 | 1.00 | 0 | not run | not run |" in text
    assert "Not all of 2 seeds were run: `python -m benchmarks mlip-shapes-runs`." in text
    for row in paper_numbers("mlip")["table10"]:  # accuracy over the hours of 32 GPUs together
        assert row["accuracy"] / (row["gpu_hours"] / 32) == pytest.approx(row["ratio"], abs=0.012)
