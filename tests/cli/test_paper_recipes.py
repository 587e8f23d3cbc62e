"""The recipes of the paper's runs say what the paper says, and fit the job that starts them."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from tf_lightning.cli.main import main
from tf_lightning.training.flops import flops_6nd
from tf_lightning.training.module import Transfusion

ROOT = Path(__file__).resolve().parents[2]
SHARED = "configs/paper/transfusion.yaml"
SIZES = sorted(
    str(path.relative_to(ROOT))
    for path in ROOT.glob("configs/paper/*.yaml")
    if path != ROOT / SHARED
)
JOB = ROOT / "examples" / "slurm" / "train.sbatch"
ROW = 4096
TOKENS = 2_097_152  # of an optimizer step: 2M (Transfusion Sec. 4.1)


@pytest.fixture(scope="module")
def parsed():
    """Returns the configuration of a size, with nothing built."""
    return {size: print_config("-c", SHARED, "-c", size) for size in SIZES}


def print_config(*args: str) -> dict:
    """Return the configuration that `tf-lightning fit` prints, started in the repository."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.chdir(ROOT)
        lines: list[str] = []
        patch.setattr("sys.stdout.write", lines.append)
        main(["fit", *args, "--print_config=skip_null"])
    assert stop.value.code == 0
    return yaml.safe_load("".join(lines))


def batch_rows(config: dict) -> int:
    """Rows of an optimizer step over all ranks."""
    trainer = config["trainer"]
    ranks = trainer["devices"] * trainer["num_nodes"]
    rows = config["data"]["init_args"]["batch_size"]
    return ranks * rows * trainer["accumulate_grad_batches"]


def test_there_is_a_recipe_for_each_size_of_the_paper():
    models = {path.name for path in ROOT.glob("configs/model/*b.yaml")}
    assert {Path(size).name for size in SIZES} == models and len(models) == 5


@pytest.mark.parametrize("size", SIZES)
def test_a_run_has_the_papers_numbers(size, parsed):
    config = parsed[size]
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    assert batch_rows(config) * ROW == TOKENS and data["row_length"] == ROW
    assert config["trainer"]["max_steps"] == 250_000
    assert (model["lr"], model["lr"] * model["min_lr_ratio"]) == (3e-4, pytest.approx(1.5e-5))
    assert (model["warmup_steps"], model["lr_decay"]) == (4000, "cosine")
    assert (model["betas"], model["weight_decay"]) == ([0.9, 0.95], 0.1)
    assert (config["trainer"]["gradient_clip_val"], model["diffusion_weight"]) == (1.0, 5.0)
    assert (model["prediction_type"], model["num_train_timesteps"]) == ("epsilon", 1000)
    assert data["weights"] == {"text": 0.5, "images": 0.5} and data["image_first_prob"] == 0.2
    assert data["sources"]["images"]["init_args"]["image_size"] == 256
    assert config["evaluate"]["init_args"]["sampling"]["num_inference_steps"] == 250


@pytest.mark.parametrize("size", SIZES)
def test_a_size_is_the_models_and_says_its_flops(size, parsed):
    module = Transfusion(**parsed[size]["model"]["init_args"])
    with torch.device("meta"):
        module.configure_model()
    (said,) = re.findall(r"6 N D = (\S+) FLOPs", (ROOT / size).read_text())
    assert float(said) == pytest.approx(flops_6nd(module.net, 250_000 * TOKENS), rel=0.03)
    given = yaml.safe_load((ROOT / "configs" / "model" / Path(size).name).read_text())
    sizes, coder = given.pop("transformer"), module.hparams
    assert sizes.items() <= module.hparams.transformer.items()
    assert given == {name: coder[name] for name in ("patch_size", "latent_channels")}


@pytest.mark.parametrize("size", SIZES)
def test_the_two_largest_models_are_sharded_over_the_gpus_of_a_node(size, parsed):
    trainer, model = parsed[size]["trainer"], parsed[size]["model"]["init_args"]
    assert model["activation_checkpointing"] == "none"
    if Path(size).stem not in ("1.4b", "7b"):
        assert trainer["strategy"] == "ddp" and "shard_size" not in model
        return
    strategy, ranks = trainer["strategy"], trainer["devices"] * trainer["num_nodes"]
    assert strategy["class_path"].endswith(".ModelParallelStrategy")
    assert strategy["init_args"]["data_parallel_size"] == ranks
    assert model["shard_size"] == trainer["devices"] == 8


@pytest.mark.parametrize("size", SIZES)
def test_a_run_measures_itself_and_saves_between_its_validations(size, parsed):
    config = parsed[size]
    trainer, data = config["trainer"], config["data"]["init_args"]
    assert data["tokenizer"] == "Llama-2-7b-hf"
    assert 250_000 % trainer["val_check_interval"] == 0 and trainer["val_check_interval"] == 10_000
    assert config["checkpoint"]["every_n_train_steps"] == 2_500
    metrics = config["evaluate"]["init_args"]["metrics"]
    fid, clip = (metric["init_args"] for metric in metrics)
    assert [m["class_path"].rpartition(".")[2] for m in metrics] == ["ImageQuality", "CLIPScore"]
    assert (fid["extractor"], clip["model"]) == ("inception", "ViT-L-14")


def test_the_job_starts_one_task_for_each_device_of_its_recipe(parsed):
    text = JOB.read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.MULTILINE))
    command = text.rpartition("tf-lightning fit")[2].replace("\\\n", " ")
    config = print_config(*shlex.split(command))
    trainer = config["trainer"]
    assert str(trainer["devices"]) == asked["ntasks-per-node"] == asked["gpus-per-node"]
    assert str(trainer["num_nodes"]) == asked["nodes"] and batch_rows(config) * ROW == TOKENS
    assert asked["signal"].startswith("SIGUSR1@")  # to srun's tasks, which Lightning listens to
    assert config["ckpt_path"] == "last"
    workers = config["data"]["init_args"]["num_workers"]
    assert int(asked["cpus-per-task"]) > workers and '--cpus-per-task="$SLURM_CPUS' in text
    subprocess.run(["bash", "-n", str(JOB)], check=True)
