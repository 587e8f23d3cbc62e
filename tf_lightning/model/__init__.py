"""The network: a Llama-style Transformer shared by text and image patches."""
