"""Autoencoders between images and latents or codes: frozen ones, and one to train."""
