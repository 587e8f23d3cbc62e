"""Noise processes, timesteps, guidance and samplers: pure mathematics, no network."""
