"""Typical slips on the command line, each answered with one sentence that says what to do.

`test_mistakes.py` has those that are found later: in checkpoints, data and devices.
"""

from pathlib import Path

import pytest

from support import runs

FIT = ("fit", "-c", "config.yaml")
# Mistyped options of `fit`, each with a part of the message.
OPTIONS = {
    # a misspelt name
    "--trainr.max_steps=3": "did you mean --trainer.max_steps?",
    "--trainer.max_stps=3": "did you mean --trainer.max_steps?",
    "--checkpoint.every_n_steps=3": "did you mean --checkpoint.every_n",
    "--seed_everithing=3": "did you mean --seed_everything?",
    "--ckptpath=last": "did you mean --ckpt_path?",
    "--modl.lr=1": "did you mean --model.lr?",
    "--model.lrr=1": "did you mean --model.lr?",
    "--model.patchsize=2": "did you mean --model.patch_size?",
    "--model.transformer.num_lyers=2": "did you mean --model.transformer.num_layers?",
    "--model.linear.tim=added": "did you mean --model.linear.time?",
    "--data.rowlength=9": "did you mean --data.row_length?",
    "--data.sources.text.num_document=9": "did you mean --data.sources.text.num_documents?",
    "--evalute.sampling.guidance_scale=3": "did you mean --evaluate.sampling.guidance_scale?",
    "--evaluate.guidance_scal=3": "did you mean --evaluate.guidance_scales?",
    "--trainer.logger.nam=x": "did you mean --trainer.logger.name?",
    "--optimizer=Adam": "there is no option --optimizer; options begin with checkpoint",
    "--lr=1": "there is no option --lr; did you mean --model.lr?",
    "--max-steps=3": "did you mean --trainer.max_steps?",
    "--batch_size=3": "did you mean --data.batch_size?",
    "--logger.name=x": "did you mean --trainer.logger.name?",
    "--evaluate.sampling.guidance=3": "write one of --evaluate.sampling.guidance_scale, --evaluate",
    "--data.sources.nope.init_args.seed=3": "there is no data.sources.nope; check its name",
    "run/last.ckpt": "did you mean --ckpt_path run/last.ckpt?",
    "-ckpt_path=last": "write --ckpt_path=last",
    "–model.lr=1": "–model.lr=1 does not begin with two dashes; write --model.lr=1",
    "---model.lr=1": "---model.lr=1 does not begin with two dashes; write --model.lr=1",
    "--model.lr": "--model.lr needs a value, as in --model.lr=VALUE",
    "--config=": "-c is empty; give the YAML file of a run",
    "--data.sources.nope.seed=3": "--data.sources.nope.seed: there is no data.sources.nope; check",
    "more.yaml": "did you mean -c more.yaml?",
    "more": "more is an unexpected word",
    # a wrong value
    "--trainer.max_steps=abc": "trainer.max_steps=abc must be a whole number",
    "--trainer.max_steps=1.5": "trainer.max_steps=1.5 must be a whole number",
    "--trainer.precision=bf16-mixd": "did you mean bf16-mixed?",
    "--trainer.precision=8": "trainer.precision=8 must be 32-true, bf16-mixed, 16-mixed, 64-true",
    "--trainer.precision=fp16": "did you mean 16-mixed?",
    "--trainer.gradient_clip_val=a": "trainer.gradient_clip_val=a must be a whole number, a number",
    "--trainer.inference_mode=maybe": "trainer.inference_mode=maybe must be true or false",
    "--trainer.use_distributed_sampler=3": "must be true or false",
    "--trainer.strategy=ddpp": "there is no trainer.strategy=ddpp; did you mean ddp?",
    "--trainer.strategy=nothing": "there is no trainer.strategy=nothing; give auto, ddp",
    "--trainer.log_every_n_steps=-1": "log_every_n_steps=-1 must be at least 1",
    "--trainer.max_steps=0": "fit with max_steps=0 has nothing to do",
    "--trainer.limit_train_batches=0": "fit with limit_train_batches=0 has nothing to do",
    "--trainer.max_time=00:00:00:00": "max_time=0 has nothing to do",
    "--trainer.val_check_interval=0": "set limit_val_batches to 0",
    "--trainer.val_check_interval=00:00:01:00": "set it to a number of steps",
    "--trainer=3": "--trainer 3 is not a file of options; give one of them",
    "--trainer=mine.yaml": "--trainer mine.yaml is not a file of options",
    "--checkpoint.save_last=foo": "checkpoint.save_last=foo must be true or false, link or null",
    "--learning_rate_monitor.logging_interval=foo": "must be step, epoch or null",
    "--seed_everything=abc": "seed_everything=abc must be true or false or a whole number",
    "--seed_everything=-1": "seed_everything=-1 must be from 0 to 4294967295",
    f"--seed_everything={2**70}": f"seed_everything={2**70} must be from 0 to 4294967295",
    "--model.lr=fast": "model.lr=fast must be a number",
    "--model.betas=0.9": "model.betas=0.9 must be a list",
    "--model.betas=[1,2,3]": "must be a list with 2 elements",
    "--model.compile=maybe": "model.compile=maybe must be true or false",
    "--model.patch_size=two": "model.patch_size=two must be a whole number",
    "--model.linear.time=early": "model.linear.time=early must be added, token or adaln",
    "--model.transformer.qk_norm=lyer": "did you mean layer?",
    "--model.unet.channels=abc": "model.unet.channels=abc must be a list",
    "--model=null": "the command needs --model",
    "--model=missing.yaml": "model=missing.yaml: there is no such file",
    "--model.transformer=null": "model.transformer is null; give its options, as in --model.tr",
    "--data=null": "the command needs --data",
    "--data=3": "data=3 is not a class",
    "--data.hflip=maybe": "data.hflip=maybe must be true or false",
    "--data.crops=4": "data.crops=4 must be 1, 2 or 3",
    "--data.weights=[1,2]": "data.weights=[1, 2] must be a mapping of names to values or null",
    "--data.weights={captions: much}": "data.weights=much must be a number",
    "--data.weights_count=words": "data.weights_count=words must be tokens or documents",
    "--data.timestep_distribution=normal": "must be uniform or logit_normal",
    "--data.patch_size=2": "give --model.patch_size",
    "--data.sources.text.num_documents=many": "must be a whole number",
    "--evaluate.sampling.guidance_scale=high": "evaluate.sampling.guidance_scale=high must be a n",
    f"--model.transformer.dim={10**30}": f"transformer.dim={10**30} must be at most {2**63 - 1}",
    f"--trainer.max_steps={10**25}": f"trainer.max_steps={10**25} must be at most {2**63 - 1}",
    "--trainer.num_sanity_val_steps=-5": "num_sanity_val_steps=-5 must be at least 0, or -1",
    "--trainer.devices=cpu": "trainer.devices=cpu must be a number of processes on a CPU",
    "--trainer.devices=-1": "trainer.devices=-1 must be a number of processes on a CPU",
    "--ckpt_path=": "--ckpt_path is empty; give FILE or last, or leave it out",
    "--checkpoint.monitor=loss": "--checkpoint.monitor has no effect, because trainer.callbacks",
    "--data.cache_dir=": "data.cache_dir is empty; give a name",
    "--data.cache_dir=config.yaml": "config.yaml is a file, so config.yaml cannot be a folder",
    "--data.autoencoder=": "data.autoencoder is empty; give a name",
    "--data.tokenizer=": "data.tokenizer is empty; give a name",
    "--data.tokenizer=.": "there is no config.json in .; check the path",
    "--data.sources={}": "sources is empty; name at least one source",
    "": "the command line has an empty word; leave it out",
    # a wrong class
    "--model=Transfusio": "did you mean tf_lightning.Transfusion?",
    "--model.class_path=tf_lightning.Transfuson": "did you mean tf_lightning.Transfusion?",
    "--model.class_path=my_code.Model": "there is no module my_code; install it, or start",
    "--data.class_path=tf_lightning.data.Mixtur": "did you mean tf_lightning.data.Mixture?",
    "--data.class_path=tf_lightning.data.TextData": "tf_lightning.data.TextData needs --data.paths",
    "--data.sources.text.class_path=tf_lightning.data.TextFile": "tf_lightning.data.TextFiles?",
    "--evaluate.prompts=ShapesPrompt": "did you mean callbacks.prompts.ShapesPrompts?",
    "--evaluate.metrics=[callbacks.metrics.ImageQualit]": "callbacks.metrics.ImageQuality?",
    "--trainer.logger=CSVLoger": "did you mean lightning.pytorch.loggers.CSVLogger?",
    "--trainer.logger=lightning.pytorch.loggers.CSVLoger": "pytorch.loggers.CSVLogger?",
    "--trainer.callbacks=[EarlyStoping]": "did you mean lightning.pytorch.callbacks.EarlyStopping?",
    "--trainer.callbacks=[nowhere.Mine]": "there is no module nowhere",
    "--trainer.plugins=abc": "trainer.plugins=abc is not a class",
    "--throughput=3": "throughput=3 is not a class; give the path of a class, as in callbacks.thr",
    "--evaluate.prompts=none.txt": "evaluate.prompts=none.txt is a file, but must be a class; give",
    "--print_config=all": 'Invalid option "all" for --print_config',
}
COMMANDS = {
    ("fit",): "fit needs the configuration of a run; give -c CONFIG",
    ("validate",): "validate needs the configuration of a run; give -c CONFIG",
    ("prepare",): "prepare needs the configuration of a run; give -c CONFIG",
    ("inspect",): "inspect needs the configuration of a run; give -c CONFIG",
    ("fit", "config.yaml"): "did you mean -c config.yaml?",
    ("inspect", "config.yaml"): "did you mean -c config.yaml?",
    ("prepare", "config.yaml"): "did you mean -c config.yaml?",
    ("-c", "config.yaml", "fit"): "-c comes before the command; begin with `tf-lightning fit`",
    ("Fit", "-c", "config.yaml"): "did you mean 'fit'?",
    ("trian",): "unknown command 'trian'",
    ("fit", "-c"): "expected one argument",
    ("--versoin",): "there is no option --versoin; see `tf-lightning --help`",
    ("fit", "-c", ""): "-c is empty; give the YAML file of a run",
    ("fit", "-c", "none.yaml"): "there is no configuration none.yaml",
    ("fit", "-c", "."): ". is a folder; give the YAML file in it",
    (
        "fit",
        "-c",
        "damaged.ckpt",
    ): "damaged.ckpt is not a text file in UTF-8; -c takes the YAML file",
    ("fit", "-c", "empty.yaml"): "empty.yaml has no keys such as `model:`",
    ("fit", "-c", "tab.yaml"): "tab.yaml line 2: found",
    ("fit", "-c", "twice.yaml"): "twice.yaml line 2: model is given a second time, after line 1",
    ("fit", "-c", "wrong.yaml"): "wrong.yaml line 2: model.lr=fast must be a number",
    ("fit", "-c", "config.yaml", "-c", "key.yaml"): "did you mean --trainer.max_steps?",
    ("fit", "-c", "config.yaml", "--ckpt_path"): "expected one argument",
    ("fit", "--help", "Evalute"): "did you mean 'Evaluate'?",
    (*FIT, "--ckpt_path", "none.ckpt"): "no checkpoint at none.ckpt",
    (*FIT, "--ckpt_path", ".."): ".. is a folder without checkpoints",
    ("validate", "-c", "config.yaml"): "validate needs a trained model; add --ckpt_path FILE",
    (
        "validate",
        "-c",
        "config.yaml",
        "--ckpt_path",
        "last",
    ): "; train first with `tf-lightning",
    ("prepare", "-c", "config.yaml", "--proceses", "2"): "did you mean --processes?",
    ("prepare", "-c", "config.yaml", "--processes", "0"): "0 is not a number of at least 1",
    ("prepare", "-c", "config.yaml", "--shard", "3/3"): "--shard 3/3 is not I/N with 0 <= I < N",
    ("prepare", "-c", "config.yaml", "--shard", ""): "is not I/N with 0 <= I < N",
    ("inspect", "-c", "config.yaml", "--seed", "-1"): "-1 is not a number of at least 0",
    ("inspect", "-c", "config.yaml", "-o", "config.yaml"): "so config.yaml cannot be a folder",
    ("inspect", "-c", "config.yaml", "--documens", "2"): "did you mean --documents?",
    ("inspect", "-c", "config.yaml", "--rows", "x"): "x is not a number of at least 1",
    ("generate",): "the following arguments are required: CKPT",
    ("generate", "a red circle"): "there is no prompt after the checkpoint 'a red circle'",
    ("generate", "none.ckpt", "a"): "no checkpoint at none.ckpt",
    ("generate", "config.yaml", "a"): "config.yaml",
    ("generate", "a red circle", "damaged.ckpt"): "the checkpoint comes before the prompt: "
    'tf-lightning generate damaged.ckpt "a red circle"',
    ("generate", "..", "a"): ".. is a folder without checkpoints",
    ("generate", "c", "a", "--gidance-scale", "3"): "did you mean --guidance-scale?",
    ("generate", "c", "a", "--steps", "3"): "did you mean --num-inference-steps?",
    ("generate", "c", "a", "--guidance-scale", "x"): "argument --guidance-scale: invalid float",
    ("generate", "c", "a", "-n", "0"): "0 is not a number of at least 1",
    ("generate", "c", "a", "--seed", str(2**70)): "is not a whole number below",
    ("generate", "c", "a", "--dtype", "fp8"): "argument --dtype: invalid choice: 'fp8'",
    ("generate", "c", "a", "--weights", "emma"): "argument --weights: invalid choice: 'emma'",
    ("generate", "c", "\udcff"): "is not text in UTF-8",
    ("generate", "", "a"): "argument CKPT: the name is empty",
    ("generate", "c", "a", "-o", ""): "argument -o/--out: the path is empty",
    ("generate", "c", "a", "-o", "config.yaml/x"): "is a file, so config.yaml/x cannot be a folder",
    ("generate", "c", "--image", ""): "argument --image: the name is empty",
    ("generate", "c", "a", "--sampler", ""): "argument --sampler: the name is empty",
    ("generate", "exported/net.safetensors", "a"): "is a part of an export; give its folder",
    ("export", "exported", "-o", "x"): "exported is an export already; give a checkpoint",
    ("export", "", "-o", "x"): "argument CKPT: the path is empty",
    ("export", "damaged.ckpt", "-o", "config.yaml/x"): "config.yaml/x cannot be a folder",
    ("export", "none", "-o", "x"): "no checkpoint at none",
    ("export", "none"): "the following arguments are required: -o/--out",
    ("export", "c", "-o", "x", "--oly", "net"): "did you mean --only?",
    ("model-config",): "the following arguments are required: FOLDER",
    ("model-config", "none"): "there is no config.json in none; check the path",
}
# Mistakes in a file that follows the recipe, each with a part of the message.
CONTENTS = {
    "model.lrr: 3": "more.yaml line 1: --model.lrr is not an option of tf_lightning.Transfusion",
    "trainer.max_steps: 3\ntrainer: {max_steps: 4}": "line 2: trainer.max_steps is given a second",
    "model: {lr: 1, init_args: {lr: 2}}": "line 1: model.lr is given a second time",
    "trainer:\n  max_stepz: 3": "more.yaml line 2: there is no option --trainer.max_stepz; did",
    "triner:\n  max_steps: 3": "more.yaml line 2: there is no option --triner.max_steps; did you",
    "evaluate:\n  metric: []": "more.yaml line 2: --evaluate.metric is not an option of callb",
    "model:\n  lr: null": "more.yaml line 2: model.lr=None must be a number, at least 0",
    "data:\n  seed: -1": "more.yaml line 2: data.seed=-1 must be at least 0",
    "trainer: [1]": "more.yaml line 1: trainer is [1]; give its options, as in",
    "trainer:": "more.yaml line 1: trainer is null; give its options",
    "checkpoint: null": "more.yaml line 1: checkpoint is null; give its options",
    "seed_everything: null": "seed_everything=null must be from 0",
    "checkpoint: 5": "more.yaml line 1: checkpoint is 5; give its options",
    "model: {transformer: [1]}": "model.transformer is [1]; give its options, as in --model.transf",
    "model: !!python/object:os.system {}": "line 1: could not determine a constructor for the tag",
    "? [a, b]\n: 3": "more.yaml line 1: the key is not text; write a name",
    "3: 4": "more.yaml line 1: the key 3 is not text; write a name, or quote it",
    "config: other.yaml": "more.yaml line 1: config is not a key; give another -c",
    'trainer: {logger: {name: "a\\0b"}}': "trainer.logger.name holds the character \\0",
    "model: &a {lr: 1, x: *a}": "more.yaml has an alias that refers to itself",
    "a: &a [*a]": "more.yaml has an alias that refers to itself",
    "model: {'lr ': 1}": "more.yaml line 1: model: the key 'lr ' has a space; remove it",
    "evaluate: 3": "evaluate=3 must be an Evaluate or null",
    "trainer: {logger: [3]}": "trainer.logger=3 is no Logger; give the path of a class, as in",
    "data: {sources: {a: null}}": "data.sources.a=None is no Source; give the path of a class",
    "data: {sources: {a: {class_path: tf_lightning.data.TextFiles}}}": "--data.sources.a.paths",
    "data: {class_path: os.path.join}": "os.path.join is no LightningDataModule; give the path",
    "model: {class_path: ''}": "model= is not a class; give the path of a class, as in",
}
FILES = {
    "empty.yaml": "",
    "tab.yaml": "trainer:\n\tmax_steps: 3\n",
    "twice.yaml": "model: {lr: 1}\nmodel: {lr: 2}\n",
    "wrong.yaml": "model:\n  lr: fast\n",
    "key.yaml": "trainer:\n  max_stps: 3\n",
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working directory with a configuration of few callbacks, and files with faults."""

    def short(config: dict) -> None:
        config["trainer"]["callbacks"] = config["trainer"]["callbacks"][:1]

    runs.write_config(tmp_path, short)
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "exported").mkdir()
    for name in ("net.json", "net.safetensors"):
        (tmp_path / "exported" / name).touch()
    (tmp_path / "damaged.ckpt").write_bytes(b"PK\x03\x04\x80\x81")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("option", OPTIONS)
def test_a_slip_in_an_option_is_answered(option, folder, fails):
    code, line = fails(*FIT, option)
    assert code in (1, 2) and OPTIONS[option] in line
    assert not (folder / "run").exists() and not (folder / "data").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_slip_in_a_command_is_answered(command, folder, fails):
    code, line = fails(*command)
    assert code in (1, 2) and COMMANDS[command] in line
    assert not (folder / "run").exists()


@pytest.mark.parametrize("content", CONTENTS)
def test_a_slip_in_a_file_is_answered(content, folder, fails):
    (folder / "more.yaml").write_text(content)
    code, line = fails(*FIT, "-c", "more.yaml")
    assert code in (1, 2) and CONTENTS[content] in line
    assert not (folder / "run").exists() and not (folder / "data").exists()


def test_there_are_a_hundred_of_them():
    assert len(OPTIONS) + len(COMMANDS) >= 100
