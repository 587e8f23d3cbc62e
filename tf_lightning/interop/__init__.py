"""Weights in and out: Llama-family checkpoints, exported folders, the Hugging Face hub."""
