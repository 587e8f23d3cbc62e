"""The diffusion processes against diffusers, second implementations and closed forms."""

import math

import pytest
import torch
from torch import Tensor

from tf_lightning.diffusion.process import (
    DDPM,
    PREDICTION_TYPES,
    DiffusionProcess,
    RectifiedFlow,
    alphas_cumprod,
    build_process,
    cosine_betas,
    linear_betas,
    process_from_hparams,
)
from tf_lightning.errors import UserError

TIMESTEPS = torch.tensor([0, 1, 250, 700, 999])
LEVELS = (TIMESTEPS + 0.5) / 1000  # noise levels that DDPM rounds down to TIMESTEPS


def reference(num_train_timesteps: int = 1000, beta_schedule: str = "squaredcos_cap_v2"):
    from diffusers.schedulers import DDPMScheduler

    return DDPMScheduler(num_train_timesteps, beta_schedule=beta_schedule)


@pytest.mark.parametrize("num_train_timesteps", [10, 1000])
def test_alphas_cumprod_matches_diffusers(num_train_timesteps):
    expected = reference(num_train_timesteps).alphas_cumprod
    ours = alphas_cumprod(cosine_betas(num_train_timesteps))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, atol=2e-6, rtol=1e-3)


def test_the_linear_schedule_matches_diffusers():
    expected = reference(beta_schedule="linear").alphas_cumprod
    torch.testing.assert_close(alphas_cumprod(linear_betas()), expected, atol=2e-6, rtol=1e-3)


@pytest.mark.parametrize("ours, theirs", [("add_noise", "add_noise"), ("target", "get_velocity")])
def test_noising_and_velocity_match_diffusers(ours, theirs):
    scheduler, process = reference(), DDPM("v_prediction")
    latents, noise = torch.randn(2, 5, 3, 4, 4)
    expected = getattr(scheduler, theirs)(latents, noise, TIMESTEPS)
    process.alphas_cumprod.copy_(scheduler.alphas_cumprod)
    torch.testing.assert_close(getattr(process, ours)(latents, noise, LEVELS), expected)


def test_noising_of_a_flow_matches_diffusers():
    from diffusers.schedulers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    latents, noise = torch.randn(2, 3, 3, 4, 4)
    timesteps = scheduler.timesteps[[10, 500, 900]]
    expected = scheduler.scale_noise(latents, timesteps, noise)
    ours = RectifiedFlow().add_noise(latents, noise, timesteps / 1000)
    torch.testing.assert_close(ours, expected)


def test_the_flow_target_is_the_derivative_of_x_t():
    flow = RectifiedFlow()
    latents, noise = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    later, earlier = (
        flow.add_noise(latents, noise, t) for t in torch.tensor([[0.4], [0.3]]).double()
    )
    target = flow.target(latents, noise, torch.tensor([0.4]))
    torch.testing.assert_close(target, (later - earlier) / 0.1)


def test_the_schedule_ends_in_noise_alone():
    ours = alphas_cumprod(cosine_betas())
    assert ours[0] > 0.999
    assert ours[-1] < 1e-6
    assert (ours.diff() < 0).all()


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_exact_predictions_give_back_latents_and_noise(prediction_type):
    process, t = build_process(prediction_type), torch.tensor([0.02, 0.3, 0.5, 0.8, 0.97])
    latents, noise = torch.randn(2, 5, 3, 4, 4)
    x_t = process.add_noise(latents, noise, t)
    output = process.target(latents, noise, t)
    x_0 = process.predicted_x_0(x_t, output, t)
    torch.testing.assert_close(x_0, latents, atol=2e-5, rtol=1e-4)
    alpha_t, sigma_t = process.coefficients(t)
    epsilon = (x_t - alpha_t * x_0) / sigma_t
    torch.testing.assert_close(epsilon, noise, atol=2e-4, rtol=1e-4)
    again = process.target(x_0, epsilon, t)
    torch.testing.assert_close(again, output, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_predicted_x_0_equals_that_of_diffusers(prediction_type):
    from diffusers.schedulers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type, clip_sample=False
    )
    scheduler.set_timesteps(1000)
    process = DDPM(prediction_type)
    process.alphas_cumprod.copy_(scheduler.alphas_cumprod)
    x_t, output = torch.randn(2, 4, 3, 4, 4)
    timesteps = torch.tensor([0, 5, 300, 900])
    ours = process.predicted_x_0(x_t, output, (timesteps + 0.5) / 1000)
    for index, timestep in enumerate(timesteps.tolist()):
        step = scheduler.step(output[index], timestep, x_t[index])
        torch.testing.assert_close(ours[index], step.pred_original_sample)


