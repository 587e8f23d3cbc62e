"""Ranges of arguments: declared in their types, checked when an object is built.

    @dataclass
    class Config:
        dim: PositiveInt = 768
        dropout: Annotated[float, Range(ge=0, lt=1)] = 0.0

        def __post_init__(self):
            check_fields(self)

A constructor begins with `check_arguments(Class.__init__, locals())`. Both raise the same sentence
from Python and from the command line. What relates several arguments is checked by their class.
"""

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from tf_lightning.errors import UserError


@dataclass(frozen=True, repr=False)
class Range:
    """Limits of a finite number, named as pydantic names them.

    Attributes:
        ge: the number is at least this.
        gt: the number is above this.
        le: the number is at most this.
        lt: the number is less than this.
        note: follows the limits in the message, such as "1 turns it off".
    """

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    note: str = ""

    def contains(self, value: float) -> bool:
        """Return whether a number is inside; NaN and infinity never are."""
        return (
            math.isfinite(value)
            and (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    def __repr__(self) -> str:
        """The limits in words, which the help of an option shows too."""
        lower = f"at least {self.ge}" if self.ge is not None else f"above {self.gt}"
        upper = f"at most {self.le}" if self.le is not None else f"less than {self.lt}"
        has_lower = self.ge is not None or self.gt is not None
        has_upper = self.le is not None or self.lt is not None
        limits = [lower] * has_lower + [upper] * has_upper
        if self.ge is not None and self.le is not None:
            limits = [f"from {self.ge} to {self.le}"]
        return (" and ".join(limits) or "finite") + (f"; {self.note}" if self.note else "")


PositiveInt = Annotated[int, Range(ge=1)]
NonNegativeInt = Annotated[int, Range(ge=0)]
Positive = Annotated[float, Range(gt=0)]
NonNegative = Annotated[float, Range(ge=0)]
Share = Annotated[float, Range(ge=0, le=1)]
"""A probability or a share of a whole."""
Decay = Annotated[float, Range(ge=0, lt=1)]
"""Weight of the old value in a moving average."""


def check_arguments(function: Callable, values: Mapping[str, Any], prefix: str = "") -> None:
    """Check the arguments of a call against their types.

    Args:
        function: whose annotations hold the ranges.
        values: the arguments by name; other names, such as `self` in `locals()`, are ignored.
        prefix: written before the name of an argument in the message, such as "unet.".

    Raises:
        UserError: an argument is outside of its range, or not one of its literals.
    """
    for name, annotation in hints(function).items():
        limit = broken_limit(values[name], annotation) if name in values else None
        if limit:
            raise UserError(f"{prefix}{name}={reprlib.repr(values[name])} must be {limit}")


def check_fields(config: Any, prefix: str = "") -> None:
    """Check the fields of a dataclass instance; see `check_arguments`."""
    check_arguments(type(config), vars(config), prefix)


@cache
def hints(declared: Callable) -> dict[str, Any]:
    """Return the annotations of a function or class, with their ranges."""
    return get_type_hints(declared, include_extras=True)


def broken_limit(value: Any, annotation: Any) -> str | None:
    """Return the requirement that a value breaks, in words, or None if it fits its type.

    Only ranges, literals and the containers of these are checked; all else fits.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        kind, bounds = arguments[0], [bound for bound in arguments[1:] if isinstance(bound, Range)]
        return next((found for bound in bounds if (found := out_of(bound, value, kind))), None)
    if annotation is bool:
        return None if isinstance(value, bool) else "true or false"
    if origin is Literal:
        return None if value in arguments else " or ".join(map(repr, arguments))
    if origin in (Union, UnionType):
        limits = [broken_limit(value, kind) for kind in arguments if kind is not NoneType]
        if value is None and NoneType in arguments or None in limits:
            return None
        return " or ".join([*limits, *["null"] * (NoneType in arguments)])
    if origin in (list, tuple) and isinstance(value, (list, tuple)):
        return broken_item(value, origin, arguments)
    if origin is dict and isinstance(value, dict):
        limits = (broken_limit(item, arguments[1]) for item in value.values())
        return next((f"{limit}, each" for limit in limits if limit), None)
    return None


def broken_item(values: list | tuple, origin: type, kinds: tuple) -> str | None:
    """Return the requirement that the items of a list or tuple break, or None if they fit."""
    if origin is list or kinds[-1:] == (...,):
        kinds = (kinds[0],) * len(values)
    elif len(kinds) != len(values):
        return f"{len(kinds)} values"
    limits = (broken_limit(value, kind) for value, kind in zip(values, kinds, strict=True))
    return next((f"{limit}, each" for limit in limits if limit), None)


def out_of(bound: Range, value: Any, kind: type) -> str | None:
    """Return the requirement in words, or None if the value is such a number in the range."""
    if kind is int and not (isinstance(value, int) or hasattr(value, "__index__")):
        return f"a whole number, {bound}"
    try:
        return None if bound.contains(value) else repr(bound)
    except (TypeError, OverflowError):
        return f"a number, {bound}"
