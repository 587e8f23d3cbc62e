"""Text to token ids: sentencepiece models and Hugging Face tokenizer files."""
