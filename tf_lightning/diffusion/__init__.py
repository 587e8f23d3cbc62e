"""Diffusion processes, noise levels, guidance and samplers: mathematics without a network."""
