"""Checks what a method sends: ranks, shapes and types, and that the fields of a broadcast keep their promises."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from flexlora.aggregators.contract_case import Case
from flexlora.aggregators.contract_client import travelling
from flexlora.aggregators.contract_compare import require
from flexlora.federation.known_rows import known_rows, mask_of
from flexlora.federation.messages import Broadcast
from flexlora.lora.factors import LoraFactors


def broadcasts_have_the_ranks_asked_for(case: Case) -> None:
    """A broadcast has exactly the modules, ranks, shapes and scalings asked for, in float32, and can learn."""
    for plan, broadcast in sent(case):
        found = list(broadcast.trainable)
        require(found == sorted(case.shapes), f"modules must be {sorted(case.shapes)}, sorted; got {found}")
        for module, factors in broadcast.trainable.items():
            rank = _rank_of(case, broadcast, module, plan[module])
            shapes = (tuple(factors.A.shape), tuple(factors.B.shape))
            expected = ((rank, case.shapes[module][1]), (case.shapes[module][0], rank))
            require(
                shapes == expected,
                f"{module}: A and B at rank {plan[module]} must have the shapes {expected}; got {shapes}",
            )
            # Under a mask B is the whole weight and not of a rank: no rule for ranks applies to it.
            scaling = case.scaling(rank) if broadcast.mask is None else factors.scaling
            require(factors.scaling == scaling, f"{module}: scaling must be {scaling}; got {factors.scaling}")
            require(factors.A.dtype == factors.B.dtype == torch.float32, f"{module}: factors must be float32")
            require_alive(broadcast, module)


def frozen_branches_fit(case: Case) -> None:
    """A frozen branch has modules of the server, with their shapes, in float32."""
    for _, broadcast in sent(case, 2):
        frozen = broadcast.frozen or {}
        surplus = sorted(frozen.keys() - case.shapes.keys())
        require(not surplus, f"a frozen branch may only have modules of the server; got {surplus}")
        require(list(frozen) == sorted(frozen), f"modules of a frozen branch must be sorted; got {list(frozen)}")
        for module, factors in frozen.items():
            _require_fits(module, factors, case.shapes[module])


def what_clients_train_is_there(case: Case) -> None:
    """Cores are sent where they are trained, a kept factor is one that is trained, and a mask goes with ``B`` alone."""
    for _, broadcast in sent(case, 2):
        if broadcast.train_factors == "core":
            require(broadcast.cores is not None, "train_factors is core: the broadcast must have cores")
        for module, core in (broadcast.cores or {}).items():
            rank = broadcast.trainable[module].rank if module in broadcast.trainable else None
            require(
                tuple(core.shape) == (rank, rank) and core.dtype == torch.float32,
                f"{module}: a core must be float32 of shape {(rank, rank)}; got {core.dtype} {tuple(core.shape)}",
            )
        if broadcast.cores is not None:
            require(list(broadcast.cores) == list(broadcast.trainable), "cores must have the modules of trainable")
        kept = broadcast.kept
        require(
            kept is None or broadcast.train_factors in ("both", kept),
            f"kept: {kept} must be trained to be worth keeping",
        )
        require((kept is not None) <= case.traits.personal, "a method whose clients keep a factor must be personal")
        require(
            broadcast.mask is None or broadcast.train_factors == "B",
            "a mask chooses entries of B: train_factors must be B",
        )
        require(travelling(broadcast), "something that clients train must come back to the server")
        needs_more = broadcast.cores is not None or broadcast.mask is not None or broadcast.tail_penalty is not None
        require(
            not (needs_more and case.traits.takes_own_training),
            "takes_own_training: a function of the user's own trains no cores or chosen entries and adds no penalty",
        )
        is_plain = travelling(broadcast) == frozenset("AB") and broadcast.known_A is None and broadcast.mask is None
        require(
            is_plain or not case.traits.sends_both_factors,
            "sends_both_factors: both factors must travel both ways, none of them known or kept",
        )


def what_clients_can_make_is_what_they_would_make(case: Case) -> None:
    """Rows that need not be sent are those that a client makes, and nothing is outside the mask."""
    for _, broadcast in sent(case, 2):
        for module, factors in broadcast.trainable.items():
            if broadcast.known_A is not None:
                rows = known_rows(broadcast.known_A, module, factors.rank, factors.A.shape[1])
                same = torch.equal(factors.A, rows)
                require(same, f"{module}: A must be known_rows({broadcast.known_A!r}, ...), as known_A says")
            if broadcast.mask is not None:
                chosen = mask_of(broadcast.mask, module, (factors.B.shape[0], factors.B.shape[1]))
                require(not factors.B[~chosen].any(), f"{module}: B must be zero outside the mask, which is not sent")


def a_client_receives_the_same_whenever_it_asks(case: Case) -> None:
    """What a client is sent depends on the state, its ranks and its name alone, so that it can be repeated."""
    aggregator, state = case.aggregator, case.after_a_round()
    require(
        hasattr(aggregator, "broadcast_to") == case.traits.per_client,
        "per_client: a method must have broadcast_to if its traits say per_client, and only then",
    )
    for client_id in ("client-0", "client-1"):
        for plan in case.plans():
            first, again = (case.broadcast(state, plan, client_id) for _ in range(2))
            for (name, one), (_, other) in zip(_tensors(first), _tensors(again), strict=True):
                require(torch.equal(one, other), f"{name}: a broadcast must be the same when it is asked for again")


def sent(case: Case, *ranks: int) -> Iterator[tuple[Mapping[str, int], Broadcast]]:
    """Yield ranks and broadcast of clients, and of exported models, at several moments of a run.

    These are the start, one round and two rounds later, and after a round in which only the smallest client was there.

    Args:
        case: The method.
        ranks: Which ranks, all by default; methods for one rank only have the server's.
    """
    for state in _moments(case):
        for rank in [case.server_rank] if case.traits.needs_one_rank else ranks or range(1, case.server_rank + 1):
            plan = case.all_modules(rank)
            yield plan, case.aggregator.broadcast(state, plan)
            if case.traits.per_client:
                yield plan, case.broadcast(state, plan, f"client-{rank}")


def _moments(case: Case) -> Iterator[object]:
    """Yield the states, each before anything is trained from it, so that what is wrong is found where it is sent."""
    yield (start := case.start())
    yield (one_round := case.after_a_round())
    yield case.aggregator.aggregate(one_round, case.updates(one_round, seed=1))
    yield case.aggregator.aggregate(start, [case.update(start, case.plans()[-1], "client-3", 1.0, seed=5)])


def require_alive(broadcast: Broadcast, module: str) -> None:
    """Raise if a direction of a module can never learn, whatever clients do.

    Raises:
        ContractError: Naming the module.
    """
    factors = broadcast.trainable[module]
    rows, columns = factors.A.any(dim=1), factors.B.any(dim=0)
    by_trained = {"both": rows | columns, "A": rows | columns, "B": rows, "core": rows & columns}
    alive = by_trained[broadcast.train_factors]
    rule = "a direction that is zero in A and B can never learn"
    if broadcast.train_factors in ("B", "core"):
        rule = f"a direction that is zero in what stays as it is can never learn by training {broadcast.train_factors}"
    require(alive.all(), f"{module}: {rule}")


def _rank_of(case: Case, broadcast: Broadcast, module: str, asked: int) -> int:
    """Return the rank that a module must have: the one asked for, or the one it has where it may differ."""
    rank = broadcast.trainable[module].rank
    if broadcast.mask is not None:
        return rank
    if case.traits.fewer_directions:
        require(1 <= rank <= asked, f"{module}: rank must be in 1..{asked}, what was asked for; got {rank}")
        return rank
    return asked


def _require_fits(module: str, factors: LoraFactors, shape: tuple[int, int]) -> None:
    shapes = (tuple(factors.A.shape), tuple(factors.B.shape))
    expected = ((factors.rank, shape[1]), (shape[0], factors.rank))
    require(shapes == expected, f"{module}: A and B of a frozen branch must have the shapes {expected}; got {shapes}")
    finite = factors.A.isfinite().all() and factors.B.isfinite().all()
    require(
        finite and factors.A.dtype == factors.B.dtype == torch.float32, f"{module}: factors must be float32, finite"
    )


def _tensors(broadcast: Broadcast) -> Iterator[tuple[str, Tensor]]:
    for branch in (broadcast.trainable, broadcast.frozen or {}):
        for module, factors in branch.items():
            yield f"{module}.A", factors.A
            yield f"{module}.B", factors.B
    for module, core in (broadcast.cores or {}).items():
        yield f"{module}.core", core
