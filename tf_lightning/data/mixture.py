"""Several corpora trained on together, their shares given in tokens.

Arguments of the data that no run can have.

The tokenizer of some sources: a file, or one trained on their text, once.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from tf_lightning.autoencoder.frozen import load_autoencoder
from tf_lightning.batch import Batch, pack
from tf_lightning.data.corpus.prepare import (
    Job,
    Needed,
    check_result,
    encoded_tokenizer,
    open_encoded,
    plan_corpus,
    prepare,
)
from tf_lightning.data.corpus.reader import Corpus, Latents
from tf_lightning.data.documents import Skipped, Source, Split
from tf_lightning.data.stream import (
    CorpusRows,
    Rows,
    RowSampler,
    StreamData,
    StreamRow,
    ValidationRows,
)
from tf_lightning.errors import UserError
from tf_lightning.tokenizer.tokenizer import Tokenizer, train_tokenizer


def check_weights(sources: dict[str, Source], weights: dict[str, float] | None) -> None:
    """UserError unless each source has a weight >= 0 and one is positive."""
    if weights is None:
        return
    if set(weights) != set(sources):
        raise UserError(
            f"weights are given for {sorted(weights)} but the sources are {sorted(sources)}; "
            "give one for each"
        )
    if min(weights.values()) < 0 or sum(weights.values()) <= 0:
        raise UserError(f"weights are {weights}; give numbers >= 0, one of them positive")


def check_image_size(name: str, source: Source, pixels: int) -> None:
    """UserError where a source says how large its pictures are and patches do not divide them."""
    side = getattr(source, "image_size", 0)
    if side % pixels:
        raise UserError(
            f"{name}: image_size={side} does not divide into patches of {pixels} pixels; give a "
            f"multiple of {pixels}"
        )


def check_probability(name: str, value: float) -> None:
    """UserError unless a value is in [0, 1]."""
    if not 0 <= value <= 1:
        raise UserError(f"{name}={value} is not a probability; give a number from 0 to 1")


def check_timesteps(timestep_shift: float, timestep_distribution: str) -> None:
    """UserError where noise levels cannot be drawn so."""
    if timestep_shift <= 0:
        raise UserError(
            f"timestep_shift={timestep_shift} must be above 0; 1 leaves noise levels alone"
        )
    if timestep_distribution not in ("uniform", "logit_normal"):
        raise UserError(
            f"timestep_distribution={timestep_distribution!r} must be 'uniform' or 'logit_normal'"
        )


# What a tokenizer is trained on: the first of each source, up to these.
TOKENIZER_DOCUMENTS = 20_000
TOKENIZER_CHARACTERS = 20_000_000


def open_tokenizer(
    file: str | Path | None, sources: dict[str, Source], vocab_size: int, cache_dir: Path
) -> Tokenizer:
    """The tokenizer of a file, or else the one that was, or now is, trained on the sources.

    Raises:
        UserError: the file is none, or nothing of a source can be used.
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
    """The training text of sources, of each only as much as a tokenizer needs.

    Raises:
        UserError: nothing of a source can be used.
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


class Mixture(StreamData):
    """Prepares corpora once and serves their packed rows.

    After `setup`, `tokenizer` is the Tokenizer and `source_names` the names that `Batch.source_ids`
    and the validation loaders count.

    Args:
        sources: a source of documents under each name; they may differ in image_size.
        weights: share of the tokens each source is to have, patches counted as tokens; None: as
            many as it has, so that every document is seen equally often. A source with 0 is only
            validated on.
        weights_count: what `weights` are shares of, "tokens" or "documents" (MonoFormer's 9:1 of
            samples); a text cut into pieces by `row_length` is as many documents.
        tokenizer: a sentencepiece file, or a checkpoint (.ckpt), whose own is then taken; None
            trains one on the sources' text.
        vocab_size: entries of the tokenizer that is trained.
        autoencoder: "shapes", "shapes_vq", "pixels", a folder, a file, or a hub name; one with a
            codebook makes pictures tokens; None: no pictures.
        sample_posterior: train on samples of the autoencoder's posterior, another each time, not on
            its mode; twice the room in `cache_dir`.
        mirror: train on half of all documents with their pictures mirrored, another half each time;
            twice the room. Not where words say what is left and right.
        crops: 1, the middle square of a picture; 2 or 3, in turn also one or both ends of its
            longer side: two or three times the room.
        in_place: leave pictures in their files and tars and read them there when they are trained
            on, with autoencoder "pixels"; `cache_dir` then has only where they are, and copies of
            those in parquet and packed tars, as they are.
        encoded: folder that `tf-lightning encode` wrote, and what is read then in place of the
            sources' files; None: sources are prepared in `cache_dir`.
        patch_size: side of a patch in latent pixels.
        time_token: a position for the noise level before each picture's patches; true where the
            model's `linear.time` is "token".
        row_length: positions in a row.
        batch_size: rows in a batch of one rank.
        image_first_prob: probability that a captioned picture precedes its caption (paper: 0.2).
        caption_drop_prob: probability that a caption that comes first is dropped, for guidance,
            or an edit's instruction, half of the time with the picture before it.
        max_caption_t: noise limit of pictures that precede their text, in (0, 1] (paper: 0.5).
        clean_copies: text and pictures that follow a picture read a clean copy of it, which takes
            as much room again, in place of that limit (BAGEL).
        timestep_shift: > 1 draws noise levels nearer to pure noise, 1 = as they are (paper).
        timestep_distribution: of noise levels, "uniform" (paper) or "logit_normal" (usual with flows).
        num_workers: processes that load rows; 0 loads in the training process.
        seed: of order and noise, >= 0.
        cache_dir: where tokenizer and prepared corpora are kept.
    """

    def __init__(
        self,
        sources: dict[str, Source],
        weights: dict[str, float] | None = None,
        *,
        weights_count: Literal["tokens", "documents"] = "tokens",
        tokenizer: str | None = None,
        vocab_size: int = 512,
        autoencoder: str | None = None,
        sample_posterior: bool = False,
        mirror: bool = False,
        crops: Literal[1, 2, 3] = 1,
        in_place: bool = False,
        encoded: str | None = None,
        patch_size: int = 2,
        time_token: bool = False,
        row_length: int = 512,
        batch_size: int = 8,
        image_first_prob: float = 0.2,
        caption_drop_prob: float = 0.1,
        max_caption_t: float = 0.5,
        clean_copies: bool = False,
        timestep_shift: float = 1.0,
        timestep_distribution: Literal["uniform", "logit_normal"] = "uniform",
        num_workers: int = 0,
        seed: int = 0,
        cache_dir: str = "data",
    ):
        super().__init__(batch_size)
        check_weights(sources, weights)
        check_probability("image_first_prob", image_first_prob)
        check_probability("caption_drop_prob", caption_drop_prob)
        check_probability("max_caption_t", max_caption_t)
        check_timesteps(timestep_shift, timestep_distribution)
        if weights_count not in ("tokens", "documents"):
            raise UserError(f"weights_count={weights_count!r} must be 'tokens' or 'documents'")
        self.sources, self.weights, self.weights_count = sources, weights, weights_count
        self.source_names = list(sources)
        self.tokenizer_file, self.vocab_size = tokenizer, vocab_size
        self.autoencoder_name, self.patch_size = autoencoder, patch_size
        if in_place and (autoencoder != "pixels" or sample_posterior):
            raise UserError(
                f"in_place=true reads pixels, and autoencoder={autoencoder!r} makes latents of "
                'them; give autoencoder "pixels" without sample_posterior, or in_place=false'
            )
        self.in_place, self.encoded = in_place, encoded and Path(encoded)
        self.latents = Latents(mirror, sample_posterior, in_place, crops)
        self.row_length, self.time_token = row_length, time_token
        self.image_first_prob, self.caption_drop_prob = image_first_prob, caption_drop_prob
        self.max_caption_t, self.clean_copies = max_caption_t, clean_copies
        self.timestep_shift = timestep_shift
        self.timestep_distribution = timestep_distribution
        self.num_workers = num_workers
        self.seed, self.cache_dir = seed, Path(cache_dir)
        self.tokenizer: Tokenizer | None = None
        self.corpora: dict[str, dict[str, Corpus]] = {}
        self.how_to_prepare: dict = {}  # `processes` and `part`, as `prepare` has them

    # Preparing

    def prepare_data(self) -> None:
        """Train the tokenizer, prepare every corpus and plan its rows, where that was not done."""
        self._open()
        if self.corpora:
            self._stream()

    def setup(self, stage: str | None = None) -> None:
        """Open what `prepare_data` made."""
        if not self.corpora:
            self._open()

    def _open(self) -> None:
        if self.encoded:
            self.corpora = self._open_encoded()
        else:
            self.corpora = {
                split: {name: prepare(job, **self.how_to_prepare) for name, job in jobs.items()}
                for split, jobs in self.jobs(self.cache_dir, self.latents).items()
            }
        if any(corpus is None for split in self.corpora.values() for corpus in split.values()):
            self.corpora = {}  # another job prepares the rest
            return
        self.image_shapes = self._image_shapes()
        self.image_shape = self.image_shapes[-1] if self.image_shapes else None

    def jobs(self, directory: Path, latents: Latents) -> dict[Split, dict[str, Job]]:
        """How each source's corpora in `directory` are made, the tokenizer first.

        Args:
            directory: where they will be.
            latents: what is kept of training's pictures; of codes, no moments.
        """
        autoencoder = self._open_autoencoder()
        latents = replace(latents, moments=latents.moments and not self.num_codes)
        sources, file = self.sources, self.tokenizer_file
        self.tokenizer = open_tokenizer(file, sources, self.vocab_size, self.cache_dir)
        plan = partial(
            plan_corpus,
            directory=directory,
            tokenizer=self.tokenizer,
            autoencoder=autoencoder,
            row_length=self.row_length,
            patch_size=self.patch_size,
            time_token=self.time_token,
        )
        kept = {"train": latents, "val": Latents(in_place=self.in_place)}
        return {
            split: {n: plan(s, split, name=n, latents=kept[split]) for n, s in sources.items()}
            for split in kept
        }

    def _open_encoded(self) -> dict[Split, dict[str, Corpus]]:
        autoencoder, file = self._open_autoencoder(), self.tokenizer_file
        self.tokenizer = Tokenizer(file) if file else encoded_tokenizer(self.encoded)
        needed = Needed(
            tokenizer=self.tokenizer.fingerprint,
            autoencoder=autoencoder and autoencoder.fingerprint,
            downsample=autoencoder.downsample if autoencoder else 1,
            patch_size=self.patch_size,
            time_token=self.time_token,
            row_length=self.row_length,
            mirror=self.latents.mirrored,
            crops=self.latents.crops,
            sample_posterior=self.latents.moments,
        )
        return {
            split: {
                name: open_encoded(self.encoded, name, split, source, needed)
                for name, source in self.sources.items()
            }
            for split in ("train", "val")
        }

    def _open_autoencoder(self):
        autoencoder = load_autoencoder(self.autoencoder_name) if self.autoencoder_name else None
        self.num_codes = autoencoder.num_codes if autoencoder else None
        if self.num_codes and (self.patch_size != 1 or self.clean_copies or self.latents.moments):
            raise UserError(
                f'autoencoder "{self.autoencoder_name}" makes codes, each a token that nothing '
                "noises; give patch_size: 1, clean_copies: false and sample_posterior: false"
            )
        if autoencoder:
            for name, source in self.sources.items():
                check_image_size(name, source, autoencoder.downsample * self.patch_size)
        return autoencoder

    def _image_shapes(self) -> list[tuple[int, int, int]]:
        """The (C, h, w) of latents, the largest last: it is what is drawn."""
        opened = [corpus for split in self.corpora.values() for corpus in split.values()]
        shapes = {corpus.image_shape for corpus in opened if corpus.image_shape}
        return sorted(shapes, key=lambda shape: (shape[1] * shape[2], shape))

    # Serving

    def train_dataloader(self) -> DataLoader:
        """Batches without end, from the row that the run has reached."""
        rows = self.rows = self._stream()
        sampler = RowSampler(
            rows,
            self.next_row,
            batch_size=self.batch_size,
            num_batches=self.num_batches(),
            rank=self.rank,
            world_size=self.world_size,
        )
        times = {
            "timestep_shift": self.timestep_shift,
            "timestep_distribution": self.timestep_distribution,
        }
        return self._loader(rows, sampler, **times)

    def epochs(self) -> dict[str, float]:
        """How often the run has read each source so far: 1.5 is one epoch and half of another."""
        return dict(zip(self.source_names, self.rows.epochs(self.next_row()), strict=True))

    def _stream(self) -> Rows:
        """The rows of training."""
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

    def _token_shares(self, streams: list[CorpusRows]) -> list[float]:
        """What `weights` asks for, in tokens."""
        if self.weights is None:
            return [stream.num_tokens for stream in streams]
        weights = [self.weights[name] for name in self.source_names]
        if self.weights_count == "tokens":
            return weights
        return [w * stream.mean_length for w, stream in zip(weights, streams, strict=True)]

    def val_dataloader(self) -> list[DataLoader]:
        """One finite loader for each source, in the order of `source_names`: each document once."""
        self._tell_empty()
        world = {"num_replicas": self.world_size, "rank": self.rank}
        loaders = []
        for number, corpus in enumerate(self.corpora["val"].values()):
            rows = ValidationRows(self._rows(corpus), number, self.world_size)
            loaders.append(self._loader(rows, DistributedSampler(rows, shuffle=False, **world)))
        return loaders

    test_dataloader = predict_dataloader = val_dataloader

    def _tell_empty(self) -> None:
        """Say which sources hold nothing out; an evaluation of nothing at all is refused."""
        empty = [name for name, corpus in self.corpora["val"].items() if not len(corpus)]
        told = f"no documents to validate on in {', '.join(empty)}; hold some out"
        if empty and len(empty) == len(self.sources) and self.trainer.state.fn != "fit":
            raise UserError(told)
        if empty:
            rank_zero_warn(told)

    def _rows(self, corpus: Corpus, **order) -> CorpusRows:
        return CorpusRows(
            corpus,
            row_length=self.row_length,
            num_patches=self.num_patches(corpus),
            clean_copies=self.clean_copies,
            **order,
        )

    def _loader(self, rows: Dataset, sampler: Sampler, **times) -> DataLoader:
        collate = partial(
            pack_rows,
            tokenizer=self.tokenizer,
            row_length=self.row_length,
            patch_size=self.patch_size,
            time_token=self.time_token,
            seed=self.seed,
            max_caption_t=self.max_caption_t,
            clean_copies=self.clean_copies,
            **times,
        )
        return DataLoader(
            rows,
            batch_size=self.batch_size,
            sampler=sampler,
            collate_fn=collate,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def num_patches(self, corpus: Corpus) -> int:
        """Positions of a picture of a corpus, the time token's too; 0 where there are none."""
        if corpus.image_shape is None:
            return 0
        _, height, width = corpus.image_shape
        return (height // self.patch_size) * (width // self.patch_size) + self.time_token


def pack_rows(rows: list[StreamRow], **arguments) -> Batch:
    """A DataLoader's rows as one Batch."""
    row_ids, documents, source_ids = zip(*rows, strict=True)
    return pack(list(documents), list(row_ids), source_ids=list(source_ids), **arguments)
