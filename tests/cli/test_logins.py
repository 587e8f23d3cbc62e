"""The config.yaml of a run has no logins and queries of URLs."""

from types import SimpleNamespace

from jsonargparse import Namespace
from torch import nn

from tf_lightning.cli.config_parser import ConfigParser, hide_logins
from tf_lightning.cli.run_callbacks import SaveFitConfig
from tf_lightning.remote.urls import public_url

LOGIN = "https://me:secret@host:80/{a,b}.tar"
SIGNED = "https://host/a.tar?file=1&X-Amz-Signature=secret&apikey=secret"


def test_urls_are_written_without_logins_and_queries():
    source = Namespace(class_path="TextFiles", init_args=Namespace(paths=[LOGIN, SIGNED, "a@b"]))
    config = Namespace(data=Namespace(sources={"text": source}, seed=1), name="s3://bucket/a@b?c")
    hidden = hide_logins(config)
    paths = hidden.data.sources["text"].init_args.paths
    assert paths == ["https://host:80/{a,b}.tar", public_url(SIGNED), "a@b"]
    assert "secret" not in str(hidden)
    assert (hidden.data.seed, hidden.name) == (1, config.name)
    assert source.init_args.paths[0] == LOGIN  # the run itself uses it


def test_the_file_of_a_run_has_no_secret(tmp_path):
    parser = ConfigParser()
    parser.add_argument("--paths", type=list[str])
    callback = SaveFitConfig(parser, Namespace(paths=[LOGIN, SIGNED]))
    trainer = SimpleNamespace(is_global_zero=True, default_root_dir=tmp_path, loggers=[])
    callback.on_train_start(trainer, nn.Linear(1, 1))
    assert "host" in (text := (tmp_path / "config.yaml").read_text()) and "secret" not in text
