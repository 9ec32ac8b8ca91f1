"""Offers a Strategy to people who own their ServerApp: nodes of different LoRA ranks, PEFT state dicts both ways.

Flower's own strategies average arrays and need one rank; here every node is sent the aggregate at its own rank and the
products are averaged (``aggregators.flexlora``), or whatever another method of this package does.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.serverapp.strategy.strategy_utils import sample_nodes

from flexlora.aggregators.base import Aggregator
from flexlora.aggregators.registry import method_class
from flexlora.aggregators.settings import traits_of
from flexlora.engines.flower.peft_records import PeftRecordError, from_record, to_record
from flexlora.errors import FlexLoraError
from flexlora.federation.message_checks import MOST_EXAMPLES, check_update
from flexlora.federation.messages import Broadcast, Update
from flexlora.federation.streams import stream
from flexlora.lora.factors import Scaling, ScalingPolicy

RANK_KEY = "lora-rank"
"""Key of a node's rank: in its answer to a query, and in the config that it is sent."""

_log = logging.getLogger("flwr")


class StrategyError(FlexLoraError, ValueError):
    """A strategy, or initial arrays, that cannot be used."""


class FlexLoraStrategy(Strategy):
    """Federated LoRA among nodes of different ranks.

    Every node is sent a state dict of its own rank under ``arrayrecord_key``, and under ``configrecord_key`` the keys
    ``server-round``, ``lora-rank`` and ``lora-alpha`` (the ``r`` and ``lora_alpha`` of its ``LoraConfig``). It returns
    a state dict of the same shapes, and a MetricRecord with ``weighted_by_key``. A reply that is broken, not finite or
    of other shapes is left out and named in ``exclusions``; it never ends a round.

    Attributes:
        exclusions: Round, node and reason of every reply that was left out.
    """

    def __init__(
        self,
        lora_alpha: float,
        *,
        rank_of: Callable[[int], int] | Mapping[int, int] | None = None,
        method: str = "flexlora",
        options: Mapping[str, Any] | None = None,
        scaling: ScalingPolicy = "constant_alpha",
        fraction_train: float = 1.0,
        fraction_evaluate: float = 1.0,
        min_available_nodes: int = 2,
        seed: int = 0,
        weighted_by_key: str = "num-examples",
        arrayrecord_key: str = "arrays",
        configrecord_key: str = "config",
        query_seconds: float = 120.0,
    ) -> None:
        """Build a strategy.

        Args:
            lora_alpha: Of every node's ``LoraConfig``.
            rank_of: Node id -> rank. None asks each node once, by a query that it answers with a ConfigRecord under
                ``configrecord_key`` that holds ``lora-rank``.
            method: Name of an aggregation method whose clients get and return both factors and nothing else.
            options: Of the method.
            scaling: ``constant_alpha`` is PEFT's ``lora_alpha / r``, ``rslora`` is ``use_rslora=True``;
                ``constant_ratio`` is for nodes that set ``lora_alpha`` to this many times their rank.
            fraction_train: Share of the nodes that train in a round, above 0.
            fraction_evaluate: Share of the nodes that evaluate; 0 skips it.
            min_available_nodes: Fewest connected nodes for a round.
            seed: Of the sampling.
            weighted_by_key: Metric with a reply's weight.
            arrayrecord_key: Name of the record with the state dict, both ways.
            configrecord_key: Name of the record with the settings.
            query_seconds: How long to wait for answers to the query.

        Raises:
            StrategyError: If the method needs more of its clients than a state dict.
            MethodError: If there is no such method.
        """
        for name, fraction, least in (("train", fraction_train, 1e-9), ("evaluate", fraction_evaluate, 0.0)):
            if not least <= fraction <= 1:
                raise StrategyError(f"fraction_{name} must be in 0..1{', above 0' if least else ''}; got {fraction}")
        rule = Scaling(scaling, float(lora_alpha))
        self._aggregator: Aggregator[Any] = method_class(method)(scaling=rule, **dict(options or {}))
        traits = traits_of(self._aggregator)
        if traits.personal or traits.per_client or traits.folds_into_base or not traits.sends_both_factors:
            raise StrategyError(
                f"method {method!r} sends clients more than factors, or less; a strategy speaks in PEFT state dicts: "
                "take flexlora, aligned or fedit, or run the federation with flexlora's own ServerApp"
            )
        self._rule, self._rank_of = rule, rank_of
        self._fractions = {MessageType.TRAIN: fraction_train, MessageType.EVALUATE: fraction_evaluate}
        self._least, self._seed, self._query_seconds = min_available_nodes, seed, query_seconds
        self._weight, self._arrays, self._config = weighted_by_key, arrayrecord_key, configrecord_key
        self._ranks: dict[int, int] = {}
        self._state: Any = None
        self._given: ArrayRecord | None = None
        self._server_ranks: dict[str, int] = {}
        self._sent: dict[int, Broadcast] = {}
        self.exclusions: list[tuple[int, int, str]] = []

    def summary(self) -> None:
        """Log what the strategy does."""
        _log.info("\t├──> Method: %s", self._aggregator)
        train, evaluate = self._fractions[MessageType.TRAIN], self._fractions[MessageType.EVALUATE]
        _log.info("\t├──> Fraction: train (%.2f) | evaluate (%.2f), seed %d", train, evaluate, self._seed)
        _log.info("\t└──> Ranks: %s", "asked for" if self._rank_of is None else "given")

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return a message for each sampled node, with the aggregate at its own rank.

        Raises:
            StrategyError: If ``arrays`` is no state dict of a LoRA adapter, or the method sends a frozen branch.
        """
        self._take(arrays)
        self._sent = {}
        return self._messages(MessageType.TRAIN, server_round, config, grid)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return a message for each node that evaluates, with the aggregate at its own rank."""
        if not self._fractions[MessageType.EVALUATE]:
            return []
        self._take(arrays)
        return self._messages(MessageType.EVALUATE, server_round, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the new aggregate at the server's ranks and the mean metrics; nothing if no reply can be used."""
        metrics: list[tuple[float, MetricRecord]] = []
        updates: list[Update] = []
        num_excluded = len(self.exclusions)
        # By node, so that the same replies give the same sum in whatever order they came.
        for reply in sorted(replies, key=lambda reply: reply.metadata.src_node_id):
            try:
                update, measured = self._update(reply)
            except FlexLoraError as error:
                self._exclude(server_round, reply, str(error))
                continue
            updates.append(update)
            metrics.append((update.weight, measured))
        if not updates:
            return None, None
        self._state = self._aggregator.aggregate(self._state, updates)
        self._given = to_record(self._aggregator.broadcast(self._state, self._server_ranks).adapter)
        mean = mean_metrics(metrics, self._weight)
        mean["num-excluded"] = len(self.exclusions) - num_excluded
        return self._given, mean

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return the mean metrics, weighted by examples; None without any."""
        metrics: list[tuple[float, MetricRecord]] = []
        for reply in sorted(replies, key=lambda reply: reply.metadata.src_node_id):
            try:
                metrics.append(self._measured(reply))
            except FlexLoraError as error:
                self._exclude(server_round, reply, str(error))
        return mean_metrics(metrics, self._weight) if metrics else None

    def _take(self, arrays: ArrayRecord) -> None:
        """Start from these arrays, unless they are what this strategy itself returned."""
        if arrays is self._given:
            return
        try:
            adapter = from_record(arrays, self._rule)
        except PeftRecordError as error:
            raise StrategyError(
                f"initial_arrays: {error}; take ArrayRecord(get_peft_model_state_dict(model))"
            ) from None
        self._server_ranks = {module: own.rank for module, own in adapter.items()}
        self._shapes = {module: own.shape for module, own in adapter.items()}
        self._state = self._aggregator.init(adapter)
        if any(own.B.any() for own in adapter.values()):
            # The factors have been trained before; a first state stands for none that were.
            self._state = self._aggregator.aggregate(self._state, [Update("initial", adapter, 1.0)])
        self._given = arrays

    def _messages(self, kind: str, server_round: int, config: ConfigRecord, grid: Grid) -> list[Message]:
        _, available = sample_nodes(grid, self._least, 0)
        size = max(1, round(self._fractions[kind] * len(available)))
        ordered = sorted(available)
        drawn = stream(self._seed, f"strategy-{kind}", server_round).choice(len(ordered), size=size, replace=False)
        messages: list[Message] = []
        records: dict[int, tuple[Broadcast, ArrayRecord]] = {}
        for node_id in [ordered[index] for index in sorted(drawn.tolist())]:
            rank = self._rank(grid, node_id, ordered, server_round)
            if rank is None:
                continue
            if rank not in records:
                sent = self._broadcast(rank)
                records[rank] = sent, to_record(sent.trainable)
            self._sent[node_id] = records[rank][0]
            alpha = self._rule.lora_alpha * (rank if self._rule.policy == "constant_ratio" else 1)
            own = ConfigRecord({**config, "server-round": server_round, RANK_KEY: rank, "lora-alpha": alpha})
            content = RecordDict({self._arrays: records[rank][1], self._config: own})
            messages.append(Message(content, node_id, kind, group_id=str(server_round)))
        return messages

    def _broadcast(self, rank: int) -> Broadcast:
        sent = self._aggregator.broadcast(
            self._state, {module: min(rank, own) for module, own in self._server_ranks.items()}
        )
        if sent.frozen is not None:
            raise StrategyError(
                "the method sends a frozen branch, which a PEFT state dict cannot hold: leave fold_tail out"
            )
        return sent

    def _rank(self, grid: Grid, node_id: int, available: Iterable[int], server_round: int) -> int | None:
        """Return the rank of a node, None if it has none that can be used."""
        if isinstance(self._rank_of, Mapping):
            found = self._rank_of.get(node_id)
        elif self._rank_of is not None:
            found = self._rank_of(node_id)
        else:
            if node_id not in self._ranks:
                self._ask([other for other in available if other not in self._ranks], grid)
            found = self._ranks.get(node_id)
        most = max(self._server_ranks.values())
        if isinstance(found, bool) or not isinstance(found, int) or not 1 <= found <= most:
            reason = f"its rank must be in 1..{most}, the rank of initial_arrays; got {found!r:.60}"
            self.exclusions.append((server_round, node_id, reason))
            _log.warning("Node %d is left out of round %d: %s", node_id, server_round, reason)
            return None
        return found

    def _ask(self, node_ids: list[int], grid: Grid) -> None:
        queries = [Message(RecordDict(), node_id, MessageType.QUERY) for node_id in node_ids]
        for reply in grid.send_and_receive(queries, timeout=self._query_seconds):
            told = None if reply.has_error() else reply.content.config_records.get(self._config)
            rank = None if told is None else told.get(RANK_KEY)
            if isinstance(rank, int):
                self._ranks[reply.metadata.src_node_id] = rank

    def _update(self, reply: Message) -> tuple[Update, MetricRecord]:
        weight, measured = self._measured(reply)
        record = reply.content.array_records.get(self._arrays)
        node_id = reply.metadata.src_node_id
        if record is None or len(reply.content.array_records) != 1:
            raise StrategyError(f"a reply must hold one ArrayRecord, called {self._arrays!r}")
        if node_id not in self._sent:
            raise StrategyError("nothing was sent to this node in this round, or it has answered already")
        sent = self._sent.pop(node_id)
        update = Update(str(node_id), from_record(record, self._rule), weight)
        check_update(update, sent, self._shapes)
        return update, measured

    def _measured(self, reply: Message) -> tuple[float, MetricRecord]:
        """Return weight and metrics of a reply."""
        if reply.has_error():
            raise StrategyError(f"Flower reported error {reply.error.code}: {reply.error.reason or 'no reason'}")
        records = list(reply.content.metric_records.values())
        weight = records[0].get(self._weight) if len(records) == 1 else None
        if not isinstance(weight, int | float) or not 0 < weight <= MOST_EXAMPLES:
            raise StrategyError(
                f"a reply must hold one MetricRecord with {self._weight!r} above 0 and at most 2**53; got "
                f"{weight!r:.60}"
            )
        return float(weight), records[0]

    def _exclude(self, server_round: int, reply: Message, reason: str) -> None:
        node_id = reply.metadata.src_node_id
        self.exclusions.append((server_round, node_id, reason))
        _log.warning("Round %d goes on without the reply of node %d: %s", server_round, node_id, reason)


def mean_metrics(metrics: Iterable[tuple[float, MetricRecord]], weighted_by_key: str) -> MetricRecord:
    """Return the weighted mean of the numbers that all records have, the weights themselves left out.

    Args:
        metrics: Weight, above 0, and what was measured.
        weighted_by_key: Key of the weights.
    """
    pairs = list(metrics)
    total = math.fsum(weight for weight, _ in pairs)
    shared = set.intersection(*(set(record) for _, record in pairs)) - {weighted_by_key}
    mean = MetricRecord()
    for key in sorted(shared):
        values = [(weight, record[key]) for weight, record in pairs]
        if all(isinstance(value, int | float) for _, value in values):
            mean[key] = math.fsum(weight * float(value) for weight, value in values) / total  # type: ignore[arg-type]
    return mean
