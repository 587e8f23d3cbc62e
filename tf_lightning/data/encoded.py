"""Corpora that `tf-lightning encode` wrote: read as they are, or refused in one sentence.

What a folder holds is all a run needs: texts' tokens and their tokenizer, pictures' latents. The
sources' files are not looked at any more, so they need not be there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tf_lightning.data.corpus import Corpus, Source, Split
from tf_lightning.data.shards import FORMAT, origin_facts
from tf_lightning.errors import UserError
from tf_lightning.tokenizer import Tokenizer

VOCABULARY = "tokenizer.model"


def encoded_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of the folder's texts.

    Raises:
        UserError: nothing was encoded there.
    """
    if not (folder / VOCABULARY).is_file():
        raise UserError(
            f"nothing is encoded in {folder}; run `tf-lightning encode -c CONFIG` first, or leave "
            "encoded: out"
        )
    return Tokenizer(folder / VOCABULARY)


def corpora_of(folder: Path, name: str, split: Split) -> list[Path]:
    """The finished corpora of one name and split, whatever they were made of."""
    hexadecimal = "[0-9a-f]" * 12
    return sorted(folder.glob(f"{name}-{split}-{hexadecimal}"))


@dataclass(frozen=True)
class Needed:
    """What a run needs corpora to be encoded with.

    Attributes:
        tokenizer: its fingerprint.
        autoencoder: its fingerprint, None where there is none; it says weights and scaling.
        downsample: of the autoencoder.
        patch_size: side of a patch in latent pixels.
        time_token: whether each picture takes one position more.
        row_length: positions in a row, of which no document may take more.
        mirror: whether training has mirror images.
        crops: how many squares of each picture training has.
        sample_posterior: whether training samples the posterior; else it takes the mode.
    """

    tokenizer: str
    autoencoder: str | None
    downsample: int
    patch_size: int
    time_token: bool
    row_length: int
    mirror: bool
    crops: int
    sample_posterior: bool


def open_encoded(folder: Path, name: str, split: Split, source: Source, needed: Needed) -> Corpus:
    """The corpus of one source and split.

    Args:
        folder: what `encode` wrote.
        name: of the source.
        split: "train" or "val".
        source: asked for its `image_size`, where it has one, and for nothing else.
        needed: what the corpus must have been encoded with.

    Raises:
        UserError: there is none, or it was encoded otherwise.
    """
    found = corpora_of(folder, name, split)
    if len(found) != 1:
        raise UserError(
            f"{folder} holds {len(found)} corpora of {name} {split} and not one; run "
            "`tf-lightning encode -c CONFIG` to its end, into a folder of its own"
        )
    corpus = Corpus(found[0], needed.sample_posterior)
    for what, theirs, ours in _pairs(corpus, split, source, needed):
        if theirs != ours:
            raise UserError(
                f"{name} {split} in {folder} was encoded with {what} {theirs} and the data has "
                f"{ours}; give the data what it was encoded with, or encode into another folder"
            )
    return corpus


def _pairs(corpus: Corpus, split: Split, source: Source, needed: Needed) -> Iterator[tuple]:
    """What has to be equal: its name, the corpus's, and ours."""
    facts, latents = origin_facts(corpus.origin), corpus.latents
    yield "format", facts["format"], FORMAT
    yield "a tokenizer of fingerprint", facts["tokenizer"], needed.tokenizer
    yield "an autoencoder of fingerprint", facts["autoencoder"], needed.autoencoder
    yield "patch_size", facts["patch_size"], needed.patch_size
    yield "time_token", facts["time_token"], needed.time_token
    image_size = getattr(source, "image_size", None)
    if image_size and corpus.image_shape:
        yield "image_size", corpus.image_shape[-1] * needed.downsample, image_size
    if needed.row_length < facts["row_length"]:  # in longer rows they fit
        yield "row_length", facts["row_length"], needed.row_length
    if split == "train":
        yield "mirror", latents.mirrored, needed.mirror
        yield "crops", latents.crops, needed.crops
        if needed.sample_posterior:  # a mode is there always
            yield "sample_posterior", latents.moments, True
