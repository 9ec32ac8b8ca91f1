"""Offers NVFlare an aggregator for clients of different LoRA ranks, its first model, and two calls for clients.

NVFlare's own aggregators average arrays and need one rank. Here the products are averaged (``aggregators.flexlora``),
or whatever another method of this package does; the model that goes out has the server's rank, and each client takes
its part of it (``load_received``).
"""

from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any, get_args

import torch
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.fl_constant import ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.aggregator import Aggregator as NvflareAggregator
from nvflare.app_common.abstract.model import ModelLearnable, ModelLearnableKey
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from pydantic import ValidationError

from flexlora.aggregators.base import Aggregator, state_types
from flexlora.aggregators.registry import method_class
from flexlora.aggregators.settings import traits_of
from flexlora.engines.nvflare.client import load_received, reply_of
from flexlora.engines.nvflare.cut import RULE_KEY, CutRule, check_can_cut, cut, is_positive
from flexlora.engines.nvflare.params import (
    SCALINGS_KEY,
    NvflareError,
    adapter_in,
    check_scalings,
    params_of,
    scalings_of,
)
from flexlora.engines.nvflare.persistor import AdapterPersistor
from flexlora.errors import FlexLoraError
from flexlora.experiment.method_config import read_method
from flexlora.federation.message_checks import MOST_EXAMPLES, check_update
from flexlora.federation.messages import Broadcast, Update
from flexlora.lora.factors import AdapterState, Scaling, ScalingPolicy
from flexlora.rounds.checkpoint import TENSORS_FILE, TREE_FILE, Checkpoint, load_latest, save_checkpoint
from flexlora.text import printable

__all__ = ["AdapterPersistor", "FlexLoraAggregator", "NvflareError", "load_received", "reply_of"]

_GIVEN = "given"


