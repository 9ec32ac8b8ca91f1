"""Trains a cohort in this process, one client after the other on one shared base model."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from flexlora import FlexLoraError
from flexlora.clients import Broadcast, ClientFailure, ClientSpec, RankPlan, Update, stream_seed
from flexlora.data.prompts import EncodedExample
from flexlora.lora.factors import AdapterState
from flexlora.model import AdaptedModel
from flexlora.training import LocalTraining, train_client
from flexlora.uplink.base import UplinkStep, send
from flexlora.uplink.wire import WireDtype, decode, decode_broadcast, encode, encode_broadcast

_LONGEST_REASON = 300


@runtime_checkable
class TrainClient(Protocol):
    """What trains one client; ``flexlora.training.train_client`` unless a test or an experiment puts in another."""

    def __call__(
        self,
        model: AdaptedModel,
        broadcast: Broadcast,
        examples: Sequence[EncodedExample],
        settings: LocalTraining,
        learning_rate: float,
        seed: int,
    ) -> tuple[AdapterState, Mapping[str, float]]:
        """Return the trained factors and what was measured."""
        ...


@dataclass(frozen=True)
class SimulationEngine:
    """An engine whose clients live here; factors still travel as bytes, both ways.

    Attributes:
        model: The base, shared by all clients.
        examples_of: Client id -> its training examples.
        settings: How every client trains.
        learning_rate: Server round -> learning rate.
        seed: Of the run; each client in each round has a stream of its own.
        wire_dtype: Dtype of the factors on their way.
        train_one: What trains one client.
        uplink: The steps whose client ends run on each update before it is encoded.
    """

    model: AdaptedModel
    examples_of: Callable[[str], Sequence[EncodedExample]]
    settings: LocalTraining
    learning_rate: Callable[[int], float]
    seed: int
    wire_dtype: WireDtype = "float32"
    train_one: TrainClient = train_client
    uplink: Sequence[UplinkStep] = ()

    def train(
        self, server_round: int, cohort: Sequence[ClientSpec], broadcasts: Mapping[RankPlan, Broadcast]
    ) -> Iterator[Update | ClientFailure]:
        """Yield one outcome per client of ``cohort``, in cohort order, as soon as it is there.

        Anything that goes wrong with a client becomes its ``ClientFailure``; only interruptions pass. Whether the
        factors are what the client was asked for is for the server to check.
        """
        packets: dict[RankPlan, bytes] = {}
        for client in cohort:
            yield self._take_turn(server_round, client, broadcasts, packets)

    def _take_turn(
        self,
        server_round: int,
        client: ClientSpec,
        broadcasts: Mapping[RankPlan, Broadcast],
        packets: dict[RankPlan, bytes],
    ) -> Update | ClientFailure:
        stage, down_bytes = "broadcast", 0
        try:
            if client.plan not in packets:
                packets[client.plan] = encode_broadcast(broadcasts[client.plan], self.wire_dtype)
            broadcast = decode_broadcast(packets[client.plan])
            down_bytes = len(packets[client.plan])
            stage, start = "train", time.perf_counter()
            adapter, metrics = self.train_one(
                self.model,
                broadcast,
                self.examples_of(client.client_id),
                self.settings,
                self.learning_rate(server_round),
                stream_seed(self.seed, "train", server_round, client.client_id),
            )
            train_seconds = time.perf_counter() - start
            # What leaves the client besides its factors: these two numbers and nothing else that was measured.
            told = {key: metrics[key] for key in ("loss", "steps") if key in metrics}
            stage = "upload"
            rng = torch.Generator().manual_seed(stream_seed(self.seed, "uplink", server_round, client.client_id))
            update = send(self.uplink, Update(client.client_id, adapter, float(client.num_examples), told), rng)
            sent = encode(update.payload, self.wire_dtype)
            payload = decode(sent)
        except Exception as error:
            return ClientFailure(client.client_id, stage, _reason(error), down_bytes)
        return dataclasses.replace(
            update, payload=payload, up_bytes=len(sent), down_bytes=down_bytes, train_seconds=train_seconds
        )


def _reason(error: Exception) -> str:
    """Return one line for a person; our own messages need no class name in front."""
    text = " ".join(str(error).split()) or "no message"
    line = text if isinstance(error, FlexLoraError) else f"{type(error).__name__}: {text}"
    return line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]} ..."
