"""`tf-lightning export`: weights out of a checkpoint; `sizes`: a language model's as a config."""

from dataclasses import asdict
from pathlib import Path

import yaml

from tf_lightning.checkpoint import read_checkpoint
from tf_lightning.cli.parser import Parser
from tf_lightning.interop.export import export
from tf_lightning.interop.llama import open_language_model
from tf_lightning.model.transformer import TransformerConfig

EXPORT = """\
Writes FOLDER/net.safetensors and net.json: the whole network, which `tf-lightning generate FOLDER`
takes; and FOLDER/text: its text side as a Llama, for
  transformers.AutoModelForCausalLM.from_pretrained("FOLDER/text")
without the patch coder, image weights and the rows of <boi> and <eoi>. An option that a Llama lacks
(QK-norm) is refused; --only net leaves the text side out.
"""
SIZES = """\
To start from a Llama, Mistral or Qwen2:
  tf-lightning sizes FOLDER > model.yaml
  tf-lightning fit -c CONFIG --model model.yaml --data.init_args.tokenizer FOLDER \\
    --trainer.callbacks+=callbacks.init_from.InitFrom --trainer.callbacks.checkpoint=FOLDER
FOLDER holds config.json, safetensors and tokenizer, or is a name on the Hugging Face hub.
"""


def run_export(args: list[str]) -> None:
    """Parse, read, write, and say what comes next."""
    parser = Parser("export", "Take the weights out of a checkpoint.", EXPORT)
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="a file that `tf-lightning fit` wrote")
    add("-o", "--out", type=Path, required=True, metavar="FOLDER", help="is made, or replaced")
    add("--weights", choices=("ema", "raw"), help="(default: the average, if there is one)")
    add("--only", choices=("net", "text"), help="one of the two (default: both)")
    options = parser.parse_args(args)
    checkpoint = read_checkpoint(options.checkpoint)
    parts = {options.only} if options.only else {"net", "text"}
    weights = export(checkpoint, options.out, options.weights, parts)
    print(f"Wrote the {weights} weights of step {checkpoint['global_step']:,} to {options.out}.")
    if "net" in parts:
        print(f'The network: tf-lightning generate {options.out} "..."')
    if "text" in parts:
        print(
            f'The text: transformers.AutoModelForCausalLM.from_pretrained("{options.out}/text"), '
            "or a run that starts from it: see `tf-lightning sizes --help`"
        )


def run_sizes(args: list[str]) -> None:
    """Print the `transformer:` of a network that starts from a language model."""
    parser = Parser("sizes", "Print a language model's sizes as a --model file.", SIZES)
    parser.add_argument("folder", metavar="FOLDER", help="of the language model, or its hub name")
    model = open_language_model(parser.parse_args(args).folder)
    plain, sizes = asdict(TransformerConfig()), asdict(model.extended_config)
    told = {name: value for name, value in sizes.items() if value != plain[name]}
    told |= {name: sizes[name] for name in ("vocab_size", "dim", "num_layers", "num_heads")}
    told |= {name: sizes[name] for name in ("num_kv_heads", "ffn_dim", "rope_theta", "norm_eps")}
    print(f"# The sizes of {model.folder} with <boi> and <eoi>: fit --model THIS_FILE")
    if model.window:
        print(f"# It attends to {model.window} tokens: data.row_length must not be larger.")
    print(yaml.safe_dump({"transformer": {"qk_norm": False, **told}}, sort_keys=False), end="")
