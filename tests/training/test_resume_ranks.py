"""Two ranks compute the same as one, before and after a resume."""

import json
from pathlib import Path

import pytest

from support import ranks, runs
from tf_lightning.cli.main import main


@pytest.mark.slow
def test_two_sharded_ranks_equal_one_and_each_resumes_the_other(tmp_path):
    """FSDP2 on two CPU processes: losses, weights, moving average, validations, and an image.

    With separate image weights and Muon; test_chameleon.py covers FSDP2 without them.
    """
    options = {"modality_weights": "all", "muon": True, "accumulate": (1, 2), "validate": True}
    check_two_ranks(tmp_path, json.dumps(ranks.SHARDED), swapped=True, **options)
    file = str(tmp_path / "ranks1" / "run" / "checkpoints" / "last.ckpt")  # of the sharded half
    drawn = tmp_path / "drawn"
    main(["generate", file, "a red circle", "--num-inference-steps", "2", "-n1", "-o", str(drawn)])
    assert (drawn / "0000.png").is_file()


@pytest.mark.slow
def test_two_ranks_equal_one_and_a_run_resumes_with_twice_or_half_as_many(tmp_path):
    check_two_ranks(tmp_path, "ddp", swapped=True, accumulate=(2, 2))


def check_two_ranks(
    tmp_path: Path,
    strategy: str,
    modality_weights: str = "shared",
    swapped: bool = False,
    muon: bool = False,
    accumulate: tuple[int, int] = (1, 1),
    validate: bool = False,
) -> None:
    """Compare losses and weights of two runs over three steps, and three more after a resume.

    The first run has one rank and the second has two. With `swapped`, they exchange these numbers
    when they resume. A step has four rows, which one or two ranks read in one or more batches. All
    ranks leave out the second step, in which the loss of one of them is not finite.

    Args:
        tmp_path: folder of both runs.
        strategy: strategy of two ranks.
        modality_weights: option of the Transformer.
        swapped: see above.
        muon: option of the model.
        accumulate: batches a step of one rank, and of two.
        validate: validate after every step.
    """
    more = [f"--data.init_args.cache_dir={tmp_path}/data"]
    more += ["--trainer.callbacks+=support.runs.SpoilLoss"]
    more += [f"--model.transformer.modality_weights={modality_weights}"]
    more += [f"--model.muon={str(muon).lower()}"]
    more += ["--model.transformer.head_dim=24", "--model.transformer.qk_norm=full"]
    more += ["--trainer.limit_val_batches=1", "--trainer.val_check_interval=1"] * validate
    for first in (1, 2):
        folder = tmp_path / f"ranks{first}"
        folder.mkdir()
        config = runs.write_config(folder, ranks.two_rank_config)
        then = 3 - first if swapped else first
        resume = ["--trainer.max_steps=6", "--ckpt_path=last"]
        for number, further in ((first, []), (then, resume)):
            batches = accumulate[number - 1]
            ranks.fit(config, number, strategy, *more, *further, rows=4, accumulate=batches)
    pictures = ranks.images_in_rows(tmp_path / "data", 24)
    assert 0 in pictures and max(pictures) > 0
    losses = ("loss", "loss_lm", "loss_diffusion", "steps_left_out")
    ranks.check_same(*(tmp_path / f"ranks{n}" / "run" for n in (1, 2)), losses, 6)
    assert ranks.logged(tmp_path / "ranks2" / "run", ("steps_left_out",)) == [0, 1, 1, 1, 1, 1]
