"""`tf-lightning encode`: a latent cache, made by a Trainer over any number of ranks and nodes."""

import lightning as L

from tf_lightning.data.encode import EncodeData, Encoder
from tf_lightning.data.mixture import Mixture
from tf_lightning.errors import UserError
from tf_lightning.lightning_cli import build

HELP = """\
usage: tf-lightning encode -c CONFIG [--data.encoded DIR]

Tokenises texts and encodes pictures over the trainer's ranks and nodes, once, into DIR (default:
encoded/ in the data's cache_dir): of each training picture, and of its mirror image with
--data.mirror true and of its ends with --data.crops 3, mean and standard deviation of its
posterior in fp16. Then
  tf-lightning fit -c CONFIG --data.encoded DIR
trains on it without the pictures' files, on the mode or with --data.sample_posterior true on
samples; it refuses an autoencoder, picture size, mirror, crops or patches that are not those of
DIR.

  --trainer.devices 8 --trainer.num_nodes 4   ranks; each encodes shards (64 MB of files) of its own
  --data.num_workers 8                        processes of each rank that read pictures

DIR is on a disk that all ranks share. What was killed goes on where it stopped; finished shards are
kept. Callbacks that show held-out pictures still read these from their files. Any other value of
the configuration can be changed behind the command:
"""


def run_encode(args: list[str]) -> None:
    """Encode a configuration's corpora."""
    if {"-h", "--help"} & set(args):
        print(HELP)
    cli = build(args, run=False, prog="encode")
    data, given = cli.datamodule, cli.config.trainer
    check(data)
    data.encoded, folder = None, data.encoded or data.cache_dir / "encoded"
    # Of the run's own trainer only the ranks: its callbacks and strategy are for training.
    ranks = {name: given[name] for name in ("accelerator", "devices", "num_nodes")}
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    trainer = L.Trainer(**ranks, **off, enable_model_summary=False)
    work = EncodeData(data, folder)
    with Encoder() as encoder:
        trainer.predict(encoder, datamodule=work, return_predictions=False)
    if not trainer.is_global_zero:
        return
    work.finish()
    data.encoded = folder
    data.prepare_data()  # opens it as training will, and plans its rows
    print(f"The corpora are in {folder}; train on them with `tf-lightning fit -c CONFIG", end=" ")
    print(f"--data.encoded {folder}`.")


def check(data: L.LightningDataModule) -> None:
    """Refuse what has no pictures to encode."""
    if not isinstance(data, Mixture):
        raise UserError(
            f"{type(data).__name__} is not for a Transfusion; encode the configuration of one"
        )
    if data.autoencoder_name in (None, "pixels"):
        raise UserError(
            f"autoencoder={data.autoencoder_name!r} has nothing to encode; give another "
            "--data.autoencoder, or use `tf-lightning prepare`"
        )
