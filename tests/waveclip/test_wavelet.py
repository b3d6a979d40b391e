"""The wavelet transform against PyWavelets' periodization and ptwt's own call."""

import ptwt
import pytest
import pywt
import torch

from waveclip.wavelet import dwt2, filters, idwt2, wavedec2, waverec2

WAVELETS = ["haar", "db2", "db4", "sym4", "coif1"]


def picture(size=32):
    """Noise [2,3,S,S] in float64."""
    return torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("wavelet", WAVELETS)
def test_bands_equal_pywavelets(wavelet, levels):
    coarse, *details = wavedec2(picture(), levels, wavelet)
    their_coarse, *their_details = pywt.wavedec2(picture().numpy(), wavelet, "periodization", levels)
    torch.testing.assert_close(coarse, torch.from_numpy(their_coarse), atol=1e-10, rtol=0)
    for actual, expected in zip(details, their_details, strict=True):
        torch.testing.assert_close(actual, torch.stack([*map(torch.from_numpy, expected)], 1), atol=1e-10, rtol=0)


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("wavelet", WAVELETS)
def test_the_inverse_gives_the_picture_back(wavelet, levels):
    back = waverec2(wavedec2(picture(), levels, wavelet), wavelet)
    torch.testing.assert_close(back, picture(), atol=1e-10, rtol=0)


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_the_inverse_equals_pywavelets_on_any_bands(wavelet):
    coarse, details = picture(16), torch.stack([picture(16) * scale for scale in (1, -2, 3)], dim=1)
    expected = pywt.idwt2((coarse.numpy(), tuple(details.unbind(1))), wavelet, "periodization")
    torch.testing.assert_close(idwt2(coarse, details, wavelet), torch.from_numpy(expected), atol=1e-10, rtol=0)


@pytest.mark.parametrize("levels", [1, 2])
def test_the_convolution_equals_ptwt(levels):
    ours, theirs = wavedec2(picture(), levels), wavedec2(picture(), levels, transform="ptwt")
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(theirs[0], ptwt.wavedec2(picture(), "haar", level=levels)[0])
    torch.testing.assert_close(waverec2(theirs, transform="ptwt"), picture(), atol=1e-10, rtol=0)


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_a_filter_of_the_picture_s_own_size_still_wraps(wavelet):
    size = max(filters(wavelet).shape[-1], 4)
    coarse, details = dwt2(picture(size), wavelet)
    expected = pywt.dwt2(picture(size).numpy(), wavelet, "periodization")[0]
    torch.testing.assert_close(coarse, torch.from_numpy(expected), atol=1e-10, rtol=0)
    torch.testing.assert_close(idwt2(coarse, details, wavelet), picture(size), atol=1e-10, rtol=0)


def test_the_transform_keeps_the_energy():
    for wavelet in WAVELETS:
        energy = sum(band.square().sum() for band in wavedec2(picture(), 2, wavelet))
        torch.testing.assert_close(energy, picture().square().sum())


def test_a_picture_of_odd_size_is_refused():
    with pytest.raises(ValueError, match=r"\(32, 31\) pixels cannot be halved; use even sizes"):
        dwt2(torch.zeros(1, 3, 32, 31))


def test_a_filter_longer_than_the_picture_is_refused():
    with pytest.raises(ValueError, match="wavelet 'db8' is longer than a picture of 4 pixels"):
        dwt2(torch.zeros(1, 3, 4, 4), "db8")


def test_unknown_and_biorthogonal_wavelets_are_refused():
    with pytest.raises(ValueError, match="unknown wavelet 'harr'"):
        dwt2(torch.zeros(1, 3, 4, 4), "harr")
    for wavelet in ("bior2.2", "dmey"):  # PyWavelets calls dmey orthogonal, which its 62 taps are to 0.002
        with pytest.raises(ValueError, match=f"'{wavelet}' is not orthogonal; use haar"):
            dwt2(torch.zeros(1, 3, 64, 64), wavelet)


def test_ptwt_does_haar_alone():
    bands = dwt2(torch.zeros(1, 3, 8, 8))
    for call in (lambda: dwt2(bands[0], "db2", "ptwt"), lambda: idwt2(*bands, "db2", "ptwt")):
        with pytest.raises(ValueError, match="'db2' transform does not halve sizes exactly; use transform: conv"):
            call()
