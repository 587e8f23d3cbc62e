"""Comparison of a resumed run with one that nothing interrupted: states, logs, results, corpora."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from tf_lightning.sharded import read_sharded

# Keys of checkpoints, report.json and logs whose values depend on the clock.
CLOCK = {"fit_seconds", "validation_seconds", "train_seconds"}
# Lightning's counts of validation batches, which include those of an interrupted validation.
REPEATED = "epoch_loop.val_loop.batch_progress"
CLOCK_CURVES = {"train/tokens_per_sec", "train/tflops_per_sec", "val/seconds", "val/time_share"}
EPOCH = "epoch"  # of Lightning, which counts the only one as completed at the end or after it
READ = ("config.yaml", "events.out.tfevents.", "checkpoints/")  # are not compared as bytes
EVENTS = {"scalars": 0, "images": 0, "tensors": 0}  # keep all of them


def differences(
    folder: Path, whole: Path, every_step: Path, unlogged: set[int] = frozenset()
) -> list[str]:
    """Compare the folders of two runs, which hold `data/`, `run/` and `tmp/`.

    Args:
        folder: of the run that was interrupted and has ended.
        whole: of the run that nothing interrupted.
        every_step: of the same run with a checkpoint of every step.
        unlogged: steps whose training curves may be missing; see `log_differences`.

    Returns:
        A sentence for each difference.
    """
    return [
        *checkpoint_differences(folder / "run", whole / "run", every_step / "run"),
        *log_differences(folder / "run", whole / "run", unlogged),
        *file_differences(folder, whole),
        *(f"tmp/{path.name} is left" for path in sorted((folder / "tmp").iterdir())),
    ]


def checkpoint_differences(run: Path, whole: Path, every_step: Path) -> list[str]:
    """Compare the last checkpoint, and each other one with that of its step."""
    pairs = {"last.ckpt": whole / "checkpoints" / "last.ckpt"}
    for path in sorted((run / "checkpoints").glob("step*.ckpt")):
        pairs[path.name] = every_step / "checkpoints" / path.name
    found = []
    for name, other in pairs.items():
        try:
            ours = read(run / "checkpoints" / name)
        except Exception as error:  # torch raises many types for damaged files
            found.append(f"{name} cannot be read: {error}")
            continue
        theirs = read(other)
        if name != "last.ckpt":  # callbacks and loops know when others were saved
            ours, theirs = (
                {k: c[k] for k in c if k not in ("callbacks", "loops")} for c in (ours, theirs)
            )
        names = run.parent, other.parent.parent.parent
        found += [f"{name}: {line}" for line in compare(ours, theirs, *names)]
    return found


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint, a file or a sharded folder, completely."""
    if not path.is_dir():
        return torch.load(path, weights_only=True)
    checkpoint = read_sharded(path)
    parts = {"state_dict": dict, "optimizer_states": list}
    return checkpoint | {name: as_type(checkpoint[name]) for name, as_type in parts.items()}


def compare(ours: Any, theirs: Any, folder: Path, other: Path, name: str = "") -> list[str]:
    """List where two nested structures differ in a bit; paths may differ in their folder."""
    if type(ours) is not type(theirs):
        return [f"{name} is {ours!r:.80} instead of {theirs!r:.80}"]
    if isinstance(ours, dict):
        found = [
            f"{name}.{key} is in one only" for key in sorted(map(str, ours.keys() ^ theirs.keys()))
        ]
        keys = [key for key in ours.keys() & theirs.keys() if key not in (*CLOCK, REPEATED)]
        pairs = [(key, ours[key], theirs[key]) for key in keys]
    elif isinstance(ours, list | tuple):
        found = (
            []
            if len(ours) == len(theirs)
            else [f"{name} has {len(ours)} items instead of {len(theirs)}"]
        )
        pairs = [(number, *pair) for number, pair in enumerate(zip(ours, theirs, strict=False))]
    else:
        if isinstance(ours, str):
            ours, theirs = ours.replace(str(folder), ""), theirs.replace(str(other), "")
        same = torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs
        return [] if same else [f"{name} is {ours!r:.80} instead of {theirs!r:.80}"]
    for key, one, another in pairs:
        found += compare(one, another, folder, other, f"{name}.{key}" if name else str(key))
    return found


