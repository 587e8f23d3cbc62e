"""Finding the autoencoder that a model was trained with.

A checkpoint records the autoencoder's fingerprint, which identifies it, and the name under which
training opened it. The name is a hint: a path may lead elsewhere in another folder or on another
machine. `image_codec` in a checkpoint holds both:

    autoencoder   name: a shipped one, a hub name, or a path, which begins with "/" or "."
    fingerprint   as in `frozen.py`; missing in checkpoints of version 0.1
    latent_shape  [C, h, w] of the latents, None for a model of text alone
    other_shapes  further resolutions, if there are any
"""

import os
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tf_lightning.autoencoder.frozen import (
    SHIPPED,
    Autoencoder,
    check_matching,
    load_autoencoder,
)
from tf_lightning.errors import UserError
from tf_lightning.hub import split_hub_name

VARIABLE = "TF_LIGHTNING_AUTOENCODER"
REMEDY = f"give it with --autoencoder NAME, autoencoder=NAME in Python, or {VARIABLE}=NAME"
MAX_SIZE = 2**16  # channels, or side of latents
NUM_PARENTS = 3  # a checkpoint is runs/NAME/checkpoints/FILE, and paths start beside runs


def as_hint(name: str | None) -> str | None:
    """Return a name as checkpoints record it: a relative path begins with "./"."""
    if name is None or name in (*SHIPPED, "pixels") or not Path(name).exists():
        return name
    return name if name.startswith(("/", ".")) else f"./{name}"


def checked_codec(image_codec: dict[str, Any]) -> dict[str, Any]:
    """Return `image_codec` of a checkpoint if its values have the right types.

    Raises:
        UserError: it is damaged.
    """
    texts = [image_codec["autoencoder"], image_codec.get("fingerprint")]
    shapes = [image_codec["latent_shape"] or [1, 1, 1], *image_codec.get("other_shapes", ())]
    sizes = [size for shape in shapes for size in shape]
    right = all(text is None or isinstance(text, str) for text in texts)
    right &= all(len(shape) == 3 for shape in shapes)
    right &= all(type(size) is int and 0 < size < MAX_SIZE for size in sizes)
    if not right or (image_codec["latent_shape"] and not texts[0]):
        raise UserError(
            f"image_codec={reprlib.repr(image_codec)} of the checkpoint is damaged; use another one"
        )
    return image_codec


def candidates(hint: str, folder: Path | None) -> Iterator[str]:
    """Yield the names that a hint may stand for, best first.

    Args:
        hint: the recorded name.
        folder: the folder of the checkpoint, if it has one.
    """
    if hint in (*SHIPPED, "pixels"):
        yield hint
        return
    folder = folder.absolute() if folder else None
    folders = [folder, *folder.parents][: 1 + NUM_PARENTS] if folder else []
    paths = [place / hint for place in (*folders, Path())]
    paths += [place / Path(hint).name for place in folders[:2]]
    found = list(dict.fromkeys(str(path) for path in paths if os.path.exists(path)))
    yield from found
    if not found and split_hub_name(hint):
        yield hint


def open_recorded(
    image_codec: dict[str, Any],
    hparams: dict[str, Any],
    given: str | None = None,
    folder: Path | None = None,
) -> Autoencoder:
    """Open the autoencoder that a model was trained with.

    Args:
        image_codec: the entry of the checkpoint.
        hparams: hyper-parameters of the model.
        given: name to open instead of the recorded one.
        folder: folder of the checkpoint, to which a recorded path may be relative.

    Raises:
        UserError: it is not found, cannot be loaded, is another one, or does not fit the model.
    """
    hint, expected = image_codec["autoencoder"], image_codec.get("fingerprint")
    others: list[tuple[str, Autoencoder]] = []
    for name in [given] if given else candidates(hint, folder):
        try:
            autoencoder = load_autoencoder(name)
        except UserError as error:
            raise UserError(str(error) if given else f"{error}; or {REMEDY}") from error
        if expected in (None, autoencoder.fingerprint):
            check_matching(name, autoencoder, hparams["latent_channels"], hparams["num_codes"])
            return autoencoder
        others.append((name, autoencoder))
    if others:
        name, autoencoder = others[0]
        check_matching(name, autoencoder, hparams["latent_channels"], hparams["num_codes"])
        raise UserError(
            f'autoencoder "{name}" (fingerprint {autoencoder.fingerprint}) is not the one that the '
            f'model was trained with, "{hint}" ({expected}), so images would be wrong; {REMEDY}'
        )
    raise UserError(
        f'the autoencoder that the model was trained with, "{hint}", is not found; {REMEDY}'
    )


def with_data(recorded: dict[str, Any], current: dict[str, Any] | None) -> dict[str, Any]:
    """Return a checkpoint's `image_codec` with the name of the data's autoencoder.

    Args:
        recorded: `image_codec` of the checkpoint.
        current: `image_codec` of the data; None without data.

    Raises:
        UserError: the data has another autoencoder than the checkpoint.
    """
    if not (current and current["autoencoder"] and recorded["latent_shape"]):
        return recorded
    ours, theirs = current.get("fingerprint"), recorded.get("fingerprint")
    if ours and theirs and ours != theirs:
        raise UserError(
            f'the data\'s autoencoder "{current["autoencoder"]}" ({ours}) is not the one that the '
            f'checkpoint was trained with, "{recorded["autoencoder"]}" ({theirs}); give the data '
            "that one"
        )
    return recorded | {"autoencoder": current["autoencoder"], "fingerprint": ours or theirs}
