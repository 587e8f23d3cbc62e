"""What the denoiser learns, against second implementations and analytic targets."""

import math

import pytest
import torch
from torch import Tensor

from tf_lightning.diffusion.process import Objective
from tf_lightning.errors import UserError

SHAPE = (6, 3, 4, 4)
T = torch.tensor([0.0, 0.0004, 0.2, 0.5, 0.9, 0.9996])


def latents_and_noise() -> Tensor:
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))


def mean_output(objective: Objective, t: Tensor, x_t: Tensor) -> Tensor:
    """The best output for standard normal data, where all is Gaussian: E[target | x_t]."""
    alpha_t, sigma_t = objective.coefficients(t)
    variance = alpha_t**2 + sigma_t**2
    x_0, epsilon = alpha_t / variance * x_t, sigma_t / variance * x_t
    return {
        "epsilon": epsilon,
        "v_prediction": alpha_t * epsilon - sigma_t * x_0,
        "flow": epsilon - x_0,
    }[objective.prediction_type]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow"])
def test_the_analytic_denoiser_of_gaussian_data_has_the_analytic_loss_and_no_other_beats_it(
    prediction_type,
):
    objective, t = Objective(prediction_type), torch.tensor([0.3])
    generator = torch.Generator().manual_seed(1)
    latents, noise = torch.randn(2, 1, 1, 300, 300, generator=generator)
    x_t = objective.add_noise(latents, noise, t)
    alpha_t, sigma_t = (c.item() for c in objective.coefficients(t))
    best = mean_output(objective, t, x_t)
    loss = objective.loss_sum(best, latents, noise, t) / latents.numel()
    # The variance of the target given x_t: of eps alpha^2, of v 1, of eps - x_0 (alpha + sigma)^2,
    # each over alpha^2 + sigma^2, which is 1 for DDPM.
    expected = {"epsilon": alpha_t**2, "v_prediction": 1.0, "flow": 1.0}[prediction_type]
    variance = alpha_t**2 + sigma_t**2
    assert loss.item() == pytest.approx(expected / variance, rel=0.02)
    for other in (0.9 * best - 0.02 * x_t, 1.1 * best + 0.02 * x_t):
        assert objective.loss_sum(other, latents, noise, t) / latents.numel() > loss


def test_a_flow_is_given_t_itself_and_ddpm_its_step():
    assert torch.equal(Objective("flow").model_timesteps(T), T)
    ddpm = Objective(num_train_timesteps=1000)
    assert ddpm.timesteps(T).tolist() == [0, 0, 200, 500, 900, 999]
    expected = torch.tensor([0.0, 0.0, 0.2, 0.5, 0.9, 0.999])
    torch.testing.assert_close(ddpm.model_timesteps(T), expected)


def test_a_flow_goes_straight_from_the_latents_to_the_noise():
    latents, noise = latents_and_noise()
    flow = Objective("flow")
    for index, t in enumerate(T.tolist()):
        x_t = flow.add_noise(latents, noise, T)[index]
        torch.testing.assert_close(x_t, torch.lerp(latents[index], noise[index], t))


def test_the_schedule_is_the_one_named():
    cosine, linear = Objective(), Objective(noise_schedule="linear")
    assert linear.alphas_cumprod[500].item() == pytest.approx(
        math.prod(1 - (1e-4 + (0.02 - 1e-4) * i / 999) for i in range(501)), rel=1e-5
    )
    assert not torch.isclose(cosine.alphas_cumprod[500], linear.alphas_cumprod[500], rtol=0.1)


def test_min_snr_weighs_each_image():
    latents, noise = latents_and_noise()
    output = torch.randn(SHAPE)
    plain, weighted = Objective("v_prediction"), Objective("v_prediction", min_snr_gamma=5.0)
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
    objective = Objective(learned_sigma=True)
    assert objective.state_dict() == {}
    assert objective.to(torch.float64).alphas_cumprod.dtype == torch.float64


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
def test_what_is_no_objective_is_refused_in_one_sentence(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        Objective(**arguments)
    assert "\n" not in str(caught.value)


# Learned sigma


def hybrid_by_hand(objective: Objective, output: Tensor, latents: Tensor, noise: Tensor) -> float:
    """L_simple + 0.001 * 1000 * L_vlb, from diffusers' step and torch's distributions, in fp64."""
    from diffusers.schedulers import DDPMScheduler
    from torch.distributions import Normal, kl_divergence

    scheduler = DDPMScheduler(
        1000,
        trained_betas=None,
        beta_schedule="squaredcos_cap_v2",
        prediction_type=objective.prediction_type,
        variance_type="learned_range",
        clip_sample=False,
    )
    alphas_cumprod = (1 - scheduler.betas.double()).cumprod(0)
    scheduler.alphas_cumprod = alphas_cumprod
    total = 0.0
    for index, timestep in enumerate(objective.timesteps(T).tolist()):
        prediction, v = output[index].double().chunk(2)
        x_0, epsilon = latents[index].double(), noise[index].double()
        x_t = scheduler.add_noise(x_0, epsilon, torch.tensor([timestep]))
        target = (
            epsilon
            if objective.prediction_type == "epsilon"
            else scheduler.get_velocity(x_0, epsilon, torch.tensor([timestep]))
        )
        total += ((prediction - target) ** 2).sum().item()
        # diffusers' mean of the posterior, for a given x_0: the step of an exact "sample" model.
        sample = DDPMScheduler(
            1000, beta_schedule="squaredcos_cap_v2", prediction_type="sample", clip_sample=False
        )
        sample.alphas_cumprod = alphas_cumprod
        alpha_bar = alphas_cumprod[timestep]
        x_0_hat = (
            (x_t - (1 - alpha_bar).sqrt() * prediction) / alpha_bar.sqrt()
            if objective.prediction_type == "epsilon"
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
        if timestep == 0:  # diffusers' least variance is 1e-20 there, iDDPM's that of timestep 1
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
    objective = Objective(prediction_type, learned_sigma=True)
    latents, noise = latents_and_noise()
    output = 0.3 * torch.randn(6, 6, 4, 4, generator=torch.Generator().manual_seed(2))
    ours = objective.loss_sum(output, latents, noise, T).item()
    assert ours == pytest.approx(hybrid_by_hand(objective, output, latents, noise), rel=2e-3)


def test_the_variational_term_teaches_the_variance_alone():
    latents, noise = latents_and_noise()
    output = torch.randn(6, 6, 4, 4).requires_grad_(True)
    Objective(learned_sigma=True).loss_sum(output, latents, noise, T).backward()
    plain = output.detach()[:, :3].requires_grad_(True)
    Objective().loss_sum(plain, latents, noise, T).backward()
    torch.testing.assert_close(output.grad[:, :3], plain.grad)
    assert output.grad[:, 3:].abs().sum() > 0


def test_no_images_have_no_loss():
    empty, t = torch.empty(0, 1, 1, 1), torch.empty(0)
    for learned, channels in ((False, 1), (True, 2)):
        output = torch.empty(0, channels, 1, 1)
        assert Objective(learned_sigma=learned).loss_sum(output, empty, empty, t) == 0
