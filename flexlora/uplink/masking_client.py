"""A client's end of masked sums: it masks what it sends so that only the sum over its neighbours can be read.

Bonawitz et al. (CCS 2017, fig. 4) without the round of signatures, on a sparse graph of neighbours (Bell et al., CCS
2020). In the round of a session, for each of its sums:

- ``keys``: the client draws a key pair to seal with and, per sum, one to mask with, and shows the public halves.
- ``shares``: it shares the private masking key and a seed of its own among its neighbours, sealed for each of them.
- the sum: it adds the mask of its seed and, for every neighbour that takes part, plus or minus the mask of the key they
  agree on, which cancel in the sum.
- ``unmask``: of neighbours that survived it shows its shares of their seeds; of those that dropped out, of their
  masking keys. Never both of one neighbour: with both, the server could read what that neighbour sent.

A sum has keys of its own: a client may survive one sum and drop out of the next. All parties follow the protocol
(honest but curious); a client refuses what would show more than a sum to a server that made a mistake.
"""

from dataclasses import dataclass

from flexlora.uplink.mask_keys import (
    KEY_BYTES,
    KeyPair,
    MaskKeyError,
    Words,
    agreed_key,
    mask_of_key,
    new_key_pair,
    new_seed,
    sealed,
    unsealed,
)
from flexlora.uplink.phase_messages import Fields, bytes_by_client, bytes_in, clients_in, in_hex, number_in
from flexlora.uplink.phases import PhaseError
from flexlora.uplink.secret_shares import SHARE_BYTES, split

MOST_CLIENTS = 10_000
"""Neighbours, itself included, that a client agrees to."""
MOST_SUMS = 4
SESSION_BYTES = 16


@dataclass(frozen=True)
class _Neighbour:
    """What a client knows of a neighbour, or of itself.

    Attributes:
        seal: Public key to seal with.
        masks: Public key to mask with, by sum.
    """

    seal: bytes
    masks: tuple[bytes, ...]


