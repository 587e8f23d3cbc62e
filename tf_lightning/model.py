"""A trained network with its tokenizer and autoencoder: pictures and words in and out.

model = load("runs/quickstart/checkpoints/last.ckpt")
model.draw([["a red circle above a blue square"]], guidance_scale=3.0, seeds=[0])[0].save("a.png")
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tf_lightning.autoencoder import Autoencoder, load_autoencoder
from tf_lightning.batch import Document
from tf_lightning.errors import UserError
from tf_lightning.generate import generate_images, generate_text
from tf_lightning.module import Transfusion
from tf_lightning.net import Net
from tf_lightning.sampler import build_scheduler
from tf_lightning.tokenizer import Tokenizer

# str, a picture, or a part that is already token ids or latents; in any order.
RawDocument = list[str | Image.Image | Tensor]


def to_pixels(picture: Image.Image) -> Tensor:
    """A picture as (3, H, W) in [-1, 1]."""
    array = np.asarray(picture.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1


def to_picture(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] as a picture."""
    array = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())


@dataclass
class Model:
    """What generation needs; `load` builds it from a checkpoint, `of` from a module."""

    net: Net
    tokenizer: Tokenizer
    autoencoder: Autoencoder | None
    latent_shape: tuple[int, int, int] | None
    hparams: dict

    @classmethod
    def of(cls, module: Transfusion) -> "Model":
        """The averaged weights of a module, which keeps them."""
        name, shape = module.image_codec["autoencoder"], module.image_codec["latent_shape"]
        return cls(
            net=module.inference_net,
            tokenizer=Tokenizer.from_proto(module.tokenizer_proto),
            autoencoder=load_autoencoder(name).to(module.device) if shape else None,
            latent_shape=tuple(shape) if shape else None,
            hparams=dict(module.hparams),
        )

    @property
    def image_size(self) -> int:
        """Side of the pictures it draws and reads, in pixels."""
        return self.latent_shape[1] * self.autoencoder.downsample

    def draw(
        self,
        prompts: Sequence[RawDocument],
        *,
        seeds: Sequence[int],
        guidance_scale: float = 3.0,
        num_inference_steps: int = 50,
        sampler: str = "DDIMScheduler",
        progress: bool = False,
    ) -> list[Image.Image]:
        """One picture after each prompt.

        Args:
            prompts: text and pictures in order; the picture drawn follows them.
            seeds: the first noise of each picture.
            guidance_scale: 1 = off.
            num_inference_steps: network evaluations, 1 to 1000.
            sampler: name of a diffusers scheduler, see `sampler.SAMPLERS`.
            progress: show a progress bar.
        """
        if self.autoencoder is None:
            raise UserError("this model was trained on text alone; use one trained with pictures")
        hparams = self.hparams
        scheduler = build_scheduler(
            sampler, hparams["num_train_timesteps"], hparams["prediction_type"]
        )
        latents = generate_images(
            self.net,
            [self.encode(prompt) for prompt in prompts],
            scheduler,
            tokenizer=self.tokenizer,
            patch_size=hparams["patch_size"],
            latent_shape=self.latent_shape,
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            seeds=seeds,
            causal_images=hparams["causal_images"],
            progress=progress,
        )
        return self.decode(latents)

    def write(
        self,
        prompts: Sequence[RawDocument],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[str]:
        """The text that follows each prompt: after a picture, its caption."""
        hparams = self.hparams
        written = generate_text(
            self.net,
            [self.encode(prompt) for prompt in prompts],
            tokenizer=self.tokenizer,
            patch_size=hparams["patch_size"],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            causal_images=hparams["causal_images"],
        )
        return [self.tokenizer.decode(ids).strip() for ids in written]

    def encode(self, prompt: RawDocument) -> Document:
        """Token ids and latents of a prompt's parts."""
        return [part if isinstance(part, Tensor) else self._encode_part(part) for part in prompt]

    @torch.no_grad()
    def _encode_part(self, part: str | Image.Image) -> Tensor:
        if isinstance(part, str):
            return torch.tensor(self.tokenizer.encode(part), dtype=torch.long)
        if self.autoencoder is None:
            raise UserError("this model was trained on text alone; leave the pictures out")
        size = self.image_size
        if part.size != (size, size):
            raise UserError(
                f"the picture has {part.width} x {part.height} pixels, this model reads "
                f"{size} x {size}; resize it"
            )
        pixels = to_pixels(part).unsqueeze(0).to(next(self.net.parameters()).device)
        return self.autoencoder.encode(pixels)[0].cpu()

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Latents (n, C, h, w) as pictures."""
        with torch.no_grad():
            return [to_picture(pixels) for pixels in self.autoencoder.decode(latents)]


def read_checkpoint(path: str | Path) -> dict:
    """A checkpoint's contents on the CPU, without running anything that it holds.

    Raises:
        UserError: there is no such file, or it is not a checkpoint of this project.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the checkpoint file in it")
    if not path.is_file():
        raise UserError(
            f"no checkpoint at {path}; train one with `tf-lightning fit` or check the path"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's readers raise of many kinds on bytes of other programs
        raise UserError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read as a checkpoint; it is damaged "
            "or of another program: use an earlier one from the same folder"
        ) from error
    if not isinstance(checkpoint, dict) or "image_codec" not in checkpoint:
        raise UserError(
            f"{path} is not a tf_lightning checkpoint; give one written by `tf-lightning fit`"
        )
    return checkpoint


def load(path: str | Path, device: str | torch.device = "cpu") -> Model:
    """The model in a checkpoint, with its averaged weights if it has any."""
    checkpoint = read_checkpoint(path)
    names = Transfusion.__init__.__annotations__.keys() - {"return"}
    hparams = {k: v for k, v in checkpoint["hyper_parameters"].items() if k in names}
    module = Transfusion(**hparams)
    module.configure_model()
    module.load_state_dict(checkpoint["state_dict"])
    module.on_load_checkpoint(checkpoint)
    return Model.of(module.to(device).eval())
