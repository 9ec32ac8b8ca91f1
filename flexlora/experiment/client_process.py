"""Runs the process that trains for a client: base model, data and client state stay in it between messages.

Started as ``python -m flexlora.experiment.client_process SOCKET PARENT``: where it answers, and the number of the
process that started it. What its user has decided comes as JSON over stdin.
"""

import json
import logging
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flexlora.orphans import end_with_parent

MODULE = "flexlora.experiment.client_process"


@dataclass(frozen=True)
class ClientOrder:
    """What a client's user has decided, as it goes to the process that trains.

    Attributes:
        client_id: Its name in the federation.
        data: File or folder with its rows.
        rank: In every module; None chooses by the device.
        model: Hub id, local folder or GGUF file of its base model, or ``embedded``.
        revision: Branch, tag or commit of ``model`` on the hub.
        device: Where to train.
        num_threads: CPU threads; None leaves them to the package.
        memory_bytes: That ranks are chosen for; None takes what is free.
        round_seconds: Most seconds of a round that ranks are chosen for; None is any.
    """

    client_id: str
    data: str
    rank: int | None = None
    model: str = "embedded"
    revision: str | None = None
    device: str = "auto"
    num_threads: int | None = None
    memory_bytes: int | None = None
    round_seconds: float | None = None

    def to_bytes(self) -> bytes:
        """Return it as JSON."""
        return json.dumps(asdict(self)).encode()


def main() -> None:
    """Answer requests until this process is ended."""
    end_with_parent(int(sys.argv[2]))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    order = ClientOrder(**json.loads(sys.stdin.buffer.read()))
    # Only now: importing torch takes longer than this process may outlive the other one.
    from flexlora.engines.flower.resident import serve

    serve(Path(sys.argv[1]), _work(order).answer)


def _work(order: ClientOrder) -> Any:
    from flexlora.engines.flower.client_settings import ClientSettings, uniform_plan
    from flexlora.engines.flower.client_work import ClientWork
    from flexlora.experiment.client_rank import OwnLimits, choose_plan

    limits = OwnLimits(order.memory_bytes, order.round_seconds)
    own = ClientSettings(
        client_id=order.client_id,
        data=Path(order.data),
        plan=None if order.rank is None else uniform_plan(order.rank),
        model=order.model,
        revision=order.revision,
        device=order.device,
        num_threads=order.num_threads,
    )
    return ClientWork(own, lambda run, model, examples: choose_plan(run, model, examples, limits))


if __name__ == "__main__":
    main()
