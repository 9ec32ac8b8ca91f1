"""Measures secure sums: bytes and seconds of each phase, and whether any sum is wrong where clients drop out.

    python benchmarks/secure_sum.py --clients 32 --numbers 1000000
    python benchmarks/secure_sum.py --clients 32 --numbers 4 --rounds 100 --dropping 0.3

Clients and server are those of the package, in one process and one after another, without training and without a
network: seconds are of computation, and those of clients are divided by their number. Every sum is compared with the
plain sum of the survivors, modulo 2^32. Numbers per client and round: 4 bytes each; the plain update has as many.
"""

import argparse
import collections
import time
from collections.abc import Iterator, Mapping

import numpy as np
import torch

from flexlora.errors import FlexLoraError
from flexlora.federation.messages import ClientFailure, Reply
from flexlora.uplink.fixed_point import Layout, VectorPart, on_the_way
from flexlora.uplink.masked_sum import MASKING_KINDS, MaskedSums, masking_reply, words_message
from flexlora.uplink.masking_client import MaskingClient
from flexlora.uplink.masking_server import MaskedSumError, MaskingServer, MaskingTerms
from flexlora.uplink.phase_messages import fields_and_tensors

PHASES = 4


class Cohort:
    """Clients with random words, some of which answer a few phases only; counts their seconds."""

    def __init__(self, size: int, num_words: int, drops: Mapping[str, int], rng: np.random.Generator) -> None:
        self.words = {f"client {index:05}": rng.integers(0, 2**32, num_words, dtype=np.uint32) for index in range(size)}
        self.clients = {name: MaskingClient(name) for name in self.words}
        self.layout = Layout([VectorPart("words", num_words)], [], 2)
        self.drops, self.answered = drops, collections.Counter[str]()
        self.seconds = collections.Counter[str]()

    def ask(self, kind: str, requests: Mapping[str, bytes]) -> Iterator[Reply | ClientFailure]:
        for name, request in requests.items():
            self.answered[name] += 1
            if self.answered[name] > self.drops.get(name, PHASES):
                yield ClientFailure(name, kind, "gone")
                continue
            start = time.perf_counter()
            try:
                data = self._answer(name, kind, request)
            except FlexLoraError as error:
                yield ClientFailure(name, kind, str(error))
                continue
            finally:
                self.seconds[kind] += time.perf_counter() - start
            yield Reply(name, data)

    def _answer(self, name: str, kind: str, request: bytes) -> bytes:
        if kind in MASKING_KINDS:
            return masking_reply(self.clients[name], kind, request)
        fields, _ = fields_and_tensors(request)
        masked = self.clients[name].masked(fields, self.words[name])
        return words_message(torch.from_numpy(on_the_way(self.layout, masked)))

    def plain_sum(self, survivors: list[str]) -> list[int]:
        return sum((self.words[name] for name in survivors), np.zeros(self.layout.num_words, np.uint32)).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--numbers", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--neighbours", type=int, default=None, help="of each client, even; all without it")
    parser.add_argument("--dropping", type=float, default=0.0, help="share of the clients, each before a random phase")
    parser.add_argument("--threshold", type=float, default=2 / 3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(options.seed)
    terms = MaskingTerms(1, options.threshold, options.neighbours)
    total = collections.defaultdict[str, collections.Counter[str]](collections.Counter)
    num_right = num_wrong = num_lost = num_dropped = 0
    begun = time.perf_counter()
    for server_round in range(options.rounds):
        names = [f"client {index:05}" for index in range(options.clients)]
        dropping = rng.choice(names, size=round(options.dropping * options.clients), replace=False)
        drops = {str(name): int(rng.integers(0, PHASES)) for name in dropping}
        cohort = Cohort(options.clients, options.numbers, drops, rng)
        sums = MaskedSums(MaskingServer(names, terms, rng.bytes(16), rng), cohort.ask)
        start = time.perf_counter()
        try:
            sums.open()
            found = sums.total("sum", cohort.layout, lambda name: {}, {})
        except MaskedSumError as error:
            print(f"round {server_round + 1}: {error}")
            num_lost += 1
            continue
        whole = time.perf_counter() - start
        is_right = found.counts["words"] == cohort.plain_sum(found.survivors)
        num_right, num_wrong = num_right + is_right, num_wrong + (not is_right)
        num_dropped += options.clients - len(found.survivors)
        total["all"]["server"] += whole - sum(cohort.seconds.values())
        for cost in sums.traffic.costs:
            phase = total[cost.kind]
            phase["down"] += cost.down_bytes / cost.num_asked
            phase["up"] += cost.up_bytes / max(1, cost.num_answered)
            phase["client"] += cohort.seconds[cost.kind] / max(1, cost.num_answered)
    done = num_right + num_wrong
    print(
        f"{options.clients} clients, {options.numbers:,} numbers, {options.rounds} rounds in "
        f"{time.perf_counter() - begun:.1f} s: {num_right} sums right, {num_wrong} wrong, {num_lost} rounds lost, "
        f"{num_dropped} clients in no sum"
    )
    if not done:
        return
    for kind in ("keys", "shares", "sum", "unmask"):
        phase = total[kind]
        print(
            f"  {kind:7} down {phase['down'] / done:12,.0f} bytes  up {phase['up'] / done:12,.0f} bytes  "
            f"client {1000 * phase['client'] / done:8.1f} ms"
        )
    print(f"  server {1000 * total['all']['server'] / done:.0f} ms a round")
    if num_wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