class FlexLoraAggregator(NvflareAggregator):
    """Aggregates LoRA adapters of different ranks, for the controller ``ScatterAndGather``.

    Clients return ``DataKind.WEIGHTS``: both factors of every module under PEFT's names at the client's own rank. In
    the meta are ``NUM_STEPS_CURRENT_ROUND``, the number of examples (the weight), and ``lora_scaling``, module path ->
    scaling. A reply that is broken, not finite, of another round or of other shapes is left out and named in the log
    and in ``exclusions``; it never ends a round.

    Attributes:
        lora_alpha: Of every client's ``LoraConfig``.
        method: Name of the aggregation method.
        options: Of the method.
        scaling: Rule of the scalings.
        exclusions: Round, client and reason of every reply that was left out.
    """

    def __init__(
        self,
        lora_alpha: float,
        method: str = "flexlora",
        options: dict[str, Any] | None = None,
        scaling: ScalingPolicy = "constant_alpha",
    ) -> None:
        """Build an aggregator; all arguments are plain values, which NVFlare writes into the job.

        Args:
            lora_alpha: Of every client's ``LoraConfig``, above 0.
            method: Name of an aggregation method whose clients can take their part from one model of the server's rank.
            options: Of the method.
            scaling: ``constant_alpha`` is PEFT's ``lora_alpha / r``, ``rslora`` is ``use_rslora=True``;
                ``constant_ratio`` is for clients that set ``lora_alpha`` to this many times their rank.

        Raises:
            NvflareError: If the method needs more than one model, or a value is not allowed.
            MethodError: If there is no such method.
        """
        super().__init__()
        # NVFlare reads the arguments of a component from the attributes of their names.
        self.lora_alpha, self.method, self.options, self.scaling = lora_alpha, method, options, scaling
        if not is_positive(lora_alpha):
            raise NvflareError(f"lora_alpha must be a finite number above 0; got {lora_alpha!r:.60}")
        if scaling not in get_args(ScalingPolicy):
            raise NvflareError(f"scaling must be one of {', '.join(get_args(ScalingPolicy))}; got {scaling!r:.60}")
        rule = Scaling(scaling, float(lora_alpha))
        self._aggregator: Aggregator[Any] = _made(method, options or {}, rule)
        check_can_cut(self._aggregator, method, rule)
        traits = traits_of(self._aggregator)
        self._rule = CutRule(rule, traits.folds_tail, traits.needs_one_rank)
        self._state: Any = None
        self._given: AdapterState | None = None
        self._updates: dict[str, Update] = {}
        self._lock = Lock()
        self.exclusions: list[tuple[int, str, str]] = []

    def add_to_fed_job(self, job: Any, ctx: Any, **kwargs: Any) -> str:
        """Add this component to a job, and none of this package's code; NVFlare's Job API calls it."""
        job.check_kwargs(args_to_check=kwargs, args_expected={})
        job.set_app_packages([*job.job.app_packages, "flexlora"])
        return job.add_component(ctx.comp_id or AppConstants.DEFAULT_AGGREGATOR_ID, self, ctx)

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Begin a round: the model that is about to be sent becomes the aggregate in the coordinates of the method."""
        if event_type != AppEventType.ROUND_STARTED:
            return
        try:
            self._begin(fl_ctx.get_prop(AppConstants.GLOBAL_MODEL))
        except Exception as error:  # NVFlare would log it and go on with a model that is no aggregate.
            self.system_panic(_told(error), fl_ctx)

    def accept(self, shareable: Shareable, fl_ctx: FLContext) -> bool:
        """Take a client's reply; return whether it will be part of the round."""
        server_round, client = fl_ctx.get_prop(AppConstants.CURRENT_ROUND), "?"
        try:
            client = str(shareable.get_peer_prop(ReservedKey.IDENTITY_NAME, default="?"))
            with self._lock:
                self._updates[client] = self._update(shareable, client, server_round)
        except Exception as error:  # Whatever values of somebody else make a library raise.
            reason = _told(error)
            self.exclusions.append((-1 if server_round is None else server_round, client, reason))
            self.log_warning(fl_ctx, f"Round {server_round} goes on without the reply of {client!r:.100}: {reason}")
            return False
        return True

    def aggregate(self, fl_ctx: FLContext) -> Shareable:
        """Return the new aggregate at the server's rank; the old one if no reply can be used.

        Raises:
            NvflareError: If no round has begun.
        """
        if self._given is None:
            raise NvflareError("there is nothing to aggregate before a round has begun; use ScatterAndGather")
        with self._lock:
            # By name, so that the same replies give the same sum in whatever order they came.
            updates = [update for _, update in sorted(self._updates.items())]
            self._updates = {}
        state = self._state
        if not updates:
            self.log_warning(fl_ctx, "No reply of this round can be used; the model stays as it is")
        else:
            try:
                state = self._aggregator.aggregate(self._state, updates)
            except FlexLoraError as error:
                self.log_error(fl_ctx, f"The model stays as it is, because the replies cannot be aggregated: {error}")
        if state is not self._state:
            self._go_to(state, self._given)
        return DXO(DataKind.WEIGHTS, params_of(self._given), self._meta()).to_shareable()

    def reset(self, fl_ctx: FLContext) -> None:
        """Forget the replies of the round so far."""
        with self._lock:
            self._updates = {}

    def get_persist_state(self, fl_ctx: FLContext) -> dict[str, bytes]:
        """Return the state for NVFlare's snapshot of a job: a checkpoint's two files, by name."""
        if self._state is None or self._given is None:
            return {}
        with TemporaryDirectory() as folder:
            given = {_GIVEN: Broadcast(self._given)}
            save_checkpoint(Path(folder), Checkpoint(0, self._state, {}, given), keep=1)
            (saved,) = Path(folder).iterdir()
            return {name: (saved / name).read_bytes() for name in (TREE_FILE, TENSORS_FILE)}

    def restore(self, state_data: Mapping[str, bytes] | None, fl_ctx: FLContext) -> None:
        """Go on from a snapshot.

        Raises:
            CheckpointError: If it is damaged or another method's.
        """
        if not state_data:
            return
        with TemporaryDirectory() as folder:
            saved = Path(folder) / "round-0000"
            saved.mkdir()
            for name in (TREE_FILE, TENSORS_FILE):
                (saved / name).write_bytes(state_data[name])
            checkpoint = load_latest(Path(folder), state_types(self._aggregator))
        assert checkpoint is not None
        self._state, self._given = checkpoint.state, checkpoint.sent[_GIVEN].trainable

    def _meta(self) -> dict[str, Any]:
        return {RULE_KEY: self._rule.to_meta(), SCALINGS_KEY: scalings_of(self._given or {})}

    def _begin(self, model: object) -> None:
        """Start from a model, unless it is what this aggregator itself returned, and put the aggregate in its place."""
        weights = model.get(ModelLearnableKey.WEIGHTS) if isinstance(model, ModelLearnable) else None
        if not isinstance(model, ModelLearnable) or not weights:
            raise NvflareError(
                "the job has no first model: give ScatterAndGather the persistor_id of an AdapterPersistor"
            )
        adapter = adapter_in(weights, self._rule.scaling)
        meta = model.get(ModelLearnableKey.META) or {}
        if SCALINGS_KEY in meta:
            check_scalings(adapter, meta[SCALINGS_KEY])
        with self._lock:
            self._updates = {}
            if self._given is None or not _is_equal(adapter, self._given):
                self._start_from(adapter)
            assert self._given is not None
            model[ModelLearnableKey.WEIGHTS] = params_of(self._given)
            model[ModelLearnableKey.META] = {**meta, **self._meta()}

    def _start_from(self, adapter: AdapterState) -> None:
        """Make a state of an adapter from elsewhere."""
        server_rank, rank = traits_of(self._aggregator).server_rank, min(own.rank for own in adapter.values())
        if self._rule.folds_tail and server_rank is not None and server_rank > rank:
            raise NvflareError(
                f"server_rank must be at most {rank}, the rank of the first model, which holds all that is sent; got "
                f"{server_rank}"
            )
        state = self._aggregator.init(adapter)
        if any(own.B.any() for own in adapter.values()):
            # The factors have been trained before; a first state stands for none that were.
            state = self._aggregator.aggregate(state, [Update("initial", adapter, 1.0)])
        self._go_to(state, adapter)

    def _go_to(self, state: Any, like: AdapterState) -> None:
        """Make a state the current one, sent at the ranks of ``like``."""
        sent = self._aggregator.broadcast(state, {module: own.rank for module, own in like.items()})
        if sent.frozen is not None:
            raise NvflareError(f"method {self.method} sends more directions than a model of the first one's rank holds")
        self._state, self._given = state, sent.trainable

    def _update(self, shareable: Shareable, client: str, server_round: int | None) -> Update:
        """Return what a client sent, checked.

        Raises:
            NvflareError: Naming the rule and the value, as do other errors of this package.
        """
        if self._given is None:
            raise NvflareError("no round has begun")
        code = shareable.get_return_code()
        if code and code != ReturnCode.OK:
            raise NvflareError(f"its return code must be OK; got {code!r:.60}")
        replied_to = shareable.get_cookie(AppConstants.CONTRIBUTION_ROUND)
        if server_round is None or replied_to != server_round:
            raise NvflareError(f"it must belong to round {server_round}; got {replied_to!r:.60}")
        if client in self._updates:
            raise NvflareError("a client may reply once in a round; this reply is its second")
        dxo = from_shareable(shareable)
        if dxo.data_kind != DataKind.WEIGHTS:
            raise NvflareError(
                f"its data kind must be WEIGHTS, whole factors (params_transfer_type FULL); got {dxo.data_kind!r:.60}"
            )
        weight = dxo.get_meta_prop(MetaKey.NUM_STEPS_CURRENT_ROUND)
        num_examples = float(weight) if isinstance(weight, Real) and not isinstance(weight, bool) else 0.0
        if not 0 < num_examples <= MOST_EXAMPLES:
            raise NvflareError(
                f"{MetaKey.NUM_STEPS_CURRENT_ROUND} in its meta must be above 0 and at most 2**53, the number of "
                f"examples; got {weight!r:.60}"
            )
        adapter = adapter_in(dxo.data, self._rule.scaling)
        update = Update(client, adapter, num_examples)
        self._check_ranks(adapter, self._given)
        ranks = {module: adapter[module].rank if module in adapter else own.rank for module, own in self._given.items()}
        shapes = {module: own.shape for module, own in self._given.items()}
        check_update(update, cut(self._given, ranks, self._rule), shapes)
        check_scalings(adapter, dxo.get_meta_prop(SCALINGS_KEY))
        return update

    def _check_ranks(self, adapter: AdapterState, given: AdapterState) -> None:
        """Raise unless every rank is one that the model can be cut to."""
        for module in sorted(adapter.keys() & given.keys()):
            rank, most = adapter[module].rank, given[module].rank
            if self._rule.needs_one_rank and rank != most:
                raise NvflareError(f"{module}: rank must be {most}, for method {self.method} needs one; got {rank}")
            if rank > most:
                raise NvflareError(f"{module}: rank must be in 1..{most}, the rank of the server's model; got {rank}")


def _made(method: str, options: Mapping[str, Any], rule: Scaling) -> Aggregator[Any]:
    """Return a method, its options checked as those of a configuration are.

    Raises:
        NvflareError: Naming the options that are wrong, a line for each.
        MethodError: If there is no such method, or its options contradict each other.
    """
    try:
        return read_method({**options, "name": method}).make(method_class(method), rule)
    except ValidationError as error:
        reasons = [(".".join(map(str, one["loc"])), one["msg"], one["input"]) for one in error.errors()]
        raise NvflareError(
            *(f"options of {method}: {place}: {rule}; got {value!r:.60}" for place, rule, value in reasons)
        ) from None


def _told(error: Exception) -> str:
    """Return an error as one line for a log."""
    return str(error) if isinstance(error, FlexLoraError) else printable(f"{type(error).__name__}: {error}")[:300]


def _is_equal(one: AdapterState, other: AdapterState) -> bool:
    """Return whether two adapters have the same factors, bit for bit."""
    return one.keys() == other.keys() and all(
        torch.equal(own.A, other[module].A) and torch.equal(own.B, other[module].B) for module, own in one.items()
    )
