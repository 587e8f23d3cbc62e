"""The network: a Llama-style Transformer for text and image patches, and the patch coders."""
