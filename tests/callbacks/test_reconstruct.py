"""Metrics of reconstructions equal their formulas."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from callbacks.reconstruct import Reconstruct, code_use
from tf_lightning.data.image_only import PADDING_ROW, ImageBatch
from tf_lightning.errors import UserError
from tf_lightning.training.autoencoder import Reconstruction


class Module(SimpleNamespace):
    """The attributes of a module that the callback uses, and the logged values."""

    def __init__(self, num_codes=None):
        config = SimpleNamespace(num_codes=num_codes)
        super().__init__(config=config, device=torch.device("cpu"), logged={})

    def log(self, name, value):
        self.logged[name] = float(value)

    def all_gather(self, value):
        return value


@pytest.fixture(autouse=True)
def trainer(tmp_path, monkeypatch) -> SimpleNamespace:
    """A trainer without loggers, for modules of any class."""
    monkeypatch.setattr("callbacks.reconstruct.check_module", lambda *_: None)
    vars(TRAINER).update(default_root_dir=str(tmp_path))
    return TRAINER


TRAINER = SimpleNamespace(
    **{
        "sanity_checking": False,
        "logger": None,
        "loggers": [],
        "is_global_zero": True,
        "datamodule": None,
    },
    global_step=8,
    state=SimpleNamespace(fn="fit"),
)


def measured(images, reconstructed, *, ids=None, num_codes=None, rows=None, extractor=None) -> dict:
    """Logged values of one validation in two batches."""
    callback, module = Reconstruct(extractor), Module(num_codes)
    callback.setup(TRAINER, module, "fit")
    callback.on_validation_epoch_start(TRAINER, module)
    rows = torch.arange(len(images)) if rows is None else rows
    for number in range(2):
        part = slice(3 * number, 3 * number + 3)
        outputs = Reconstruction(
            reconstructed[part], None, None, None if ids is None else ids[part]
        )
        batch = ImageBatch(images[part], rows[part])
        callback.on_validation_batch_end(TRAINER, module, outputs, batch, number)
    callback.on_validation_epoch_end(TRAINER, module)
    return module.logged


@pytest.fixture
def images() -> torch.Tensor:
    torch.manual_seed(0)
    return F.interpolate(torch.rand(5, 3, 8, 8) * 2 - 1, size=32, mode="bilinear")


def ssim(a, b) -> torch.Tensor:
    """Wang 2004, Eq. 13, for a range of 2; Gaussian window of 11 pixels, sigma 1.5, no padding."""
    x = torch.arange(11) - 5.0
    window = torch.exp(-(x**2) / (2 * 1.5**2))
    window = (window[:, None] * window / window.sum() ** 2).expand(3, 1, 11, 11)
    smooth = lambda z: F.conv2d(z, window, groups=3)  # noqa: E731
    mean_a, mean_b = smooth(a), smooth(b)
    var_a, var_b = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2
    covariance = smooth(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    numerator = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return numerator / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))


def test_psnr_is_the_mean_over_images_of_values_of_range_two(images):
    reconstructed = (images + torch.randn_like(images) * torch.rand(5, 1, 1, 1) / 5).clamp(-1, 1)
    error = ((reconstructed - images) / 2).square().mean((1, 2, 3))
    logged = measured(images, reconstructed)
    assert logged["val/psnr"] == pytest.approx((-10 * error.log10()).mean().item(), abs=1e-3)


def test_ssim_equals_the_formula_of_wang_2004(images):
    reconstructed = (images + torch.randn_like(images) / 5).clamp(-1, 1)
    wanted = ssim(images, reconstructed).mean().item()
    assert measured(images, reconstructed)["val/ssim"] == pytest.approx(wanted, abs=0.02)
    assert measured(images, images)["val/ssim"] == pytest.approx(1)


def test_rfid_of_equal_images_is_zero(images):
    with pytest.warns(UserWarning, match="biased"):
        same = measured(images, images, extractor="shapes")["val/rfid[shapes]"]
        other = measured(images, -images, extractor="shapes")["val/rfid[shapes]"]
    assert same == pytest.approx(0, abs=1e-3) and other > 1


def test_padding_images_are_not_counted(images):
    reconstructed = images.clone()
    reconstructed[4] = -reconstructed[4]
    rows = torch.tensor([0, 1, 2, 3, PADDING_ROW])
    with_it, without = measured(images, reconstructed), measured(images, reconstructed, rows=rows)
    assert without["val/ssim"] == pytest.approx(1) and with_it["val/ssim"] < 1


def test_the_use_of_codes(images):
    ids = torch.tensor([0, 1, 1, 0, 7]).view(5, 1, 1)
    logged = measured(images, images, ids=ids, num_codes=8)
    assert (logged["val/code_use"], logged["val/dead_codes"]) == (3 / 8, 5)
    assert code_use(torch.ones(4))["code_perplexity"] == pytest.approx(4)


def test_reconstructions_are_written_where_no_logger_takes_them(images, tmp_path):
    measured(images, images)
    written = Image.open(tmp_path / "media" / "reconstructions-val-step0000008.png")
    assert written.width > 3 * 32 and written.height == 2 * 34 + 2  # a row of each, and borders


def test_too_few_images_for_the_rfid_do_not_take_the_other_scores(images):
    with pytest.warns(UserWarning, match="a score is missing: rfid.shapes. was given 1"):
        logged = measured(images[:1], images[:1], extractor="shapes")
    assert logged["val/ssim"] == pytest.approx(1) and "val/rfid[shapes]" not in logged


def test_missing_inception_weights_are_reported_before_training(tmp_path):
    callback = Reconstruct("inception", weights=str(tmp_path / "gone.pth"))
    with pytest.raises(UserError, match="gone.pth"):
        callback.setup(TRAINER, Module(), "fit")
