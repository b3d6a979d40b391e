"""The Fourier block against direct sums and circular convolutions, and what the power spectrum forgets."""

import math

import numpy as np
import pytest
import torch

from common.clip import load_architecture
from mlip.fourier import FourierBlock, LegoFilter, cosine_weights
from mlip.tower import PAPER_LAYERS, MLIPTower

GRIDS = [2, 3, 4, 7]


def lego(grid, spectrum, width=3, pieces=2):
    torch.manual_seed(0)
    return LegoFilter(grid, width, pieces, spectrum).double()


def grid_tokens(grid, width=3, batch=2):
    return torch.randn(batch, grid * grid, width, dtype=torch.float64)


def shifted(x, rows, columns):
    grid = math.isqrt(x.shape[1])
    return x.unflatten(1, (grid, grid)).roll((rows, columns), (1, 2)).flatten(1, 2)


@pytest.mark.parametrize("pieces", [2, 4, 6])
def test_cosine_weights_are_equation_10s_and_cancel(pieces):
    expected = [math.cos((2 * j - 1) * math.pi / (2 * pieces)) for j in range(1, pieces + 1)]
    assert cosine_weights(pieces).tolist() == pytest.approx(expected, abs=1e-6)
    assert sum(expected) == pytest.approx(0)


@pytest.mark.parametrize("pieces", [0, 1, 3])
def test_numbers_of_pieces_with_a_dead_one_are_refused(pieces):
    with pytest.raises(ValueError, match=r"cos\(π/2\)"):
        LegoFilter(4, 3, pieces)


def test_unknown_spectrum_is_named():
    with pytest.raises(ValueError, match="'cubic'"):
        LegoFilter(4, 3, spectrum="cubic")


