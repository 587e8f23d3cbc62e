"""The embedded world of coloured shapes: scenes, captions, an oracle and a small CLIP."""
