"""Train for a long time and check that nothing grows: memory, open files, threads, time of a step.

    python benchmarks/soak.py --minutes 60

A small model is trained on the CPU or the GPU with two workers, a checkpoint every 50 steps and a
validation with samples every 200. Memory is the private memory of the processes, without pages of
files; the CPU time of a step is divided by that of a fixed computation, so that a busy machine does
not matter. Every few seconds a row is measured; each minute one is printed.
At the end a line is fitted to each column after the warm-up, the first quarter of the rows. A
column is flat if the upper end of the 95% confidence interval of its slope is below its limit. The
exit code is 1 if a column is not flat.
"""

import argparse
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support import runs  # noqa: E402
from tf_lightning.cli.main import main as run_command  # noqa: E402

LIMITS = {  # growth of a column in 1,000 steps that is allowed
    "main MB": 1.0,
    "workers MB": 1.0,
    "CUDA MB": 1.0,
    "files": 0.5,
    "threads": 0.5,
    "processes": 0.5,
    "disk MB": 5.0,  # logs and samples grow
    "relative time": 0.1,  # CPU time of a step and its share of validations
}
WARM_UP = 0.25  # share of the rows
MIN_ROWS = 4
QUANTILE = 1.96  # of 95%
ROWS = "soak.jsonl"  # file in the folder of the run


class Measure(L.Callback):
    """Measures the processes of a run, and ends it.

    Args:
        minutes: how long the run trains.
        every: seconds between two rows.
        quiet: print no rows.
    """

    def __init__(self, minutes: float, every: float = 5.0, quiet: bool = False):
        self.minutes, self.every, self.quiet = minutes, every, quiet
        self.printed = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clocks."""
        self.began = self.last = time.monotonic()
        self.cpu, self.step = time.process_time(), trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *args) -> None:
        """Measure every few seconds, and stop after some minutes."""
        now = time.monotonic()
        if now - self.last >= self.every and trainer.global_step > self.step:
            self.add_row(trainer, now)
        trainer.should_stop |= now - self.began > 60 * self.minutes

    def add_row(self, trainer: L.Trainer, now: float) -> None:
        """Measure a row, and print it if a minute is over."""
        num_steps, cpu = trainer.global_step - self.step, time.process_time()
        row = {"step": trainer.global_step, "minutes": (now - self.began) / 60}
        row |= measured(Path(trainer.default_root_dir))
        row["CPU ms"] = 1000 * (cpu - self.cpu) / num_steps
        row["relative time"] = (cpu - self.cpu) / num_steps / reference_seconds()
        cpu = time.process_time()
        row["ms"] = 1000 * (now - self.last) / num_steps
        with Path(trainer.default_root_dir, ROWS).open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.last, self.cpu, self.step = now, cpu, trainer.global_step
        if not self.quiet and int(row["minutes"]) > self.printed:
            self.printed = int(row["minutes"])
            print(" ".join(f"{name} {value:,.1f}" for name, value in row.items()), flush=True)


def measured(folder: Path) -> dict[str, float]:
    """Measure this process, its children and the folder of the run."""
    children = [child.pid for child in multiprocessing.active_children()]
    processes = [os.getpid(), *children]
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return {
        "main MB": resident(os.getpid()),
        "workers MB": sum(map(resident, children)),
        "CUDA MB": torch.cuda.memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0,
        "files": sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in processes),
        "threads": sum(len(os.listdir(f"/proc/{pid}/task")) for pid in processes),
        "processes": len(processes),
        "disk MB": sum(path.stat().st_size for path in files) / 2**20,
    }


def resident(process: int) -> float:
    """Return the resident memory of a process in MB, without pages of files."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024


def reference_seconds() -> float:
    """Return the CPU time of a fixed computation, about that of a step."""
    began = time.process_time()
    x = torch.ones(64, 64)
    for _ in range(2000):
        x = (x @ x).clamp(max=1.0)
    return time.process_time() - began


def slope(steps: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Fit a line by least squares.

    Returns:
        Its slope in 1,000 steps, and the half width of its 95% confidence interval. As neighboring
        rows resemble each other, they count as fewer rows, n (1 - r) / (1 + r) for a correlation r.
    """
    x, y = np.asarray(steps, float) / 1000, np.asarray(values, float)
    x -= x.mean()
    fitted = (x @ y) / (x @ x)
    rest = y - y.mean() - fitted * x
    if rest @ rest < 1e-12:
        return fitted, 0.0
    correlation = min(max(rest[1:] @ rest[:-1] / (rest @ rest), 0.0), 0.99)
    count = max(len(x) * (1 - correlation) / (1 + correlation), 3.0)
    spread = rest @ rest / len(x)  # variance around the line
    error = math.sqrt(spread / (x @ x / len(x)) / max(count - 2, 1.0))
    return fitted, QUANTILE * error


def config(folder: Path, minutes: float, every: float, quiet: bool = False) -> Path:
    """Write the configuration of the run to a file, and return its path."""

    def change(values: dict) -> None:
        values["trainer"] |= {"accelerator": "auto", "max_steps": 10**7, "val_check_interval": 200}
        values["trainer"]["log_every_n_steps"] = 10
        values["data"]["init_args"]["num_workers"] = 2
        callbacks = {entry["class_path"]: entry for entry in values["trainer"]["callbacks"]}
        kept = ["ModelCheckpoint", "Throughput", "TextPerplexity", "Evaluate", "RateMonitor"]
        callbacks = [c for name, c in callbacks.items() if name.endswith(tuple(kept))]
        callbacks[0]["init_args"] |= {"every_n_train_steps": 50, "save_top_k": 1}
        measure = {"minutes": minutes, "every": every, "quiet": quiet}
        callbacks.append({"class_path": "benchmarks.soak.Measure", "init_args": measure})
        values["trainer"]["callbacks"] = callbacks

    return runs.write_config(folder, change)


def train(folder: Path, minutes: float, every: float = 5.0, quiet: bool = False) -> list[dict]:
    """Train in this process; return the rows."""
    run_command(["fit", "-c", str(config(folder, minutes, every, quiet))])
    return [json.loads(line) for line in (folder / "run" / ROWS).read_text().splitlines()]


def growing(rows: list[dict[str, float]]) -> list[str]:
    """Print the slope of each column after the warm-up; return the columns that are not flat.

    Exits with a sentence if there are too few rows.
    """
    if len(rows) < MIN_ROWS:
        sys.exit(
            f"{len(rows)} rows were measured, and a line needs {MIN_ROWS}; give more --minutes"
        )
    kept = rows[int(WARM_UP * len(rows)) :]
    failed = []
    print(f"{len(rows)} rows, {rows[-1]['step']:,} steps; slopes in 1,000 steps after the warm-up:")
    for name, limit in LIMITS.items():
        values = [row[name] for row in kept]
        found, width = slope([row["step"] for row in kept], values)
        is_flat = found + width < limit
        word = "flat" if is_flat else "GROWS"
        numbers = f"{found:+.4f} ± {width:.4f}, limit {limit:g}, mean {np.mean(values):,.1f}"
        print(f"{name:12}{numbers:50}{word}", flush=True)
        failed += [] if is_flat else [name]
    return failed


def main() -> int:
    """Train, and return 1 if anything grew."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--every", type=float, default=5, help="seconds between two rows")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = train(Path(folder), args.minutes, args.every)
    return int(bool(growing(found)))


if __name__ == "__main__":
    sys.exit(main())
