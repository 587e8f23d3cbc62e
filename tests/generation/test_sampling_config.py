"""SamplingConfig: ranges, names, and which options an output depends on."""

import ast
import inspect
import subprocess
import sys
from dataclasses import fields

import pytest

from tf_lightning.diffusion.sampler import SAMPLERS
from tf_lightning.errors import UserError
from tf_lightning.generation.sampling import GROUPS, SamplingConfig
from tf_lightning.ranges import hints

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "option",
    [
        {"guidance_scale": NAN},
        {"guidance_scale": INF},
        {"image_guidance_scale": INF},
        {"image_guidance_scale": NAN},
        {"guidance_interval": (-0.1, 1)},
        {"guidance_interval": (0, 1.1)},
        {"guidance_interval": (0.6, 0.5)},
        {"guidance_interval": (NAN, 1)},
        {"guidance_rescale": -0.1},
        {"guidance_rescale": 1.1},
        {"guidance_rescale": NAN},
        {"num_inference_steps": 0},
        {"timestep_shift": 0.0},
        {"timestep_shift": 101.0},
        {"timestep_shift": NAN},
        {"code_temperature": -1.0},
        {"code_top_k": 0},
        {"code_top_p": 0.0},
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": NAN},
        {"temperature": INF},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 2.0},
        {"stop": ("a", "")},
        {"stop": "red"},
        {"max_images": 0},
    ],
)
def test_a_value_out_of_range_is_refused_by_name(option):
    ((name, value),) = option.items()
    with pytest.raises(UserError, match=f"^{name}=.* must be "):
        SamplingConfig(**option)


def test_every_option_has_a_range_that_its_default_meets_or_is_a_name():
    ranges = {name: str(kind) for name, kind in hints(SamplingConfig).items()}
    unchecked = {name for name, kind in ranges.items() if "Annotated" not in kind}
    assert unchecked == {"sampler", "stop"}  # names


def test_every_option_has_a_group_and_its_own_help():
    body = ast.parse(inspect.getsource(SamplingConfig)).body[0].body
    helped = {
        node.target.id
        for node, after in zip(body, body[1:], strict=False)
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr)
    }
    assert helped == {f.name for f in fields(SamplingConfig)}
    assert {f.metadata["group"] for f in fields(SamplingConfig)} == set(GROUPS)


def test_the_help_of_sampler_names_every_sampler():
    source = " ".join(inspect.getsource(SamplingConfig).split())
    assert [name for name in SAMPLERS if name not in source] == []


def test_an_unknown_option_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="no sampling option 'guidance'; use height, width, "):
        SamplingConfig().with_options(guidance=3.0)


def test_an_output_depends_on_the_options_of_its_modality():
    sampling = SamplingConfig(guidance_scale=2.0, temperature=0.5)
    image, codes = sampling.used("image"), sampling.used("image", makes_codes=True)
    text, mixed = sampling.used("text"), sampling.used("any")
    assert image["guidance_scale"] == 2.0 and text["temperature"] == 0.5
    assert "num_inference_steps" in image and "code_top_k" not in image
    assert "code_top_k" in codes and "num_inference_steps" not in codes
    assert "max_images" not in image and set(mixed) == set(image) | set(text) | {"max_images"}


def test_lists_of_a_configuration_file_become_tuples():
    sampling = SamplingConfig(guidance_interval=[0.2, 0.8], stop=["."])
    assert (sampling.guidance_interval, sampling.stop) == ((0.2, 0.8), (".",))
    assert hash(sampling) == hash(SamplingConfig(guidance_interval=(0.2, 0.8), stop=(".",)))


def test_the_options_are_read_without_torch():
    code = "import sys, tf_lightning.generation.sampling; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
