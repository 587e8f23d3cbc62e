"""The class folders of ImageNet become documents of prompt and image."""

import pytest

from support.evaluation_datasets import make_imagenet, write_image
from tf_lightning.batch import IGNORE_INDEX, pack
from tf_lightning.data import ClassFolders, Mixture
from tf_lightning.data.documents import ContextText, Skipped
from tf_lightning.errors import UserError

TRAIN = "ILSVRC/Data/CLS-LOC/train"


@pytest.fixture
def imagenet(tmp_path):
    return make_imagenet(tmp_path / "imagenet")


def source(root, **options) -> ClassFolders:
    options = {"names": f"{root}/LOC_synset_mapping.txt", "val_fraction": 0} | options
    return ClassFolders(f"{root}/{TRAIN}/*/*.JPEG", image_size=16, **options)


def test_the_prompt_has_the_first_name_of_the_class(imagenet):
    found = list(source(imagenet).documents("train"))
    prompts = [prompt for prompt, _ in found]
    assert (
        prompts
        == ["Please generate an image of tench"] * 2 + ["Please generate an image of goldfish"] * 2
    )
    assert all(type(prompt) is ContextText for prompt in prompts)
    assert all(image.size == (16, 16) for _, image in found)


def test_without_a_names_file_the_folders_are_the_names(tmp_path):
    write_image(tmp_path / "tree_frog" / "a.png")
    made = ClassFolders(
        f"{tmp_path}/*/*.png", prompt="a {} here", learn_prompts=True, val_fraction=0, image_size=16
    )
    ((prompt, _),) = made.documents("train")
    assert prompt == "a tree frog here" and type(prompt) is str


def test_unreadable_images_and_unnamed_classes_are_skipped_with_a_reason(imagenet):
    folder = imagenet / TRAIN / "n01440764"
    (folder / "n01440764_0.JPEG").write_bytes(b"not an image")
    whole = (folder / "n01440764_1.JPEG").read_bytes()
    (folder / "n01440764_1.JPEG").write_bytes(whole[: len(whole) // 2])
    write_image(imagenet / TRAIN / "n99" / "n99_0.JPEG")
    found = [x for x in source(imagenet).documents("train") if isinstance(x, Skipped)]
    assert [x.reason for x in found] == [
        "undecodable image",
        "truncated image",
        "image of a class without a name",
    ]


def mixture(root, cache, **options) -> Mixture:
    arguments = {"autoencoder": "pixels", "patch_size": 4, "row_length": 64, "vocab_size": 300}
    sources = {"imagenet": source(root, **options)}
    return Mixture(sources, **arguments, batch_size=2, caption_drop_prob=0.0, image_first_prob=0.0,
                   cache_dir=str(cache))  # fmt: skip


def test_skipped_files_are_counted_in_the_corpus(imagenet, tmp_path):
    (imagenet / TRAIN / "n01440764" / "n01440764_0.JPEG").write_bytes(b"not an image")
    made = mixture(imagenet, tmp_path)
    made.setup()
    corpus = made.corpora["train"]["imagenet"]
    assert len(corpus) == 3 and corpus.skipped == {"undecodable image": 1}


def test_a_source_without_readable_images_is_refused_in_one_sentence(imagenet, tmp_path):
    for file in (imagenet / TRAIN).rglob("*.JPEG"):
        file.write_bytes(b"not an image")
    with pytest.raises(UserError) as error:
        mixture(imagenet, tmp_path).setup()
    assert str(error.value) == (
        "imagenet: all 4 documents of the train split are unusable (4 undecodable image); "
        "repair them or change the data's arguments"
    )


@pytest.mark.parametrize("learn_prompts", [False, True])
def test_the_prompt_is_in_the_loss_only_if_asked_and_boi_always(imagenet, tmp_path, learn_prompts):
    made = mixture(imagenet, tmp_path, learn_prompts=learn_prompts)
    made.setup()
    document = made.corpora["train"]["imagenet"].document(0)
    tokenizer = made.tokenizer
    batch = pack([[document]], [0], tokenizer=tokenizer, row_length=64, patch_size=4)
    words = tokenizer.encode("Please generate an image of tench") if learn_prompts else []
    targets = [x for x in batch.labels[0].tolist() if x != IGNORE_INDEX]
    assert targets == [*words, tokenizer.boi_id, tokenizer.eos_id]


def test_a_bad_prompt_or_names_file_is_a_user_error(imagenet):
    with pytest.raises(UserError, match="no place for the class's name"):
        source(imagenet, prompt="an image")
    (imagenet / "empty.txt").write_text("\n")
    (imagenet / "twice.txt").write_text("n1 cat\nn2 dog\nn1 cow")
    faults = {
        "none.txt": "cannot be read",
        "empty.txt": "names no class",
        "twice.txt": "names 'n1' twice",
    }
    for names, words in faults.items():
        with pytest.raises(UserError, match=words):
            source(imagenet, names=f"{imagenet}/{names}").fingerprint("train")


def test_the_fingerprint_depends_on_the_names_file(imagenet):
    before = source(imagenet).fingerprint("train")
    (imagenet / "other.txt").write_text("n01440764 fish\n")
    assert source(imagenet, names=f"{imagenet}/other.txt").fingerprint("train") != before
