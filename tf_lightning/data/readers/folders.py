"""Pictures in a folder for each class, asked for by the class's name: ImageNet as it unpacks."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tf_lightning.data.documents import BadSample, ContextText, RawDocument, Split
from tf_lightning.data.images import load_image
from tf_lightning.data.readers.files import FileSource
from tf_lightning.errors import UserError


class ClassFolders(FileSource):
    """Documents [prompt, picture] of files such as train/n01440764/n01440764_18.JPEG.

    Args:
        paths: picture files or globs to train on, such as 'imagenet/train/*/*.JPEG'; the folder
            that a file lies in is its class.
        names: a file of lines "n01440764 tench, Tinca tinca", such as LOC_synset_mapping.txt, of
            which the first name counts; null: the folders are the names.
        prompt: what asks for a picture, with {} for the name (MonoFormer's).
        learn_prompts: the LM loss counts the prompt's words; else only the <boi> after it and the
            document's end.
        val_paths: files or globs to validate on.
        val_fraction: without `val_paths`, the share of pictures held out, in [0, 1).
        image_size: side of the pictures in pixels.
    """

    def __init__(
        self,
        paths: str | list[str],
        names: str | None = None,
        prompt: str = "Please generate an image of {}",
        learn_prompts: bool = False,
        val_paths: str | list[str] | None = None,
        val_fraction: float = 0.01,
        image_size: int = 256,
    ):
        super().__init__(paths, val_paths, val_fraction)
        if "{}" not in prompt:
            raise UserError(f"prompt={prompt!r} has no place for the class's name; put {{}} in it")
        self.names, self.prompt, self.learn_prompts = names, prompt, learn_prompts
        self.image_size = image_size

    def samples(self, file: Path) -> Iterator[tuple[str, Path]]:
        """As `FileSource.samples`: the file itself, keyed by its folder."""
        yield file.parent.name, file

    def document(self, sample: Path) -> RawDocument:
        """As `FileSource.document`."""
        prompt = self.prompt.replace("{}", self._name(sample.parent.name))
        kind = str if self.learn_prompts else ContextText
        return [kind(prompt), load_image(sample, self.image_size)]

    def _name(self, folder: str) -> str:
        if self.names is None:
            return folder.replace("_", " ")
        try:
            return read_names(self.names)[folder]
        except KeyError as error:
            raise BadSample("picture of a class that has no name") from error

    def fingerprint(self, split: Split) -> str:
        """As `Source.fingerprint`; the names are part of it."""
        return f"{super().fingerprint(split)} {self.names and read_names(self.names)}"


@cache
def read_names(file: str) -> dict[str, str]:
    """The first name of each class, by its folder.

    Raises:
        UserError: the file cannot be read, or names nothing.
    """
    try:
        lines = Path(file).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file} cannot be read; give a file of lines 'n01440764 tench', or names: null"
        ) from error
    pairs = (line.split(maxsplit=1) for line in lines)
    names = {pair[0]: pair[1].split(",")[0].strip() for pair in pairs if len(pair) == 2}
    if not names:
        raise UserError(f"{file} names no class; it needs lines such as 'n01440764 tench'")
    return names
