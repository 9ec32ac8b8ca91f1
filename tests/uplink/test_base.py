from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from flexlora.clients import Update
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


def test_without_steps_updates_pass_one_at_a_time():
    seen: list[int] = []

    def stream() -> Iterator[Update]:
        for i in range(3):
            seen.append(i)
            yield Update(str(i), {}, 1.0)

    received = receive([], stream(), torch.Generator())
    assert next(received).client_id == "0"
    assert seen == [0]
