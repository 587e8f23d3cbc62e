"""Whether data was prepared for this model."""

from collections.abc import Mapping

import lightning as L

from tf_lightning.conditioning import LinearConfig, has_time_token
from tf_lightning.errors import UserError
from tf_lightning.transformer import TransformerConfig


def check_data(
    data: L.LightningDataModule,
    config: TransformerConfig,
    linear: LinearConfig | None,
    hparams: Mapping,
) -> None:
    """Refuse data of another vocabulary or of pictures of another kind.

    Args:
        data: set up.
        config: of the Transformer.
        linear: of the linear patch coder.
        hparams: of `Transfusion`.

    Raises:
        UserError: names what differs.
    """
    pairs = [
        ("entries in the vocabulary", config.vocab_size, data.tokenizer.vocab_size),
        ("patch_size", hparams["patch_size"], data.patch_size),
        ("time_token", has_time_token(linear), data.time_token),
    ]
    if data.image_shape:
        channels = 1 if hparams["num_codes"] else hparams["latent_channels"]
        pairs += [
            ("num_codes", hparams["num_codes"], data.num_codes),
            ("latent_channels", channels, data.image_shape[0]),
        ]
    for name, ours, theirs in pairs:
        if ours != theirs:
            raise UserError(
                f"the data has {name} = {theirs} but the model has {ours}; give both the same "
                "value (tokenizer, vocab_size, patch_size, latent_channels, num_codes, "
                "time_token with linear.time)"
            )
