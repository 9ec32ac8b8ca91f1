from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch

from flexlora.federation.messages import Update
from flexlora.uplink.base import UplinkStep, receive, send


@dataclass(frozen=True)
class Mark:
    name: str

    def send(self, update: Update, rng: torch.Generator) -> Update:
        return replace(update, client_id=f"{self.name}({update.client_id})")

    def receive(self, updates: Iterable[Update], rng: torch.Generator) -> Iterator[Update]:
        for update in updates:
            assert update.client_id is not None
            yield replace(update, client_id=update.client_id.removeprefix(f"{self.name}(").removesuffix(")"))


def test_the_server_undoes_the_steps_in_reversed_order():
    steps = [Mark("inner"), Mark("outer")]
    rng = torch.Generator()
    sent = send(steps, Update("a", {}, 1.0), rng)
    assert sent.client_id == "outer(inner(a))"
    assert [update.client_id for update in receive(steps, [sent], rng)] == ["a"]
    assert isinstance(steps[0], UplinkStep)


def counted(seen: list[int], num_updates: int = 3) -> Iterator[Update]:
    for i in range(num_updates):
        seen.append(i)
        yield Update(str(i), {}, 1.0)


@pytest.mark.parametrize("steps", [(), (Mark("inner"), Mark("outer"))], ids=["none", "two"])
def test_updates_pass_one_at_a_time_and_only_when_asked_for(steps):
    seen: list[int] = []
    received = receive(steps, counted(seen), torch.Generator())
    assert seen == []
    for i in range(3):
        assert next(received).client_id == str(i)
        assert seen == list(range(i + 1))
    assert next(received, None) is None


def test_without_steps_the_very_same_updates_arrive_and_no_number_is_drawn():
    updates = [Update(str(i), {}, 1.0) for i in range(3)]
    rng = torch.Generator()
    before = rng.get_state()
    assert all(found is update for found, update in zip(receive((), updates, rng), updates, strict=True))
    assert torch.equal(rng.get_state(), before)
    assert list(receive((), [], rng)) == []
    assert send((), updates[0], rng) is updates[0]


@dataclass(frozen=True)
class Fold:
    def send(self, update: Update, rng: torch.Generator) -> Update:
        return update

    def receive(self, updates: Iterable[Update], rng: torch.Generator) -> Iterator[Update]:
        yield Update(None, {}, sum(update.weight for update in updates))


def test_a_step_may_fold_a_cohort_into_one_update():
    received = receive([Fold(), Mark("outer")], counted([]), torch.Generator())
    assert [(update.client_id, update.weight) for update in received] == [(None, 3.0)]


def test_an_error_on_the_way_reaches_the_receiver_and_closing_reaches_the_source():
    closed: list[bool] = []

    def stream(fails: bool) -> Iterator[Update]:
        try:
            yield Update("0", {}, 1.0)
            if fails:
                raise KeyError("engine")
            yield Update("1", {}, 1.0)
        finally:
            closed.append(True)

    received = receive((), stream(fails=True), torch.Generator())
    next(received)
    with pytest.raises(KeyError, match="engine"):
        next(received)
    received = receive((), stream(fails=False), torch.Generator())
    next(received)
    received.close()  # type: ignore[attr-defined]
    assert closed == [True, True]
