"""TransfusionPipeline: a trained model that takes text and images and returns text and images."""

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from tf_lightning.autoencoder.frozen import Autoencoder
from tf_lightning.autoencoder.recorded import VARIABLE, checked_codec, open_recorded
from tf_lightning.batch import Document
from tf_lightning.checkpoint import select_weights, state_dict_error
from tf_lightning.data.images import to_image, to_pixels
from tf_lightning.diffusion.process import process_from_hparams
from tf_lightning.diffusion.sampler import build_scheduler, set_timesteps
from tf_lightning.errors import UserError, first_sentence
from tf_lightning.generation.engine import generate
from tf_lightning.generation.requests import (
    GenerationModel,
    GenerationOutput,
    GenerationPlan,
    LatentShape,
    Prompt,
    RawDocument,
    to_document,
)
from tf_lightning.generation.sampling import (
    OUTPUT_MODALITIES,
    OutputModality,
    SamplingConfig,
    not_for_codes,
)
from tf_lightning.generation.sizes import ImageSizes
from tf_lightning.generation.token_sampling import find_stop, num_streamable
from tf_lightning.interop.export import export, read_weights
from tf_lightning.model.transfusion import TransfusionModel, build_network
from tf_lightning.sharded import is_sharded, load_into, without_data
from tf_lightning.tokenizer.tokenizer import Tokenizer
from tf_lightning.training.gather import gather_network
from tf_lightning.training.module import Transfusion


