"""Every recipe in configs/ parses, and holds together."""

from itertools import takewhile
from pathlib import Path

import pytest
import torch
import yaml

from tf_lightning.cli.main import main
from tf_lightning.diffusion.process import build_process
from tf_lightning.diffusion.sampler import resolve_sampler
from tf_lightning.training.autoencoder import AutoencoderModule
from tf_lightning.training.module import Transfusion

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SMALL = CONFIGS / "small.yaml"  # goes behind a recipe
RECIPES = sorted(path.name for path in CONFIGS.glob("*.yaml") if path != SMALL)
EXPERIMENTS = sorted(path.name for path in CONFIGS.glob("experiments/*.yaml"))
EVALUATIONS = sorted(path.name for path in CONFIGS.glob("eval/*.yaml"))
AUTOENCODERS = sorted(path.name for path in CONFIGS.glob("autoencoder/*.yaml"))
MODELS = sorted(path.name for path in CONFIGS.glob("model/*.yaml"))


@pytest.fixture
def parsed(capsys):
    """The whole configuration of a command, with nothing built."""

    def parse(*args: str) -> dict:
        with pytest.raises(SystemExit) as stop:
            main([*args, "--print_config=skip_null"])
        assert stop.value.code == 0
        return yaml.safe_load(capsys.readouterr().out)

    return parse


def test_there_are_recipes_and_nothing_else():
    tested = {CONFIGS / name for name in RECIPES} | {CONFIGS / "model" / name for name in MODELS}
    tested |= {CONFIGS / "experiments" / name for name in EXPERIMENTS}
    tested |= {CONFIGS / "eval" / name for name in EVALUATIONS}
    tested |= {CONFIGS / "autoencoder" / name for name in AUTOENCODERS} | {SMALL}
    assert AUTOENCODERS and RECIPES and MODELS and EXPERIMENTS and EVALUATIONS
    assert set(CONFIGS.rglob("*.yaml")) == tested


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_every_recipe_parses_for_every_command(verb, name, parsed):
    assert parsed(verb, "-c", str(CONFIGS / name))["model"]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_goes_with_a_recipe(name, parsed):
    quickstart = str(CONFIGS / "quickstart.yaml")
    given = yaml.safe_load((CONFIGS / "model" / name).read_text())
    model = parsed("fit", "-c", quickstart, "--model", str(CONFIGS / "model" / name))["model"]
    assert model["transformer"].items() >= given["transformer"].items()
    assert model["patch_size"] == given["patch_size"]
    quickstarts = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())["model"]
    assert model["lr"] == given.get("lr", quickstarts["lr"])


@pytest.mark.parametrize("size", sorted(set(MODELS) - {"chameleon.yaml"}))
def test_chameleon_keeps_the_trunk_of_every_size(size, parsed):
    files = [str(CONFIGS / "model" / name) for name in (size, "chameleon.yaml")]
    command = ["fit", "-c", str(CONFIGS / "quickstart.yaml"), "--model", files[0]]
    own, twin = parsed(*command)["model"], parsed(*command, "--model", files[1])["model"]
    differing = {key for key, value in flat(own).items() if flat(twin)[key] != value}
    norms = {"transformer.norm_order", "transformer.qk_norm"}
    stabilising = norms | {"z_loss_weight", "lr", "min_lr_ratio"}
    assert differing == stabilising | {"patch_size"} and twin["transformer"]["qk_norm"] == "layer"
    assert twin["lr"] * twin["min_lr_ratio"] == pytest.approx(1.5e-5) == 3e-4 * 0.05
    vq = yaml.safe_load((CONFIGS / "autoencoder" / "vq.yaml").read_text())
    assert twin["num_codes"] == vq["model"]["init_args"]["network"]["num_codes"]


@pytest.mark.parametrize("name", RECIPES)
def test_model_and_data_of_a_recipe_agree(name, parsed):
    config = parsed("fit", "-c", str(CONFIGS / name))
    model, data = config["model"], config["data"]["init_args"]
    assert model["patch_size"] == data["patch_size"]
    assert data.get("tokenizer") or model["transformer"]["vocab_size"] == data["vocab_size"]
    if data.get("autoencoder") == "pixels":
        assert model["latent_channels"] == 3


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_saves_its_last_step_and_resumes_in_its_own_folder(name, parsed):
    trainer = parsed("fit", "-c", str(CONFIGS / name))["trainer"]
    arguments = {
        callback["class_path"].rpartition(".")[2]: callback.get("init_args", {})
        for callback in trainer["callbacks"]
    }
    saves = arguments["ModelCheckpoint"]
    assert trainer["max_steps"] % saves["every_n_train_steps"] == 0
    assert saves["save_last"] == "link"
    # Otherwise a resumed run writes last-v1.ckpt beside a last.ckpt that stays behind.
    assert saves["enable_version_counter"] is False
    logger = trainer["logger"]["init_args"]
    assert logger["version"] == "" and logger["name"] == name.removesuffix(".yaml")
    assert trainer["use_distributed_sampler"] is False


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_begins_with_its_command(name):
    lines = (CONFIGS / name).read_text().splitlines()
    head = list(takewhile(lambda line: line.startswith("#"), lines))
    assert any(f"fit -c configs/{name}" in line for line in head)


