"""Compare sharded trainings with one rank: losses, rows, and the weights after a resume.

    python benchmarks/sharded_matrix.py

A small model trains 20 steps on 1, 2 and 4 CPU ranks in fp32: with FSDP2, and with HSDP in two
groups of two ranks; with and without activation checkpointing; with AdamW and with Muon.

1. The first table has the largest relative difference of a loss and of a gradient norm from those
   of one rank. Each training is also saved as a sharded folder after 10 steps and resumed. Then all
   losses, weights, averaged weights and moments of the optimizer are compared bit by bit with those
   of the training that was not interrupted; with HSDP, also those of the two groups.
2. The second table has trainings of four ranks that are saved after 5 steps, resumed on two ranks,
   saved after 10, resumed on one rank, saved after 15, and resumed on four ranks.

The exit code is 1 if a difference exceeds 1e-6, if the rows of a step are not the same, or if bits
differ on the same number of ranks.
"""

import argparse
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support import ranks as launcher  # noqa: E402
from support.sharded_fits import STEPS, train  # noqa: E402

LIMIT = 1e-6  # relative difference of losses and gradient norms
OPTIMIZERS = {"AdamW": {}, "Muon": {"muon": True}}
MODES = ("none", "full")
SHARDINGS = {2: {"FSDP2": {}}, 4: {"FSDP2": {}, "HSDP 2x2": {"shard_size": 2}}}
SHARED = {"sizes": {"modality_weights": "all"}, "z_loss_weight": 1e-4}
CHAIN = ((4, 5), (2, 10), (1, 15), (4, STEPS))  # ranks, and the step after which they stop


def cells(ranks: int) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Return the options of each training of a number of ranks by sharding, mode and optimizer."""
    names = product(SHARDINGS[ranks], MODES, OPTIMIZERS)
    return {
        (sharding, mode, optimizer): SHARED
        | SHARDINGS[ranks][sharding]
        | OPTIMIZERS[optimizer]
        | {"activation_checkpointing": mode}
        for sharding, mode, optimizer in names
    }


def of_one_rank(options: dict[str, Any]) -> dict[str, Any]:
    """Return options without those of HSDP."""
    return {name: value for name, value in options.items() if name != "shard_size"}


def difference(found: dict, expected: dict, name: str) -> float:
    """Return the largest relative difference of a curve."""
    pairs = zip(found[name], expected[name], strict=True)
    return max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)


def compare(found: dict, expected: dict) -> tuple[list[str], bool]:
    """Return the differences of a training from that of one rank, and whether they are allowed."""
    largest = [difference(found, expected, name) for name in ("loss", "grad_norm")]
    same_rows = found["rows"] == expected["rows"]
    texts = [f"{value:.1e}" for value in largest] + ["same" if same_rows else "OTHER"]
    return texts, same_rows and max(largest) <= LIMIT


def equal_bits(whole: dict, half: dict, rest: dict, has_replicas: bool) -> bool:
    """Return whether an interrupted training equals one that was not, in all bits of all ranks."""
    state = ("weights", "optimizer")
    resumed = all(rest[name] == whole[name] for name in state)
    replicas = not has_replicas or all(whole[name][:2] == whole[name][2:] for name in state)
    return resumed and replicas and half["loss"] + rest["loss"] == whole["loss"]


def same_ranks(folder: Path, ranks: int, expected: dict[str, dict]) -> bool:
    """Print the rows of the first table for a number of ranks; return whether all are allowed."""
    rows, legs = cells(ranks), []
    for number, options in enumerate(rows.values()):
        saved = {"options": options, "save": folder / f"{ranks}-{number}.ckpt", "stop": STEPS // 2}
        legs += [{"options": options}, saved, {"options": options, "start": saved["save"]}]
    found, good = train(folder, ranks, legs), True
    for number, (sharding, mode, optimizer) in enumerate(rows):
        whole, half, rest = found[3 * number : 3 * number + 3]
        texts, is_good = compare(whole, expected[optimizer])
        equal = equal_bits(whole, half, rest, sharding.startswith("HSDP"))
        good = good and is_good and equal
        print_row(ranks, sharding, mode, optimizer, *texts, "equal" if equal else "OTHER")
    return good


def other_ranks(folder: Path, expected: dict[str, dict]) -> bool:
    """Print the second table; return whether all differences are allowed."""
    rows, parts = cells(4), []
    for number, (ranks, stop) in enumerate(CHAIN):
        legs = []
        for row, options in enumerate(rows.values()):
            leg = {"options": options if ranks == 4 else of_one_rank(options), "stop": stop}
            leg |= {"start": folder / f"{row}-{number}.ckpt"} if number else {}
            leg |= {"save": folder / f"{row}-{number + 1}.ckpt"} if stop < STEPS else {}
            legs.append(leg)
        parts.append(train(folder, ranks, legs))
    good = True
    for row, (sharding, mode, optimizer) in enumerate(rows):
        names = ("loss", "grad_norm", "rows")
        found = {name: sum((part[row][name] for part in parts), []) for name in names}
        texts, is_good = compare(found, expected[optimizer])
        good = good and is_good
        print_row("4, 2, 1, 4", sharding, mode, optimizer, *texts)
    return good


def print_row(*cells: Any) -> None:
    """Print a row of a table."""
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def print_head(*cells: str) -> None:
    """Print the head of a table."""
    print()
    print_row(*cells)
    print("|---" * len(cells) + "|")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    launcher.TIMEOUT = 3600
    head = ("ranks", "sharding", "activation_checkpointing", "optimizer")
    head += ("losses", "gradient norms", "rows")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        legs = [{"options": SHARED | options} for options in OPTIMIZERS.values()]
        expected = dict(zip(OPTIMIZERS, train(folder, 1, legs), strict=True))
        print_head(*head, "bits after a resume")
        good = [same_ranks(folder, ranks, expected) for ranks in SHARDINGS]
        print_head(*head)
        good.append(other_ranks(folder, expected))
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
