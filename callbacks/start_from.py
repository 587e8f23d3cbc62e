"""Fine-tuning: begin with the weights of another run."""

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from tf_lightning.checkpoint import read_checkpoint
from tf_lightning.modality import with_image_weights
from tf_lightning.module import Transfusion


class StartFrom(L.Callback):
    """Loads a checkpoint's weights before the first step; optimizer, data and steps begin anew.

    The averaged weights, if the checkpoint has any, are the start of both the network and its new
    average. Where this network has image weights and the checkpoint none, they start as copies of
    the text's (LMFusion). A resumed run goes on from its own checkpoint. Give the data the
    tokenizer of the run that made the checkpoint.

    Args:
        checkpoint: a file that `tf-lightning fit` wrote.
        transformer_only: take the Transformer alone; the image side begins anew, as where a
            language model is the start (MonoFormer).
    """

    def __init__(self, checkpoint: str, transformer_only: bool = False):
        self.checkpoint, self.transformer_only = checkpoint, transformer_only

    def on_fit_start(self, trainer: L.Trainer, pl_module: Transfusion) -> None:
        """Load, unless the run is resumed.

        Raises:
            UserError: the file, its tokenizer or its weights do not fit this run.
        """
        if trainer.ckpt_path:
            return
        checkpoint = read_checkpoint(self.checkpoint)
        codec = pl_module.image_codec, pl_module.row_length
        pl_module.on_load_checkpoint(checkpoint)  # refuses another tokenizer
        pl_module.image_codec, pl_module.row_length = codec
        pl_module.loaded_step = 0
        weights = checkpoint["state_dict"]
        averaged = any(name.startswith("ema.") for name in weights)
        start = "ema." if averaged else "net."
        chosen = {n.removeprefix(start): w for n, w in weights.items() if n.startswith(start)}
        chosen = with_image_weights(chosen, pl_module.net.state_dict())
        if self.transformer_only:
            ours = pl_module.net.state_dict()
            chosen = {n: w for n, w in chosen.items() if n.startswith("transformer.")}
            chosen |= {n: w for n, w in ours.items() if not n.startswith("transformer.")}
        prefixes = ["net."] + (["ema."] if pl_module.ema is not None else [])
        pl_module.load_state_dict({p + name: w for p in prefixes for name, w in chosen.items()})
        rank_zero_info(f"Started from {self.checkpoint}")
