"""Gradients that are written out, against autograd in float64."""

import pytest
import torch

from flexlora.training.added_terms import num_left_alone, proximal_core_gradient, proximal_gradients, tail_gradients


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_floors_are_those_of_the_decimal_number() -> None:
    assert [num_left_alone(share, 100) for share in (0.01, 0.29, 0.57, 0.99, 1.0)] == [1, 29, 57, 99, 100]
    assert [num_left_alone(0.99, rank) for rank in (2, 8, 200)] == [1, 7, 198]


def test_the_only_direction_of_a_client_is_never_in_the_tail() -> None:
    # A pruning leaves one direction (HetLoRA), so the penalty that leads to it must not press on that one.
    assert [num_left_alone(share, 1) for share in (0.0, 0.5, 0.99, 1.0)] == [1, 1, 1, 1]
    assert [num_left_alone(0.5, rank) for rank in (1, 2, 3, 4)] == [1, 1, 1, 2]


@pytest.mark.parametrize("left_alone", [0, 3, 4])
def test_the_tail_penalty_has_the_gradient_of_autograd(left_alone: int) -> None:
    A, B = randn(5, 7, seed=1).requires_grad_(), randn(6, 5, seed=2).requires_grad_()
    penalty = 0.3 * torch.linalg.matrix_norm(B[:, left_alone:]) * torch.linalg.matrix_norm(A[left_alone:])
    expected = torch.autograd.grad(penalty, (A, B))
    found = tail_gradients(A.detach(), B.detach(), torch.arange(5) >= left_alone, 0.3)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_a_tail_that_is_zero_in_one_factor_moves_the_other_as_autograd_says() -> None:
    A, B = randn(4, 7, seed=1), torch.zeros(6, 4, dtype=torch.float64)
    found_A, found_B = tail_gradients(A, B, torch.arange(4) >= 2, 1.0)
    assert not found_A.any() and not found_B.any()
    own = B.clone().requires_grad_()
    (expected,) = torch.autograd.grad(torch.linalg.matrix_norm(own[:, 2:]) * torch.linalg.matrix_norm(A[2:]), own)
    assert torch.equal(found_B, expected)


def test_the_proximal_term_has_the_gradient_of_autograd() -> None:
    A, B = randn(5, 7, seed=1).requires_grad_(), randn(6, 5, seed=2).requires_grad_()
    start_A, start_B = A.detach() + 0.1 * randn(5, 7, seed=3), B.detach() + 0.1 * randn(6, 5, seed=4)
    term = 0.7 / 2 * (1.5 * B @ A - 1.5 * start_B @ start_A).square().sum()
    expected = torch.autograd.grad(term, (A, B))
    found = proximal_gradients(A.detach(), B.detach(), start_A, start_B, 1.5, 0.7)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_the_proximal_term_of_a_core_has_the_gradient_of_autograd() -> None:
    A, B, start = randn(5, 7, seed=1), randn(6, 5, seed=2), randn(5, 5, seed=3)
    core = randn(5, 5, seed=4).requires_grad_()
    term = 0.7 / 2 * (1.5 * B @ (core - start) @ A).square().sum()
    (expected,) = torch.autograd.grad(term, core)
    found = proximal_core_gradient(A, B, core.detach(), start, 1.5, 0.7)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_several_clients_at_once_give_what_each_gives_alone() -> None:
    A, B, start_A, start_B = (
        randn(3, 5, 7, seed=1),
        randn(3, 6, 5, seed=2),
        randn(3, 5, 7, seed=3),
        randn(3, 6, 5, seed=4),
    )
    is_tail = torch.arange(5) >= torch.tensor([[1], [3], [5]])
    weights, scalings = randn(3, 1, 1, seed=5), randn(3, 1, 1, seed=6)
    tails = tail_gradients(A, B, is_tail, weights)
    moved = proximal_gradients(A, B, start_A, start_B, scalings, 0.4)
    for one in range(3):
        alone = tail_gradients(A[one], B[one], is_tail[one], float(weights[one]))
        alone += proximal_gradients(A[one], B[one], start_A[one], start_B[one], float(scalings[one]), 0.4)
        for found, expected in zip((*tails, *moved), alone, strict=True):
            torch.testing.assert_close(found[one], expected)
