"""Curves have the points of the events, in the order of the patterns."""

import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from callbacks.curves import main, read_curves
from callbacks.plot import line_plots
from tf_lightning.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """A run of 3,000 training steps with a validation every 1,000, killed and resumed at 2,000."""
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(0, 3000, 2):
            writer.add_scalar("train/loss", 1 / (step + 1), step)
        for step, fid in ((999, 9.0), (1999, 5.0)):
            writer.add_scalar("val/fid[shapes]", fid, step)
            writer.add_scalar("val/text/perplexity", fid / 4, step)
    with SummaryWriter(str(tmp_path), filename_suffix=".resumed") as writer:
        for step, fid in ((1999, 4.0), (2999, 2.0)):
            writer.add_scalar("val/fid[shapes]", fid, step)
            writer.add_scalar("val/text/perplexity", fid / 4, step)
    return tmp_path


def test_a_resumed_run_has_one_point_for_each_step(folder):
    lines = read_curves(folder, ["val/*perplexity", "val/fid*"])
    assert lines == {
        "val/text/perplexity": [(1000, 2.25), (2000, 1.0), (3000, 0.5)],
        "val/fid[shapes]": [(1000, 9.0), (2000, 4.0), (3000, 2.0)],
    }
    assert list(lines) == ["val/text/perplexity", "val/fid[shapes]"]


def test_a_long_curve_has_all_its_points(folder):
    assert len(read_curves(folder, ["train/loss"])["train/loss"]) == 1500


def test_the_command_writes_a_plot(folder, capsys):
    main([str(folder), str(folder / "new" / "curves.png")])
    page = Image.open(folder / "new" / "curves.png")
    assert page.size == line_plots({"a": [(0, 0)], "b": [(0, 0)]}, "step").size
    assert "val/fid[shapes], val/text/perplexity" in capsys.readouterr().out


def test_missing_events_and_tags_are_reported_in_one_sentence(folder, tmp_path):
    with pytest.raises(UserError, match="has no TensorBoard events"):
        read_curves(tmp_path / "none", ["val/*"])
    with pytest.raises(
        UserError, match=r"no tag that matches val/kid\*; available are val/fid.shapes."
    ):
        main([str(folder), str(folder / "curves.png"), "--tags", "val/kid*"])
    assert not (folder / "curves.png").exists()
