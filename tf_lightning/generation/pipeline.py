"""A trained network with its tokenizer and autoencoder: pictures and words in and out.

model = load("runs/quickstart/checkpoints/last.ckpt")
out = model.generate(["a red circle above a blue square"], num_images=4, guidance_scale=3.0, seed=0)
out.images[0].save("a.png")
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from tf_lightning.autoencoder.frozen import Autoencoder, load_matching_autoencoder
from tf_lightning.batch import Document
from tf_lightning.data.images import to_image, to_pixels
from tf_lightning.diffusion.guidance import Guidance
from tf_lightning.diffusion.process import process_from_hparams
from tf_lightning.diffusion.sampler import build_scheduler, check_not_denoising, set_timesteps
from tf_lightning.errors import UserError
from tf_lightning.generation.engine import generate
from tf_lightning.generation.requests import (
    Answer,
    Answers,
    Prompt,
    RawDocument,
    Settings,
    Speaker,
    to_document,
)
from tf_lightning.generation.token_sampling import TextSampling, find_stop, possible_stop
from tf_lightning.interop.export import read_weights
from tf_lightning.model.transfusion import TransfusionModel
from tf_lightning.tokenizer.tokenizer import Tokenizer
from tf_lightning.training.module import Transfusion


@dataclass
class TransfusionPipeline:
    """What generation needs; `load` builds it from a checkpoint, `of` from a module."""

    net: TransfusionModel
    tokenizer: Tokenizer
    autoencoder: Autoencoder | None
    latent_shape: tuple[int, int, int] | None
    hparams: dict
    max_length: int | None = None
    other_shapes: tuple[tuple[int, int, int], ...] = ()
    """Smaller ones that it reads too, of a mixture of several sizes."""

    @classmethod
    def of(cls, module: Transfusion) -> "TransfusionPipeline":
        """The averaged weights of a module, which keeps them."""
        name, shape = module.image_codec["autoencoder"], module.image_codec["latent_shape"]
        kind = module.hparams.latent_channels, module.hparams.num_codes
        return cls(
            net=module.inference_net,
            tokenizer=Tokenizer.from_proto(module.tokenizer_proto),
            autoencoder=load_matching_autoencoder(name, *kind).to(module.device) if shape else None,
            latent_shape=tuple(shape) if shape else None,
            hparams=dict(module.hparams),
            max_length=module.row_length,
            other_shapes=tuple(map(tuple, module.image_codec.get("other_shapes", ()))),
        )

    @property
    def speaker(self) -> Speaker:
        """What the decoder has to know."""
        return Speaker(
            self.net,
            self.tokenizer,
            self.hparams["patch_size"],
            self.latent_shape,
            self.hparams["causal_images"],
            self.max_length,
        )

    @property
    def image_size(self) -> int:
        """Side of the pictures it draws and reads, in pixels."""
        return self.latent_shape[1] * self.autoencoder.downsample

    def settings(
        self,
        answer: Answer,
        *,
        guidance_scale: float = 3.0,
        image_guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        num_inference_steps: int = 50,
        sampler: str | None = None,
        timestep_shift: float = 1.0,
        max_images: int = 1,
        **text,
    ) -> Settings:
        """What `generate` takes, checked before anything is computed.

        Args:
            answer: "image": one, now; "text": none of them; "any": what the model samples.
            guidance_scale: how strongly pictures follow the prompt; 1 = off.
            image_guidance_scale: the same for the prompt's pictures alone; None: `guidance_scale`.
            guidance_interval: lowest and highest noise level, in [0, 1], at which guidance acts.
            guidance_rescale: share of the correction of overexposed pictures, in [0, 1].
            num_inference_steps: network evaluations a picture, 1 to 1000; one of codes takes as
                many as it has codes.
            sampler: a diffusers scheduler, see `sampler.SAMPLERS`; None: DDIM, or Euler for flow.
            timestep_shift: of its steps, towards pure noise where it is more than 1 (Stable Diffusion 3
                Eq. 23); not of DDIM and UniPC, whose steps are even.
            max_images: pictures in an answer of any kind, at most.
            text: fields of `decoding.TextSampling`: max_new_tokens, temperature, top_k, ...; with
                code_ before them, of a picture's codes (code_temperature: 1 unless given).
        """
        codes = {k.removeprefix("code_"): text.pop(k) for k in [*text] if k.startswith("code_")}
        scheduler = None
        if answer == "image" and self.autoencoder is None:
            raise UserError("this model was trained on text alone; use one trained with pictures")
        if self.net.num_codes:
            check_not_denoising(sampler, timestep_shift, guidance_interval, guidance_rescale)
            num_inference_steps = self.speaker.num_patches
        elif answer != "text" and self.autoencoder is not None:
            process = process_from_hparams(self.hparams)
            scheduler = build_scheduler(process, sampler, timestep_shift)
            set_timesteps(scheduler, num_inference_steps)
        return Settings(
            answer="text" if self.autoencoder is None and answer == "any" else answer,
            text=TextSampling(**text),
            guidance=Guidance(
                guidance_scale, image_guidance_scale, tuple(guidance_interval), guidance_rescale
            ),
            scheduler=scheduler,
            num_inference_steps=num_inference_steps,
            codes=TextSampling(**{"temperature": 1.0} | codes),
            max_images=max_images,
        )

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        answer: Answer = "image",
        num_images: int = 1,
        seed: int = 0,
        batch_size: int = 16,
        progress: bool = True,
        **how,
    ) -> Answers:
        """Answer each prompt, `num_images` times over.

        Pictures of a prompt enter clean (t = 0). An answer depends on its prompt, its seed and the
        settings alone: it is the same among others.

        Args:
            prompts: a text, a picture, or a list of both.
            answer: "image": one, now; "text": none of them; "any": what the model samples.
            num_images: answers to each prompt.
            seed: of the first answer; those of the next ones follow.
            batch_size: answers at once.
            progress: show a progress bar.
            how: see `settings`.
        """
        if num_images < 1:
            raise UserError(f"num_images={num_images} must be at least 1")
        repeated = [prompt for prompt in prompts for _ in range(num_images)]
        seeds = [seed + number for number in range(len(repeated))]
        settings = self.settings(answer, **how)
        answers = self._answers(repeated, seeds, settings, batch_size, progress=progress)
        return Answers(answers, seeds)

    def answer_each(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        settings: Settings,
        batch_size: int = 16,
        progress: bool = False,
    ) -> Iterator[tuple[int, RawDocument]]:
        """Number of a prompt and its answer, as soon as it is whole."""
        parts: dict[int, list[int | Tensor]] = {}
        documents = self._encode_all(prompts)
        events = generate(
            self.speaker, documents, seeds, settings, batch_size=batch_size, progress=progress
        )
        for number, part in events:
            if part is None:
                document = to_document(parts.pop(number, []))
                yield number, self._decode_parts(document, settings.text.stop)
            else:
                parts.setdefault(number, []).append(part)

    def stream(
        self, prompt: Prompt, *, answer: Answer = "text", seed: int = 0, **how
    ) -> Iterator[str | Image.Image]:
        """The answer to one prompt as it comes: pieces of text, and pictures.

        Args:
            prompt: a text, a picture, or a list of both.
            answer: as in `generate`.
            seed: of all that is random.
            how: see `settings`.
        """
        settings = self.settings(answer, **how)
        stop, ids, told = settings.text.stop, [], 0  # told: characters
        for _, part in generate(self.speaker, self._encode_all([prompt]), [seed], settings):
            goes_on = isinstance(part, int)
            ids += [part] if goes_on else []
            text = self.tokenizer.decode(ids)
            end = possible_stop(text, stop) if goes_on else len(text[: find_stop(text, stop)])
            if end > told:
                yield text[told:end]
                told = end
            if isinstance(part, Tensor):
                ids, told = [], 0
                yield self.decode(part.unsqueeze(0))[0]

    def draw(
        self,
        prompts: Sequence[Prompt],
        *,
        seeds: Sequence[int],
        guidance_scale: float = 3.0,
        num_inference_steps: int = 50,
        progress: bool = False,
        **how,
    ) -> list[Image.Image]:
        """One picture after each prompt, all at once.

        Args:
            prompts: text and pictures in order; the picture drawn follows them.
            seeds: the first noise of each picture.
            guidance_scale: 1 = off.
            num_inference_steps: network evaluations, 1 to 1000.
            progress: show a progress bar.
            how: see `settings`.
        """
        settings = self.settings(
            "image",
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            **how,
        )
        answers = self._answers(prompts, seeds, settings, len(prompts), progress=progress)
        return [picture for (picture,) in answers]

    def write(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        **how,
    ) -> list[str]:
        """The text that follows each prompt: after a picture, its caption.

        Args:
            prompts: text and pictures in order.
            max_new_tokens: most tokens of a text.
            temperature: 0 = the likeliest token.
            seed: of the first text's draws; those of the next ones follow.
            how: see `settings`.
        """
        how |= {"max_new_tokens": max_new_tokens, "temperature": temperature}
        settings = self.settings("text", **how)
        seeds = [seed + number for number in range(len(prompts))]
        answers = self._answers(prompts, seeds, settings, len(prompts))
        return ["".join(parts) for parts in answers]

    def _answers(self, prompts: Sequence[Prompt], *how, **progress) -> list[RawDocument]:
        """The answers of `answer_each` in the order of the prompts."""
        answers = dict(self.answer_each(prompts, *how, **progress))
        return [answers[number] for number in range(len(prompts))]

    def _encode_all(self, prompts: Sequence[Prompt]) -> list[Document]:
        """Token ids and latents of every prompt; none is empty."""
        documents = [self.encode(p if isinstance(p, list) else [p]) for p in prompts]
        if not all(any(part.numel() for part in document) for document in documents):
            raise UserError("a prompt is empty; give text or a picture")
        return documents

    def encode(self, prompt: RawDocument) -> Document:
        """Token ids and latents of a prompt's parts."""
        return [self._encode_part(part) for part in prompt]

    @torch.no_grad()
    def _encode_part(self, part: str | Image.Image | Tensor) -> Tensor:
        if isinstance(part, Tensor):
            shape = tuple(part.shape)
            if part.ndim == 3 and shape not in (self.latent_shape, *self.other_shapes):
                told = f"latents of a prompt are {shape}, this model reads {self.latent_shape}"
                raise UserError(f"{told}; encode a picture of its size")
            return part
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
        latents = latents.to(next(self.net.parameters()).device)
        with torch.no_grad():
            return [to_image(pixels) for pixels in self.autoencoder.decode(latents)]

    def _decode_parts(self, document: Document, stop: Sequence[str]) -> RawDocument:
        """Texts, cut where a stop text begins, and pictures."""
        parts: RawDocument = []
        for part in document:
            if part.ndim == 3:
                parts += self.decode(part.unsqueeze(0))
            else:
                text = self.tokenizer.decode(part.tolist())
                parts.append(text[: find_stop(text, stop)].strip())
        return parts


def load(path: str | Path, device: str | torch.device | None = None) -> TransfusionPipeline:
    """The model in a checkpoint (averaged) or exported folder; device None: a GPU, if any."""
    checkpoint, device = read_weights(path), device or ("cpu", "cuda")[torch.cuda.is_available()]
    names = Transfusion.__init__.__annotations__.keys() - {"return"}
    hparams = {k: v for k, v in checkpoint["hyper_parameters"].items() if k in names}
    module = Transfusion(**hparams)
    module.configure_model()
    module.load_state_dict(checkpoint["state_dict"])
    module.on_load_checkpoint(checkpoint)
    return TransfusionPipeline.of(module.to(device).eval())