class TransfusionPipeline:
    """Generate images and text with a trained model.

        pipe = TransfusionPipeline.from_pretrained("runs/quickstart/checkpoints/last.ckpt")
        pipe("a red circle above a blue square", num_outputs=4, seed=0).images[0].save("a.png")
        pipe(image).texts[0]

    A prompt is a string, an image, or a list of both in order. The empty string asks for an output
    without a prompt. Images in a prompt enter clean (t = 0) and must have one of the model's
    `image_sizes`. A generated image has the size `height` x `width` if it is given. Otherwise it
    has the size of the last image in its prompt, or of the training images.

    Attributes:
        model: the network, tokenizer and sizes that generation works with.
        autoencoder: between images and latents or codes, loaded when it is first needed; None for
            a model of text alone.
        process: how images are noised and denoised; None for images of discrete codes.
        hparams: hyper-parameters of the training run.
    """

    def __init__(
        self,
        net: TransfusionModel,
        tokenizer: Tokenizer,
        checkpoint: dict[str, Any],
        autoencoder: str | None = None,
        folder: Path | None = None,
    ):
        """Join the parts of a model; `from_pretrained` and `from_module` call this.

        Args:
            net: the network.
            tokenizer: the tokenizer of its text.
            checkpoint: the other entries of a checkpoint: hyper_parameters, image_codec
                (see `autoencoder/recorded.py`), row_length, global_step, and `weights`, "ema" or
                "raw".
            autoencoder: name of the autoencoder; None: the one that the checkpoint records.
            folder: folder of the checkpoint, to which a recorded path may be relative.
        """
        self.checkpoint, self.hparams = checkpoint, checkpoint["hyper_parameters"]
        codec = checked_codec(checkpoint["image_codec"])
        self.autoencoder_name, self.folder = autoencoder, folder
        self.process = process_from_hparams(self.hparams)
        shape = codec["latent_shape"]
        self.model = GenerationModel(
            net,
            tokenizer,
            self.hparams["patch_size"],
            tuple(shape) if shape else None,
            tuple(map(tuple, codec.get("other_shapes", ()))),
            self.hparams["causal_images"],
            checkpoint.get("row_length"),
        )

    # ---------------------------------------------------------------- in and out

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        weights: Literal["ema", "raw"] | None = None,
        autoencoder: str | Path | None = None,
    ) -> "TransfusionPipeline":
        """Load a model for generation.

        Args:
            path: a checkpoint written by `tf-lightning fit`, the folder of its run, a folder
                written by `tf-lightning export` or `save_pretrained`, or the name of such a folder
                on the Hugging Face hub.
            device: where the model runs; None: a GPU if there is one.
            dtype: precision of the weights, and of the network through autocast; None: float32.
                The autoencoder always runs in float32.
            weights: "ema" or "raw"; None: the EMA weights, if the run kept them.
            autoencoder: folder, file or hub name of the autoencoder that the model was trained
                with. None: the environment variable TF_LIGHTNING_AUTOENCODER, else the path that
                the checkpoint records, relative to it or to the current folder.

        Raises:
            UserError: the file is missing, damaged, or not a model of this project; it lacks these
                weights; or there is no such device.
        """
        device = find_device(device)
        checkpoint = read_weights(path)
        exported = checkpoint.get("weights")  # an exported folder says which it holds
        if weights and exported and weights != exported:
            raise UserError(
                f"{path} holds the {exported} weights; export the checkpoint again with --weights "
                f"{weights}, or leave it out"
            )
        state_dict = checkpoint.pop("state_dict")
        selected, kind = select_weights(state_dict, None if exported else weights)
        checkpoint.setdefault("weights", kind)
        name = str(autoencoder) if autoencoder else os.environ.get(VARIABLE)
        is_file = not Path(path).is_dir() or is_sharded(Path(path))
        folder = Path(path).parent if is_file else Path(path)
        try:
            net = load_network(checkpoint["hyper_parameters"], selected)
            net = net.requires_grad_(False).eval().to(device, dtype)
            tokenizer = Tokenizer.from_proto(bytes(checkpoint["tokenizer"].numpy()))
            return cls(net, tokenizer, checkpoint, name, folder)
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # values of other types in a file that somebody else wrote
            raise UserError(
                f"{path} cannot be loaded ({first_sentence(error)}); it is damaged or of another "
                "program: export it again, or use another checkpoint"
            ) from error

    @classmethod
    def from_module(cls, module: Transfusion, ema: bool = True) -> "TransfusionPipeline":
        """Use a module in training, which keeps its weights.

        A sharded module gives a whole copy of its weights, for which all ranks must call this
        together.

        Args:
            module: a `Transfusion` whose data was set up.
            ema: use the EMA weights if the module has them.

        Raises:
            UserError: the module is sharded, and the copy does not fit into memory.
        """
        hparams = dict(module.hparams)
        averaged = ema and module.ema is not None
        checkpoint = {
            "weights": "ema" if averaged else module.loaded_weights,
            "hyper_parameters": hparams,
            "image_codec": module.image_codec,
            "row_length": module.row_length,
            "global_step": module.loaded_step,
        }
        net = module.inference_net if averaged else module.net
        if module.device_mesh is not None:
            net = gather_network(net, hparams, module.device, module.trainer.precision)
        return cls(net, Tokenizer.from_proto(module.tokenizer_proto), checkpoint)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model as safetensors, for `from_pretrained` and `tf-lightning generate`.

        Raises:
            UserError: the folder holds other files.
        """
        weights = self.checkpoint["weights"]
        prefix = "ema." if weights == "ema" else "net."
        state_dict = self.model.net.state_dict()
        proto = bytearray(self.model.tokenizer.proto)
        checkpoint = self.checkpoint | {
            "state_dict": {prefix + name: weight for name, weight in state_dict.items()},
            "tokenizer": torch.frombuffer(proto, dtype=torch.uint8),
        }
        export(checkpoint, Path(folder), weights, {"net"})

    # ---------------------------------------------------------------- facts

    @property
    def has_images(self) -> bool:
        """Whether the model was trained with images."""
        return self.model.latent_shape is not None

    @cached_property
    def autoencoder(self) -> Autoencoder | None:
        """The autoencoder of the model's images, on the network's device.

        Raises:
            UserError: it is not found, or is not the one that the model was trained with.
        """
        if not self.has_images:
            return None
        codec, name = self.checkpoint["image_codec"], self.autoencoder_name
        return open_recorded(codec, self.hparams, name, self.folder).to(self.device)

    @property
    def image_size(self) -> int:
        """Height in pixels of the images that the model generates by default."""
        return self.model.latent_shape[1] * self.autoencoder.downsample

    @property
    def image_sizes(self) -> ImageSizes:
        """The sizes of images that the model generates and reads."""
        shapes = [self.model.latent_shape, *self.model.other_shapes]
        downsample, exact = self.autoencoder.downsample, self.process is None
        trained = [(width * downsample, height * downsample) for _, height, width in shapes]
        trained = trained[:1] if exact else trained
        return ImageSizes(trained, downsample * self.model.patch_size, exact)

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return next(self.model.net.parameters()).device

    # ---------------------------------------------------------------- generation

    def __call__(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        output_modality: OutputModality | None = None,
        num_outputs: int = 1,
        seed: int | Sequence[int] = 0,
        batch_size: int = 16,
        progress: bool = True,
        sampling: SamplingConfig | None = None,
        **options: Any,
    ) -> GenerationOutput:
        """Generate `num_outputs` outputs for each prompt.

        An output depends on its prompt, its seed and the options, not on the rest of the batch.

        Args:
            prompts: one string or image, or a list of prompts. A prompt of several parts is a list
                itself, so a single one is given as `pipe([[image, "make it red"]])`.
            output_modality: "image": exactly one image; "text": no images; "any": the model
                decides. None: an image if the first prompt ends in text, else text.
            num_outputs: outputs for each prompt.
            seed: output i uses seed + i; or the seeds of all outputs, one each.
            batch_size: outputs that are generated together.
            progress: show a progress bar.
            sampling: how to sample; None: the defaults of `SamplingConfig`.
            options: fields of `SamplingConfig` that replace fields of `sampling`.

        Raises:
            UserError: a prompt or an option does not fit the model.
        """
        prompts = [prompts] if isinstance(prompts, str | Image.Image) else list(prompts)
        if num_outputs < 1:
            raise UserError(f"num_outputs={num_outputs} must be at least 1")
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} must be at least 1")
        modality = output_modality or default_modality(prompts)
        plan = self.plan(modality, (sampling or SamplingConfig()).with_options(**options))
        repeated = [prompt for prompt in prompts for _ in range(num_outputs)]
        seeds = [seed + i for i in range(len(repeated))] if isinstance(seed, int) else list(seed)
        if len(seeds) != len(repeated):
            raise UserError(f"{len(seeds)} seeds do not fit {len(repeated)} outputs; give one each")
        outputs = dict(self.iterate(repeated, seeds, plan, batch_size, progress))
        return GenerationOutput([outputs[i] for i in range(len(repeated))], seeds)

    def plan(self, output_modality: OutputModality, sampling: SamplingConfig) -> GenerationPlan:
        """Check sampling options against the model before anything is computed.

        Raises:
            UserError: the model cannot generate this modality, or an option does not fit it.
        """
        if output_modality not in OUTPUT_MODALITIES:
            raise UserError(f"output_modality={output_modality!r} must be 'image', 'text' or 'any'")
        if not self.has_images:
            if output_modality == "image":
                raise UserError("this model was trained on text alone; use one trained with images")
            return GenerationPlan("text", sampling)
        if output_modality != "text":
            self.autoencoder  # noqa: B018 - a missing one is refused before anything is computed
        shape = None if output_modality == "text" else self._requested_shape(sampling)
        if self.process is None:
            not_for_codes(sampling)
            steps = self.model.num_patches(self.model.latent_shape)
            return GenerationPlan(output_modality, sampling, num_image_steps=steps)
        if output_modality == "text":
            return GenerationPlan(output_modality, sampling)
        scheduler = build_scheduler(self.process, sampling.sampler, sampling.timestep_shift)
        set_timesteps(scheduler, sampling.num_inference_steps)
        steps = sampling.num_inference_steps
        return GenerationPlan(output_modality, sampling, scheduler, steps, shape)

    def _requested_shape(self, sampling: SamplingConfig) -> LatentShape | None:
        """Return the (C, h, w) of the requested height and width; None if there are none."""
        if sampling.height is None and sampling.width is None:
            return None
        width, height = self.image_sizes.trained[0]
        width, height = sampling.width or width, sampling.height or height
        self.image_sizes.check((width, height))
        downsample = self.autoencoder.downsample
        return self.model.latent_shape[0], height // downsample, width // downsample

    def iterate(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        plan: GenerationPlan,
        batch_size: int = 16,
        progress: bool = False,
    ) -> Iterator[tuple[int, RawDocument]]:
        """Yield the index of a prompt with its output, in the order in which outputs end."""
        parts: dict[int, list[int | Tensor]] = {}
        documents = self._encode_all(prompts)
        events = generate(
            self.model, documents, seeds, plan, batch_size=batch_size, progress=progress
        )
        for index, part in events:
            if part is None:
                document = to_document(parts.pop(index, []))
                yield index, self._decode_parts(document, plan.sampling.stop)
            else:
                parts.setdefault(index, []).append(part)

    def stream(
        self,
        prompt: Prompt,
        *,
        output_modality: OutputModality = "text",
        seed: int = 0,
        sampling: SamplingConfig | None = None,
        **options: Any,
    ) -> Iterator[str | Image.Image]:
        """Yield the output for one prompt as it is generated: pieces of text, and images.

        Args:
            prompt: a string, an image, or a list of both.
            output_modality: "image", "text" or "any", as in `__call__`.
            seed: all randomness follows from it.
            sampling: how to sample; None: the defaults of `SamplingConfig`.
            options: fields of `SamplingConfig` that replace fields of `sampling`.
        """
        plan = self.plan(output_modality, (sampling or SamplingConfig()).with_options(**options))
        stop, ids, shown = plan.sampling.stop, [], 0  # shown: number of characters
        for _, part in generate(self.model, self._encode_all([prompt]), [seed], plan):
            goes_on = isinstance(part, int)
            ids += [part] if goes_on else []
            text = self.model.tokenizer.decode(ids)
            end = num_streamable(text, stop) if goes_on else len(text[: find_stop(text, stop)])
            if end > shown:
                yield text[shown:end]
                shown = end
            if isinstance(part, Tensor):
                ids, shown = [], 0
                yield self.decode(part.unsqueeze(0))[0]

    # ---------------------------------------------------------------- images and latents

    def encode(self, prompt: Prompt) -> Document:
        """Return the token ids and latents of a prompt's parts."""
        return [self._encode_part(p) for p in (prompt if isinstance(prompt, list) else [prompt])]

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Return the images of latents (n, C, h, w)."""
        with torch.no_grad():
            return [to_image(x) for x in self.autoencoder.decode(latents.to(self.device))]

    def _encode_all(self, prompts: Sequence[Prompt]) -> list[Document]:
        return [self.encode(prompt) for prompt in prompts]

    @torch.no_grad()
    def _encode_part(self, part: str | Image.Image | Tensor) -> Tensor:
        if isinstance(part, Tensor):
            if part.ndim == 3 and not self._reads(tuple(part.shape)):
                raise UserError(
                    f"latents in a prompt have shape {tuple(part.shape)}, but this model reads "
                    f"{self._nearest_shape(tuple(part.shape))}; encode an image of its size"
                )
            return part
        if not isinstance(part, str | Image.Image):
            raise UserError(
                f"a prompt is a string, an image or a list of both, not {type(part).__name__}"
            )
        if isinstance(part, str):
            try:
                part.encode()
            except UnicodeEncodeError as error:  # bytes of a terminal that are not UTF-8
                raise UserError(
                    f"character {error.start + 1} of the prompt, {part[error.start]!r}, is not a "
                    "Unicode character; type it again, or save the prompt as UTF-8"
                ) from error
            return torch.tensor(self.model.tokenizer.encode(part), dtype=torch.long)
        if not self.has_images:
            raise UserError("this model was trained on text alone; leave the images out")
        if not self.image_sizes.fits(part.size):
            width, height = self.image_sizes.nearest(part.size)
            raise UserError(
                f"an image has {part.width} x {part.height} pixels, but this model reads "
                f"{width} x {height}; resize it"
            )
        return self.autoencoder.encode(to_pixels(part).unsqueeze(0).to(self.device))[0].cpu()

    def _reads(self, shape: LatentShape) -> bool:
        """Return whether the model can read an image of this shape."""
        if self.model.latent_shape is None or shape == self.model.latent_shape:
            return self.model.latent_shape is not None
        channels, *size = shape
        height, width = (side * self.autoencoder.downsample for side in size)
        return channels == self.model.latent_shape[0] and self.image_sizes.fits((width, height))

    def _nearest_shape(self, shape: LatentShape) -> LatentShape | None:
        """Return the shape that the model can read and that is nearest; None without images."""
        if not self.has_images:
            return None
        downsample = self.autoencoder.downsample
        width, height = self.image_sizes.nearest((shape[2] * downsample, shape[1] * downsample))
        return self.model.latent_shape[0], height // downsample, width // downsample

    def _decode_parts(self, document: Document, stop: Sequence[str]) -> RawDocument:
        """Return images, and texts up to their stop string."""
        parts: RawDocument = []
        for part in document:
            if part.ndim == 3:
                parts += self.decode(part.unsqueeze(0))
            else:
                text = self.model.tokenizer.decode(part.tolist())
                parts.append(text[: find_stop(text, stop)].strip())
        return parts


def find_device(name: str | torch.device | None) -> torch.device:
    """Return a device; None: a GPU if there is one.

    Raises:
        UserError: this machine does not have it.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # depends on the backend
        found = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        raise UserError(
            f"device={str(name)!r} is not on this machine; give {' or '.join(['cpu', *found])}"
        ) from error


