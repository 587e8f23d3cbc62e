"""configs/mixture.yaml trains on emoji, Wikipedia text and image edits in the given shares."""

from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from support.color_font import write_color_font
from tf_lightning.cli.main import main

RECIPE = Path(__file__).resolve().parents[2] / "configs" / "mixture.yaml"


@pytest.mark.slow
def test_the_shares_that_a_run_logs_are_those_that_its_config_asks_for(data_dir, tmp_path):
    """Reads 1,000 rows of the recipe with a small model and fewer edits."""
    config = yaml.safe_load(RECIPE.read_text())
    config["trainer"] |= {"max_steps": 250, "val_check_interval": 250, "limit_val_batches": 1}
    config["trainer"]["logger"]["save_dir"] = str(tmp_path)
    sizes = {"dim": 32, "num_layers": 1, "num_heads": 2, "ffn_dim": 64}
    config["model"]["transformer"] |= sizes
    data = config["data"]
    data["cache_dir"] = str(tmp_path / "data")
    files = {"paths": "valid.txt", "val_paths": "test.txt"}
    texts = {name: [str(data_dir / "wikitext-2" / file)] for name, file in files.items()}
    data["sources"]["text"]["init_args"] = texts
    font = write_color_font(tmp_path / "emoji.ttf")
    data["sources"]["emoji"]["init_args"] |= {"font": str(font), "val_fraction": 0.3}
    data["sources"]["edits"]["init_args"] |= {"num_documents": 300, "num_val": 4}
    file = tmp_path / "mixture.yaml"
    file.write_text(yaml.safe_dump(config))
    main(["fit", "-c", str(file)])
    events = EventAccumulator(str(tmp_path / "mixture")).Reload()
    asked = data["weights"]
    assert sum(asked.values()) == 1 and len(asked) == 3
    for name, share in asked.items():
        last = events.Scalars(f"train/mixture/{name}")[-1]
        assert last.step >= 240
        assert last.value == pytest.approx(share, abs=0.01)
