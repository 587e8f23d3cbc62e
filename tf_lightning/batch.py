"""Documents packed into rows: the one form in which text and images reach the model.

A document is a list of parts in any order: text (token ids) and images (latents, or the codes of a
VQ autoencoder). Packing writes
    <bos> text <boi> patch ... patch <eoi> text <eos>
one document after another into rows of fixed length, so nothing is padded to the longest.

Codes are tokens: in the place of patches stand their ids, behind the tokenizer's vocabulary, and
each is to be predicted, and <eoi> after them (Chameleon).

With `clean_copies`, an image that a later part reads stands twice in a row, at the same positions:
noised, to be denoised and seen by itself alone, then clean, for all that follows (BAGEL). At
generation, too, the clean image takes the noised one's place.

A text's token that is read and not learned (a question of a chat) stands in its document as ~id,
which is negative: it is no target.

Images may differ in size: those of a size stand together, and latents are padded to the largest.

Shapes: B rows, T places a row, M images in the batch, M' clean copies, P patches (and time tokens)
of all of these, C x h x w latents.

Images of several sizes in one batch: those of a size stand together and are computed together.

Shapes: M images, M' clean copies of some of them, C x h x w latents of an image, C x H x W of all.

A batch read back: the documents that were packed into it.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tf_lightning.diffusion.timesteps import row_generator, sample_timesteps


class Size(NamedTuple):
    """How many images of a batch have one size, and how many clean copies of these there are."""

    images: int
    copies: int
    height: int
    width: int


def sizes_of(images: list[Tensor], copied: list[int]) -> tuple[list[Size], Tensor, Tensor]:
    """The sizes of a batch's images, and the order in which those of a size stand together.

    Args:
        images: as they are read, each (C, h, w).
        copied: which of them a clean copy follows, in that order.

    Returns:
        The sizes, smallest first; which image, or from M on which copy, comes at each place of that
        order, (M + M',); and for each place when its patches have their turn, (M + M',): size by
        size, of each first the images, then the copies.
    """
    shapes = [tuple(image.shape[-2:]) for image in images]
    found = sorted(set(shapes))
    which = torch.tensor([found.index(shape) for shape in shapes], dtype=torch.long)
    which_copied = which[torch.tensor(copied, dtype=torch.long)]
    order = [which.argsort(stable=True), len(images) + which_copied.argsort(stable=True)]
    turns = torch.cat([2 * which.sort().values, 2 * which_copied.sort().values + 1])
    counts = [torch.bincount(x, minlength=len(found)).tolist() for x in (which, which_copied)]
    sizes = [Size(*count, *shape) for *count, shape in zip(*counts, found, strict=True)]
    return sizes, torch.cat(order), turns


def renumber(ids: Tensor, order: Tensor) -> Tensor:
    """Numbers of images and copies, as places in `order`; -1 stays what it is."""
    places = torch.cat([order.argsort(), torch.tensor([-1])])  # what stands last is found at -1
    return places[ids]


def stack(images: list[Tensor], order: Tensor) -> Tensor:
    """Images (C, h, w) in an order, (M, C, H, W), zeros below and to the right of smaller ones."""
    if not images:
        return torch.empty(0, 1, 1, 1)
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    return torch.stack([pad(images[place], height, width) for place in order.tolist()])


def pad(images: Tensor, height: int, width: int) -> Tensor:
    """(..., h, w) -> (..., H, W)."""
    if images.shape[-2:] == (height, width):
        return images
    return F.pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]))


def split(values: Tensor, sizes: list[Size]) -> list[Tensor]:
    """Values of the images, (M, ...), of those of each size; all as one where there are none."""
    return list(values.split([size.images for size in sizes])) if sizes else [values]


def by_size(images: Tensor, sizes: list[Size]) -> list[Tensor]:
    """Padded images (M, C, H, W) -> those of each size, (m, C, h, w)."""
    if not sizes:
        return [images]
    parts = zip(split(images, sizes), sizes, strict=True)
    return [part[..., : size.height, : size.width] for part, size in parts]


IGNORE_INDEX = -100

# Text (L,) int64, ~id where it is not learned; latents (C, h, w) float32, or the pixels that they
# are, (3, H, W) uint8; or codes (1, h, w) int64.
Part = Tensor
Document = list[Part]
Row = list[Document]


@dataclass
class Batch:
    """Packed rows; every field that a GPU would have to count (`*_index`) is counted here."""

    input_ids: Tensor  # (B, T) ids of text and codes; 0 at patches and padding
    labels: Tensor  # (B, T) the next token, IGNORE_INDEX where there is none
    positions: Tensor  # (B, T) place in the document, from 0
    document_ids: Tensor  # (B, T) from 0 in each row, -1 at padding
    image_ids: Tensor  # (B, T) index into `latents`, then clean copies from M on; -1 off patches
    patch_index: Tensor  # (P,) flat places (b * T + t) of patches: by size, images before copies
    text_index: Tensor  # (B * T - P,) and of all other positions, padding too
    target_index: Tensor  # (K,) flat places whose label is of text
    code_index: Tensor  # (K',) flat places whose label is of an image: a code, or the <eoi> behind
    latents: Tensor  # (M, C, h, w) clean, unit variance; or codes (M, 1, h, w) int64
    noise: Tensor  # (M, C, h, w) standard normal; none of codes
    t: Tensor  # (M,) noise level of each image, 0 = clean, < 1; none of codes
    copied: Tensor  # (M',) images that a clean copy follows
    source_ids: Tensor  # (B,) which corpus a row came from
    row_tokens: Tensor  # (B,) positions that are not padding
    sizes: list[Size] = field(default_factory=list)  # of images, in their order

    @property
    def num_images(self) -> int:
        """M, without asking the device."""
        return len(self.latents)

    @property
    def num_noised(self) -> int:
        """Elements of latents that are noised, padding left out; without asking the device."""
        pixels = sum(size.images * size.height * size.width for size in self.sizes)
        return pixels * self.noise.shape[1] if len(self.noise) else 0

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The same batch in pinned memory; called by DataLoader."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}
        return dataclasses.replace(self, **{name: change(x) for name, x in tensors.items()})


def is_image(part: Part) -> bool:
    """Images are (C, h, w); text is one-dimensional."""
    return part.ndim == 3


def is_codes(part: Part) -> bool:
    """Whether an image is made of codes."""
    return is_image(part) and part.dtype == torch.long


def as_latents(image: Part) -> Part:
    """Pixels in [-1, 1]; latents and codes as they are."""
    return image.float().div_(127.5).sub_(1) if image.dtype == torch.uint8 else image


def plain_ids(text: Tensor) -> Tensor:
    """The ids of a text (L,), learned or not."""
    return torch.where(text < 0, ~text, text)


def num_patches(latents: Tensor, patch_size: int, time_token: bool = False) -> int:
    """N of one image of latents (..., h, w), its time token counted."""
    height, width = latents.shape[-2:]
    return (height // patch_size) * (width // patch_size) + time_token


def document_length(document: Document, patch_size: int, time_token: bool = False) -> int:
    """Positions a document takes in a row: its parts, <boi> and <eoi>, <bos> and <eos>."""
    return 2 + sum(
        num_patches(part, patch_size, time_token) + 2 if is_image(part) else len(part)
        for part in document
    )


def max_times(document: Document, max_caption_t: float) -> list[float]:
    """Largest noise level of each image of a document.

    An image that a later text describes and no earlier text announces is kept readable: t stays
    below `max_caption_t` (Transfusion Sec. 4.3.4: 500 of 1000 steps).
    """
    texts = [index for index, part in enumerate(document) if not is_image(part)]
    return [
        max_caption_t if texts and index < texts[0] else 1.0
        for index, part in enumerate(document)
        if is_image(part)
    ]


def are_read(document: Document) -> list[bool]:
    """Which images of a document have a part after them."""
    return [i + 1 < len(document) for i, part in enumerate(document) if is_image(part)]


class _RowWriter:
    """Fills one row from the left."""

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
        """Append a document; what is numbered, and what None is, says `flatten`."""
        ids, image_ids, positions = flatten(
            document, self.tokenizer, self.patch_size, first_image, first_copy, self.time_token
        )
        place = slice(self.end, self.end + len(ids))
        if place.stop > len(self.input_ids):
            raise ValueError(
                f"documents of {place.stop} positions exceed row_length={len(self.input_ids)}"
            )
        self.input_ids[place] = plain_ids(ids)
        self.image_ids[place] = image_ids
        self.positions[place] = positions
        self.document_ids[place] = document_id
        labels = torch.cat([ids[1:], torch.full((1,), IGNORE_INDEX)])
        if not any(is_codes(part) for part in document):  # a patch is no label
            labels[(ids == self.tokenizer.boi_id) | (image_ids >= 0)] = IGNORE_INDEX
        if all(is_image(part) for part in document):  # no caption, no text to learn
            labels[of_text(ids, image_ids, self.tokenizer.boi_id)] = IGNORE_INDEX
        labels[labels < 0] = IGNORE_INDEX  # ~id: read, not learned
        self.labels[place] = labels
        self.end = place.stop


def flatten(
    document: Document,
    tokenizer,
    patch_size: int,
    first_image: int = 0,
    first_copy: int | None = None,
    time_token: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """A document's ids, image ids and positions, each (L,).

    The ids are 0 at patches of latents, ~id where a text is not learned.

    Images are numbered from `first_image`, their clean copies from `first_copy`, None: no copies.
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
    if first_copy != first:  # each copy goes back to where its image began
        is_copy = image_ids >= first
        begins = is_copy & (image_ids != image_ids.roll(1))
        lengths = image_ids[is_copy].unique_consecutive(return_counts=True)[1]
        positions -= torch.zeros_like(ids).masked_scatter(begins, lengths).cumsum(0)
    return ids, image_ids, positions