def load_network(hparams: dict[str, Any], weights: Mapping[str, Tensor]) -> TransfusionModel:
    """Build a network with given weights; memory is taken only if their sizes match.

    Raises:
        UserError: the weights do not fit the hyper-parameters.
    """
    if hparams["transformer"]["num_layers"] > len(weights):
        raise UserError(
            f"the model has num_layers={hparams['transformer']['num_layers']} but only "
            f"{len(weights):,} weights; use another checkpoint"
        )
    try:
        with torch.device("meta"):
            build_network(hparams).load_state_dict(without_data(weights), assign=True)
        net = build_network(hparams)
        load_into(net, weights)
    except RuntimeError as error:
        raise state_dict_error(error) from error
    return net


def default_modality(prompts: Sequence[Prompt]) -> OutputModality:
    """Return "image" for prompts that end in text, else "text".

    Raises:
        UserError: some prompts end in text and others in an image.
    """
    last = [prompt[-1] if isinstance(prompt, list) and prompt else prompt for prompt in prompts]
    kinds = {"image" if isinstance(part, str) else "text" for part in last}
    if len(kinds) > 1:
        raise UserError(
            "some prompts end in text and others in an image; give output_modality, "
            "'image', 'text' or 'any'"
        )
    return kinds.pop() if kinds else "image"
