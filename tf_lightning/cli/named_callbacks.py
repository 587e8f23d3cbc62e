"""Callbacks with a key of their own in a configuration, as in `--evaluate.seed 3`.

This file imports nothing heavy, because the help screens read it.
"""

from typing import NamedTuple


class NamedCallback(NamedTuple):
    """A callback that a run has where its key is set.

    Attributes:
        class_path: path of the class.
        purpose: what it does, for the help screens.
        default: a run of Transfusion has it unless the key is null.
    """

    class_path: str
    purpose: str
    default: bool = False


# In the order in which they run: Throughput must not count the time of an evaluation.
NAMED = {
    "throughput": NamedCallback(
        "callbacks.throughput.Throughput", "tokens and FLOPs per second; a default", default=True
    ),
    "text_perplexity": NamedCallback(
        "callbacks.text_perplexity.TextPerplexity",
        "perplexity and bits per byte; a default",
        default=True,
    ),
    "gradient_norms": NamedCallback(
        "callbacks.gradient_norms.GradientNorms",
        "gradient norm of each loss; a default",
        default=True,
    ),
    "data_table": NamedCallback(
        "callbacks.data_table.DataTable", "table of the data's sources; a default", default=True
    ),
    "init_from": NamedCallback(
        "callbacks.init_from.InitFrom", "starts from a checkpoint or a language model"
    ),
    "evaluate": NamedCallback(
        "callbacks.evaluate.Evaluate", "generates images and captions, and scores them"
    ),
    "shapes_report": NamedCallback(
        "callbacks.shapes_report.ShapesReport", "the quickstart's report.json and sheet.png"
    ),
    "retrieval_accuracy": NamedCallback(
        "callbacks.retrieval.RetrievalAccuracy", "tests if captions reproduce training images"
    ),
    "unigram_baseline": NamedCallback(
        "callbacks.unigram.UnigramBaseline", "logs a unigram perplexity as a baseline"
    ),
    "prediction_writer": NamedCallback(
        "callbacks.predictions.PredictionWriter", "writes the outputs of predict"
    ),
    "reconstruct": NamedCallback(
        "callbacks.reconstruct.Reconstruct", "scores an autoencoder's reconstructions"
    ),
    "save_autoencoder": NamedCallback(
        "callbacks.save_autoencoder.SaveAutoencoder", "writes an autoencoder for diffusers"
    ),
}
