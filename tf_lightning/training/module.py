"""The LightningModule of a Transfusion model: building, training, validation and checkpoints.

It is the only file of the model's training that touches the trainer, the optimizer and `self.log`.
Its hyper-parameters must match the weights or describe the training. Options of an evaluation
belong to callbacks.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Annotated, Any, Literal

import lightning as L
import torch
from torch import Tensor
from torchmetrics import SumMetric

from tf_lightning.autoencoder.recorded import as_hint, with_data
from tf_lightning.batch import Batch, Document, unpack
from tf_lightning.checkpoint import (
    as_dict,
    find_checkpoint,
    plain_hparams,
    read_checkpoint,
    state_dict_error,
    upgrade,
)
from tf_lightning.data.stream import as_batches
from tf_lightning.diffusion.process import MinSNRGamma, NumTrainTimesteps, process_from_hparams
from tf_lightning.diffusion.timesteps import row_generator
from tf_lightning.errors import UserError
from tf_lightning.model.attention import build_attention
from tf_lightning.model.patches import LinearConfig, has_time_token
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.model.transfusion import (
    TransfusionModel,
    build_network,
    check_code_options,
    update_ema,
)
from tf_lightning.model.unet import UNetConfig, check_unet_config
from tf_lightning.ranges import (
    Decay,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Range,
    Share,
    check_arguments,
)
from tf_lightning.sharded import ShardedWeights
from tf_lightning.training.activation_checkpointing import checkpoint_activations
from tf_lightning.training.breakdown import LOSSES, LossBreakdown
from tf_lightning.training.compiled_blocks import compile_blocks
from tf_lightning.training.fp8 import Recipe, convert_linears
from tf_lightning.training.fsdp import (
    DrawWhole,
    apply_fsdp,
    number_states_by_module,
    reshard,
    sharding_mesh,
)
from tf_lightning.training.gpu_options import check_flash, check_fp8, is_installed
from tf_lightning.training.guard import StepGuard, check_finite
from tf_lightning.training.horizon import Horizon, check_warmup, epochs_to_steps
from tf_lightning.training.losses import LossSums, loss_sums, total_loss
from tf_lightning.training.optim import DECAYS, build_optimizer, lr_scale, with_schedule
from tf_lightning.training.precision import check_precision, clip_gradients, fp32_by_default
from tf_lightning.training.ranks import check_same_weights
from tf_lightning.training.resume import check_resumed
from tf_lightning.training.steps import (
    backward_of_part,
    check_mesh,
    check_shards,
    check_strategy,
    check_trainer,
    count_steps,
    give_back_steps,
    take_whole_steps,
)

# Hyper-parameters that take effect when a run resumes with another value.
CHANGEABLE = {
    *("lr", "betas", "weight_decay", "warmup_steps", "lr_decay", "min_lr_ratio", "ema_decay"),
    *("diffusion_weight", "z_loss_weight", "min_snr_gamma", "compile", "transformer.dropout"),
    *("max_bad_steps", "spike_sigma", "activation_checkpointing"),
    *("ema_device", "shard_size", "reshard_after_forward", "fp8", "flash_attention"),
}
SWITCHES = {"ema_decay"}


class Transfusion(L.LightningModule):
    """Trains one Transformer to predict the next text token and to denoise images.

    With `num_codes`, images are discrete tokens and the loss is the language-model loss alone
    (Chameleon). Then patch_size is 1, and latent_channels, prediction_type, noise_schedule,
    num_train_timesteps and diffusion_weight, which recipes of both kinds share, are ignored.

    Args:
        transformer: sizes of the shared Transformer.
        patch_size: side of a patch in latent pixels; the data must have the same.
        latent_channels: channels of the autoencoder's latents.
        unet: sizes of a U-Net patch coder; null: a linear patch coder.
        linear: options of the linear patch coder; null: the paper's options.
        prediction_type: output of the network: epsilon (paper) or v_prediction of DDPM, or flow,
            which is the velocity of rectified flow.
        noise_schedule: noise schedule of DDPM, "cosine" (paper) or "linear".
        num_train_timesteps: number of timesteps of the DDPM noise schedule.
        learned_sigma: also predict the variance of each DDPM step (iDDPM, DiT).
        min_snr_gamma: weight the loss of each image by min(SNR, gamma) (Min-SNR: 5); null: no
            weighting.
        causal_images: let patches attend to earlier patches only (the paper's ablation).
        diffusion_weight: lambda in L = L_LM + lambda * L_DDPM.
        num_codes: codebook size of the VQ autoencoder that turns images into tokens; these are
            added to the vocabulary. null: images are latents.
        z_loss_weight: weight of log^2 Z at every target, which keeps logits small (Chameleon:
            1e-5).
        lr: peak learning rate.
        text_lr_ratio: learning rate of the Transformer's text weights as a share of `lr`, in
            [0, 1]. Image weights and the patch coder learn at `lr`. 0 freezes the text weights
            (LMFusion).
        betas: decay rates of AdamW.
        muon: use Muon for the matrices of the blocks, at the same rate; AdamW for the rest.
        weight_decay: weight decay of matrices; norms, biases and embeddings have none.
        warmup_steps: optimizer steps of linear warm-up.
        lr_decay: shape of the decay to the last learning rate, "cosine" (paper) or "linear".
        min_lr_ratio: last learning rate as a share of the peak.
        ema_decay: decay per optimizer step of the weights' moving average; 0: keep none.
        ema_device: "cpu" keeps the moving average in the memory of the host between validations;
            null: on the device of the model.
        activation_checkpointing: what each block keeps for the backward pass, which computes the
            rest again. "none": all activations. "selective": the outputs of matrix products,
            convolutions and attention. "full": its inputs. The gradients are the same.
        shard_size: ranks that share one copy of the weights with ModelParallelStrategy, such as the
            GPUs of a node; each further group of as many ranks has a copy (HSDP). null: all ranks
            share one copy (FSDP2).
        reshard_after_forward: with ModelParallelStrategy, free the gathered weights of a block
            after its forward pass and gather them again in the backward pass. false: keep them,
            which needs more memory and less communication.
        compile: compile the training passes of the Transformer's blocks with torch.compile. All
            blocks share the compiled code; validation and generation do not use it.
        fp8: train with matrix products of the blocks in fp8, by torchao, on a GPU of compute
            capability 8.9 or higher with bf16-mixed. "tensorwise": one scale for each tensor, the
            fastest. "rowwise": one for each row. "rowwise_with_gw_hp": the same, with gradients of
            weights in bf16, the most accurate. null: bf16. Only with `compile` is it faster.
        flash_attention: on a GPU of compute capability 9 to 11, such as H100 or B200, train with
            the kernels of FlashAttention 4 (package flash-attn-4) under FlexAttention's mask.
        max_bad_steps: end the run after this many steps in a row whose loss or gradient is not
            finite. Such steps change nothing. On a GPU this is checked when the trainer logs.
        spike_sigma: leave out a step whose gradient norm is more than this many standard deviations
            above the mean of the last 100 steps; null: leave out no finite step.

    Raises:
        UserError: a value is out of range, or two options exclude each other.
    """

    def __init__(
        self,
        transformer: TransformerConfig,
        patch_size: PositiveInt = 2,
        latent_channels: PositiveInt = 8,
        unet: UNetConfig | None = None,
        linear: LinearConfig | None = None,
        prediction_type: str = "epsilon",
        noise_schedule: str = "cosine",
        num_train_timesteps: NumTrainTimesteps = 1000,
        learned_sigma: bool = False,
        min_snr_gamma: MinSNRGamma = None,
        causal_images: bool = False,
        diffusion_weight: NonNegative = 5.0,
        num_codes: Annotated[int, Range(ge=2, note="null for latents")] | None = None,
        z_loss_weight: NonNegative = 0.0,
        lr: NonNegative = 3e-4,
        text_lr_ratio: Annotated[float, Range(ge=0, le=1, note="0 freezes the text weights")] = 1.0,
        betas: tuple[Decay, Decay] = (0.9, 0.95),
        muon: bool = False,
        weight_decay: NonNegative = 0.1,
        warmup_steps: NonNegativeInt = 4000,
        lr_decay: str = "cosine",
        min_lr_ratio: Share = 0.05,
        ema_decay: Decay = 0.9999,
        ema_device: Literal["cpu"] | None = None,
        activation_checkpointing: Literal["none", "selective", "full"] = "none",
        shard_size: Annotated[int, Range(ge=2)] | None = None,
        reshard_after_forward: bool = True,
        compile: bool = False,
        fp8: Recipe | None = None,
        flash_attention: bool = False,
        max_bad_steps: PositiveInt = 5,
        spike_sigma: Positive | None = None,
    ):
        super().__init__()
        check_arguments(Transfusion.__init__, locals())
        if lr_decay not in DECAYS:
            raise UserError(f"lr_decay={lr_decay!r} must be one of {tuple(DECAYS)}")
        # Hyper-parameters are plain values, so that checkpoints do not depend on our classes.
        transformer, unet, linear = map(as_dict, (transformer, unet, linear))
        self.save_hyperparameters()
        transformer = TransformerConfig(**transformer)
        unet = None if unet is None else UNetConfig(**unet)
        linear = None if linear is None else LinearConfig(**linear)
        check_image_options(self.hparams, transformer, unet, linear)
        self.config, self.unet, self.linear = transformer, unet, linear
        self.process = process_from_hparams(self.hparams)  # None: images are discrete codes
        self.net: TransfusionModel | None = None
        self.ema: TransfusionModel | None = None
        self.guard, self.horizon = StepGuard(max_bad_steps, spike_sigma), Horizon()
        self.saves_alone = False  # whether rank zero saves without the others, after an error
        self.breakdown: LossBreakdown | None = None  # while the module is trained
        self.tokenizer_proto: bytes | None = None
        self.loaded_weights = "raw"  # "ema" for an exported folder of EMA weights
        self.loaded_step = 0  # step of the loaded checkpoint; trainer.global_step is 0 in validate
        self.image_codec: dict | None = None
        self.row_length: int | None = None

    # ---------------------------------------------------------------- building

    def before_training(self, trainer: L.Trainer, data: L.LightningDataModule) -> None:
        """Check the trainer's settings before any long work.

        Raises:
            UserError: a setting is out of range or not supported.
        """
        check_trainer(trainer)
        check_strategy(trainer.strategy, shards=True)
        check_shards(trainer, self.hparams.shard_size)
        run = self.config, trainer.precision, trainer.strategy.root_device
        if self.hparams.fp8:
            check_fp8(self.hparams.fp8, *run)
        if self.hparams.flash_attention:
            check_flash(*run)

    @fp32_by_default()
    def configure_model(self) -> None:
        """Build the network and its EMA copy in the strategy's device and precision context.

        For ModelParallelStrategy they are built without memory, sharded, and then initialized, with
        the same values as without it.

        Raises:
            UserError: ModelParallelStrategy has tensor parallelism.
        """
        if self.net is not None:
            return
        if self.device_mesh is None:
            self.build()
            self.prepare_blocks()
            self.net.reset_parameters()
        else:  # set by ModelParallelStrategy
            axes = ("data_parallel", "tensor_parallel")
            check_mesh(*(self.device_mesh[axis].size() for axis in axes))
            device = self.trainer.strategy.root_device
            with DrawWhole(device), torch.device("meta"):
                self.build()
            self.prepare_blocks()
            self.shard(device)
            with DrawWhole(device):
                self.net.reset_parameters()
        if self.ema is not None:
            copy_weights(self.net, self.ema)

    def build(self) -> None:
        """Build the network and its EMA copy, without initial values."""
        self.net = build_network(self.hparams)
        if self.hparams.text_lr_ratio == 0:
            for parameter in self.net.transformer.text_parameters():
                parameter.requires_grad_(False)
        if self.hparams.ema_decay > 0:
            self.ema = deepcopy(self.net).requires_grad_(False)

    def prepare_blocks(self) -> None:
        """Let the blocks of the network train in fp8, with checkpointing and compiled, if asked."""
        if self.hparams.fp8 and is_installed("torchao"):  # without it one can still generate
            for modules, _ in self.net.transformer.blocks():
                convert_linears(modules, self.hparams.fp8)
        checkpoint_activations(self.net, self.hparams.activation_checkpointing)
        if self.hparams.compile:
            compile_blocks(self.net.transformer)

    def shard(self, device: torch.device) -> None:
        """Shard networks of the meta device, and give the shards memory on a device."""
        mesh = sharding_mesh(self.device_mesh["data_parallel"], self.hparams.shard_size)
        options = self.trainer.precision, self.hparams.reshard_after_forward
        for net in filter(None, (self.net, self.ema)):
            apply_fsdp(net, mesh, *options)
            net.to_empty(device=device)

    @property
    def inference_net(self) -> TransfusionModel:
        """The network with EMA weights, or the trained network if none are kept.

        EMA weights that are kept on the CPU are moved to the module's device, where they stay until
        the next training step.
        """
        if self.ema is None:
            return self.net
        return move(self.ema, self.device)

    @property
    def inference_weights(self) -> str:
        """Kind of these weights, "ema" or "raw"."""
        return self.loaded_weights if self.ema is None else "ema"

    def setup(self, stage: str) -> None:
        """Check trainer and data, and keep the entries of a checkpoint besides the weights."""
        data = self.trainer.datamodule
        check_precision(self.trainer.precision)
        if stage == "fit":
            self.before_training(self.trainer, data)
            take_whole_steps(self.trainer)
            epochs_to_steps(self.trainer)
            check_warmup(self.trainer, self.hparams.warmup_steps)
        self.check_data(data)
        self.tokenizer_proto, self.row_length = data.tokenizer.proto, data.row_length
        self.image_codec = {
            "autoencoder": as_hint(data.autoencoder_name),
            "fingerprint": getattr(data, "autoencoder_fingerprint", None),
            "latent_shape": data.image_shape and list(data.image_shape),
        }
        shapes = getattr(data, "image_shapes", ())  # one for each resolution of the sources
        if len(shapes) > 1:
            self.image_codec["other_shapes"] = [list(s) for s in shapes if s != data.image_shape]

    def teardown(self, stage: str) -> None:
        """Give the trainer its setting back."""
        if stage == "fit":
            give_back_steps(self.trainer)

    def check_data(self, data: L.LightningDataModule) -> None:
        """Check that data was prepared for this model.

        Args:
            data: a data module after its `setup`.

        Raises:
            UserError: the vocabulary, the patches or the images differ.
        """
        hparams, num_entries = self.hparams, data.tokenizer.vocab_size
        channels = 1 if hparams.num_codes else hparams.latent_channels
        vocabulary = f"set transformer.vocab_size to the {num_entries} entries of the tokenizer"
        linear = "set the data's time_token to true with linear.time: token, else to false"
        autoencoder = "set the model's value to that of the data's autoencoder"
        pairs = [
            ("vocab_size", self.config.vocab_size, num_entries, vocabulary),
            ("patch_size", hparams.patch_size, data.patch_size, "give both the same value"),
            ("time_token", has_time_token(self.linear), data.time_token, linear),
        ]
        if data.image_shape:
            pairs += [
                ("num_codes", hparams.num_codes, data.num_codes, autoencoder),
                ("latent_channels", channels, data.image_shape[0], autoencoder),
            ]
        for name, ours, theirs, remedy in pairs:
            if ours != theirs:
                raise UserError(
                    f"the data has {name} = {theirs} but the model has {name} = {ours}; {remedy}"
                )

    def configure_optimizers(self) -> dict:
        """Build AdamW or Muon with AdamW, and the learning-rate schedule."""
        hparams = self.hparams
        names = ("lr", "betas", "weight_decay", "text_lr_ratio", "muon")
        optimizer = build_optimizer(
            self.net,
            **{name: hparams[name] for name in names},
            bf16="bf16" in str(self.trainer.precision),
            fused=self.trainer.precision != "16-mixed",
        )
        return with_schedule(optimizer, self.lr_scale)

    def lr_scale(self, step: int) -> float:
        """Return the factor of the peak learning rate after `step` optimizer steps."""
        hparams, end = self.hparams, self.horizon.steps(self.trainer, step)
        return lr_scale(step, hparams.warmup_steps, end, hparams.min_lr_ratio, hparams.lr_decay)

    # ---------------------------------------------------------------- training

    def on_train_start(self) -> None:
        """Check that all ranks start with the same weights, and start the breakdown of losses."""
        check_same_weights(self)
        self.breakdown = LossBreakdown(self.trainer.datamodule.source_names, self.device)

    def on_train_batch_start(self, batch: Batch | list[Batch], batch_index: int) -> None:
        """Move EMA weights out of the way, and seed dropout.

        The seed is from (seed, step, rank), so that a resumed run drops the same elements.
        """
        if self.ema is not None and self.hparams.ema_device:
            move(self.ema, self.hparams.ema_device)
        if self.config.dropout:
            number = self.trainer.global_step * self.trainer.world_size + self.global_rank
            generator = row_generator(self.trainer.datamodule.seed, number)
            torch.manual_seed(generator.initial_seed())

    def training_step(self, batch: Batch | list[Batch], batch_index: int) -> Tensor:
        """Compute and log all losses of an optimizer step.

        Args:
            batch: the batch of the step, or a list of all its batches.
            batch_index: number of the step.

        Returns:
            This rank's share of the loss, for the last batch; the gradients of the others are added
            here.
        """
        batches, means = as_batches(batch), {}
        counts = self.step_counts(batches)
        self.zero_grad()
        for part in batches:
            sums = self.loss_sums(self.net, part, by_image=self.breakdown is not None)
            values = self.loss_shares(sums, counts)
            if self.breakdown is not None:
                self.breakdown.add(part, sums)
            for name, value in values.items():
                means[f"train/{name}"] = means.get(f"train/{name}", 0) + value.detach()
            if part is not batches[-1]:
                backward_of_part(self, values["loss"])
        self.log_dict(means, batch_size=1, sync_dist=True)
        self.step_loss = means["train/loss"]
        return values["loss"]

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer) -> None:
        """Do nothing: `training_step` has cleared the gradients before the step's first batch."""

    def on_train_batch_end(self, outputs, batch: Batch | list[Batch], batch_index: int) -> None:
        """Log the losses by source and by noise level, as means since the last log."""
        if self.trainer.global_step % self.trainer.log_every_n_steps == 0:
            means = self.breakdown.take_means(self.trainer.strategy.reduce)
            means = {f"train/{name}": mean for name, mean in means.items()}
            # `self.log` would repeat the old value of a source that had no row since the last log.
            for logger in self.trainer.loggers:
                logger.log_metrics(means, step=self.trainer.global_step - 1)

    def loss_sums(self, net: TransfusionModel, batch: Batch, by_image: bool = False) -> LossSums:
        """Return the summed losses of a batch; see `losses.loss_sums`."""
        causal, with_z = self.hparams.causal_images, bool(self.hparams.z_loss_weight)
        attend = None
        if self.hparams.flash_attention and torch.is_grad_enabled():
            attend = build_attention(batch, causal or net.num_codes > 0, flash=True)
        return loss_sums(net, batch, self.process, causal, with_z, by_image, attend)

    @property
    def loss_names(self) -> list[str]:
        """Names of the losses that the total loss is made of."""
        names = ["loss_lm", "loss_codes" if self.hparams.num_codes else "loss_diffusion"]
        return names + (["loss_z"] if self.hparams.z_loss_weight else [])

    def step_counts(self, batches: list[Batch]) -> Tensor:
        """Count text targets, code targets and noised elements of a step on all ranks, (3,)."""
        numbers = (
            sum(len(batch.target_index) for batch in batches),
            sum(len(batch.code_index) for batch in batches),
            sum(batch.num_noised_elements for batch in batches),
        )
        # Filled on the device, because a copy from the host would wait for it.
        filled = [torch.full((), n, dtype=torch.float32, device=self.device) for n in numbers]
        counts = torch.stack(filled)
        if self.trainer.world_size > 1:
            counts = self.trainer.strategy.reduce(counts, reduce_op="sum")
        return counts

    def loss_shares(self, sums: LossSums, counts: Tensor) -> dict[str, Tensor]:
        """Return the shares of one batch in the losses of its step, which are means over the step.

        Args:
            sums: the summed losses of the batch.
            counts: see `step_counts`.
        """
        num_text, num_codes, num_elements = counts
        values = {"loss_lm": self.global_share(sums.nll.sum(), num_text)}
        if self.hparams.num_codes:  # one mean over text tokens and codes
            values["loss_codes"] = self.global_share(sums.code_nll.sum(), num_codes)
            total = sums.nll.sum() + sums.code_nll.sum()
            loss = self.global_share(total, num_text + num_codes)
        else:
            values["loss_diffusion"] = self.global_share(sums.diffusion, num_elements)
            loss = total_loss(*values.values(), self.hparams.diffusion_weight)
        if self.hparams.z_loss_weight:
            values["loss_z"] = self.global_share(sums.z, num_text + num_codes)
            loss = loss + self.hparams.z_loss_weight * values["loss_z"]
        return values | {"loss": loss}

    def global_share(self, total: Tensor, count: Tensor) -> Tensor:
        """Return a sum's share of a mean over an optimizer step.

        DDP and FSDP average gradients over ranks. The average over ranks of the sum of these shares
        is the sum of all totals divided by `count`, so that any division of the same rows among
        ranks and batches gives the same gradients.

        Args:
            total: the sum over one batch of this rank.
            count: number of terms in all batches of all ranks.
        """
        return total * self.trainer.world_size / count.clamp(min=1)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients, and log their global norm before clipping."""
        parameters = self.net.parameters()
        norm = clip_gradients(parameters, gradient_clip_val, gradient_clip_algorithm)
        self.log("train/grad_norm", norm, batch_size=1)
        marks = self.guard.can_mark(self.trainer, norm)
        (self.guard.mark if marks else self.guard.check)(self, self.step_loss, norm)

    def optimizer_step(self, *args, **kwargs) -> None:
        """Step the optimizer, then update the moving average unless the step is left out.

        The decay grows to `ema_decay` over the first steps, so that the average forgets the
        initial weights.
        """
        super().optimizer_step(*args, **kwargs)
        left_out = self.guard.leaves_out
        is_on_device = isinstance(left_out, Tensor)  # then it is not known here
        if self.ema is not None and (is_on_device or not left_out):
            step = self.trainer.global_step
            decay = min(self.hparams.ema_decay, (1 + step) / (10 + step))
            update_ema(self.ema, self.net, decay, left_out if is_on_device else None)

    # ---------------------------------------------------------------- validation

    def on_validation_epoch_start(self) -> None:
        """Reset the sums and counts of each validation source."""
        self.val_sums = {
            (source, name): (self._sum(), self._sum())
            for source in self.trainer.datamodule.source_names
            for name in LOSSES
        }

    def _sum(self) -> SumMetric:
        """Return a sum over batches and ranks in which NaN stays NaN."""
        return SumMetric(nan_strategy="disable").set_dtype(torch.float64).to(self.device)

    def validation_step(
        self, batch: Batch, batch_index: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """Add up the losses of one source, computed with the EMA weights.

        Returns:
            "nll", the cross-entropy of each text target in nats, (K,) fp64, for callbacks.
        """
        losses = self.loss_sums(self.inference_net, batch)
        nll, code_nll = losses.nll.double(), losses.code_nll.double()
        source = self.trainer.datamodule.source_names[dataloader_idx]
        for name, total, count in (
            ("loss_lm", nll.sum(), len(nll)),
            ("loss_codes", code_nll.sum(), len(code_nll)),
            ("loss_diffusion", losses.diffusion, batch.num_noised_elements),
        ):
            sum_of_losses, num_terms = self.val_sums[source, name]
            sum_of_losses.update(total)
            num_terms.update(count)
        return {"nll": nll}

    def on_validation_epoch_end(self) -> None:
        """Log `val/<source>/<loss>`, means over all ranks."""
        reshard(self.inference_net)
        for (source, name), sums in self.val_sums.items():
            total, count = (metric.compute() for metric in sums)  # the same on every rank
            if count:
                value = (total / count).float()
                self.log(f"val/{source}/{name}", value, add_dataloader_idx=False)

    test_step = validation_step
    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(
        self, batch: Batch, batch_index: int, dataloader_idx: int = 0
    ) -> list[Document]:
        """Return the unpacked documents; PredictionWriter generates from them."""
        return unpack(batch, self.trainer.datamodule.tokenizer)

    # ---------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Add the entries for generation: tokenizer, identity of the autoencoder, row length.

        Raises:
            UserError: a weight is not finite, or the ranks have different weights.
        """
        check_finite(checkpoint, self.trainer, self.saves_alone)
        check_same_weights(self, self.saves_alone)
        states = checkpoint.get("optimizer_states", [])
        for state, optimizer in zip(states, self.trainer.optimizers, strict=False):
            number_states_by_module(state, optimizer, self)
        checkpoint["step_guard"] = self.guard.state_dict()
        proto = bytearray(self.tokenizer_proto)
        checkpoint["tokenizer"] = torch.frombuffer(proto, dtype=torch.uint8)
        checkpoint["image_codec"] = self.image_codec
        checkpoint["row_length"] = self.row_length
        checkpoint["hyper_parameters"] = plain_hparams(checkpoint["hyper_parameters"])

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path, map_location=None, **arguments):
        """Build the module of a checkpoint, including one of an older version.

        Args:
            checkpoint_path: the checkpoint, a file or a sharded folder, or the folder of a run,
                whose newest sound checkpoint is loaded. Each weight of a sharded folder is read
                straight into the module.
            map_location: see torch.load; for a sharded folder, the device of the module.
            arguments: hyper-parameters to replace; for a file, also other arguments of Lightning's
                method.

        Raises:
            UserError: there is no such checkpoint.
        """
        path = find_checkpoint(checkpoint_path)
        checkpoint = read_checkpoint(path, mmap=True)
        arguments = checkpoint["hyper_parameters"] | arguments
        if not isinstance(checkpoint["state_dict"], ShardedWeights):
            return super().load_from_checkpoint(path, map_location, _instantiator=None, **arguments)
        module = cls(**arguments)
        module.configure_model()
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"])
        return module if map_location is None else module.to(map_location)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Restore the tokenizer, the identity of the autoencoder, the row length and the step.

        Raises:
            UserError: the data has another tokenizer or autoencoder than the checkpoint, or the run
                resumes with another value of a hyper-parameter that cannot change.
        """
        upgrade(checkpoint)
        # Without ckpt_path, InitFrom loads these weights into a new run.
        if self._trainer is not None and self.trainer.state.fn == "fit" and self.trainer.ckpt_path:
            check_resumed(self.hparams, checkpoint, CHANGEABLE, SWITCHES)
        count_steps(checkpoint)
        self.tokenizer_proto = same_tokenizer(checkpoint, self.tokenizer_proto)
        self.image_codec = with_data(checkpoint["image_codec"], self.image_codec)
        self.loaded_step = checkpoint["global_step"]
        self.loaded_weights = checkpoint.get("weights", "raw")  # only exported folders have it
        if "step_guard" in checkpoint:  # missing in old checkpoints
            self.guard.load_state_dict(checkpoint["step_guard"])
        self.row_length = checkpoint.get("row_length")  # missing in old checkpoints

    def load_state_dict(self, state_dict: dict, strict: bool = True, assign: bool = False):
        """Load weights as torch does; raise UserError with one sentence if they do not fit."""
        try:
            if isinstance(state_dict, ShardedWeights):
                return state_dict.read_into(self.state_dict())
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            raise state_dict_error(error) from error


@torch.no_grad()
def copy_weights(net: TransfusionModel, other: TransfusionModel) -> None:
    """Copy the weights of a network, or of its shards, into another network of the same kind."""
    for target, weight in zip(other.parameters(), net.parameters(), strict=True):
        target.copy_(weight)


def move(net: TransfusionModel, device: torch.device | str) -> TransfusionModel:
    """Move a network to a device unless it is there, and return it."""
    there = next(net.parameters()).device.type == torch.device(device).type
    return net if there else net.to(device)


def check_image_options(
    hparams: Mapping[str, Any],
    transformer: TransformerConfig,
    unet: UNetConfig | None,
    linear: LinearConfig | None,
) -> None:
    """Refuse options of images that exclude each other, or that have no effect.

    Args:
        hparams: hyper-parameters of `Transfusion`.
        transformer: its sizes of the Transformer.
        unet: its U-Net patch coder, if any.
        linear: its options of the linear patch coder, if any.

    Raises:
        UserError: two options exclude each other.
    """
    num_codes = hparams["num_codes"]
    of_latents = {name: hparams[name] for name in ("linear", "learned_sigma", "min_snr_gamma")}
    given = [name for name, value in of_latents.items() if value]
    if num_codes is not None and given:
        raise UserError(
            f"{given[0]} has no effect with num_codes={num_codes}, whose images are tokens; "
            "leave it out"
        )
    if num_codes is not None:
        check_code_options(num_codes, hparams["patch_size"], unet, transformer)
    elif unet is not None:
        check_unet_config(unet, hparams["patch_size"])
    if unet is not None and linear is not None:
        raise UserError(
            "unet and linear are both given, but a model has one patch coder; leave one out"
        )


def same_tokenizer(checkpoint: dict, proto: bytes | None) -> bytes:
    """Return the tokenizer of a checkpoint.

    Args:
        checkpoint: the checkpoint.
        proto: the tokenizer of the data; None without data.

    Raises:
        UserError: they differ.
    """
    found = bytes(checkpoint["tokenizer"].numpy())
    if proto not in (None, found):
        raise UserError(
            "the data's tokenizer is not the one that this checkpoint was trained with; set the "
            "data's `tokenizer` to the checkpoint file to use its tokenizer"
        )
    return found
