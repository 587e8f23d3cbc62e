"""Transfusion: one Transformer that predicts the next text token and denoises images.

`from tf_lightning.generation.pipeline import load` is the way in from Python; `tf-lightning --help` from a shell.
"""
