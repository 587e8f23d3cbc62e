"""Writing a corpus: texts are tokenized, long texts cut into rows, images encoded in batches.

`reader.py` describes the files.
"""

import json
import os
import shutil
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tf_lightning.autoencoder.statistics import MIN_IMAGES, Moments, check_latents, check_std
from tf_lightning.data.corpus.reader import (
    ALTERNATIVE,
    CONTEXT_IMAGE,
    IMAGE,
    OWN_FILE,
    STORED_CODES,
    STORED_LATENTS,
    ImageStorageSpec,
    checksum_seed,
    decodes_alike,
)
from tf_lightning.data.documents import AnyText, BadSample, ContextText, RawDocument, TurnText
from tf_lightning.data.images import CENTER, CONTEXT, CROP_POSITIONS, byte_range, load_image
from tf_lightning.errors import UserError
from tf_lightning.tokenizer.tokenizer import Tokenizer

ENCODER_BATCH = 64  # images encoded at once

EncodedPart = list[list[int]] | Image.Image  # a text in one or several wordings, or an image


class CorpusWriter:
    """Writes the files of a corpus. Images are collected and encoded in batches.

    Args:
        folder: an empty folder.
        tokenizer: tokenizes the texts.
        autoencoder: encodes the images; None if there are none.
        row_length: positions in a row; no document is longer.
        patch_size: side of a patch in latent pixels.
        time_token: whether each image takes one more position.
        image_storage: what is stored of each image.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        autoencoder,
        row_length: int,
        patch_size: int,
        time_token: bool = False,
        image_storage: ImageStorageSpec = ImageStorageSpec(),  # noqa: B008 - it is frozen
    ):
        self.folder, self.tokenizer, self.autoencoder = folder, tokenizer, autoencoder
        self.row_length, self.patch_size = row_length, patch_size
        self.time_token, self.image_storage = time_token, image_storage
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if autoencoder:
            autoencoder.to(self.device)
        self.parts, self.documents = array("q"), array("q", [0])
        self.num_tokens = self.num_images = self.num_cut = 0
        self.image_size: tuple[int, int] | None = None  # width, height in pixels
        self.checks = array("I")  # uint32 CRC-32 of each part; the seed until it is encoded
        # Moments of the latents' means and of the pixels; further crops and flips are not counted.
        self.latent_moments, self.pixel_moments = Moments(), Moments()
        self.waiting: list[tuple[Image.Image, int]] = []  # images to encode, and their part numbers
        self.files: dict[str, int] = {}  # numbers of the files with lazy images
        self.locations = array("q")  # int64 rows of pictures.npy, four numbers per lazy image
        self.tokens_file = (folder / "tokens.bin").open("wb")
        self.latents_file = (folder / "latents.bin").open("wb")
        self.own_file = (folder / "pictures.bin").open("wb") if image_storage.lazy else None

    @property
    def num_documents(self) -> int:
        """Number of documents written so far."""
        return len(self.documents) - 1

    def add(self, raw: RawDocument) -> None:
        """Append a document; one that is longer than a row becomes several documents.

        A text is cut anywhere. A document with images is cut between its parts, unless it is a
        caption with its image, an edit or a conversation, whose parts need each other.

        Raises:
            BadSample: the document cannot be used.
            UserError: there are images but no autoencoder, or they do not divide into patches.
        """
        parts = [self._encode_texts(part) if isinstance(part, str) else part for part in raw]
        parts = [part for part in parts if part != []]
        images = [part for part in parts if isinstance(part, Image.Image)]
        if not parts:
            raise BadSample("empty document")
        if not images:
            tokens, step = list(chain(*(part[0] for part in parts))), self.row_length - 2
            if any(len(part) > 1 for part in parts) and sum(map(self._length, parts)) <= step:
                self._write(parts)
                return
            for start in range(0, len(tokens), step):
                self._write([[tokens[start : start + step]]])
            return
        self.num_patches = self._check_images(images)
        if 2 + sum(map(self._length, parts)) <= self.row_length:
            self._write(parts)
            return
        is_chat = any(isinstance(part, ContextText) for part in raw)
        is_edit = len(parts) == 3 and len(images) == 2
        if len(parts) < 3 or is_edit or is_chat or 4 + self.num_patches > self.row_length:
            raise BadSample(f"longer than a row of {self.row_length} tokens")
        self.num_cut += 1
        for piece in self._cut(parts):
            self._write(piece)

    def _length(self, part: EncodedPart) -> int:
        """Count the positions of a part, of its longest wording."""
        return max(map(len, part)) if isinstance(part, list) else self.num_patches + 2

    def _cut(self, parts: list[EncodedPart]) -> Iterator[list[EncodedPart]]:
        """Cut a document into pieces that fill rows, between its parts and inside of long texts."""
        room = self.row_length - 2  # for <bos> and <eos>
        piece: list[EncodedPart] = []
        for part in parts:
            whole = [part]
            if isinstance(part, list) and self._length(part) > room:
                whole = [[part[0][i : i + room]] for i in range(0, len(part[0]), room)]
            for section in whole:
                if piece and sum(map(self._length, [*piece, section])) > room:
                    yield piece
                    piece = []
                piece.append(section)
        yield piece

    def _encode_texts(self, text: str) -> list[list[int]]:
        """Tokenize a text in all its wordings; an empty list if all of them are empty."""
        wordings = text.texts if isinstance(text, AnyText) else [text]
        encoded = [ids for ids in map(self._encode_text, wordings) if ids]
        fitting = [ids for ids in encoded if len(ids) <= self.row_length - 2]
        return fitting if len(encoded) > 1 and fitting else encoded

    def _encode_text(self, text: str) -> list[int]:
        try:
            ids = self.tokenizer.encode(text)
        except (UnicodeError, RuntimeError) as error:  # half of a surrogate pair, from JSON
            raise BadSample("text is not Unicode") from error
        if isinstance(text, TurnText):
            ids.append(self.tokenizer.eos_id)
        return [~token for token in ids] if isinstance(text, ContextText) else ids

    def _check_images(self, images: list[Image.Image]) -> int:
        """Check the images of a document and return the number of positions of one image."""
        if self.autoencoder is None:
            raise UserError("the data has images; name an autoencoder, such as 'pixels'")
        size = images[0].size
        pixels = self.autoencoder.downsample * self.patch_size
        if self.image_size is None and any(side % pixels for side in size):
            raise UserError(
                f"images of {size[0]}x{size[1]} pixels do not divide into patches of {pixels} "
                f"pixels; give an image_size that is a multiple of {pixels}"
            )
        self.image_size = self.image_size or size
        generated = any("file" not in image.info for image in images)
        if generated and (self.image_storage.lazy or self.image_storage.crops > 1):
            raise UserError(
                "lazy_images and crops need images that are read from files, and this source "
                "generates its images; give lazy_images: false and crops: 1"
            )
        if any(image.size != self.image_size for image in images):
            raise BadSample("image of another size than the first")
        return (size[0] // pixels) * (size[1] // pixels) + self.time_token

    def _write(self, parts: list[EncodedPart]) -> None:
        """Append the tokens and images of one document."""
        count = sum(len(part) if isinstance(part, list) else 1 for part in parts)
        seeds = (checksum_seed(place, count) for place in range(count))
        for part in parts:
            if not isinstance(part, list):
                self.checks.append(next(seeds))
                kind = CONTEXT_IMAGE if part.info.get(CONTEXT) else IMAGE
                self.parts.extend((self.num_images, kind))
                self.num_images += 1
                self._add_image(part)
                continue
            for number, ids in enumerate(part):
                self.checks.append(next(seeds))
                tokens = np.array(ids, np.int32)
                tokens.tofile(self.tokens_file)
                self._update_check(-1, tokens)
                length = ALTERNATIVE - len(ids) if number else len(ids)
                self.parts.extend((self.num_tokens, length))
                self.num_tokens += len(ids)
        self.documents.append(len(self.parts) // 2)
        if len(self.waiting) >= ENCODER_BATCH:
            self._encode_waiting()

    def _update_check(self, part: int, content: bytes | np.ndarray) -> None:
        self.checks[part] = zlib.crc32(content, self.checks[part])

    def _add_image(self, image: Image.Image) -> None:
        """Queue the image of the last part for encoding, or record where its file lies."""
        if not self.image_storage.lazy:
            self.waiting.append((image, len(self.checks) - 1))
            return
        file = image.info["file"]
        content = file.read_bytes() if isinstance(file, Path) else file
        self._update_check(-1, content)
        if place := byte_range(file):
            path, offset, size = place
            number = self.files.setdefault(path, len(self.files))
        else:
            number, offset, size = OWN_FILE, self.own_file.tell(), len(content)
            self.own_file.write(content)
        self.locations.extend((number, offset, size, decodes_alike(image, content)))

    @torch.no_grad()
    def _encode_waiting(self) -> None:
        """Encode the queued images and append their latents or codes."""
        if self.waiting:
            views = [self._pixels(crop) for crop in CROP_POSITIONS[: self.image_storage.crops]]
            if self.image_storage.hflip:
                views += [images.flip(-1) for images in views]
            latents = torch.stack([self._encode(view) for view in views], 1)  # (B, V, S, C, h, w)
            if self.autoencoder.unit_variance:
                self._check_latents(views[0], latents)
            stored_dtype, _ = STORED_CODES if self.autoencoder.num_codes else STORED_LATENTS
            stored = latents.cpu().numpy().astype(stored_dtype)
            stored.tofile(self.latents_file)
            for (_, part), content in zip(self.waiting, stored, strict=True):
                self._update_check(part, content)
            self.waiting.clear()

    def _check_latents(self, pixels: torch.Tensor, latents: torch.Tensor) -> None:
        """Measure the queued images, (B, 3, H, W), and their latents, (B, V, S, C, h, w).

        Raises:
            UserError: a latent is not finite, or those of the first images are far from unit
                variance.
        """
        check_latents(latents, self._image_name)
        is_first = not self.latent_moments.num_values
        self.latent_moments.update(latents[:, 0, 0])
        self.pixel_moments.update(pixels)
        if is_first and len(self.waiting) >= MIN_IMAGES:
            count = len(self.waiting)
            check_std(self.latent_moments, self.pixel_moments, count, warn=False)

    def _image_name(self, index: int) -> str:
        """Return what to call a queued image in a message: its number and its file, if any."""
        number = self.num_images - len(self.waiting) + index
        place = byte_range(self.waiting[index][0].info.get("file"))
        path, offset, _ = place or ("", 0, 0)
        file = f" (byte {offset:,} of {path})" if offset else f" ({path})" if path else ""
        return f"image {number:,}{file}"

    def _pixels(self, crop: float) -> torch.Tensor:
        """Stack a crop of the queued images, (B, 3, H, W) in [-1, 1]."""
        images = [image for image, _ in self.waiting]
        if crop != CENTER:
            images = [load_image(i.info["file"], self.image_size[0], crop) for i in images]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        return pixels.permute(0, 3, 1, 2).to(self.device).float() / 127.5 - 1

    def _encode(self, images: torch.Tensor) -> torch.Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] as (B, S, C, h, w)."""
        if self.image_storage.moments:
            return self.autoencoder.moments(images)
        return self.autoencoder.encode(images).unsqueeze(1)

    def close(self, skipped: dict[str, int], origin: list) -> None:
        """Write the queued images, the index and corpus.json.

        Args:
            skipped: number of skipped samples by reason.
            origin: as `PrepareJob.origin`.
        """
        self._encode_waiting()
        self.tokens_file.close()
        self.latents_file.close()
        np.save(self.folder / "parts.npy", np.array(self.parts, np.int64).reshape(-1, 2))
        np.save(self.folder / "documents.npy", np.array(self.documents, np.int64))
        np.save(self.folder / "checks.npy", np.array(self.checks, np.uint32))
        facts = {
            "num_documents": self.num_documents,
            "num_tokens": self.num_tokens,
            "num_images": self.num_images,
            "num_cut": self.num_cut,
            "image_shape": self._image_shape(),
            "num_codes": self.autoencoder and self.autoencoder.num_codes,
            "latents": self.image_storage.to_json(),
            "files": list(self.files),
        }
        if self.latent_moments.num_values:
            facts["latent_moments"] = self.latent_moments.to_json()
            facts["pixel_moments"] = self.pixel_moments.to_json()
        if self.own_file:
            self.own_file.close()
            facts["folder"] = os.getcwd()
            locations = np.array(self.locations, np.int64).reshape(-1, 4)
            np.save(self.folder / "pictures.npy", locations)
        write_facts(self.folder, facts, skipped, origin)

    def _image_shape(self) -> tuple[int, int, int] | None:
        """(C, h, w) of the latents."""
        if self.image_size is None:
            return None
        width, height = (side // self.autoencoder.downsample for side in self.image_size)
        return self.autoencoder.latent_channels, height, width


def merge(shards: list[Path], folder: Path, origin: list) -> None:
    """Concatenate corpora into one, in little memory.

    Args:
        shards: folders of the corpora.
        folder: an empty folder for the result.
        origin: as `PrepareJob.origin`.

    Raises:
        UserError: the latents of the corpora differ in size.
    """
    facts = [json.loads((shard / "corpus.json").read_text()) for shard in shards]
    shapes = {tuple(fact["image_shape"]) for fact in facts if fact["image_shape"]}
    if len(shapes) > 1:
        raise UserError(f"the images have latents of several sizes ({shapes}); give one image_size")
    lazy = ImageStorageSpec.from_json(facts[0]["latents"]).lazy
    for name in ("tokens.bin", "latents.bin", *(["pictures.bin"] if lazy else [])):
        with (folder / name).open("wb") as whole:
            for shard in shards:
                with (shard / name).open("rb") as piece:
                    shutil.copyfileobj(piece, whole, 2**24)
    _merge_index(shards, facts, folder)
    if lazy:
        _merge_locations(shards, facts, folder)
    counts = ("num_documents", "num_tokens", "num_images")
    merged = {name: sum(fact[name] for fact in facts) for name in counts}
    merged["num_cut"] = sum(fact.get("num_cut", 0) for fact in facts)
    merged["image_shape"] = list(next(iter(shapes))) if shapes else None
    merged |= {name: facts[0][name] for name in ("num_codes", "latents")}
    for name in ("latent_moments", "pixel_moments"):
        measured = [fact for fact in facts if fact["num_images"]]
        if measured and all(name in fact for fact in measured):
            merged[name] = Moments.merge([fact[name] for fact in measured]).to_json()
    merged["files"] = [file for fact in facts for file in fact["files"]]
    merged |= {"folder": facts[0]["folder"]} if "folder" in facts[0] else {}
    skipped: Counter[str] = Counter()
    for fact in facts:
        skipped.update(fact["skipped"])
    write_facts(folder, merged, dict(skipped.most_common()), origin)


def _merge_index(shards: list[Path], facts: list[dict], folder: Path) -> None:
    """Concatenate checks.npy, parts.npy and documents.npy; positions are shifted."""
    checks = [np.load(shard / "checks.npy", mmap_mode="r") for shard in shards]
    np.save(folder / "checks.npy", np.concatenate(checks))
    num_parts = sum(map(len, checks))
    num_documents = sum(fact["num_documents"] for fact in facts)
    create = partial(np.lib.format.open_memmap, mode="w+", dtype=np.int64)
    documents = create(folder / "documents.npy", shape=(num_documents + 1,))
    if num_parts == 0:  # an empty file cannot be mapped
        np.save(folder / "parts.npy", np.empty((0, 2), np.int64))
        return
    parts = create(folder / "parts.npy", shape=(num_parts, 2))
    done: Counter[str] = Counter()
    for shard, fact in zip(shards, facts, strict=True):
        piece = np.load(shard / "parts.npy")
        shown = (piece[:, 1] == IMAGE) | (piece[:, 1] == CONTEXT_IMAGE)
        piece[:, 0] += np.where(shown, done["num_images"], done["num_tokens"])
        parts[done["parts"] : done["parts"] + len(piece)] = piece
        starts = np.load(shard / "documents.npy")[1:] + done["parts"]
        first = done["num_documents"] + 1
        documents[first : first + len(starts)] = starts
        done["parts"] += len(piece)
        done.update({k: fact[k] for k in ("num_documents", "num_tokens", "num_images")})


def _merge_locations(shards: list[Path], facts: list[dict], folder: Path) -> None:
    """Concatenate pictures.npy; file numbers and positions in pictures.bin are shifted."""
    locations, first_file, first_byte = [np.empty((0, 4), np.int64)], 0, 0
    for shard, fact in zip(shards, facts, strict=True):
        piece = np.load(shard / "pictures.npy")
        own = piece[:, 0] == OWN_FILE
        piece[:, 0] += np.where(own, 0, first_file)
        piece[:, 1] += np.where(own, first_byte, 0)
        locations.append(piece)
        first_file += len(fact["files"])
        first_byte += (shard / "pictures.bin").stat().st_size
    np.save(folder / "pictures.npy", np.concatenate(locations))


def write_facts(folder: Path, facts: dict, skipped: dict[str, int], origin: list) -> None:
    """Write corpus.json, the last file of a corpus."""
    facts = facts | {"skipped": skipped, "made_from": origin}
    (folder / "corpus.json").write_text(json.dumps(facts, indent=1))
