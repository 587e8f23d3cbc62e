"""Documents packed into rows of fixed length, the form in which text and images reach the model.

A document is a list of parts in any order: text (token ids) and images (latents, or the codes of a
VQ autoencoder). `pack` writes

    <bos> text <boi> patch ... patch <eoi> text <eos>

and puts several documents into each row, so that little is padded. `unpack` reverses it.

* Codes are tokens. Their ids follow the tokenizer's vocabulary and stand in place of the patches;
  each code and the <eoi> after the last one is a target (Chameleon).
* With `clean_copies`, an image that later parts read is written twice at the same positions: first
  noised, to be denoised and seen by itself only, then clean, for everything that follows (BAGEL).
  Generation does the same: the clean image replaces the noised one.
* A text token that is read but not a target, such as a question in a chat, is stored in its
  document as ~id, which is negative.
* Images of a batch may differ in resolution. They are sorted into resolution buckets, and latents
  are padded to the largest resolution.

Shapes: B rows, T positions in a row, M images in the batch, M' clean copies of some of them, P
patches (and time tokens) of all of these, C latent channels, h x w latent grid of one image, H x W
largest latent grid of the batch.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tf_lightning.diffusion.timesteps import row_generator, sample_timesteps

IGNORE_INDEX = -100

Part = Tensor
"""Text (L,) int64, with ~id for tokens that are not targets; latents (C, h, w) float32; pixels
(3, H, W) uint8, for a model that works on pixels; or codes (1, h, w) int64."""
Document = list[Part]
Row = list[Document]


class ResolutionBucket(NamedTuple):
    """The images of a batch that have one resolution, and their clean copies."""

    num_images: int
    num_copies: int
    height: int
    """h of the latents."""
    width: int
    """w of the latents."""


@dataclass
class Batch:
    """Packed rows. The index fields are computed here so that a GPU does not have to count."""

    input_ids: Tensor  # (B, T) ids of text and codes; 0 at patches and padding
    labels: Tensor  # (B, T) the next token, or IGNORE_INDEX
    positions: Tensor  # (B, T) position in the document, from 0
    document_ids: Tensor  # (B, T) from 0 in each row, -1 at padding
    image_ids: Tensor  # (B, T) index into `latents`; M and above for clean copies; -1 off patches
    patch_index: Tensor  # (P,) flat positions (b * T + t) of patches, by bucket, images then copies
    text_index: Tensor  # (B * T - P,) flat positions of everything else, including padding
    target_index: Tensor  # (K,) flat positions whose label is a text token
    code_index: Tensor  # (K',) flat positions whose label is a code or the <eoi> after the codes
    latents: Tensor  # (M, C, H, W) clean, unit variance; or codes (M, 1, H, W) int64
    noise: Tensor  # (M, C, H, W) standard normal; empty with codes
    t: Tensor  # (M,) noise level of each image in [0, 1), 0 = clean; empty with codes
    copied: Tensor  # (M',) index into `latents` of the image that each clean copy repeats
    source_ids: Tensor  # (B,) number of the data source that a row came from
    row_tokens: Tensor  # (B,) number of positions that are not padding
    buckets: list[ResolutionBucket] = field(default_factory=list)  # in the order of `latents`

    @property
    def num_images(self) -> int:
        """M, without synchronizing with the device."""
        return len(self.latents)

    @property
    def num_noised_elements(self) -> int:
        """Number of latent elements that are noised, without padding; 0 with codes."""
        pixels = sum(bucket.num_images * bucket.height * bucket.width for bucket in self.buckets)
        return pixels * self.noise.shape[1] if len(self.noise) else 0

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Copy the batch to a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """Copy the batch to pinned memory; DataLoader calls it."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}
        return dataclasses.replace(self, **{name: change(x) for name, x in tensors.items()})


# ---------------------------------------------------------------- parts of a document


def is_image(part: Part) -> bool:
    """Return whether a part is an image: images are (C, h, w), text is one-dimensional."""
    return part.ndim == 3


def is_codes(part: Part) -> bool:
    """Return whether a part is an image made of codes."""
    return is_image(part) and part.dtype == torch.long


def as_latents(image: Part) -> Part:
    """Scale uint8 pixels to [-1, 1]; return latents and codes unchanged."""
    return image.float().div_(127.5).sub_(1) if image.dtype == torch.uint8 else image


def unmasked_ids(text: Tensor) -> Tensor:
    """Token ids of a text (L,), with ~id replaced by id."""
    return torch.where(text < 0, ~text, text)


