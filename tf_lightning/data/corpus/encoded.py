"""Folders that `tf-lightning prepare --data.encoded DIR` wrote, and their remote copies.

Such a folder holds all that training needs: the tokens of the texts, their tokenizer and the
encoded images. The source files are not read, so they may be absent. A folder that was written with
other settings is refused; it is never prepared again.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tf_lightning.data.corpus.folders import Folder
from tf_lightning.data.corpus.prepare import FORMAT, origin_facts
from tf_lightning.data.corpus.reader import Corpus
from tf_lightning.data.documents import Source, Split
from tf_lightning.errors import UserError
from tf_lightning.tokenizer.tokenizer import Tokenizer

TOKENIZER_FILE = "tokenizer.model"


def encoded_tokenizer(folder: Folder) -> Tokenizer:
    """Load the tokenizer of an encoded folder.

    Raises:
        UserError: the folder is not an encoded folder.
    """
    file = folder.file(TOKENIZER_FILE)
    if not file.is_file():
        raise UserError(
            f"{folder} holds no encoded corpora; run `tf-lightning prepare -c CONFIG "
            f"--data.encoded {folder}` first, or leave `encoded` out"
        )
    return Tokenizer(file)


def find_corpora(folder: Folder, name: str, split: Split) -> list[str]:
    """Name the finished corpora of a source and split, with any settings."""
    pattern = re.compile(f"{re.escape(name)}-{split}-[0-9a-f]{{12}}")
    return [found for found in folder.folders() if pattern.fullmatch(found)]


@dataclass(frozen=True)
class EncodedRequirements:
    """The settings of a run that an encoded corpus must match.

    Attributes:
        tokenizer: fingerprint of the tokenizer.
        autoencoder: fingerprint of the autoencoder; None without one.
        old_autoencoder: its fingerprint in corpora of version 0.1.
        downsample: pixels per latent pixel, along each side.
        patch_size: side of a patch in latent pixels.
        time_token: whether each image takes one more position.
        row_length: positions in a row; no document may be longer.
        hflip: whether training needs horizontally flipped images.
        crops: number of crops of each image that training needs.
        max_aspect_ratio: longer side of an image divided by the shorter at most.
        sample_posterior: whether training samples the posterior; otherwise it takes the mode.
    """

    tokenizer: str
    autoencoder: str | None
    old_autoencoder: str | None
    downsample: int
    patch_size: int
    time_token: bool
    row_length: int
    hflip: bool
    crops: int
    max_aspect_ratio: float
    sample_posterior: bool


def open_encoded(
    folder: Folder, name: str, split: Split, source: Source, required: EncodedRequirements
) -> Corpus:
    """Open the encoded corpus of one source and split.

    Args:
        folder: the encoded folder.
        name: name of the source.
        split: "train" or "val".
        source: the source; only its `image_size` and `image_sizes` are read, if it has them.
        required: the settings that the corpus must match.

    Raises:
        UserError: there is no such corpus, or it was encoded with other settings.
    """
    found = find_corpora(folder, name, split)
    if len(found) != 1:
        raise UserError(
            f"{folder} holds {len(found)} corpora of {name} {split} instead of one; run "
            "`tf-lightning prepare -c CONFIG --data.encoded DIR` to its end, with an empty DIR"
        )
    corpus = Corpus(str(folder.folder(found[0])), required.sample_posterior)
    for setting, theirs, ours in _settings(corpus, split, source, required):
        if theirs != ours:
            raise UserError(
                f"{name} {split} in {folder} was encoded with {setting} {theirs}, but the data has "
                f"{ours}; give the data the same setting, or encode into another folder"
            )
    return corpus


def _settings(
    corpus: Corpus, split: Split, source: Source, required: EncodedRequirements
) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, value in the corpus, required value) of each setting that must be equal."""
    facts, storage = origin_facts(corpus.origin), corpus.image_storage
    yield "format", facts["format"], FORMAT
    yield "a tokenizer of fingerprint", facts["tokenizer"], required.tokenizer
    if facts["autoencoder"] != required.old_autoencoder:
        yield "an autoencoder of fingerprint", facts["autoencoder"], required.autoencoder
    yield "patch_size", facts["patch_size"], required.patch_size
    yield "time_token", facts["time_token"], required.time_token
    yield "max_aspect_ratio", storage.max_aspect_ratio, required.max_aspect_ratio
    image_size = getattr(source, "image_size", None)
    if image_size and corpus.image_shape and not storage.has_shapes:
        yield "image_size", corpus.image_shape[-1] * required.downsample, image_size
    buckets = getattr(source, "image_sizes", ())
    for _, height, width in corpus.image_shapes if buckets else ():
        size = width * required.downsample, height * required.downsample
        if size not in buckets:
            yield "images of", f"{size[0]} x {size[1]} pixels", f"image_size {image_size}"
    if required.row_length < facts["row_length"]:  # documents fit into longer rows
        yield "row_length", facts["row_length"], required.row_length
    if split == "train":
        yield "hflip", storage.hflip, required.hflip
        yield "crops", storage.crops, required.crops
        if required.sample_posterior:  # the mode is always stored
            yield "sample_posterior", storage.moments, True