def test_the_target_is_the_quantity_that_the_prediction_type_names():
    latents, noise = torch.randn(2, 1, 3, 4, 4)
    t = torch.tensor([0.7])
    assert torch.equal(DDPM("epsilon").target(latents, noise, t), noise)
    process = DDPM("v_prediction")
    alpha_t, sigma_t = process.coefficients(t)
    v = process.target(latents, noise, t)
    assert torch.equal(v, alpha_t * noise - sigma_t * latents)
    assert torch.equal(RectifiedFlow().target(latents, noise, t), noise - latents)


# Min-SNR


def losses(process: DiffusionProcess, t: Tensor, error: Tensor) -> Tensor:
    """Loss of each image (M,), for outputs that differ from their targets by `error`."""
    latents, noise = torch.randn(2, *error.shape, generator=torch.Generator().manual_seed(0))
    output = process.target(latents, noise, t) + error
    parts = zip(output.split(1), latents.split(1), noise.split(1), t.split(1), strict=True)
    return torch.stack([process.loss_sum(*part) for part in parts])


def test_min_snr_weights_equal_the_papers():
    from diffusers.training_utils import compute_snr

    snr = compute_snr(reference(), TIMESTEPS)
    least = torch.minimum(snr, torch.tensor(5.0))
    for name, expected in (("epsilon", least / snr), ("v_prediction", least / (snr + 1))):
        weight = losses(DDPM(name, min_snr_gamma=5.0), LEVELS, torch.ones(5, 1, 1, 1))
        torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_weighted_error_is_the_clipped_snr_times_the_error_in_x_0(prediction_type):
    process = build_process(prediction_type, min_snr_gamma=5.0)
    t = torch.tensor([0.02, 0.3, 0.5, 0.8, 0.97])
    latents, noise, error = torch.randn(3, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x_t = process.add_noise(latents, noise, t)
    output = process.target(latents, noise, t) + error
    x_0 = process.predicted_x_0(x_t, output, t)
    alpha_t, sigma_t = process.coefficients(t)
    snr = (alpha_t / sigma_t) ** 2
    expected = (snr.clamp(max=5.0) * (x_0 - latents) ** 2).sum((1, 2, 3))
    parts = zip(output.split(1), latents.split(1), noise.split(1), t.split(1), strict=True)
    ours = torch.stack([process.loss_sum(*part) for part in parts])
    torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-4)


def test_min_snr_gives_a_clean_image_of_a_flow_no_weight():
    flow = RectifiedFlow(min_snr_gamma=5.0)
    assert losses(flow, torch.zeros(1), torch.ones(1, 1, 1, 1)) == 0


# Training


SHAPE = (6, 3, 4, 4)
T = torch.tensor([0.0, 0.0004, 0.2, 0.5, 0.9, 0.9996])


def latents_and_noise() -> Tensor:
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))


def mean_output(process: DiffusionProcess, t: Tensor, x_t: Tensor) -> Tensor:
    """The best output E[target | x_t] for standard normal data, in closed form."""
    alpha_t, sigma_t = process.coefficients(t)
    variance = alpha_t**2 + sigma_t**2
    x_0, epsilon = alpha_t / variance * x_t, sigma_t / variance * x_t
    return {
        "epsilon": epsilon,
        "v_prediction": alpha_t * epsilon - sigma_t * x_0,
        "flow": epsilon - x_0,
    }[process.prediction_type]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow"])
def test_the_analytic_denoiser_of_gaussian_data_has_the_smallest_loss(
    prediction_type,
):
    process, t = build_process(prediction_type), torch.tensor([0.3])
    generator = torch.Generator().manual_seed(1)
    latents, noise = torch.randn(2, 1, 1, 300, 300, generator=generator)
    x_t = process.add_noise(latents, noise, t)
    alpha_t, sigma_t = (c.item() for c in process.coefficients(t))
    best = mean_output(process, t, x_t)
    loss = process.loss_sum(best, latents, noise, t) / latents.numel()
    # Variance of the target given x_t: alpha^2 for eps, 1 for v, (alpha + sigma)^2 for the flow,
    # each divided by alpha^2 + sigma^2, which is 1 for DDPM.
    expected = {"epsilon": alpha_t**2, "v_prediction": 1.0, "flow": 1.0}[prediction_type]
    variance = alpha_t**2 + sigma_t**2
    assert loss.item() == pytest.approx(expected / variance, rel=0.02)
    for other in (0.9 * best - 0.02 * x_t, 1.1 * best + 0.02 * x_t):
        assert process.loss_sum(other, latents, noise, t) / latents.numel() > loss


