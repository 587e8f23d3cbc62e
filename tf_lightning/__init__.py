"""tf_lightning: one Transformer that predicts the next text token and denoises images.

The names below are the public API. They are imported when they are first used, so that
`import tf_lightning` and `tf-lightning --help` do not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tf_lightning.data import ImageCaptionData, InterleavedData, Mixture, TextData
    from tf_lightning.generation.pipeline import TransfusionPipeline
    from tf_lightning.generation.sampling import SamplingConfig
    from tf_lightning.model.transformer import TransformerConfig
    from tf_lightning.training.module import Transfusion

MODULES = {
    "TransfusionPipeline": "tf_lightning.generation.pipeline",
    "Transfusion": "tf_lightning.training.module",
    "TransformerConfig": "tf_lightning.model.transformer",
    "SamplingConfig": "tf_lightning.generation.sampling",
    "TextData": "tf_lightning.data",
    "ImageCaptionData": "tf_lightning.data",
    "InterleavedData": "tf_lightning.data",
    "Mixture": "tf_lightning.data",
}

__all__ = [
    "ImageCaptionData",
    "InterleavedData",
    "Mixture",
    "SamplingConfig",
    "TextData",
    "Transfusion",
    "TransfusionPipeline",
    "TransformerConfig",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(MODULES[name]), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted([*globals(), *__all__])
