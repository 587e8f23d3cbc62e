"""Every recipe in configs/ parses, is short, and agrees with the others."""

import copy
from collections import Counter
from itertools import takewhile
from pathlib import Path

import pytest
import torch
import yaml

from tf_lightning.cli.command_line import LINKED
from tf_lightning.cli.lightning import TRAINER
from tf_lightning.cli.main import main
from tf_lightning.cli.named_callbacks import NAMED
from tf_lightning.cli.run_callbacks import ALWAYS
from tf_lightning.cli.run_folder import LOGGER
from tf_lightning.diffusion.process import build_process
from tf_lightning.diffusion.sampler import resolve_sampler
from tf_lightning.training.autoencoder import AutoencoderModule
from tf_lightning.training.module import Transfusion

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SMALL = CONFIGS / "small.yaml"  # follows a recipe
RECIPES = sorted(path.name for path in CONFIGS.glob("*.yaml") if path != SMALL)
EXPERIMENTS = sorted(path.name for path in CONFIGS.glob("experiments/*.yaml"))
EVALUATIONS = sorted(path.name for path in CONFIGS.glob("eval/*.yaml"))
AUTOENCODERS = sorted(path.name for path in CONFIGS.glob("autoencoder/*.yaml"))
MODELS = sorted(path.name for path in CONFIGS.glob("model/*.yaml"))
SIZES = sorted(name for name in MODELS if name[0].isdigit())
TRAINED = [CONFIGS / name for name in RECIPES]
TRAINED += [CONFIGS / "autoencoder" / name for name in AUTOENCODERS]


PRINTED: dict[tuple[str, ...], str] = {}  # what a command printed; many tests read the same one


@pytest.fixture
def parsed(capsys):
    """Returns the whole configuration of a command, with nothing built.

    The linked options of the data are filled in from the model, as a run would.
    """

    def parse(*args: str) -> dict:
        if args not in PRINTED:
            with pytest.raises(SystemExit) as stop:
                main([*args, "--print_config=skip_null"])
            assert stop.value.code == 0
            PRINTED[args] = capsys.readouterr().out
        config = yaml.safe_load(PRINTED[args])
        model, data = config["model"]["init_args"], config["data"]["init_args"]
        if config["model"]["class_path"].endswith("Transfusion"):
            assert not LINKED.keys() & data.keys()
            data |= {
                "patch_size": model["patch_size"],
                "vocab_size": model["transformer"]["vocab_size"],
                "time_token": model.get("linear", {}).get("time") == "token",
            }
        return config

    return parse


def flat(config: dict, path: str = "") -> dict[str, object]:
    """Returns the values under their dotted names."""
    found: dict[str, object] = {}
    for key, value in config.items():
        found |= flat(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return found


def with_classes(said: dict) -> dict:
    """Returns what a file says with `init_args` where it leaves the default class unnamed."""
    said = copy.deepcopy(said)
    for section in (said, said.get("trainer", {})):
        for key in section.keys() & {"model", "data", "logger", *NAMED}:
            if "class_path" not in section[key] and "init_args" not in section[key]:
                section[key] = {"init_args": section[key]}
    return said


def load(file: Path) -> dict:
    """Returns what a file says."""
    return yaml.safe_load(file.read_text())


def test_there_are_recipes_and_nothing_else():
    tested = {*TRAINED, SMALL} | {CONFIGS / "model" / name for name in MODELS}
    tested |= {CONFIGS / "experiments" / name for name in EXPERIMENTS}
    tested |= {CONFIGS / "eval" / name for name in EVALUATIONS}
    tested |= {*CONFIGS.glob("paper/*.yaml")}  # test_paper_recipes.py
    assert AUTOENCODERS and RECIPES and MODELS and EXPERIMENTS and EVALUATIONS
    assert set(CONFIGS.rglob("*.yaml")) == tested


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda file: file.stem)
def test_a_recipe_is_short_and_names_no_path_outside_the_working_directory(file):
    text = file.read_text()
    assert len(text.splitlines()) <= 45
    outside = text.replace("model: ../model/", "")
    assert "../" not in outside and "/home" not in text and "/tmp" not in text


