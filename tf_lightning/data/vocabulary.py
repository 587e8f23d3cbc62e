"""The tokenizer of some sources: a file, or one trained on their text, once."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tf_lightning.data.corpus import Skipped, Source
from tf_lightning.data.prepare import check_result
from tf_lightning.tokenizer import Tokenizer, train

# What a tokenizer is trained on: the first of each source, up to these.
TOKENIZER_DOCUMENTS = 20_000
TOKENIZER_CHARACTERS = 20_000_000


def open_tokenizer(
    file: str | Path | None, sources: dict[str, Source], vocab_size: int, cache_dir: Path
) -> Tokenizer:
    """The tokenizer of a file, or else the one that was, or now is, trained on the sources.

    Raises:
        UserError: the file is none, or nothing of a source can be used.
    """
    if file:
        return Tokenizer(file)
    origin = [source.fingerprint("train") for source in sources.values()]
    digest = hashlib.sha256(repr((origin, vocab_size)).encode()).hexdigest()[:12]
    path = cache_dir / f"tokenizer-{digest}.model"
    if path.exists():
        return Tokenizer(path)
    return train(texts(sources), path, vocab_size)


def texts(sources: dict[str, Source]) -> Iterator[str]:
    """The training text of sources, of each only as much as a tokenizer needs.

    Raises:
        UserError: nothing of a source can be used.
    """
    for name, source in sources.items():
        characters, documents, skipped = 0, 0, Counter()
        for document in islice(source.documents("train"), TOKENIZER_DOCUMENTS):
            if isinstance(document, Skipped):
                skipped[document.reason] += 1
                continue
            documents += 1
            for text in (part for part in document if isinstance(part, str)):
                yield text
                characters += len(text)
            if characters > TOKENIZER_CHARACTERS:
                break
        check_result(name, "train", documents, dict(skipped.most_common()))
