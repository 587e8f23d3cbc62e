"""The LightningModule that trains an autoencoder: VAE or VQ, its losses, its discriminator.

One AdamW has the autoencoder and the discriminator as groups of their own. As it works element by
element, that is two optimizers that step together, while a step is counted once, a batch goes
through the autoencoder once, and resume, precision and ranks are the trainer's as ever.
Shapes: B pictures of H x W pixels, C latent channels, h x w latents.
"""

from typing import Literal, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torchmetrics import SumMetric

from tf_lightning.autoencoder import losses
from tf_lightning.autoencoder.frozen import check_divisible
from tf_lightning.autoencoder.losses import PatchDiscriminator, ReconstructionLoss
from tf_lightning.autoencoder.network import (
    AutoencoderConfig,
    CodebookUsage,
    add_latent_noise,
    build_autoencoder,
    decode_latents,
    encode_posterior,
    encode_vq,
    quantize,
    row_noise,
)
from tf_lightning.checkpoint import (
    AUTOENCODER,
    as_dict,
    misfit,
    plain_hparams,
    read_checkpoint,
)
from tf_lightning.data.image_only import ImageBatch
from tf_lightning.diffusion.timesteps import row_generator
from tf_lightning.errors import UserError
from tf_lightning.training.optim import lr_scale, parameter_groups


class Reconstruction(NamedTuple):
    """What an autoencoder makes of pictures."""

    images: Tensor  # (B, 3, H, W), not clipped
    bottleneck: Tensor  # KL by the picture's elements, or the quantiser's loss
    latents: Tensor  # (B, C, h, w): the posterior's mean, or what is quantised
    ids: Tensor | None  # (B, h, w) of a VQ