def test_the_network_receives_t_of_a_flow_and_the_rounded_t_of_ddpm():
    assert torch.equal(RectifiedFlow().model_timesteps(T), T)
    ddpm = DDPM(num_train_timesteps=1000)
    assert ddpm.timesteps(T).tolist() == [0, 0, 200, 500, 900, 999]
    expected = torch.tensor([0.0, 0.0, 0.2, 0.5, 0.9, 0.999])
    torch.testing.assert_close(ddpm.model_timesteps(T), expected)


def test_a_flow_interpolates_linearly_between_latents_and_noise():
    latents, noise = latents_and_noise()
    flow = RectifiedFlow()
    for index, t in enumerate(T.tolist()):
        x_t = flow.add_noise(latents, noise, T)[index]
        torch.testing.assert_close(x_t, torch.lerp(latents[index], noise[index], t))


def test_the_noise_schedule_is_selected_by_name():
    cosine, linear = DDPM(), DDPM(noise_schedule="linear")
    assert linear.alphas_cumprod[500].item() == pytest.approx(
        math.prod(1 - (1e-4 + (0.02 - 1e-4) * i / 999) for i in range(501)), rel=1e-5
    )
    assert not torch.isclose(cosine.alphas_cumprod[500], linear.alphas_cumprod[500], rtol=0.1)


def test_min_snr_weights_each_image():
    latents, noise = latents_and_noise()
    output = torch.randn(SHAPE)
    plain, weighted = DDPM("v_prediction"), DDPM("v_prediction", min_snr_gamma=5.0)
    total = weighted.loss_sum(output, latents, noise, T).item()
    expected = 0.0
    for i in range(len(T)):
        alpha_bar = plain.alphas_cumprod[int(T[i] * 1000)].item()
        snr = alpha_bar / (1 - alpha_bar)
        error = plain.loss_sum(
            output[i : i + 1], latents[i : i + 1], noise[i : i + 1], T[i : i + 1]
        )
        expected += min(snr, 5.0) / (snr + 1) * error.item()
    assert total == pytest.approx(expected, rel=1e-4)


