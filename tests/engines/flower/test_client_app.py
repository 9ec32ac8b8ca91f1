"""The ClientApp answers real messages, and says what its node's configuration lacks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message

from flexlora.engines.flower.client_app import app
from flexlora.engines.flower.client_settings import ClientSettingsError, settings_from
from flexlora.engines.flower.envelope import Envelope
from flexlora.engines.flower.records import from_records, to_records
from flexlora.engines.flower.run_settings import RunSettings


def asked(run: RunSettings, context: Context) -> Envelope:
    request = Envelope("describe", {"run": run.model_dump(mode="json")})
    message = Message(to_records(request), 11, "query")
    message.metadata.__dict__["_message_id"] = "message-1"
    return from_records(app(message, context).content)


def test_a_query_is_answered_by_what_the_node_was_started_with(
    flower_run: RunSettings, silos: Path, empty_context: Callable[[dict[str, Any]], Context]
) -> None:
    reply = asked(flower_run, empty_context({"data": str(silos / "south.jsonl"), "rank": 4}))
    assert (reply.kind, reply.fields["client_id"], reply.fields["num_examples"]) == ("description", "south", 20)


def test_a_node_without_data_says_how_to_start_it(
    flower_run: RunSettings, empty_context: Callable[[dict[str, Any]], Context]
) -> None:
    reply = asked(flower_run, empty_context({}))
    assert reply.kind == "failure" and "--node-config" in reply.fields["reason"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rank": 0}, "rank in"),
        ({"rank": "8"}, "rank in"),
        ({"dtype": "int4"}, "dtype in"),
        ({"num-threads": 0}, "num-"),
    ],
)
def test_settings_of_a_node_that_mean_nothing_are_named(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ClientSettingsError, match=reason):
        settings_from({"data": "rows.jsonl", **change})


def test_a_client_is_called_after_its_data_unless_it_has_a_name() -> None:
    assert settings_from({"data": "silos/north.jsonl.gz"}).client_id == "north"
    assert settings_from({"data": "north.jsonl", "name": "ward 3"}).client_id == "ward 3"
    assert settings_from({"data": "north.jsonl", "trust-remote-code": "true"}).trust_remote_code is False
