"""Check that the tests notice a wrong wiring: break the source in one place, run a few tests.

    nice python benchmarks/mutate.py [--only ema noise]

Each mutant replaces one piece of text in a copy of the source, such as an option that is no longer
passed on, and is killed if a test fails. All are listed below. The tests must first pass on the
unchanged copy, and the text to replace must be found exactly once. The exit code is 1 if a mutant
survives or cannot run.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

# Third-party libraries only, so that each fork imports our packages from its own copy.
import diffusers.schedulers  # noqa: E402, F401
import lightning  # noqa: E402, F401
import pytest  # noqa: E402
import sentencepiece  # noqa: E402, F401
import torchmetrics  # noqa: E402, F401

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("tf_lightning", "callbacks", "evaluation", "tests", "pyproject.toml")
SECONDS = 600  # limit for the tests of one mutant

MODULE, LOSSES = "tf_lightning/training/module.py", "tf_lightning/training/losses.py"
OPTIM, BATCH = "tf_lightning/training/optim.py", "tf_lightning/batch.py"
PROCESS, NETWORK = "tf_lightning/diffusion/process.py", "tf_lightning/model/transfusion.py"
SAMPLER, GUIDANCE = "tf_lightning/diffusion/sampler.py", "tf_lightning/diffusion/guidance.py"
PIPELINE, ENGINE = "tf_lightning/generation/pipeline.py", "tf_lightning/generation/engine.py"
REQUESTS = "tf_lightning/generation/requests.py"
MIXTURE, ROWS = "tf_lightning/data/mixture.py", "tf_lightning/data/packing.py"

TRAINING, GENERATION = "tests/training/test_wiring.py", "tests/generation/test_wiring.py"
TOKENS, PACKING = "tests/generation/test_sampling_wiring.py", "tests/test_batch.py"
BUCKETS = "tests/data/test_buckets.py"

TRANSFORMER, LAYERS = "tf_lightning/model/transformer.py", "tf_lightning/model/layers.py"
FAMILIES, FLOPS = "tf_lightning/interop/families.py", "tf_lightning/training/flops.py"
LANGUAGE_MODELS = "tests/interop/test_families.py"


@dataclass(frozen=True)
class Mutant:
    """One mistake: `old` becomes `new` in `file`, and a test in `tests` should fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str

    def text(self, folder: Path) -> str:
        """Return the changed content of the file.

        Raises:
            SystemExit: the text to replace is not found exactly once.
        """
        content = (folder / self.file).read_text()
        count = content.count(self.old)
        if count != 1:
            sys.exit(
                f"{self.name}: {self.old!r} is {count} times in {self.file}; update the mutant"
            )
        return content.replace(self.old, self.new)


def module(name: str, old: str, new: str) -> Mutant:
    """A mistake in the LightningModule."""
    return Mutant(name, MODULE, old, new, TRAINING)


def not_passed(option: str, default: str) -> Mutant:
    """An option of the optimizer that is not passed on."""
    old = "**{name: hparams[name] for name in names}"
    new = f'**({{name: hparams[name] for name in names}} | {{"{option}": {default}}})'
    return module(f"{option} not passed on", old, new)


def process(name: str, old: str, new: str, tests: str = TRAINING) -> Mutant:
    """A mistake in the diffusion process."""
    return Mutant(name, PROCESS, old, new, tests)


def forgotten(option: str, tests: str = TRAINING) -> Mutant:
    """A hyper-parameter of the diffusion process that training and sampling forget."""
    return process(f"{option} forgotten", f'        "{option}",\n', "", tests)


def network(name: str, old: str, new: str) -> Mutant:
    """A mistake in how the network is built."""
    return Mutant(name, NETWORK, old, new, TRAINING)


def request(name: str, old: str, new: str) -> Mutant:
    """A mistake in the plan of a generation."""
    return Mutant(name, REQUESTS, old, new, GENERATION)


def engine(name: str, old: str, new: str, tests: str = GENERATION) -> Mutant:
    """A mistake in the generation loop."""
    return Mutant(name, ENGINE, old, new, tests)


