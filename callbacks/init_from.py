"""Fine-tuning: initialize a run with the weights of another run or of a pretrained language model.

A run that starts from a language model also checks at step 0 that the model's perplexity on text
is the source model's: the new vocabulary entries must not take probability from the text.
"""

import math
from collections import ChainMap, Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from tf_lightning.autoencoder.recorded import with_data
from tf_lightning.batch import Batch, pack, unpack
from tf_lightning.checkpoint import check_finite_weights, plain_hparams, select_weights
from tf_lightning.data.stream import as_batches
from tf_lightning.errors import UserError
from tf_lightning.hub import is_hub_name
from tf_lightning.interop.export import read_weights, transformer_config
from tf_lightning.interop.llama import LanguageModel, open_language_model
from tf_lightning.model.attention import build_attention
from tf_lightning.model.patches import stretched
from tf_lightning.model.transformer import TransformerConfig, with_modality_weights
from tf_lightning.model.transfusion import build_network
from tf_lightning.sharded import ShardedWeights, load_into, without_data
from tf_lightning.tokenizer.tokenizer import Tokenizer
from tf_lightning.training.fsdp import cut, reshard
from tf_lightning.training.module import Transfusion, same_tokenizer
from tf_lightning.training.resume import differences

# Options that the shapes of the weights do not show, with their attributes of `TransformerConfig`.
SAME = {"num_heads": "num_heads", "num_kv_heads": "kv_heads", "norm_order": "norm_order"}
# Prefixes of the options that give the weights their meaning, and those of them that do not.
MEANING = (
    "transformer.", "unet", "linear", "prediction_type", "noise_schedule", "num_train_timesteps",
    "causal_images",
)  # fmt: skip
# Position embeddings are adapted to images whose grid is this much finer or coarser.
MIN_STRETCH = 1.25
POSITIONS = ("patch_coder.row_embedding.weight", "patch_coder.column_embedding.weight")
FREE = {
    *("transformer.dropout", "transformer.modality_weights", "transformer.head_dim"),
    *("transformer.num_kv_heads", "transformer.vocab_size", "transformer.tie_embeddings"),
}
MAX_CHANGE = 1e-6  # largest relative change of the text perplexity at step 0


