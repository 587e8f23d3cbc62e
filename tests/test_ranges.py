"""Every number in a configuration has a range, which is checked when the object is built."""

import inspect
import math
from dataclasses import is_dataclass
from types import UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

import pytest

from callbacks.evaluate import Evaluate
from callbacks.metrics import CLIPScore, ImageQuality
from callbacks.predictions import PredictionWriter
from callbacks.prompts import HeldOut, ShapesPrompts
from callbacks.published_prompts import (
    CocoPrompts,
    GenEvalPrompts,
    ImageNetPrompts,
    KarpathyPrompts,
)
from callbacks.reconstruct import Reconstruct
from callbacks.retrieval import RetrievalAccuracy
from callbacks.shapes_report import ShapesReport
from callbacks.throughput import Throughput
from support.tiny import SIZES
from tf_lightning.autoencoder.network import AutoencoderConfig
from tf_lightning.data import (
    CaptionTars,
    ChatFiles,
    ClassFolders,
    ImageData,
    Mixture,
    TextFiles,
)
from tf_lightning.data.image_only import Augment
from tf_lightning.drawings.emoji import EmojiCaptions, EmojiEdits
from tf_lightning.errors import UserError
from tf_lightning.generation.sampling import SamplingConfig
from tf_lightning.model.layers import RopeScaling
from tf_lightning.model.patches import LinearConfig
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.model.unet import UNetConfig
from tf_lightning.ranges import Range, broken_limit, hints
from tf_lightning.shapes.sources import ShapesCaptions, ShapesEdits, ShapesTexts
from tf_lightning.training.autoencoder import AutoencoderModule
from tf_lightning.training.module import Transfusion

NAN, INF = float("nan"), float("inf")
Small = Annotated[float, Range(gt=0, le=2, note="1 is usual")]
Count = Annotated[int, Range(ge=1)]

REQUIRED = {  # arguments without a default
    Transfusion: {"transformer": SIZES},
    Mixture: {"sources": {"a": None, "b": None}, "weights": {"a": 1.0, "b": 1.0}},
    ImageData: {"source": None},
    RopeScaling: {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_length": 8192,
    },
    **{cls: {"paths": "*.jsonl"} for cls in (TextFiles, CaptionTars, ChatFiles, ClassFolders)},
    Evaluate: {"prompts": None},
    RetrievalAccuracy: {"source": "captions"},
    HeldOut: {"source": "captions"},
    CocoPrompts: {"root": "coco"},
    KarpathyPrompts: {"annotations": "a.json", "images": "images"},
    ImageNetPrompts: {"synsets": "s.txt", "images": "images"},
    GenEvalPrompts: {"file": "g.jsonl"},
}
DECLARED = [
    *(TransformerConfig, RopeScaling, UNetConfig, LinearConfig, AutoencoderConfig),
    *(SamplingConfig, Augment, Transfusion, AutoencoderModule, Mixture, ImageData),
    *(ShapesCaptions, ShapesTexts, ShapesEdits, TextFiles, CaptionTars, ChatFiles, ClassFolders),
    *(Evaluate, ImageQuality, CLIPScore, PredictionWriter, Reconstruct, RetrievalAccuracy),
    *(ShapesReport, Throughput, ShapesPrompts, HeldOut, CocoPrompts, KarpathyPrompts),
    *(ImageNetPrompts, GenEvalPrompts, EmojiCaptions, EmojiEdits),
]


def arguments_with_ranges() -> list:
    """All arguments of these classes, as (class, name, annotation)."""
    return [
        pytest.param(cls, name, kind, id=f"{cls.__name__}.{name}")
        for cls in DECLARED
        for name, kind in hints(cls if is_dataclass(cls) else cls.__init__).items()
        if name in inspect.signature(cls).parameters
        and (mentions(kind, (int, float)) or get_origin(kind) is Literal)
    ]


def mentions(annotation: object, kinds: tuple) -> bool:
    """Return whether an annotation contains one of these types."""
    inner = get_args(annotation)[: 1 if get_origin(annotation) is Annotated else None]
    return annotation in kinds or any(mentions(part, kinds) for part in inner)


