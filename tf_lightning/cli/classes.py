"""The classes that a configuration names, each with its line of help.

A test compares the lists with the code.
"""

from tf_lightning.cli.named_callbacks import NAMED

MODELS = {
    "tf_lightning.Transfusion": "text and images in one Transformer; the default",
    "tf_lightning.training.autoencoder.AutoencoderModule": "trains an autoencoder for images",
}
DATA = {
    "tf_lightning.data.Mixture": "several sources with shares; the default",
    "tf_lightning.data.TextData": "text files",
    "tf_lightning.data.ImageCaptionData": "captioned images",
    "tf_lightning.data.InterleavedData": "documents of text and images in any order",
    "tf_lightning.data.EditData": "image edits: image, instruction, image",
    "tf_lightning.data.ImageData": "images alone, for an autoencoder",
}
SOURCES = {
    "tf_lightning.data.TextFiles": "text: .txt, .jsonl, .json, .parquet",
    "tf_lightning.data.CaptionTars": "captioned images in WebDataset tars",
    "tf_lightning.data.CaptionRows": "captioned images in .jsonl, .csv, .parquet",
    "tf_lightning.data.CaptionJson": "captioned images in COCO's, Karpathy's or LLaVA's JSON",
    "tf_lightning.data.CaptionFolders": "images with a text file beside each",
    "tf_lightning.data.NamedImages": "images with their file or folder names as captions",
    "tf_lightning.data.ClassFolders": "images in one folder a class",
    "tf_lightning.data.ImageFiles": "images alone",
    "tf_lightning.data.InterleavedFiles": "interleaved documents",
    "tf_lightning.data.EditFiles": "image edits",
    "tf_lightning.data.ChatFiles": "conversations",
    "tf_lightning.shapes.sources.ShapesCaptions": "the shapes world's captioned images",
    "tf_lightning.shapes.sources.ShapesTexts": "the shapes world's texts",
    "tf_lightning.shapes.sources.ShapesEdits": "the shapes world's image edits",
}
CALLBACKS = {named.class_path: named.purpose for named in NAMED.values()}
GROUPS = {
    "Models (--model.class_path)": MODELS,
    "Data modules (--data.class_path)": DATA,
    "Sources of a Mixture (data.sources) and of ImageData (data.source)": SOURCES,
    "Callbacks, each with a key, as in --evaluate.seed 3; null leaves one out": CALLBACKS,
}