def flat(config: dict, path: str = "") -> dict[str, object]:
    """Values under their dotted names."""
    found: dict[str, object] = {}
    for key, value in config.items():
        found |= flat(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return found


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_changes_what_it_says_and_makes_a_network(name, parsed):
    file = CONFIGS / "experiments" / name
    said = flat(yaml.safe_load(file.read_text()))
    assert said["trainer.logger.init_args.name"] == file.stem  # a run folder of its own
    config = parsed("fit", "-c", str(CONFIGS / "quickstart.yaml"), "-c", str(file))
    added = said.pop("trainer.callbacks+", [])  # behind the recipe's own
    whole = flat(config)
    assert {key: whole.get(key) for key in said} == said  # a null is left out
    last = config["trainer"]["callbacks"][-len(added) :] if added else []
    for callback, given in zip(last, added, strict=True):
        assert callback["class_path"] == given["class_path"]
        assert callback["init_args"].items() >= given["init_args"].items()

    model, data = config["model"], config["data"]["init_args"]
    assert model["patch_size"] == data["patch_size"]
    assert 8 % model["patch_size"] == 0  # latents of the embedded world have 8 x 8
    for callback in config["trainer"]["callbacks"]:
        sampling = (callback.get("init_args") or {}).get("sampling") or {}
        resolve_sampler(build_process(model["prediction_type"]), sampling.get("sampler"))
    module = Transfusion(**model)
    with torch.device("meta"):
        module.configure_model()
    assert sum(p.numel() for p in module.net.parameters()) < 12e6


def test_an_experiment_is_another_than_the_base():
    base = flat(yaml.safe_load((CONFIGS / "quickstart.yaml").read_text()))
    for name in set(EXPERIMENTS) - {"linear.yaml"}:
        said = flat(yaml.safe_load((CONFIGS / "experiments" / name).read_text()))
        del said["trainer.logger.init_args.name"]
        assert said and not said.items() <= base.items(), name


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_begins_with_its_command(name):
    command = f"fit -c configs/quickstart.yaml -c configs/experiments/{name}"
    head = takewhile(
        lambda line: line.startswith("#"),
        (CONFIGS / "experiments" / name).read_text().splitlines(),
    )
    assert any(command in line for line in head)


@pytest.mark.parametrize("name", ["unet_patch4.yaml", "monoformer.yaml", "chameleon.yaml"])
def test_an_experiment_can_be_made_small(name, parsed):
    files = [CONFIGS / "quickstart.yaml", CONFIGS / "experiments" / name]
    as_it_is = flat(parsed("fit", *(f"--config={file}" for file in files)))
    small = flat(parsed("fit", *(f"--config={file}" for file in [*files, SMALL])))
    changed = {key for key, value in small.items() if as_it_is[key] != value}
    assert changed == flat(yaml.safe_load(SMALL.read_text())).keys()
    assert small.keys() == as_it_is.keys()


@pytest.mark.parametrize("name", EVALUATIONS)
def test_every_evaluation_goes_with_a_recipe_and_writes_elsewhere(name, parsed):
    arguments = ["-c", str(CONFIGS / "quickstart.yaml"), "-c", str(CONFIGS / "eval" / name)]
    config = parsed("validate", *arguments)
    assert config["verbose"] is False
    callback = config["trainer"]["callbacks"][-1]  # what the command line can change
    assert callback["class_path"] == "callbacks.evaluate.Evaluate"
    logger = config["trainer"]["logger"]["init_args"]
    assert logger["name"] not in {recipe.removesuffix(".yaml") for recipe in RECIPES}
    assert logger.get("version") is None  # a new folder each time
    head = (CONFIGS / "eval" / name).read_text().split("verbose:")[0]
    assert f"configs/eval/{name} --ckpt_path" in head


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_an_autoencoder_parses_saves_its_last_step_and_begins_with_its_command(name, parsed):
    file = CONFIGS / "autoencoder" / name
    config = parsed("fit", "-c", str(file))
    for verb in ("validate", "test"):
        assert parsed(verb, "-c", str(file))["model"] == config["model"]
    module = AutoencoderModule(**config["model"]["init_args"])
    with torch.device("meta"):
        module.configure_model()
    trainer = config["trainer"]
    callbacks = {c["class_path"]: c.get("init_args", {}) for c in trainer["callbacks"]}
    saves = callbacks["lightning.pytorch.callbacks.ModelCheckpoint"]
    assert trainer["max_steps"] % saves["every_n_train_steps"] == 0
    assert saves["save_last"] == "link" and saves["enable_version_counter"] is False
    assert {"callbacks.reconstruct.Reconstruct", "callbacks.save_autoencoder.SaveAutoencoder"} <= {
        *callbacks
    }
    assert trainer["use_distributed_sampler"] is False
    logger = trainer["logger"]["init_args"]
    assert logger["version"] == ""
    assert logger["name"] not in {recipe.removesuffix(".yaml") for recipe in RECIPES}
    assert f"fit -c configs/autoencoder/{name}" in file.read_text().split("seed_everything:")[0]


def test_the_papers_autoencoders_differ_in_the_bottleneck_alone(parsed):
    vae, vq = (
        flat(parsed("fit", "-c", str(CONFIGS / "autoencoder" / f"{name}.yaml")))
        for name in ("vae", "vq")
    )
    differing = {key for key in vae.keys() | vq.keys() if vae.get(key) != vq.get(key)}
    network = "model.init_args.network."
    assert differing == {
        "trainer.logger.init_args.name",
        *(network + key for key in ("num_codes", "latent_channels")),
    }
    weights = {key: vae[f"model.init_args.{key}"] for key in ("lpips_weight", "gan_weight")}
    assert weights == {"lpips_weight": 1.0, "gan_weight": 0.5}
    assert vae["model.init_args.kl_weight"] == 1e-6
    assert vae["model.init_args.gan_start_step"] == 50_000
    assert (vq[network + "num_codes"], vq[network + "code_dim"]) == (16_384, 8)
    assert vae[network + "latent_channels"] == 8


def test_the_quickstarts_evaluation_is_whole_and_has_its_data(parsed):
    config = parsed("validate", "-c", str(CONFIGS / "eval" / "quickstart.yaml"))
    trained = parsed("fit", "-c", str(CONFIGS / "quickstart.yaml"))
    assert config["data"] == trained["data"]


def test_monoformers_language_model_is_the_quickstarts_trunk_and_text(parsed):
    text = parsed("fit", "-c", str(CONFIGS / "shapes_text.yaml"))
    quickstart = parsed("fit", "-c", str(CONFIGS / "quickstart.yaml"))
    assert text["model"]["transformer"] == quickstart["model"]["transformer"]
    for name in ("sources", "vocab_size", "row_length", "cache_dir"):  # so the same tokenizer
        assert text["data"]["init_args"][name] == quickstart["data"]["init_args"][name]
    assert text["data"]["init_args"]["weights"] == {"captions": 0.0, "text": 1.0, "edits": 0.0}
    experiment = yaml.safe_load((CONFIGS / "experiments" / "monoformer.yaml").read_text())
    start = experiment["trainer"]["callbacks+"][0]["init_args"]["checkpoint"]
    logger = text["trainer"]["logger"]["init_args"]
    assert start == f"{logger['save_dir']}/{logger['name']}/checkpoints/last.ckpt"


@pytest.mark.parametrize("name", ["monoformer.yaml", "monoformer_chat.yaml"])
def test_monoformer_is_tinyllama_with_the_papers_numbers(name, parsed):
    config = parsed("fit", "-c", str(CONFIGS / name))
    model, data = config["model"], config["data"]["init_args"]
    module = Transfusion(**model)
    with torch.device("meta"):
        module.configure_model()
    language = module.net.transformer
    new = 2 * 2 * 2048  # <boi> and <eoi>, in and out
    assert sum(p.numel() for p in language.parameters()) - new == 1_100_048_384  # TinyLlama's
    assert (model["lr"], model["weight_decay"], model["min_lr_ratio"]) == (1e-4, 0.0, 1.0)
    assert (model["ema_decay"], model["diffusion_weight"]) == (0.9999, 1.0)
    assert model["learned_sigma"] and model["noise_schedule"] == "linear"
    assert data["caption_drop_prob"] == 0.1
