"""`tf-lightning plan`: the needs of a run, what to change where it does not fit, and its errors."""

import re

import pytest

from support import runs
from tf_lightning.cli import plan
from tf_lightning.cli.main import main
from tf_lightning.errors import UserError
from tf_lightning.training.flops import Workload, training_flops
from tf_lightning.training.step_memory import StepMemory

GIB = 2**30


def lines_of(printed: str) -> dict[str, str]:
    """The values of the printed table by name."""
    rows = re.findall(r"^(\S+(?: \S+)*)  +(.+)$", printed, re.MULTILINE)
    return dict(rows)


def test_a_plan_says_what_a_run_needs(tmp_path, capsys):
    """Half of a row of 256 has room for 8 images of 16 patches; with captions, 4 fit in a row."""
    config = runs.write_config(tmp_path)
    speed = ["--mfu", "0.5", "--gpu-tflops", "1e-7"]  # so slow that days are not rounded to 0.0
    main(["plan", "-c", str(config), "--gpus", "4", "--trainer.max_steps", "1000", *speed])
    found = lines_of(capsys.readouterr().out)
    assert found["Tokens a step"].startswith("2,048: 8 rows of 256")  # 4 GPUs x 2 rows
    batch = plan.make_batch(2, 256, (3, 64, 64), 16)
    made = plan.build_network(
        {
            "transformer": runs.config(tmp_path)["model"]["transformer"],
            **{"patch_size": 16, "latent_channels": 3, "learned_sigma": False, "num_codes": None},
        }
    )
    documents = [52] * 4 + [48]
    work = Workload(512, 2 * sum(n**2 for n in documents), len(batch.target_index), 8)
    flops = 4 * training_flops(made, work, (64, 64))
    assert found["FLOPs a step"].startswith(f"{flops:.3g}, ")
    assert found["Parameters"] == f"{sum(p.numel() for p in made.parameters()) / 1e6:,.1f}M"
    days = 1000 * flops / (4 * 1e-7 * 1e12 * 0.5) / 86_400
    assert days > 1
    assert found["Time"].startswith(f"{days:,.1f} days for 1,000 steps, 50% of 1e-07 TFLOPS")
    assert "GiB on each GPU, of 80 GiB" in found["Peak memory"]
    assert found["Strategy"].startswith("planned with trainer.strategy ModelParallelStrategy")
    assert not (tmp_path / "data").exists() and not (tmp_path / "run").exists()


def test_a_row_is_full_and_half_of_it_is_patches_where_there_is_room():
    batch = plan.make_batch(3, 4096, (8, 32, 32), 2)
    assert batch.row_tokens.tolist() == [4096] * 3
    assert len(batch.patch_index) == 3 * 2048
    assert len(plan.make_batch(1, 100, None, 2).patch_index) == 0
    codes = plan.make_batch(1, 4096, (1, 16, 16), 1, num_codes=512)
    assert len(codes.code_index) == 8 * 257  # codes, and the <eoi> after them


@pytest.fixture
def needs(monkeypatch) -> list:
    """Replace the measurement by a formula of the options that lower the peak."""
    asked = []

    def measure(hparams, batch, num_ranks, precision, accumulate):
        asked.append((hparams, len(batch.input_ids), num_ranks, precision, accumulate))
        of_row = {"none": 8, "selective": 5, "full": 3}[hparams["activation_checkpointing"]]
        of_ema = 0 if hparams["ema_device"] == "cpu" else 4
        of_shards = (64 if hparams["shard_size"] else 0) + 320 // num_ranks
        peak = of_row * len(batch.input_ids) + of_ema + of_shards
        return StepMemory(GIB, 2 * GIB, GIB, peak * GIB, 10**9)

    monkeypatch.setattr(plan, "plan_memory", measure)
    return asked


def test_a_run_that_does_not_fit_is_told_which_options_make_it_fit(tmp_path, capsys, needs):
    """Each option is tried with those before it, until the run fits into 54 GiB."""
    config = str(runs.write_config(tmp_path))
    options = ["--model.shard_size", "2", "--model.compile", "true"]
    main(["plan", "-c", config, "--gpus", "4", "--gpu-memory", "60", *options])
    last = capsys.readouterr().out.partition("It does not fit into 90% of 60 GiB")[2]
    selective, full = (f"--model.activation_checkpointing {mode}" for mode in ("selective", "full"))
    rows = f"{full} --data.batch_size 1 --trainer.accumulate_grad_batches 2"
    unshared = f"{rows} --model.shard_size null"
    on_cpu = f"{unshared} --model.ema_device cpu"
    tried = {selective: 158, full: 154, rows: 151, unshared: 87, on_cpu: 83}
    # A step keeps its 8 rows: twice the GPUs have half of the batches.
    more_gpus = on_cpu.replace("grad_batches 2", "grad_batches 1") + " --gpus 8"
    tried[more_gpus] = 43
    expected = [f"  {peak:6.1f} GiB with {options}" for options, peak in tried.items()]
    assert last.splitlines()[1:] == expected
    assert needs[0][1:] == (2, 4, "32-true", 1) and needs[0][0]["compile"] is False
    assert needs[-1][1:] == (1, 8, "32-true", 1)


