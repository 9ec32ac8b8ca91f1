import torch

from flexlora.training.factor_bank import FactorBank


def distance(left, right):
    assert left.keys() == right.keys()
    assert all(left[path].scaling == right[path].scaling for path in left)
    pairs = [(left[path], right[path]) for path in left]
    return max(float(torch.cat([(a.A - b.A).flatten(), (a.B - b.B).flatten()]).abs().max()) for a, b in pairs)


def test_padding_of_ranks_stays_zero(model, make_broadcast):
    small, large = make_broadcast(3), make_broadcast(4, seed=1)
    shapes = {path: (factors.rank, *reversed(factors.shape)) for path, factors in large.trainable.items()}
    bank = FactorBank(shapes, "both", torch.device("cpu"))
    assert bank.fits({path: 3 for path in shapes}, "both", 1.5)
    assert not bank.fits({path: 2 for path in shapes}, "both", 1.5)
    assert not bank.fits({path: 5 for path in shapes}, "both", 1.5)
    assert not bank.fits({path: 3 for path in shapes}, "A", 1.5)
    slots = [bank.enter(large.trainable), bank.enter(small.trainable), bank.enter(small.trainable)]
    assert slots == [0, 1, 2]
    assert distance(bank.leave(0, large.trainable), large.trainable) == 0.0
    assert bank.enter(small.trainable) == 0
    assert all(float(A[0, 3:].abs().sum() + B[0, :, 3:].abs().sum()) == 0.0 for A, B in bank.factors.values())