def token_option(option: str, default: str) -> Mutant:
    """An option of sampling tokens or codes that is not passed on."""
    argument = option.removeprefix("code_")
    old, new = f"{argument}=self.sampling.{option},", f"{argument}={default},"
    return engine(f"{option} not passed on", old, new, TOKENS)


def family(name: str, old: str, new: str) -> Mutant:
    """A mistake in reading or writing the config.json of a language model."""
    return Mutant(name, FAMILIES, old, new, LANGUAGE_MODELS)


MUTANTS = [
    # losses
    module(
        "diffusion loss by images instead of elements",
        "sum(batch.num_noised_elements for batch in batches)",
        "sum(batch.num_images for batch in batches)",
    ),
    module("diffusion_weight not passed on", "self.hparams.diffusion_weight)", "5.0)"),
    module("z_loss_weight not passed on", "loss + self.hparams.z_loss_weight *", "loss + 1.0 *"),
    module("z-loss left out", "bool(self.hparams.z_loss_weight)", "False"),
    module("z-loss by text targets", "(sums.z, num_text + num_codes)", "(sums.z, num_text)"),
    module("causal_images not passed on", "causal, with_z = self.hparams.causal_images,",
           "causal, with_z = False,"),
    module("means of the last batch", "self.step_counts(batches)",
           "self.step_counts(batches[-1:])"),
    module("earlier batches without gradients", "if part is not batches[-1]:", "if False:"),
    module("text and codes swapped", "num_text, num_codes, num_elements = counts",
           "num_codes, num_text, num_elements = counts"),
    module("codes outside of the mean", "(total, num_text + num_codes)", "(total, num_text)"),
    Mutant("noise and latents swapped", LOSSES, "add_noise(batch.latents, batch.noise, batch.t)",
           "add_noise(batch.noise, batch.latents, batch.t)", TRAINING),
    Mutant("noise level not rounded", LOSSES, "process.model_timesteps(batch.t)", "batch.t",
           TRAINING),
    # optimizer, schedule, average
    not_passed("lr", "3e-4"),
    not_passed("betas", "(0.9, 0.95)"),
    not_passed("weight_decay", "0.1"),
    not_passed("text_lr_ratio", "1.0"),
    not_passed("muon", "False"),
    module("precision of Muon", 'bf16="bf16" in', 'bf16="half" in'),
    module("warmup_steps not passed on", "hparams.warmup_steps, end", "4000, end"),
    module("min_lr_ratio not passed on", "end, hparams.min_lr_ratio", "end, 0.05"),
    module("lr_decay not passed on", ", hparams.lr_decay)", ")"),
    Mutant("schedule by epochs", OPTIM, '"interval": "step"', '"interval": "epoch"', TRAINING),
    module("fused AdamW in fp16", 'fused=self.trainer.precision != "16-mixed"', "fused=True"),
    module("text weights not frozen", "if self.hparams.text_lr_ratio == 0:", "if False:"),
    module("ema_decay not passed on", "min(self.hparams.ema_decay,", "min(0.9999,"),
    module("average kept at ema_decay 0", "if self.hparams.ema_decay > 0:", "if True:"),
    module("average not used", "return move(self.ema, self.device)", "return self.net"),
    module("compile not passed on", "if self.hparams.compile:", "if False:"),
    module("fp8 not checked", "if self.hparams.fp8:", "if False:"),
    module("flash_attention not passed on", "if self.hparams.flash_attention and", "if False and"),
    module("activation checkpointing forgotten",
           "checkpoint_activations(self.net, self.hparams.activation_checkpointing)", "pass"),
    module("shard_size not passed on", '["data_parallel"], self.hparams.shard_size)',
           '["data_parallel"], None)'),
    module("reshard_after_forward not passed on", "self.hparams.reshard_after_forward", "True"),
    module("ema_device not used", "move(self.ema, self.hparams.ema_device)", "pass"),
    module("dropout not seeded by the data", "row_generator(self.trainer.datamodule.seed,",
           "row_generator(0,"),
    Mutant("text learns at the full rate", OPTIM, "text_lr_ratio * lr)", "lr)", TRAINING),
    Mutant("Muon without betas", OPTIM, "MuonAdamW(groups, lr, betas, bf16)",
           "MuonAdamW(groups, lr, (0.9, 0.95), bf16)", TRAINING),
    Mutant("weight decay of vectors", OPTIM, '"weight_decay": 0.0,',
           '"weight_decay": weight_decay,', TRAINING),
    # diffusion process, in training and in sampling
    forgotten("prediction_type"),
    forgotten("noise_schedule"),
    forgotten("num_train_timesteps"),
    forgotten("learned_sigma"),
    forgotten("min_snr_gamma"),
    Mutant("noise_schedule forgotten at sampling", PROCESS, '        "noise_schedule",\n', "",
           GENERATION),
    Mutant("learned_sigma forgotten at sampling", PROCESS, '        "learned_sigma",\n', "",
           GENERATION),
    process("min_snr_gamma of a flow", "RectifiedFlow(num_train_timesteps, min_snr_gamma)",
            "RectifiedFlow(num_train_timesteps)"),
    process("Min-SNR of epsilon as of v",
            'sigma_t / alpha_t if self.prediction_type == "epsilon" else sigma_t', "sigma_t"),
    process("bound without the number of timesteps", "VLB_WEIGHT * self.num_train_timesteps * vlb",
            "VLB_WEIGHT * vlb"),
    process("sampler with another schedule", "DIFFUSERS_SCHEDULES[self.noise_schedule]",
            'DIFFUSERS_SCHEDULES["cosine"]', GENERATION),
    process("sampler with another prediction", '"prediction_type": self.prediction_type,',
            '"prediction_type": "epsilon",', GENERATION),
    process("sampler with another number of timesteps",
            '"num_train_timesteps": self.num_train_timesteps,', '"num_train_timesteps": 1000,',
            GENERATION),
    process("sampler without the learned variance", "if self.learned_sigma and sampler ==",
            "if False and sampler ==", GENERATION),
    process("shift of DDPM dropped", "= self.num_train_timesteps, timestep_shift",
            "= self.num_train_timesteps, 1.0", GENERATION),
    process("shift of a flow dropped", "shift=timestep_shift", "shift=1.0", GENERATION),
    # network
    network("learned_sigma not built", 'learned_sigma=hparams["learned_sigma"]',
            "learned_sigma=False"),
    network("unet not built", 'unet=config("unet", UNetConfig)', "unet=None"),
    network("linear not built", 'linear=config("linear", LinearConfig)', "linear=None"),
    network("num_codes not built", 'num_codes=hparams["num_codes"] or 0', "num_codes=0"),
    network("patch_size and latent_channels swapped",
            'hparams["patch_size"],\n        hparams["latent_channels"],',
            'hparams["latent_channels"],\n        hparams["patch_size"],'),
    # noise of the data
    Mutant("noise of training not seeded", BATCH, "torch.randn(x.shape, generator=generator)",
           "torch.randn(x.shape)", PACKING),
    Mutant("seed of training not passed on", BATCH, "row_generator(seed, row_id)",
           "row_generator(0, row_id)", PACKING),
    Mutant("timestep_shift not passed on", BATCH,
           "generator, timestep_shift, timestep_distribution)",
           "generator, 1.0, timestep_distribution)", PACKING),
    Mutant("timestep_distribution not passed on", BATCH,
           "generator, timestep_shift, timestep_distribution)", "generator, timestep_shift)",
           PACKING),
    # images of several shapes
    Mutant("max_aspect_ratio not given to the sources", MIXTURE,
           "with_buckets(source, pixels, ratio)", "with_buckets(source, pixels, 1)", BUCKETS),
    Mutant("max_aspect_ratio of a filtered source", MIXTURE,
           "with_buckets(source.unfiltered, pixels, max_aspect_ratio)", "source.unfiltered",
           BUCKETS),
    Mutant("max_aspect_ratio of the buckets", MIXTURE,
           "bucket_sizes(image_size, pixels, max_aspect_ratio)",
           "bucket_sizes(image_size, pixels, 10.0)", BUCKETS),
    Mutant("max_aspect_ratio not stored", MIXTURE,
           "hflip, sample_posterior, lazy_images, crops, max_aspect_ratio",
           "hflip, sample_posterior, lazy_images, crops", BUCKETS),
    Mutant("max_aspect_ratio of validation", MIXTURE,
           "lazy=self.lazy_images, max_aspect_ratio=image_storage.max_aspect_ratio",
           "lazy=self.lazy_images", BUCKETS),
    Mutant("max_aspect_ratio of an encoded folder", MIXTURE,
           "max_aspect_ratio=self.image_storage.max_aspect_ratio,", "max_aspect_ratio=4.0,",
           BUCKETS),
    Mutant("rows of several shapes by best fit", ROWS, "fill_rows if self.has_shapes else best_fit",
           "best_fit", "tests/data/test_rows.py"),
    # sampling of images
    Mutant("height dropped", PIPELINE, "sampling.height or height", "height", GENERATION),
    Mutant("width dropped", PIPELINE, "sampling.width or width", "width", GENERATION),
    Mutant("height and width swapped", PIPELINE, "self.image_sizes.check((width, height))",
           "width, height = height, width", GENERATION),
    request("guidance_scale dropped", "            sampling.guidance_scale,", "            3.0,"),
    request("image_guidance_scale dropped", "sampling.image_guidance_scale,", "None,"),
    request("guidance_interval dropped", "sampling.guidance_interval,", "(0.0, 1.0),"),
    request("guidance_rescale dropped", "sampling.guidance_rescale,", "0.0,"),
    request("guidance scales swapped",
            "sampling.guidance_scale,\n            sampling.image_guidance_scale,",
            "sampling.image_guidance_scale,\n            sampling.guidance_scale,"),
    request("images of a prompt are noised", "replace(batch, t=torch.zeros_like(batch.t))",
            "batch"),
    Mutant("variance of the last branch", GUIDANCE, "variance = outputs[0]",
           "variance = outputs[-1]", GENERATION),
    Mutant("sampler dropped", PIPELINE, "sampling.sampler, sampling.timestep_shift)",
           "None, sampling.timestep_shift)", GENERATION),
    Mutant("timestep_shift dropped", PIPELINE, "sampling.sampler, sampling.timestep_shift)",
           "sampling.sampler)", GENERATION),
    Mutant("causal_images forgotten at sampling", PIPELINE, 'self.hparams["causal_images"],',
           "False,", GENERATION),
    Mutant("sampling not passed on", PIPELINE,
           "self.plan(modality, (sampling or SamplingConfig())",
           "self.plan(modality, SamplingConfig()", GENERATION),
    Mutant("options not passed on", PIPELINE,
           "self.plan(modality, (sampling or SamplingConfig()).with_options(**options))",
           "self.plan(modality, sampling or SamplingConfig())", GENERATION),
    Mutant("one seed for all outputs", PIPELINE, "[seed + i for i in", "[seed for i in",
           GENERATION),
    engine("num_inference_steps dropped", "steps = self.sampling.num_inference_steps", "steps = 2"),
    engine("first noise not seeded", "torch.randn(shape, generator=random)",
           "torch.randn(shape)"),
    engine("seed of an output dropped", "torch.Generator().manual_seed(seed)",
           "torch.Generator().manual_seed(0)"),
    Mutant("noise of a step not seeded", SAMPLER,
           '{"generator": list(generators)} if draws_noise else {}', "{}", GENERATION),
    # sampling of text and codes
    token_option("temperature", "1.0"),
    token_option("top_k", "None"),
    token_option("top_p", "1.0"),
    token_option("min_p", "0.0"),
    token_option("code_temperature", "1.0"),
    token_option("code_top_k", "None"),
    token_option("code_top_p", "1.0"),
    request("max_images dropped", '"any": self.sampling.max_images', '"any": 1'),
    engine("max_new_tokens dropped", "== self.sampling.max_new_tokens", "== 64"),
    engine("stop strings do not end a text", "or self._is_stopped(sequence.text)", ""),
    Mutant("stop strings stay in a text", PIPELINE, "(document, plan.sampling.stop)",
           "(document, ())", GENERATION),
    # language models
    family("head_dim of a language model dropped", "head_dim=_head_dim(config, family),", ""),
    family("rope_scaling of a language model dropped", "rope_scaling=_rope_scaling(rope),", ""),
    family("rope_theta of a language model dropped",
           'rope_theta=rope.get("rope_theta") or values["rope_theta"],', ""),
    family("rms_norm_eps of a language model dropped", 'norm_eps=values["rms_norm_eps"],', ""),
    family("tied embeddings of a language model dropped",
           'tie_embeddings=values["tie_word_embeddings"],', ""),
    family("exported head_dim", '"head_dim": config.head_size,',
           '"head_dim": config.dim // config.num_heads,'),
    family("exported rms_norm_eps", '"rms_norm_eps": config.norm_eps,', '"rms_norm_eps": 1e-5,'),
    family("exported rope_theta", '"rope_theta": config.rope_theta,', '"rope_theta": 1e4,'),
    family("exported rope_scaling", '"rope_scaling": _rope_scaling_to_hf(config.rope_scaling),',
           '"rope_scaling": None,'),
    Mutant("rotary positions in every block", TRANSFORMER,
           "rope if config.has_rope(i) else None", "rope", LANGUAGE_MODELS),
    Mutant("rotary positions in every block with image weights", TRANSFORMER,
           "ropes if self.config.has_rope(i) else [None, None]", "ropes",
           "tests/model/test_modality.py"),
    Mutant("linear scaling left out", LAYERS, 'if self.rope_type == "linear":', "if False:",
           LANGUAGE_MODELS),
    Mutant("FLOPs without head_dim", FLOPS, "config.num_heads * config.head_size", "config.dim",
           "tests/training/test_flops.py"),
]  # fmt: skip


