"""Pictures and captions at validation, in TensorBoard."""

import lightning as L
import torch
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import make_grid

from tf_lightning.batch import Document, is_image
from tf_lightning.model import Model


class Samples(L.Callback):
    """Draws held-out captions and captions held-out pictures whenever the run validates.

    The same prompts and first noises each time, with the averaged weights. TensorBoard shows, for
    each source with captioned pictures, `pictures/<source>` (above: drawn, below: the dataset's
    own) and `captions/<source>` (prompt, the dataset's caption, the caption written).

    Args:
        num_samples: pictures and captions of each source.
        guidance_scale: 1 = off.
        num_inference_steps: network evaluations a picture.
        sampler: name of a diffusers scheduler.
        seed: the first picture's noise; the next pictures' follow.
    """

    def __init__(
        self,
        num_samples: int = 8,
        guidance_scale: float = 3.0,
        num_inference_steps: int = 50,
        sampler: str = "DDIMScheduler",
        seed: int = 0,
    ):
        self.num_samples, self.seed = num_samples, seed
        self.how = {
            "guidance_scale": guidance_scale,
            "num_inference_steps": num_inference_steps,
            "sampler": sampler,
        }

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sample on rank zero and log."""
        if trainer.sanity_checking or not trainer.is_global_zero or trainer.logger is None:
            return
        data = trainer.datamodule
        for source, corpus in data.corpora["val"].items():
            documents = (corpus.document(index) for index in range(min(len(corpus), 64)))
            pairs = [document for document in documents if is_pair(document)][: self.num_samples]
            if pairs:
                self.log_samples(trainer, Model.of(pl_module), source, pairs)

    def log_samples(
        self, trainer: L.Trainer, model: Model, source: str, pairs: list[Document]
    ) -> None:
        """Draw each caption, caption each picture, show both."""
        writer, step = trainer.logger.experiment, trainer.global_step
        captions, images = zip(
            *(sorted(pair, key=lambda part: part.ndim) for pair in pairs), strict=True
        )
        seeds = [self.seed + i for i in range(len(pairs))]
        drawn = model.draw([[caption] for caption in captions], seeds=seeds, **self.how)
        true = model.decode(torch.stack(images))
        tiles = torch.stack([pil_to_tensor(picture) for picture in drawn + true])
        writer.add_image(
            f"pictures/{source}", make_grid(tiles, nrow=len(pairs), pad_value=255), step
        )
        written = model.write([[image] for image in images])
        rows = [
            f"| {i} | {model.tokenizer.decode(caption.tolist())} | {text} |"
            for i, (caption, text) in enumerate(zip(captions, written, strict=True))
        ]
        table = ["| picture | its caption | caption written |", "|---|---|---|", *rows]
        writer.add_text(f"captions/{source}", "\n".join(table), step)


def is_pair(document: Document) -> bool:
    """One text and one image."""
    return sorted(map(is_image, document)) == [False, True]
