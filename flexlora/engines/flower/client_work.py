"""Answers the requests of a server at the client's end: bytes in, bytes out, whatever carries them.

A request says what run it belongs to; what it makes this process load or read is only ever what the client's own user
has named. Training is that of a simulation with this one client in its cohort.
"""

import importlib.metadata
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from flexlora.adapters.base_names import is_path, portable_name
from flexlora.data.encoded_clients import encode_client
from flexlora.data.pretraining import EMBEDDED_BASE, is_embedded_base
from flexlora.data.prompts import EncodedExample
from flexlora.engines.base import Parcel, RoundOrder
from flexlora.engines.flower.client_data import training_examples
from flexlora.engines.flower.client_settings import ClientSettings
from flexlora.engines.flower.envelope import Envelope, EnvelopeError, from_bytes, to_bytes
from flexlora.engines.flower.phase_names import PHASES
from flexlora.engines.flower.run_settings import RunSettings, read_run_settings
from flexlora.engines.process_layout import choose_processes
from flexlora.engines.simulation import SimulationEngine, reason_of
from flexlora.errors import FlexLoraError
from flexlora.federation.clients import ClientSpec, RankPlan
from flexlora.federation.messages import Broadcast, ClientFailure, KeptFactors
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.base_digest import base_digest
from flexlora.training.base_model import load_base_model
from flexlora.training.one_client import TrainClient
from flexlora.uplink.phases import ClientPhases
from flexlora.uplink.wire import decode_broadcast, encode_update

PACKAGES = ("flexlora", "torch", "transformers", "peft")

ChoosePlan = Callable[[RunSettings, AdaptedModel, Sequence[EncodedExample]], RankPlan]
"""Decides the ranks of a client whose user left them open, from the run, the loaded base model and the examples."""

_log = logging.getLogger(__name__)


class ClientRefusal(FlexLoraError, ValueError):
    """A request that this client does not answer: another base model, name or rank than its user has chosen."""