class MaskingClient:
    """One client in the masked sums of one round; phases come in order, each once per sum."""

    def __init__(self, client_id: str) -> None:
        """Draw nothing yet."""
        self._client_id = client_id
        self._session = b""
        self._seal: KeyPair | None = None
        self._pairs: list[KeyPair] = []
        self._seal_keys: dict[str, bytes] = {}
        self._seeds: list[bytes] = []
        self._neighbours: dict[str, _Neighbour] = {}
        self._threshold = 0
        # Neighbour -> its shares for this client: key and seed of each sum.
        self._shares: dict[str, list[tuple[bytes, bytes]]] = {}
        self._participants: dict[int, frozenset[str]] = {}
        self._unmasked: set[int] = set()

    def keys(self, fields: Fields) -> Fields:
        """Return fresh public keys for a session.

        Raises:
            PhaseError: If there are keys already.
            WireError: If the request is no such request.
        """
        if self._seal is not None:
            raise PhaseError("this client has given its keys for this round; it gives no others")
        self._session = bytes_in(fields, "session", SESSION_BYTES)
        num_sums = number_in(fields, "sums", 1, MOST_SUMS)
        self._seal = new_key_pair()
        self._pairs = [new_key_pair() for _ in range(num_sums)]
        return {"seal": self._seal.public.hex(), "masks": b"".join(pair.public for pair in self._pairs).hex()}

    def shares(self, fields: Fields) -> Fields:
        """Return the shares of all secrets, sealed for each neighbour.

        Raises:
            PhaseError: If this is not the time, the keys are not the ones that were shown, or the threshold is none.
            WireError: If the request is no such request.
        """
        if self._seal is None or self._neighbours:
            raise PhaseError("shares are given once, after the keys")
        neighbours = self._read_neighbours(fields)
        own = neighbours.get(self._client_id)
        if own != _Neighbour(self._seal.public, tuple(pair.public for pair in self._pairs)):
            raise PhaseError("the list of keys must hold this client's own as it gave them")
        keys = [key for neighbour in neighbours.values() for key in (neighbour.seal, *neighbour.masks)]
        if len(set(keys)) < len(keys):
            raise PhaseError("the keys of all clients must differ")
        size = len(neighbours)
        self._threshold = number_in(fields, "threshold", 2, size)
        if 2 * self._threshold <= size:
            raise PhaseError(
                f"a threshold must be more than half of the {size} neighbours, or two halves could be played against "
                f"each other; got {self._threshold}"
            )
        self._neighbours = neighbours
        self._seeds = [new_seed() for _ in self._pairs]
        secrets = [
            secret for pair, seed in zip(self._pairs, self._seeds, strict=True) for secret in (pair.private, seed)
        ]
        shares = [split(secret, self._threshold, size) for secret in secrets]
        packages: dict[str, bytes] = {}
        for place, client_id in enumerate(neighbours):
            package = b"".join(share[place].to_bytes(SHARE_BYTES, "big") for share in shares)
            if client_id == self._client_id:
                self._shares[client_id] = _read_package(package, len(self._pairs))
                continue
            packages[client_id] = sealed(self._seal_key(client_id), package, self._context(self._client_id, client_id))
        return {"sealed": in_hex(packages)}

    def masked(self, fields: Fields, words: Words) -> Words:
        """Return the words of a sum, masked for those who take part in it.

        Raises:
            PhaseError: If the sum was given already, or fewer than the threshold take part.
            WireError: If the request is no such request.
        """
        number = number_in(fields, "sum", 0, len(self._pairs) - 1)
        participants = frozenset(clients_in(fields, "participants"))
        if number in self._participants or number != len(self._participants):
            raise PhaseError(f"sum {number} is not due: each is given once, in order")
        for client_id, data in bytes_by_client(fields, "sealed").items():
            self._receive(client_id, data)
        if self._client_id not in participants or not participants <= self._shares.keys():
            raise PhaseError("those who take part must be this client and neighbours whose shares it has")
        self._require_enough(participants, "take part")
        self._participants[number] = participants
        total = words + mask_of_key(self._seeds[number], len(words))
        for client_id in sorted(participants - {self._client_id}):
            mask = mask_of_key(self._mask_key(number, client_id), len(words))
            total += mask if self._client_id < client_id else -mask
        return total

    def unmask(self, fields: Fields) -> Fields:
        """Return the shares of the seeds of survivors and of the masking keys of those that dropped out.

        Raises:
            PhaseError: If this client did not give the sum or has unmasked it, or fewer than the threshold survived.
            WireError: If the request is no such request.
        """
        number = number_in(fields, "sum", 0, len(self._pairs) - 1)
        survivors, dropped = set(clients_in(fields, "survivors")), set(clients_in(fields, "dropped"))
        if number not in self._participants or number in self._unmasked:
            raise PhaseError(f"sum {number} cannot be unmasked: this client has not given it, or has unmasked it")
        if survivors & dropped or survivors | dropped != set(self._participants[number]) or self._client_id in dropped:
            raise PhaseError("everybody who takes part has survived or has dropped out, and this client has survived")
        self._require_enough(survivors, "have survived")
        self._unmasked.add(number)
        return {
            "seeds": in_hex({client_id: self._shares[client_id][number][1] for client_id in survivors}),
            "keys": in_hex({client_id: self._shares[client_id][number][0] for client_id in dropped}),
        }

    def _read_neighbours(self, fields: Fields) -> dict[str, _Neighbour]:
        """Return the keys of all neighbours, sorted by client."""
        seals, size = bytes_by_client(fields, "seals", KEY_BYTES), KEY_BYTES * len(self._pairs)
        masks = bytes_by_client(fields, "masks", size)
        if seals.keys() != masks.keys() or len(seals) > MOST_CLIENTS:
            raise PhaseError(f"a client has at most {MOST_CLIENTS} neighbours, each with keys to seal and to mask with")
        return {
            client_id: _Neighbour(
                seals[client_id],
                tuple(masks[client_id][start : start + KEY_BYTES] for start in range(0, size, KEY_BYTES)),
            )
            for client_id in sorted(seals)
        }

    def _receive(self, client_id: str, data: bytes) -> None:
        """Keep the shares that a neighbour has sealed for this client."""
        if client_id not in self._neighbours or client_id in self._shares:
            raise PhaseError(f"shares of {client_id!r} are not expected")
        package = unsealed(self._seal_key(client_id), data, self._context(client_id, self._client_id))
        if len(package) != 2 * SHARE_BYTES * len(self._pairs):
            raise MaskKeyError(f"the shares of {client_id!r} have another size than those of this round")
        self._shares[client_id] = _read_package(package, len(self._pairs))

    def _require_enough(self, clients: frozenset[str] | set[str], what: str) -> None:
        if len(clients) < self._threshold:
            raise PhaseError(
                f"at least {self._threshold} of {len(self._neighbours)} neighbours must {what}; got {len(clients)}"
            )

    def _seal_key(self, client_id: str) -> bytes:
        assert self._seal is not None
        if client_id not in self._seal_keys:
            public = self._neighbours[client_id].seal
            self._seal_keys[client_id] = agreed_key(self._seal.private, public, "seal", self._session)
        return self._seal_keys[client_id]

    def _mask_key(self, number: int, client_id: str) -> bytes:
        return agreed_key(
            self._pairs[number].private, self._neighbours[client_id].masks[number], f"mask {number}", self._session
        )

    def _context(self, sender: str, receiver: str) -> bytes:
        return b"\0".join([self._session, sender.encode(), receiver.encode()])


def _read_package(package: bytes, num_sums: int) -> list[tuple[bytes, bytes]]:
    """Return the shares of key and seed of each sum."""
    parts = [package[start : start + SHARE_BYTES] for start in range(0, 2 * SHARE_BYTES * num_sums, SHARE_BYTES)]
    return [(parts[2 * number], parts[2 * number + 1]) for number in range(num_sums)]
