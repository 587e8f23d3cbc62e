"""The LightningModule that trains an autoencoder: VAE or VQ, its losses, its discriminator.

One AdamW has the autoencoder and the discriminator as groups of their own. As it works element by
element, that is two optimizers that step together, while a step is counted once, a batch goes
through the autoencoder once, and resume, precision and ranks are the trainer's as ever.
Shapes: B pictures of H x W pixels, C latent channels, h x w latents.
"""

from typing import Literal, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torchmetrics import MeanMetric

from tf_lightning import autoencoder_losses as losses
from tf_lightning.autoencoder_network import (
    AutoencoderConfig,
    blur,
    build_network,
    decode,
    encode_codes,
    encode_posterior,
)
from tf_lightning.batch import row_generator
from tf_lightning.checkpoint import misfit
from tf_lightning.data.pictures import PictureBatch
from tf_lightning.discriminator import PatchDiscriminator
from tf_lightning.errors import UserError
from tf_lightning.optim import lr_scale, parameter_groups
from tf_lightning.perceptual import LPIPS, FeatureDistance


class Reconstruction(NamedTuple):
    """What an autoencoder makes of pictures."""

    images: Tensor  # (B, 3, H, W), not clipped
    bottleneck: Tensor  # KL by the picture's elements, or the quantiser's loss
    latents: Tensor  # (B, C, h, w): the posterior's mean, or what is quantised
    ids: Tensor | None  # (B, h, w) of a VQ


