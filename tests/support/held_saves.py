"""Callbacks for sharded runs whose checkpoints are written slowly."""

import concurrent.futures
import errno
import os
import signal
import threading
from pathlib import Path

import lightning as L

from tf_lightning.sharded import ShardWriter
from tf_lightning.training.sharded_saves import ShardedStrategy


def names_in(trainer: L.Trainer) -> list[str]:
    """The names in the run's folder of checkpoints, with the target of last.ckpt."""
    folder = Path(trainer.default_root_dir) / "checkpoints"
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    names = [path.name for path in found if not path.name.startswith(".")]
    return [*names, os.readlink(folder / "last.ckpt")] if "last.ckpt" in names else names


class HoldSaves(L.Callback):
    """Holds the threads that write until the next step has ended, and looks at the folder then.

    Fails unless the checkpoint is not there yet, and the link and the one before are.
    """

    def setup(self, trainer, pl_module, stage):
        self.release, write = threading.Semaphore(0), ShardedStrategy.write

        def held(*arguments):
            assert self.release.acquire(timeout=60), "the training waits for the save"
            write(*arguments)

        ShardedStrategy.write = held
        trainer.strategy.test_write = write

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 3:
            assert names_in(trainer) == []
        elif trainer.global_step == 5:
            assert names_in(trainer) == ["last.ckpt", "step0000002.ckpt", "step0000002.ckpt"]
        if trainer.global_step in (3, 5, 6):  # the saves of steps 2, 4 and 6
            self.release.release()


class SignalInSave(HoldSaves):
    """Sends rank 1 SIGTERM while the checkpoint of step 2 is written, which takes a second more."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 3:
            assert names_in(trainer) == []
            threading.Timer(1, self.release.release, [9]).start()
            if trainer.global_rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)


class FailSaves(L.Callback):
    """Fills rank 1's disk at the checkpoint of step 4; that of step 2 is whole."""

    def setup(self, trainer, pl_module, stage):
        if trainer.global_rank == 1:
            write = ShardWriter.write_data

            def fail(writer, *arguments):
                if writer.folder.name != "step0000002.ckpt":
                    raise OSError(errno.ENOSPC, "No space left on device")
                return write(writer, *arguments)

            ShardWriter.write_data = fail

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 4:  # the thread is faster than the step
            assert concurrent.futures.wait([trainer.strategy.saves.last], 60).done