def wrong(kind: object) -> list:
    """Values outside of an annotation, which a mistake could contain."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        limits, number = inner[1], inner[0]
        below = [limits.ge - 1] if limits.ge is not None else []
        below += [limits.gt] if limits.gt is not None else []
        above = [limits.le + 1] if limits.le is not None else []
        above += [limits.lt] if limits.lt is not None else []
        return [*below, *above, NAN, INF, *([1.5] if number is int else [])]
    if origin in (Union, UnionType):
        return wrong(next(part for part in inner if get_origin(part)))
    if origin is dict:
        return [{"a": value, "b": 1.0} for value in wrong(inner[1])]
    if origin is list:
        return [[value] for value in wrong(inner[0])]
    if origin is tuple:
        more = [] if inner[-1] is ... else [part for part in inner[1:]]
        rest = [0.5 for _ in more]
        return [(value, *rest) for value in wrong(inner[0])]
    return ["neither"]  # Literal


@pytest.mark.parametrize(("cls", "name", "kind"), arguments_with_ranges())
def test_a_number_out_of_its_range_is_refused_when_the_object_is_built(cls, name, kind):
    for value in wrong(kind):
        with pytest.raises(UserError, match=rf"\b{name}=.* must be ") as refused:
            cls(**REQUIRED.get(cls, {}) | {name: value})
        assert str(refused.value).count("\n") == 0


@pytest.mark.parametrize("cls", DECLARED, ids=lambda cls: cls.__name__)
def test_every_default_is_in_its_range(cls):
    declared = cls if is_dataclass(cls) else cls.__init__
    for name, parameter in inspect.signature(declared).parameters.items():
        if parameter.default is not parameter.empty:
            assert broken_limit(parameter.default, hints(declared)[name]) is None, name


@pytest.mark.parametrize(
    ("value", "kind", "limit"),
    [
        (0.5, Small, None),
        (2, Small, None),
        (0, Small, "above 0 and at most 2; 1 is usual"),
        (NAN, Small, "above 0 and at most 2; 1 is usual"),
        (10**400, Small, "a number, above 0 and at most 2; 1 is usual"),
        ("1", Small, "a number, above 0 and at most 2; 1 is usual"),
        (2.0, Count, "a whole number, at least 1"),
        (None, Count, "a whole number, at least 1"),
        (None, Count | None, None),
        (0, Count | None, "at least 1 or null"),
        ((1, 0), tuple[Count, ...], "at least 1, each"),
        ((1, 1, 1), tuple[Count, Count], "2 values"),
        ([0], list[Count], "at least 1, each"),
        ({"a": 0}, dict[str, Count], "at least 1, each"),
        ("both", Literal["one", "two"], "'one' or 'two'"),
        ("layer", bool | Literal["layer"], None),
        ("rms", bool | Literal["layer"], "true or false or 'layer'"),
        (math.inf, Annotated[float, Range()], "finite"),
        (math.pi, Annotated[float, Range(ge=0, lt=4)], None),
        (object(), object, None),
    ],
)
def test_a_broken_limit_is_said_in_words(value, kind, limit):
    assert broken_limit(value, kind) == limit


def test_sizes_that_do_not_fit_each_other_are_refused():
    for sizes, told in {
        (("dim", 33),): "dim=33 does not divide into num_heads=12 heads",
        (("num_heads", 5),): "dim=768 does not divide into num_heads=5",
        (("dim", 36),): "heads of an even dim",
        (("num_kv_heads", 5),): "num_heads=12 must be a multiple of num_kv_heads=5",
        (("head_dim", 7),): "head_dim=7 must be even",
    }.items():
        with pytest.raises(UserError, match=told):
            TransformerConfig(**dict(sizes))
    with pytest.raises(UserError, match="low_freq_factor=4.0 must be less than"):
        RopeScaling(8.0, 4.0, 1.0, 8192)
