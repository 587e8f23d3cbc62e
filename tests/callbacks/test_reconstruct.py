"""What is measured of reconstructions, against formulas written out."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from callbacks.reconstruct import Reconstruct, code_use
from tf_lightning.data.image_only import PADDING_ROW, ImageBatch
from tf_lightning.errors import UserError
from tf_lightning.training.autoencoder import Reconstruction


class Module(SimpleNamespace):
    """What the callback asks of a module, with what was logged."""

    def __init__(self, num_codes=None):
        config = SimpleNamespace(num_codes=num_codes)
        super().__init__(config=config, device=torch.device("cpu"), logged={})

    def log(self, name, value):
        self.logged[name] = float(value)

    def all_gather(self, value):
        return value


TRAINER = SimpleNamespace(sanity_checking=False, logger=None, is_global_zero=True)


def measured(images, made, *, ids=None, num_codes=None, rows=None, extractor=None) -> dict:
    """The numbers of one validation, in two batches."""
    callback, module = Reconstruct(extractor), Module(num_codes)
    callback.setup(TRAINER, module, "fit")
    callback.on_validation_epoch_start(TRAINER, module)
    rows = torch.arange(len(images)) if rows is None else rows
    for number in range(2):
        part = slice(3 * number, 3 * number + 3)
        outputs = Reconstruction(made[part], None, None, None if ids is None else ids[part])
        batch = ImageBatch(images[part], rows[part])
        callback.on_validation_batch_end(TRAINER, module, outputs, batch, number)
    callback.on_validation_epoch_end(TRAINER, module)
    return module.logged


@pytest.fixture
def pictures() -> torch.Tensor:
    torch.manual_seed(0)
    return F.interpolate(torch.rand(5, 3, 8, 8) * 2 - 1, size=32, mode="bilinear")


def ssim(a, b) -> torch.Tensor:
    """Wang 2004, Eq. 13, for range 2: Gaussian window of 11, sigma 1.5, mean over whole windows."""
    x = torch.arange(11) - 5.0
    window = torch.exp(-(x**2) / (2 * 1.5**2))
    window = (window[:, None] * window / window.sum() ** 2).expand(3, 1, 11, 11)
    smooth = lambda z: F.conv2d(z, window, groups=3)  # noqa: E731
    mean_a, mean_b = smooth(a), smooth(b)
    var_a, var_b = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2
    covariance = smooth(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    above = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return above / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))


def test_psnr_is_the_mean_over_pictures_of_values_of_range_two(pictures):
    made = (pictures + torch.randn_like(pictures) * torch.rand(5, 1, 1, 1) / 5).clamp(-1, 1)
    error = ((made - pictures) / 2).square().mean((1, 2, 3))
    logged = measured(pictures, made)
    assert logged["val/psnr"] == pytest.approx((-10 * error.log10()).mean().item(), abs=1e-3)


def test_ssim_is_wangs(pictures):
    made = (pictures + torch.randn_like(pictures) / 5).clamp(-1, 1)
    wanted = ssim(pictures, made).mean().item()
    assert measured(pictures, made)["val/ssim"] == pytest.approx(wanted, abs=0.02)
    assert measured(pictures, pictures)["val/ssim"] == pytest.approx(1)


def test_rfid_of_the_pictures_themselves_is_nothing(pictures):
    with pytest.warns(UserWarning, match="biased"):
        same = measured(pictures, pictures, extractor="shapes")["val/rfid[shapes]"]
        other = measured(pictures, -pictures, extractor="shapes")["val/rfid[shapes]"]
    assert same == pytest.approx(0, abs=1e-3) and other > 1


def test_pictures_that_fill_up_a_rank_are_not_counted(pictures):
    made = pictures.clone()
    made[4] = -made[4]
    rows = torch.tensor([0, 1, 2, 3, PADDING_ROW])
    with_it, without = measured(pictures, made), measured(pictures, made, rows=rows)
    assert without["val/ssim"] == pytest.approx(1) and with_it["val/ssim"] < 1


def test_use_of_codes(pictures):
    ids = torch.tensor([0, 1, 1, 0, 7]).view(5, 1, 1)
    logged = measured(pictures, pictures, ids=ids, num_codes=8)
    assert (logged["val/code_use"], logged["val/dead_codes"]) == (3 / 8, 5)
    assert code_use(torch.ones(4))["code_perplexity"] == pytest.approx(4)


def test_absent_inception_is_told_before_training(tmp_path):
    callback = Reconstruct("inception", weights=str(tmp_path / "gone.pth"))
    with pytest.raises(UserError, match="gone.pth"):
        callback.setup(TRAINER, Module(), "fit")