def test_more_rows_a_step_are_told(tmp_path, capsys, needs):
    """A batch of one row that is not accumulated cannot be divided among twice the GPUs."""
    config, options = str(runs.write_config(tmp_path)), ["--data.batch_size", "1"]
    main(["plan", "-c", config, "--gpus", "4", "--gpu-memory", "50", *options])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith("--model.ema_device cpu --gpus 8 (2 times as many rows a step)")


def test_the_rows_of_the_configurations_gpus_are_told_unless_a_batch_is_given(
    tmp_path, capsys, needs
):
    config = ["plan", "-c", str(runs.write_config(tmp_path))]  # 1 GPU x 2 rows
    accumulate = "--trainer.accumulate_grad_batches"
    four = ["--trainer.devices", "4", accumulate, "3"]
    told = {}
    for name, options in {
        "fewer": ["--trainer.devices", "4", "--gpus", "2"],
        "rest": ["--trainer.devices", "4", "--gpus", "3"],
        "same": ["--trainer.devices", "4"],
        "auto": ["--trainer.devices", "auto", "--gpus", "3"],
        "given": [*four, "--gpus", "2"],
    }.items():
        main([*config, *options])
        told[name] = lines_of(capsys.readouterr().out).get("Rows a step")
    fewer = "4, but 8 on the 4 GPUs of the configuration"
    assert told == {
        "fewer": f"{fewer}; {accumulate} 2 keeps 8",
        "rest": "6, but 8 on the 4 GPUs of the configuration",
        **dict.fromkeys(("same", "auto", "given")),
    }


def test_data_of_another_class_is_refused_and_can_be_described(
    tmp_path, capsys, monkeypatch, fails, needs
):
    """The sentence names options that work."""
    (tmp_path / "other_project.py").write_text(OTHER_DATA)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = {"class_path": "other_project.OwnData", "init_args": {"folder": "a"}}
    config = runs.write_config(tmp_path, lambda config: config.update(data=own))
    code, line = fails("plan", "-c", config, "--gpus", "2")
    assert code == 1 and "data.batch_size, which other_project.OwnData does not have" in line
    options = re.search("(--data Mixture .*)", line)[1].replace(" T ", " 256 ").replace(" B", " 3")
    main(["plan", "-c", str(config), "--gpus", "2", *options.split()])
    assert "2 GPUs x 3 rows" in capsys.readouterr().out and needs[0][1] == 3


OTHER_DATA = """
from tf_lightning.data.stream import StreamData

class OwnData(StreamData):
    def __init__(self, folder: str, batch_size: int = 2):
        super().__init__(batch_size, 0)
"""

DEVICES = {"3": 3, "0,1": 2, "0,": 1, "[0, 2, 3]": 3}


@pytest.mark.parametrize("devices", DEVICES)
def test_the_devices_of_the_configuration_are_counted(devices, tmp_path, capsys, needs):
    config = str(runs.write_config(tmp_path))
    main(["plan", "-c", config, "--trainer.devices", devices, "--trainer.num_nodes", "2"])
    assert f" {2 * DEVICES[devices]} GPUs x" in capsys.readouterr().out


def test_a_run_that_fits_is_told_so(tmp_path, capsys, needs):
    main(["plan", "-c", str(runs.write_config(tmp_path)), "--gpus", "64", "--gpu-memory", "28"])
    assert capsys.readouterr().out.endswith("It fits: 90% of 28 GiB are 25.2 GiB.\n")


REFUSED = {
    ("--gpus", "0"): "0 is not a number of at least 1",
    ("--mfu", "1.5"): "1.5 is not a number in (0, 1]",
    ("--gpu-memory", "nan"): "nan is not a number above 0",
    ("--data.row_length", "40"): "takes 52 positions, but a row has 40; give a larger",
    ("--trainer.devices", "auto"): "trainer.devices=auto depends on the machine; give --gpus N",
    ("--gpus", "4", "--model.shard_size", "8"): "shard_size=8 does not divide the 4 ranks; give a",
    ("--gpu", "8"): "there is no option --gpu",
}


@pytest.mark.parametrize("options", REFUSED, ids=" ".join)
def test_a_mistake_is_told_in_one_sentence(options, tmp_path, fails):
    code, line = fails("plan", "-c", runs.write_config(tmp_path), *options)
    assert code in (1, 2) and REFUSED[options] in line


def test_only_transfusion_models_are_planned(tmp_path):
    with pytest.raises(UserError, match="plan works with Transfusion, but the model is"):
        plan.check_model("tf_lightning.training.autoencoder.AutoencoderModule")
