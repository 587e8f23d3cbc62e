"""The help of `tf-lightning` and of fit, validate, test and predict.

LightningCLI's own help lists 400 lines of options and imports torch first. The screens here name
the recipes and classes instead. They are plain text, and a test compares them with the code.
"""

import importlib
from difflib import get_close_matches

from tf_lightning.cli.classes import CALLBACKS, DATA, GROUPS, MODELS, SOURCES
from tf_lightning.cli.named_callbacks import NAMED
from tf_lightning.cli.parser import stop

OVERVIEW = """\
tf-lightning: one Transformer that writes text and generates images (Transfusion).

usage: tf-lightning COMMAND ...

  tf-lightning fit -c configs/quickstart.yaml             train; add --ckpt_path last to resume
  tf-lightning validate -c CONFIG --ckpt_path CKPT        evaluate a checkpoint
  tf-lightning test -c CONFIG --ckpt_path CKPT            the same, with results in test/
  tf-lightning predict -c CONFIG --ckpt_path CKPT         write captions of held-out images to files

  tf-lightning generate CKPT "a red circle" -o out        generate images from text
  tf-lightning generate CKPT --image in.png               describe an image

  tf-lightning prepare -c CONFIG                          prepare the data before training
  tf-lightning prepare -c CONFIG --data.encoded DIR       the same over GPUs and nodes
  tf-lightning inspect -c CONFIG                          show statistics and examples of the data

  tf-lightning plan -c CONFIG --gpus 64                   memory, FLOPs and days before a run

  tf-lightning export CKPT -o FOLDER                      write the weights for other programs
  tf-lightning model-config FOLDER                        write a language model's sizes as YAML

CONFIG is the YAML file of a run, such as configs/quickstart.yaml. The command line changes any
value in it, as in --trainer.max_steps 100. CKPT is a checkpoint, such as
runs/quickstart/checkpoints/last.ckpt, or the folder of its run, such as runs/quickstart.
`tf-lightning COMMAND --help` explains one command."""

FIT = """\
usage: tf-lightning fit -c CONFIG [-c MORE] [--KEY VALUE ...]

Train a model. Its folder runs/NAME receives config.yaml, checkpoints, TensorBoard's events and the
samples and scores of each validation. MORE is a file that changes values of CONFIG.

  tf-lightning fit -c configs/quickstart.yaml                    train
  tf-lightning fit -c configs/quickstart.yaml --model.lr 1e-3    change a value
  tf-lightning fit -c configs/quickstart.yaml --trainer.logger.name second    write to runs/second
  tf-lightning fit -c configs/quickstart.yaml --ckpt_path last   resume the last checkpoint, if any
  tf-lightning fit -c configs/quickstart.yaml --overwrite        replace the run that is there
"""
EVALUATE = """\
usage: tf-lightning {verb} -c CONFIG [-c MORE] --ckpt_path CKPT [--KEY VALUE ...]

{purpose}

  tf-lightning {verb} -c configs/quickstart.yaml --ckpt_path runs/quickstart/checkpoints/last.ckpt
  tf-lightning {verb} -c configs/quickstart.yaml --ckpt_path last    last checkpoint of its run
  tf-lightning {verb} -c CONFIG --ckpt_path CKPT {more}

CKPT is a checkpoint, the folder of a run, or a folder of `export`. It gives the sizes of the model.
MORE is a file that changes values of CONFIG.
"""
MORE_OF_EVALUATION = "-c configs/eval/karpathy.yaml    another protocol"
MORE_OF_PREDICT = "--prediction_writer.output_modality image"
PURPOSES = {
    "validate": """\
Evaluate a checkpoint on the validation documents. A table is printed; scores and samples are
written into {verb}/ of the folder of the configuration's logger, a second time into {verb}-2/.""",
    "test": "Evaluate a checkpoint as `validate` does, with results in test/.",
    "predict": """\
Write a caption for each image of the validation documents, or an image for each caption with
--prediction_writer.output_modality image, into predict/ of the folder of the configuration's
logger. `prediction_writer: {{}}` turns this on. An interrupted command continues where it stopped;
another checkpoint, or other options, write into predict-2/.""",
}
KEYS = """\
Keys of a configuration:
  trainer          Lightning's Trainer: max_steps, val_check_interval (in steps), devices,
                   precision, strategy, logger.name (the folder's name), callbacks (a list of
                   callbacks of your own)
  model, data      arguments of Transfusion and Mixture; class_path and init_args name another class
  checkpoint       when to save: every_n_train_steps, save_top_k
  seed_everything  seed of the weights, the order of the data and the noise (default: 0)
  ckpt_path        checkpoint to resume or to evaluate
  progress_bar, learning_rate_monitor    callbacks of every run
"""
RECIPES = {
    "quickstart.yaml": "the shapes world: no download, no GPU, 15 minutes",
    "my_pictures.yaml": "your own captioned images: --data.paths FOLDER",
    "emoji.yaml": "emoji of the system's font: captions and edits",
    "mixture.yaml": "three kinds of data in one model",
    "wikitext.yaml": "a language model on plain text",
    "shapes_text.yaml": "a language model on the quickstart's texts",
    "edit.yaml": "image editing, from a trained model",
    "monoformer.yaml": "MonoFormer on ImageNet, from TinyLlama",
    "monoformer_chat.yaml": "MonoFormer on captions and chats, from TinyLlama",
    "autoencoder/": "autoencoders: my_pictures, shapes, shapes_vq, emoji, vae, vq",
    "experiments/": "each file changes one thing; give it after quickstart.yaml",
    "paper/": "the paper's runs: -c configs/paper/transfusion.yaml -c configs/paper/7b.yaml",
    "model/": "the paper's sizes: --model configs/model/7b.yaml",
    "eval/": "evaluation protocols, for validate: COCO, Karpathy, ImageNet, GenEval",
}
MORE = """\
More:
  tf-lightning {verb} --help NAME                options of trainer, checkpoint, or a class above
  tf-lightning {verb} --help all                 every option, as LightningCLI prints it
  tf-lightning {verb} -c CONFIG --print_config   every value of a run, without running it"""

