"""Every recipe of configs/ prepares its data, starts and trains two steps, in miniature.

The recipe is given as it stands. A second file makes the model small and the run short; the data
and the pretrained weights that a recipe names lie in the working directory, made here in the layout
of the published ones.
"""

import copy
import gzip
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from huggingface_hub import constants
from transformers import LlamaConfig, LlamaForCausalLM

from callbacks.init_from import InitFrom
from evaluation.weights import INCEPTION_URL
from support.color_font import write_color_font
from support.extractors import random_inception
from support.files import encoded_image, write_lines, write_tar
from support.language_models import tiny, with_sentencepiece
from tf_lightning.cli.lightning import build
from tf_lightning.cli.main import main

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "small")
EXPERIMENTS = sorted(path.stem for path in CONFIGS.glob("experiments/*.yaml"))
AUTOENCODERS = sorted(path.stem for path in CONFIGS.glob("autoencoder/*.yaml"))
SIZES = {"dim": 32, "num_layers": 1, "num_heads": 4, "ffn_dim": 48}
TINYLLAMA = "TinyLlama-1.1B-Chat-v1.0"
LLAMA = "Llama-2-7b-hf"  # its tokenizer alone
HUB = "hf://"  # in the tests, the folder hub_datasets
NUM_PIECES = 300  # of the stand-in for TinyLlama
PROMPT_WORDS = "the small red cat sits on a blue mat while green birds sing above old trees".split()
SHORT = {
    "trainer": {
        **{"max_steps": 2, "limit_val_batches": 0, "accumulate_grad_batches": 1},
        **{"accelerator": "cpu", "devices": 1, "precision": "32-true"},
        **{"log_every_n_steps": 1, "enable_progress_bar": False, "enable_model_summary": False},
    },
    "checkpoint": {"every_n_train_steps": 2},
}


def sentence(number: int) -> str:
    """A different caption for each number."""
    return " ".join(random.Random(number).sample(PROMPT_WORDS, 6))


def write_pictures(folder: Path, count: int, names: str) -> list[Path]:
    """Write images of 64 x 64 pixels; `names` has a place for the number."""
    files = [folder / names.format(number) for number in range(count)]
    for number, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        color = ("red", "lime", "blue")[number % 3]
        file.write_bytes(encoded_image(color, "JPEG", (64, 64)))
    return files


def write_tars(folder: Path, count: int) -> None:
    """Captioned images as img2dataset writes them."""
    files = {}
    for number in range(count):
        files[f"{number:09d}.jpg"] = encoded_image("red", "JPEG", (64, 64))
        files[f"{number:09d}.txt"] = sentence(number).encode()
    folder.mkdir(parents=True)
    write_tar(folder / "00000.tar", files)


def write_magicbrush(folder: Path, split: str, count: int) -> None:
    """MagicBrush: edit_turns.json beside images/ID/FILE."""
    turns = []
    for number in range(count):
        names = [f"{number}-{kind}.png" for kind in ("input", "mask1", "output1")]
        for name in names:
            file = folder / split / "images" / str(number) / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encoded_image("blue", size=(64, 64)))
        keys = dict(zip(("input", "mask", "output"), names, strict=True))
        turns.append(keys | {"instruction": sentence(number)})
    (folder / split / "edit_turns.json").write_text(json.dumps(turns))


def write_datasets(root: Path) -> None:
    """Every folder below datasets/ that a recipe reads."""
    write_tars(root / "journeydb", 30)
    write_tars(root / "cc12m", 30)
    (root / "c4").mkdir()
    write_lines(root / "c4" / "c4.json", [{"text": sentence(n)} for n in range(300)])
    (root / "c4" / "c4.json.gz").write_bytes(gzip.compress((root / "c4" / "c4.json").read_bytes()))
    chats = [
        {"prompt_id": str(n), "messages": [{"role": "user", "content": sentence(n)},
                                           {"role": "assistant", "content": sentence(n + 1)}]}
        for n in range(30)
    ]  # fmt: skip
    (root / "ultrachat").mkdir()
    write_lines(root / "ultrachat" / "train_0.jsonl", chats)
    images = "ILSVRC/Data/CLS-LOC/train/n0144076{0}/n0144076{0}_{{}}.JPEG"
    for digit in "45":
        write_pictures(root / "imagenet", 12, images.format(digit))
    names = "n01440764 tench, Tinca tinca\nn01440765 goldfish, Carassius auratus\n"
    (root / "imagenet" / "LOC_synset_mapping.txt").write_text(names)
    write_magicbrush(root / "magicbrush", "train", 8)
    write_magicbrush(root / "magicbrush", "dev", 2)


