"""How long a client tries to reach its server."""

import pytest

pytest.importorskip("flwr")

from flexlora.engines.flower import client_loop
from flexlora.engines.flower.client_loop import ClientLoop, News
from flexlora.engines.flower.node import Connection, Place
from flexlora.engines.flower.refusals import LostError


class Late(Connection):
    """A connection to a server that answers the fourth time."""

    num_tries = 0

    def connect(self, earlier_node: int = 0) -> None:
        self.num_tries += 1
        if self.num_tries < 4:
            raise LostError("there is no answer")


@pytest.mark.parametrize(("stays", "num_tries"), [(True, 4), (False, 1)])
def test_a_client_that_stays_waits_for_its_server_however_long_it_takes(
    monkeypatch: pytest.MonkeyPatch, stays: bool, num_tries: int
) -> None:
    monkeypatch.setattr(client_loop, "_SHORTEST_PAUSE", 0.001)
    told: list[News] = []
    connection = Late(place := Place("127.0.0.1:9"))
    loop = ClientLoop(place, lambda request: request, told.append, wait_seconds=-1.0, stays=stays)
    if stays:
        loop._connect(connection, 0)
        assert told[-1].what == "connected"
    else:
        with pytest.raises(LostError):
            loop._connect(connection, 0)
    assert connection.num_tries == num_tries