# Name on the help screen: class and prefix of its options.
TOPICS = {
    "trainer": ("lightning.pytorch.Trainer", "trainer"),
    "checkpoint": ("lightning.pytorch.callbacks.ModelCheckpoint", "checkpoint"),
    "model": ("tf_lightning.Transfusion", "model"),
    "data": ("tf_lightning.data.Mixture", "data"),
    **{path.rpartition(".")[2]: (path, "model") for path in MODELS},
    **{path.rpartition(".")[2]: (path, "data") for path in DATA},
    **{path.rpartition(".")[2]: (path, None) for path in SOURCES},
    **{
        named.class_path.rpartition(".")[2]: (named.class_path, key) for key, named in NAMED.items()
    },
    **{key: (named.class_path, key) for key, named in NAMED.items()},
}


def print_verb_help(args: list[str]) -> None:
    """Print the help of a verb, or of the topic after `--help`, and exit.

    Args:
        args: verb and arguments, among them -h or --help.
    """
    verb, position = args[0], min(args.index(flag) for flag in ("-h", "--help") if flag in args)
    topic = next(iter(args[position + 1 :]), "")
    if topic == "all":
        from tf_lightning.cli.lightning import run_lightning  # imports torch

        run_lightning([verb, "--help"])
    elif topic in TOPICS:
        print_options(verb, topic)
    elif topic and not topic.startswith("-"):
        nearest = get_close_matches(topic, TOPICS, n=1)
        advice = f"did you mean {nearest[0]!r}?" if nearest else f"see `tf-lightning {verb} --help`"
        stop(f"there is no help about {topic!r}; {advice}", code=2)
    else:
        print(verb_help(verb))
    raise SystemExit(0)


def verb_help(verb: str) -> str:
    """Return the help screen of fit, validate, test or predict."""
    purpose = PURPOSES.get(verb, "").format(verb=verb)
    more = MORE_OF_PREDICT if verb == "predict" else MORE_OF_EVALUATION
    head = FIT if verb == "fit" else EVALUATE.format(verb=verb, purpose=purpose, more=more)
    lines = [head, KEYS, "Recipes (configs/):", *_aligned(RECIPES)]
    for title, classes in GROUPS.items():
        module = _shared_module(classes)
        where = f", in {module}" if module else ""
        names = {path.removeprefix(f"{module}."): line for path, line in classes.items()}
        if classes is CALLBACKS:
            names = {key: named.purpose for key, named in NAMED.items()}
        lines += ["", f"{title}{where}:", *_aligned(names)]
    return "\n".join([*lines, "", MORE.format(verb=verb)])


def _aligned(rows: dict[str, str]) -> list[str]:
    width = max(map(len, rows))
    return [f"  {name:{width}}  {line}" for name, line in rows.items()]


def _shared_module(paths: dict[str, str]) -> str:
    modules = {path.rpartition(".")[0] for path in paths}
    return modules.pop() if len(modules) == 1 else ""


def print_options(verb: str, topic: str) -> None:
    """Print the arguments of one class with their help."""
    from jsonargparse import ArgumentParser  # takes a while, and the class imports torch

    path, prefix = TOPICS[topic]
    module, _, name = path.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    usage = f"tf-lightning {verb} -c CONFIG [--KEY VALUE ...]"
    parser = ArgumentParser(usage=usage, description=f"Arguments of {path}.", add_help=False)
    parser.add_class_arguments(cls, prefix, fail_untyped=False)
    parser.print_help()