class ClientWork:
    """One client: keeps its base model, its tokenised data and its ranks between requests.

    Args:
        own: What the client's user has decided.
        choose_plan: Decides the ranks if ``own.plan`` is None; called once a run.
        train_one: Trains in place of the package's own loop.
    """

    def __init__(
        self, own: ClientSettings, choose_plan: ChoosePlan | None = None, train_one: TrainClient | None = None
    ) -> None:
        self._own, self._choose_plan, self._train_one = own, choose_plan, train_one
        self._model: AdaptedModel | None = None
        self._loaded_as: tuple[str, float] | None = None
        self._digest = ""
        self._run: RunSettings | None = None
        self._examples: Sequence[EncodedExample] = ()
        self._plan: RankPlan | None = own.plan
        # The engine that holds what was trained for the further phases of a round, and that round.
        self._holding: tuple[SimulationEngine, int] | None = None
        # Round -> what rounding lost of its update; forgotten if this process ends, which costs accuracy only.
        self._memories: dict[int, KeptFactors] = {}

    def answer(self, request: bytes) -> bytes:
        """Return the reply to a request; anything that goes wrong is a reply of kind ``failure``, never an error.

        Kinds of request, all with ``run`` among their fields:
        ``describe`` is answered by ``description``: name, ranks, number of training examples, digest of the base,
        versions. ``train`` carries a broadcast as ``uplink.wire`` writes it, and is answered by ``update`` with the
        trained factors in the same way; where the request names ``phases``, by ``held``: what was trained stays here
        for the further phases of the round. ``ask`` carries a request of such a phase; ``reply`` answers it.
        """
        fields: Mapping[str, Any] = {}
        try:
            asked = from_bytes(request)
            fields = _echo(asked)
            return to_bytes(self._answered(asked))
        except Exception as error:
            _log.warning("A request could not be answered.", exc_info=error)
            stage = "refused" if isinstance(error, ClientRefusal | EnvelopeError) else "train"
            return to_bytes(Envelope("failure", {**fields, "stage": stage, "reason": reason_of(error)}))

    def _answered(self, asked: Envelope) -> Envelope:
        if asked.kind not in ("describe", "train", "ask"):
            raise EnvelopeError(
                f"a client answers describe, train and ask; got {asked.kind!r:.60}: use the same version of flexlora "
                "on server and clients"
            )
        model = self._prepare(read_run_settings(asked.fields.get("run")))
        if asked.kind == "describe":
            return self._description(asked, model)
        return self._trained(asked, model) if asked.kind == "train" else self._replied(asked)

    def _prepare(self, run: RunSettings) -> AdaptedModel:
        """Return the base model, with everything ready for a run."""
        if self._run == run and self._model is not None:
            return self._model
        self._holding, self._memories = None, {}
        self._check_base_name(run)
        model = self._loaded(run)
        if self._digest != run.base_sha256:
            raise ClientRefusal(
                f"the base model of server and client must have the same weights; the server's {run.base_model} has "
                f"SHA-256 {run.base_sha256[:12]}..., {self._own.model} here has {self._digest[:12]}...: use the same "
                "model and revision"
            )
        examples = encode_client(
            self._own.client_id,
            training_examples(self._own.data, self._own.client_id, run),
            model.tokenizer,
            run.seed,
            template=run.template,
            max_length=run.max_length,
            loss_on=run.loss_on,
        )
        plan = self._plan if self._plan is not None else self._chosen(run, model, examples)
        _check_ranks(plan, run)
        self._plan, self._examples, self._run = plan, examples, run
        return model

    def _chosen(self, run: RunSettings, model: AdaptedModel, examples: Sequence[EncodedExample]) -> RankPlan:
        if self._choose_plan is None:
            raise ClientRefusal("a client needs a rank; its user has named none: choose one")
        return self._choose_plan(run, model, examples)

    def _check_base_name(self, run: RunSettings) -> None:
        own = self._own.model
        if is_embedded_base(own):
            name = EMBEDDED_BASE
        elif is_path(own):
            return  # A folder may be called anything; its weights tell.
        else:
            name = portable_name(own)
        if name != run.base_model:
            raise ClientRefusal(
                f"server and client must train the same base model; the server's run is of {run.base_model}, this "
                f"client was started with {own}: start it with that model, or with a folder that holds it"
            )

    def _loaded(self, run: RunSettings) -> AdaptedModel:
        """Return the base model in the type that the client's user or the run wants, loaded now if it has not been."""
        own = self._own
        dtype = own.dtype or run.dtype
        if self._model is not None and self._loaded_as == (dtype, run.dropout):
            return self._model
        self._model = None  # Two copies may be more than the machine has room for.
        network, tokenizer = load_base_model(
            own.model,
            dtype=dtype,
            device=_device(own.device),
            revision=own.revision,
            trust_remote_code=own.trust_remote_code,
            quantization=own.quantization,
        )
        self._digest = base_digest(own.model, dtype, own.revision)
        self._model = model = AdaptedModel(
            network, tokenizer, dropout=run.dropout, gradient_checkpointing=own.gradient_checkpointing
        )
        self._loaded_as = (dtype, run.dropout)
        _, num_threads = choose_processes(model.device.type, model.num_parameters, 1, own.num_threads)
        torch.set_num_threads(num_threads)
        return model

    def _description(self, asked: Envelope, model: AdaptedModel) -> Envelope:
        assert self._plan is not None
        return Envelope(
            "description",
            {
                **_echo(asked),
                "client_id": self._own.client_id,
                "num_examples": len(self._examples),
                "plan": {"name": self._plan.name, "patterns": [list(pair) for pair in self._plan.patterns]},
                "base_sha256": self._digest,
                "device": str(model.device),
                "versions": {name: _version(name) for name in PACKAGES},
            },
        )

    def _trained(self, asked: Envelope, model: AdaptedModel) -> Envelope:
        assert self._plan is not None and self._run is not None
        run, client_id, server_round = self._run, asked.text("client_id"), asked.whole("server_round")
        if client_id != self._own.client_id:
            raise ClientRefusal(f"this client is {self._own.client_id!r}; the request is for {client_id!r}")
        sent, phases = decode_broadcast(asked.payload), _phases(asked)
        _check_broadcast_ranks(sent, self._plan)
        counted = asked.fields.get("remembers")
        before = {number: memory for number, memory in self._memories.items() if number == counted}
        # Whatever was held belongs to an earlier round.
        self._holding = None
        client = ClientSpec(client_id, self._plan, len(self._examples))
        order = RoundOrder(
            server_round=server_round,
            seed=run.seed,
            learning_rate=asked.number("learning_rate"),
            wire_dtype=run.wire_dtype,
            uplink=(),
            cohort=(client,),
            parcels={client_id: Parcel(sent, run.wire_dtype, asked.payload)},
            phases=phases,
            kept={client_id: before[counted]} if counted in before else {},
            compression=run.compression,
        )
        engine = SimulationEngine(model, lambda _: self._examples, run.training.settings(), self._train_one)
        (outcome,) = engine.train(order)
        if isinstance(outcome, ClientFailure):
            return Envelope("failure", {**_echo(asked), "stage": outcome.stage, "reason": outcome.reason})
        told: dict[str, Any] = {"client_id": client_id, "num_examples": client.num_examples}
        if outcome.is_held:
            self._holding = engine, server_round
            return Envelope("held", {**_echo(asked), **told, "base_sha256": self._digest})
        # The server says next time which of these rounds counted.
        self._memories = before if outcome.kept is None else {**before, server_round: outcome.kept}
        packet = encode_update(outcome, sent, run.wire_dtype) if outcome.packet is None else outcome.packet
        told |= {
            "metrics": dict(outcome.metrics),
            "train_seconds": outcome.train_seconds,
            "base_sha256": self._digest,
        }
        return Envelope("update", {**_echo(asked), **told}, packet)

    def _replied(self, asked: Envelope) -> Envelope:
        """Return the answer to a request of a further phase of the round that this client has trained in."""
        client_id, server_round, phase = asked.text("client_id"), asked.whole("server_round"), asked.text("phase")
        if client_id != self._own.client_id:
            raise ClientRefusal(f"this client is {self._own.client_id!r}; the request is for {client_id!r}")
        if self._holding is None or self._holding[1] != server_round:
            raise ClientRefusal(
                f"this client holds nothing of round {server_round}; it has not trained in it, or its process was "
                "replaced: keep a resident worker running where rounds have several phases"
            )
        (answer,) = self._holding[0].ask(phase, {client_id: asked.payload})
        if isinstance(answer, ClientFailure):
            return Envelope("failure", {**_echo(asked), "phase": phase, "stage": phase, "reason": answer.reason})
        return Envelope("reply", {**_echo(asked), "phase": phase}, answer.data)


