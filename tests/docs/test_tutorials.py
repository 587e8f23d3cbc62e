"""The tutorials' commands and programs run, in miniature."""

import runpy
import subprocess
import sys

import pytest
import yaml

from support.markdown import ROOT, blocks, shell_lines
from support.runs import shapes
from tf_lightning.cli.main import main

TUTORIALS = ROOT / "docs" / "tutorials"
FEW = {"guidance_scale": 2.0, "num_inference_steps": 2, "max_new_tokens": 8}
NOT_RUN = ("source", "tensorboard")  # an interactive shell's, and a server
SHAPES = {
    "trainer": {
        "accelerator": "cpu",
        "precision": "32-true",
        "max_steps": 2,
        "val_check_interval": 2,
        "enable_progress_bar": False,
    },
    "model": {"transformer": {"dim": 32, "num_layers": 1, "num_heads": 2, "ffn_dim": 48}},
    "data": {"init_args": {"row_length": 128, "batch_size": 2}},
}