def log_differences(run: Path, whole: Path, unlogged: set[int] = frozenset()) -> list[str]:
    """Compare all curves, images and texts of two runs at each step.

    A step that was trained twice is logged twice, with the same values. Lightning saves a step
    before it logs it, so the training curves miss a step if the run is killed between the two.

    Args:
        run: folder of the run that was interrupted.
        whole: folder of the run that nothing interrupted.
        unlogged: steps after whose checkpoint the run was killed, counted from 0.
    """
    ours, theirs = logged(run), logged(whole)
    found = []
    for tag in sorted(ours.keys() | theirs.keys()):
        one, other = ours.get(tag, {}), theirs.get(tag, {})
        if tag == EPOCH or tag.startswith("train/"):
            other = {step: other[step] for step in other if step in one or step not in unlogged}
        if one.keys() != other.keys():
            missing, more = sorted(other.keys() - one.keys()), sorted(one.keys() - other.keys())
            found.append(f"{tag} is not logged at {missing}, and also at {more}")
        elif tag not in {*CLOCK_CURVES, EPOCH}:
            steps = [step for step in one if one[step] != other[step]]
            if steps:
                found.append(f"{tag} differs at {steps}: {one[steps[0]]!r:.80}")
    return found


def steps_without_curves(run: Path, whole: Path) -> set[int]:
    """Return the steps, counted from 0, that a training curve of a run misses."""
    ours, theirs = logged(run), logged(whole)
    tags = [tag for tag in theirs if tag.startswith("train/")]
    return {step for tag in tags for step in theirs[tag].keys() - ours.get(tag, {}).keys()}


@cache
def logged(run: Path) -> dict[str, dict[int, set]]:
    """Read the values of each step, by name."""
    events = EventAccumulator(str(run), size_guidance=EVENTS).Reload()
    content = {
        "scalars": lambda event: event.value,
        "images": lambda event: event.encoded_image_string,
        "tensors": lambda event: event.tensor_proto.SerializeToString(),
    }
    found: dict[str, dict[int, set]] = {}
    for kind, value in content.items():
        for tag in events.Tags()[kind]:
            for event in getattr(events, kind.title())(tag):
                found.setdefault(tag, {}).setdefault(event.step, set()).add(value(event))
    return found


def file_differences(folder: Path, whole: Path) -> list[str]:
    """Compare the names and the content of all files; more checkpoints may exist."""
    ours, theirs = files_of(folder), files_of(whole)
    more = [name for name in sorted(ours.keys() - theirs.keys()) if not is_checkpoint(name)]
    found = [f"{name} is left" for name in more]
    found += [f"{name} is missing" for name in sorted(theirs.keys() - ours.keys())]
    for name in sorted(ours.keys() & theirs.keys()):
        if any(part in name for part in READ):
            continue
        one, other = ours[name].read_bytes(), theirs[name].read_bytes()
        if name.endswith("report.json"):
            found += [
                f"{name}: {x}" for x in compare(*map(json.loads, (one, other)), folder, whole)
            ]
        elif one != other:
            found.append(f"{name} differs")
    return found


def files_of(folder: Path) -> dict[str, Path]:
    """Find all files and empty folders of `data/` and `run/`; event files have one name."""
    found = {}
    for part in "data", "run":
        for path in (folder / part).rglob("*"):
            name = str(path.relative_to(folder))
            if "events.out.tfevents." in name:
                name = str(Path(name).parent / "events.out.tfevents.")
            if path.is_file() or not any(path.iterdir()):
                found[name] = path
    return found


def is_checkpoint(name: str) -> bool:
    """Return whether a file may be there because a signal made the run save."""
    path = Path(name)
    return path.parent.name == "checkpoints" and path.match("step*.ckpt")
