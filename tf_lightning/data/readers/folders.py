"""Images in one folder per class, such as ImageNet, with prompts that name the class."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tf_lightning.data.documents import BadSample, ContextText, Split
from tf_lightning.data.readers.globs import find_files
from tf_lightning.data.readers.image_files import ImageFileSource
from tf_lightning.data.readers.local_or_remote import local_file
from tf_lightning.errors import UserError
from tf_lightning.remote.urls import is_remote

CLASS_PROMPT = "Please generate an image of {}"  # MonoFormer's prompt; {} is the class name


@dataclass(eq=False)
class ClassFolders(ImageFileSource):
    """Documents [prompt, image] from files such as train/n01440764/n01440764_18.JPEG.

    Args:
        paths: image files or globs to train on, such as 'imagenet/train/*/*.JPEG'; the folder of a
            file is its class.
        names: file or URL with lines such as "n01440764 tench, Tinca tinca" (ImageNet's
            LOC_synset_mapping.txt), whose first name is used; null: use the names of the folders.
        prompt: text in which {} stands for the name of the class (default: MonoFormer's).
        learn_prompts: include the prompt in the LM loss; otherwise the loss counts only the <boi>
            after the prompt and the end of the document.
    """

    names: str | None = None
    prompt: str = CLASS_PROMPT
    learn_prompts: bool = False

    def __post_init__(self):
        """Check the arguments."""
        super().__post_init__()
        if "{}" not in self.prompt:
            raise UserError(
                f"prompt={self.prompt!r} has no place for the class's name; put {{}} in it"
            )

    def samples(self, file: Path) -> Iterator[tuple[str, Path]]:
        """Yield the file itself under the name of its folder; see `FileSource.samples`."""
        yield file.parent.name, file

    def parts(self, sample: Path) -> list[str | Path]:
        """List prompt and image; see `ImageFileSource.parts`."""
        prompt = self.prompt.replace("{}", self._class_name(sample.parent.name))
        return [prompt if self.learn_prompts else ContextText(prompt), sample]

    def _class_name(self, folder: str) -> str:
        if self.names is None:
            return folder.replace("_", " ")
        try:
            return self._names[folder]
        except KeyError as error:
            raise BadSample("image of a class without a name") from error

    def fingerprint(self, split: Split) -> str:
        """Include the content of the names' file; see `Source.fingerprint`."""
        return f"{super().fingerprint(split)} {self.names and self._names}"

    @cached_property
    def _names(self) -> dict[str, str]:
        """The name of each class by its folder."""
        file = Path(self.names).expanduser()
        if is_remote(self.names):
            file = find_files(self.names, self.snapshot)[0]
        with local_file(file) as copied:
            return read_names(copied, str(file))


def read_names(file: Path, shown: str) -> dict[str, str]:
    """Map each folder to the first name of its class.

    Args:
        file: the file, or its copy.
        shown: its name in messages.

    Raises:
        UserError: the file cannot be read or contains no names.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{shown} cannot be read; give a file of lines 'n01440764 tench', or names: null"
        ) from error
    pairs = (line.split(maxsplit=1) for line in lines)
    names: dict[str, str] = {}
    for folder, text in (pair for pair in pairs if len(pair) == 2):
        name = text.split(",")[0].strip()
        if names.setdefault(folder, name) != name:
            raise UserError(f"{shown} names {folder!r} twice; keep one of the lines")
    if not names:
        raise UserError(f"{shown} names no class; it needs lines such as 'n01440764 tench'")
    return names
