import math

import pytest
import torch

from cdslm import Diffusion

SCHEDULES = [(name, zero) for name in ("cosine", "linear", "exponential") for zero in (False, True)]
every_schedule = pytest.mark.parametrize("schedule, zero", SCHEDULES)
T = torch.linspace(0, 1, 1001)


@pytest.fixture
def diffusion(small):
    return lambda schedule="cosine", zero=False, predict="v", **rest: Diffusion(
        small(schedule=schedule, zero_terminal_snr=zero, predict=predict, **rest))


def log_snr(phi):
    return -2 * phi.double().tan().log()


@every_schedule
def test_noise_only_grows(diffusion, schedule, zero):
    phi = diffusion(schedule, zero).angle(T)
    assert (phi.diff() >= 0).all() and (phi[50:-50].diff() > 0).all()


@every_schedule
def test_log_snr_begins_and_ends_where_it_should(diffusion, schedule, zero):
    phi = diffusion(schedule, zero).angle(T)
    assert log_snr(phi[:1]).item() == pytest.approx(10, abs=0.01)
    if zero:
        assert phi[-1].cos().abs() < 1e-7 and phi[-1].sin() == 1
        assert (phi[:-1].cos() > 0).all()
    else:
        assert log_snr(phi).abs().max() <= 10.001
        assert log_snr(phi[-1:]).item() == pytest.approx(-10, abs=0.01)


@pytest.mark.parametrize("zero", [False, True])
def test_cosine_is_a_straight_line_of_the_angle(diffusion, zero):
    inside = T[10:-10]
    assert torch.allclose(diffusion("cosine", zero).angle(inside), math.pi / 2 * inside, atol=1e-5)


def test_linear_is_the_variance_preserving_sde(diffusion):
    """alpha^2 = exp(-integral of beta), beta from 0.1 to 20; here the integral is done numerically."""
    fine = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    alpha = (-torch.cumulative_trapezoid(0.1 + 19.9 * fine, fine) / 2).exp()
    phi = diffusion("linear").angle(torch.tensor([0.1, 0.4, 0.7, 0.9]))
    assert torch.allclose(phi.cos().double(), alpha[[9_999, 39_999, 69_999, 89_999]], atol=1e-5)


def test_exponential_log_snr_is_a_straight_line(diffusion):
    assert torch.allclose(log_snr(diffusion("exponential").angle(T)), 10 - 20 * T.double(), atol=0.02)


@every_schedule
@pytest.mark.parametrize("predict", ["v", "x0"])
def test_what_the_target_says_is_x0(diffusion, schedule, zero, predict):
    """x0, eps -> x_t, target -> x0 and back to eps, at every noise level."""
    d, phi = diffusion(schedule, zero, predict), torch.linspace(0.01, 1, 50)
    phi = d.angle(phi)[:, None, None].double()
    x0, eps = torch.randn(2, 50, 8, 4, dtype=torch.float64)
    xt = phi.cos() * x0 + phi.sin() * eps
    again = d.clean(d.target(x0, eps, phi), xt, phi)
    assert torch.allclose(again, x0, atol=1e-6)
    assert torch.allclose((xt - phi.cos() * again) / phi.sin(), eps, atol=1e-4)


