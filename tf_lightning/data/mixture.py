"""`Mixture`, the data module of text and images: several sources, with given shares of the tokens.

It opens or trains the tokenizer, prepares a corpus for each source and split, and serves packed
rows: an endless stream for training, each document once for validation.
"""

import copy
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from tf_lightning.autoencoder.frozen import load_autoencoder
from tf_lightning.batch import Batch, pack
from tf_lightning.data.buckets import bucket_sizes
from tf_lightning.data.corpus.encoded import EncodedRequirements, encoded_tokenizer, open_encoded
from tf_lightning.data.corpus.folders import open_folder
from tf_lightning.data.corpus.image_storage import ImageStorageSpec
from tf_lightning.data.corpus.prepare import (
    PrepareJob,
    check_result,
    origin_facts,
    plan_corpus,
    prepare,
)
from tf_lightning.data.corpus.reader import Corpus
from tf_lightning.data.documents import HOLD_OUT, Skipped, Source, Split
from tf_lightning.data.exclusion import FilteredSource, filtered, leaves_out, unknown_ids
from tf_lightning.data.packing import CorpusRows
from tf_lightning.data.stream import Rows, StreamData, StreamRow, ValidationRows
from tf_lightning.errors import UserError
from tf_lightning.ranges import (
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Range,
    Share,
    check_arguments,
)
from tf_lightning.tokenizer.tokenizer import Tokenizer, train_tokenizer

WeightsUnit = Literal["tokens", "documents"]
TimestepDistribution = Literal["uniform", "logit_normal"]
MAX_ASPECT_RATIO = 10
AspectRatio = Annotated[
    float, Range(ge=1, le=MAX_ASPECT_RATIO, note="1 crops every image to a square")
]

# A tokenizer is trained on the first documents of each source, up to these limits.
TOKENIZER_DOCUMENTS = 20_000
TOKENIZER_CHARACTERS = 20_000_000