def of_text(ids: Tensor, image_ids: Tensor, boi_id: int) -> Tensor:
    """Where what comes next is text, like `ids`: not behind <boi>, nor on an image.

    Transfusion's LM targets are these alone: the output at <boi> would have to be a patch (footnote
    8), and <eoi> is appended, never predicted.
    """
    return (ids != boi_id) & (image_ids < 0)


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
    """Pack rows of documents and draw their noise, a function of (seed, row id) alone.

    A document without text (its caption was dropped for guidance) has no targets of text.

    Args:
        rows: documents of each row; a row may be empty.
        row_ids: the rows' places in the endless stream.
        tokenizer: anything with bos_id, eos_id, boi_id, eoi_id; with codes, vocab_size too.
        row_length: T; the documents of a row must fit.
        patch_size: side of a patch in latent pixels.
        time_token: a position for the noise level before each image's patches.
        seed: the run's seed.
        max_caption_t: noise limit of images that precede their text, in (0, 1].
        clean_copies: later parts read a clean copy of each image, which then has no limit.
        timestep_shift: of the noise levels, see `sample_timesteps`.
        timestep_distribution: of the noise levels, "uniform" or "logit_normal".
        source_ids: which corpus each row came from.
    """
    writers, latents, noise, times = [], [], [], []
    copied: list[int] = []
    num_images = sum(is_image(part) for row in rows for document in row for part in document)
    for row, row_id in zip(rows, row_ids, strict=True):
        writer = _RowWriter(row_length, tokenizer, patch_size, time_token)
        limits: list[float] = []
        for document_id, document in enumerate(row):
            first_copy = num_images + len(copied) if clean_copies else None
            writer.write(document, document_id, len(latents), first_copy)
            if clean_copies:
                copied += [len(latents) + i for i, read in enumerate(are_read(document)) if read]
            latents += [as_latents(part) for part in document if is_image(part)]
            if not any(is_codes(part) for part in document):
                limits += max_times(document, 1.0 if clean_copies else max_caption_t)
        generator = row_generator(seed, row_id)
        times.append(sample_timesteps(limits, generator, timestep_shift, timestep_distribution))
        drawn = [x for x in latents[len(noise) :] if not is_codes(x)]
        noise += [torch.randn(x.shape, generator=generator) for x in drawn]
        writers.append(writer)
    of_rows = lambda name: torch.stack([getattr(writer, name) for writer in writers])  # noqa: E731
    places = lambda where: where.flatten().nonzero().flatten()  # noqa: E731
    input_ids, labels, image_ids = map(of_rows, ("input_ids", "labels", "image_ids"))
    sizes, order, ranks = sizes_of(latents, copied)
    image_ids = renumber(image_ids, order)
    is_label, is_text = labels != IGNORE_INDEX, of_text(input_ids, image_ids, tokenizer.boi_id)
    patches = places(image_ids >= 0)
    by_rank = ranks[image_ids.flatten()[patches]].argsort(stable=True)
    images, copies = order[:num_images], order[num_images:] - num_images
    return Batch(
        input_ids=input_ids,
        labels=labels,
        positions=of_rows("positions"),
        document_ids=of_rows("document_ids"),
        image_ids=image_ids,
        patch_index=patches[by_rank],
        text_index=places(image_ids < 0),
        target_index=places(is_label & is_text),
        code_index=places(is_label & ~is_text),
        latents=stack(latents, images),
        noise=stack(noise, images),
        t=torch.cat(times)[images] if noise else torch.cat(times),
        copied=renumber(torch.tensor(copied, dtype=torch.long)[copies], order),
        source_ids=torch.tensor(source_ids or [0] * len(rows)),
        row_tokens=torch.tensor([writer.end for writer in writers]),
        sizes=sizes,
    )


def unpack(batch: Batch, tokenizer) -> list[Document]:
    """The documents of a batch, row by row: the inverse of `pack`."""
    documents = []
    images = [image for part in by_size(batch.latents, batch.sizes) for image in part]
    for ids, document_ids, image_ids in zip(
        batch.input_ids, batch.document_ids, batch.image_ids, strict=True
    ):
        for number in range(int(document_ids.max()) + 1):
            mine = document_ids == number
            documents.append(_parts(ids[mine], image_ids[mine], images, tokenizer))
    return documents


def _parts(ids: Tensor, image_ids: Tensor, latents: list[Tensor], tokenizer) -> Document:
    """Text and images of one document, without the ids that pack added."""
    document: Document = []
    text: list[int] = []
    specials = {tokenizer.boi_id, tokenizer.eoi_id}
    last_image = -1
    for token, image in zip(ids[1:-1].tolist(), image_ids[1:-1].tolist(), strict=True):
        if image < 0 and token not in specials:
            text.append(token)
        elif 0 <= image < len(latents) and image != last_image:  # not the clean copies
            if text:
                document.append(torch.tensor(text))
            text, last_image = [], image
            document.append(latents[image])
    return document + ([torch.tensor(text)] if text else [])
