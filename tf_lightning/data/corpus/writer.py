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
from tf_lightning.data.buckets import Size
from tf_lightning.data.corpus.damage import checksum_seed
from tf_lightning.data.corpus.image_storage import STORED_CODES, STORED_LATENTS, ImageStorageSpec
from tf_lightning.data.corpus.lazy_images import OWN_FILE, decodes_alike
from tf_lightning.data.corpus.parts import ALTERNATIVE, CONTEXT_IMAGE, IMAGE
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
        image_storage: the form in which images are stored.
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
        self.image_size: Size | None = None  # of the first image, in pixels
        # Number of images of each (h, w) of the latents, and rows of shapes.npy.
        self.image_shapes: Counter[tuple[int, int]] = Counter()
        self.shapes, self.num_positions = array("q"), 0
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
        self._check_images(images)
        if 2 + sum(map(self._length, parts)) <= self.row_length:
            self._write(parts)
            return
        is_chat = any(isinstance(part, ContextText) for part in raw)
        is_edit = len(parts) == 3 and len(images) == 2
        longest = max(map(self._length, images))
        if len(parts) < 3 or is_edit or is_chat or 2 + longest > self.row_length:
            raise BadSample(f"longer than a row of {self.row_length} tokens")
        self.num_cut += 1
        for piece in self._cut(parts):
            self._write(piece)

    def _length(self, part: EncodedPart) -> int:
        """Count the positions of a part, of its longest wording."""
        return max(map(len, part)) if isinstance(part, list) else self._num_patches(part) + 2

    def _num_patches(self, image: Image.Image) -> int:
        """Count the positions of an image's patches and of its time token."""
        pixels = self.autoencoder.downsample * self.patch_size
        return (image.width // pixels) * (image.height // pixels) + self.time_token

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

    def _check_images(self, images: list[Image.Image]) -> None:
        """Check the images of a document."""
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
        limit = self.image_storage.max_aspect_ratio
        if limit == 1 and any(image.size != self.image_size for image in images):
            raise BadSample("image of another size than the first")
        if any(side % pixels for image in images for side in image.size):
            raise BadSample(f"image whose sides are not multiples of {pixels} pixels")
        if limit > 1 and any(max(i.size) / min(i.size) > limit for i in images):
            raise BadSample(f"image of an aspect ratio above {limit:g}")

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
        """Record the shape of the last part, and queue it for encoding or record its file."""
        width, height = (side // self.autoencoder.downsample for side in image.size)
        self.image_shapes[height, width] += 1
        if self.image_storage.has_shapes:
            shape = height, width, self._num_patches(image)
            self.shapes.extend((self.num_positions, *shape))
            self._update_check(-1, np.array(shape, np.int64))
        self.num_positions += height * width
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
        """Encode the queued images, together for each size, and append them in order."""
        sizes = [image.size for image, _ in self.waiting]
        encoded: dict[int, np.ndarray] = {}
        for size in dict.fromkeys(sizes):
            alike = [index for index, other in enumerate(sizes) if other == size]
            encoded |= zip(alike, self._encode_alike(alike), strict=True)
        for index, (_, part) in enumerate(self.waiting):
            encoded[index].tofile(self.latents_file)
            self._update_check(part, encoded[index])
        self.waiting.clear()

    def _encode_alike(self, indices: list[int]) -> np.ndarray:
        """Encode queued images of one size as they are stored, (B, V, S, C, h, w)."""
        views = [self._pixels(indices, crop) for crop in CROP_POSITIONS[: self.image_storage.crops]]
        if self.image_storage.hflip:
            views += [images.flip(-1) for images in views]
        latents = torch.stack([self._encode(view) for view in views], 1)
        if self.autoencoder.unit_variance:
            self._check_latents(indices, views[0], latents)
        stored_dtype, _ = STORED_CODES if self.autoencoder.num_codes else STORED_LATENTS
        return latents.cpu().numpy().astype(stored_dtype)

    def _check_latents(
        self, indices: list[int], pixels: torch.Tensor, latents: torch.Tensor
    ) -> None:
        """Measure queued images, (B, 3, H, W), and their latents, (B, V, S, C, h, w).

        Raises:
            UserError: a latent is not finite, or those of the first images are far from unit
                variance.
        """
        check_latents(latents, lambda place: self._image_name(indices[place]))
        is_first = not self.latent_moments.num_values
        self.latent_moments.update(latents[:, 0, 0])
        self.pixel_moments.update(pixels)
        if is_first and len(indices) >= MIN_IMAGES:
            check_std(self.latent_moments, self.pixel_moments, len(indices), warn=False)

    def _image_name(self, index: int) -> str:
        """Return the name of a queued image in a message: its number and its file, if any."""
        number = self.num_images - len(self.waiting) + index
        place = byte_range(self.waiting[index][0].info.get("file"))
        path, offset, _ = place or ("", 0, 0)
        file = f" (byte {offset:,} of {path})" if offset else f" ({path})" if path else ""
        return f"image {number:,}{file}"

    def _pixels(self, indices: list[int], crop: float) -> torch.Tensor:
        """Stack a crop of queued images of one size, (B, 3, H, W) in [-1, 1]."""
        images = [self.waiting[index][0] for index in indices]
        if crop != CENTER:
            images = [load_image(i.info["file"], [i.size], crop) for i in images]
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
            **shape_facts(self._latent_shapes(), self.image_storage.has_shapes),
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
        if self.image_storage.has_shapes:
            shapes = np.array(self.shapes, np.int64).reshape(-1, 4)
            np.save(self.folder / "shapes.npy", shapes)
        write_facts(self.folder, facts, skipped, origin)

    def _latent_shapes(self) -> Counter[tuple[int, int, int]]:
        """Number of images of each (C, h, w) of the latents."""
        shapes = self.image_shapes.items()
        return Counter({(self.autoencoder.latent_channels, *size): n for size, n in shapes})


def shape_facts(shapes: Counter[tuple[int, int, int]], has_shapes: bool) -> dict:
    """Return the entries of corpus.json about the shapes of the images.

    Args:
        shapes: number of images of each (C, h, w) of the latents.
        has_shapes: whether images may differ in shape.
    """
    common = max(shapes, key=lambda shape: (shapes[shape], shape), default=None)
    facts: dict = {"image_shape": common and list(common)}
    if has_shapes:
        facts["image_shapes"] = [[*shape, shapes[shape]] for shape in sorted(shapes)]
    return facts


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
    storage = ImageStorageSpec.from_json(facts[0]["latents"])
    shapes: Counter[tuple[int, int, int]] = Counter()
    for fact in facts:
        one = [[*fact["image_shape"], fact["num_images"]]] if fact["image_shape"] else []
        for *shape, count in fact.get("image_shapes", one):
            shapes[tuple(shape)] += count
    if len(shapes) > 1 and not storage.has_shapes:
        raise UserError(
            f"the images have latents of several sizes ({set(shapes)}); give one image_size"
        )
    lazy = storage.lazy
    for name in ("tokens.bin", "latents.bin", *(["pictures.bin"] if lazy else [])):
        with (folder / name).open("wb") as whole:
            for shard in shards:
                with (shard / name).open("rb") as piece:
                    shutil.copyfileobj(piece, whole, 2**24)
    _merge_index(shards, facts, folder)
    if lazy:
        _merge_locations(shards, facts, folder)
    if storage.has_shapes:
        _merge_shapes(shards, folder)
    counts = ("num_documents", "num_tokens", "num_images")
    merged = {name: sum(fact[name] for fact in facts) for name in counts}
    merged["num_cut"] = sum(fact.get("num_cut", 0) for fact in facts)
    merged |= shape_facts(shapes, storage.has_shapes)
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


def _merge_shapes(shards: list[Path], folder: Path) -> None:
    """Concatenate shapes.npy; the positions before each image are shifted."""
    merged, before = [np.empty((0, 4), np.int64)], 0
    for shard in shards:
        piece = np.load(shard / "shapes.npy")
        piece[:, 0] += before
        merged.append(piece)
        if len(piece):
            before = int(piece[-1, 0] + piece[-1, 1] * piece[-1, 2])
    np.save(folder / "shapes.npy", np.concatenate(merged))


def write_facts(folder: Path, facts: dict, skipped: dict[str, int], origin: list) -> None:
    """Write corpus.json, the last file of a corpus."""
    facts = facts | {"skipped": skipped, "made_from": origin}
    (folder / "corpus.json").write_text(json.dumps(facts, indent=1))
