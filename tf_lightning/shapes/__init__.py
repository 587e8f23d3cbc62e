"""The shapes world: scenes, captions, an oracle and a small CLIP."""
