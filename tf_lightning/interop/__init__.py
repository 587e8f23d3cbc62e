"""Weights in and out: language models of the Llama family, and exported checkpoints."""
