"""Runs the further phases of a round whose updates stay with the clients, and aggregates their secure sum."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from flexlora.aggregators.base import SumAggregator
from flexlora.engines.base import PhasedEngine, RoundOrder
from flexlora.errors import FlexLoraError
from flexlora.federation.messages import ClientFailure, Update
from flexlora.rounds.cohort import Work
from flexlora.rounds.loop_parts import Loop, Stopwatch
from flexlora.rounds.outcomes import checked
from flexlora.rounds.records import ClientRecord, PhaseRecord, SecureSumRecord, rounded
from flexlora.uplink.base import SecureTotal, SummedCohort, Traffic


def summed(
    loop: Loop,
    server_round: int,
    work: Work,
    state: Any,
    outcomes: Iterable[Update | ClientFailure],
    clients: list[ClientRecord],
    watch: Stopwatch,
) -> tuple[Any, str | None, SecureSumRecord]:
    """Return the state after the secure sum of a cohort, what went wrong, if anything, and what the sum cost.

    A record of every client goes to ``clients``: one that trained and dropped out of a later phase failed there. Where
    too many do, the state is kept.
    """
    engine, aggregator, step = loop.engine, loop.aggregator, loop.secure_sum
    assert isinstance(engine, PhasedEngine) and isinstance(aggregator, SumAggregator) and step is not None
    trained = list(outcomes)
    held = {str(one.client_id): one for one in trained if isinstance(one, Update) and one.is_held}
    total: SecureTotal | None = None
    problem, traffic, (order,) = None, Traffic(), work.orders
    try:
        with watch.stage("secure_sum"):
            total = step.total(_cohort(loop, order, held), engine.ask, traffic)
        num_summed, least = len(total.survivors), loop.settings.min_updates
        if num_summed < least:
            problem = f"{num_summed} clients were summed, of rounds.min_updates={least} at least; the state was kept"
        else:
            with watch.stage("aggregate"):
                state = aggregator.aggregate_sum(state, total.total)
    except FlexLoraError as error:
        problem = f"there is no secure sum and the state was kept: {error}"
    finally:
        engine.forget()
    for cost in traffic.costs:
        stage = f"secure_sum {cost.kind}"
        watch.seconds[stage] = watch.seconds.get(stage, 0.0) + cost.seconds
    for _ in checked(loop, server_round, work, _outcomes(trained, traffic, total), clients, {}):
        pass
    return state, problem, _record(traffic, total)


def _cohort(loop: Loop, order: RoundOrder, held: dict[str, Update]) -> SummedCohort:
    """Return those who hold what they trained, as the server knows them."""
    federation = loop.federation
    keys = sorted({order.key_of(client) for client in order.cohort if client.client_id in held}, key=repr)
    return SummedCohort(
        slot_of={one.client_id: keys.index(order.key_of(one)) for one in order.cohort if one.client_id in held},
        weights={client_id: update.weight for client_id, update in held.items()},
        broadcasts=[order.parcels[key].arrived for key in keys],
        shapes=federation.shapes,
        server_ranks=federation.server_ranks,
        server_round=order.server_round,
        seed=order.seed,
        learning_rate=order.learning_rate,
    )


def _outcomes(
    trained: Iterable[Update | ClientFailure], traffic: Traffic, total: SecureTotal | None
) -> Iterable[Update | ClientFailure]:
    """Yield how each client fared in the end, with the bytes of all phases."""
    summed_up = set() if total is None else set(total.survivors)
    for outcome in trained:
        client_id = str(outcome.client_id)
        if isinstance(outcome, ClientFailure):
            yield outcome
            continue
        up_bytes = traffic.up_bytes.get(client_id, 0)
        down_bytes = outcome.down_bytes + traffic.down_bytes.get(client_id, 0)
        failure = traffic.failures.get(client_id)
        if client_id in summed_up:
            yield dataclasses.replace(outcome, up_bytes=up_bytes, down_bytes=down_bytes)
        elif failure is not None:
            yield dataclasses.replace(failure, up_bytes=up_bytes, down_bytes=down_bytes)
        else:
            reason = "there was no secure sum to be part of"
            yield ClientFailure(client_id, "secure_sum", reason, down_bytes, up_bytes)


def _record(traffic: Traffic, total: SecureTotal | None) -> SecureSumRecord:
    phases = [
        PhaseRecord(
            kind=cost.kind,
            num_asked=cost.num_asked,
            num_answered=cost.num_answered,
            down_bytes=cost.down_bytes,
            up_bytes=cost.up_bytes,
        )
        for cost in traffic.costs
    ]
    if total is None:
        return SecureSumRecord(phases=phases)
    error = total.sketch_error
    return SecureSumRecord(
        phases=phases,
        num_summed=len(total.survivors),
        num_clipped=total.num_clipped,
        sketch_error=None if error is None else rounded(error),
        train_loss=None if total.train_loss is None else rounded(total.train_loss),
    )
