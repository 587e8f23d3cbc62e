"""Guidance formulas at points with a known result."""

import torch

from tf_lightning.diffusion.guidance import Guidance, guide, guide_edit, rescale


def outputs(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 2, 4, 4, generator=generator) for _ in range(count)]


def test_guidance_extrapolates_from_unconditional_to_conditional():
    cond, uncond = torch.tensor([3.0]), torch.tensor([1.0])
    assert [guide(cond, uncond, s).item() for s in (0, 1, 2.5)] == [1, 3, 6]


def test_editing_guides_text_and_images_separately():
    cond, seen, uncond = outputs(3)
    same = torch.testing.assert_close
    same(guide_edit(cond, seen, uncond, 1.0, 1.0), cond)
    same(guide_edit(cond, seen, uncond, 0.0, 1.0), seen)
    same(guide_edit(cond, seen, uncond, 0.0, 0.0), uncond)
    same(guide_edit(cond, seen, uncond, 4.0, 4.0), guide(cond, uncond, 4.0))
    same(guide_edit(cond, seen, seen, 7.0, 3.0), guide(cond, seen, 7.0))


def test_rescaled_guidance_has_the_spread_of_the_conditional_output():
    cond, uncond = outputs(2)
    guided = guide(cond, uncond, 9.0)
    spread = lambda x: x.flatten(1).std(1)  # noqa: E731
    assert (spread(guided) > 2 * spread(cond)).all()
    torch.testing.assert_close(spread(rescale(guided, cond, 1.0)), spread(cond))
    torch.testing.assert_close(rescale(guided, cond, 0.0), guided)
    half = (guided + rescale(guided, cond, 1.0)) / 2
    torch.testing.assert_close(rescale(guided, cond, 0.5), half)


def test_rescaling_equals_diffusers():
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    cond, uncond = outputs(2)
    guided = guide(cond, uncond, 5.0)
    theirs = rescale_noise_cfg(guided, cond, guidance_rescale=0.7)
    torch.testing.assert_close(rescale(guided, cond, 0.7), theirs)


def test_there_are_only_the_branches_that_the_scales_need():
    everything, nothing = (True, True), (False, False)
    assert Guidance(1.0).branches == [everything]
    assert Guidance(3.0).branches == [everything, nothing]
    assert Guidance(1.0, image_scale=1.5).branches == [everything, (False, True), nothing]


def test_outputs_are_combined_in_the_order_of_the_branches():
    cond, seen, uncond = outputs(3)
    same = torch.testing.assert_close
    same(Guidance(3.0).combine([cond], 2), cond)  # outside the interval
    same(Guidance(3.0).combine([cond, uncond], 2), guide(cond, uncond, 3.0))
    edit = Guidance(7.0, image_scale=1.5)
    same(edit.combine([cond, seen, uncond], 2), guide_edit(cond, seen, uncond, 7.0, 1.5))
    rescaled = Guidance(3.0, rescale=0.7).combine([cond, uncond], 2)
    same(rescaled, rescale(guide(cond, uncond, 3.0), cond, 0.7))


def test_the_learned_variance_is_that_of_the_full_prompt():
    cond, uncond = outputs(2)
    combined = Guidance(3.0, rescale=0.7).combine([cond, uncond], 1)
    alone = Guidance(3.0, rescale=0.7).combine([cond[:, :1], uncond[:, :1]], 1)
    assert torch.equal(combined, torch.cat([alone, cond[:, 1:]], 1))


def test_guidance_acts_inside_its_interval():
    guidance = Guidance(2.0, interval=(0.2, 0.6))
    assert [guidance.acts_at(t) for t in (0.1, 0.2, 0.6, 0.7)] == [False, True, True, False]
    assert not Guidance(1.0).acts_at(0.5)
