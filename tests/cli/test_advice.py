"""jsonargparse's reports become one sentence with the key, the value and the nearest right name."""

from pathlib import Path

import pytest

from tf_lightning.cli.advice import find_problem, renamed
from tf_lightning.cli.config_files import read_config
from tf_lightning.errors import UserError

UNION = """Parser key "model":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'lightning.pytorch.core.module.LightningModule'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'tf_lightning.Transfusion':
        {problem}
    - Expected a <class 'NoneType'>
  Given value type: <class 'jsonargparse._util.NestedArg'>
  Given value: NestedArg(key='{key}', val='{value}')"""
SENTENCES = {
    (UNION.format(problem="Option 'lrr' is not accepted", key="lrr", value="1"), ""): (
        "--model.lrr is not an option of tf_lightning.Transfusion; did you mean --model.lr?"
    ),
    (UNION.replace('"model"', '"data"').replace("Transfusion'", "data.ImageCaptionData'").format(
        problem="Option 'img_size' is not accepted", key="img_size", value="128"), ""): (
        "--data.img_size is not an option of tf_lightning.data.ImageCaptionData; did you mean "
        "--data.image_size?"
    ),
    (UNION.format(problem='Parser key "lr":\n  Expected a <class \'float\'>. Got value: abc',
                  key="lr", value="abc"), ""): "model.lr=abc must be a number",
    ("Parser key \"trainer.precision\":\n  Subtypes: [typing.Literal[64, 32], "
     "typing.Literal['16-true', 'bf16-mixed'], <class 'NoneType'>]\n"
     "  Errors:\n    - Expected a <class 'int'>\n  Given value: bf16-mixd", ""): (
        "trainer.precision=bf16-mixd must be 32-true, bf16-mixed, 16-mixed, 64-true; did you mean "
        "bf16-mixed?"
    ),
    ("Parser key \"trainer.logger\":\n  Errors:\n    - Expected a dot import path string: CSVLoger",
     ""): ("trainer.logger=CSVLoger is not a class; did you mean "
           "lightning.pytorch.loggers.CSVLogger?"),
    ("unrecognized arguments: --trainr.max_steps=3", "trainer.max_steps"): (
        "there is no option --trainr.max_steps; did you mean --trainer.max_steps?"
    ),
    ("unrecognized arguments: my.yaml", ""):
        "my.yaml is an unexpected word; did you mean -c my.yaml?",
    ("something else", ""): "something else",
}  # fmt: skip


@pytest.mark.parametrize(("given", "sentence"), SENTENCES.items())
def test_the_innermost_problem_is_told_in_one_sentence(given, sentence):
    report, option = given
    assert find_problem(report, [option]).sentence == sentence


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"a: [1\nb: 2", "line 2: "),
        (b"trainer:\n\tmax_steps: 3\n", "line 2: found"),
        (b"model: {lr: 1}\ndata: {}\nmodel: {lr: 2}", "line 3: model is given a second time"),
        (b"hello", "has no keys"),
        (b"", "has no keys"),
        (b"- a\n- b", "has no keys"),
        (b"# caf\xe9\ntrainer: {}", "is not a text file in UTF-8"),
        (b"a: \x07", "correct the YAML"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_with_its_name_and_line(content, told, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError) as refused:
        read_config(file)
    assert str(file) in str(refused.value) and told in str(refused.value)


def test_every_key_has_its_line(tmp_path):
    file = Path(tmp_path, "mine.yaml")
    file.write_text("model:\n  init_args:\n    lr: 1\ntrainer:\n  callbacks+: []\n")
    places = {key: place.line for key, place in read_config(file).places.items()}
    assert places == {"model": 1, "model.lr": 3, "trainer": 4, "trainer.callbacks": 5}


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        (
            "--data.in_place is not an option of tf_lightning.data.Mixture",
            " in_place is called lazy_images now.",
        ),
        (
            "there is no option --data.mirror; did you mean --data.hflip?",
            " mirror is called hflip now.",
        ),
        (
            "model=tf_lightning.autoencoder_module.AutoencoderModule is no class",
            " autoencoder_module is called training.autoencoder now.",
        ),
        ("--data.hflop is not an option of tf_lightning.data.Mixture", ""),
        ("--model.lr=fast must be a number", ""),
        ("--data.minor is not an option; did you mean --data.mirror?", ""),
        ("config.yaml line 3: write a place for the answer", ""),
    ],
)
def test_the_new_name_is_told_where_a_key_was_renamed(sentence, expected):
    assert renamed(sentence) == expected
