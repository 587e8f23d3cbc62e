"""A reference file stores its facts and is refused if other facts are expected."""

import pytest
import torch

from evaluation.reference import Reference

FACTS = {"extractor": "e", "weights_hash": "abc", "dataset": "coco", "count": 3, "resize": "256"}
STATISTICS = {"mean": torch.arange(3).double(), "count": torch.tensor(3)}


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "deep" / "reference.safetensors"
    Reference(file, FACTS).keep(STATISTICS)
    return file


def test_kept_statistics_are_read_back(path):
    read = Reference(path, FACTS).statistics
    assert read.keys() == STATISTICS.keys()
    assert all(torch.equal(read[name], STATISTICS[name]) for name in read)
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # no temporary file


@pytest.mark.parametrize("fact", FACTS)
def test_a_file_with_another_fact_is_refused_in_one_sentence(path, fact):
    with pytest.raises(ValueError) as error:
        Reference(path, FACTS | {fact: "299"})
    message = f"{path} was made with {fact} {FACTS[fact]}, not 299; delete it or name another file"
    assert str(error.value) == message


def test_a_file_without_an_expected_fact_is_refused(path):
    with pytest.raises(ValueError, match="was made with crop None, not center"):
        Reference(path, FACTS | {"crop": "center"})


def test_a_damaged_file_is_refused_in_one_sentence(path):
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"is not a reference file \(.*\); delete it"):
        Reference(path, FACTS)


def test_statistics_with_another_count_are_refused(tmp_path):
    reference = Reference(tmp_path / "new", FACTS | {"count": 5})
    with pytest.raises(
        ValueError, match="^3 real images were given but the reference is defined for 5"
    ):
        reference.keep(STATISTICS)
    assert reference.statistics is None and not list(tmp_path.iterdir())


def test_without_a_path_the_statistics_are_kept_in_memory():
    reference = Reference(None, {})
    reference.keep(STATISTICS)
    assert torch.equal(reference.statistics["mean"], STATISTICS["mean"])
