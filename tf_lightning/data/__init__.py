"""Corpora, and the packed rows made of them."""

from tf_lightning.data.caption_json import CaptionJson
from tf_lightning.data.caption_rows import CaptionRows
from tf_lightning.data.chat import ChatFiles
from tf_lightning.data.class_folders import ClassFolders
from tf_lightning.data.corpus import Corpus, Skipped, Source
from tf_lightning.data.edits import EditData, EditFiles
from tf_lightning.data.image_caption import CaptionTars, ImageCaptionData
from tf_lightning.data.image_folder import ImageFiles
from tf_lightning.data.interleaved import InterleavedData, InterleavedFiles
from tf_lightning.data.mixture import Mixture
from tf_lightning.data.pictures import PictureData
from tf_lightning.data.prepare import prepare
from tf_lightning.data.text import TextData, TextFiles

__all__ = [
    "CaptionJson",
    "CaptionRows",
    "CaptionTars",
    "ChatFiles",
    "ClassFolders",
    "Corpus",
    "EditData",
    "EditFiles",
    "ImageCaptionData",
    "ImageFiles",
    "InterleavedData",
    "InterleavedFiles",
    "Mixture",
    "PictureData",
    "Skipped",
    "Source",
    "TextData",
    "TextFiles",
    "prepare",
]
