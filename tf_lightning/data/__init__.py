"""Sources of documents, prepared corpora, and the data modules that serve their packed rows."""

from tf_lightning.data.corpus.prepare import prepare
from tf_lightning.data.corpus.reader import Corpus
from tf_lightning.data.datasets import TrainingBatches, TrainingRows
from tf_lightning.data.documents import Skipped, Source
from tf_lightning.data.image_only import ImageData
from tf_lightning.data.mixture import Mixture
from tf_lightning.data.modules import EditData, ImageCaptionData, InterleavedData, TextData
from tf_lightning.data.readers.captions import (
    CaptionFolders,
    CaptionJson,
    CaptionRows,
    CaptionTars,
    ImageFiles,
)
from tf_lightning.data.readers.chat import ChatFiles
from tf_lightning.data.readers.edits import EditFiles
from tf_lightning.data.readers.folders import ClassFolders
from tf_lightning.data.readers.interleaved import InterleavedFiles
from tf_lightning.data.readers.name_captions import NamedImages
from tf_lightning.data.readers.text import TextFiles

__all__ = [
    "CaptionFolders",
    "CaptionJson",
    "CaptionRows",
    "CaptionTars",
    "ChatFiles",
    "ClassFolders",
    "Corpus",
    "EditData",
    "EditFiles",
    "ImageCaptionData",
    "ImageData",
    "ImageFiles",
    "InterleavedData",
    "InterleavedFiles",
    "Mixture",
    "NamedImages",
    "Skipped",
    "Source",
    "TextData",
    "TextFiles",
    "TrainingBatches",
    "TrainingRows",
    "prepare",
]
