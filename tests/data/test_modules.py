"""The options of sources and data modules are declared once and all have help."""

import pytest
from jsonargparse import ArgumentParser

from tf_lightning import data

FILES = {"paths", "val_paths", "val_fraction"}
IMAGES = FILES | {"image_size"}
IMAGE_PATHS = IMAGES | {"images"}
CAPTION_KEYS, PART_KEYS = {"caption_key", "image_key"}, {"images_key", "texts_key"}
EDIT_KEYS = {"source_key", "instruction_key", "target_key"}
SOURCES = {
    "TextFiles": FILES | {"text_key"},
    "ChatFiles": IMAGE_PATHS | {"messages_key", "role_key", "content_key", "image_key"},
    "CaptionTars": IMAGES | CAPTION_KEYS,
    "CaptionFolders": IMAGES | {"caption_key"},
    "NamedImages": IMAGES | {"caption_key", "roots"},
    "ImageFiles": IMAGES,
    "ClassFolders": IMAGES | {"names", "prompt", "learn_prompts"},
    "CaptionRows": IMAGE_PATHS | CAPTION_KEYS,
    "CaptionJson": IMAGE_PATHS | CAPTION_KEYS,
    "InterleavedFiles": IMAGE_PATHS | PART_KEYS,
    "EditFiles": IMAGE_PATHS | EDIT_KEYS,
}
MODULES = {
    "TextData": FILES | {"text_key"},
    "ImageCaptionData": IMAGE_PATHS | CAPTION_KEYS,
    "InterleavedData": IMAGE_PATHS | PART_KEYS,
    "EditData": IMAGE_PATHS | EDIT_KEYS,
}


def options_of(name: str) -> dict[str, str | None]:
    """Return the options of a class on the command line, with their help."""
    parser = ArgumentParser()
    parser.add_class_arguments(getattr(data, name), "data")
    actions = [a for a in parser._actions if a.dest.startswith("data.") and a.dest[-5:] != ".help"]
    return {action.dest.removeprefix("data."): action.help for action in actions}


@pytest.mark.parametrize("name", SOURCES)
def test_every_option_of_a_source_is_known_and_has_help(name):
    options = options_of(name)
    assert options.keys() == SOURCES[name] and all(options.values())


@pytest.mark.parametrize("name", MODULES)
def test_a_data_module_has_the_options_of_its_source_and_of_the_mixture(name):
    options = options_of(name)
    assert options.keys() == MODULES[name] | (options_of("Mixture").keys() - {"sources", "weights"})
    assert all(options.values())