def exit_code(mutant: Mutant | None, tests: str) -> int | None:
    """Run tests on a copy of the source, changed by a mutant.

    Returns:
        pytest's exit code; None if the tests do not end.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in COPIED:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, folder / part)
        if mutant is not None:
            (folder / mutant.file).write_text(mutant.text(folder))
        # A fork has the libraries loaded, which takes most of the time, and nothing of the source.
        process = multiprocessing.get_context("fork").Process(target=run_pytest, args=(name, tests))
        process.start()
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
            return None
        return process.exitcode


def run_pytest(folder: str, tests: str) -> None:
    """Run tests of a copy of the source, without output, and exit with pytest's code."""
    os.chdir(folder)
    sys.path[:0] = [folder, f"{folder}/tests"]
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    os._exit(pytest.main(["-x", "-p", "no:cacheprovider", "-p", "no:xdist", *tests.split()]))


def verdict(mutant: Mutant) -> str:
    """Return "killed", "survived", or why the mutant could not run."""
    code = exit_code(mutant, mutant.tests)
    return {0: "survived", 1: "killed"}.get(code, f"broken: pytest's exit code is {code}")


def main() -> None:
    """Print a table of all mutants and a summary line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="mutants whose name has a word")
    args = parser.parse_args()
    mutants = [m for m in MUTANTS if not args.only or any(word in m.name for word in args.only)]
    for mutant in mutants:
        mutant.text(ROOT)
    tests = " ".join(sorted({mutant.tests for mutant in mutants}))
    if code := exit_code(None, tests):
        sys.exit(f"the tests fail without any mutant (pytest's exit code is {code}): {tests}")
    killed = 0
    for mutant in mutants:
        result = verdict(mutant)
        killed += result == "killed"
        print(f"| {mutant.name} | {mutant.file} | {result} |", flush=True)
    print(f"{killed} of {len(mutants)} killed")
    sys.exit(killed < len(mutants))


if __name__ == "__main__":
    main()
