"""Step 0 of a run that starts from a language model: is its text as likely as it was?"""

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from tf_lightning.batch import Batch, pack, unpack
from tf_lightning.errors import UserError
from tf_lightning.model.attention import build_attention
from tf_lightning.training.module import Transfusion

MAX_CHANGE = 1e-6  # of the perplexity, relative


def text_rows(batch: Batch, data: L.LightningDataModule) -> Batch | None:
    """The text of a batch's documents, a row each; None without any."""
    documents = unpack(batch, data.tokenizer)
    texts = [[part for part in document if part.ndim == 1] for document in documents]
    rows = [[[torch.cat(parts)]] for parts in texts if parts]
    if not rows:
        return None
    row_length = 2 + max(len(row[0][0]) for row in rows)  # <bos>, <eos>
    how = {"row_length": row_length, "patch_size": data.patch_size}
    return pack(rows, list(range(len(rows))), tokenizer=data.tokenizer, **how)


@torch.no_grad()
def text_perplexities(module: Transfusion, batch: Batch) -> tuple[float, float]:
    """Of all text targets of rows of text: among the old entries alone, and among all."""
    batch = batch.to(module.device)
    logits, _ = module.net(batch, batch.latents, batch.t, build_attention(batch))
    targets = batch.labels.flatten()[batch.target_index]
    num_old = module.config.pretrained_vocab_size

    def perplexity(logits: Tensor) -> float:
        return F.cross_entropy(logits.double(), targets).exp().item()

    return perplexity(logits[:, :num_old]), perplexity(logits)


def check_text(trainer: L.Trainer, module: Transfusion) -> str:
    """Measure the text of the first batch; the perplexity in a sentence.

    The old entries alone are the source model, whose logits are the same to 1e-5.

    Raises:
        UserError: the new entries take probability from the text.
    """
    batch = text_rows(next(iter(trainer.datamodule.train_dataloader())), trainer.datamodule)
    if batch is None:
        return "The first batch has no text, so no perplexity at step 0 was measured"
    with trainer.precision_plugin.forward_context():
        source, grown = text_perplexities(module, batch)
    if not abs(grown / source - 1) <= MAX_CHANGE:
        raise UserError(
            f"at step 0 the text's perplexity is {grown:.6f} but the source model's is "
            f"{source:.6f}; the new rows of the vocabulary are at fault, so report this"
        )
    return (
        f"Perplexity of {len(batch.target_index):,} text tokens at step 0: {grown:.4f}, that of "
        f"the source model ({grown / source - 1:+.1e})"
    )