def test_tables_move_with_the_module_and_stay_out_of_checkpoints():
    process = DDPM(learned_sigma=True)
    assert process.state_dict() == {}
    assert process.to(torch.float64).alphas_cumprod.dtype == torch.float64


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"prediction_type": "x0"}, "'x0' must be one of"),
        ({"noise_schedule": "sigmoid"}, "'sigmoid' must be one of"),
        ({"num_train_timesteps": 1}, "=1 must be at least 2"),
        ({"prediction_type": "flow", "noise_schedule": "linear"}, "a flow has none"),
        ({"prediction_type": "flow", "learned_sigma": True}, "use 'epsilon' or 'v_prediction'"),
        ({"min_snr_gamma": 0.0}, "must be above 0"),
    ],
)
def test_an_impossible_process_is_refused_in_one_sentence(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        build_process(**arguments)
    assert "\n" not in str(caught.value)


# Learned sigma


def hybrid_by_hand(
    process: DiffusionProcess, output: Tensor, latents: Tensor, noise: Tensor
) -> float:
    """L_simple + 0.001 * 1000 * L_vlb from diffusers' steps and torch's distributions, in fp64."""
    from diffusers.schedulers import DDPMScheduler
    from torch.distributions import Normal, kl_divergence

    scheduler = DDPMScheduler(
        1000,
        trained_betas=None,
        beta_schedule="squaredcos_cap_v2",
        prediction_type=process.prediction_type,
        variance_type="learned_range",
        clip_sample=False,
    )
    alphas_cumprod = (1 - scheduler.betas.double()).cumprod(0)
    scheduler.alphas_cumprod = alphas_cumprod
    total = 0.0
    for index, timestep in enumerate(process.timesteps(T).tolist()):
        prediction, v = output[index].double().chunk(2)
        x_0, epsilon = latents[index].double(), noise[index].double()
        x_t = scheduler.add_noise(x_0, epsilon, torch.tensor([timestep]))
        target = (
            epsilon
            if process.prediction_type == "epsilon"
            else scheduler.get_velocity(x_0, epsilon, torch.tensor([timestep]))
        )
        total += ((prediction - target) ** 2).sum().item()
        # diffusers' posterior mean for a given x_0 is the step of a "sample" model that outputs it.
        sample = DDPMScheduler(
            1000, beta_schedule="squaredcos_cap_v2", prediction_type="sample", clip_sample=False
        )
        sample.alphas_cumprod = alphas_cumprod
        alpha_bar = alphas_cumprod[timestep]
        x_0_hat = (
            (x_t - (1 - alpha_bar).sqrt() * prediction) / alpha_bar.sqrt()
            if process.prediction_type == "epsilon"
            else alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * prediction
        )
        means = []
        for x in (x_0, x_0_hat):
            generator = torch.Generator().manual_seed(0)
            if timestep == 0:
                means.append(x)
                continue
            stepped = sample.step(x, timestep, x_t, generator=generator).prev_sample
            generator = torch.Generator().manual_seed(0)
            drawn = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            means.append(stepped - sample._get_variance(timestep).sqrt() * drawn)
        log_variance = scheduler._get_variance(timestep, predicted_variance=v)
        if timestep == 0:  # diffusers clips to 1e-20 there; iDDPM uses timestep 1
            least, most = scheduler._get_variance(1, variance_type="fixed_small"), 1 - alpha_bar
            log_variance = ((v + 1) * most.log() + (1 - v) * least.log()) / 2
        predicted = Normal(means[1], (0.5 * log_variance).exp())
        if timestep == 0:
            mass = predicted.cdf(x_0 + 1 / 255) - predicted.cdf(x_0 - 1 / 255)
            nats = -mass.clamp(min=1e-12).log()
        else:
            true = Normal(
                means[0], scheduler._get_variance(timestep, variance_type="fixed_small").sqrt()
            )
            nats = kl_divergence(true, predicted)
        total += nats.sum().item() / math.log(2)
    return total


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_hybrid_loss_equals_a_second_implementation(prediction_type):
    process = DDPM(prediction_type, learned_sigma=True)
    latents, noise = latents_and_noise()
    output = 0.3 * torch.randn(6, 6, 4, 4, generator=torch.Generator().manual_seed(2))
    ours = process.loss_sum(output, latents, noise, T).item()
    assert ours == pytest.approx(hybrid_by_hand(process, output, latents, noise), rel=2e-3)


def test_the_variational_term_trains_the_variance_only():
    latents, noise = latents_and_noise()
    output = torch.randn(6, 6, 4, 4).requires_grad_(True)
    DDPM(learned_sigma=True).loss_sum(output, latents, noise, T).backward()
    plain = output.detach()[:, :3].requires_grad_(True)
    DDPM().loss_sum(plain, latents, noise, T).backward()
    torch.testing.assert_close(output.grad[:, :3], plain.grad)
    assert output.grad[:, 3:].abs().sum() > 0


def test_the_loss_of_no_images_is_zero():
    empty, t = torch.empty(0, 1, 1, 1), torch.empty(0)
    for learned, channels in ((False, 1), (True, 2)):
        output = torch.empty(0, channels, 1, 1)
        assert DDPM(learned_sigma=learned).loss_sum(output, empty, empty, t) == 0


def test_the_process_of_a_checkpoint_has_its_hyper_parameters():
    hparams = {"prediction_type": "v_prediction", "noise_schedule": "linear", "num_codes": None}
    process = process_from_hparams(hparams | {"num_train_timesteps": 10, "lr": 1.0})
    assert isinstance(process, DDPM) and process.prediction_type == "v_prediction"
    torch.testing.assert_close(process.alphas_cumprod, alphas_cumprod(linear_betas(10)))
    assert isinstance(process_from_hparams({"prediction_type": "flow"}), RectifiedFlow)
    assert process_from_hparams(hparams | {"num_codes": 512}) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "mean squared error of epsilon over latent elements"),
        (
            {"prediction_type": "v_prediction", "min_snr_gamma": 5.0},
            "mean squared error of v_prediction over latent elements, times its min-SNR weight "
            "(gamma 5)",
        ),
        (
            {"learned_sigma": True, "num_train_timesteps": 500},
            "mean squared error of epsilon over latent elements, plus 0.5 x the VLB in bits",
        ),
        ({"prediction_type": "flow"}, "mean squared error of velocity over latent elements"),
    ],
)
def test_the_definition_of_a_loss_names_all_its_terms(options, words):
    assert build_process(**options).loss_definition == words
