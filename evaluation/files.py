"""Files that are written completely or not at all."""

import os
import platform
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# The same names as those of `tf_lightning.files`, which this package does not import.
MACHINE = f"{zlib.crc32(platform.node().encode()):08x}"


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; it replaces `path` when the block succeeds.

    If the block raises, the temporary file is removed and `path` stays as it was. Temporary files
    that killed processes of this machine left for `path` are removed first.
    """
    clear(path)
    # GenEval's script reads files whose names begin with a digit, so it ignores this one.
    partial = path.with_name(f".{path.name}.{MACHINE}-{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def clear(path: Path) -> None:
    """Remove temporary files for `path` whose processes no longer run on this machine."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.{MACHINE}-(\d+)\.partial")
    with suppress(OSError):  # the folder may not be changed
        for file in path.parent.iterdir():
            if (found := pattern.fullmatch(file.name)) and not is_running(int(found[1])):
                file.unlink(missing_ok=True)


def is_running(process: int) -> bool:
    """Return whether a process of this machine is running; on Windows always True."""
    if os.name == "nt":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True