def test_what_seven_recipes_share_is_a_default_of_the_command():
    said = [flat(load(file)) for file in TRAINED]
    shared = Counter((key, str(value)) for values in said for key, value in values.items())
    sizes = "model.transformer."  # a recipe shows the sizes of its model
    repeated = [pair for pair, count in shared.items() if count >= 7]
    assert [key for key, _ in repeated if not key.startswith(sizes)] == []


@pytest.mark.parametrize("file", TRAINED, ids=lambda file: file.stem)
def test_a_recipe_does_not_repeat_a_default(file):
    said = flat(load(file))
    defaults = {f"trainer.{key}": value for key, value in TRAINER.items()}
    defaults |= {f"trainer.logger.{key}": value for key, value in LOGGER["init_args"].items()}
    for key, (_, values) in ALWAYS.items():
        defaults |= {f"{key}.{name}": value for name, value in values.items()}
    defaults["seed_everything"] = 0
    repeated = {key for key, value in said.items() if key in defaults and defaults[key] == value}
    assert repeated == set()
    assert not load(file).keys() & {key for key, named in NAMED.items() if named.default}


def test_a_recipe_without_trainer_options_has_the_defaults_of_the_command(parsed):
    trainer = parsed("fit", "-c", str(CONFIGS / "quickstart.yaml"))["trainer"]
    expected = {"accelerator": "auto", "devices": 1, "gradient_clip_val": 1.0}
    expected |= {"use_distributed_sampler": False, "num_sanity_val_steps": 0}
    assert trainer.items() >= (expected | {"log_every_n_steps": 25}).items()
    assert "precision" not in trainer and "check_val_every_n_epoch" not in trainer  # null


def test_a_run_has_the_default_callbacks(parsed):
    config = parsed("fit", "-c", str(CONFIGS / "quickstart.yaml"))
    assert config.keys() >= {key for key, named in NAMED.items() if named.default}
    # The throughput of training must not count the time of an evaluation.
    assert [*NAMED].index("throughput") < [*NAMED].index("evaluate")
    for key, (_, values) in ALWAYS.items():
        assert config.get(key, {}).items() >= values.items()


