"""Cuts a cohort into chunks; each is trained on its own, by whichever process is free.

A client's result depends, by rounding, on which clients share its passes. So the cut is a function of the cohort, its
data and the settings, never of the number of processes or of their speed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from flexlora.data.prompts import EncodedExample
from flexlora.federation.clients import ClientSpec
from flexlora.training.group_room import MOST_CLIENTS
from flexlora.training.length_runs import LARGER, pace_of
from flexlora.training.one_client import LocalTraining

# The fewest and the most tokens in one optimiser step of a chunk's clients. Fewer would leave passes half empty; more
# would fill no pass better, and processes would wait longer for the last chunk.
_STEP_TOKENS = {"cpu": (768, 4096), "cuda": (32768, 65536)}
# A larger base fills its passes with fewer tokens.
_FEWEST_OF_LARGER = 256
# A chunk takes at most one part in so many of the work that is left, so that the last chunks are small.
_PARTS_OF_THE_REST = 4


@dataclass(frozen=True, eq=False)
class Chunk:
    """Neighbours in a cohort.

    Attributes:
        clients: The clients, in cohort order.
        examples: Client id -> its training examples; a client whose examples could not be loaded is missing.
    """

    clients: Sequence[ClientSpec]
    examples: dict[str, Sequence[EncodedExample]]


def cut_into_chunks(
    cohort: Sequence[ClientSpec],
    examples_of: Callable[[str], Sequence[EncodedExample]],
    settings: LocalTraining,
    device_type: str,
    num_parameters: int = 0,
) -> Iterator[Chunk]:
    """Yield the cohort in chunks, in order; load each client's examples once, when its chunk is asked for.

    Chunks are large while much work is left, and small towards the end.

    Args:
        cohort: Who trains.
        examples_of: Client id -> its training examples; may raise for a client.
        settings: Decide how many tokens a step has.
        device_type: ``cpu`` or ``cuda``.
        num_parameters: Size of the base.
    """
    smallest, largest = _STEP_TOKENS.get(device_type, _STEP_TOKENS["cpu"])
    if pace_of(device_type, num_parameters) == LARGER:
        smallest = min(smallest, _FEWEST_OF_LARGER)
    size = settings.batch_size * settings.gradient_accumulation_steps
    rows_left = sum(min(size, client.num_examples) for client in cohort)
    num_tokens, num_examples = 0, 0
    clients: list[ClientSpec] = []
    examples: dict[str, Sequence[EncodedExample]] = {}
    rows = 0
    for client in cohort:
        clients.append(client)
        try:
            own = examples[client.client_id] = examples_of(client.client_id)
        except Exception:  # The trainer of the chunk asks again and reports what went wrong.
            own = ()
        num_tokens += sum(len(example.input_ids) for example in own)
        num_examples += len(own)
        rows += min(size, client.num_examples)
        per_row = num_tokens / max(1, num_examples)
        enough = min(max(rows_left * per_row / _PARTS_OF_THE_REST, smallest), largest)
        if rows * per_row >= enough or len(clients) == MOST_CLIENTS:
            yield Chunk(clients, examples)
            rows_left -= rows
            clients, examples, rows = [], {}, 0
    if clients:
        yield Chunk(clients, examples)