class Mixture(StreamData):
    """Text and images from several sources, mixed with given shares of the tokens.

    The arguments come in groups: the sources and their weights; the tokenizer; how images are
    encoded and stored (`autoencoder` to `encoded`); how documents are packed into rows
    (`patch_size` to `batch_size`); the order of images and captions and the noise levels
    (`image_first_prob` to `timestep_distribution`); loading.

    After `setup`, the attribute `tokenizer` is the Tokenizer, and `source_names` are the names of
    the sources in the order of `Batch.source_ids` and of the validation loaders.

    Args:
        sources: the sources of documents by name. They may differ in image_size.
        weights: share of the tokens that each source gets, image patches included. The weights need
            not sum to 1. A source with weight 0 is only validated on. null: in proportion to the
            sizes of the sources, so that each document is seen equally often.
        weights_count: unit of `weights`, "tokens" or "documents" (MonoFormer mixes 9:1 documents).
            A text that is cut into pieces of `row_length` counts as that many documents.
        exclude: a filter list, a text file with the id of a document in each line, as `tf-lightning
            inspect` writes it. These documents are left out. null: none.
        tokenizer: a sentencepiece file, a language model's folder, or a checkpoint (.ckpt) whose
            tokenizer is used. null: a tokenizer is trained on the text of the sources.
        vocab_size: entries of a trained tokenizer. Linked from the model on the command line.
        autoencoder: "shapes", "shapes_vq", "pixels", or a folder, file or hub name of an
            autoencoder, such as stabilityai/sd-vae-ft-mse or owner/model/vae. One with a codebook
            turns images into tokens. null: there are no images.
        sample_posterior: train on a new sample of the autoencoder's posterior each time an image is
            read, instead of its mode. Doubles the size of the stored latents.
        hflip: flip the images of half of the documents, drawn in each epoch, horizontally.
            Doubles the size of the stored latents. Not for captions that mention left or right.
        max_aspect_ratio: longer side of an image divided by the shorter at most, from 1 to 10. 1:
            every image is cropped to a square. Above 1: each image is cropped to the nearest of
            several sizes (aspect-ratio buckets), whose areas are about that of the square of
            `image_size` and whose sides divide into patches; a longer image is cropped to the
            longest of them, which is somewhat below the limit. Not for an autoencoder with a
            codebook, since codes carry no shape.
        crops: crops of each image, of which training draws one. 1: the center; 2 or 3: also one or
            both ends of the side that is cropped. Multiplies the size of the stored latents.
        lazy_images: leave images in their files and tars and read them there during training. Needs
            autoencoder "pixels". `cache_dir` then holds only their positions, and copies of the
            image files in parquet files and compressed tars.
        encoded: a folder that `tf-lightning prepare --data.encoded DIR` wrote, or the URL of a copy
            of it, such as s3://bucket/folder. Training reads it instead of the sources' files.
            null: the corpora are prepared in `cache_dir`.
        patch_size: side of a patch in latent pixels. Linked from the model on the command line.
        time_token: whether each image has one more position, for its timestep, before its patches.
            Linked from the model on the command line.
        row_length: positions in a row.
        batch_size: rows in a batch of one rank.
        image_first_prob: probability that a captioned image precedes its caption (paper: 0.2).
        caption_drop_prob: probability that a caption before an image is dropped, for
            classifier-free guidance. With the same probability, an edit loses its instruction, and
            any other document whose last image follows a text loses all texts; half of the time
            together with the images before the last one.
        max_caption_t: largest noise level, in (0, 1], of images that precede their caption, or the
            result of an edit (paper: 0.5).
        clean_copies: let later parts of a document attend to a clean copy of each image, instead of
            limiting its noise level by `max_caption_t` (BAGEL). A copy takes as many positions as
            the image.
        timestep_shift: values above 1 draw noise levels nearer to pure noise; 1 leaves them alone
            (paper).
        timestep_distribution: distribution of noise levels, "uniform" (paper) or "logit_normal"
            (common with rectified flow). Images of an autoencoder with a codebook have no noise
            level, so they ignore this, `timestep_shift` and `max_caption_t`.
        num_workers: processes that load rows; 0 loads in the training process.
        seed: seed of the order of documents and of the noise, >= 0. On the command line it
            follows `seed_everything` where it is not given.
        cache_dir: folder for the trained tokenizer and the prepared corpora.

    Raises:
        UserError: an argument is out of its range, or arguments contradict each other.
    """

    def __init__(
        self,
        sources: dict[str, Source],
        weights: dict[str, NonNegative] | None = None,
        *,
        weights_count: WeightsUnit = "tokens",
        exclude: str | None = None,
        tokenizer: str | None = None,
        vocab_size: PositiveInt = 512,
        autoencoder: str | None = None,
        sample_posterior: bool = False,
        hflip: bool = False,
        max_aspect_ratio: AspectRatio = 1.0,
        crops: Literal[1, 2, 3] = 1,
        lazy_images: bool = False,
        encoded: str | None = None,
        patch_size: PositiveInt = 2,
        time_token: bool = False,
        row_length: Annotated[int, Range(ge=3)] = 512,
        batch_size: PositiveInt = 8,
        image_first_prob: Share = 0.2,
        caption_drop_prob: Share = 0.1,
        max_caption_t: Annotated[float, Range(gt=0, le=1)] = 0.5,
        clean_copies: bool = False,
        timestep_shift: Positive = 1.0,
        timestep_distribution: TimestepDistribution = "uniform",
        num_workers: NonNegativeInt = 0,
        seed: NonNegativeInt = 0,
        cache_dir: str = "data",
    ):
        super().__init__(batch_size, num_workers)
        check_arguments(Mixture.__init__, locals())
        if not sources:
            raise UserError("sources is empty; name at least one source of documents")
        check_weights(sources, weights)
        if lazy_images and (autoencoder != "pixels" or sample_posterior):
            raise UserError(
                f"lazy_images=true reads pixels, but autoencoder={autoencoder!r} would encode "
                'them; give autoencoder "pixels" without sample_posterior, or lazy_images=false'
            )
        if weights is None and weights_count != "tokens":
            raise UserError(
                f"weights_count={weights_count} is the unit of weights, but there are none; give "
                "each source one, or leave weights_count out"
            )
        if autoencoder is None:
            check_without_images(
                hflip=hflip,
                max_aspect_ratio=max_aspect_ratio > 1,
                crops=crops > 1,
                sample_posterior=sample_posterior,
            )
        self.sources, self.exclude = filtered(sources, exclude), exclude
        self.weights, self.weights_count = weights, weights_count
        self.source_names = list(sources)
        self.tokenizer_file, self.vocab_size = tokenizer, vocab_size
        self.autoencoder_name, self.patch_size = autoencoder, patch_size
        self.lazy_images, self.encoded = lazy_images, encoded and open_folder(encoded)
        self.image_storage = ImageStorageSpec(
            hflip, sample_posterior, lazy_images, crops, max_aspect_ratio
        )
        self.row_length, self.time_token = row_length, time_token
        self.image_first_prob, self.caption_drop_prob = image_first_prob, caption_drop_prob
        self.max_caption_t, self.clean_copies = max_caption_t, clean_copies
        self.timestep_shift = timestep_shift
        self.timestep_distribution = timestep_distribution
        self.seed, self.cache_dir = seed, Path(cache_dir)
        self.tokenizer: Tokenizer | None = None
        self.autoencoder_fingerprint: str | None = None
        self.corpora: dict[str, dict[str, Corpus]] = {}
        self.prepare_options: dict = {}  # `processes` and `part` of `corpus.prepare.prepare`

    # Preparing

    def prepare_data(self) -> None:
        """Train the tokenizer, prepare the corpora and plan their rows, unless done before."""
        self._open()
        if self.corpora:
            self.training_rows()

    def setup(self, stage: str | None = None) -> None:
        """Open the tokenizer and the corpora."""
        if not self.corpora:
            self._open()

    def _open(self) -> None:
        """Open the tokenizer and the corpora; prepare missing ones first."""
        if self.encoded:
            self.corpora = self._open_encoded()
        else:
            self.corpora = {
                split: {name: prepare(job, **self.prepare_options) for name, job in jobs.items()}
                for split, jobs in self.plan(self.cache_dir, self.image_storage).items()
            }
        if any(corpus is None for split in self.corpora.values() for corpus in split.values()):
            self.corpora = {}  # other parts of `tf-lightning prepare --shard I/N` are missing
            return
        if self.exclude:
            self._check_excluded()
        self.image_shapes = self._image_shapes()
        self.image_shape = self.image_shapes[-1] if self.image_shapes else None

    def _check_excluded(self) -> None:
        """Warn of ids in the filter list that match no document.

        Raises:
            UserError: the `encoded` folder was written without a filter list.
        """
        opened = [corpus for split in self.corpora.values() for corpus in split.values()]
        skipped = [corpus.skipped for corpus in opened]
        fingerprints = [origin_facts(corpus.origin)["source"] for corpus in opened]
        concerned = (
            source.concerns(split) for split in self.corpora for source in self.sources.values()
        )
        if self.encoded and not any(map(leaves_out, fingerprints)) and any(concerned):
            raise UserError(
                f"{self.encoded} was encoded without the documents of {self.exclude} left out; "
                f"encode another folder with --data.exclude {self.exclude}, or leave exclude out"
            )
        if message := unknown_ids(self.exclude, skipped):
            rank_zero_warn(message)

    def plan(
        self, directory: Path, image_storage: ImageStorageSpec
    ) -> dict[Split, dict[str, PrepareJob]]:
        """Describe the corpora of all splits and sources; trains the tokenizer if it is missing.

        Args:
            directory: folder of the corpora.
            image_storage: the form in which training images are stored. Without a posterior there
                are no moments, so that part is ignored.
        """
        autoencoder = self._load_autoencoder()
        deterministic = autoencoder is None or autoencoder.deterministic
        moments = image_storage.moments and not deterministic
        self.tokenizer = open_tokenizer(
            self.tokenizer_file, self.sources, self.vocab_size, self.cache_dir
        )
        plan_one = partial(
            plan_corpus,
            directory=directory,
            tokenizer=self.tokenizer,
            autoencoder=autoencoder,
            row_length=self.row_length,
            patch_size=self.patch_size,
            time_token=self.time_token,
        )
        storage = {
            "train": replace(image_storage, moments=moments),
            "val": ImageStorageSpec(
                lazy=self.lazy_images, max_aspect_ratio=image_storage.max_aspect_ratio
            ),
        }
        return {
            split: {
                name: plan_one(source, split, name=name, image_storage=storage[split])
                for name, source in self.sources.items()
            }
            for split in storage
        }

    def plan_encoded(self) -> list[PrepareJob]:
        """List the corpora of the `encoded` folder, which store the moments of training images."""
        jobs = self.plan(self.encoded.path, replace(self.image_storage, moments=True))
        return [job for by_source in jobs.values() for job in by_source.values()]

    def _open_encoded(self) -> dict[Split, dict[str, Corpus]]:
        """Open the tokenizer and the corpora of the `encoded` folder."""
        autoencoder, file = self._load_autoencoder(), self.tokenizer_file
        self.tokenizer = Tokenizer(file) if file else encoded_tokenizer(self.encoded)
        required = EncodedRequirements(
            tokenizer=self.tokenizer.fingerprint,
            autoencoder=autoencoder and autoencoder.fingerprint,
            old_autoencoder=autoencoder and autoencoder.old_fingerprint,
            downsample=autoencoder.downsample if autoencoder else 1,
            patch_size=self.patch_size,
            time_token=self.time_token,
            row_length=self.row_length,
            hflip=self.image_storage.hflip,
            crops=self.image_storage.crops,
            max_aspect_ratio=self.image_storage.max_aspect_ratio,
            sample_posterior=self.image_storage.moments,
        )
        return {
            split: {
                name: open_encoded(self.encoded, name, split, source, required)
                for name, source in self.sources.items()
            }
            for split in ("train", "val")
        }

    @cached_property
    def latent_channels(self) -> int:
        """Channels of the autoencoder's latents, which the command line gives to the model.

        Raises:
            AttributeError: the data has no continuous latents; the model's own value then stays.
        """
        autoencoder = load_autoencoder(self.autoencoder_name) if self.autoencoder_name else None
        if autoencoder is None or autoencoder.num_codes:
            raise AttributeError(f"autoencoder={self.autoencoder_name!r} has no latents")
        return autoencoder.latent_channels

    def _load_autoencoder(self):
        """Load the autoencoder, if there is one, and check that it suits the other arguments."""
        autoencoder = load_autoencoder(self.autoencoder_name) if self.autoencoder_name else None
        self.num_codes = autoencoder.num_codes if autoencoder else None
        self.autoencoder_fingerprint = autoencoder.fingerprint if autoencoder else None
        moments = self.image_storage.moments
        if self.num_codes and (self.patch_size != 1 or self.clean_copies or moments):
            raise UserError(
                f'autoencoder "{self.autoencoder_name}" turns images into tokens, which are not '
                "noised; give patch_size: 1, clean_copies: false and sample_posterior: false"
            )
        if autoencoder and autoencoder.deterministic and moments:
            raise UserError(
                f'autoencoder "{self.autoencoder_name}" has no posterior to sample; give '
                "sample_posterior: false"
            )
        ratio = self.image_storage.max_aspect_ratio
        if self.num_codes and ratio > 1:
            raise UserError(
                f'autoencoder "{self.autoencoder_name}" turns images into tokens, which do not say '
                f"where a row of the image ends; give max_aspect_ratio: 1 instead of {ratio:g}"
            )
        if autoencoder:
            pixels = autoencoder.downsample * self.patch_size
            for name, source in self.sources.items():
                check_image_size(name, source, pixels)
            self.sources = {
                name: with_buckets(source, pixels, ratio) for name, source in self.sources.items()
            }
            check_buckets(self.sources, pixels, ratio)
        return autoencoder

    def _image_shapes(self) -> list[tuple[int, int, int]]:
        """The (C, h, w) of all latents, last the one that is generated unless a size is given.

        It is the largest, with aspect-ratio buckets the largest square if there is one.
        """
        opened = [corpus for split in self.corpora.values() for corpus in split.values()]
        shapes = {shape for corpus in opened for shape in corpus.image_shapes}
        buckets = self.image_storage.has_shapes

        def order(shape: tuple[int, int, int]) -> tuple:
            _, height, width = shape
            return buckets and height == width, height * width, shape

        return sorted(shapes, key=order)

    # Serving

    def train_dataloader(self) -> DataLoader:
        """Load batches without end, from the next row of the run."""
        self.rows = self.training_rows()
        return self.train_loader(self.rows, self.training_collate())

    @property
    def rows_per_epoch(self) -> int:
        """Rows after which every source with a weight above 0 has been read in full once."""
        return self.training_rows().rows_per_epoch

    def epochs(self) -> dict[str, float]:
        """Count the epochs of each source that the run has read, such as 1.5, by source name."""
        return dict(zip(self.source_names, self.rows.epochs(self.next_row()), strict=True))

    def training_rows(self) -> Rows:
        """Create the stream of training rows; call it after `setup`."""
        corpora = list(self.corpora["train"].values())
        streams = [
            self._rows(
                corpus,
                seed=(self.seed, number),
                image_first_prob=self.image_first_prob,
                caption_drop_prob=self.caption_drop_prob,
            )
            for number, corpus in enumerate(corpora)
        ]
        return Rows(streams, self._token_shares(streams))

    def training_collate(self) -> Callable[[list[StreamRow]], Batch]:
        """Return the function that packs training rows into a batch."""
        return self._collate(
            timestep_shift=self.timestep_shift, timestep_distribution=self.timestep_distribution
        )

    def _token_shares(self, streams: list[CorpusRows]) -> list[float]:
        """Convert `weights` to shares of the tokens; they need not sum to 1."""
        if self.weights is None:
            return [stream.num_tokens for stream in streams]
        weights = [self.weights[name] for name in self.source_names]
        if self.weights_count == "tokens":
            return weights
        return [w * stream.mean_length for w, stream in zip(weights, streams, strict=True)]

    def val_dataloader(self) -> list[DataLoader]:
        """Load each held-out document once: one loader a source, in the order of `source_names`."""
        self._check_validation()
        corpora = self.corpora["val"].values()
        datasets = [
            ValidationRows(self._rows(corpus), number, self.world_size)
            for number, corpus in enumerate(corpora)
        ]
        return [self.val_loader(rows, self._collate()) for rows in datasets]

    test_dataloader = predict_dataloader = val_dataloader

    def _check_validation(self) -> None:
        """Warn of sources without held-out documents.

        Raises:
            UserError: no source has any, and the run is an evaluation.
        """
        empty = [name for name, corpus in self.corpora["val"].items() if not len(corpus)]
        message = f"no documents to validate on in {', '.join(empty)}; {HOLD_OUT}"
        if empty and len(empty) == len(self.sources) and self.trainer.state.fn != "fit":
            raise UserError(message)
        if empty:
            rank_zero_warn(message)

    def _rows(self, corpus: Corpus, **order) -> CorpusRows:
        """Create the rows of a corpus; `order` are the arguments that only training has."""
        return CorpusRows(
            corpus,
            row_length=self.row_length,
            num_patches=self.num_patches(corpus),
            clean_copies=self.clean_copies,
            **order,
        )

    def _collate(self, **timesteps) -> Callable[[list[StreamRow]], Batch]:
        """Return the function that packs rows; `timesteps` are arguments of `batch.pack`."""
        return partial(
            pack_rows,
            tokenizer=self.tokenizer,
            row_length=self.row_length,
            patch_size=self.patch_size,
            time_token=self.time_token,
            seed=self.seed,
            max_caption_t=self.max_caption_t,
            clean_copies=self.clean_copies,
            **timesteps,
        )

    def num_patches(self, corpus: Corpus) -> int:
        """Count the positions of an image of a corpus with its time token; 0 without images.

        If the images differ in shape, it is the number of most of them.
        """
        if corpus.image_shape is None:
            return 0
        _, height, width = corpus.image_shape
        return (height // self.patch_size) * (width // self.patch_size) + self.time_token


def pack_rows(rows: list[StreamRow], **arguments) -> Batch:
    """Pack the rows of a DataLoader's batch; the other arguments are those of `batch.pack`."""
    row_ids, documents, source_ids = zip(*rows, strict=True)
    return pack(list(documents), list(row_ids), source_ids=list(source_ids), **arguments)


# Checks of the arguments


def check_weights(sources: dict[str, Source], weights: dict[str, float] | None) -> None:
    """Raise UserError unless each source has a weight and one weight is positive."""
    if weights is None:
        return
    if set(weights) != set(sources):
        raise UserError(
            f"weights are given for {sorted(weights)} but the sources are {sorted(sources)}; "
            "give one for each"
        )
    if sum(weights.values()) <= 0:
        raise UserError(f"weights are {weights}; give one of them a positive number")


def check_without_images(**options: bool) -> None:
    """Raise UserError if data without an autoencoder has an option that changes images."""
    for name in [name for name, given in options.items() if given]:
        raise UserError(
            f"{name} changes images, but without an autoencoder there are none; name one, such as "
            f"pixels, or leave {name} out"
        )


def check_image_size(name: str, source: Source, pixels: int) -> None:
    """Raise UserError if a source's `image_size` is not a multiple of a patch's side in pixels."""
    side = getattr(source, "image_size", 0) or 0  # None: conversations without images
    if side % pixels:
        raise UserError(
            f"{name}: image_size={side} does not divide into patches of {pixels} pixels; give a "
            f"multiple of {pixels}"
        )


def with_buckets(source: Source, pixels: int, max_aspect_ratio: float) -> Source:
    """Return a source that crops its image files to aspect-ratio buckets.

    Sources that draw their images are returned unchanged.

    Args:
        source: the source.
        pixels: side of a patch in pixels.
        max_aspect_ratio: as in `Mixture`; 1: the source is returned unchanged.
    """
    if isinstance(source, FilteredSource):
        whole = with_buckets(source.unfiltered, pixels, max_aspect_ratio)
        return FilteredSource(source.name, whole, source.ids)
    image_size = getattr(source, "image_size", None)
    if max_aspect_ratio == 1 or not image_size or not hasattr(source, "image_sizes"):
        return source
    source = copy.copy(source)
    source.image_sizes = bucket_sizes(image_size, pixels, max_aspect_ratio)
    return source


def check_buckets(sources: dict[str, Source], pixels: int, max_aspect_ratio: float) -> None:
    """Raise UserError if `max_aspect_ratio` leaves only squares.

    Args:
        sources: the sources after `with_buckets`.
        pixels: side of a patch in pixels.
        max_aspect_ratio: as in `Mixture`.
    """
    cropped = [source for source in sources.values() if getattr(source, "image_sizes", ())]
    if not cropped or any(len(source.image_sizes) > 1 for source in cropped):
        return
    side = max(source.image_size for source in cropped)
    others = set(bucket_sizes(side, pixels, MAX_ASPECT_RATIO)) - {(side, side)}
    least = min((max(size) / min(size) for size in others), default=None)
    remedy = f"at least {math.ceil(100 * least) / 100:g}" if least else "a larger image_size"
    raise UserError(
        f"max_aspect_ratio={max_aspect_ratio:g} leaves only squares of {side} pixels, since sides "
        f"are multiples of {pixels}; give {remedy}, or leave it out"
    )


# The tokenizer


def open_tokenizer(
    file: str | Path | None, sources: dict[str, Source], vocab_size: int, cache_dir: Path
) -> Tokenizer:
    """Open a tokenizer file, or train a tokenizer on the sources once and keep it in `cache_dir`.

    Args:
        file: as `Mixture.tokenizer`.
        sources: the sources by name.
        vocab_size: entries of a trained tokenizer.
        cache_dir: folder of trained tokenizers.

    Raises:
        UserError: the file is not a tokenizer, or a source has no usable document.
    """
    if file:
        return Tokenizer(file)
    origin = [source.fingerprint("train") for source in sources.values()]
    digest = hashlib.sha256(repr((origin, vocab_size)).encode()).hexdigest()[:12]
    path = cache_dir / f"tokenizer-{digest}.model"
    if path.exists():
        return Tokenizer(path)
    return train_tokenizer(texts(sources), path, vocab_size)


def texts(sources: dict[str, Source]) -> Iterator[str]:
    """Yield training text from the start of each source, as much as a tokenizer needs.

    Raises:
        UserError: a source has no usable document.
    """
    for name, source in sources.items():
        characters, documents, skipped = 0, 0, Counter()
        for document in islice(source.documents("train"), TOKENIZER_DOCUMENTS):
            if isinstance(document, Skipped):
                skipped[document.reason] += 1
                continue
            documents += 1
            for text in (part for part in document if isinstance(part, str)):
                yield text
                characters += len(text)
            if characters > TOKENIZER_CHARACTERS:
                break
        check_result(name, "train", documents, dict(skipped.most_common()))
