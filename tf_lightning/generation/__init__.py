"""Text and images from a trained model: the pipeline and the engine below it."""