def written(folder: Path, **content) -> str:
    """Write a configuration file; returns its path."""
    (folder / "more.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "more.yaml")


def test_a_later_file_changes_one_option_of_one_callback(parsed, tmp_path):
    base = ("fit", "-c", str(CONFIGS / "quickstart.yaml"))
    more = written(tmp_path, evaluate={"sampling": {"num_inference_steps": 7}})
    before, after = flat(parsed(*base)), flat(parsed(*base, "-c", more))
    changed = {key: value for key, value in after.items() if before.get(key) != value}
    assert changed == {"evaluate.init_args.sampling.num_inference_steps": 7}


def test_the_command_line_changes_and_removes_any_callback(parsed):
    base = ("fit", "-c", str(CONFIGS / "quickstart.yaml"))
    options = ("--evaluate.sampling.guidance_scale=4", "--evaluate.prompts.count=9")
    removed = ("--shapes_report=null", "--throughput=null")
    config = parsed(*base, *options, *removed, "--unigram_baseline={}")
    evaluate = config["evaluate"]["init_args"]
    assert evaluate["sampling"]["guidance_scale"] == 4
    assert evaluate["prompts"]["init_args"]["count"] == 9
    assert not {"shapes_report", "throughput"} & config.keys()
    assert {"unigram_baseline", "text_perplexity"} <= config.keys()


def test_a_file_that_names_the_class_drops_the_options_of_earlier_files(parsed, tmp_path):
    base = ("fit", "-c", str(CONFIGS / "quickstart.yaml"))
    prompts = {"class_path": "callbacks.prompts.ShapesPrompts", "init_args": {"seed": 2}}
    whole = {"class_path": "callbacks.evaluate.Evaluate", "init_args": {"prompts": prompts}}
    evaluate = parsed(*base, "-c", written(tmp_path, evaluate=whole))["evaluate"]["init_args"]
    assert evaluate["texts"] == [] and evaluate["batch_size"] == 32  # not the quickstart's
    assert evaluate["sampling"]["guidance_scale"] == 3.0
    assert evaluate["prompts"]["init_args"] == {"count": 128, "real_per_prompt": 8, "seed": 2}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_every_recipe_parses_for_every_command(verb, name, parsed):
    assert parsed(verb, "-c", str(CONFIGS / name))["model"]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_goes_with_a_recipe(name, parsed):
    quickstart = str(CONFIGS / "quickstart.yaml")
    given = load(CONFIGS / "model" / name)
    config = parsed("fit", "-c", quickstart, "--model", str(CONFIGS / "model" / name))
    model = config["model"]["init_args"]
    assert model["transformer"].items() >= given["transformer"].items()
    assert model["patch_size"] == given["patch_size"]
    assert model["lr"] == given.get("lr", load(CONFIGS / "quickstart.yaml")["model"]["lr"])


@pytest.mark.parametrize("size", SIZES)
def test_chameleon_keeps_the_trunk_of_every_size(size, parsed):
    files = [str(CONFIGS / "model" / name) for name in (size, "chameleon.yaml")]
    command = ["fit", "-c", str(CONFIGS / "quickstart.yaml"), "--model", files[0]]
    own = parsed(*command)["model"]["init_args"]
    twin = parsed(*command, "--model", files[1])["model"]["init_args"]
    differing = {key for key, value in flat(own).items() if flat(twin)[key] != value}
    norms = {"transformer.norm_order", "transformer.qk_norm"}
    stabilizing = norms | {"z_loss_weight", "lr", "min_lr_ratio"}
    assert differing == stabilizing | {"patch_size"} and twin["transformer"]["qk_norm"] == "layer"
    assert twin["lr"] * twin["min_lr_ratio"] == pytest.approx(1.5e-5) == 3e-4 * 0.05
    vq = load(CONFIGS / "autoencoder" / "vq.yaml")
    assert twin["num_codes"] == vq["model"]["init_args"]["network"]["num_codes"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_saves_its_last_step_and_resumes_in_its_own_folder(name, parsed):
    config = parsed("fit", "-c", str(CONFIGS / name))
    trainer, saves = config["trainer"], config["checkpoint"]
    assert trainer["max_steps"] % saves["every_n_train_steps"] == 0
    assert saves["save_last"] == "link"
    # Otherwise a resumed run writes last-v1.ckpt beside an outdated last.ckpt.
    assert saves["enable_version_counter"] is False
    logger = trainer["logger"]["init_args"]
    assert logger["version"] == "" and logger["name"] == name.removesuffix(".yaml")
    assert trainer["use_distributed_sampler"] is False


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_begins_with_its_command(name):
    lines = (CONFIGS / name).read_text().splitlines()
    head = list(takewhile(lambda line: line.startswith("#"), lines))
    assert any(f"fit -c configs/{name}" in line for line in head)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_changes_what_it_says_and_makes_a_network(name, parsed):
    file = CONFIGS / "experiments" / name
    said = flat(with_classes(load(file)))
    assert said["trainer.logger.init_args.name"] == file.stem  # a run folder of its own
    config = parsed("fit", "-c", str(CONFIGS / "quickstart.yaml"), "-c", str(file))
    whole = flat(config)
    assert {key: whole.get(key) for key in said} == said  # a null is left out

    model = config["model"]["init_args"]
    assert 8 % model["patch_size"] == 0  # latents of the shapes world have 8 x 8
    for key in NAMED:
        sampling = config.get(key, {}).get("init_args", {}).get("sampling") or {}
        resolve_sampler(build_process(model["prediction_type"]), sampling.get("sampler"))
    module = Transfusion(**model)
    with torch.device("meta"):
        module.configure_model()
    assert sum(p.numel() for p in module.net.parameters()) < 12e6


def test_an_experiment_differs_from_the_base():
    base = flat(load(CONFIGS / "quickstart.yaml"))
    for name in set(EXPERIMENTS) - {"baseline.yaml"}:
        said = flat(load(CONFIGS / "experiments" / name))
        del said["trainer.logger.name"]
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
    assert changed == flat(with_classes(load(SMALL))).keys()
    assert small.keys() == as_it_is.keys()


@pytest.mark.parametrize("name", EVALUATIONS)
def test_every_evaluation_goes_with_a_recipe_and_writes_elsewhere(name, parsed):
    file = CONFIGS / "eval" / name
    alone = ["-c", str(CONFIGS / "mixture.yaml"), "-c", str(file)]
    arguments = ["-c", str(CONFIGS / "quickstart.yaml"), "-c", str(file)]
    config = parsed("validate", *arguments)
    # The protocol does not depend on the recipe that it is combined with.
    assert config["evaluate"] == parsed("validate", *alone)["evaluate"]
    assert not {"shapes_report", "retrieval_accuracy"} & config.keys()
    assert "verbose" not in config  # Lightning's own table is off
    logger = config["trainer"]["logger"]["init_args"]
    assert logger["name"] not in {recipe.removesuffix(".yaml") for recipe in RECIPES}
    assert logger.get("version") is None  # a new folder each time
    head = (CONFIGS / "eval" / name).read_text().split("trainer:")[0]
    assert f"-c configs/eval/{name}" in head and "--ckpt_path" in head


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_an_autoencoder_parses_saves_its_last_step_and_begins_with_its_command(name, parsed):
    file = CONFIGS / "autoencoder" / name
    config = parsed("fit", "-c", str(file))
    for verb in ("validate", "test"):
        assert parsed(verb, "-c", str(file))["model"] == config["model"]
    module = AutoencoderModule(**config["model"]["init_args"])
    with torch.device("meta"):
        module.configure_model()
    trainer, saves = config["trainer"], config["checkpoint"]
    assert trainer["max_steps"] % saves["every_n_train_steps"] == 0
    assert saves["save_last"] == "link" and saves["enable_version_counter"] is False
    assert {"reconstruct", "save_autoencoder"} <= config.keys()
    assert trainer["use_distributed_sampler"] is False
    logger = trainer["logger"]["init_args"]
    assert logger["version"] == ""
    assert logger["name"] not in {recipe.removesuffix(".yaml") for recipe in RECIPES}
    assert f"fit -c configs/autoencoder/{name}" in file.read_text().split("trainer:")[0]


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_an_autoencoder_inherits_no_default_of_transfusion(name, parsed):
    said = load(CONFIGS / "autoencoder" / name)["model"]["init_args"]
    model = parsed("fit", "-c", str(CONFIGS / "autoencoder" / name))["model"]["init_args"]
    assert model["weight_decay"] == said.get("weight_decay", 0.0)  # Transfusion's is 0.1


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


def test_monoformers_language_model_has_the_quickstarts_transformer_and_text(parsed):
    text = parsed("fit", "-c", str(CONFIGS / "shapes_text.yaml"))
    quickstart = parsed("fit", "-c", str(CONFIGS / "quickstart.yaml"))
    ours, theirs = (c["model"]["init_args"]["transformer"] for c in (text, quickstart))
    assert ours == theirs
    for name in ("sources", "vocab_size", "row_length", "cache_dir"):  # so the same tokenizer
        assert text["data"]["init_args"][name] == quickstart["data"]["init_args"][name]
    assert text["data"]["init_args"]["weights"] == {"captions": 0.0, "text": 1.0, "edits": 0.0}
    experiment = load(CONFIGS / "experiments" / "monoformer.yaml")
    start = experiment["init_from"]["checkpoint"]
    logger = text["trainer"]["logger"]["init_args"]
    assert start == f"{logger['save_dir']}/{logger['name']}/checkpoints/last.ckpt"


def test_the_edits_experiment_has_the_quickstarts_data_with_more_edits(parsed):
    files = [str(CONFIGS / name) for name in ("quickstart.yaml", "experiments/edits.yaml")]
    base = flat(parsed("fit", "-c", files[0])["data"])
    edits = flat(parsed("fit", "-c", files[0], "-c", files[1])["data"])
    changed = {key for key in edits if edits[key] != base.get(key)}
    assert changed == {
        "init_args.sources.edits.init_args.num_documents",
        *(f"init_args.weights.{name}" for name in ("captions", "text", "edits")),
        "init_args.tokenizer",
        "init_args.max_caption_t",
    }


@pytest.mark.parametrize("name", ["monoformer.yaml", "monoformer_chat.yaml"])
def test_monoformer_is_tinyllama_with_the_papers_numbers(name, parsed):
    config = parsed("fit", "-c", str(CONFIGS / name))
    model, data = config["model"]["init_args"], config["data"]["init_args"]
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
