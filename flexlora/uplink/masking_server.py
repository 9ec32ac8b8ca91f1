"""The server's end of masked sums: it hands keys and shares around and takes the masks off the sum, off nothing else.

See ``masking_client`` for the protocol. It knows of no transport: each phase is a function that makes the requests and
one that takes the replies, and tells who failed by what it sent. What it keeps of the numbers of clients is their sum.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from flexlora.errors import FlexLoraError
from flexlora.uplink.mask_keys import KEY_BYTES, Words, agreed_key, mask_of_key, new_key_pair
from flexlora.uplink.masking_client import MOST_SUMS
from flexlora.uplink.phase_messages import Fields, bytes_by_client, bytes_in, in_hex
from flexlora.uplink.phases import PhaseError
from flexlora.uplink.secret_shares import SHARE_BYTES, SharesError, restore

FEWEST_CLIENTS = 3
"""Smallest cohort of a secure sum: of two, each could take its own numbers off the sum and read the other's."""

Failures = dict[str, str]
"""Client -> what was wrong with what it sent."""


class MaskedSumError(FlexLoraError, RuntimeError):
    """So many clients dropped out that the sum cannot be unmasked; nothing of it is known."""


@dataclass(frozen=True)
class MaskingTerms:
    """What the masked sums of a round rest on.

    Attributes:
        num_sums: Sums that will be taken.
        threshold: Share of a client's neighbours, itself included, of whom so many must survive; above 0.5. Fewer that
            collude with the server cannot take the mask off a client's numbers.
        num_neighbours: Of each client, even; None is everybody.

    Where neighbours are not everybody, one more of them must survive than more than half: dropouts could otherwise cut
    the ring in two, and the server could read the sum of either part.
    """

    num_sums: int = 1
    threshold: float = 2 / 3
    num_neighbours: int | None = None

    def needed_of(self, size: int, num_clients: int) -> int:
        """Return how many of ``size`` neighbours, the client included, must survive; more than half, and at least 2.

        Args:
            size: Of a neighbourhood.
            num_clients: All clients, of whom the neighbourhood is a part or the whole.
        """
        is_sparse = size < num_clients
        return max(2, size // 2 + 1 + is_sparse, ceil(self.threshold * size - 1e-9))


class MaskingServer:
    """The server in the masked sums of one round.

    Attributes:
        alive: Clients that have answered everything so far, sorted.
    """

    def __init__(
        self, client_ids: Sequence[str], terms: MaskingTerms, session: bytes, rng: np.random.Generator
    ) -> None:
        """Begin a round.

        Args:
            client_ids: Who has trained.
            terms: Of the sums.
            session: Random bytes of this round, public.
            rng: Places the clients on the ring of neighbours.

        Raises:
            MaskedSumError: If there are too few clients for any sum.
        """
        if len(client_ids) < FEWEST_CLIENTS:
            raise MaskedSumError(
                f"a secure sum needs at least {FEWEST_CLIENTS} clients that trained; got {len(client_ids)}"
            )
        self.alive = sorted(client_ids)
        self._terms, self._session, self._rng = terms, session, rng
        self._seals: dict[str, bytes] = {}
        self._masks: dict[str, bytes] = {}
        self._neighbours: dict[str, list[str]] = {}
        # Receiver -> sender -> what the sender sealed for it.
        self._sealed: dict[str, dict[str, bytes]] = {}
        self._num_begun = 0
        self._participants: list[str] = []
        self._survivors: list[str] = []
        self._total: Words = np.zeros(0, dtype=np.uint32)
        self._seed_shares: dict[str, dict[int, int]] = {}
        self._key_shares: dict[str, dict[int, int]] = {}

    def keys_requests(self) -> dict[str, Fields]:
        """Return what each client is asked for its keys."""
        assert 1 <= self._terms.num_sums <= MOST_SUMS
        return {one: {"session": self._session.hex(), "sums": self._terms.num_sums} for one in self.alive}

    def take_keys(self, replies: Mapping[str, Fields]) -> Failures:
        """Take the keys of those that gave them; the others are out, and neighbours are chosen among these."""

        def take(client_id: str, fields: Fields) -> None:
            """Take the keys of one client."""
            seal = bytes_in(fields, "seal", KEY_BYTES)
            masks = bytes_in(fields, "masks", KEY_BYTES * self._terms.num_sums)
            # Every neighbour would refuse a key that none can agree with, and the round would be lost for all.
            for start in range(0, len(masks), KEY_BYTES):
                agreed_key(own.private, masks[start : start + KEY_BYTES], "check", self._session)
            agreed_key(own.private, seal, "check", self._session)
            self._masks[client_id], self._seals[client_id] = masks, seal

        own = new_key_pair()

        failures = self._taken(replies, take)
        self._require_enough(self.alive, "gave keys")
        places: list[int] = self._rng.permutation(len(self.alive)).tolist()
        order = dict(zip(self.alive, places, strict=True))
        self._neighbours = {one: neighbours_of(order, one, self._terms.num_neighbours) for one in self.alive}
        return failures

    def shares_requests(self) -> dict[str, Fields]:
        """Return what each client is asked for its shares: the keys of its neighbours come along."""
        requests: dict[str, Fields] = {}
        for client_id in self.alive:
            neighbours = self._neighbours[client_id]
            requests[client_id] = {
                "seals": in_hex({one: self._seals[one] for one in neighbours}),
                "masks": in_hex({one: self._masks[one] for one in neighbours}),
                "threshold": self._needed_of(client_id),
            }
        return requests

    def take_shares(self, replies: Mapping[str, Fields]) -> Failures:
        """Take the sealed shares of those that gave them, to be handed on with the first sum."""

        def take(client_id: str, fields: Fields) -> None:
            """Take what one client sealed for the others."""
            packages = bytes_by_client(fields, "sealed")
            if packages.keys() != set(self._neighbours[client_id]) - {client_id}:
                raise PhaseError("shares must be sealed for every neighbour")
            for receiver, package in packages.items():
                self._sealed.setdefault(receiver, {})[client_id] = package

        failures = self._taken(replies, take)
        self._require_enough(self.alive, "gave shares")
        return failures

    def sum_requests(self) -> dict[str, Fields]:
        """Return what each client is told of the next sum: who takes part, and at the first one their shares."""
        number, self._participants = self._num_begun, list(self.alive)
        self._num_begun += 1
        self._total, self._survivors = np.zeros(0, dtype=np.uint32), []
        self._seed_shares, self._key_shares = {}, {}
        requests: dict[str, Fields] = {}
        for client_id in self._participants:
            taking_part = self._taking_part(client_id)
            packages = self._sealed.get(client_id, {}) if number == 0 else {}
            requests[client_id] = {
                "sum": number,
                "participants": taking_part,
                "sealed": in_hex({one: packages[one] for one in taking_part if one in packages}),
            }
        return requests

    def take_masked(self, client_id: str, words: Words) -> None:
        """Add the masked words of one client."""
        assert client_id in self._participants and client_id not in self._survivors
        self._total = words.copy() if not self._survivors else self._total + words
        self._survivors.append(client_id)

    def close_sum(self) -> None:
        """End a sum: whoever has not sent its words by now has dropped out.

        Raises:
            MaskedSumError: If too few are left.
        """
        self._survivors.sort()
        self.alive = list(self._survivors)
        self._require_enough(self.alive, "sent masked numbers")

    def unmask_requests(self) -> dict[str, Fields]:
        """Return what each survivor is asked for: shares of its neighbours' seeds or, of those that dropped, keys."""
        survivors = set(self._survivors)
        requests: dict[str, Fields] = {}
        for client_id in self._survivors:
            taking_part = self._taking_part(client_id)
            requests[client_id] = {
                "sum": self._num_begun - 1,
                "survivors": [one for one in taking_part if one in survivors],
                "dropped": [one for one in taking_part if one not in survivors],
            }
        return requests

    def take_unmask(self, replies: Mapping[str, Fields]) -> Failures:
        """Take the shares of those that answered; the others take no part in further sums."""
        survivors = set(self._survivors)

        def take(client_id: str, fields: Fields) -> None:
            """Take the shares that one client holds."""
            seeds = bytes_by_client(fields, "seeds", SHARE_BYTES)
            keys = bytes_by_client(fields, "keys", SHARE_BYTES)
            taking_part = set(self._taking_part(client_id))
            if seeds.keys() != taking_part & survivors or keys.keys() != taking_part - survivors:
                raise PhaseError("shares of exactly those neighbours that were asked for must come back")
            for found, shares in ((seeds, self._seed_shares), (keys, self._key_shares)):
                for owner, share in found.items():
                    member = 1 + self._neighbours[owner].index(client_id)
                    shares.setdefault(owner, {})[member] = int.from_bytes(share, "big")

        return self._taken(replies, take)

    def unmasked(self) -> tuple[Words, list[str]]:
        """Return the sum of the words of all survivors, and who they are.

        Raises:
            MaskedSumError: If there are fewer shares of a secret than the threshold.
        """
        number, total, survivors = self._num_begun - 1, self._total, set(self._survivors)
        secrets = {one: self._restored(one, self._seed_shares, "seed") for one in self._survivors}
        dropped = [one for one in self._participants if one not in survivors]
        secrets |= {one: self._restored(one, self._key_shares, "masking key") for one in dropped if self._is_met(one)}
        # Nothing is taken off before every secret is there.
        for client_id in self._survivors:
            total = total - mask_of_key(secrets[client_id], len(total))
        for client_id in dropped:
            for other in self._neighbours[client_id]:
                if other not in survivors:
                    continue
                public = self._masks[other][KEY_BYTES * number : KEY_BYTES * (number + 1)]
                key = agreed_key(secrets[client_id], public, f"mask {number}", self._session)
                mask = mask_of_key(key, len(total))
                # The survivor added this mask if its name comes first.
                total = total - mask if other < client_id else total + mask
        return total, list(self._survivors)

    def _is_met(self, client_id: str) -> bool:
        """Return whether any survivor is a neighbour."""
        return not set(self._neighbours[client_id]).isdisjoint(self._survivors)

    def _taking_part(self, client_id: str) -> list[str]:
        participants = set(self._participants)
        return [one for one in self._neighbours[client_id] if one in participants]

    def _needed_of(self, client_id: str) -> int:
        """Return how many of a client's neighbours must survive."""
        return self._terms.needed_of(len(self._neighbours[client_id]), len(self._neighbours))

    def _restored(self, owner: str, shares: Mapping[str, Mapping[int, int]], what: str) -> bytes:
        try:
            return restore(shares.get(owner, {}), self._needed_of(owner))
        except SharesError as error:
            raise MaskedSumError(
                f"too many clients dropped out to unmask the sum; the {what} of {owner!r} cannot be restored: {error}"
            ) from error

    def _taken(self, replies: Mapping[str, Fields], take: Callable[[str, Fields], None]) -> Failures:
        """Take the replies of clients; those that sent none, or one that is wrong, are out."""
        failures: Failures = {}
        for client_id in list(self.alive):
            if client_id not in replies:
                self.alive.remove(client_id)
                continue
            try:
                take(client_id, replies[client_id])
            except (FlexLoraError, TypeError) as error:
                self.alive.remove(client_id)
                failures[client_id] = str(error)
        return failures

    def _require_enough(self, clients: Sequence[str], what: str) -> None:
        if len(clients) < FEWEST_CLIENTS:
            raise MaskedSumError(
                f"a secure sum needs at least {FEWEST_CLIENTS} clients to the end; only {len(clients)} {what}"
            )


def neighbours_of(order: Mapping[str, int], client_id: str, num_neighbours: int | None) -> list[str]:
    """Return a client and its neighbours, sorted: those next to it on a ring (a Harary graph), or everybody.

    Args:
        order: Client -> its place on the ring, 0 to ``len(order) - 1``.
        client_id: The client.
        num_neighbours: Even; None, or as many as there are others, is everybody.
    """
    size = len(order)
    if num_neighbours is None or num_neighbours >= size - 1:
        return sorted(order)
    half = num_neighbours // 2
    return sorted(
        other
        for other, place in order.items()
        if min((place - order[client_id]) % size, (order[client_id] - place) % size) <= half
    )