class AutoencoderModule(L.LightningModule):
    """Trains an autoencoder; `callbacks.save_autoencoder` writes it for the Transformer.

    L = L1 + lpips LPIPS + gan s L_GAN + kl L_KL (Transfusion App. A), means
    over elements; a VQ has its codebook's and commitment loss, weights 1 and 0.25, in place of KL.

    Args:
        network: sizes; `num_codes` makes it a VQ.
        lpips_weight: of LPIPS; 0 needs no weights of others.
        lpips_network: "vgg", "alex" or "squeeze".
        gan_weight: of the discriminator's judgement; 0 trains none.
        gan_start_step: optimizer steps before it begins.
        adaptive_gan: scale it by s = the ratio of gradients at the last layer (VQGAN), else s = 1.
        kl_weight: of the KL divergence to N(0, 1).
        latent_noise: most noise on a VAE's latents, in standard deviations of a channel, reached
            after a third of the steps; the decoder learns to mend a diffusion model's errors.
        dead_after: steps without use after which a VQ's code is dead.
        restart_dead_codes: put dead codes where the encoder is, all of them at the start.
        lr: peak learning rate of AdamW; linear warm-up, cosine decay.
        betas: its two decay rates.
        weight_decay: on matrices and kernels.
        warmup_steps: optimizer steps of warm-up.
        min_lr_ratio: last learning rate as a share of the peak; 1 = constant.
        seed: of the noise.
    """

    def __init__(
        self,
        network: AutoencoderConfig = AutoencoderConfig(),  # noqa: B008 - nobody changes it
        lpips_weight: float = 1.0,
        lpips_network: Literal["vgg", "alex", "squeeze"] = "vgg",
        gan_weight: float = 0.5,
        gan_start_step: int = 50_000,
        adaptive_gan: bool = True,
        kl_weight: float = 1e-6,
        latent_noise: float = 0.0,
        dead_after: int = 1000,
        restart_dead_codes: bool = True,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.5, 0.9),
        weight_decay: float = 0.0,
        warmup_steps: int = 1000,
        min_lr_ratio: float = 1.0,
        seed: int = 0,
    ):
        super().__init__()
        network = as_dict(network)  # plain, so that checkpoints do not depend on our classes
        self.save_hyperparameters()
        network = AutoencoderConfig(**network)
        if network.num_codes and latent_noise:
            raise UserError(f"latent_noise={latent_noise} is for a VAE; give a VQ latent_noise: 0")
        self.config = network
        self.autoencoder: nn.Module | None = None
        self.discriminator: PatchDiscriminator | None = None
        self.codebook_use: CodebookUsage | None = None
        self.loaded_step = 0  # of the checkpoint; an evaluation's own global_step is 0
        self.reconstruction_loss: ReconstructionLoss | None = None  # of training alone

    # ---------------------------------------------------------------- building

    def before_training(self, trainer: L.Trainer, data: L.LightningDataModule) -> None:
        """Refuse what cannot be trained, and load the frozen networks, before any long work.

        Raises:
            UserError: sizes, steps or files that do not fit.
        """
        hparams = self.hparams
        if trainer.max_steps < 1:
            raise UserError(f"max_steps={trainer.max_steps} has no end; give trainer.max_steps")
        check_divisible(*data.image_size, self.config.downsample)
        if hparams.gan_weight and not hparams.gan_start_step < trainer.max_steps:
            raise UserError(
                f"gan_start_step={hparams.gan_start_step} is not before the last step "
                f"(max_steps={trainer.max_steps}); start earlier, or give gan_weight: 0"
            )
        if self.reconstruction_loss is None:
            self.reconstruction_loss = ReconstructionLoss(
                hparams.lpips_weight, hparams.lpips_network
            )

    def configure_model(self) -> None:
        """Build the networks once."""
        if self.autoencoder is not None:
            return
        self.autoencoder = build_autoencoder(self.config)
        if self.hparams.gan_weight:
            self.discriminator = PatchDiscriminator()
        if self.config.num_codes:
            self.codebook_use = CodebookUsage(self.config.num_codes, self.hparams.dead_after)

    def setup(self, stage: str) -> None:
        """Check again: a trainer of one's own asks nobody before."""
        if stage == "fit":
            self.before_training(self.trainer, self.trainer.datamodule)

    def on_fit_start(self) -> None:
        """Bring the frozen networks along."""
        self.reconstruction_loss.to(self.device)

    def configure_optimizers(self) -> dict:
        """AdamW with linear warm-up and cosine decay, for both networks."""
        hparams = self.hparams
        groups = parameter_groups(self.autoencoder, hparams.weight_decay)
        if self.discriminator is not None:
            own = parameter_groups(self.discriminator, hparams.weight_decay)
            groups += [group | {"name": f"discriminator_{group['name']}"} for group in own]
        optimizer = torch.optim.AdamW(groups, lr=hparams.lr, betas=hparams.betas)
        max_steps = self.trainer.max_steps
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: lr_scale(step, hparams.warmup_steps, max_steps, hparams.min_lr_ratio),
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    @property
    def codebook(self) -> Tensor:
        """A VQ's codes, (num_codes, code_dim), without gradient."""
        return self.autoencoder.quantize.embedding.weight.detach()

    # ---------------------------------------------------------------- training

    @property
    def gan_started(self) -> bool:
        """Whether the discriminator learns and judges at this step."""
        return self.discriminator is not None and self.global_step >= self.hparams.gan_start_step

    def training_step(self, batch: ImageBatch, batch_index: int) -> Tensor:
        """All losses on one batch."""
        images = batch.images.contiguous(memory_format=torch.channels_last)
        made = self.reconstruct(images, batch.rows)
        reconstruction, values = self.reconstruction_loss(images, made.images)
        if self.config.num_codes:
            loss = reconstruction + made.bottleneck
            values |= {"loss_codebook": made.bottleneck} | self.count_codes(made.ids)
        else:
            loss = reconstruction + self.hparams.kl_weight * made.bottleneck
            values |= {"loss_kl": made.bottleneck}
        if self.gan_started:
            adversarial, more = self.adversarial(images, made.images, reconstruction)
            loss, values = loss + adversarial, values | more
        elif self.discriminator is not None:  # ranks wait for every weight's gradient
            loss = loss + sum(0.0 * weight.sum() for weight in self.discriminator.parameters())
        values |= {"loss": loss}
        self.log_dict(
            {f"train/{key}": value.detach() for key, value in values.items()},
            batch_size=len(images),
            sync_dist=True,
        )
        return loss

    def reconstruct(self, images: Tensor, rows: Tensor | None = None) -> Reconstruction:
        """Through the bottleneck and back; with the noise of training if `rows` are given.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            rows: places in the stream (B,), which the noise belongs to.
        """
        if self.config.num_codes:
            projected = encode_vq(self.autoencoder, images)
            if rows is not None and self.hparams.restart_dead_codes:
                vectors = projected.detach().permute(0, 2, 3, 1).flatten(0, 2)
                vectors = self.trainer.strategy.broadcast(vectors)  # the same on every rank
                generator = row_generator(self.hparams.seed, self.global_step)
                self.codebook_use.restart(self.codebook, vectors, generator)
            codes = quantize(self.autoencoder, projected)
            made = decode_latents(self.autoencoder, codes.latents)
            return Reconstruction(made, codes.loss, projected, codes.ids)
        mean, logvar = posterior = encode_posterior(self.autoencoder, images)
        latents = mean
        if rows is not None:
            noise, more_noise, share = row_noise(mean, rows, self.hparams.seed)
            ramp = min(1.0, 3 * self.global_step / self.trainer.max_steps)
            strength = self.hparams.latent_noise * ramp * share
            latents = add_latent_noise(mean, posterior.sample(noise), strength, more_noise)
        made = decode_latents(self.autoencoder, latents)
        kl = losses.kl_loss(mean, logvar, images[0].numel())
        return Reconstruction(made, kl, mean, None)

    def count_codes(self, ids: Tensor) -> dict[str, Tensor]:
        """Note the codes that a step picked, on all ranks; what is logged of them."""
        counts = torch.bincount(ids.flatten(), minlength=self.config.num_codes)
        if self.trainer.world_size > 1:
            counts = self.trainer.strategy.reduce(counts, reduce_op="sum")
        self.codebook_use.update(counts)
        dead = self.codebook_use.dead.sum().float()
        return {"code_perplexity": losses.code_perplexity(counts).float(), "dead_codes": dead}

    def adversarial(
        self, images: Tensor, made: Tensor, reconstruction: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the discriminator adds to the loss, and its terms.

        Each trains its own network alone: the discriminator sees reconstructions without their
        history, and judges with weights that are constants.
        """
        frozen = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
        gan = losses.gan_loss(functional_call(self.discriminator, frozen, (made,)))
        scale = torch.ones((), device=made.device)
        if self.hparams.adaptive_gan:
            scale = losses.gan_scale(reconstruction, gan, self.autoencoder.decoder.conv_out.weight)
        real, fake = self.discriminator(images), self.discriminator(made.detach())
        own = losses.discriminator_loss(real, fake)
        values = {"loss_gan": gan, "loss_discriminator": own, "gan_scale": scale}
        return own + self.hparams.gan_weight * scale * gan, values

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """A discriminator that has not begun has no gradient, and so no optimizer state."""
        if self.discriminator is not None and not self.gan_started:
            for weight in self.discriminator.parameters():
                weight.grad = None

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each network by its own norm; log the autoencoder's."""
        limit = gradient_clip_val or float("inf")
        norm = nn.utils.clip_grad_norm_(self.autoencoder.parameters(), limit)
        if self.discriminator is not None:
            nn.utils.clip_grad_norm_(self.discriminator.parameters(), limit)
        self.log("train/grad_norm", norm, batch_size=1)

    # ---------------------------------------------------------------- validation

    def on_validation_epoch_start(self) -> None:
        """New sums, of errors and of pictures; a NaN stays one."""
        self.val_l1, self.val_count = (
            SumMetric(nan_strategy="disable").set_dtype(torch.float64).to(self.device)
            for _ in range(2)
        )

    def validation_step(self, batch: ImageBatch, batch_index: int) -> Reconstruction:
        """Reconstruct without noise; callbacks measure what is returned, of rows that count."""
        made = self.reconstruct(batch.images.contiguous(memory_format=torch.channels_last))
        made = made._replace(images=made.images.clamp(-1, 1))
        error = (made.images - batch.images).abs().mean((1, 2, 3))
        counts = batch.rows >= 0
        self.val_l1.update(error[counts].sum())
        self.val_count.update(counts.sum())
        return made

    def on_validation_epoch_end(self) -> None:
        """Log the mean error of pictures in [-1, 1]."""
        self.log("val/loss_l1", self.val_l1.compute() / self.val_count.compute())

    test_step = validation_step
    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    # ---------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Say what it is of."""
        checkpoint["autoencoder"] = "vq" if self.config.num_codes else "vae"
        checkpoint["hyper_parameters"] = plain_hparams(checkpoint["hyper_parameters"])

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path, map_location=None, **arguments):
        """As in Lightning, also for checkpoints of older versions.

        Args:
            checkpoint_path: the file.
            map_location: as in torch.load.
            arguments: of Lightning's method, or values that replace hyper-parameters.
        """
        hparams = read_checkpoint(checkpoint_path, AUTOENCODER, mmap=True)["hyper_parameters"]
        arguments = hparams | {"_instantiator": None} | arguments
        return super().load_from_checkpoint(checkpoint_path, map_location, **arguments)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Remember its step."""
        self.loaded_step = checkpoint["global_step"]

    def load_state_dict(self, state_dict: dict, strict: bool = True, assign: bool = False):
        """As in torch, with its list of misfits cut to one sentence."""
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            raise misfit(error) from error
