"""Documents written as a corpus: text tokenised, long text cut where rows end, pictures encoded."""

import json
import shutil
import zlib
from array import array
from collections import Counter
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tf_lightning.data.corpus.reader import IMAGE, STORED_CODES, STORED_LATENTS, Latents, seed_of
from tf_lightning.data.documents import BadSample, ContextText, RawDocument, TurnText
from tf_lightning.data.images import CENTER, CROP_POSITIONS, byte_range, load_image
from tf_lightning.errors import UserError
from tf_lightning.tokenizer.tokenizer import Tokenizer

PICTURES_AT_ONCE = 64


class CorpusWriter:
    """Writes the files of a corpus; pictures wait until there are enough to encode at once.

    Args:
        folder: empty.
        tokenizer: for the texts.
        autoencoder: for the pictures; None where there are none.
        row_length: positions in a row, which no document exceeds.
        patch_size: side of a patch in latent pixels.
        time_token: each picture takes one position more.
        latents: what is kept of each picture.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        autoencoder,
        row_length: int,
        patch_size: int,
        time_token: bool = False,
        latents: Latents = Latents(),  # noqa: B008 - it is frozen
    ):
        self.folder, self.tokenizer, self.autoencoder = folder, tokenizer, autoencoder
        self.row_length, self.patch_size = row_length, patch_size
        self.time_token, self.latents = time_token, latents
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if autoencoder:
            autoencoder.to(self.device)
        self.parts, self.documents = array("q"), array("q", [0])
        self.num_tokens = self.num_images = 0
        self.picture_size: tuple[int, int] | None = None  # width, height
        self.checks = array("I")  # CRC-32 of each part, or what it begins with
        self.waiting: list[tuple[Image.Image, int]] = []  # pictures, and which parts they are
        self.files: dict[str, int] = {}  # numbers of the files that pictures in place lie in
        self.places = array("q")
        self.tokens_file = (folder / "tokens.bin").open("wb")
        self.latents_file = (folder / "latents.bin").open("wb")
        self.pictures_file = (folder / "pictures.bin").open("wb") if latents.in_place else None

    @property
    def num_documents(self) -> int:
        """Written so far."""
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
            ids = self.tokenizer.encode(text)
        except (UnicodeError, RuntimeError) as error:  # half of a surrogate pair, from JSON
            raise BadSample("text is not Unicode") from error
        if isinstance(text, TurnText):
            ids.append(self.tokenizer.eos_id)
        return [~token for token in ids] if isinstance(text, ContextText) else ids

    def _check_pictures(self, pictures: list[Image.Image]) -> int:
        """Positions of one picture; all pictures of a corpus have one size."""
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
        kept, drawn = self.latents, any("file" not in picture.info for picture in pictures)
        if drawn and (kept.in_place or kept.crops > 1):
            raise UserError(
                "in_place and crops need pictures that are read from files, and these are not; "
                "give in_place: false and crops: 1"
            )
        if any(picture.size != self.picture_size for picture in pictures):
            raise BadSample("picture of another size than the first")
        return (size[0] // pixels) * (size[1] // pixels) + self.time_token

    def _write(self, parts: list[list[int] | Image.Image]) -> None:
        for place, part in enumerate(parts):
            self.checks.append(seed_of(place, len(parts)))
            if isinstance(part, list):
                tokens = np.array(part, np.int32)
                tokens.tofile(self.tokens_file)
                self._check(-1, tokens)
                self.parts.extend((self.num_tokens, len(part)))
                self.num_tokens += len(part)
            else:
                self.parts.extend((self.num_images, IMAGE))
                self.num_images += 1
                self._take(part)
        self.documents.append(len(self.parts) // 2)
        if len(self.waiting) >= PICTURES_AT_ONCE:
            self._encode_waiting()

    def _check(self, part: int, content: bytes | np.ndarray) -> None:
        self.checks[part] = zlib.crc32(content, self.checks[part])

    def _take(self, picture: Image.Image) -> None:
        if not self.latents.in_place:
            self.waiting.append((picture, len(self.checks) - 1))
            return
        from tf_lightning.data.corpus.reader import OWN, read_alike

        file = picture.info["file"]
        content = file.read_bytes() if isinstance(file, Path) else file
        self._check(-1, content)
        if place := byte_range(file):
            path, offset, size = place
            number = self.files.setdefault(path, len(self.files))
        else:
            number, offset, size = OWN, self.pictures_file.tell(), len(content)
            self.pictures_file.write(content)
        self.places.extend((number, offset, size, read_alike(picture, content)))

    @torch.no_grad()
    def _encode_waiting(self) -> None:
        if self.waiting:
            views = [self._images(crop) for crop in CROP_POSITIONS[: self.latents.crops]]
            if self.latents.mirrored:
                views += [images.flip(-1) for images in views]
            latents = torch.stack([self._encode(view) for view in views], 1)  # (B, V, S, C, h, w)
            stored, _ = STORED_CODES if self.autoencoder.num_codes else STORED_LATENTS
            kept = latents.cpu().numpy().astype(stored)
            kept.tofile(self.latents_file)
            for (_, part), content in zip(self.waiting, kept, strict=True):
                self._check(part, content)
            self.waiting.clear()

    def _images(self, crop: float) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1], of those that wait."""
        pictures = [picture for picture, _ in self.waiting]
        if crop != CENTER:
            pictures = [load_image(p.info["file"], self.picture_size[0], crop) for p in pictures]
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
        return pixels.permute(0, 3, 1, 2).to(self.device).float() / 127.5 - 1

    def _encode(self, images: torch.Tensor) -> torch.Tensor:
        """(B, S, C, h, w) of pictures (B, 3, H, W)."""
        if self.latents.moments:
            return self.autoencoder.moments(images)
        return self.autoencoder.encode(images).unsqueeze(1)

    def close(self, skipped: dict[str, int], origin: list) -> None:
        """Write what is left, and the facts."""
        self._encode_waiting()
        self.tokens_file.close()
        self.latents_file.close()
        np.save(self.folder / "parts.npy", np.array(self.parts, np.int64).reshape(-1, 2))
        np.save(self.folder / "documents.npy", np.array(self.documents, np.int64))
        np.save(self.folder / "checks.npy", np.array(self.checks, np.uint32))
        counts = {
            "num_documents": self.num_documents,
            "num_tokens": self.num_tokens,
            "num_images": self.num_images,
            "image_shape": self._image_shape(),
            "num_codes": self.autoencoder and self.autoencoder.num_codes,
            "latents": asdict(self.latents),
            "files": list(self.files),
        }
        if self.pictures_file:
            self.pictures_file.close()
            np.save(self.folder / "pictures.npy", np.array(self.places, np.int64).reshape(-1, 4))
        write_facts(self.folder, counts, skipped, origin)

    def _image_shape(self) -> tuple[int, int, int] | None:
        if self.picture_size is None:
            return None
        width, height = (side // self.autoencoder.downsample for side in self.picture_size)
        return self.autoencoder.latent_channels, height, width


def merge(shards: list[Path], folder: Path, origin: list) -> None:
    """Write the corpus that has the documents of several, one after another; memory stays small.

    Raises:
        UserError: their latents differ in size.
    """
    facts = [json.loads((shard / "corpus.json").read_text()) for shard in shards]
    shapes = {tuple(fact["image_shape"]) for fact in facts if fact["image_shape"]}
    if len(shapes) > 1:
        raise UserError(f"pictures have latents of several sizes ({shapes}); give one image_size")
    in_place = facts[0]["latents"]["in_place"]
    for name in ("tokens.bin", "latents.bin", *(["pictures.bin"] if in_place else [])):
        with (folder / name).open("wb") as whole:
            for shard in shards:
                with (shard / name).open("rb") as piece:
                    shutil.copyfileobj(piece, whole, 2**24)
    total: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    sizes = [len(np.load(shard / "parts.npy", mmap_mode="r")) for shard in shards]
    num_documents = sum(fact["num_documents"] for fact in facts)
    create = partial(np.lib.format.open_memmap, mode="w+", dtype=np.int64)
    parts = create(folder / "parts.npy", shape=(sum(sizes), 2)) if sum(sizes) else None
    documents = create(folder / "documents.npy", shape=(num_documents + 1,))
    checks = [np.load(shard / "checks.npy", mmap_mode="r") for shard in shards]
    np.save(folder / "checks.npy", np.concatenate(checks))
    for shard, fact in zip(shards, facts, strict=True):
        if fact["num_documents"]:
            piece = np.load(shard / "parts.npy")
            piece[:, 0] += np.where(piece[:, 1] == IMAGE, total["num_images"], total["num_tokens"])
            first, count = total["num_documents"], fact["num_documents"]
            parts[total["parts"] : total["parts"] + len(piece)] = piece
            starts = np.load(shard / "documents.npy")[1:] + total["parts"]
            documents[first + 1 : first + 1 + count] = starts
            total["parts"] += len(piece)
        total.update({k: fact[k] for k in ("num_documents", "num_tokens", "num_images")})
        skipped.update(fact["skipped"])
    if parts is None:
        np.save(folder / "parts.npy", np.empty((0, 2), np.int64))
    counts = {k: total[k] for k in ("num_documents", "num_tokens", "num_images")}
    shape = list(next(iter(shapes))) if shapes else None
    files = [file for fact in facts for file in fact["files"]]
    told = {"image_shape": shape} | {k: facts[0][k] for k in ("num_codes", "latents")}
    told["files"] = files
    if in_place:
        merge_places(shards, facts, folder)
    write_facts(folder, counts | told, dict(skipped.most_common()), origin)


def merge_places(shards: list[Path], facts: list[dict], folder: Path) -> None:
    """Write where the pictures of several corpora are, files numbered one after another."""
    from tf_lightning.data.corpus.reader import OWN

    places, first_file, first_byte = [np.empty((0, 4), np.int64)], 0, 0
    for shard, fact in zip(shards, facts, strict=True):
        piece = np.load(shard / "pictures.npy")
        own = piece[:, 0] == OWN
        piece[:, 0] += np.where(own, 0, first_file)
        piece[:, 1] += np.where(own, first_byte, 0)
        places.append(piece)
        first_file += len(fact["files"])
        first_byte += (shard / "pictures.bin").stat().st_size
    np.save(folder / "pictures.npy", np.concatenate(places))


def write_facts(folder: Path, counts: dict, skipped: dict[str, int], origin: list) -> None:
    """Write corpus.json, last of all."""
    facts = counts | {"skipped": skipped, "made_from": origin}
    (folder / "corpus.json").write_text(json.dumps(facts, indent=1))
