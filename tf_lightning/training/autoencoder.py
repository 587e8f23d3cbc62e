"""The LightningModule that trains an autoencoder (VAE or VQ) with an optional discriminator.

One AdamW updates the autoencoder and the discriminator, as separate parameter groups. AdamW works
element by element, so this equals two optimizers that step together; but Lightning counts one step,
each batch passes through the autoencoder once, and automatic optimization still applies.

Shapes: B images of H x W pixels, C latent channels, h x w latent grid.
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
    channel_std,
    decode_latents,
    encode_posterior,
    encode_vq,
    quantize,
    row_noise,
)
from tf_lightning.checkpoint import (
    AUTOENCODER,
    as_dict,
    plain_hparams,
    read_checkpoint,
    state_dict_error,
    upgrade,
)
from tf_lightning.data.image_only import ImageBatch
from tf_lightning.data.stream import as_batches
from tf_lightning.diffusion.timesteps import row_generator
from tf_lightning.errors import UserError
from tf_lightning.ranges import (
    Decay,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Share,
    check_arguments,
)
from tf_lightning.training.guard import StepGuard, check_finite
from tf_lightning.training.horizon import Horizon, check_warmup, epochs_to_steps, has_end
from tf_lightning.training.optim import lr_scale, parameter_groups, with_schedule
from tf_lightning.training.precision import (
    check_precision,
    clip_gradients,
    fp32_by_default,
    loss_scale,
)
from tf_lightning.training.ranks import check_same_weights
from tf_lightning.training.resume import check_resumed
from tf_lightning.training.steps import (
    backward_of_part,
    check_strategy,
    check_trainer,
    count_steps,
    give_back_steps,
    mean_over_ranks,
    take_whole_steps,
)

MIN_GAN_SIDE = 24  # pixels; below, the discriminator's instance norm has one value to normalize


class Reconstruction(NamedTuple):
    """The output of an autoencoder for a batch of images."""

    images: Tensor  # (B, 3, H, W), not clipped
    bottleneck_loss: Tensor  # () KL divergence per pixel element, or the codebook loss
    latents: Tensor  # (B, C, h, w) posterior mean, or the vectors before quantization
    ids: Tensor | None  # (B, h, w) codes of a VQ


class StepValues(NamedTuple):
    """Values of a whole optimizer step that each of its batches needs."""

    noise_std: Tensor | None = None  # (1, C, 1, 1) unit of the latent noise
    gan_scale: Tensor | None = None  # () factor of the adversarial loss


class AutoencoderModule(L.LightningModule):
    """Trains an autoencoder; `callbacks.save_autoencoder` writes it for the Transformer.

    The loss is L1 + lpips_weight * LPIPS + gan_weight * s * L_GAN + kl_weight * L_KL (Transfusion
    App. A), each a mean over the elements of all images of an optimizer step. A VQ has the codebook
    loss and 0.25 times the commitment loss in place of the KL term.

    Args:
        network: sizes of the autoencoder; `num_codes` makes it a VQ.
        lpips_weight: weight of LPIPS; 0 needs no pretrained weights.
        lpips_network: backbone of LPIPS: "vgg", "alex" or "squeeze".
        gan_weight: weight of the adversarial loss; 0: train no discriminator, and ignore
            `gan_start_step` and `adaptive_gan`.
        gan_start_step: optimizer step from which the discriminator is used.
        adaptive_gan: scale the adversarial loss by s, the ratio of gradient norms at the last layer
            (VQGAN); otherwise s = 1.
        kl_weight: weight of the KL divergence to N(0, 1) of a VAE; a VQ ignores it.
        latent_noise: largest noise that is added to the latents of a VAE, in standard deviations of
            a channel, reached after a third of the steps. It teaches the decoder to correct errors
            of a diffusion model.
        dead_after: steps without use after which a code of a VQ is dead; a VAE ignores it.
        restart_dead_codes: move dead codes of a VQ to encoder outputs of the batch; all codes at
            the start.
        lr: peak learning rate of AdamW, with linear warm-up and cosine decay.
        betas: decay rates of AdamW.
        weight_decay: weight decay of matrices and convolution kernels.
        warmup_steps: optimizer steps of warm-up.
        min_lr_ratio: last learning rate as a share of the peak; 1: constant.
        seed: seed of the noise, >= 0. On the command line it follows `seed_everything` where it is
            not given.
        max_bad_steps: end the run after this many steps in a row whose loss or gradient is not
            finite. Such steps change nothing.
        spike_sigma: leave out a step whose gradient norm is more than this many standard deviations
            above the mean of the last 100 steps; null: leave out no finite step.

    Raises:
        UserError: a value is out of range, or `latent_noise` is given for a VQ.
    """

    def __init__(
        self,
        network: AutoencoderConfig = AutoencoderConfig(),  # noqa: B008 - it is never modified
        lpips_weight: NonNegative = 1.0,
        lpips_network: Literal["vgg", "alex", "squeeze"] = "vgg",
        gan_weight: NonNegative = 0.5,
        gan_start_step: NonNegativeInt = 50_000,
        adaptive_gan: bool = True,
        kl_weight: NonNegative = 1e-6,
        latent_noise: NonNegative = 0.0,
        dead_after: PositiveInt = 1000,
        restart_dead_codes: bool = True,
        lr: NonNegative = 1e-4,
        betas: tuple[Decay, Decay] = (0.5, 0.9),
        weight_decay: NonNegative = 0.0,
        warmup_steps: NonNegativeInt = 1000,
        min_lr_ratio: Share = 1.0,
        seed: NonNegativeInt = 0,
        max_bad_steps: PositiveInt = 5,
        spike_sigma: Positive | None = None,
    ):
        super().__init__()
        check_arguments(AutoencoderModule.__init__, locals())
        network = as_dict(network)  # plain, so that checkpoints do not depend on our classes
        self.save_hyperparameters()
        network = AutoencoderConfig(**network)
        if network.num_codes and latent_noise:
            raise UserError(f"latent_noise={latent_noise} is for a VAE only; set it to 0 for a VQ")
        self.config = network
        self.autoencoder: nn.Module | None = None
        self.discriminator: PatchDiscriminator | None = None
        self.codebook_use: CodebookUsage | None = None
        self.loaded_step = 0  # step of the loaded checkpoint; trainer.global_step is 0 in validate
        self.reconstruction_loss: ReconstructionLoss | None = None  # built for training only
        self.guard, self.horizon = StepGuard(max_bad_steps, spike_sigma), Horizon()
        self.saves_alone = False  # whether rank zero saves without the others, after an error
        self.loss_scale = 1.0  # factor of the loss in backward passes

    # ---------------------------------------------------------------- building

    def before_training(self, trainer: L.Trainer, data: L.LightningDataModule) -> None:
        """Check the options and load the frozen networks, before any long work.

        Raises:
            UserError: sizes or steps do not fit, or a file is missing.
        """
        hparams = self.hparams
        check_trainer(trainer)
        check_strategy(trainer.strategy, shards=False)
        check_divisible(*data.image_size, self.config.downsample)
        if hparams.gan_weight and min(data.image_size) < MIN_GAN_SIDE:
            raise UserError(
                f"images of {data.image_size[0]}x{data.image_size[1]} pixels are too small for the "
                f"discriminator; give at least {MIN_GAN_SIDE} a side, or set gan_weight to 0"
            )
        self.check_gan_start(trainer)
        if self.reconstruction_loss is None:
            self.reconstruction_loss = ReconstructionLoss(
                hparams.lpips_weight, hparams.lpips_network
            )

    def check_gan_start(self, trainer: L.Trainer) -> None:
        """Raise UserError if the discriminator would start after the last step."""
        start, last = self.hparams.gan_start_step, trainer.max_steps
        if self.hparams.gan_weight and 0 < last <= start:
            raise UserError(
                f"gan_start_step={start} is not before the last step (max_steps={last}); start "
                "earlier, or set gan_weight to 0"
            )

    @fp32_by_default()
    def configure_model(self) -> None:
        """Build the autoencoder and, if needed, the discriminator and the codebook statistics."""
        if self.autoencoder is not None:
            return
        self.autoencoder = build_autoencoder(self.config)
        if self.hparams.gan_weight:
            self.discriminator = PatchDiscriminator()
        if self.config.num_codes:
            self.codebook_use = CodebookUsage(self.config.num_codes, self.hparams.dead_after)

    def setup(self, stage: str) -> None:
        """Check again, because a trainer used from Python does not call `before_training`."""
        check_precision(self.trainer.precision)
        if stage == "fit":
            self.before_training(self.trainer, self.trainer.datamodule)
            take_whole_steps(self.trainer)
            epochs_to_steps(self.trainer)
            check_warmup(self.trainer, self.hparams.warmup_steps)
            self.check_gan_start(self.trainer)
            if self.hparams.latent_noise and not has_end(self.trainer):
                raise UserError(
                    f"latent_noise={self.hparams.latent_noise} grows over a third of the run, but "
                    "this run has no end; give max_steps, max_epochs or max_time"
                )

    def teardown(self, stage: str) -> None:
        """Give the trainer its setting back."""
        if stage == "fit":
            give_back_steps(self.trainer)

    def on_fit_start(self) -> None:
        """Move the frozen networks to the device."""
        self.reconstruction_loss.to(self.device)

    def configure_optimizers(self) -> dict:
        """Build one AdamW for both networks, and the learning-rate schedule."""
        hparams = self.hparams
        groups = parameter_groups(self.autoencoder, hparams.weight_decay)
        if self.discriminator is not None:
            for group in parameter_groups(self.discriminator, hparams.weight_decay):
                groups.append(group | {"name": f"discriminator_{group['name']}"})
        optimizer = torch.optim.AdamW(groups, lr=hparams.lr, betas=hparams.betas)
        return with_schedule(optimizer, self.lr_scale)

    def lr_scale(self, step: int) -> float:
        """Return the factor of the peak learning rate after `step` optimizer steps."""
        hparams, end = self.hparams, self.horizon.steps(self.trainer, step)
        return lr_scale(step, hparams.warmup_steps, end, hparams.min_lr_ratio)

    @property
    def codebook(self) -> Tensor:
        """Code vectors of a VQ, (num_codes, code_dim), without gradient."""
        return self.autoencoder.quantize.embedding.weight.detach()

    @property
    def code_state(self) -> tuple[Tensor, Tensor]:
        """State of a VQ that `training_step` changes: its codes, and how long each was idle."""
        return self.codebook, self.codebook_use.idle

    # ---------------------------------------------------------------- training

    def on_train_start(self) -> None:
        """Check that all ranks start with the same weights."""
        check_same_weights(self)

    @property
    def gan_started(self) -> bool:
        """Whether the discriminator is used at this step."""
        return self.discriminator is not None and self.global_step >= self.hparams.gan_start_step

    def on_train_batch_start(self, batch: ImageBatch | list[ImageBatch], batch_index: int) -> None:
        """Read the factor of the loss, which changes only between steps."""
        self.loss_scale = loss_scale(self.trainer)

    def training_step(self, batch: ImageBatch | list[ImageBatch], batch_index: int) -> Tensor:
        """Compute and log all losses of an optimizer step.

        Args:
            batch: the batch of the step, or a list of all its batches, which are equally large.
            batch_index: number of the step.

        Returns:
            The share of the last batch in the loss; the gradients of the others are added here.
        """
        batches, means, ids = as_batches(batch), {}, []
        self.zero_grad()
        if self.config.num_codes:
            self.codes_before = [state.clone() for state in self.code_state]
        step = self.step_values(batches)
        for part in batches:
            made, values = self.batch_losses(part, step)
            ids.append(made.ids)
            for name, value in values.items():
                means[name] = means.get(name, 0) + value.detach() / len(batches)
            loss = values["loss"] / len(batches)
            if part is not batches[-1]:
                backward_of_part(self, loss)
        if self.config.num_codes:
            means |= self.count_codes(torch.cat(ids))
        means = {f"train/{name}": value for name, value in means.items()}
        self.log_dict(means, batch_size=1, sync_dist=True)
        self.step_loss = means["train/loss"]
        return loss

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer) -> None:
        """Do nothing: `training_step` has cleared the gradients before the step's first batch."""

    def batch_losses(
        self, batch: ImageBatch, step: StepValues
    ) -> tuple[Reconstruction, dict[str, Tensor]]:
        """Return the reconstructions of a batch and all its losses, means over its elements."""
        images = channels_last(batch)
        made = self.reconstruct(images, batch.rows, step.noise_std)
        reconstruction, values = self.reconstruction_loss(images, made.images)
        if self.config.num_codes:
            loss = reconstruction + made.bottleneck_loss
            values |= {"loss_codebook": made.bottleneck_loss}
        else:
            loss = reconstruction + self.hparams.kl_weight * made.bottleneck_loss
            values |= {"loss_kl": made.bottleneck_loss}
        if self.gan_started:
            adversarial, more = self.adversarial(
                images, made.images, reconstruction, step.gan_scale
            )
            loss, values = loss + adversarial, values | more
        elif self.discriminator is not None:  # DDP waits for a gradient of every weight
            loss = loss + sum(0.0 * weight.sum() for weight in self.discriminator.parameters())
        return made, values | {"loss": loss}

    def step_values(self, batches: list[ImageBatch]) -> StepValues:
        """Restart dead codes, and compute the values that several batches of a step share.

        With one batch, `batch_losses` computes these values itself.
        """
        if self.config.num_codes and self.hparams.restart_dead_codes:
            self.restart_codes(batches)
        if len(batches) == 1:
            return StepValues()
        noise_std = gan_scale = None
        if self.hparams.latent_noise:
            noise_std = self.noise_std(torch.cat([self.encode(batch) for batch in batches]))
        if self.gan_started and self.hparams.adaptive_gan:
            gradients = [self.last_layer_gradients(batch, noise_std) for batch in batches]
            gan_scale = losses.gan_scale(mean_over_ranks(torch.stack(gradients).mean(0)))
        return StepValues(noise_std, gan_scale)

    def encode(self, batch: ImageBatch) -> Tensor:
        """Return posterior means, or the vectors before quantization, detached, (B, C, h, w).

        Not under `no_grad`: autocast keeps the converted weights, and they would lack gradients.
        """
        if self.config.num_codes:
            return encode_vq(self.autoencoder, channels_last(batch)).detach()
        return encode_posterior(self.autoencoder, channels_last(batch)).mean.detach()

    def restart_codes(self, batches: list[ImageBatch]) -> None:
        """Move dead codes to encoder outputs of this step, the same on every rank."""
        if not self.codebook_use.dead.any():
            return
        vectors = [self.encode(batch).permute(0, 2, 3, 1).flatten(0, 2) for batch in batches]
        vectors = torch.stack(vectors)
        if self.trainer.world_size > 1:
            vectors = self.all_gather(vectors).transpose(0, 1)  # the order of the rows
        generator = row_generator(self.hparams.seed, self.global_step)
        self.codebook_use.restart(self.codebook, vectors.flatten(0, -2), generator)

    def noise_std(self, means: Tensor) -> Tensor:
        """Return the standard deviation of each channel over the images of all ranks."""
        if self.trainer.world_size > 1:
            means = self.all_gather(means.detach()).flatten(0, 1)
        return channel_std(means)

    def last_layer_gradients(self, batch: ImageBatch, noise_std: Tensor | None) -> Tensor:
        """Return the gradients that determine the scale of the adversarial loss."""
        images = channels_last(batch)
        made = self.reconstruct(images, batch.rows, noise_std).images
        reconstruction, _ = self.reconstruction_loss(images, made)
        last_weight = self.autoencoder.decoder.conv_out.weight
        gan = self.gan_loss(made)
        return losses.last_layer_gradients(reconstruction, gan, last_weight, self.loss_scale)

    def reconstruct(
        self, images: Tensor, rows: Tensor | None = None, noise_std: Tensor | None = None
    ) -> Reconstruction:
        """Encode and decode images.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            rows: index of each image in the training stream, (B,), which seeds the noise of
                training; None: no noise.
            noise_std: unit of the latent noise; None: that of these images and other ranks'.
        """
        if self.config.num_codes:
            projected = encode_vq(self.autoencoder, images)
            codes = quantize(self.autoencoder, projected)
            made = decode_latents(self.autoencoder, codes.latents)
            return Reconstruction(made, codes.loss, projected, codes.ids)
        mean, logvar = posterior = encode_posterior(self.autoencoder, images)
        latents = mean
        if rows is not None:
            noise, more_noise, share = row_noise(mean, rows, self.hparams.seed)
            latents = posterior.sample(noise)
            if self.hparams.latent_noise:
                step = self.global_step
                ramp = min(1.0, 3 * step / self.horizon.steps(self.trainer, step))
                strength = self.hparams.latent_noise * ramp * share
                std = self.noise_std(mean) if noise_std is None else noise_std
                latents = add_latent_noise(latents, std, strength, more_noise)
        made = decode_latents(self.autoencoder, latents)
        kl = losses.kl_loss(mean, logvar, images[0].numel())
        return Reconstruction(made, kl, mean, None)

    def count_codes(self, ids: Tensor) -> dict[str, Tensor]:
        """Update the codebook statistics with the codes of all ranks; return values to log."""
        counts = torch.bincount(ids.flatten(), minlength=self.config.num_codes)
        if self.trainer.world_size > 1:
            counts = self.trainer.strategy.reduce(counts, reduce_op="sum")
        self.codebook_use.update(counts)
        dead = self.codebook_use.dead.sum().float()
        return {"code_perplexity": losses.code_perplexity(counts).float(), "dead_codes": dead}

    def gan_loss(self, made: Tensor) -> Tensor:
        """Return the autoencoder's adversarial loss, with the discriminator's weights detached."""
        frozen = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
        return losses.gan_loss(functional_call(self.discriminator, frozen, (made,)))

    def adversarial(
        self,
        images: Tensor,
        made: Tensor,
        reconstruction: Tensor,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the adversarial part of the loss, and values to log.

        Each term trains one network: the discriminator's loss uses detached reconstructions, and
        the autoencoder's loss uses detached weights of the discriminator.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            made: their reconstructions.
            reconstruction: the reconstruction loss, for the adaptive scale.
            scale: the adaptive scale of the step; None: that of these images and other ranks'.
        """
        gan = self.gan_loss(made)
        if not self.hparams.adaptive_gan:
            scale = torch.ones((), device=made.device)
        elif scale is None:
            last_weight = self.autoencoder.decoder.conv_out.weight
            gradients = losses.last_layer_gradients(
                reconstruction, gan, last_weight, self.loss_scale
            )
            scale = losses.gan_scale(mean_over_ranks(gradients))
        real, fake = self.discriminator(images), self.discriminator(made.detach())
        loss_discriminator = losses.discriminator_loss(real, fake)
        values = {
            "loss_gan": gan,
            "loss_discriminator": loss_discriminator,
            "gan_scale": scale,
        }
        return loss_discriminator + self.hparams.gan_weight * scale * gan, values

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Drop the discriminator's gradient before it starts, so that it has no optimizer state."""
        if self.discriminator is not None and not self.gan_started:
            for weight in self.discriminator.parameters():
                weight.grad = None

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients of each network by itself; log the autoencoder's norm before."""
        how = gradient_clip_val, gradient_clip_algorithm
        norm = clip_gradients(self.autoencoder.parameters(), *how)
        both = norm
        if self.discriminator is not None:
            both = norm + clip_gradients(self.discriminator.parameters(), *how)
        self.log("train/grad_norm", norm, batch_size=1)
        try:
            self.guard.check(self, self.step_loss, both)
        finally:  # also when the guard ends the run, which is saved then
            if self.guard.leaves_out and self.config.num_codes:
                for state, before in zip(self.code_state, self.codes_before, strict=True):
                    state.copy_(before)

    # ---------------------------------------------------------------- validation

    def on_validation_epoch_start(self) -> None:
        """Reset the sum of errors and the number of images; NaN stays NaN."""
        self.val_l1, self.val_count = (
            SumMetric(nan_strategy="disable").set_dtype(torch.float64).to(self.device)
            for _ in range(2)
        )

    def validation_step(self, batch: ImageBatch, batch_index: int) -> Reconstruction:
        """Reconstruct without noise, clipped to [-1, 1]; callbacks measure the result.

        Images with a negative row only fill up the batch and are not counted.
        """
        made = self.reconstruct(channels_last(batch))
        made = made._replace(images=made.images.clamp(-1, 1))
        error = (made.images - batch.images).abs().mean((1, 2, 3))
        is_counted = batch.rows >= 0
        self.val_l1.update(error[is_counted].sum())
        self.val_count.update(is_counted.sum())
        return made

    def on_validation_epoch_end(self) -> None:
        """Log the mean absolute error of pixels in [-1, 1]."""
        self.log("val/loss_l1", self.val_l1.compute() / self.val_count.compute())

    test_step = validation_step
    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    # ---------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Record the autoencoder type.

        Raises:
            UserError: a weight is not finite, or the ranks have different weights.
        """
        check_finite(checkpoint, self.trainer, self.saves_alone)
        check_same_weights(self, self.saves_alone)
        checkpoint["step_guard"] = self.guard.state_dict()
        checkpoint["autoencoder"] = "vq" if self.config.num_codes else "vae"
        checkpoint["hyper_parameters"] = plain_hparams(checkpoint["hyper_parameters"])

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path, map_location=None, **arguments):
        """Build the module of a checkpoint; see `Transfusion.load_from_checkpoint`."""
        hparams = read_checkpoint(checkpoint_path, AUTOENCODER, mmap=True)["hyper_parameters"]
        arguments = hparams | {"_instantiator": None} | arguments
        return super().load_from_checkpoint(checkpoint_path, map_location, **arguments)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Restore the step.

        Raises:
            UserError: the run resumes with another network.
        """
        upgrade(checkpoint)
        if self._trainer is not None and self.trainer.state.fn == "fit":
            changeable = set(self.hparams) - {"network"}
            check_resumed(self.hparams, checkpoint, changeable, {"gan_weight"})
        count_steps(checkpoint)
        self.loaded_step = checkpoint["global_step"]
        if "step_guard" in checkpoint:  # missing in old checkpoints
            self.guard.load_state_dict(checkpoint["step_guard"])

    def load_state_dict(self, state_dict: dict, strict: bool = True, assign: bool = False):
        """Load weights as torch does, with an error message of one sentence."""
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            raise state_dict_error(error) from error


def channels_last(batch: ImageBatch) -> Tensor:
    """Return the images of a batch in the memory format that convolutions are fastest in."""
    return batch.images.contiguous(memory_format=torch.channels_last)
