"""SamplingConfig: the one place where the options of sampling are declared.

The pipeline, the command line and the callbacks read names, defaults and help from here. This file
imports no torch, so that `tf-lightning generate --help` answers at once.
"""

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Annotated, Any, Literal, get_args

from tf_lightning.errors import UserError
from tf_lightning.ranges import PositiveInt, Range, Share, check_fields

OutputModality = Literal["image", "text", "any"]
OUTPUT_MODALITIES = get_args(OutputModality)

GROUPS = {
    "size": "size of images",
    "guidance": "options of images",
    "denoising": "options of images, for models that denoise latents",
    "codes": "options of images, for models of discrete codes (Chameleon)",
    "text": "options of text",
    "any": "options of outputs with text and images",
}


def option(default: Any, group: str) -> Any:
    """A field of SamplingConfig that belongs to one of GROUPS."""
    return field(default=default, metadata={"group": group})


GuidanceScale = Annotated[float, Range(note="1 turns guidance off")]
Temperature = Annotated[float, Range(ge=0, note="0 is greedy")]
TopP = Annotated[float, Range(gt=0, le=1)]


@dataclass(frozen=True)
class SamplingConfig:
    """Options for sampling images and text from a trained model.

    Options that an output does not need are ignored: text ignores the options of images, and a
    model of latents ignores the options of codes.

    Raises:
        UserError: a value is out of its range.
    """

    height: PositiveInt | None = option(None, "size")
    """Height of generated images in pixels. By default the height of the last image in the prompt,
    so that an edit keeps its shape, else the height of the training images."""
    width: PositiveInt | None = option(None, "size")
    """Width of generated images in pixels. The default is chosen as for height."""
    guidance_scale: GuidanceScale = option(3.0, "guidance")
    """Strength of classifier-free guidance by the prompt; 1 turns it off."""
    image_guidance_scale: Annotated[float, Range()] | None = option(None, "guidance")
    """Strength of guidance by the images in the prompt, for editing (InstructPix2Pix uses
    1.5); 1 turns it off. By default the same as guidance_scale."""
    guidance_interval: tuple[Share, Share] = option((0.0, 1.0), "denoising")
    """Lowest and highest noise level, in [0, 1], at which guidance acts."""
    guidance_rescale: Share = option(0.0, "denoising")
    """Strength of the correction for overexposure, in [0, 1]; 0 turns it off."""
    num_inference_steps: PositiveInt = option(50, "denoising")
    """Denoising steps of an image, from 1 to 1000. Heun's method evaluates the network twice in
    each but the last, 99 times in 50 steps."""
    sampler: str | None = option(None, "denoising")
    """Name of a diffusers scheduler: DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler,
    DPMSolverMultistepScheduler-SDE or UniPCMultistepScheduler; for a rectified flow
    FlowMatchEulerDiscreteScheduler or FlowMatchHeunDiscreteScheduler. By default DDIM, or Euler for
    a rectified flow."""
    timestep_shift: Annotated[float, Range(ge=0.01, le=100)] = option(1.0, "denoising")
    """From 0.01 to 100; above 1, more of the steps are spent near pure noise (Stable Diffusion 3,
    Eq. 23). UniPC cannot shift its steps."""
    code_temperature: Temperature = option(1.0, "codes")
    """Divides the logits of image codes, >= 0; 0 always takes the most probable code."""
    code_top_k: PositiveInt | None = option(None, "codes")
    """Sample from this many most probable codes, >= 1; by default from all."""
    code_top_p: TopP = option(1.0, "codes")
    """Sample from the fewest codes that together have this probability, in (0, 1]."""
    max_new_tokens: PositiveInt = option(64, "text")
    """Maximum number of text tokens in an output, >= 1."""
    temperature: Temperature = option(0.0, "text")
    """Divides the logits of text, >= 0; 0 always takes the most probable token."""
    top_k: PositiveInt | None = option(None, "text")
    """Sample from this many most probable tokens, >= 1; by default from all."""
    top_p: TopP = option(1.0, "text")
    """Sample from the fewest tokens that together have this probability, in (0, 1]."""
    min_p: Share = option(0.0, "text")
    """Sample from tokens with at least this share of the probability of the most probable one, in
    [0, 1]."""
    stop: tuple[str, ...] = option((), "text")
    """Text that ends an output and is left out of it; several may be given."""
    max_images: Annotated[int, Range(ge=1, note="ask for text to get no image")] = option(1, "any")
    """Maximum number of images in an output with `any` modality, >= 1."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "guidance_interval", tuple(self.guidance_interval))
        if isinstance(self.stop, str):  # tuple() would split a string into letters
            raise UserError(f"stop={self.stop!r} must be a list of strings")
        object.__setattr__(self, "stop", tuple(self.stop))
        check_fields(self)
        low, high = self.guidance_interval
        if low > high:
            raise UserError(
                f"guidance_interval={self.guidance_interval} must be two noise levels from 0 to 1, "
                "the lower one first"
            )
        if "" in self.stop:
            raise UserError(f"stop={self.stop} must be strings that are not empty")

    def with_options(self, **options: Any) -> "SamplingConfig":
        """Return a copy with some options changed.

        Raises:
            UserError: there is no such option, or its value is out of range.
        """
        names = [f.name for f in fields(self)]
        for name in options:
            if name not in names:
                raise UserError(f"there is no sampling option {name!r}; use {', '.join(names)}")
        return replace(self, **options)

    def used(self, output_modality: OutputModality, makes_codes: bool = False) -> dict[str, Any]:
        """Return the options that influence an output, by name, and `nfe` where it denoises.

        Args:
            output_modality: modality of the output.
            makes_codes: whether the model's images are discrete codes.
        """
        image = {"size", "guidance", "codes" if makes_codes else "denoising"}
        groups = {"image": image, "text": {"text"}, "any": image | {"text", "any"}}[output_modality]
        values = asdict(self)
        used = {f.name: values[f.name] for f in fields(self) if f.metadata["group"] in groups}
        if self.height is None and self.width is None:  # as in records of older versions
            used = {name: value for name, value in used.items() if name not in ("height", "width")}
        return used | ({"nfe": self.nfe} if "denoising" in groups else {})

    @property
    def nfe(self) -> int:
        """Network evaluations of an image, not counting those of guidance (EDM's NFE)."""
        is_heun = self.sampler == "FlowMatchHeunDiscreteScheduler"
        return 2 * self.num_inference_steps - 1 if is_heun else self.num_inference_steps


def not_for_codes(sampling: SamplingConfig) -> None:
    """Refuse options of denoising for a model whose images are discrete codes.

    The number of steps is ignored instead, since recipes of both kinds of models share it.

    Raises:
        UserError: one of these options is not at its default.
    """
    for f in fields(sampling):
        value = getattr(sampling, f.name)
        if f.metadata["group"] != "denoising" or f.name == "num_inference_steps":
            continue
        if value != f.default:
            raise UserError(
                f"{f.name}={value} is an option of denoising and this model's images are discrete "
                "codes; leave it out"
            )
