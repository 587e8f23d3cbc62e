"""Every protocol of configs/eval runs on miniature datasets with networks of random weights.

Only the counts are changed. CLIP's networks are narrow ones under the real names, in a cache
like the hub's.
"""

import copy
import json
import math
import shutil
from pathlib import Path

import open_clip
import pytest
import yaml
from huggingface_hub import constants

from evaluation.open_clip_model import load_open_clip
from evaluation.weights import INCEPTION_URL
from support.evaluation_datasets import make_coco, make_geneval, make_imagenet
from support.extractors import TINY_CLIP, random_inception, tiny_clip
from tf_lightning.cli.main import main

EVAL = Path(__file__).resolve().parents[2] / "configs" / "eval"
HUB = {
    "ViT-L-14": "models--timm--vit_large_patch14_clip_224.openai",
    "ViT-B-32": "models--timm--vit_base_patch32_clip_224.openai",
}
CLIP_SCORES = ("vit-l-14-openai", "vit-b-32-openai-photo-depicts")
MEASURED = {
    name: {
        *(
            f"val/{score}[{name}-lanczos256-torchfidelity]"
            for score in ("fid", "kid", "inception_score")
        ),
        *(f"val/clip_score[{name}-{model}]" for model in CLIP_SCORES),
    }
    for name in ("coco30k-matched", "coco30k-val2014full")
} | {
    "karpathy": {"val/cider[karpathy-test-greedy]", "val/bleu4[karpathy-test-greedy]"},
    "imagenet50k": {
        f"val/{score}[imagenet50k-train-lanczos256-torchfidelity]"
        for score in ("fid", "inception_score")
    },
    "geneval": set(),
    "quickstart": {"val/fid[shapes]", "val/kid[shapes]", "val/text/bits_per_byte"},
}
COUNTS = {"coco30k-matched": "count", "coco30k-val2014full": "count", "imagenet50k": "per_class"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A folder with the caches of torch and of the Hugging Face hub."""
    home = tmp_path_factory.mktemp("home")
    random_inception(home / "hub" / "checkpoints" / INCEPTION_URL.rsplit("/", 1)[-1])
    clip = tiny_clip(home / "clip") / "open_clip_model.safetensors"
    for folder in HUB.values():
        snapshot = home / "hf" / folder / "snapshots" / "1234"
        snapshot.mkdir(parents=True)
        shutil.copy(clip, snapshot)
        (home / "hf" / folder / "refs").mkdir()
        (home / "hf" / folder / "refs" / "main").write_text("1234")
    return home


@pytest.fixture
def home(weights, tmp_path, monkeypatch) -> Path:
    """The working directory, with miniature datasets in it."""
    monkeypatch.setenv("TORCH_HOME", str(weights))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(weights / "hf"))
    for model in HUB:
        tiny = copy.deepcopy(TINY_CLIP["model_cfg"])
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, model, tiny)
    monkeypatch.chdir(tmp_path)
    make_coco(tmp_path / "datasets" / "coco")
    make_imagenet(tmp_path / "datasets" / "imagenet")
    make_geneval(tmp_path / "datasets" / "geneval")
    return tmp_path


def few(name: str, run: Path, home: Path) -> list[str]:
    """Returns the options of a run whose protocol has few prompts, steps and real images."""
    config = yaml.safe_load((EVAL / f"{name}.yaml").read_text())
    evaluate = config["evaluate"]["init_args"]
    evaluate["sampling"] |= {"num_inference_steps": 2, "max_new_tokens": 4}
    if name in COUNTS:
        evaluate["prompts"]["init_args"][COUNTS[name]] = 6
    if name == "quickstart":
        evaluate["prompts"]["init_args"] = {"count": 6, "real_per_prompt": 2}
    for measure in evaluate["metrics"]:
        if isinstance(measure, dict) and "ImageQuality" in measure["class_path"]:
            measure["init_args"] |= {"kid_subset_size": 4, "splits": 2}
    config["trainer"]["enable_progress_bar"] = True  # the configuration of the tests' run has none
    config["trainer"]["logger"]["save_dir"] = "runs"  # the tests' run has another folder
    (home / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return ["-c", str(run / "config.yaml"), "-c", str(home / f"{name}.yaml")]


def test_every_protocol_is_run():
    assert set(MEASURED) == {path.stem for path in EVAL.glob("*.yaml")}


@pytest.mark.slow
@pytest.mark.filterwarnings("error:QuickGELU mismatch")
def test_openais_weights_have_the_activation_that_they_were_trained_with(home):
    for model in HUB:
        network = load_open_clip(model, "openai").network
        kinds = {type(part).__name__ for part in network.modules()}
        assert "QuickGELU" in kinds and "GELU" not in kinds


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURED)
def test_a_protocol_measures_a_miniature_copy(name, run, home):
    last = str(run / "checkpoints" / "last.ckpt")
    main(["validate", *few(name, run, home), "--ckpt_path", last])
    label = {"quickstart": "quickstart-eval"}.get(name, name)
    file = home / "runs" / label / "version_0" / "validate" / "metrics.json"
    measured = {n["name"]: n for n in json.loads(file.read_text())["numbers"]}
    assert MEASURED[name] <= measured.keys()
    assert all(math.isfinite(measured[number]["value"]) for number in MEASURED[name])
    for number in MEASURED[name]:
        if "openai" in number:
            model = "ViT-L-14" if "vit-l" in number else "ViT-B-32"
            assert model in measured[number]["protocol"]["model"]
    if name == "geneval":
        folder = home / "runs" / "geneval-samples"
        assert len(list(folder.glob("0000[01]/samples/000[0-3].png"))) == 8
    if "torchfidelity" in str(MEASURED[name]):
        assert list((home / "datasets" / "references").glob("fid-*.safetensors"))
