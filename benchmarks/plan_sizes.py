"""Table of docs/scale.md: what the paper's five runs need on 8, 64 and 256 GPUs of 80 GiB.

    OMP_NUM_THREADS=1 python benchmarks/plan_sizes.py [SIZE ...]

Each value is that of a `tf-lightning plan` of a size's recipe, sharded over all GPUs: `shard_size`,
if the recipe has one, is left out. A batch has the recipe's rows, or fewer on 256 GPUs, and as many
batches are accumulated as give the paper's 512 rows a step. Peaks that do not fit are in brackets.
It needs no GPU, and some minutes of CPU time.
"""

import argparse
from dataclasses import replace

from tf_lightning.cli.plan import (
    GIB,
    GPU_MEMORY,
    MFU,
    TFLOPS,
    USABLE,
    Plan,
    build_config,
    plan_parser,
    read_plan,
)

SIZES = ("0.16b", "0.37b", "0.76b", "1.4b", "7b")
GPUS, ROWS = (8, 64, 256), 512
MODES = ("none", "full")


def plan_of(size: str, num_gpus: int, mode: str) -> Plan:
    """Return the plan of a recipe with activation checkpointing on a number of GPUs."""
    files = ["-c", "configs/paper/transfusion.yaml", "-c", f"configs/paper/{size}.yaml"]
    plan = read_plan(build_config(files, plan_parser()), num_gpus)
    rows = min(plan.batch_size, ROWS // num_gpus)
    hparams = {**plan.hparams, "activation_checkpointing": mode, "shard_size": None}
    return replace(plan, hparams=hparams, batch_size=rows, accumulate=ROWS // num_gpus // rows)


def row(size: str, mode: str) -> str:
    """Return a row of the table; what does not fit is in brackets."""
    cells = [size, mode]
    for num_gpus in GPUS:
        plan = plan_of(size, num_gpus, mode)
        peak = plan.memory().peak / GIB
        text = f"{peak:.1f}" if peak <= USABLE * GPU_MEMORY else f"({peak:.1f})"
        days = plan.max_steps * plan.flops_per_step() / (num_gpus * MFU * TFLOPS * 1e12) / 86_400
        cells += [f"{text}, {plan.batch_size} rows", f"{days:,.1f}"]
    return " | ".join(["", *cells, ""]).strip()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sizes", nargs="*", default=SIZES, metavar="SIZE", help="as 0.76b")
    sizes = parser.parse_args().sizes
    gpus = " | ".join(f"{num_gpus} GPUs: GiB, batch | days" for num_gpus in GPUS)
    print(f"| size | `activation_checkpointing` | {gpus} |")
    print("|---" * (2 + 2 * len(GPUS)) + "|")
    for size in sizes:
        for mode in MODES:
            print(row(size, mode), flush=True)


if __name__ == "__main__":
    main()