class InitFrom(L.Callback):
    """Loads weights before the first step. Optimizer, data order and step count start from zero.

    A checkpoint of this project: its EMA weights, if it has any, initialize both the network and
    its EMA weights. If its images were smaller or larger, learned position embeddings of patches
    are interpolated, so that training goes on at another resolution. If this network has separate
    image weights and the checkpoint has none, the image weights start as copies of the text weights
    (LMFusion). The data must use the tokenizer and the autoencoder of the run that wrote the
    checkpoint.

    A language model: it initializes the Transformer. The patch coder and the vocabulary rows of
    <boi> and <eoi> are new. Give the data `tokenizer: FOLDER`, and pass --model the file that
    `tf-lightning model-config FOLDER` prints. The callback reports the perplexity on the text of
    the first batch and compares it with the source model's.

    A resumed run ignores this callback and continues from its own checkpoint.

    Args:
        checkpoint: a checkpoint of `tf-lightning fit`, a folder of `tf-lightning export`, or a
            language model of the Llama family: a folder in Hugging Face's layout or its hub name.
        transformer_only: load only the Transformer of one of this project's checkpoints; the image
            side is initialized, as when a language model is loaded (MonoFormer).
    """

    def __init__(self, checkpoint: str, transformer_only: bool = False):
        self.checkpoint, self.transformer_only = checkpoint, transformer_only

    @property
    def is_language_model(self) -> bool:
        """Whether `checkpoint` is a language model and not one of this project's checkpoints."""
        return (Path(self.checkpoint) / "config.json").is_file() or is_hub_name(self.checkpoint)

    def before_training(self, model: Transfusion, data: L.LightningDataModule) -> None:
        """Check that the checkpoint fits this run before any data is prepared.

        Raises:
            UserError: the checkpoint is missing or damaged, its weights are not finite, or its
                sizes, or those of a language model or its tokenizer, do not fit this run.
        """
        if self.is_language_model:
            self._language_model(model, data)
        else:
            checkpoint = read_weights(self.checkpoint, mmap=True)
            weights = select_weights(checkpoint["state_dict"])[0]
            check_shapes(model, self._complete(weights, model))
            check_heads(model.config, transformer_config(checkpoint))

    def _language_model(
        self, model: Transfusion, data: L.LightningDataModule
    ) -> tuple[LanguageModel, dict[str, Tensor]]:
        """Open and check the language model; return it and its weights under our names."""
        source = open_language_model(self.checkpoint)
        source.check(model.config, getattr(data, "row_length", None))
        file = getattr(data, "tokenizer_file", None)
        if not file or Tokenizer(file).proto != Tokenizer(source.folder).proto:
            current = f"uses the tokenizer {file}" if file else "would train its own tokenizer"
            raise UserError(
                f"{self.checkpoint} needs its own tokenizer but the data {current}; give the data "
                f"tokenizer: {self.checkpoint}"
            )
        weights = source.load(model.config.vocab_size)
        check_finite_weights(weights, f"of {self.checkpoint}", "download it again")
        return source, weights

    def on_fit_start(self, trainer: L.Trainer, pl_module: Transfusion) -> None:
        """Load the weights, unless the run is resumed.

        Raises:
            UserError: the checkpoint, its tokenizer or its weights do not fit this run.
        """
        if trainer.ckpt_path:
            return
        if not self.is_language_model:
            self._load(pl_module, self._checkpoint_weights(pl_module))
            return
        source, weights = self._language_model(pl_module, trainer.datamodule)
        self._load(pl_module, {f"transformer.{name}": w for name, w in weights.items()})
        rank_zero_info(load_report(source, pl_module))
        rank_zero_info(check_text(trainer, pl_module))

    def _checkpoint_weights(self, module: Transfusion) -> Mapping[str, Tensor]:
        """Return the network's weights in the checkpoint: the EMA weights if it has any.

        Says which options they were trained with that this run changes.

        Raises:
            UserError: the checkpoint was trained with other heads, or with another tokenizer or
                autoencoder.
        """
        checkpoint = read_weights(self.checkpoint, mmap=True)
        check_heads(module.config, transformer_config(checkpoint))
        same_tokenizer(checkpoint, module.tokenizer_proto)
        if not self.transformer_only:  # else the image side is initialized, for any autoencoder
            with_data(checkpoint["image_codec"], module.image_codec)
        names = MEANING[:1] if self.transformer_only else MEANING
        options = ", ".join(changed_options(module, checkpoint, names))
        notes = f"; this run has other options: {options}" if options else ""
        rank_zero_info(f"Initialized from {self.checkpoint}{notes}")
        weights = select_weights(checkpoint["state_dict"])[0]
        return weights if self.transformer_only else adapted(weights, checkpoint, module)

    def _complete(self, weights: Mapping[str, Tensor], module: Transfusion) -> Mapping[str, Tensor]:
        """Choose the weights to load, and add those of the network that `weights` leave out."""
        own = empty_network(module) if module.net is None else module.net
        weights = with_modality_weights(weights, own.state_dict())
        if self.transformer_only:
            weights = {n: w for n, w in weights.items() if n.startswith("transformer.")}
        if self.is_language_model or self.transformer_only:
            weights = own.state_dict() | weights
        return weights

    def _load(self, module: Transfusion, weights: Mapping[str, Tensor]) -> None:
        """Load `weights` into the network and its EMA weights; other weights are unchanged.

        Each rank of a sharded network takes its part of each tensor.
        """
        weights, own = self._complete(weights, module), module.net.state_dict()
        if isinstance(weights, ShardedWeights):
            for net in filter(None, (module.net, module.ema)):
                load_into(net, weights)
            return
        parts = {name: cut(weight, own.get(name, weight)) for name, weight in weights.items()}
        prefixes = ["net."] + (["ema."] if module.ema is not None else [])
        module.load_state_dict({p + name: w for p in prefixes for name, w in parts.items()})


def adapted(
    weights: Mapping[str, Tensor], checkpoint: dict[str, Any], module: Transfusion
) -> Mapping[str, Tensor]:
    """Interpolate learned position embeddings if the images are larger or smaller than before.

    Then a patch has the embedding of the patch that was at its place in the image. Buckets of the
    same area change nothing.
    """
    codecs = checkpoint["image_codec"], module.image_codec or {}
    shapes = [codec.get("latent_shape") for codec in codecs]
    if None in shapes or not weights.keys() & {*POSITIONS}:
        return weights
    (_, *old), (_, *new) = shapes
    factor = math.sqrt(math.prod(new) / math.prod(old))
    if 1 / MIN_STRETCH < factor < MIN_STRETCH:
        return weights
    rank_zero_info(
        f"The position embeddings of patches are interpolated: latents of {new[0]} x {new[1]} "
        f"follow those of {old[0]} x {old[1]}"
    )
    tables = {name: weights[name] for name in POSITIONS if name in weights}
    tables = {name: stretched(table, factor, len(table)) for name, table in tables.items()}
    return ChainMap(tables, weights)  # those of a sharded checkpoint are not read yet


def empty_network(module: Transfusion) -> nn.Module:
    """Build the network of a module without memory for its weights."""
    with torch.device("meta"):
        return build_network(module.hparams)


