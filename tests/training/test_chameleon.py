"""Images as discrete tokens: packing, storage, training, resume, generation and refusals."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks.prompts import as_image
from support import ranks, runs
from support.tiny import IMAGE_CODES as PICTURE
from support.tiny import SIZES, TOKENIZER, code_batch
from tf_lightning.autoencoder.frozen import load_autoencoder
from tf_lightning.autoencoder.network import AutoencoderConfig, build_autoencoder, save_network
from tf_lightning.batch import IGNORE_INDEX, pack, unpack
from tf_lightning.cli.main import main
from tf_lightning.data import Mixture
from tf_lightning.data.images import to_pixels
from tf_lightning.errors import UserError
from tf_lightning.generation.pipeline import TransfusionPipeline
from tf_lightning.model.attention import DenseAttention
from tf_lightning.model.transformer import TransformerConfig
from tf_lightning.shapes.sources import ShapesCaptions, ShapesTexts
from tf_lightning.training.module import Transfusion

BOS, EOS, BOI, EOI, NONE = 1, 2, 18, 19, IGNORE_INDEX


def test_codes_are_packed_as_tokens_and_all_of_them_are_targets():
    batch = code_batch()
    first = [
        # id, label, image: <bos> 5 6 <boi> 23 20 30 23 <eoi> <eos>
        *((BOS, 5, -1), (5, 6, -1), (6, BOI, -1), (BOI, 23, -1)),
        *((23, 20, 0), (20, 30, 0), (30, 23, 0), (23, EOI, 0), (EOI, EOS, -1), (EOS, NONE, -1)),
    ]
    alone = [
        # without a caption there are no text targets, as with latents
        *((BOS, NONE, -1), (BOI, 23, -1), (23, 20, 1), (20, 30, 1), (30, 23, 1), (23, EOI, 1)),
        *((EOI, NONE, -1), (EOS, NONE, -1)),
    ]
    fields = batch.input_ids, batch.labels, batch.image_ids
    rows = [list(zip(*(field[row].tolist() for field in fields), strict=True)) for row in (0, 1)]
    assert rows[0][:10] == first and rows[1][:8] == alone
    assert batch.code_index.tolist() == [3, 4, 5, 6, 7, 21, 22, 23, 24, 25, 29, 30, 31, 32, 33]
    assert batch.target_index.tolist() == [0, 1, 2, 8, 10, 11, 28, 34, 35]
    assert batch.num_images == 3 and len(batch.noise) == len(batch.t) == 0
    assert torch.equal(batch.latents[0], PICTURE)
    shapes = [[part.ndim for part in parts] for parts in unpack(batch, TOKENIZER)]
    assert shapes == [[1, 3], [1], [3], [3, 1]]
    assert torch.equal(unpack(batch, TOKENIZER)[3][0], PICTURE.flip(-1))


def test_codes_and_patches_have_the_same_text_targets():
    latents = torch.randn(3, 2, 2)
    document = [torch.tensor([5, 6]), PICTURE, torch.tensor([7])]
    pair = [
        pack([[parts]], [0], tokenizer=TOKENIZER, row_length=12, patch_size=1)
        for parts in (document, [document[0], latents, document[2]])
    ]
    assert pair[0].target_index.tolist() == pair[1].target_index.tolist()
    assert len(pair[1].code_index) == 0 and len(pair[0].code_index) == 5


def tiny_module(**changed) -> Transfusion:
    torch.manual_seed(0)
    arguments = {"patch_size": 1, "num_codes": 11, "z_loss_weight": 0.1} | changed
    module = Transfusion(TransformerConfig(vocab_size=20, **SIZES), **arguments)
    module.configure_model()
    return module


def test_the_loss_is_the_lm_loss_of_all_tokens_plus_z_loss(monkeypatch):
    module, batch = tiny_module(), code_batch()
    logged = {}
    trainer = SimpleNamespace(world_size=1)
    monkeypatch.setattr(Transfusion, "trainer", trainer)
    monkeypatch.setattr(module, "log_dict", lambda values, **_: logged.update(values))
    loss = module.training_step(batch, 0)
    # By hand: each document alone, the label of every position, one mean over all of them.
    nll, z, kinds = [], [], []
    for row in range(2):
        for number in range(2):
            mine = batch.document_ids[row] == number
            ids, labels = batch.input_ids[row][mine], batch.labels[row][mine]
            trunk = module.net.transformer
            layout = SimpleNamespace(
                document_ids=torch.zeros(1, len(ids)), image_ids=torch.full((1, len(ids)), -1),
                copied=torch.empty(0),
            )  # fmt: skip
            x = trunk.tok_embeddings(ids)[None]
            hidden = trunk(x, torch.arange(len(ids))[None], DenseAttention(layout, True))
            logits = trunk.output(hidden[0])[labels != NONE]
            labels = labels[labels != NONE]
            nll.append(-F.log_softmax(logits, -1)[torch.arange(len(labels)), labels])
            z.append(logits.exp().sum(-1).log() ** 2)
            kinds.append((labels >= 20) | (labels == EOI))
    nll, z, kinds = torch.cat(nll), torch.cat(z), torch.cat(kinds)
    assert loss.item() == pytest.approx((nll.mean() + 0.1 * z.mean()).item(), rel=1e-5)
    for name, expected in {
        "loss_lm": nll[~kinds].mean(), "loss_codes": nll[kinds].mean(), "loss_z": z.mean(),
    }.items():  # fmt: skip
        assert logged[f"train/{name}"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert "train/loss_diffusion" not in logged
    loss.backward()
    assert all(weight.grad is not None for weight in module.net.parameters())


def pair_of_mixtures(folder) -> list[Mixture]:
    """The same documents as latents of 16 patches and as 64 codes."""
    sources = {"captions": ShapesCaptions(24, 4), "text": ShapesTexts(20, 4)}
    made = [
        Mixture(
            sources, autoencoder=name, patch_size=size, vocab_size=300, row_length=256,
            batch_size=2, cache_dir=str(folder), image_first_prob=0.3, caption_drop_prob=0.3,
        )
        for name, size in (("shapes", 2), ("shapes_vq", 1))
    ]  # fmt: skip
    for data in made:
        data.setup()
    return made


def told(part: torch.Tensor) -> str:
    return "picture" if part.ndim == 3 else str(part.tolist())


def test_latents_and_codes_have_the_same_documents_in_rows_of_the_same_length(tmp_path):
    pair = pair_of_mixtures(tmp_path)
    shown = []
    for data in pair:
        rows = data.train_dataloader().dataset.corpora[0]
        assert rows.row_length == 256
        documents = [document for row in range(rows.rows_per_epoch) for document in rows.row(row)]
        shown.append(sorted(str([told(part) for part in parts]) for parts in documents))
    assert shown[0] == shown[1] and "['picture']" in shown[0]  # the same captions are dropped
    codes = next(part for part in documents[0] if part.ndim == 3)
    assert codes.dtype == torch.int64 and codes.shape == (1, 8, 8) and codes.max() < 512
    assert [data.num_codes for data in pair] == [None, 512]
    stored = sorted(pair[1].corpora["train"]["captions"].document(0), key=torch.Tensor.dim)[1]
    picture = sorted(next(ShapesCaptions(24, 4).documents("train")), key=lambda p: type(p) is str)[
        0
    ]
    expected = load_autoencoder("shapes_vq").encode(to_pixels(as_image(picture))[None])[0]
    assert torch.equal(stored, expected)


def chameleon(config: dict) -> None:
    """The tests' run with codes and every option of Chameleon."""
    config["model"] |= {"num_codes": 512, "patch_size": 1, "z_loss_weight": 1e-5}
    own = {"norm_order": "post", "qk_norm": "layer", "dropout": 0.1}
    config["model"]["transformer"] |= own
    config["data"]["init_args"] |= {"autoencoder": "shapes_vq", "patch_size": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chameleon")
    main(["fit", "-c", str(runs.write_config(folder, chameleon))])
    return folder / "run"


def test_the_same_callbacks_evaluate_it_and_record_how_codes_were_sampled(run):
    numbers = json.loads((run / "metrics" / "step0000006-val.json").read_text())["numbers"]
    protocols = {number["name"]: number["protocol"] for number in numbers}
    assert {"val/fid[shapes]", "val/clip_score[shapes]", "val/cider[shapes]"} <= protocols.keys()
    assert {"val/captions/loss_codes", "val/captions/perplexity"} <= protocols.keys()
    assert "val/captions/loss_diffusion" not in protocols
    told = protocols["val/fid[shapes]"]
    assert told["code_temperature"] == 1.0 and told["guidance_scale"] == 2.0
    assert "sampler" not in told and "num_inference_steps" not in told
    events = EventAccumulator(str(run)).Reload()
    for name in ("loss", "loss_lm", "loss_codes", "loss_z", "images_per_token"):
        assert all(math.isfinite(e.value) for e in events.Scalars(f"train/{name}"))
    report = json.loads((run / "report.json").read_text())
    assert {"one_object", "caption_accuracy", "code_temperature"} <= report.keys()


def test_a_killed_and_resumed_run_equals_the_uninterrupted_one_with_dropout(run, tmp_path):
    config = str(runs.write_config(tmp_path, chameleon))
    kill = ["--trainer.callbacks+=support.runs.StopAt", "--trainer.callbacks.step=5"]
    with pytest.raises(runs.Killed):
        main(["fit", "-c", config, *kill])
    main(["fit", "-c", config, "--ckpt_path", "last"])
    whole, resumed = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (run, tmp_path / "run")
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """Three steps of one rank, without dropout, whose random numbers differ between ranks."""
    folder = tmp_path_factory.mktemp("alone")
    ranks.fit(runs.write_config(folder, without_dropout), 1, "auto")
    return folder


def without_dropout(config: dict) -> None:
    ranks.two_rank_config(config)
    chameleon(config)
    config["model"]["transformer"]["dropout"] = 0.0


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", json.dumps(ranks.SHARDED)], ids=["ddp", "sharded"])
def test_two_ranks_equal_one_although_some_batches_have_no_codes(alone, tmp_path, strategy):
    cache = f"--data.init_args.cache_dir={alone}/data"
    ranks.fit(runs.write_config(tmp_path, without_dropout), 2, strategy, cache)
    codec = {"autoencoder": "shapes_vq", "patch_size": 1}
    pictures = ranks.images_in_rows(alone / "data", 6, **codec)
    assert 0 in pictures and max(pictures) > 0
    losses = ("loss", "loss_lm", "loss_codes", "loss_z")
    ranks.check_same(alone / "run", tmp_path / "run", losses, 3)


def test_it_generates_whole_images_and_captions(run, tmp_path):
    pipe = TransfusionPipeline.from_pretrained(run / "checkpoints" / "last.ckpt")
    out = pipe(["a red circle", "a blue square"], num_outputs=2, progress=False)
    assert [picture.size for picture in out.images] == [(64, 64)] * 4
    assert pipe("a red circle", progress=False, seed=1).images[0] == out.images[1]
    assert len(pipe(out.images, progress=False, max_new_tokens=4).texts) == 4
    foreign = {"sampler": "DDIMScheduler", "timestep_shift": 2.0, "guidance_rescale": 0.5}
    for name, value in foreign.items():
        with pytest.raises(UserError, match=f"{name}=.* is an option of denoising and this model"):
            pipe("a", **{name: value})
    checkpoint = str(run / "checkpoints" / "last.ckpt")
    out = tmp_path / "out"
    how = ["--code-temperature", "0.5", "--code-top-k", "9", "-n", "1", "-o", str(out)]
    main(["generate", checkpoint, "a red circle", *how])
    assert '"code_top_k": 9' in (out / "0000.json").read_text()
    assert (out / "0000.png").is_file()


MISFITS = {
    "--model.num_codes=256": "has 512 codes but the model has 256 codes",
    "--data.init_args.autoencoder=shapes": "has continuous latents but the model has 512 codes",
    "--model.num_codes=null": "has 512 codes but the model has continuous latents",
    "--model.patch_size=2": "makes each image code a token",
    "--data.init_args.clean_copies=true": "give patch_size: 1, clean_copies: false",
    "--model.transformer.modality_weights=all": "modality_weights: shared",
}


@pytest.mark.parametrize("argument", MISFITS)
def test_incompatible_options_are_reported_before_anything_is_prepared(argument, tmp_path, refused):
    line = refused("fit", "-c", runs.write_config(tmp_path, chameleon), argument)
    assert MISFITS[argument] in line
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob("data/*-train-*"))


def test_a_vq_with_another_codebook_than_the_checkpoints_is_refused(run, tmp_path, refused):
    sizes = {"layers_per_block": 1, "norm_groups": 2, "mid_attention": False, "num_codes": 32}
    save_network(build_autoencoder(AutoencoderConfig((4, 8), **sizes)), tmp_path / "vq", {})
    checkpoint = run / "checkpoints" / "last.ckpt"
    config = runs.write_config(tmp_path, chameleon)
    other = f"--data.init_args.autoencoder={tmp_path}/vq"
    told = "has 32 codes but the model has 512 codes"
    for verb in ("validate", "predict"):
        assert told in refused(verb, "-c", config, "--ckpt_path", checkpoint, other)
    content = torch.load(checkpoint, weights_only=True)
    content["image_codec"]["autoencoder"] = str(tmp_path / "vq")  # replaced after training
    torch.save(content, tmp_path / "moved.ckpt")
    assert told in refused(
        "generate", tmp_path / "moved.ckpt", "a red circle", "-o", tmp_path / "o"
    )
    assert not (tmp_path / "o").exists() and not list(tmp_path.glob("data/*-val-*"))
