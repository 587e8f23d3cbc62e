"""Trains the embedded world's own CLIP, which judges pictures and captions of that world alone.

    python -m tf_lightning.shapes.train_clip --out DIR

The result is an open_clip folder (`local-dir:DIR`) with a `report.json`. It saw every meaning, also
those held out from generators: a judge has to know what it judges. No picture of its training is
one of the report's.

Shapes: B pairs of a picture and a caption, no two pairs of a batch with the same meaning, so that
no caption counts as wrong for a picture that it fits.
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import trange

from tf_lightning.errors import UserError
from tf_lightning.shapes.grammar import captions
from tf_lightning.shapes.world import IMAGE_SIZE, Meaning, generator, meanings, place, render

# open_clip's own tokenizer has 49,408 entries: the text tower is narrow so that the file is small.
MODEL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": IMAGE_SIZE, "layers": [1, 1, 1, 1], "width": 8},
    "text_cfg": {"context_length": 16, "width": 24, "heads": 2, "layers": 4},
}
PREPROCESS = {"size": IMAGE_SIZE, "mean": [0.5] * 3, "std": [0.5] * 3}
EVERY = (*meanings(1), *meanings(2))
SEED_OFFSET = 1_000_000  # pictures of this file are nobody else's


def pairs(asked: list[Meaning], rng: np.random.Generator) -> tuple[Tensor, list[str]]:
    """A picture (B, 3, 64, 64) in [-1, 1] and one of the captions of each meaning."""
    pictures = np.stack([render(place(meaning, rng)) for meaning in asked])
    words = [str(rng.choice(captions(meaning))) for meaning in asked]
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1, words


def different_meanings(count: int, rng: np.random.Generator) -> list[Meaning]:
    """`count` meanings without repetition, an eighth of them about with one object."""
    shares = np.array([4.0 if len(meaning.objects) == 1 else 1.0 for meaning in EVERY])
    chosen = rng.choice(len(EVERY), count, replace=False, p=shares / shares.sum())
    return [EVERY[index] for index in chosen]


def train(*, steps: int, batch_size: int, lr: float, seed: int) -> tuple[nn.Module, object]:
    """A CLIP model and its tokenizer, by the symmetric cross-entropy of its paper."""
    import open_clip

    torch.manual_seed(seed)
    model = open_clip.CLIP(**MODEL)
    tokenize = open_clip.SimpleTokenizer(context_length=MODEL["text_cfg"]["context_length"])
    loss = open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    progress = trange(steps, desc="shapes-clip", mininterval=1.0)
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
    """Top-1 retrieval among one caption of each of the 630 meanings, on pictures of no training."""
    found = {"picture_to_caption": [], "caption_to_picture": []}
    for index in range(num_rounds):
        images, words = pairs(list(EVERY), generator(SEED_OFFSET + seed, index, "val"))
        pictures = model.encode_image(images, normalize=True)
        likeness = pictures @ model.encode_text(tokenize(words), normalize=True).T
        own = torch.arange(len(EVERY))
        found["picture_to_caption"].append((likeness.argmax(1) == own).float().mean())
        found["caption_to_picture"].append((likeness.argmax(0) == own).float().mean())
    means = {name: torch.stack(values).mean().item() for name, values in found.items()}
    return {"num_images": num_rounds * len(EVERY), "candidates": len(EVERY), **means}


def save(model: nn.Module, out: Path, report: dict) -> None:
    """Writes the folder beside `out`, then renames it: a killed run leaves nothing half-written."""
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        folder = Path(scratch) / out.name
        folder.mkdir()
        weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, folder / "open_clip_model.safetensors")
        config = {"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}
        (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        folder.rename(out)


def main(args: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m tf_lightning.shapes.train_clip",
        description="Trains the embedded world's CLIP: 64 x 64 pictures, captions of its grammar.",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write, must not exist yet"
    )
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps (4000)")
    parser.add_argument("--batch-size", type=int, default=128, help="pairs a step (128)")
    parser.add_argument("--lr", type=float, default=4e-3, help="highest learning rate (4e-3)")
    parser.add_argument("--rounds", type=int, default=4, help="630 pictures each, to measure (4)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and pictures (0)")
    options = parser.parse_args(args)
    if options.out.exists():
        raise UserError(f"{options.out} exists already; give --out a new folder or remove it first")
    if not 2 <= options.batch_size <= len(EVERY):
        raise UserError(
            f"--batch-size {options.batch_size} must be from 2 to {len(EVERY)}, "
            "the number of different meanings"
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    begun = time.time()
    model, tokenize = train(
        steps=options.steps, batch_size=options.batch_size, lr=options.lr, seed=options.seed
    )
    seconds = time.time() - begun
    model.half().float()  # half the file, and what is measured is what is stored
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
    print(f"wrote {options.out}; open_clip loads it as local-dir:{options.out}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