def write_hub_datasets(root: Path) -> None:
    """The data that a recipe reads from the hub, in folders of the same names."""
    wikitext = root / "datasets" / "Salesforce" / "wikitext" / "wikitext-2-raw-v1"
    wikitext.mkdir(parents=True)
    paragraphs = [text for n in range(300) for text in ("", f" {sentence(n)} . \n")]
    for split in ("train", "validation"):
        table = pa.table({"text": paragraphs})
        pq.write_table(table, wikitext / f"{split}-00000-of-00001.parquet")


def write_pretrained(root: Path) -> None:
    """The weights that a recipe starts from, small."""
    torch.manual_seed(0)
    llama = root / TINYLLAMA
    sizes = {"vocab_size": NUM_PIECES, "hidden_size": 32, "num_hidden_layers": 1}
    tiny(**sizes, num_attention_heads=4, num_key_value_heads=4).save_pretrained(llama)
    with_sentencepiece(llama, NUM_PIECES)
    shutil.copytree(llama, root / LLAMA)
    for folder, channels in ((root / "autoencoder", 8), (snapshot(root), 4)):
        AutoencoderKL(
            latent_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8,) * 4,
            norm_num_groups=4,
        ).save_pretrained(folder)


def snapshot(root: Path) -> Path:
    """The folder of stabilityai/sd-vae-ft-mse in the hub's cache."""
    model = root / "hub" / "models--stabilityai--sd-vae-ft-mse"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("1234")
    return model / "snapshots" / "1234"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A folder with the recipes, their data and the weights they start from."""
    root = tmp_path_factory.mktemp("checkout")
    (root / "configs").symlink_to(CONFIGS)
    write_datasets(root / "datasets")
    write_hub_datasets(root / "hub_datasets")
    pictures = write_pictures(root / "my_pictures", 60, "{}.jpg")
    lines = [{"file_name": f.name, "text": sentence(n)} for n, f in enumerate(pictures)]
    write_lines(root / "my_pictures" / "metadata.jsonl", lines)
    write_color_font(root / "emoji.ttf")
    write_pretrained(root)
    random_inception(root / "torch" / "hub" / "checkpoints" / INCEPTION_URL.rpartition("/")[2])
    return root


@pytest.fixture
def home(checkout, monkeypatch) -> Path:
    """The checkout as the working directory, with its hub's cache."""
    monkeypatch.chdir(checkout)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(checkout / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(checkout / "torch"))
    return checkout


def load(*files: Path) -> dict:
    """The content of recipes, later ones over earlier ones; a model may be a file of its own."""
    merged: dict = {}
    for file in files:
        content = yaml.safe_load(file.read_text())
        if isinstance(content.get("model"), str):
            content["model"] = yaml.safe_load((file.parent / content["model"]).read_text())
        for section, values in content.items():
            merged[section] = {**merged.get(section, {}), **values}
    return merged


def miniature(*files: Path) -> dict:
    """Return options that shrink a recipe: a small model, few and small images, two steps."""
    recipe, small = load(*files), copy.deepcopy(SHORT)
    if "shapes_report" in recipe:  # the report of an experiment is the quickstart's
        few = {"sampling": {"num_inference_steps": 2}, "num_prompts": 2}
        small["shapes_report"] = few if len(files) == 1 else None
    data = recipe["data"].get("init_args", recipe["data"])
    if "source" in data:
        shrink(data["source"].setdefault("init_args", {}), data["source"]["class_path"])
        small["data"] = {"source": data["source"], "batch_size": 2}
        network = {"channels": [8, 8, 8, 8], "norm_groups": 4}
        # LPIPS would need VGG-16's 0.5 GB.
        small["model"] = {"network": network, "lpips_weight": 0.0, "gan_start_step": 1}
        return small
    small["model"] = {"transformer": dict(SIZES)}
    few = {"num_prompts": 2, "sampling": {"num_inference_steps": 2}}
    for callback in recipe["trainer"].get("callbacks", []):
        callback["init_args"] |= few
        small["trainer"]["callbacks"] = recipe["trainer"]["callbacks"]
    if data.get("tokenizer", "").startswith(TINYLLAMA):
        sizes = {"vocab_size": NUM_PIECES + 2, "pretrained_vocab_size": NUM_PIECES}
        small["model"]["transformer"] |= sizes | {"num_kv_heads": 4}
    if "sources" in data:
        for source in data["sources"].values():
            shrink(source.setdefault("init_args", {}), source["class_path"])
        small["data"] = {"sources": data["sources"]}
    else:
        named = ("paths", "image_size", "val_fraction")
        small["data"] = {name: data[name] for name in (*named, "val_paths") if name in data}
        if "val_paths" not in data:
            small["data"] |= {"val_fraction": 0.25}
        shrink(small["data"])
    return small