class AutoencoderModule(L.LightningModule):
    """Trains an autoencoder; `callbacks.save_autoencoder` writes it for the Transformer.

    L = L1 + lpips LPIPS + gan s L_GAN + feature L_features + kl L_KL (Transfusion App. A), means
    over elements; a VQ has its codebook's and commitment loss, weights 1 and 0.25, in place of KL.

    Args:
        network: sizes; `num_codes` makes it a VQ.
        lpips_weight: of LPIPS; 0 needs no weights of others.
        lpips_network: "vgg", "alex" or "squeeze".
        feature_weight: of the self-supervised network's features (paper: 0.2).
        feature_model: file of that network, a ResNet of MoCo or DINO.
        gan_weight: of the discriminator's judgement; 0 trains none.
        gan_start_step: optimizer steps before it begins.
        adaptive_gan: scale it by s = the ratio of gradients at the last layer (VQGAN), else s = 1.
        kl_weight: of the KL divergence to N(0, 1).
        latent_noise: most noise on a VAE's latents, in standard deviations of a channel, reached
            after a third of the steps; the decoder learns to mend a diffusion model's errors.
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
        feature_weight: float = 0.0,
        feature_model: str | None = None,
        gan_weight: float = 0.5,
        gan_start_step: int = 50_000,
        adaptive_gan: bool = True,
        kl_weight: float = 1e-6,
        latent_noise: float = 0.0,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.5, 0.9),
        weight_decay: float = 0.0,
        warmup_steps: int = 1000,
        min_lr_ratio: float = 1.0,
        seed: int = 0,
    ):
        super().__init__()
        self.save_hyperparameters()
        if isinstance(network, dict):  # a checkpoint written by the command line
            network = AutoencoderConfig(**network)
        if feature_weight and not feature_model:
            raise UserError(f"feature_weight={feature_weight} needs feature_model: FILE, or be 0")
        if network.num_codes and latent_noise:
            raise UserError(f"latent_noise={latent_noise} is for a VAE; give a VQ latent_noise: 0")
        self.config = network
        self.autoencoder: nn.Module | None = None
        self.discriminator: PatchDiscriminator | None = None
        self.loaded_step = 0  # of the checkpoint; an evaluation's own global_step is 0
        self.frozen: dict[str, nn.Module] = {}  # no submodules: neither saved nor optimized

    # ---------------------------------------------------------------- building

    def before_training(self, trainer: L.Trainer, data: L.LightningDataModule) -> None:
        """Refuse what cannot be trained, and load the frozen networks, before any long work.

        Raises:
            UserError: sizes, steps or files that do not fit.
        """
        hparams, side = self.hparams, self.config.downsample
        if any(pixels % side for pixels in data.image_size):
            raise UserError(
                f"pictures of {'x'.join(map(str, data.image_size))} do not divide into cells of "
                f"{side}; give an image_size that is a multiple of {side}"
            )
        if hparams.gan_weight and not hparams.gan_start_step < trainer.max_steps:
            raise UserError(
                f"gan_start_step={hparams.gan_start_step} is not before the last step "
                f"(max_steps={trainer.max_steps}); start earlier, or give gan_weight: 0"
            )
        if self.frozen:
            return
        if hparams.lpips_weight:
            self.frozen["lpips"] = LPIPS(hparams.lpips_network)
        if hparams.feature_weight:
            self.frozen["features"] = FeatureDistance(hparams.feature_model)

    def configure_model(self) -> None:
        """Build the networks once."""
        if self.autoencoder is not None:
            return
        self.autoencoder = build_network(self.config)
        if self.hparams.gan_weight:
            self.discriminator = PatchDiscriminator()

    def setup(self, stage: str) -> None:
        """Check again: a trainer of one's own asks nobody before."""
        if stage == "fit":
            self.before_training(self.trainer, self.trainer.datamodule)

    def on_fit_start(self) -> None:
        """Bring the frozen networks along."""
        for network in self.frozen.values():
            network.to(self.device)

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

    # ---------------------------------------------------------------- training

    @property
    def gan_started(self) -> bool:
        """Whether the discriminator learns and judges at this step."""
        return self.discriminator is not None and self.global_step >= self.hparams.gan_start_step

    def training_step(self, batch: PictureBatch, batch_index: int) -> Tensor:
        """All losses on one batch."""
        images = batch.images.contiguous(memory_format=torch.channels_last)
        made = self.reconstruct(images, batch.rows)
        values = self.loss_terms(images, made.images)
        loss = self.weighted(values)
        values["bottleneck"] = made.bottleneck
        loss = loss + (1.0 if self.config.num_codes else self.hparams.kl_weight) * made.bottleneck
        if self.gan_started:
            loss = loss + self.adversarial(images, made.images, self.weighted(values), values)
        elif self.discriminator is not None:  # ranks wait for every weight's gradient
            loss = loss + sum(0.0 * weight.sum() for weight in self.discriminator.parameters())
        name = "loss_codebook" if self.config.num_codes else "loss_kl"
        values = {f"loss_{key}": value for key, value in values.items()}
        values |= {"loss": loss, name: values.pop("loss_bottleneck")}
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
            codes = encode_codes(self.autoencoder, images)
            made = decode(self.autoencoder, codes.latents).float()
            return Reconstruction(made, codes.loss, codes.projected, codes.ids)
        mean, logvar = posterior = encode_posterior(self.autoencoder, images)
        latents = mean
        if rows is not None:
            noise, more_noise, strength = self.noise(mean, rows)
            latents = blur(mean, posterior.sample(noise), strength, more_noise)
        made = decode(self.autoencoder, latents).float()
        kl = losses.kl_loss(mean, logvar, images[0].numel())
        return Reconstruction(made, kl, mean, None)

    def noise(self, mean: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Two noises like the latents and a strength (B,) for each row, whoever has that row."""
        drawn = []
        for row in rows.tolist():
            generator = row_generator(self.hparams.seed, row)
            both = torch.randn(2, *mean.shape[1:], generator=generator)
            drawn.append((both, torch.rand((), generator=generator)))
        both, share = (torch.stack(parts).to(mean.device) for parts in zip(*drawn, strict=True))
        ramp = min(1.0, 3 * self.global_step / max(1, self.trainer.max_steps))
        return both[:, 0], both[:, 1], self.hparams.latent_noise * ramp * share

    def loss_terms(self, images: Tensor, made: Tensor) -> dict[str, Tensor]:
        """L1, and what the frozen networks say, without their weights."""
        values = {"l1": F.l1_loss(made, images)}
        return values | {name: network(images, made) for name, network in self.frozen.items()}

    def weighted(self, values: dict[str, Tensor]) -> Tensor:
        """The reconstruction's terms together."""
        hparams = self.hparams
        weights = {"l1": 1.0, "lpips": hparams.lpips_weight, "features": hparams.feature_weight}
        return sum(weights[name] * value for name, value in values.items() if name in weights)

    def adversarial(
        self, images: Tensor, made: Tensor, reconstruction: Tensor, values: dict[str, Tensor]
    ) -> Tensor:
        """The discriminator's loss and what it weighs on the autoencoder; both into `values`.

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
        values |= {"gan": gan, "discriminator": own, "gan_scale": scale}
        return own + self.hparams.gan_weight * scale * gan

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
        """A new sum."""
        self.val_l1 = MeanMetric().to(self.device)

    def validation_step(self, batch: PictureBatch, batch_index: int) -> Reconstruction:
        """Reconstruct without noise; callbacks measure what is returned, of rows that count."""
        made = self.reconstruct(batch.images.contiguous(memory_format=torch.channels_last))
        made = made._replace(images=made.images.clamp(-1, 1))
        error = (made.images - batch.images).abs().mean((1, 2, 3))
        self.val_l1.update(error, weight=(batch.rows >= 0).float())
        return made

    def on_validation_epoch_end(self) -> None:
        """Log the mean error of pictures in [-1, 1]."""
        self.log("val/loss_l1", self.val_l1.compute())

    test_step = validation_step
    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    # ---------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Say what it is of."""
        checkpoint["autoencoder"] = "vq" if self.config.num_codes else "vae"

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Remember its step."""
        self.loaded_step = checkpoint["global_step"]

    def load_state_dict(self, state_dict: dict, strict: bool = True, assign: bool = False):
        """As in torch, with its list of misfits cut to one sentence."""
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            raise misfit(error) from error
