"""Expected sums are plain ones of what clients hold, in float64 by numpy; clients answer without any engine."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from flexlora.errors import FlexLoraError
from flexlora.federation.messages import Broadcast, ClientFailure, Reply, Update
from flexlora.lora.factors import LoraFactors
from flexlora.uplink.base import SummedCohort, Traffic
from flexlora.uplink.masking_server import MaskedSumError
from flexlora.uplink.phase_messages import fields_and_tensors, message
from flexlora.uplink.phases import Holding
from flexlora.uplink.secure_sum import SecureSum, SumTerms, terms_in
from flexlora.uplink.secure_total import SecureSumError, SecureSumSettings, sketch_size

SHAPES = {"attn": (120, 100), "mlp": (90, 130), "rare": (6, 5)}
RANKS = {"low": {"attn": 2, "mlp": 1}, "high": {"attn": 4, "mlp": 3, "rare": 2}}
SERVER_RANKS = {"attn": 4, "mlp": 3, "rare": 2}
CHANGE = 0.25
FACTORS = SecureSumSettings("factors", CHANGE)
PRODUCTS = SecureSumSettings("products", CHANGE)


class Clients:
    """Clients of two rank plans that hold what they trained, some of which drop out."""

    def __init__(self, size=6, seed=0, drops=None):
        rng = np.random.default_rng(seed)
        draw = lambda *shape: torch.from_numpy(rng.standard_normal(shape)).float()  # noqa: E731
        self.names = [f"c{index:02}" for index in range(size)]
        self.drops, self.answered, self.transcript = drops or {}, dict.fromkeys(self.names, 0), []
        whole = {m: (draw(r, SHAPES[m][1]) / 5, draw(SHAPES[m][0], r) / 5) for m, r in SERVER_RANKS.items()}
        self.broadcasts = [
            Broadcast({m: LoraFactors(whole[m][0][:r], whole[m][1][:, :r] * (r / 2), 2 / r) for m, r in ranks.items()})
            for ranks in RANKS.values()
        ]
        self.slot_of = {name: index % 2 for index, name in enumerate(self.names)}
        self.held, self.ends = {}, {}
        for index, name in enumerate(self.names):
            sent = self.broadcasts[self.slot_of[name]]
            payload = {
                m: LoraFactors(
                    own.A + CHANGE * (2 * torch.rand(own.A.shape, generator=torch.Generator().manual_seed(index)) - 1),
                    own.B + CHANGE * (2 * torch.rand(own.B.shape, generator=torch.Generator().manual_seed(index)) - 1),
                    own.scaling,
                )
                for m, own in sent.trainable.items()
            }
            self.held[name] = Update(name, payload, 10.0 + 7 * index, {"loss": 1.0 + index, "steps": 3})
            self.ends[name] = SecureSum().begin(Holding(self.held[name], sent, 2, 1000 + index))

    def cohort(self, **changes):
        weights = {name: update.weight for name, update in self.held.items()}
        cohort = SummedCohort(self.slot_of, weights, self.broadcasts, SHAPES, SERVER_RANKS, 2, 7, 1.0)
        return replace(cohort, **changes)

    def ask(self, kind, requests):
        for name, request in requests.items():
            self.answered[name] += 1
            if self.answered[name] > self.drops.get(name, 99):
                yield ClientFailure(name, kind, "gone")
                continue
            try:
                data = self.ends[name].answer(kind, request)
            except FlexLoraError as error:
                yield ClientFailure(name, kind, str(error))
                continue
            self.transcript.append(data)
            yield Reply(name, data)

    def total(self, settings, **changes):
        self.traffic = Traffic()
        return settings.total(self.cohort(**changes), self.ask, self.traffic)

    def mean_loss(self, names):
        weights = [self.held[name].weight for name in names]
        return np.average([self.held[name].metrics["loss"] for name in names], weights=weights)

    def product(self, module, names):
        total = np.zeros(SHAPES[module])
        for name in names:
            if module in self.held[name].payload:
                total += self.held[name].weight * self.held[name].payload[module].delta().numpy()
        return total

    def factors(self, module, names):
        rank = SERVER_RANKS[module]
        A, B = np.zeros((rank, SHAPES[module][1])), np.zeros((SHAPES[module][0], rank))
        for name in names:
            own, weight = self.held[name].payload.get(module), self.held[name].weight
            if own is not None:
                A[: own.rank] += weight * own.A.double().numpy()
                B[:, : own.rank] += weight * own.scaling * own.B.double().numpy()
        return A, B


def test_factors_are_summed_direction_by_direction_to_the_steps_of_fixed_point():
    clients = Clients()
    found = clients.total(FACTORS)
    assert found.survivors == clients.names and found.num_clipped == 0 and found.sketch_error is None
    assert found.total.weight == sum(update.weight for update in clients.held.values())
    step = 6 * CHANGE / ((2**31 - 1) // 6) * 45 * 2
    for module in SHAPES:
        A, B = clients.factors(module, clients.names)
        np.testing.assert_allclose(found.total.sums[module].A, A, rtol=0, atol=2 * step)
        np.testing.assert_allclose(found.total.sums[module].B, B, rtol=0, atol=2 * step)
    assert found.total.weight_by_rank == {
        "attn": {2: 10.0 + 24 + 38, 4: 17.0 + 31 + 45},
        "mlp": {1: 10.0 + 24 + 38, 3: 17.0 + 31 + 45},
        "rare": {2: 17.0 + 31 + 45},
    }
    assert found.train_loss == pytest.approx(clients.mean_loss(clients.names), rel=1e-6)


@pytest.mark.parametrize("stage", range(5))
def test_who_drops_out_is_in_no_sum(stage):
    clients = Clients(size=8, drops={"c01": stage, "c06": stage})
    found = clients.total(FACTORS)
    survivors = [name for name in clients.names if stage > 2 or name not in clients.drops]
    assert list(found.survivors) == survivors
    for module in SHAPES:
        np.testing.assert_allclose(found.total.sums[module].A, clients.factors(module, survivors)[0], atol=1e-5)
    assert set(clients.traffic.failures) == (set(clients.drops) if stage < 4 else set())


def test_a_sketch_that_covers_the_rank_gives_the_plain_sum():
    clients = Clients()
    found = clients.total(replace(PRODUCTS, columns=30))
    for module in SHAPES:
        expected = clients.product(module, clients.names)
        error = np.linalg.norm(found.total.sums[module].delta().numpy() - expected)
        assert error < 1e-5 * np.linalg.norm(expected)
    assert found.sketch_error < 1e-5 and found.num_clipped == 0


def test_a_smaller_sketch_is_within_the_error_that_is_reported():
    clients = Clients(size=9, seed=3)
    found = clients.total(replace(PRODUCTS, columns=8))
    lost = sum(
        np.linalg.norm(found.total.sums[module].delta().numpy() - clients.product(module, clients.names)) ** 2
        for module in SHAPES
    )
    whole = sum(np.linalg.norm(clients.product(module, clients.names)) ** 2 for module in SHAPES)
    assert 0.01 < np.sqrt(lost / whole) < found.sketch_error < 1
    # Too small for a sketch: the product itself travels.
    np.testing.assert_allclose(
        found.total.sums["rare"].delta().numpy(), clients.product("rare", clients.names), atol=1e-4
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3, 4, 5])
def test_products_are_those_of_the_clients_that_survive_the_last_sum(stage):
    clients = Clients(size=9, drops={"c02": stage, "c07": stage})
    found = clients.total(replace(PRODUCTS, columns=30))
    survivors = [name for name in clients.names if stage > 4 or name not in clients.drops]
    assert list(found.survivors) == survivors
    for module in ("attn", "mlp"):
        expected = clients.product(module, survivors)
        assert np.linalg.norm(found.total.sums[module].delta().numpy() - expected) < 1e-5 * np.linalg.norm(expected)


def test_too_many_dropouts_are_an_error():
    with pytest.raises(MaskedSumError, match="cannot be restored"):
        Clients(size=6, drops={"c00": 3, "c01": 3, "c02": 2}).total(FACTORS)


def test_the_server_sees_no_number_of_a_client():
    clients = Clients()
    clients.total(FACTORS)
    everything = b"".join(clients.transcript)
    for update in clients.held.values():
        for module, own in update.payload.items():
            start = clients.broadcasts[clients.slot_of[update.client_id]].trainable[module]
            for numbers in (own.A, own.B, own.A - start.A, own.B - start.B):
                for dtype in (np.float32, np.float64):
                    data = numbers.numpy().astype(dtype)
                    assert data.tobytes() not in everything
                    assert not any(value.tobytes() in everything for value in data.reshape(-1)[:20])


def test_numbers_beyond_their_bound_are_clipped_and_counted():
    clients = Clients()
    found = clients.total(replace(FACTORS, largest_change=CHANGE / 2))
    beyond = 0
    for update in clients.held.values():
        start = clients.broadcasts[clients.slot_of[update.client_id]].trainable
        for module, own in update.payload.items():
            scaling = max(sent.trainable[module].scaling for sent in clients.broadcasts if module in sent.trainable)
            share = update.weight / 45
            moved = (own.B.double() - start[module].B.double()) * own.scaling
            beyond += int(((own.A.double() - start[module].A.double()).abs() * share > CHANGE / 2).sum())
            beyond += int((moved.abs() * share > CHANGE / 2 * scaling).sum())
    assert found.num_clipped == beyond > 0


def test_a_budget_of_bytes_decides_how_many_columns_there_are():
    shapes = {"a": (100, 50), "b": (10, 40)}
    assert sketch_size(PRODUCTS, shapes, 16) == 16 + 8
    assert sketch_size(replace(PRODUCTS, columns=11), shapes, 16) == 11
    assert sketch_size(replace(PRODUCTS, most_bytes=4 * 200 * 9 + 1), shapes, 16) == 9
    assert sketch_size(replace(PRODUCTS, most_bytes=4 * 200 * 9, word_bits=16), shapes, 16) == 18
    with pytest.raises(SecureSumError, match=r"max_bytes must be at least 4000.*got 3999"):
        sketch_size(replace(PRODUCTS, most_bytes=3999), shapes, 16)


def test_weights_that_are_no_counts_are_refused():
    clients = Clients()
    with pytest.raises(SecureSumError, match="positive integers"):
        clients.total(FACTORS, weights={**clients.cohort().weights, "c00": 0.5})


def test_a_share_that_was_altered_spoils_no_state():
    clients = Clients()
    answer = clients.ends["c00"].answer

    def altered(kind, request):
        data = answer(kind, request)
        if kind != "unmask":
            return data
        fields, _ = fields_and_tensors(data)
        shares = {name: f"{int(share, 16) ^ 1:0{len(share)}x}" for name, share in fields["seeds"].items()}
        return message({**fields, "seeds": shares})

    clients.ends["c00"].answer = altered
    with pytest.raises(SecureSumError, match="must count 165 examples"):
        clients.total(FACTORS)


def test_the_loss_is_in_one_sum_alone():
    # Of two sums, the difference would be the loss of a client that dropped out between them.
    clients = Clients(size=9, drops={"c02": 4})
    found = clients.total(replace(PRODUCTS, columns=30))
    assert found.survivors == [name for name in clients.names if name != "c02"]
    assert found.train_loss == pytest.approx(clients.mean_loss(clients.names), rel=1e-6)
    terms = terms_in("projection", SumTerms("projection", {}, 2, 9, 3).as_fields())
    assert [part.name for part in (*terms.layout().counts, *terms.layout().values)] == ["examples", "clipped"]
