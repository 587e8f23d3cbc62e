"""Sources and commands for tests of `tf-lightning prepare`, in one process or several."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from PIL import Image

from support import runs
from tf_lightning.cli.main import main
from tf_lightning.data.readers.files import FileSource

ROOT = Path(__file__).resolve().parents[2]


class CaptionedRed(FileSource):
    """A captioned image for each text file. A file with the text "kill" kills its reader."""

    def samples(self, file):
        yield "", file

    def document(self, sample):
        if sample.read_text() == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return [sample.read_text(), Image.new("RGB", (8, 8), "red")]


def encodable(config: dict) -> None:
    """Change a configuration to captioned noise in shards of 4 and the "shapes" autoencoder."""
    config["model"] |= {"patch_size": 2, "latent_channels": 8}
    config["trainer"]["callbacks"] = config["trainer"]["callbacks"][:1]
    config["trainer"]["limit_val_batches"] = 0
    config["data"]["init_args"] |= {
        "sources": {"noise": {"class_path": "support.sources.ShardedNoise"}},
        "autoencoder": "shapes",
        "patch_size": 2,
        "row_length": 64,
    }


def encode(folder: Path, *more: str) -> Path:
    """Encode in this process; return the folder of the corpora."""
    folder.mkdir(exist_ok=True)
    main(command(folder, *more))
    return folder / "data" / "encoded"


def command(folder: Path, *more: str) -> list[str]:
    """Write the configuration; return the arguments of `tf-lightning`."""
    config = str(runs.write_config(folder, encodable))
    return ["prepare", "-c", config, f"--data.encoded={folder / 'data' / 'encoded'}", *more]


def encode_apart(folder: Path, *more: str) -> subprocess.CompletedProcess:
    """Encode in another process, which may start further ranks."""
    folder.mkdir(exist_ok=True)
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **paths}
    run = [sys.executable, "-m", "tf_lightning", *command(folder, *more)]
    return subprocess.run(run, env=environment, capture_output=True, text=True, timeout=300)


def content(folder: Path) -> dict[str, bytes]:
    """Read all files of a folder, by relative path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
