"""The ClientApp: takes bytes out of a message, has them answered, and puts the reply into another message.

Flower starts a new process for each message, so nothing heavy is imported here: a resident worker that holds the base
model answers if there is one, and only without it does this process load everything itself.
"""

import logging

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from flexlora.engines.flower.client_settings import ClientSettingsError, settings_from
from flexlora.engines.flower.envelope import Envelope, from_bytes, to_bytes
from flexlora.engines.flower.records import from_records, to_records
from flexlora.engines.flower.resident import ResidentError, ask, resident_of_environment

_log = logging.getLogger(__name__)

app = ClientApp()


@app.query()
@app.train()
def answer(message: Message, context: Context) -> Message:
    """Return the reply to a message."""
    request = to_bytes(from_records(message.content))
    return Message(to_records(from_bytes(_answered(request, context))), reply_to=message)


def _answered(request: bytes, context: Context) -> bytes:
    """Return the reply to a request: that of the resident worker, or by this process itself if there is none."""
    resident = resident_of_environment()
    if resident is not None:
        try:
            return ask(resident, request)
        except ResidentError as error:
            _log.warning("%s; this process answers in its place.", error)
    try:
        own = settings_from(context.node_config)
    except ClientSettingsError as error:
        return to_bytes(Envelope("failure", {"stage": "refused", "reason": str(error)}))
    # Deferred: it takes seconds, which a process that only forwards bytes must not spend.
    from flexlora.engines.flower.client_work import ClientWork

    return ClientWork(own).answer(request)