def printed(y, pieces):
    """Equations 5, 10 and 7 by direct sums, y [G,G], pieces complex [K,G,V]; the other half by conjugation."""
    side, count = len(y), len(pieces)
    places = np.arange(side)

    def phase(u, v, sign):
        return np.exp(sign * 2j * math.pi * (u * places[:, None] / side + v * places[None] / side))

    half = np.zeros(pieces.shape[1:], dtype=complex)
    for u in range(side):
        for v in range(half.shape[1]):
            spectrum = (y * phase(u, v, -1)).sum()
            for j in range(1, count + 1):
                weight = math.cos((2 * j - 1) * math.pi / (2 * count))
                half[u, v] += 2 / side**2 * abs(spectrum) ** 2 * pieces[j - 1, u, v] * weight
    result = np.zeros((side, side))
    for u in range(side):
        for v in range(half.shape[1]):
            own_mirror = v in (0, side / 2)  # else the conjugate at (-u, -v) adds the same real part
            result += (1 if own_mirror else 2) * (half[u, v] * phase(u, v, 1)).real / side**2
    return result


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("pieces", [2, 4])
def test_power_spectrum_is_the_printed_equation_10(grid, pieces):
    layer, x = lego(grid, "power", pieces=pieces), grid_tokens(grid)
    result = layer(x).detach().unflatten(1, (grid, grid))
    complex_pieces = torch.view_as_complex(layer.pieces.detach()).numpy()
    for image in range(len(x)):
        for channel in range(x.shape[2]):
            y = x[image, :, channel].unflatten(0, (grid, grid)).numpy()
            expected = printed(y, complex_pieces[..., channel])
            np.testing.assert_allclose(result[image, ..., channel], expected, atol=1e-8, rtol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", PAPER_LAYERS)
def test_a_new_frequency_stage_keeps_scale_and_rank_of_the_papers_towers(name):
    """On nearly flat pictures, whose power lies at frequency 0. An orthonormal inverse leaves one direction of 400."""
    torch.manual_seed(0)
    architecture, blocks = load_architecture(name), PAPER_LAYERS[name]["frequency_layers"]
    sizes = {**architecture, "vision_cfg": {**architecture["vision_cfg"], "layers": blocks + 1}}
    tower = MLIPTower.from_architecture(sizes, frequency_layers=blocks, keep_rates={}, guide=None)
    before = tower.embed(1 + 0.1 * torch.randn(1, 3, 224, 224))
    after = tower.run_frequency(before)
    share_before, share_after = (
        singular[0] / singular.sum() for singular in (torch.linalg.svdvals(x[0, 1:]) for x in (before, after))
    )
    assert after.abs().max() < 2 * before.abs().max()
    assert share_after < share_before + 0.1


@pytest.mark.parametrize("grid", GRIDS)
def test_linear_spectrum_is_a_circular_convolution(grid):
    layer, x = lego(grid, "linear"), grid_tokens(grid)
    kernel = torch.from_numpy(np.fft.irfft2(layer.gain().detach().numpy(), s=(grid, grid), axes=(0, 1)))
    expected = sum(kernel[a, b] * shifted(x, a, b) for a in range(grid) for b in range(grid))
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_filter_is_the_spectrum_of_a_real_kernel(grid):
    """Else the inverse transform would have a choice, and devices choose differently."""
    layer = lego(grid, "linear")
    half = layer.gain().detach().numpy()
    full = np.fft.fftn(np.fft.irfft2(half, s=(grid, grid), axes=(0, 1)), axes=(0, 1))
    np.testing.assert_allclose(full[:, : half.shape[1]], half, atol=1e-12)


@pytest.mark.parametrize("grid", GRIDS)
def test_power_forgets_where_the_grid_begins_and_linear_does_not(grid):
    power, linear, x = lego(grid, "power"), lego(grid, "linear"), grid_tokens(grid)
    moved = shifted(x, 1, grid - 1)
    torch.testing.assert_close(power(moved), power(x))
    torch.testing.assert_close(linear(moved), shifted(linear(x), 1, grid - 1))
    torch.testing.assert_close(power(3 * x), 9 * power(x))
    torch.testing.assert_close(linear(3 * x), 3 * linear(x))


@pytest.mark.parametrize("grid", GRIDS)
def test_real_pieces_make_the_power_spectrums_result_even(grid):
    layer, x = lego(grid, "power"), grid_tokens(grid)
    with torch.no_grad():
        layer.pieces[..., 1] = 0
    result = layer(x).unflatten(1, (grid, grid))
    torch.testing.assert_close(result, result.flip(1, 2).roll((1, 1), (1, 2)))


def test_equal_pieces_cancel():
    layer = lego(4, "power", pieces=4)
    with torch.no_grad():
        layer.pieces.copy_(layer.pieces[:1].expand_as(layer.pieces))
    assert layer(grid_tokens(4)).abs().max() < 1e-6


@pytest.mark.parametrize("spectrum", ["power", "linear"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_finite_under_autocast(spectrum, dtype):
    torch.manual_seed(0)
    block = FourierBlock(7, 16, spectrum=spectrum)  # 7 is no power of two: half-precision FFTs would refuse
    for scale in (0.0, 1.0, 1e3):
        x = (scale * torch.randn(2, 49, 16)).requires_grad_()
        with torch.autocast("cpu", dtype):
            y = block(x)
        y.float().square().mean().backward()
        for value in (y, x.grad, *(parameter.grad for parameter in block.parameters())):
            assert value.isfinite().all()


def test_half_precision_changes_the_result_by_rounding_only():
    layer = LegoFilter(4, 3)
    x = torch.randn(2, 16, 3)
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x.bfloat16()).float(), layer.float()(x.bfloat16().float()), atol=2e-2, rtol=2e-2)


def test_block_is_two_residual_half_steps():
    torch.manual_seed(0)
    block, x = FourierBlock(4, 8, spectrum="linear"), torch.randn(2, 16, 8)
    with torch.no_grad():
        expected = block(x)
        half = x + block.filter(block.ln_1(x))
        torch.testing.assert_close(expected, half + block.mlp(block.ln_2(half)))
        block.filter.pieces.zero_(), block.mlp.c_proj.weight.zero_(), block.mlp.c_proj.bias.zero_()
        torch.testing.assert_close(block(x), x)
