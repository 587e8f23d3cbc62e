"""A source made into a corpus on disk: text tokenised, pictures encoded, bad samples counted.

Done once; a corpus is found again by what it was made of. It appears complete or not at all.
"""

import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from tqdm import tqdm

from tf_lightning.data.corpus import (
    IMAGE,
    STORED_CODES,
    STORED_LATENTS,
    BadSample,
    Corpus,
    RawDocument,
    Skipped,
    Source,
    Split,
)
from tf_lightning.errors import UserError
from tf_lightning.tokenizer import Tokenizer

FORMAT = 1  # of the files; a new number has every corpus prepared again
PICTURES_AT_ONCE = 64


def prepare(
    source: Source,
    split: Split,
    *,
    name: str,
    directory: str | Path,
    tokenizer: Tokenizer,
    autoencoder=None,
    row_length: int,
    patch_size: int,
) -> Corpus:
    """The corpus `<directory>/<name>-<split>-<hash>`, made if it is not there.

    A text longer than a row is cut into pieces that fill rows; a document with pictures that is
    longer than a row is skipped and counted.

    Args:
        source: raw documents.
        split: "train" or "val".
        name: of the source, for the directory and for messages.
        directory: the cache.
        tokenizer: for the texts.
        autoencoder: for the pictures; None where there are none.
        row_length: positions in a row.
        patch_size: side of a patch in latent pixels.

    Raises:
        UserError: nothing usable, pictures without autoencoder, or pictures that do not divide into
            patches. A "val" split with no samples at all is an empty corpus.
    """
    origin = [
        FORMAT,
        source.fingerprint(split),
        tokenizer.fingerprint,
        autoencoder and autoencoder.fingerprint,
        row_length,
        patch_size,
    ]
    digest = hashlib.sha256(json.dumps(origin).encode()).hexdigest()[:12]
    path = Path(directory) / f"{name}-{split}-{digest}"
    if path.is_dir():
        return Corpus(path)

    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=directory, prefix=f".{path.name}-"))
    try:
        writer = _Writer(unfinished, tokenizer, autoencoder, row_length, patch_size)
        skipped = _write_documents(source, split, name, writer)
        _check_result(name, split, writer.num_documents, skipped)
        writer.close(skipped, origin)
        if not path.is_dir():  # another process may have been as quick
            os.rename(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    rank_zero_info(summary(name, split, writer.num_documents, skipped))
    return Corpus(path)


def summary(name: str, split: Split, num_documents: int, skipped: dict[str, int]) -> str:
    """One line, such as "emoji train: prepared 1,200 documents, skipped 1: 1 truncated picture"."""
    line = f"{name} {split}: prepared {num_documents:,} documents"
    if skipped:
        line += f", skipped {sum(skipped.values()):,}: {_reasons(skipped)}"
    return line


def _reasons(skipped: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())


def _check_result(name: str, split: Split, num_documents: int, skipped: dict[str, int]) -> None:
    if num_documents == 0 and skipped:
        raise UserError(
            f"{name}: all {sum(skipped.values()):,} documents of the {split} split are unusable "
            f"({_reasons(skipped)}); mend them or change the data's arguments"
        )
    if num_documents == 0 and split == "train":
        raise UserError(f"{name}: there are no documents to train on; check its paths")


def _write_documents(source: Source, split: Split, name: str, writer: "_Writer") -> dict[str, int]:
    """Write all documents; how many samples were skipped, by reason."""
    skipped: Counter[str] = Counter()
    title = f"preparing {name} {split}"
    for document in tqdm(source.documents(split), title, unit=" documents", delay=2):
        try:
            if isinstance(document, Skipped):
                raise BadSample(document.reason)
            writer.add(document)
        except BadSample as error:
            skipped[str(error)] += 1
    return dict(skipped.most_common())


class _Writer:
    """Writes the files of a corpus; pictures wait until there are enough to encode at once."""

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, autoencoder, row_length: int, patch_size: int
    ):
        self.folder, self.tokenizer, self.autoencoder = folder, tokenizer, autoencoder
        self.row_length, self.patch_size = row_length, patch_size
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if autoencoder:
            autoencoder.to(self.device)
        self.parts, self.documents = array("q"), array("q", [0])
        self.num_tokens = self.num_images = 0
        self.picture_size: tuple[int, int] | None = None  # width, height
        self.waiting: list[Image.Image] = []
        self.tokens_file = (folder / "tokens.bin").open("wb")
        self.latents_file = (folder / "latents.bin").open("wb")

    @property
    def num_documents(self) -> int:
        return len(self.documents) - 1

    def add(self, raw: RawDocument) -> None:
        """Append a document, or the pieces of a long text; BadSample if it cannot be used."""
        parts = [self._encode_text(part) if isinstance(part, str) else part for part in raw]
        parts = [part for part in parts if part != []]
        pictures = [part for part in parts if isinstance(part, Image.Image)]
        if not parts:
            raise BadSample("empty document")
        if not pictures:
            tokens, step = list(chain(*parts)), self.row_length - 2  # room for <bos> and <eos>
            for start in range(0, len(tokens), step):
                self._write([tokens[start : start + step]])
            return
        num_patches = self._check_pictures(pictures)
        num_tokens = sum(len(part) for part in parts if isinstance(part, list))
        if 2 + num_tokens + len(pictures) * (num_patches + 2) > self.row_length:
            raise BadSample(f"longer than a row of {self.row_length} tokens")
        self._write(parts)

    def _encode_text(self, text: str) -> list[int]:
        try:
            return self.tokenizer.encode(text)
        except (UnicodeError, RuntimeError) as error:  # half of a surrogate pair, from JSON
            raise BadSample("text is not Unicode") from error

    def _check_pictures(self, pictures: list[Image.Image]) -> int:
        """Patches of one picture; all pictures of a corpus have one size."""
        if self.autoencoder is None:
            raise UserError("the data has pictures; name an autoencoder, such as 'pixels'")
        size = pictures[0].size
        pixels = self.autoencoder.downsample * self.patch_size
        if self.picture_size is None and any(side % pixels for side in size):
            raise UserError(
                f"pictures of {size[0]}x{size[1]} pixels do not divide into patches of {pixels} "
                f"pixels; give an image_size that is a multiple of {pixels}"
            )
        self.picture_size = self.picture_size or size
        if any(picture.size != self.picture_size for picture in pictures):
            raise BadSample("picture of another size than the first")
        return (size[0] // pixels) * (size[1] // pixels)

    def _write(self, parts: list[list[int] | Image.Image]) -> None:
        for part in parts:
            if isinstance(part, list):
                np.array(part, np.uint32).tofile(self.tokens_file)
                self.parts.extend((self.num_tokens, len(part)))
                self.num_tokens += len(part)
            else:
                self.parts.extend((self.num_images, IMAGE))
                self.num_images += 1
                self.waiting.append(part)
        self.documents.append(len(self.parts) // 2)
        if len(self.waiting) >= PICTURES_AT_ONCE:
            self._encode_waiting()

    @torch.no_grad()
    def _encode_waiting(self) -> None:
        if self.waiting:
            pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in self.waiting]))
            images = pixels.permute(0, 3, 1, 2).to(self.device).float() / 127.5 - 1
            latents = self.autoencoder.encode(images).cpu().numpy()
            stored, _ = STORED_CODES if self.autoencoder.num_codes else STORED_LATENTS
            latents.astype(stored).tofile(self.latents_file)
            self.waiting.clear()

    def close(self, skipped: dict[str, int], origin: list) -> None:
        """Write what is left, and the facts."""
        self._encode_waiting()
        self.tokens_file.close()
        self.latents_file.close()
        np.save(self.folder / "parts.npy", np.array(self.parts, np.int64).reshape(-1, 2))
        np.save(self.folder / "documents.npy", np.array(self.documents, np.int64))
        facts = {
            "num_documents": self.num_documents,
            "num_tokens": self.num_tokens,
            "num_images": self.num_images,
            "image_shape": self._image_shape(),
            "num_codes": self.autoencoder and self.autoencoder.num_codes,
            "skipped": skipped,
            "made_from": origin,
        }
        (self.folder / "corpus.json").write_text(json.dumps(facts, indent=1))

    def _image_shape(self) -> tuple[int, int, int] | None:
        if self.picture_size is None:
            return None
        width, height = (side // self.autoencoder.downsample for side in self.picture_size)
        return self.autoencoder.latent_channels, height, width
