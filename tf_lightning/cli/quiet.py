"""Messages of Lightning and torchmetrics that are not shown, and warnings in one plain line."""

import logging
import warnings
from pathlib import Path

NOISE = (  # beginnings of Lightning's messages that a user cannot act on
    *("💡 Tip:", "GPU available: False", "TPU available", "LOCAL_RANK", "Initializing distributed"),
    "Seed set to",
    *("Restored all states", "Loaded model weights"),  # "Restoring states" has named the checkpoint
)
NEEDLESS_WARNINGS = (
    ".*treespec, LeafSpec",  # Lightning 2.6
    # An evaluation has other callbacks than the run that wrote the checkpoint, and another folder.
    ".*callbacks used to create the checkpoint",
    ".*dirpath has changed from",
    # before_fit says these, and refuses a folder with another run.
    ".*no last checkpoint available",
    ".*Checkpoint directory .* exists and is not empty",
    ".*before the ``update`` method",  # the data warns of a source without validation documents
    "LightningCLI's args parameter",  # the commands pass their arguments on
    ".*does not have many workers",  # rows are cheap to load
    ".*To get the last learning rate computed by the scheduler",  # when a run is resumed
    ".*Previous log files in this directory will be deleted",  # see keep_rows
    ".*is smaller than the logging interval",  # horizon.check_logging names the key
)
PACKAGES = "tf_lightning", "callbacks", "evaluation", "lightning"
default_format = warnings.formatwarning


def silence_warnings() -> None:
    """Silence messages that a user cannot act on, and show warnings in one plain line."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(keep_message)
    for message in NEEDLESS_WARNINGS:
        warnings.filterwarnings("ignore", message)
    warnings.formatwarning = format_warning


def keep_message(record: logging.LogRecord) -> bool:
    """Return whether a message of Lightning is shown."""
    return not record.getMessage().startswith(NOISE)


def format_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """Format a warning like an error of a command; others keep their file and line."""
    if issubclass(category, UserWarning) and not {*PACKAGES}.isdisjoint(Path(filename).parts):
        return f"tf-lightning: warning: {' '.join(str(message).split())}\n"
    return default_format(message, category, filename, lineno, line)