def test_v_is_the_velocity(diffusion):
    """v = d x_t / d phi: how x_t changes as noise grows (Salimans & Ho, 2022)."""
    x0, eps, phi = *torch.randn(2, 3, 5, 2, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    at = lambda angle: angle.cos() * x0 + angle.sin() * eps
    assert torch.allclose(diffusion().target(x0, eps, phi), (at(phi + 1e-6) - at(phi - 1e-6)) / 2e-6, atol=1e-6)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_weights_are_min_snr(diffusion, gamma):
    phi = torch.linspace(0.05, 1.5, 40)
    snr = (phi.cos() / phi.sin()) ** 2
    assert torch.allclose(diffusion(predict="x0", min_snr_gamma=gamma).weight(phi), snr.clamp(max=gamma), rtol=1e-4)
    assert torch.allclose(diffusion(predict="v", min_snr_gamma=gamma).weight(phi), snr.clamp(max=gamma) / (snr + 1),
                          rtol=1e-4)


@every_schedule
def test_equivalent_predictions_have_the_same_loss(diffusion, schedule, zero):
    """What a network that predicts v says, said as x0, costs the same: min(SNR, gamma) times the error of x0."""
    phi = diffusion(schedule, zero).angle(torch.linspace(0.05, 0.97, 16))
    x0, eps, guess = torch.randn(3, 16, 8, 4)
    angle = phi[:, None, None]
    as_v = (angle.cos() * (angle.cos() * x0 + angle.sin() * eps) - guess) / angle.sin()
    loss = diffusion(schedule, zero, "v", min_snr_gamma=5.0).loss(lambda *_: as_v, x0, None, phi, eps)
    same = diffusion(schedule, zero, "x0", min_snr_gamma=5.0).loss(lambda *_: guess, x0, None, phi, eps)
    snr = angle.tan() ** -2
    assert loss.shape == (16,)
    assert torch.allclose(loss, same, rtol=1e-3)
    assert torch.allclose(same, (snr.clamp(max=5) * (guess - x0) ** 2).mean((1, 2)), rtol=1e-4)


@pytest.mark.parametrize("predict", ["v", "x0"])
def test_the_terminal_prediction_has_no_weight_at_zero_snr_and_is_finite(diffusion, predict):
    d = diffusion(zero=True, predict=predict)
    phi = d.angle(torch.ones(1))
    assert 0 <= d.weight(phi).item() < 1e-12
    loss = d.loss(lambda *_: torch.randn(1, 8, 4), torch.randn(1, 8, 4), None, phi, torch.randn(1, 8, 4))
    assert 0 <= loss.item() < 1e-10


def test_the_network_is_given_what_it_needs(diffusion):
    """x_t mixed as the angle says, the angle itself, and the context untouched."""
    heard = {}

    def network(xt, phi, ctx, guess=None):
        heard.update(xt=xt, phi=phi, ctx=ctx)
        return torch.zeros_like(xt)

    x0, eps, phi, ctx = torch.randn(2, 8, 4), torch.randn(2, 8, 4), torch.tensor([0.3, 1.2]), torch.randn(2, 3, 4)
    diffusion().loss(network, x0, ctx, phi, eps)
    expected = phi.cos()[:, None, None] * x0 + phi.sin()[:, None, None] * eps
    assert torch.allclose(heard["xt"], expected) and heard["ctx"] is ctx and (heard["phi"] == phi).all()


def test_shifted_times_lean_to_noise_and_unshifted_ones_stay(diffusion):
    u = torch.linspace(0, 1, 101)
    assert (diffusion(t_shift=0.0).times(u) == u).all()
    shifted = diffusion(t_shift=1.0).times(u)
    assert (shifted[1:-1] > u[1:-1]).all() and (shifted.diff() > 0).all() and shifted.max() <= 1


@pytest.mark.parametrize("predict", ["v", "x0"])
def test_the_second_pass_sees_the_first_ones_x0(diffusion, predict):
    """Self-conditioning: asked for a guess, the network is called twice, and what it learns from is the second."""
    d, seen = diffusion(predict=predict), []
    says = torch.randn(2, 8, 4)

    def network(xt, phi, ctx, guess=None):
        seen.append((xt, guess, torch.is_grad_enabled()))
        return says * len(seen)

    x0, eps, phi = torch.randn(2, 8, 4), torch.randn(2, 8, 4), torch.tensor([0.3, 1.2])
    loss = d.loss(network, x0, None, phi, eps, True)
    (xt, nothing, first_learns), (again, guess, second_learns) = seen
    angle = phi[:, None, None]
    assert nothing is None and torch.equal(xt, again) and not first_learns and second_learns
    assert torch.allclose(guess, d.clean(says, xt, angle))
    assert torch.allclose(loss, d.loss(lambda *_: 2 * says, x0, None, phi, eps))
