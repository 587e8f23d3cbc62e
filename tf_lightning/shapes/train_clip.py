"""Trains a small CLIP on the shapes world, which scores images and captions of that world.

    python -m tf_lightning.shapes.train_clip --out DIR

The result is an open_clip folder (`local-dir:DIR`) with a `report.json`. The model is trained on
all meanings, also those held out from generative models, because it has to judge them. The images
of the report are not in its training data.

Shapes: B pairs of an image and a caption. The meanings in a batch differ, so that every caption
matches only one image.
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tf_lightning.errors import UserError
from tf_lightning.files import atomic_folder
from tf_lightning.progress import progress_bar
from tf_lightning.shapes.grammar import captions
from tf_lightning.shapes.world import IMAGE_SIZE, Meaning, generator, meanings, place, render

# open_clip's tokenizer has 49,408 entries, so the text tower is narrow to keep the file small.
MODEL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": IMAGE_SIZE, "layers": [1, 1, 1, 1], "width": 8},
    "text_cfg": {"context_length": 16, "width": 24, "heads": 2, "layers": 4},
}
PREPROCESS = {"size": IMAGE_SIZE, "mean": [0.5] * 3, "std": [0.5] * 3}
ALL_MEANINGS = (*meanings(1), *meanings(2))
SEED_OFFSET = 1_000_000  # separates these images from those of the data sources


def pairs(asked: list[Meaning], rng: np.random.Generator) -> tuple[Tensor, list[str]]:
    """Draw an image (B, 3, 64, 64) in [-1, 1] and a caption of each meaning."""
    images = np.stack([render(place(meaning, rng)) for meaning in asked])
    texts = [str(rng.choice(captions(meaning))) for meaning in asked]
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1, texts


def different_meanings(count: int, rng: np.random.Generator) -> list[Meaning]:
    """Draw `count` different meanings; those with one object are four times as probable."""
    shares = np.array([4.0 if len(meaning.objects) == 1 else 1.0 for meaning in ALL_MEANINGS])
    chosen = rng.choice(len(ALL_MEANINGS), count, replace=False, p=shares / shares.sum())
    return [ALL_MEANINGS[index] for index in chosen]


def train(*, steps: int, batch_size: int, lr: float, seed: int) -> tuple[nn.Module, object]:
    """Train a CLIP model with the symmetric cross-entropy of its paper.

    Args:
        steps: optimizer steps.
        batch_size: pairs in a step.
        lr: highest learning rate.
        seed: seed of the weights and of the pairs.

    Returns:
        The model in evaluation mode and its tokenizer.
    """
    torch.manual_seed(seed)
    model = open_clip.CLIP(**MODEL)
    tokenize = open_clip.SimpleTokenizer(context_length=MODEL["text_cfg"]["context_length"])
    loss = open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    progress = progress_bar(range(steps), "shapes-clip", mininterval=1.0)
    for step in progress:
        rng = generator(SEED_OFFSET + seed, step)
        images, words = pairs(different_meanings(batch_size, rng), rng)
        error = loss(*model(images, tokenize(words)))
        optimizer.zero_grad()
        error.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100))
        if step % 20 == 0:
            progress.set_postfix(loss=f"{error.item():.3f}")
    return model.eval(), tokenize


@torch.no_grad()
def measure(model: nn.Module, tokenize, *, num_rounds: int, seed: int) -> dict:
    """Measure top-1 retrieval among 630 held-out pairs, one of each meaning.

    The result is the mean over `num_rounds` sets of pairs.
    """
    found = {"picture_to_caption": [], "caption_to_picture": []}
    for index in range(num_rounds):
        images, words = pairs(list(ALL_MEANINGS), generator(SEED_OFFSET + seed, index, "val"))
        image_features = model.encode_image(images, normalize=True)
        similarity = image_features @ model.encode_text(tokenize(words), normalize=True).T
        own = torch.arange(len(ALL_MEANINGS))
        found["picture_to_caption"].append((similarity.argmax(1) == own).float().mean())
        found["caption_to_picture"].append((similarity.argmax(0) == own).float().mean())
    means = {name: torch.stack(values).mean().item() for name, values in found.items()}
    return {"num_images": num_rounds * len(ALL_MEANINGS), "candidates": len(ALL_MEANINGS), **means}


def save(model: nn.Module, out: Path, report: dict) -> None:
    """Write the open_clip folder `out` with its report."""
    with atomic_folder(out) as folder:
        weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, folder / "open_clip_model.safetensors")
        config = {"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}
        (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")


def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        "python -m tf_lightning.shapes.train_clip",
        description="Train a small CLIP on the shapes world: 64 x 64 images and captions.",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write; it must not exist"
    )
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps (default: 4000)")
    parser.add_argument(
        "--batch-size", type=int, default=128, help="pairs in a step (default: 128)"
    )
    parser.add_argument(
        "--lr", type=float, default=4e-3, help="highest learning rate (default: 4e-3)"
    )
    parser.add_argument(
        "--rounds", type=int, default=4, help="rounds of 630 pairs in the report (default: 4)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the weights and pairs (default: 0)"
    )
    options = parser.parse_args(args)
    if options.out.exists():
        raise UserError(f"{options.out} already exists; give --out a new folder or remove it first")
    if not 2 <= options.batch_size <= len(ALL_MEANINGS):
        raise UserError(
            f"--batch-size {options.batch_size} must be from 2 to {len(ALL_MEANINGS)}, "
            "the number of different meanings"
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    start = time.time()
    model, tokenize = train(
        steps=options.steps, batch_size=options.batch_size, lr=options.lr, seed=options.seed
    )
    seconds = time.time() - start
    model.half().float()  # measure the weights as they are stored, rounded to float16
    report = {
        "command": shlex.join(
            ["python", "-m", "tf_lightning.shapes.train_clip", *(args or sys.argv[1:])]
        ),
        "train_seconds": round(seconds),
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "held_out": measure(model, tokenize, num_rounds=options.rounds, seed=options.seed),
    }
    save(model.half(), options.out, report)
    print(json.dumps(report, indent=2))
    print(f"Wrote {options.out}; load it with open_clip as local-dir:{options.out}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
