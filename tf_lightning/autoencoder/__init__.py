"""Images to latents or codes and back: pretrained autoencoders and one to train."""
