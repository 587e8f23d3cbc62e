"""Statistics of real pictures, computed once and kept in a file that says what they are of."""

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed

Facts = dict[str, str | int]
Statistics = Mapping[str, Tensor]


class Reference:
    """The real pictures of a metric, fixed: read from a file, or kept when first computed.

    Args:
        path: file, read at once if it exists and else written by `keep`; None keeps in memory only.
        facts: what the pictures are and what looks at them; a file must agree in all of it.

    Raises:
        ValueError: the file is broken, or its facts are others.
    """

    def __init__(self, path: str | Path | None, facts: Facts):
        self.path, self.facts = path, facts
        exists = path is not None and Path(path).exists()
        self.statistics = read_statistics(path, facts) if exists else None

    def keep(self, statistics: Statistics) -> None:
        """Fixes the statistics, which hold their `count`; writes the file on rank zero.

        Raises:
            ValueError: the count is not the one that the facts state.
        """
        count, stated = int(statistics["count"]), self.facts.get("count")
        if stated is not None and int(stated) != count:
            raise ValueError(
                f"{count} real pictures were given, not the {stated} that the reference is to "
                "be of; give as many or state their number"
            )
        self.statistics = {name: tensor.cpu() for name, tensor in statistics.items()}
        if self.path is not None and not (distributed.is_initialized() and distributed.get_rank()):
            write_statistics(self.path, self.statistics, self.facts)


def write_statistics(path: str | Path, statistics: Statistics, facts: Facts) -> None:
    """Writes tensors with their facts, all or nothing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    tensors = {name: tensor.contiguous() for name, tensor in statistics.items()}
    save_file(tensors, unfinished, metadata={key: str(value) for key, value in facts.items()})
    os.replace(unfinished, path)


def read_statistics(path: str | Path, facts: Facts) -> dict[str, Tensor]:
    """The tensors of a file whose facts are these."""
    try:
        with safe_open(path, "pt") as file:
            written = file.metadata() or {}
            statistics = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a reference file ({error}); delete it and have it made again"
        ) from error
    wanted = {key: str(value) for key, value in facts.items()}
    told = [
        f"{key} {written.get(key)}, not {value}"
        for key, value in wanted.items()
        if written.get(key) != value
    ]
    if told:
        raise ValueError(f"{path} was made with {', '.join(told)}; delete it or name another file")
    return statistics