def check_shapes(module: Transfusion, weights: Mapping[str, Tensor]) -> None:
    """Refuse weights whose names or shapes are not those of a module's network.

    Raises:
        UserError: they do not fit.
    """
    wanted = {name: tuple(w.shape) for name, w in empty_network(module).state_dict().items()}
    found = {name: tuple(w.shape) for name, w in without_data(weights).items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            theirs, ours = (shapes.get(name, "missing") for shapes in (found, wanted))
            raise UserError(
                f"the checkpoint of init_from does not fit this model: {name} is {theirs} there "
                f"and {ours} here; give the model the checkpoint's options"
            )


def check_heads(ours: TransformerConfig, theirs: TransformerConfig) -> None:
    """Refuse weights of a Transformer that has the same shapes and computes something else.

    Raises:
        UserError: the heads or the position of the norms differ.
    """
    for name, attribute in SAME.items():
        wanted, found = getattr(ours, attribute), getattr(theirs, attribute)
        if wanted != found:
            raise UserError(
                f"the checkpoint of init_from was trained with transformer.{name}={found}, and "
                f"its weights are useless with {wanted}; give the model the checkpoint's options"
            )


def changed_options(module: Transfusion, checkpoint: dict, names: tuple[str, ...]) -> Iterator[str]:
    """Yield the options, with both values, with which a checkpoint's weights mean something else.

    Args:
        module: the module that they are loaded into.
        checkpoint: the checkpoint.
        names: prefixes of the options to compare.
    """
    saved = plain_hparams(checkpoint["hyper_parameters"])
    for name, value, old in differences(plain_hparams(module.hparams), saved):
        if name.startswith(names) and name not in FREE:
            yield f"{name}={value} ({old} there)"


def load_report(source: LanguageModel, module: Transfusion) -> str:
    """Describe the loaded and the new tensors.

    Nothing can be missing or unexpected here: `open_language_model` refuses such a model.
    """
    names = [
        n for n in module.net.state_dict() if n.removeprefix("transformer.") not in source.names
    ]
    parts = Counter(".".join(n.split(".")[: 1 + n.startswith("transformer.")]) for n in names)
    rows = module.config.vocab_size - source.config.vocab_size
    new = [f"{rows} rows of the vocabulary, from <boi> on"]
    new += [f"{part} ({count} tensors)" for part, count in parts.items()]
    total = len(source.names)
    return (
        f"Loaded {total} of {total} tensors of {source.folder}; missing: none; unexpected: none; "
        f"new: {', '.join(new)}"
    )


def check_text(trainer: L.Trainer, module: Transfusion) -> str:
    """Compare the text perplexity of the first batch with the source model's; return a sentence.

    The source model is the network restricted to the old vocabulary entries: their logits are equal
    to 1e-5.

    Raises:
        UserError: the new entries take probability from the text.
    """
    first = as_batches(next(iter(trainer.datamodule.train_dataloader())))[0]
    batch = text_rows(first, trainer.datamodule)
    # All ranks run a sharded network together.
    if not trainer.strategy.reduce_boolean_decision(batch is not None, all=True):
        return "The first batch has no text, so the perplexity at step 0 was not measured"
    with trainer.precision_plugin.forward_context():
        source, grown = text_perplexities(module, batch)
    reshard(module.net)
    if not abs(grown / source - 1) <= MAX_CHANGE:
        raise UserError(
            f"the text perplexity at step 0 is {grown:.6f} but the source model's is "
            f"{source:.6f}; the new vocabulary rows are wrong, so please report this"
        )
    return (
        f"Perplexity of {len(batch.target_index):,} text tokens at step 0: {grown:.4f}; relative "
        f"to the source model: {grown / source - 1:+.1e}"
    )


def text_rows(batch: Batch, data: L.LightningDataModule) -> Batch | None:
    """Pack the text of each document of a batch into a separate row; None without any text."""
    documents = unpack(batch, data.tokenizer)
    texts = [[part for part in document if part.ndim == 1] for document in documents]
    rows = [[[torch.cat(parts)]] for parts in texts if parts]
    if not rows:
        return None
    row_length = 2 + max(len(row[0][0]) for row in rows)  # <bos> and <eos>
    how = {"row_length": row_length, "patch_size": data.patch_size}
    return pack(rows, list(range(len(rows))), tokenizer=data.tokenizer, **how)


@torch.no_grad()
def text_perplexities(module: Transfusion, batch: Batch) -> tuple[float, float]:
    """Perplexity of all text targets over the old vocabulary entries, and over all entries."""
    batch = batch.to(module.device)
    logits, _ = module.net(batch, batch.latents, batch.t, build_attention(batch))
    targets = batch.labels.flatten()[batch.target_index]
    num_old = module.config.pretrained_vocab_size

    def perplexity(logits: Tensor) -> float:
        return F.cross_entropy(logits.double(), targets).exp().item()

    return perplexity(logits[:, :num_old]), perplexity(logits)
