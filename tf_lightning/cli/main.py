"""The command line: LightningCLI's fit, validate, test and predict, and the verbs beside them."""

import sys

from tf_lightning.cli.parser import stop
from tf_lightning.errors import UserError

HELP = """\
tf-lightning: one Transformer that writes text and draws images (Transfusion).

  tf-lightning prepare  -c CONFIG                             corpora ahead of `fit`, in parallel
  tf-lightning prepare  -c CONFIG --data.encoded DIR          a latent cache, by GPUs and nodes
  tf-lightning inspect  -c CONFIG                             what they hold, counted and drawn
  tf-lightning fit      -c configs/quickstart.yaml            train; add --ckpt_path last to resume
  tf-lightning fit      -c configs/autoencoder/emoji.yaml     train an autoencoder (vae, vq, shapes)
  tf-lightning validate -c CONFIG --ckpt_path CKPT            evaluate a checkpoint
  tf-lightning test     -c CONFIG --ckpt_path CKPT            the same, once, at the end
  tf-lightning predict  -c CONFIG --ckpt_path CKPT            captions for held-out pictures
  tf-lightning generate CKPT "a red circle" -o out            a picture from words
  tf-lightning generate CKPT --image in.png                   words from a picture
  tf-lightning export   CKPT -o FOLDER                        weights, and the text as a Llama
  tf-lightning sizes    FOLDER                                a language model's, as a --model file

CONFIG is the YAML file the run was trained with. Any value in it can be changed on the command
line, as in --trainer.max_steps 100. `tf-lightning VERB --help` lists what VERB takes;
add --print_config to see a run's whole configuration without running it.
"""


def main(args: list[str] | None = None) -> None:
    """Run one command; a user's mistake ends in one sentence and exit code 1 or 2."""
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help"):
        print(HELP)
        return
    try:
        if args[0] == "generate":
            from tf_lightning.cli.generate import run_generate

            run_generate(args[1:])
        elif args[0] == "prepare":
            from tf_lightning.cli.prepare import run_prepare

            run_prepare(args[1:])
        elif args[0] == "inspect":
            from tf_lightning.cli.inspect import run_inspect

            run_inspect(args[1:])
        elif args[0] in ("export", "sizes"):
            from tf_lightning.cli import export as export_command

            getattr(export_command, f"run_{args[0]}")(args[1:])
        else:
            from tf_lightning.cli.lightning import run_lightning

            run_lightning(args)
    except UserError as error:
        stop(str(error), code=1)
    except OSError as error:  # a folder that cannot be written, a full disk
        if not error.filename:
            raise
        stop(f"{error.filename}: {error.strerror}", code=1)
    except KeyboardInterrupt:
        stop("interrupted", code=130)
