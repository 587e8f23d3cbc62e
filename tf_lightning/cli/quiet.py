"""Messages of Lightning and torchmetrics that are not shown, because a user cannot act on them."""

import logging
import warnings

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
)


def silence_warnings() -> None:
    """Silence messages of Lightning and torchmetrics that a user cannot act on."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(keep_message)
    for message in NEEDLESS_WARNINGS:
        warnings.filterwarnings("ignore", message)


def keep_message(record: logging.LogRecord) -> bool:
    """Return whether a message of Lightning is shown."""
    return not record.getMessage().startswith(NOISE)
