"""A batch read back: the documents that were packed into it."""

import torch
from torch import Tensor

from tf_lightning.batch import Batch, Document
from tf_lightning.sizes import by_size


def unpack(batch: Batch, tokenizer) -> list[Document]:
    """The documents of a batch, row by row: the inverse of `pack`."""
    documents = []
    images = [image for part in by_size(batch.latents, batch.sizes) for image in part]
    for ids, document_ids, image_ids in zip(
        batch.input_ids, batch.document_ids, batch.image_ids, strict=True
    ):
        for number in range(int(document_ids.max()) + 1):
            mine = document_ids == number
            documents.append(_parts(ids[mine], image_ids[mine], images, tokenizer))
    return documents


def _parts(ids: Tensor, image_ids: Tensor, latents: list[Tensor], tokenizer) -> Document:
    """Text and images of one document, without the ids that pack added."""
    document: Document = []
    text: list[int] = []
    specials = {tokenizer.boi_id, tokenizer.eoi_id}
    last_image = -1
    for token, image in zip(ids[1:-1].tolist(), image_ids[1:-1].tolist(), strict=True):
        if image < 0 and token not in specials:
            text.append(token)
        elif 0 <= image < len(latents) and image != last_image:  # not the clean copies
            if text:
                document.append(torch.tensor(text))
            text, last_image = [], image
            document.append(latents[image])
    return document + ([torch.tensor(text)] if text else [])