def _phases(asked: Envelope) -> ClientPhases | None:
    """Return what a request says about further phases of its round, None if there are none.

    Raises:
        EnvelopeError: If this version does not know them.
    """
    name = asked.fields.get("phases")
    if name is None:
        return None
    if name not in PHASES:
        raise EnvelopeError(f"phases of a round must be one of {', '.join(PHASES)}; got {name!r:.60}")
    return PHASES[name]()


def _echo(asked: Envelope) -> dict[str, Any]:
    """Return what a reply repeats of its request, so that a server can tell a late reply from one that is due."""
    run = asked.fields.get("run")
    return {
        "run_id": run.get("run_id") if isinstance(run, dict) else None,
        "client_id": asked.fields.get("client_id"),
        "server_round": asked.fields.get("server_round"),
    }


def _check_ranks(plan: RankPlan, run: RunSettings) -> None:
    ranks = [rank for _, rank in plan.patterns]
    if not any(ranks) or not all(0 <= rank <= run.largest_rank for rank in ranks):
        raise ClientRefusal(
            f"ranks of a client must be in 1..{run.largest_rank}, what the server's run allows; got "
            f"{', '.join(map(str, sorted(set(ranks))))}: choose a rank in that range"
        )


def _check_broadcast_ranks(sent: Broadcast, plan: RankPlan) -> None:
    """Raise if a broadcast asks for a larger rank than the client has said it can train."""
    if sent.mask is not None:
        return  # A sparse change of the whole weight: what is trained is a share of it, whatever its rank.
    ranks = plan.resolve(sent.trainable)
    for module, own in sent.trainable.items():
        if own.rank > ranks.get(module, 0):
            raise ClientRefusal(
                f"{module}: this client trains rank {ranks.get(module, 0)} at most (plan {plan.name}); the server sent "
                f"rank {own.rank}"
            )


def _device(name: str) -> str:
    """Return the device that ``auto`` stands for, or the one named.

    Raises:
        ClientRefusal: If it is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    is_there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not is_there.get(name.partition(":")[0], False):
        raise ClientRefusal(f"the device of a client must be there; got {name}: use cpu or auto")
    return name


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
