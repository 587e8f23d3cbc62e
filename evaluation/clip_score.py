"""How well pictures fit their captions, by an open_clip model."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchvision.transforms.functional import to_pil_image

from evaluation.features import as_uint8
from evaluation.open_clip_model import load_open_clip


class CLIPScore(Metric):
    """Mean over pairs of max(scale * cos(picture, caption), 0) (Hessel 2021).

    Higher is better. Published numbers differ in model, prefix and scale: Hessel has ViT-B-32,
    "A photo depicts " and 2.5; many papers ViT-L-14, no prefix and 100.

    Args:
        model: a name that open_clip knows ("ViT-L-14"), or "local-dir:FOLDER" with
            open_clip_config.json and open_clip_model.safetensors.
        pretrained: tag ("openai") or file of the weights; none with a folder.
        prefix: put before every caption.
        scale: of the cosine.
        name: the metric's name in logs.

    Raises:
        ValueError: no such model, or weights absent and no network to fetch them.
    """

    higher_is_better = True
    full_state_update = False

    def __init__(
        self,
        model: str,
        pretrained: str | None = None,
        prefix: str = "",
        scale: float = 100.0,
        name: str = "clip_score",
    ):
        super().__init__()
        loaded = load_open_clip(model, pretrained)
        self.network, self.preprocess = loaded.network, loaded.preprocess
        self.tokenizer = loaded.tokenizer
        self.name, self.prefix, self.scale = name, prefix, scale
        self.facts = {
            "metric": "clip_score",
            "model": loaded.name,
            "weights_hash": loaded.weights_hash,
            "prefix": prefix,
            "scale": scale,
        }
        self.add_state("total", torch.tensor(0.0).double(), "sum")
        self.add_state("count", torch.tensor(0), "sum")
        self.counts: dict[str, int] = {}

    @torch.no_grad()
    def update(self, images: Tensor, captions: Sequence[str]) -> None:
        """Adds pairs.

        Args:
            images: uint8 (B, 3, H, W), or floats in [-1, 1].
            captions: B texts.
        """
        scores = self.cosines(images, captions).double() * self.scale
        self.total += scores.clamp(min=0).sum()
        self.count += len(scores)

    def cosines(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosine of each picture's embedding with its caption's, (B,)."""
        pictures = [self.preprocess(to_pil_image(image)) for image in as_uint8(images).cpu()]
        tokens = self.tokenizer([self.prefix + caption for caption in captions])
        seen = self.network.encode_image(torch.stack(pictures).to(self.device))
        read = self.network.encode_text(tokens.to(self.device))
        return F.cosine_similarity(seen, read)

    def compute(self) -> Tensor:
        """The mean, a float64 scalar."""
        if not self.count:
            raise ValueError(f"{self.name} was given no picture")
        self.counts = {"num_pairs": int(self.count)}
        return self.total / self.count

    @property
    def protocol(self) -> dict:
        """What the number depends on; the count is that of the last `compute`."""
        return {**self.facts, **self.counts}
