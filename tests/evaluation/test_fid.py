"""FID equals a closed form, torch-fidelity and torchmetrics."""

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from torchmetrics.image.fid import FrechetInceptionDistance
from torchvision.transforms.functional import to_pil_image

from evaluation.features import Features, inception
from evaluation.fid import FID
from evaluation.image_scores import ImageScores
from evaluation.inception_score import InceptionScore
from evaluation.kid import KID
from support.extractors import first_pixels, random_inception

FACTS = {"dataset": "noise", "count": 20, "resize": "none"}
pytestmark = pytest.mark.filterwarnings("ignore:.*biased upwards")


def normal(count: int, seed: int, mean=0.0, scale=1.0, size: int = 4) -> Features:
    """Features whose sample mean is `mean` and whose sample covariance is diag(`scale`^2)."""
    rows = torch.randn(count, size, generator=torch.Generator().manual_seed(seed)).double()
    rows = rows - rows.mean(0)
    whitened = rows @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(rows.T))).T
    return Features(whitened * scale + mean)


def test_the_distance_of_two_gaussians_equals_the_closed_form():
    """|m1 - m2|^2 + sum (s1 - s2)^2 for covariances that commute."""
    mean, scale = torch.tensor([1.0, -2.0, 0.5, 0.0]), torch.tensor([0.5, 1.0, 2.0, 3.0])
    fid = FID(first_pixels(4))
    fid.update(normal(50, 0), real=True)
    fid.update(normal(70, 1, mean.double(), scale.double()), real=False)
    expected = mean.square().sum() + (scale - 1).square().sum()
    assert fid.compute().item() == pytest.approx(expected.item(), rel=1e-12)


def test_equals_torchmetrics_for_any_features():
    extractor = first_pixels(4)
    theirs, ours = FrechetInceptionDistance(IdentityFeatures()), FID(extractor)
    for seed, real in ((0, True), (1, False), (2, False)):
        rows = torch.randn(30, 4, generator=torch.Generator().manual_seed(seed)).exp()
        theirs.update(rows, real=real)
        ours.update(Features(rows), real=real)
    assert ours.compute().item() == pytest.approx(theirs.compute().item(), rel=1e-5)


class IdentityFeatures(torch.nn.Module):
    """Makes torchmetrics use its inputs as features."""

    num_features = 4

    def forward(self, rows):
        return rows


@pytest.mark.slow
def test_equals_torch_fidelity_on_the_same_files_with_weights_by_path_or_cache(
    tmp_path, monkeypatch
):
    file = "hub/checkpoints/weights-inception-2015-12-05-6726825d.pth"
    weights = random_inception(tmp_path / "home" / file)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    by_path, by_cache = inception(str(weights)), inception()
    metrics = [FID(by_path), KID(by_path, subset_size=8), InceptionScore(by_path, splits=1)]
    scores = ImageScores(by_path, metrics)
    for kind, high in (("real", 256), ("generated", 128)):
        batch = torch.randint(high, (8, 3, 40, 48)).to(torch.uint8)
        batch[::2, :, :20] //= 3
        (tmp_path / kind).mkdir()
        for i, image in enumerate(batch):
            to_pil_image(image).save(tmp_path / kind / f"{i}.png")
        scores.update(read_back(tmp_path / kind), real=kind == "real")
    assert torch.equal(by_path(batch[:1]).pooled, by_cache(batch[:1]).pooled)
    assert by_path.weights_hash == by_cache.weights_hash

    theirs = torch_fidelity.calculate_metrics(  # finds the weights in the cache
        **{"input1": str(tmp_path / "generated"), "input2": str(tmp_path / "real")},
        **{"fid": True, "kid": True, "isc": True, "kid_subset_size": 8, "isc_splits": 1},
        **{"cuda": False, "cache": False, "save_cpu_ram": True, "verbose": False},
    )
    ours, _ = scores.compute()
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert ours["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert ours["inception_score"] == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert ours["fid"] > 1 and ours["kid"] > 1e-3 and ours["inception_score"] > 1 + 1e-6


def read_back(folder) -> torch.Tensor:
    """Read the PNG files of a folder, uint8 (B, 3, H, W)."""
    images = [np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def test_a_second_metric_reads_the_reference_that_the_first_wrote(tmp_path):
    path, extractor = tmp_path / "stats" / "noise.safetensors", first_pixels(4)
    first = FID(extractor, reference=path, real_facts=FACTS)
    assert first.reference.statistics is None
    first.update(normal(20, 0), real=True)
    first.keep_real()
    first.reset()  # keeps the reference
    second = FID(extractor, reference=path, real_facts=FACTS)  # reads the file
    for fid in (first, second):
        fid.update(normal(30, 1, mean=2.0), real=False)
    assert second.compute().item() == first.compute().item() == pytest.approx(16.0, rel=1e-12)
    assert second.protocol == {
        **{"metric": "fid", "extractor": "first-pixels", "weights_hash": "none"},
        **FACTS,
        **{"num_real": 20, "num_generated": 30},
    }


@pytest.mark.parametrize("kind", ["real", "generated"])
def test_one_image_is_too_few(kind):
    fid = FID(first_pixels(4), name="fid[x]")
    fid.update(normal(20, 0), real=kind != "real")
    fid.update(Features(torch.ones(1, 4)), real=kind == "real")
    with pytest.raises(ValueError, match=rf"fid\[x\] was given 1 {kind} images but needs .* 2"):
        fid.compute()


def test_fewer_images_than_dimensions_give_a_warning():
    fid = FID(first_pixels(4))
    fid.update(normal(20, 0), real=True)
    fid.update(Features(torch.randn(4, 4)), real=False)
    with pytest.warns(UserWarning, match="of 4 images in 4 dimensions is biased upwards"):
        fid.compute()
