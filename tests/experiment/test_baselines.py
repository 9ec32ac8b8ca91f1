"""What references do when a client fails."""

from types import SimpleNamespace

import pytest

from flexlora.experiment.config import Config
from flexlora.federation.clients import ClientSpec, RankPlan


def test_a_client_that_cannot_train_alone_is_reported_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from flexlora.experiment import baselines as references

    clients = [ClientSpec(name, RankPlan("p", (("", 1),)), 3) for name in ("a", "b")]

    nothing_unseen = SimpleNamespace(corpus=SimpleNamespace(unseen={}))
    loaded = SimpleNamespace(config=Config(), participants=nothing_unseen)

    def alone(loaded: object, loop: object, state: object, client: ClientSpec) -> object:
        raise ArithmeticError("the loss left the finite numbers")

    monkeypatch.setattr(references, "clients_alone", lambda loaded: clients)
    monkeypatch.setattr(references, "trainings_alone", lambda loaded: 1)
    monkeypatch.setattr(references, "_alone", alone)
    record = references._local_only(loaded, None, None, lambda event: None, {})  # type: ignore[arg-type]
    assert [row.failure for row in record.clients] == ["ArithmeticError: the loss left the finite numbers"] * 2
    assert record.own is None
