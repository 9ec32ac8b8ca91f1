"""Judges what clients answer: a description that can be used, an update that fits, or a failure with its reason."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from flexlora.engines.base import RoundOrder
from flexlora.engines.flower.envelope import Envelope, EnvelopeError
from flexlora.engines.flower.run_settings import RunSettings
from flexlora.federation.clients import ClientSpec, RankPlan
from flexlora.federation.messages import ClientFailure, Reply, Update
from flexlora.patterns import PatternError, bounded_pattern
from flexlora.text import printable
from flexlora.uplink.compression import compressed_size, memory_of_round, read_compressed
from flexlora.uplink.wire import WireError, decode_update, update_size

_STAGES = ("refused", "broadcast", "train", "upload")
_LONGEST_REASON = 500
_LONGEST_NAME = 200
_MOST_PATTERNS = 1000
_MOST_EXAMPLES = 10**12
# Names of tensors and scalings are written once more by another version; nothing else makes an update longer.
_SPARE_BYTES = 1 << 20


@dataclass(frozen=True)
class Description:
    """Who a client is, by its own account.

    Attributes:
        spec: Name, ranks and number of training examples.
        device: Where it trains, for people.
        versions: Package -> version.
    """

    spec: ClientSpec
    device: str
    versions: dict[str, str]


def read_description(reply: Envelope, run: RunSettings) -> Description:
    """Return what a client says about itself.

    Raises:
        EnvelopeError: If it cannot take part in the run, with the reason that it gives or the rule that it breaks.
    """
    if reply.kind == "failure":
        raise EnvelopeError(_reason(reply))
    if reply.kind != "description":
        raise EnvelopeError(f"a client must describe itself; it answered {reply.kind!r:.60}")
    client_id, num_examples = reply.text("client_id"), reply.whole("num_examples")
    if not client_id or len(client_id) > _LONGEST_NAME or not client_id.isprintable():
        raise EnvelopeError(f"a client's name must be 1 to {_LONGEST_NAME} printable characters; got {client_id!r:.60}")
    if not 1 <= num_examples <= _MOST_EXAMPLES:
        raise EnvelopeError(f"{client_id}: a client must have 1 training example or more; it has {num_examples}")
    _check_base(reply, run)
    plan = _plan(reply.fields.get("plan"), run)
    versions = reply.fields.get("versions")
    known = (
        {printable(str(name)[:60]): printable(str(value)[:60]) for name, value in versions.items()}
        if isinstance(versions, dict)
        else {}
    )
    device = printable(str(reply.fields.get("device"))[:60])
    return Description(ClientSpec(client_id, plan, num_examples), device, known)


def _plan(value: Any, run: RunSettings) -> RankPlan:
    """Return the rank plan in a description."""
    name = value.get("name") if isinstance(value, dict) else None
    patterns = value.get("patterns") if isinstance(value, dict) else None
    pairs = [pair for pair in patterns if _is_pair(pair)] if isinstance(patterns, list) else []
    is_whole = isinstance(patterns, list) and 1 <= len(pairs) == len(patterns) <= _MOST_PATTERNS
    if not is_whole or not isinstance(name, str) or not 1 <= len(name) <= 100 or not name.isprintable():
        raise EnvelopeError("a client's plan must have a name, and pairs of a pattern and a rank")
    for pattern, rank in pairs:
        if not 0 <= rank <= run.largest_rank:
            raise EnvelopeError(f"ranks must be in 0..{run.largest_rank}, what the run allows; the client's is {rank}")
        try:
            bounded_pattern(pattern)
        except PatternError as error:
            raise EnvelopeError(f"the client's plan: {error}") from error
    return RankPlan(name, tuple((pattern, rank) for pattern, rank in pairs))


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str)
        and isinstance(value[1], int)
        and not isinstance(value[1], bool)
    )


def _check_base(reply: Envelope, run: RunSettings) -> None:
    digest = reply.text("base_sha256")
    if digest != run.base_sha256:
        raise EnvelopeError(
            f"its base model has other weights: SHA-256 {digest[:12]}..., not {run.base_sha256[:12]}... as the server's"
        )


def update_of(reply: Envelope, client: ClientSpec, order: RoundOrder, run: RunSettings) -> Update | ClientFailure:
    """Return the update in a client's reply, or why there is none; numbers in it are for the loop to check.

    Args:
        reply: What came back.
        client: Who was asked.
        order: Of the round.
        run: As every client was told it.
    """
    down_bytes = len(order.parcel_of(client).packet)

    def failed(stage: str, reason: str) -> ClientFailure:
        return ClientFailure(client.client_id, stage, reason, down_bytes, len(reply.payload))

    due = {"run_id": run.run_id, "client_id": client.client_id, "server_round": order.server_round}
    wrong = [name for name, value in due.items() if reply.fields.get(name) != value]
    if wrong and not (reply.kind == "failure" and reply.fields.get("run_id") is None):
        got = ", ".join(f"{name} {reply.fields.get(name)!r:.60}" for name in wrong)
        return failed("stale", f"its reply belongs to another request: {got}")
    if reply.kind == "failure":
        stage = reply.fields.get("stage")
        return failed(stage if stage in _STAGES else "train", _reason(reply))
    if order.phases is not None:
        return _held(reply, client, run, down_bytes)
    sent = order.parcel_of(client).arrived
    how = order.compression
    size = update_size(None, sent, order.wire_dtype) if how is None else compressed_size(sent, how)
    most = size + _SPARE_BYTES
    try:
        if reply.kind != "update":
            raise EnvelopeError(f"an update was expected; the client answered {reply.kind!r:.60}")
        _check_base(reply, run)
        if len(reply.payload) > most:
            raise EnvelopeError(f"an update must have at most {most:,} bytes; got {len(reply.payload):,}")
        own = Update(
            client.client_id,
            {},
            float(client.num_examples),
            _metrics(reply.fields.get("metrics")),
            down_bytes=down_bytes,
            train_seconds=max(0.0, _finite(reply.fields.get("train_seconds")) or 0.0),
        )
        if how is None:
            return decode_update(reply.payload, own, sent)
        update = read_compressed(reply.payload, own, sent, how)
        return replace(update, kept=memory_of_round(order.server_round)) if how.error_feedback else update
    except (EnvelopeError, WireError) as error:
        return failed("validate", str(error))


def _held(reply: Envelope, client: ClientSpec, run: RunSettings, down_bytes: int) -> Update | ClientFailure:
    """Return word of an update that its client holds for the further phases of the round."""
    try:
        if reply.kind != "held" or reply.payload:
            raise EnvelopeError(f"word of a held update was expected; the client answered {reply.kind!r:.60}")
        _check_base(reply, run)
    except EnvelopeError as error:
        return ClientFailure(client.client_id, "validate", str(error), down_bytes, len(reply.payload))
    return Update(client.client_id, {}, float(client.num_examples), down_bytes=down_bytes, is_held=True)


def phase_reply_of(
    reply: Envelope, client_id: str, due: Mapping[str, Any], request_bytes: int
) -> Reply | ClientFailure:
    """Return what a client answered in a further phase of a round, or why it did not.

    Args:
        reply: What came back.
        client_id: Who was asked.
        due: What a reply has to repeat of its request; ``phase`` is the stage of a failure.
        request_bytes: Size of the request.
    """
    phase = str(due["phase"])
    wrong = [name for name, value in due.items() if reply.fields.get(name) != value]
    if reply.kind == "failure":
        return ClientFailure(client_id, phase, _reason(reply), request_bytes)
    if wrong or reply.kind != "reply":
        reason = f"its reply belongs to another request: {reply.kind!r:.60}, other {', '.join(wrong) or 'kind'}"
        return ClientFailure(client_id, phase, reason, request_bytes, len(reply.payload))
    return Reply(client_id, reply.payload)


def _metrics(value: Any) -> dict[str, float]:
    """Return the loss and the number of steps that a client reports, if these are numbers."""
    found = {name: _finite(value.get(name)) for name in ("loss", "steps")} if isinstance(value, dict) else {}
    return {name: number for name, number in found.items() if number is not None and 0 <= number < _MOST_EXAMPLES}


def _finite(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _MOST_EXAMPLES
    return float(value) if is_number and math.isfinite(value) else None


def _reason(reply: Envelope) -> str:
    """Return why a client failed, by its own account, as one line."""
    text = printable(" ".join(str(reply.fields.get("reason") or "it gave no reason").split()))
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]} ..."
