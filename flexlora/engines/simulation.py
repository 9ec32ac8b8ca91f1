"""Trains a cohort in this process: clients of any ranks share the passes through one base model."""

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from flexlora.data.prompts import EncodedExample
from flexlora.engines.base import RoundOrder
from flexlora.errors import FlexLoraError
from flexlora.federation.clients import ClientSpec
from flexlora.federation.kept_factors import kept_of, with_kept, without_kept
from flexlora.federation.messages import Broadcast, ClientFailure, Reply, Update
from flexlora.federation.streams import stream, stream_seed
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.group import TrainedClient, train_group
from flexlora.training.group_layers import reason_against_groups, trains_alone
from flexlora.training.group_passes import GroupJob
from flexlora.training.one_client import LocalTraining, TrainClient, train_client
from flexlora.uplink.base import send
from flexlora.uplink.compression import compressed, read_compressed
from flexlora.uplink.phases import Holding, HoldingClient
from flexlora.uplink.wire import received_update

_LONGEST_REASON = 300

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Received:
    """What a client has received and will train on."""

    client: ClientSpec
    sent: Broadcast
    job: GroupJob
    down_bytes: int


@dataclass(frozen=True)
class SimulationEngine:
    """An engine whose clients train in this process; factors still travel as bytes, both ways.

    Attributes:
        model: The base, shared by all clients.
        examples_of: Client id -> its training examples.
        settings: How every client trains.
        train_one: Trains one client at a time; None trains groups, where the base allows it.
        clients_per_group: Most clients in a group; None means by tokens and memory.
    """

    model: AdaptedModel
    examples_of: Callable[[str], Sequence[EncodedExample]]
    settings: LocalTraining
    train_one: TrainClient | None = None
    clients_per_group: int | None = None

    def train(self, order: RoundOrder) -> Iterator[Update | ClientFailure]:
        """Yield one outcome per client of the order's cohort, in cohort order, as soon as it is there.

        Anything that goes wrong with a client becomes its ``ClientFailure``; only interruptions pass. Whether the
        factors are what the client was asked for is for the server to check.
        """
        # Clients that have received and not yet sent, in cohort order.
        waiting: deque[_Received | ClientFailure] = deque()

        def jobs() -> Iterator[GroupJob]:
            """Yield the job of each client that has received all it needs."""
            for client in order.cohort:
                waiting.append(arrival := self._receive(order, client))
                if isinstance(arrival, _Received):
                    yield arrival.job

        for outcome in self._trained(jobs(), order):
            while isinstance(first := waiting.popleft(), ClientFailure):
                yield first
            yield self._send(order, first, outcome)
        # No client is left to train, so all of these have failed.
        yield from (failure for failure in waiting if isinstance(failure, ClientFailure))

    def ask(self, kind: str, requests: Mapping[str, bytes]) -> Iterator[Reply | ClientFailure]:
        """Yield one reply or failure per request, in their order, each answered when it is asked for."""
        for client_id, request in requests.items():
            holder = self._holders.get(client_id)
            if holder is None:
                reason = "this client holds nothing; it has not trained in this round, or its process was replaced"
                yield ClientFailure(client_id, kind, reason, len(request))
                continue
            try:
                reply = Reply(client_id, holder.answer(kind, request))
            except Exception as error:
                yield ClientFailure(client_id, kind, reason_of(error), len(request))
            else:
                yield reply

    def forget(self) -> None:
        """Drop what clients hold."""
        self._holders.clear()

    @cached_property
    def _holders(self) -> dict[str, HoldingClient]:
        return {}

    def _receive(self, order: RoundOrder, client: ClientSpec) -> _Received | ClientFailure:
        stage, down_bytes = "broadcast", 0
        try:
            parcel = order.parcel_of(client)
            sent, down_bytes = parcel.arrived, len(parcel.packet)
            stage = "train"
            job = GroupJob(
                with_kept(sent, order.kept.get(client.client_id)),
                self.examples_of(client.client_id),
                order.learning_rate,
                stream_seed(order.seed, "train", order.server_round, client.client_id),
            )
        except Exception as error:
            return ClientFailure(client.client_id, stage, reason_of(error), down_bytes)
        return _Received(client, sent, job, down_bytes)

    def _trained(self, jobs: Iterable[GroupJob], order: RoundOrder) -> Iterator[TrainedClient | Exception]:
        train_one = self.train_one
        sent = [order.parcels[key].broadcast for key in map(order.key_of, order.cohort) if key in order.parcels]
        in_groups = train_one is None and not any(trains_alone(broadcast) for broadcast in sent)
        if in_groups and self._objection(order) is None:
            return train_group(self.model, jobs, self.settings, self.clients_per_group, sent)
        return (self._train_alone(train_one or train_client, job) for job in jobs)

    def _objection(self, order: RoundOrder) -> str | None:
        """Return why clients must train one at a time, None if they need not; log a reason once."""
        broadcasts = [parcel.broadcast for parcel in order.parcels.values()]
        branches = [branch for sent in broadcasts for branch in (sent.trainable, sent.frozen or {})]
        paths = frozenset(path for branch in branches for path in branch)
        if paths not in self._objections:
            if self.model.checkpoints_gradients:
                reason = "activations are computed again instead of being kept (model.gradient_checkpointing)"
            else:
                reason = reason_against_groups(self.model.network, paths, base_drops_out=self.model.base_drops_out)
            self._objections[paths] = reason
            if reason is not None:
                _log.warning("Clients train one at a time, which is slower: %s.", reason)
        return self._objections[paths]

    @cached_property
    def _objections(self) -> dict[frozenset[str], str | None]:
        return {}

    def _train_alone(self, train_one: TrainClient, job: GroupJob) -> TrainedClient | Exception:
        start = time.perf_counter()
        try:
            adapter, metrics = train_one(
                self.model, job.broadcast, job.examples, self.settings, job.learning_rate, job.seed
            )
        except Exception as error:
            return error
        return TrainedClient(adapter, metrics, time.perf_counter() - start, self.model.read_cores())

    def _send(
        self, order: RoundOrder, arrival: _Received, outcome: TrainedClient | Exception
    ) -> Update | ClientFailure:
        client = arrival.client
        if isinstance(outcome, Exception):
            return ClientFailure(client.client_id, "train", reason_of(outcome), arrival.down_bytes)
        try:
            # Besides its factors, only these two numbers leave the client.
            told = {key: outcome.metrics[key] for key in ("loss", "steps") if key in outcome.metrics}
            rng = torch.Generator().manual_seed(stream_seed(order.seed, "uplink", order.server_round, client.client_id))
            sent, weight = arrival.sent, float(client.num_examples)
            own = Update(client.client_id, without_kept(outcome.adapter, sent), weight, told, cores=outcome.cores)
            own = send(order.uplink, own, rng)
            kept = kept_of(outcome.adapter, sent.kept)
            if order.phases is None and order.compression is not None:
                rng = stream(order.seed, "upload-rounding", order.server_round, client.client_id)
                before = order.kept.get(client.client_id)
                packet, remembered = compressed(own, sent, order.compression, rng, before)
                update = read_compressed(packet, own, sent, order.compression)
                update = dataclasses.replace(update, packet=packet)
                if order.compression.error_feedback:
                    kept = {**(kept or {}), **remembered}
            elif order.phases is None:
                update = received_update(own, sent, order.wire_dtype)
            else:
                seed = stream_seed(order.seed, "phases", order.server_round, client.client_id)
                holding = Holding(own, sent, order.server_round, seed)
                self._holders[client.client_id] = order.phases.begin(holding)
                update = Update(client.client_id, {}, weight, is_held=True)
        except Exception as error:
            return ClientFailure(client.client_id, "upload", reason_of(error), arrival.down_bytes)
        return dataclasses.replace(
            update, down_bytes=arrival.down_bytes, train_seconds=outcome.train_seconds, kept=kept
        )


def reason_of(error: Exception) -> str:
    """Return an error as one line for a person; our own messages need no class name in front."""
    text = " ".join(str(error).split()) or "no message"
    line = text if isinstance(error, FlexLoraError) else f"{type(error).__name__}: {text}"
    return line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]} ..."
