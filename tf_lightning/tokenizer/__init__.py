"""Tokenizers between text and ids: sentencepiece, and language models' tokenizer.json."""
