import numpy as np
import pytest
import scipy.optimize
import torch

from release_guard.alignment import (
    assignment,
    cosines,
    joint_fit,
    least_squares,
    rotary_fit,
    rotation,
    scales,
)


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def orthogonal(size, seed=0):
    return torch.linalg.qr(normal(size, size, seed=seed)).Q


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["real", "tied", "permuted"])
def test_the_assignment_is_as_cheap_as_scipys(seed, kind):
    size = 1 + 7 * seed
    cost = normal(size, size, seed=seed)
    if kind == "tied":
        cost = cost.round()
    if kind == "permuted":
        cost -= 9 * torch.eye(size)[torch.from_numpy(np.random.default_rng(seed).permutation(size))]
    columns = assignment(cost)
    assert sorted(columns.tolist()) == list(range(size))
    rows, best = scipy.optimize.linear_sum_assignment(cost.numpy())
    found = cost[torch.arange(size), columns].sum().item()
    assert found == pytest.approx(cost.numpy()[rows, best].sum())


def test_a_rotation_is_found_and_is_orthogonal():
    turn, vectors = orthogonal(9), normal(30, 9, seed=1)
    found = rotation(vectors, vectors @ turn, centred=False)
    torch.testing.assert_close(found, turn)
    noisy = rotation(vectors, vectors @ turn + normal(30, 9, seed=2), centred=False)
    torch.testing.assert_close(noisy @ noisy.T, torch.eye(9).double())


def test_a_centred_rotation_keeps_every_mean_and_is_the_best_that_does():
    ones, vectors = torch.ones(9, 1).double(), normal(30, 9, seed=1)
    rest = torch.linalg.qr(ones, mode="complete").Q[:, 1:]
    turn = ones @ ones.T / 9 + rest @ orthogonal(8) @ rest.T
    found = rotation(vectors, vectors @ turn, centred=True)
    torch.testing.assert_close(found, turn)
    noisy = rotation(vectors, normal(30, 9, seed=3), centred=True)
    torch.testing.assert_close((vectors @ noisy).mean(1), vectors.mean(1))
    torch.testing.assert_close(noisy @ noisy.T, torch.eye(9).double())


def test_least_squares_is_numpys():
    ours, theirs = normal(4, 20), normal(4, 20, seed=1)
    wanted = np.linalg.lstsq(ours.T.numpy(), theirs.T.numpy())[0].T
    torch.testing.assert_close(least_squares(ours, theirs), torch.from_numpy(wanted))
    assert least_squares(torch.zeros(4, 20).double(), theirs).isfinite().all()


def apart(mix, one, two, one_0, two_0):
    back = torch.linalg.inv(mix).T @ two
    return (mix @ one - one_0).square().sum() + (back - two_0).square().sum()


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.5])
def test_the_joint_fit_is_where_scipy_finds_the_least_distance(noise):
    anchors = normal(5, 30), normal(5, 20, seed=1)
    mix = torch.eye(5) + 0.5 * normal(5, 5, seed=2)
    heads = (
        torch.linalg.inv(mix) @ (anchors[0] + noise * normal(5, 30, seed=3)),
        mix.T @ (anchors[1] + noise * normal(5, 20, seed=4)),
    )
    found = joint_fit(*heads, *anchors)

    def loss(flat):
        variable = torch.from_numpy(flat).view(5, 5).requires_grad_()
        value = apart(variable, *heads, *anchors)
        value.backward()
        return value.item(), variable.grad.numpy().ravel()

    best = scipy.optimize.minimize(loss, mix.numpy().ravel(), jac=True, method="BFGS", tol=1e-9)
    distance = apart(found, *heads, *anchors).item()
    assert distance == pytest.approx(best.fun, rel=1e-6, abs=1e-9)
    if noise == 0:
        torch.testing.assert_close(found, mix)


def test_the_joint_fit_of_a_dead_head_is_finite():
    dead, anchor = torch.zeros(4, 9).double(), normal(4, 9)
    assert joint_fit(dead, normal(4, 9, seed=1), anchor, anchor).isfinite().all()
    assert joint_fit(dead, dead, anchor, anchor).isfinite().all()


def rotary(size, seed):
    angle, scale = (
        3 * normal(size // 2, seed=seed),
        torch.exp(0.5 * normal(size // 2, seed=seed + 1)),
    )
    cosine, sine = torch.diag(scale * angle.cos()), torch.diag(scale * angle.sin())
    return torch.cat([torch.cat([cosine, -sine], 1), torch.cat([sine, cosine], 1)])


def test_the_rotary_fit_finds_a_scaled_rotation_of_each_pair():
    anchors, mix = (normal(6, 30), normal(6, 20, seed=1)), rotary(6, 3)
    heads = torch.linalg.inv(mix) @ anchors[0], mix.T @ anchors[1]
    torch.testing.assert_close(rotary_fit(*heads, *anchors), mix)


def test_the_rotary_fit_turns_by_the_best_angle():
    anchors, heads = (
        (normal(2, 30), normal(2, 20, seed=1)),
        (normal(2, 30, seed=2), normal(2, 20, seed=3)),
    )
    found = rotary_fit(*heads, *anchors)
    scale = found[:, 0].norm()
    angles = torch.linspace(0, 2 * torch.pi, 721).double()
    turns = torch.stack(
        [torch.stack([angles.cos(), -angles.sin()]), torch.stack([angles.sin(), angles.cos()])]
    )
    others = [apart(scale * turns[..., at], *heads, *anchors).item() for at in range(721)]
    assert apart(found, *heads, *anchors).item() <= min(others) + 1e-9


def test_cosines_and_scales_bear_zero_vectors():
    ours, theirs = normal(4, 3), normal(4, 3, seed=1)
    ours[0] = 0
    wanted = torch.nn.functional.cosine_similarity(ours[:, None], theirs[None], dim=2)
    torch.testing.assert_close(cosines(ours, theirs), wanted)
    torch.testing.assert_close(scales(2 * theirs, theirs), torch.full((4,), 0.5).double())
