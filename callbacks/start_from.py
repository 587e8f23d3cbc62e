"""Fine-tuning: begin with the weights of another run, or of a pretrained language model."""

from collections import Counter
from pathlib import Path

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from callbacks.step_zero import check_text
from tf_lightning.checkpoint import read_checkpoint
from tf_lightning.errors import UserError
from tf_lightning.interop.export import read_weights
from tf_lightning.interop.hub import is_hub_name
from tf_lightning.interop.llama import LanguageModel, open_language_model
from tf_lightning.model.transformer import with_modality_weights
from tf_lightning.tokenizer.tokenizer import Tokenizer
from tf_lightning.training.module import Transfusion


class StartFrom(L.Callback):
    """Loads weights before the first step; optimizer, data and steps begin anew.

    Of a checkpoint, its averaged weights, if it has any, are the start of both the network and its
    new average. Where this network has image weights and the checkpoint none, they start as copies
    of the text's (LMFusion). A resumed run goes on from its own checkpoint. Give the data the
    tokenizer of the run that made the checkpoint.

    Of a language model, the Transformer; the patch coder and the rows of <boi> and <eoi> are new.
    Give the data `tokenizer: FOLDER`, and --model the file that `tf-lightning sizes FOLDER` prints.
    Its perplexity on the text of the first rows is told, and compared with the grown model's.

    Args:
        checkpoint: a file that `tf-lightning fit` wrote, a folder of `tf-lightning export`, or a
            Llama, Mistral or Qwen2: a folder of Hugging Face's layout, or its name on the hub.
        transformer_only: of a file of ours, take the Transformer alone; the image side begins anew,
            as where a language model is the start (MonoFormer).
    """

    def __init__(self, checkpoint: str, transformer_only: bool = False):
        self.checkpoint, self.transformer_only = checkpoint, transformer_only

    @property
    def is_language_model(self) -> bool:
        """Whether it is not one of our checkpoints."""
        return (Path(self.checkpoint) / "config.json").is_file() or is_hub_name(self.checkpoint)

    def before_training(self, model: Transfusion, data: L.LightningDataModule) -> None:
        """Refuse what does not fit, before data is prepared; only heads of files are read.

        Raises:
            UserError: the folder, its tokenizer or its sizes do not fit this run.
        """
        if not self.is_language_model:
            if not Path(self.checkpoint).exists():
                read_checkpoint(self.checkpoint)  # says that there is none
            return
        source = open_language_model(self.checkpoint)
        source.check(model.config, getattr(data, "row_length", None))
        file = getattr(data, "tokenizer_file", None)
        if not file or Tokenizer(file).proto != Tokenizer(source.folder).proto:
            told = f"tokenizer {file} is another" if file else "the data would train another"
            raise UserError(
                f"{self.checkpoint} reads the ids of its own tokenizer and {told}; give the data "
                f"tokenizer: {self.checkpoint}"
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: Transfusion) -> None:
        """Load, unless the run is resumed.

        Raises:
            UserError: the file, its tokenizer or its weights do not fit this run.
        """
        if trainer.ckpt_path:
            return
        if not self.is_language_model:
            self._load(pl_module, self._of_checkpoint(pl_module))
            rank_zero_info(f"Started from {self.checkpoint}")
            return
        self.before_training(pl_module, trainer.datamodule)
        source = open_language_model(self.checkpoint)
        weights = source.load(pl_module.config.vocab_size)
        self._load(pl_module, {f"transformer.{name}": w for name, w in weights.items()})
        rank_zero_info(report(source, pl_module))
        rank_zero_info(check_text(trainer, pl_module))

    def _of_checkpoint(self, module: Transfusion) -> dict[str, Tensor]:
        """The weights of a `TransfusionModel` in a checkpoint, averaged where it has an average."""
        checkpoint = read_weights(self.checkpoint)
        codec = module.image_codec, module.row_length
        module.on_load_checkpoint(checkpoint)  # refuses another tokenizer
        module.image_codec, module.row_length = codec
        module.loaded_step = 0
        weights = checkpoint["state_dict"]
        averaged = any(name.startswith("ema.") for name in weights)
        start = "ema." if averaged else "net."
        return {n.removeprefix(start): w for n, w in weights.items() if n.startswith(start)}

    def _load(self, module: Transfusion, weights: dict[str, Tensor]) -> None:
        """Into the network and its average; what is not taken stays as it is."""
        weights = with_modality_weights(weights, module.net.state_dict())
        if self.transformer_only:
            weights = {n: w for n, w in weights.items() if n.startswith("transformer.")}
        if self.is_language_model or self.transformer_only:
            weights = module.net.state_dict() | weights
        prefixes = ["net."] + (["ema."] if module.ema is not None else [])
        module.load_state_dict({p + name: w for p in prefixes for name, w in weights.items()})


def report(source: LanguageModel, module: Transfusion) -> str:
    """What was loaded, and what is new; nothing is missing or unexpected, or it was refused."""
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
