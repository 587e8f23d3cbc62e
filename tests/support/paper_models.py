"""Transformer sizes of the Transfusion paper, from configs/model."""

from dataclasses import replace
from pathlib import Path

import yaml

from tf_lightning.model.transformer import TransformerConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "model"

PAPER_SIZES = {  # millions of parameters with 32,000 entries in the vocabulary
    "0.16b": 162.4,
    "0.37b": 373.9,
    "0.76b": 777.9,
    "1.4b": 1364.3,
    "7b": 6738.4,
}


def paper_config(name: str) -> TransformerConfig:
    """The Transformer of configs/model/NAME.yaml, with Llama 2's vocabulary."""
    settings = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    return replace(TransformerConfig(**settings["transformer"]), vocab_size=32_000)