def num_patches(latents: Tensor, patch_size: int, time_token: bool = False) -> int:
    """Number of patches N of latents (..., h, w), including the time token if there is one."""
    height, width = latents.shape[-2:]
    return (height // patch_size) * (width // patch_size) + time_token


def document_length(document: Document, patch_size: int, time_token: bool = False) -> int:
    """Number of positions of a document in a row, including <bos>, <eos>, <boi> and <eoi>."""
    return 2 + sum(
        num_patches(part, patch_size, time_token) + 2 if is_image(part) else len(part)
        for part in document
    )


def max_noise_levels(document: Document, max_caption_t: float) -> list[float]:
    """Upper limit of t for each image of a document.

    An image before all text is the context of what follows: a caption, or the edited image of an
    edit. Its t stays below `max_caption_t`, so that it remains readable (Transfusion Sec. 4.3.4:
    500 of 1000 steps). The t of an image in a question, which is followed by text that is not a
    target, stays below it too. An image at the end of its document has no later part that reads
    it, and may have any t.
    """
    text = next((i for i, part in enumerate(document) if not is_image(part)), len(document) - 1)
    limits, asked = [], False
    for index, part in reversed(list(enumerate(document))):
        if is_image(part):
            limits.append(max_caption_t if index < text or asked else 1.0)
        else:
            asked = bool((part < 0).any())
    return limits[::-1]


def images_read_later(document: Document) -> list[bool]:
    """Return whether each image of a document has a part after it."""
    return [i + 1 < len(document) for i, part in enumerate(document) if is_image(part)]


# ---------------------------------------------------------------- packing


def pack(
    rows: list[Row],
    row_ids: list[int],
    *,
    tokenizer,
    row_length: int,
    patch_size: int,
    time_token: bool = False,
    seed: int = 0,
    max_caption_t: float = 0.5,
    clean_copies: bool = False,
    timestep_shift: float = 1.0,
    timestep_distribution: str = "uniform",
    source_ids: list[int] | None = None,
) -> Batch:
    """Pack rows of documents into a batch and sample the noise of their images.

    The noise and noise levels of a row are a function of (seed, row id) only. A document without
    text, whose caption was dropped for guidance, has no text targets.

    Args:
        rows: documents of each row; a row may be empty.
        row_ids: index of each row in the training stream.
        tokenizer: has bos_id, eos_id, boi_id and eoi_id, and with codes vocab_size.
        row_length: T; the documents of a row must fit.
        patch_size: side of a patch in latent pixels.
        time_token: add a position for the noise level before each image's patches.
        seed: seed of the run.
        max_caption_t: upper limit of t for images that precede all text of their document and are
            read by a later part, in (0, 1].
        clean_copies: later parts read a clean copy of each image, and no image has a limit on t.
        timestep_shift: see `sample_timesteps`.
        timestep_distribution: "uniform" or "logit_normal", see `sample_timesteps`.
        source_ids: number of the data source of each row; None: 0.

    Raises:
        ValueError: the documents of a row are longer than `row_length`.
    """
    writers, latents, noise, noise_levels = [], [], [], []
    copied: list[int] = []
    num_images = sum(is_image(part) for row in rows for document in row for part in document)
    for row, row_id in zip(rows, row_ids, strict=True):
        writer = _RowWriter(row_length, tokenizer, patch_size, time_token)
        limits: list[list[float]] = []
        for document_id, document in enumerate(row):
            first_copy = num_images + len(copied) if clean_copies else None
            writer.write(document, document_id, len(latents), first_copy)
            if clean_copies:
                read = images_read_later(document)
                copied += [len(latents) + i for i, is_read in enumerate(read) if is_read]
            latents += [as_latents(part) for part in document if is_image(part)]
            if not any(is_codes(part) for part in document):
                limits.append(max_noise_levels(document, 1.0 if clean_copies else max_caption_t))
        generator = row_generator(seed, row_id)
        noise_levels.append(
            sample_timesteps(limits, generator, timestep_shift, timestep_distribution)
        )
        noised = [x for x in latents[len(noise) :] if not is_codes(x)]
        noise += [torch.randn(x.shape, generator=generator) for x in noised]
        writers.append(writer)

    stacked = lambda name: torch.stack([getattr(writer, name) for writer in writers])  # noqa: E731
    flat_index = lambda where: where.flatten().nonzero().flatten()  # noqa: E731
    input_ids, labels, image_ids = map(stacked, ("input_ids", "labels", "image_ids"))
    buckets, order, ranks = group_by_resolution(latents, copied)
    image_ids = _renumber(image_ids, order)
    is_label = labels != IGNORE_INDEX
    before_text = precedes_text(input_ids, image_ids, tokenizer.boi_id)
    patches = flat_index(image_ids >= 0)
    by_rank = ranks[image_ids.flatten()[patches]].argsort(stable=True)
    images, copies = order[:num_images], order[num_images:] - num_images
    return Batch(
        input_ids=input_ids,
        labels=labels,
        positions=stacked("positions"),
        document_ids=stacked("document_ids"),
        image_ids=image_ids,
        patch_index=patches[by_rank],
        text_index=flat_index(image_ids < 0),
        target_index=flat_index(is_label & before_text),
        code_index=flat_index(is_label & ~before_text),
        latents=_stack_padded(latents, images),
        noise=_stack_padded(noise, images),
        t=torch.cat(noise_levels)[images] if noise else torch.cat(noise_levels),
        copied=_renumber(torch.tensor(copied, dtype=torch.long)[copies], order),
        source_ids=torch.tensor(source_ids or [0] * len(rows)),
        row_tokens=torch.tensor([writer.end for writer in writers]),
        buckets=buckets,
    )


class _RowWriter:
    """Fills one row with documents from left to right."""

    def __init__(self, row_length: int, tokenizer, patch_size: int, time_token: bool):
        self.tokenizer, self.patch_size, self.time_token = tokenizer, patch_size, time_token
        self.input_ids = torch.zeros(row_length, dtype=torch.long)
        self.labels = torch.full((row_length,), IGNORE_INDEX)
        self.positions = torch.zeros(row_length, dtype=torch.long)
        self.document_ids = torch.full((row_length,), -1)
        self.image_ids = torch.full((row_length,), -1)
        self.end = 0

    def write(
        self, document: Document, document_id: int, first_image: int, first_copy: int | None
    ) -> None:
        """Append a document; `first_image` and `first_copy` are as in `flatten_document`."""
        ids, image_ids, positions = flatten_document(
            document, self.tokenizer, self.patch_size, first_image, first_copy, self.time_token
        )
        written = slice(self.end, self.end + len(ids))
        if written.stop > len(self.input_ids):
            raise ValueError(
                f"documents of {written.stop} positions exceed row_length={len(self.input_ids)}"
            )
        self.input_ids[written] = unmasked_ids(ids)
        self.image_ids[written] = image_ids
        self.positions[written] = positions
        self.document_ids[written] = document_id
        labels = torch.cat([ids[1:], torch.full((1,), IGNORE_INDEX)])
        if not any(is_codes(part) for part in document):  # patches are not tokens
            labels[(ids == self.tokenizer.boi_id) | (image_ids >= 0)] = IGNORE_INDEX
        if all(is_image(part) for part in document):  # without a caption there is no text to learn
            labels[precedes_text(ids, image_ids, self.tokenizer.boi_id)] = IGNORE_INDEX
        labels[labels < 0] = IGNORE_INDEX  # ~id is read but not a target
        if ids[-2] < 0:  # a conversation that was cut inside a question does not end there
            labels[-2] = IGNORE_INDEX
        self.labels[written] = labels
        self.end = written.stop


def flatten_document(
    document: Document,
    tokenizer,
    patch_size: int,
    first_image: int = 0,
    first_copy: int | None = None,
    time_token: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, image ids and positions of a document, each (L,).

    Ids are 0 at patches and ~id at text tokens that are not targets.

    Args:
        document: its parts.
        tokenizer: see `pack`.
        patch_size: side of a patch in latent pixels.
        first_image: image id of the document's first image.
        first_copy: image id of its first clean copy; None: no copies.
        time_token: whether each image has a time token before its patches.
    """
    text = lambda *ids: (torch.tensor(ids), torch.full((len(ids),), -1))  # noqa: E731
    pieces, first = [text(tokenizer.bos_id)], first_copy
    for index, part in enumerate(document):
        if not is_image(part):
            pieces.append((part, torch.full((len(part),), -1)))
            continue
        length = num_patches(part, patch_size, time_token)
        ids = torch.zeros(length, dtype=torch.long)
        if is_codes(part):
            ids = tokenizer.vocab_size + part.flatten()
        patches = ids, torch.full((length,), first_image)
        pieces += [text(tokenizer.boi_id), patches]
        first_image += 1
        if first_copy is not None and index + 1 < len(document):
            pieces.append((patches[0], torch.full((length,), first_copy)))
            first_copy += 1
        pieces.append(text(tokenizer.eoi_id))
    pieces.append(text(tokenizer.eos_id))
    ids, image_ids = map(torch.cat, zip(*pieces, strict=True))
    positions = torch.arange(len(ids))
    if first_copy != first:  # a copy has the positions of its image
        is_copy = image_ids >= first
        starts = is_copy & (image_ids != image_ids.roll(1))
        lengths = image_ids[is_copy].unique_consecutive(return_counts=True)[1]
        positions -= torch.zeros_like(ids).masked_scatter(starts, lengths).cumsum(0)
    return ids, image_ids, positions


def precedes_text(ids: Tensor, image_ids: Tensor, boi_id: int) -> Tensor:
    """Mask of positions whose next token is text, shaped like `ids`; no <boi> and no image.

    Only these positions have LM targets in Transfusion: the output at <boi> would have to be a
    patch (footnote 8), and <eoi> is appended after an image without being predicted.
    """
    return (ids != boi_id) & (image_ids < 0)


# ---------------------------------------------------------------- unpacking


def unpack(batch: Batch, tokenizer) -> list[Document]:
    """Return the documents of a batch, row by row: the inverse of `pack`."""
    documents = []
    images = [image for part in crop_by_bucket(batch.latents, batch.buckets) for image in part]
    for ids, document_ids, image_ids in zip(
        batch.input_ids, batch.document_ids, batch.image_ids, strict=True
    ):
        for number in range(int(document_ids.max()) + 1):
            mine = document_ids == number
            documents.append(_parts(ids[mine], image_ids[mine], images, tokenizer))
    return documents


def _parts(ids: Tensor, image_ids: Tensor, latents: list[Tensor], tokenizer) -> Document:
    """Text and images of one document, without the special tokens that `pack` added."""
    document: Document = []
    text: list[int] = []
    specials = {tokenizer.boi_id, tokenizer.eoi_id}
    last_image = -1
    for token, image in zip(ids[1:-1].tolist(), image_ids[1:-1].tolist(), strict=True):
        if image < 0 and token not in specials:
            text.append(token)
        elif 0 <= image < len(latents) and image != last_image:  # clean copies are left out
            if text:
                document.append(torch.tensor(text))
            text, last_image = [], image
            document.append(latents[image])
    return document + ([torch.tensor(text)] if text else [])


# ---------------------------------------------------------------- resolution buckets


def group_by_resolution(
    images: list[Tensor], copied: list[int]
) -> tuple[list[ResolutionBucket], Tensor, Tensor]:
    """Sort images into buckets, smallest resolution first.

    Args:
        images: (C, h, w) each, in the order of the documents.
        copied: index of the image that each clean copy repeats.

    Returns:
        `buckets`.
        `order` (M + M',): permutation of images, then copies, by bucket. Copies count from M on.
        `ranks` (M + M',): sort key of each image's patches: bucket by bucket, images before copies.
    """
    shapes = [tuple(image.shape[-2:]) for image in images]
    resolutions = sorted(set(shapes))
    which = torch.tensor([resolutions.index(shape) for shape in shapes], dtype=torch.long)
    which_copied = which[torch.tensor(copied, dtype=torch.long)]
    order = [which.argsort(stable=True), len(images) + which_copied.argsort(stable=True)]
    ranks = torch.cat([2 * which.sort().values, 2 * which_copied.sort().values + 1])
    counts = [torch.bincount(x, minlength=len(resolutions)).tolist() for x in (which, which_copied)]
    buckets = [
        ResolutionBucket(*count, *shape) for *count, shape in zip(*counts, resolutions, strict=True)
    ]
    return buckets, torch.cat(order), ranks


def split_by_bucket(values: Tensor, buckets: list[ResolutionBucket]) -> list[Tensor]:
    """Split values of the images, (M, ...), by bucket; one part if there are no images."""
    return list(values.split([bucket.num_images for bucket in buckets])) if buckets else [values]


def crop_by_bucket(images: Tensor, buckets: list[ResolutionBucket]) -> list[Tensor]:
    """Split padded images (M, C, H, W) by bucket and crop the padding: (m, C, h, w) each."""
    if not buckets:
        return [images]
    parts = zip(split_by_bucket(images, buckets), buckets, strict=True)
    return [part[..., : bucket.height, : bucket.width] for part, bucket in parts]


def pad_images(images: Tensor, height: int, width: int) -> Tensor:
    """Pad images with zeros at the bottom and right, (..., h, w) -> (..., height, width)."""
    if images.shape[-2:] == (height, width):
        return images
    return F.pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]))


def _stack_padded(images: list[Tensor], order: Tensor) -> Tensor:
    """Images (C, h, w) in the given order, padded to the largest, (M, C, H, W)."""
    if not images:
        return torch.empty(0, 1, 1, 1)
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    return torch.stack([pad_images(images[index], height, width) for index in order.tolist()])


def _renumber(ids: Tensor, order: Tensor) -> Tensor:
    """Replace indices of images and copies by their index in `order`; -1 stays -1."""
    places = torch.cat([order.argsort(), torch.tensor([-1])])  # the last entry is found at -1
    return places[ids]
