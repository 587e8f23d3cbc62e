"""Files and folders that appear whole or not at all."""

import errno
import os
import platform
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from tf_lightning.errors import UserError

FULL = 2**20  # a disk with fewer free bytes counts as full
MACHINE = f"{zlib.crc32(platform.node().encode()):08x}"
# The name of an unfinished file ("partial"), or of a folder that is being replaced ("old").
UNFINISHED = re.compile(rf"\.(?P<name>.+)\.{MACHINE}-(?P<process>\d+)\.(?P<kind>partial|old)")


@contextmanager
def report_full_disk(folder: Path) -> Iterator[None]:
    """Raise UserError if a block that writes into a folder fails because its disk is full."""
    try:
        yield
    except Exception as error:
        # numpy, torch and safetensors raise errors of their own, without errno.
        number = getattr(error, "errno", None)
        is_full = number is None and shutil.disk_usage(folder).free < FULL
        if isinstance(error, UserError) or not (is_full or number in (errno.ENOSPC, errno.EDQUOT)):
            raise
        raise UserError(
            f"no space left on the disk of {folder}; free some, or name a folder on another disk"
        ) from error


def partial_path(path: Path, kind: str = "partial") -> Path:
    """Return a temporary name beside `path` for this process.

    Unfinished files of killed processes in the folder are removed first, once in each process.
    """
    clear_folder(path.parent.absolute())
    return path.with_name(f".{path.name}.{MACHINE}-{os.getpid()}.{kind}")


@cache
def clear_folder(folder: Path) -> None:
    """Remove the unfinished files that killed processes of this machine left in a folder.

    A folder that was about to be replaced gets its name back. Files of other machines that share
    the disk stay, because their processes may be running.
    """
    with suppress(OSError):  # the folder does not exist, or may not be changed
        for path in [*folder.iterdir()]:
            found = UNFINISHED.fullmatch(path.name)
            if not found or is_running(int(found["process"])):
                continue
            target = path.with_name(found["name"])
            if found["kind"] == "old" and not target.exists():
                os.rename(path, target)
            else:
                remove(path)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if is_folder(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


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


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, which replaces `path` when the block succeeds.

    A block that raises leaves an older file at `path` as it was, and removes the temporary one.
    """
    partial = partial_path(path)
    try:
        with report_full_disk(path.parent):
            yield partial
            replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def partial_folder(path: Path) -> Path:
    """Make a new empty folder beside `path`, with the name that `partial_path` gives."""
    partial = partial_path(path)
    shutil.rmtree(partial, ignore_errors=True)  # of an earlier process with the same number
    partial.mkdir()
    return partial


def publish_folder(folder: Path, path: Path) -> None:
    """Move a finished folder to `path`, unless another process has put its own there first.

    For processes, also on several nodes, that may make the same folder at the same time.
    """
    if not path.is_dir():
        os.rename(folder, path)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new empty folder, which replaces the folder `path` when the block succeeds.

    A block that raises leaves an older folder at `path` as it was, and removes the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_folder(path)
    try:
        with report_full_disk(path.parent):
            yield partial
            replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace(partial: Path, path: Path) -> None:
    """Give a finished file or folder its name, in place of the file or folder that has it.

    A folder has to be moved away first. If the process is killed then, `clear_folder` gives the
    older one its name back.
    """
    old = None
    if os.path.lexists(path) and (is_folder(path) or is_folder(partial)):
        old = partial_path(path, "old")
        os.rename(path, old)
    os.replace(partial, path)
    if old:
        remove(old)


def is_folder(path: Path) -> bool:
    """Return whether a path is a folder and not a link to one."""
    return path.is_dir() and not path.is_symlink()
