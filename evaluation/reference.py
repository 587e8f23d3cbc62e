"""Statistics of real images, computed once and stored in a file together with their facts."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed

from evaluation.files import atomic_file

Facts = dict[str, str | int]
Statistics = Mapping[str, Tensor]


class Reference:
    """A metric's statistics of real images: read from a file, or kept when first computed.

    Args:
        path: file of the statistics. It is read at once if it exists, and written by `keep`
            otherwise. None: keep the statistics in memory only.
        facts: facts about the images and the extractor; an existing file must have the same facts.

    Raises:
        ValueError: the file is damaged or has other facts.
    """

    def __init__(self, path: str | Path | None, facts: Facts):
        self.path, self.facts = path, facts
        exists = path is not None and Path(path).exists()
        self.statistics = read_statistics(path, facts) if exists else None

    def keep(self, statistics: Statistics) -> None:
        """Fix the statistics, which include a `count`; rank zero writes the file.

        Raises:
            ValueError: the count differs from the count in the facts.
        """
        count, expected = int(statistics["count"]), self.facts.get("count")
        if expected is not None and int(expected) != count:
            raise ValueError(
                f"{count} real images were given but the reference is defined for {expected}; "
                "give that many or change the count"
            )
        self.statistics = {name: tensor.cpu() for name, tensor in statistics.items()}
        if self.path is not None and not (distributed.is_initialized() and distributed.get_rank()):
            write_statistics(self.path, self.statistics, self.facts)


def write_statistics(path: str | Path, statistics: Statistics, facts: Facts) -> None:
    """Write statistics with their facts as a safetensors file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in statistics.items()}
    with atomic_file(path) as file:
        save_file(tensors, file, metadata={key: str(value) for key, value in facts.items()})


def read_statistics(path: str | Path, facts: Facts) -> dict[str, Tensor]:
    """Read the statistics of a file.

    Raises:
        ValueError: the file is damaged or its facts differ from `facts`.
    """
    try:
        with safe_open(path, "pt") as file:
            stored = file.metadata() or {}
            statistics = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a reference file ({error}); delete it so that it is computed again"
        ) from error
    expected = {key: str(value) for key, value in facts.items()}
    differing = [
        f"{key} {stored.get(key)}, not {value}"
        for key, value in expected.items()
        if stored.get(key) != value
    ]
    if differing:
        raise ValueError(
            f"{path} was made with {', '.join(differing)}; delete it or name another file"
        )
    return statistics
