"""The LightningModule: owns the network and its average, joins the losses, logs them.

The only file that touches the trainer, the optimizer and `self.log`. Hyper-parameters are what must
match the weights; whatever one varies at evaluation belongs to callbacks.

Whether data was prepared for this model.
"""

from collections.abc import Mapping
from copy import deepcopy

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchmetrics import SumMetric

from tf_lightning.batch import Batch, Document, unpack
from tf_lightning.checkpoint import as_dict, misfit, plain_hparams, read_checkpoint
from tf_lightning.diffusion.process import build_process
from tf_lightning.diffusion.timesteps import row_generator
from tf_lightning.errors import UserError
from tf_lightning.model.patches import LinearConfig, has_time_token
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.model.transfusion import (
    TransfusionModel,
    build_network,
    check_code_options,
    update_ema,
)
from tf_lightning.model.unet import UNetConfig, check_unet_config
from tf_lightning.training.fsdp import shard
from tf_lightning.training.losses import LossSums, loss_sums, total_loss
from tf_lightning.training.optim import DECAYS, build_optimizer, lr_scale


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


class Transfusion(L.LightningModule):
    """One Transformer that predicts the next text token and denoises images.

    With `num_codes` images are tokens, and the loss is the language model's alone (Chameleon): then
    patch_size is 1, and what is of latents and diffusion has no meaning.

    Args:
        transformer: sizes of the shared Transformer.
        patch_size: side of a patch in latent pixels; the data's must be the same.
        latent_channels: channels of the autoencoder's latents.
        unet: sizes of a U-Net patch coder; null: one linear layer in, one out.
        linear: how the linear patch coder is told noise level and place; null: as the paper does.
        prediction_type: what the denoiser outputs, "epsilon" (the paper), "v_prediction", or
            "flow", which is rectified flow instead of DDPM.
        noise_schedule: of DDPM, "cosine" (the paper) or "linear".
        num_train_timesteps: steps of the DDPM noise schedule.
        learned_sigma: learn the variance of a DDPM step too (iDDPM, DiT).
        min_snr_gamma: weight images by min(SNR, gamma) (Min-SNR: 5); null: all alike.
        causal_images: patches see only earlier patches (the paper's ablation).
        diffusion_weight: lambda of L = L_LM + lambda * L_DDPM.
        num_codes: of the VQ autoencoder that makes images tokens, behind the vocabulary of the
            text; null: images are latents.
        z_loss_weight: of log^2 Z at every target, which keeps logits small (Chameleon: 1e-5).
        lr: peak learning rate of AdamW.
        text_lr_ratio: that of the Transformer as a share of `lr`, in [0, 1]; what patches have of
            their own, and the patch coder, learn at `lr`. 0 freezes it (LMFusion).
        betas: its two decay rates.
        muon: the blocks' matrices learn by Muon, at the same rate; the rest by AdamW.
        weight_decay: on matrices; norms, biases and embeddings have none.
        warmup_steps: optimizer steps of linear warm-up.
        lr_decay: from the peak to the last rate, "cosine" (the paper) or "linear".
        min_lr_ratio: last learning rate as a share of the peak.
        ema_decay: decay per optimizer step of the weights' average, 0 to keep none.
        compile: compile the network with torch.compile.
    """

    def __init__(
        self,
        transformer: TransformerConfig,
        patch_size: int = 2,
        latent_channels: int = 8,
        unet: UNetConfig | None = None,
        linear: LinearConfig | None = None,
        prediction_type: str = "epsilon",
        noise_schedule: str = "cosine",
        num_train_timesteps: int = 1000,
        learned_sigma: bool = False,
        min_snr_gamma: float | None = None,
        causal_images: bool = False,
        diffusion_weight: float = 5.0,
        num_codes: int | None = None,
        z_loss_weight: float = 0.0,
        lr: float = 3e-4,
        text_lr_ratio: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.95),
        muon: bool = False,
        weight_decay: float = 0.1,
        warmup_steps: int = 4000,
        lr_decay: str = "cosine",
        min_lr_ratio: float = 0.05,
        ema_decay: float = 0.9999,
        compile: bool = False,
    ):
        super().__init__()
        if not 0 <= text_lr_ratio <= 1:
            raise UserError(f"text_lr_ratio={text_lr_ratio} must be from 0 (frozen) to 1")
        if lr_decay not in DECAYS:
            raise UserError(f"lr_decay={lr_decay!r} must be one of {tuple(DECAYS)}")
        # Hyper-parameters are plain values, so that checkpoints do not depend on our classes.
        transformer, unet, linear = map(as_dict, (transformer, unet, linear))
        self.save_hyperparameters()
        transformer = TransformerConfig(**transformer)
        unet = None if unet is None else UNetConfig(**unet)
        linear = None if linear is None else LinearConfig(**linear)
        if num_codes is not None:
            check_code_options(num_codes, patch_size, unet, transformer)
        elif unet is not None:
            check_unet_config(unet, patch_size)
        if unet is not None and linear is not None:
            raise UserError(
                "unet and linear are both given and a model has one patch coder; leave one out"
            )
        self.config, self.unet, self.linear = transformer, unet, linear
        self.process = build_process(
            prediction_type, noise_schedule, num_train_timesteps, learned_sigma, min_snr_gamma
        )
        self.net: TransfusionModel | None = None
        self.ema: TransfusionModel | None = None
        self.tokenizer_proto: bytes | None = None
        self.loaded_step = 0  # of the checkpoint; an evaluation's own global_step is 0
        self.image_codec: dict | None = None
        self.row_length: int | None = None

    # ---------------------------------------------------------------- building

    def configure_model(self) -> None:
        """Build the network once, inside the strategy's device and precision context."""
        if self.net is not None:
            return
        hparams = self.hparams
        self.net = build_network(hparams)
        self.net.reset_parameters()
        if hparams.text_lr_ratio == 0:
            for parameter in self.net.transformer.text_parameters():
                parameter.requires_grad_(False)
        if hparams.ema_decay > 0:
            self.ema = deepcopy(self.net).requires_grad_(False)
        if self.device_mesh is not None:  # of ModelParallelStrategy
            for net in filter(None, (self.net, self.ema)):
                shard(net, self.device_mesh["data_parallel"])
        if hparams.compile:
            self.net.compile()

    @property
    def inference_net(self) -> TransfusionModel:
        """The averaged weights if there are any."""
        return self.net if self.ema is None else self.ema

    def setup(self, stage: str) -> None:
        """Refuse data that was prepared for another model; remember how to read our outputs."""
        data = self.trainer.datamodule
        check_data(data, self.config, self.linear, self.hparams)
        self.tokenizer_proto, self.row_length = data.tokenizer.proto, data.row_length
        self.image_codec = {
            "autoencoder": data.autoencoder_name,
            "latent_shape": data.image_shape and list(data.image_shape),
        }
        if len(shapes := getattr(data, "image_shapes", ())) > 1:  # of sources of several sizes
            self.image_codec["other_shapes"] = [list(s) for s in shapes if s != data.image_shape]

    def configure_optimizers(self) -> dict:
        """AdamW, or Muon with it; the learning rate warms up and decays."""
        hparams = self.hparams
        names = ("lr", "betas", "weight_decay", "text_lr_ratio", "muon")
        bf16 = "bf16" in str(self.trainer.precision)
        optimizer = build_optimizer(self.net, **{n: hparams[n] for n in names}, bf16=bf16)
        plan = (hparams.warmup_steps, self.trainer.max_steps, hparams.min_lr_ratio)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_scale(step, *plan, hparams.lr_decay)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    # ---------------------------------------------------------------- training

    def on_train_batch_start(self, batch: Batch, batch_index: int) -> None:
        """Draw what dropout drops from (seed, batch) alone, as noise is, so that runs resume."""
        if self.config.dropout:
            number = batch_index * self.trainer.world_size + self.global_rank
            generator = row_generator(self.trainer.datamodule.seed, number)
            torch.manual_seed(generator.initial_seed())

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """All losses on the same packed rows."""
        sums, weight = self.loss_sums(self.net, batch), self.hparams.z_loss_weight
        texts, codes = len(batch.target_index), len(batch.code_index)
        values = {"loss_lm": self.global_mean(sums.nll.sum(), texts)}
        if self.hparams.num_codes:  # codes are tokens as any
            values["loss_codes"] = self.global_mean(sums.code_nll.sum(), codes)
            loss = self.global_mean(sums.nll.sum() + sums.code_nll.sum(), texts + codes)
        else:
            values["loss_diffusion"] = self.global_mean(sums.diffusion, batch.num_noised_elements)
            loss = total_loss(*values.values(), self.hparams.diffusion_weight)
        if weight:
            values["loss_z"] = self.global_mean(sums.z, texts + codes)
            loss = loss + weight * values["loss_z"]
        values["loss"] = loss
        self.log_dict(
            {f"train/{name}": value.detach() for name, value in values.items()},
            batch_size=len(batch.input_ids),
            sync_dist=True,
        )
        return loss

    def loss_sums(self, net: TransfusionModel, batch: Batch) -> LossSums:
        """What a batch costs, before any mean."""
        causal, with_z = self.hparams.causal_images, bool(self.hparams.z_loss_weight)
        return loss_sums(net, batch, self.process, causal, with_z)

    def global_mean(self, total: Tensor, count: int) -> Tensor:
        """This rank's share of a mean over all ranks.

        DDP and FSDP average gradients over ranks; the mean of these shares over ranks is the sum of
        totals by the sum of counts, so that 2 ranks equal 1 with the same rows.
        """
        everyone = total.new_full((), float(count))  # no copy, which the device would wait for
        if self.trainer.world_size > 1:
            everyone = self.trainer.strategy.reduce(everyone, reduce_op="sum")
        return total * self.trainer.world_size / everyone.clamp(min=1)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the global norm, and log that norm."""
        limit = gradient_clip_val or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), limit)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # of all shards
        self.log("train/grad_norm", norm, batch_size=1)

    def optimizer_step(self, *args, **kwargs) -> None:
        """Step, then average the weights, with a decay that grows: the start is forgotten."""
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            step = self.trainer.global_step
            update_ema(self.ema, self.net, min(self.hparams.ema_decay, (1 + step) / (10 + step)))

    # ---------------------------------------------------------------- validation

    def on_validation_epoch_start(self) -> None:
        """Sums of losses, and of what has them, for each source of validation documents."""
        self.val_sums = {
            (source, name): (self._sum(), self._sum())
            for source in self.trainer.datamodule.source_names
            for name in ("loss_lm", "loss_codes", "loss_diffusion")
        }

    def _sum(self) -> SumMetric:
        """Over batches and ranks; NaN of a model that diverged stays NaN."""
        return SumMetric(nan_strategy="disable").set_dtype(torch.float64).to(self.device)

    def validation_step(
        self, batch: Batch, batch_index: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """Sum the losses of one source, with the averaged weights; nll (K,) for callbacks."""
        sums = self.loss_sums(self.inference_net, batch)
        nll, code_nll = sums.nll.double(), sums.code_nll.double()
        source = self.trainer.datamodule.source_names[dataloader_idx]
        for name, total, count in (
            ("loss_lm", nll.sum(), len(nll)),
            ("loss_codes", code_nll.sum(), len(code_nll)),
            ("loss_diffusion", sums.diffusion, batch.num_noised_elements),
        ):
            for sums, value in zip(self.val_sums[source, name], (total, count), strict=True):
                sums.update(value)
        return {"nll": nll}

    def on_validation_epoch_end(self) -> None:
        """Log `val/<source>/...`, means over all ranks."""
        for (source, name), sums in self.val_sums.items():
            total, count = (each.compute() for each in sums)  # the same on every rank
            if count:
                value = (total / count).float()
                self.log(f"val/{source}/{name}", value, add_dataloader_idx=False)

    test_step = validation_step
    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(
        self, batch: Batch, batch_index: int, dataloader_idx: int = 0
    ) -> list[Document]:
        """The documents of a batch; a callback says what is generated after them."""
        return unpack(batch, self.trainer.datamodule.tokenizer)

    # ---------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Keep what generation needs: the tokenizer and the autoencoder's name."""
        proto = bytearray(self.tokenizer_proto)
        checkpoint["tokenizer"] = torch.frombuffer(proto, dtype=torch.uint8)
        checkpoint["image_codec"] = self.image_codec
        checkpoint["row_length"] = self.row_length
        checkpoint["hyper_parameters"] = plain_hparams(checkpoint["hyper_parameters"])

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path, map_location=None, **arguments):
        """As in Lightning, also for checkpoints of older versions.

        Args:
            checkpoint_path: the file.
            map_location: as in torch.load.
            arguments: of Lightning's method, or values that replace hyper-parameters.
        """
        hparams = read_checkpoint(checkpoint_path, mmap=True)["hyper_parameters"]
        arguments = hparams | {"_instantiator": None} | arguments
        return super().load_from_checkpoint(checkpoint_path, map_location, **arguments)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Restore them; a checkpoint always has both."""
        proto = bytes(checkpoint["tokenizer"].numpy())
        if self.tokenizer_proto not in (None, proto):
            raise UserError(
                "the data's tokenizer is not the one this checkpoint was trained with; "
                "give the data `tokenizer: CHECKPOINT`, which takes the checkpoint's own"
            )
        self.tokenizer_proto = proto
        self.image_codec = checkpoint["image_codec"]
        self.loaded_step = checkpoint["global_step"]
        self.row_length = checkpoint.get("row_length")  # older ones do not have it

    def load_state_dict(self, state_dict: dict, strict: bool = True, assign: bool = False):
        """As in torch, with its list of misfits cut to one sentence."""
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            raise misfit(error) from error
