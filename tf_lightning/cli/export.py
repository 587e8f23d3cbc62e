"""`tf-lightning export`: write a checkpoint's weights. `model-config`: a language model's sizes."""

from dataclasses import asdict

import yaml

from tf_lightning.checkpoint import read_checkpoint
from tf_lightning.cli.parser import Parser, path_type
from tf_lightning.errors import UserError
from tf_lightning.folders import check_writable
from tf_lightning.interop.export import export, is_export
from tf_lightning.interop.llama import open_language_model

EXPORT = """\
writes
  FOLDER/net.safetensors, net.json   the whole network, for `tf-lightning generate FOLDER`
  FOLDER/text                        its text side as a language model, for
    transformers.AutoModelForCausalLM.from_pretrained("FOLDER/text")

The text side is written as a Llama, or as a Qwen3 with qk_norm: true, Qwen2 with attention_bias,
OLMo 2, SmolLM3 or Mistral. It leaves out the patch coder, the weights for image patches, and the
embeddings of <boi> and <eoi>. A model that none of these families can express is refused; then
--only net writes the network alone.
"""
MODEL_CONFIG = """\
To start from a Llama, Mistral, Qwen2, Qwen3, OLMo 2, SmolLM3 or Phi-3:
  tf-lightning model-config FOLDER > model.yaml
  tf-lightning fit -c CONFIG --model model.yaml --data.tokenizer FOLDER \\
    --init_from.checkpoint FOLDER

FOLDER contains config.json, safetensors files and a tokenizer, or is a name on the Hugging Face
hub.
"""


def run_export(args: list[str]) -> None:
    """Write a checkpoint's weights, and print how to use them."""
    parser = Parser("export", "Write the weights of a checkpoint for other programs.", EXPORT)
    add = parser.add_argument
    about = "checkpoint of `tf-lightning fit`, or the folder of its run"
    add("checkpoint", type=path_type, metavar="CKPT", help=about)
    add(
        "-o",
        "--out",
        type=path_type,
        required=True,
        metavar="FOLDER",
        help="folder to write; an earlier export in it is replaced",
    )
    add(
        "--weights",
        choices=("ema", "raw"),
        help="weights to write (default: the EMA weights, if there are any)",
    )
    add("--only", choices=("net", "text"), help="write one of the two (default: both)")
    options = parser.parse_args(args)
    if is_export(options.checkpoint):
        raise UserError(f"{options.checkpoint} is an export already; give a checkpoint")
    check_writable(options.out)
    checkpoint = read_checkpoint(options.checkpoint)
    parts = {options.only} if options.only else {"net", "text"}
    weights = export(checkpoint, options.out, options.weights, parts)
    print(f"Wrote the {weights} weights of step {checkpoint['global_step']:,} to {options.out}.")
    if "net" in parts:
        print(f'The network: tf-lightning generate {options.out} "..."')
    if "text" in parts:
        print(
            f'The text: transformers.AutoModelForCausalLM.from_pretrained("{options.out}/text"), '
            "or a run that starts from it: see `tf-lightning model-config --help`"
        )


def run_model_config(args: list[str]) -> None:
    """Print the `transformer:` section for a model that starts from a language model."""
    about = "Print the sizes of a language model as a file for --model."
    parser = Parser("model-config", about, MODEL_CONFIG)
    parser.add_argument("folder", metavar="FOLDER", help="language model: folder or hub name")
    model = open_language_model(parser.parse_args(args).folder)
    training_options = {"dropout", "modality_weights"}  # the choice of the recipe
    sizes = asdict(model.extended_config)
    shown = {name: value for name, value in sizes.items() if name not in training_options}
    print(f"# Sizes of {model.folder} with <boi> and <eoi>, for fit --model THIS_FILE")
    if model.window:
        print(f"# It attends to {model.window} tokens: data.row_length must not be larger.")
    print(yaml.safe_dump({"transformer": shown}, sort_keys=False), end="")