def shrink(options: dict, class_path: str = "") -> dict:
    """Make the options of a source small, in place."""
    few = {"image_size": 64, "val_fraction": 0.25}
    if ".emoji." in class_path:
        return options.update(font="emoji.ttf", val_fraction=0.3) or options
    if "paths" not in options:  # of the shapes world
        return options.update(num_documents=20, num_val=4) or options
    options |= {name: value for name, value in few.items() if name in options}
    for name in options.keys() & {"paths", "val_paths"}:
        options[name] = [path.replace(HUB, "hub_datasets/") for path in options[name]]
    return options


def train(*names: str, root: Path, more: Sequence[str] = (), run: str = "") -> dict:
    """Train two steps of recipes into a new folder; return the last checkpoint."""
    files = [Path("configs", f"{name}.yaml") for name in names]
    small = root / f"{'-'.join(files[-1].with_suffix('').parts)}.yaml"
    small.write_text(yaml.safe_dump(miniature(*files)))
    given = [word for file in [*files, small] for word in ("-c", str(file))]
    folder = root / "runs" / (run or load(*files)["trainer"]["logger"]["name"])
    shutil.rmtree(folder, ignore_errors=True)
    main(["fit", *given, *more])
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def in_checkout(checkout):
    """The checkout as the working directory of fixtures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(checkout)
        patch.setattr(constants, "HF_HUB_CACHE", str(checkout / "hub"))
        yield checkout


@pytest.fixture(scope="module")
def earlier_runs(in_checkout) -> None:
    """The runs that other recipes start from: each is the command that their heads name."""
    train("autoencoder/emoji", root=in_checkout)
    more = ["--data.autoencoder=autoencoder", "--model.patch_size=2", "--trainer.logger.name=base"]
    more += ["--model.transformer.qk_norm=false", "--model.prediction_type=epsilon"]
    train("my_pictures", root=in_checkout, more=more, run="base")
    train("quickstart", root=in_checkout)
    train("shapes_text", root=in_checkout)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains(name, earlier_runs, home):
    more = ["--model.transformer.vocab_size=1024"] if name == "edit" else []  # that of runs/base
    assert train(name, root=home, more=more)["global_step"] == 2


@pytest.mark.parametrize("name", ["monoformer", "monoformer_chat"])
def test_monoformer_starts_from_tinyllama_at_its_size(name, tinyllama, monkeypatch):
    """The start check reads headers alone, so the file of 2.2 GB may have holes."""
    monkeypatch.chdir(tinyllama.parent)
    recipe = str(CONFIGS / f"{name}.yaml")
    given = ["--data.autoencoder=pixels", "--model.latent_channels=3", *("--trainer.devices=1",)]
    command = build(["-c", recipe, *given], run=False)
    (start,) = (own for own in command.trainer.callbacks if isinstance(own, InitFrom))
    start.before_training(command.model, command.datamodule)


@pytest.fixture(scope="module")
def tinyllama(tmp_path_factory) -> Path:
    """TinyLlama-1.1B-Chat-v1.0 in its size and layout; its weights are zeros without a disk."""
    folder = tmp_path_factory.mktemp("true_size") / TINYLLAMA
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
        num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=2048,
        rms_norm_eps=1e-5, rope_theta=10_000.0, dtype="bfloat16",
    )  # fmt: skip
    folder.mkdir(parents=True)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        weights = LlamaForCausalLM(config).state_dict()
    header, end = {}, 0
    for key, weight in weights.items():
        begin, end = end, end + 2 * weight.numel()
        header[key] = {"dtype": "BF16", "shape": list(weight.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    with_sentencepiece(folder, 32_000)
    return folder


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_an_autoencoder_trains(name, earlier_runs, home):
    assert train(f"autoencoder/{name}", root=home)["global_step"] == 2
    logger = load(CONFIGS / "autoencoder" / f"{name}.yaml")["trainer"]["logger"]
    assert (home / "runs" / logger["name"] / "autoencoder" / "config.json").is_file()


def test_a_run_of_the_paper_trains(earlier_runs, home):
    """Without its evaluation, which needs COCO, and on one device."""
    more = ["--evaluate=null", "--trainer.num_nodes=1", "--data.autoencoder=autoencoder"]
    more += [f"--model.transformer.vocab_size={NUM_PIECES + 2}", "--data.num_workers=0"]
    names = ("paper/transfusion", "paper/0.16b")
    assert train(*names, root=home, more=more)["global_step"] == 2


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_trains(name, earlier_runs, home):
    assert train("quickstart", f"experiments/{name}", root=home)["global_step"] == 2
