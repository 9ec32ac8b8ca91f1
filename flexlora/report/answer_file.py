"""Keeps what models answered to the examples of unseen tasks, side by side: `answers.jsonl`.

One example a line: its task and prompt, the accepted answers, what each model said, and last a digest of the line (see
``flexlora.seal``). The file is written as a whole, so it is there after the first evaluation, and each later one
replaces the answers of its model.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flexlora.files import write_whole
from flexlora.foreign import ForeignError, read_json
from flexlora.rounds.records import RecordsError
from flexlora.seal import SealError, sealed, unsealed

log = logging.getLogger(__name__)

ANSWERS_FILE = "answers.jsonl"

BASE, FEDERATED = "base", "federated"
"""What the base model alone and the run are called in the file; references have the names of `ReferencesRecord`."""


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelAnswer(_Line):
    """What one model said to one example."""

    text: str
    rouge_l: float = Field(description="The best over the accepted answers, 0 to 100")
    exact_match: bool = Field(description="Whether it equals an accepted answer up to case and white space")


class AnswerRecord(_Line):
    """One example of an unseen task with the answers of all models that have been scored on it."""

    task: str
    category: str = ""
    number: int = Field(ge=0, description="Place among the examples of its task")
    prompt: str = Field(description="Earlier turns, instruction and input")
    references: list[str] = Field(description="Accepted answers")
    answers: dict[str, ModelAnswer] = Field(default={}, description="Model -> what it said")

    def answered(self, model: str, answer: ModelAnswer) -> "AnswerRecord":
        """Return the example with the answer of a model, in place of an earlier one."""
        return self.model_copy(update={"answers": {**self.answers, model: answer}})


def write_answers(path: Path, examples: Sequence[AnswerRecord], answers: Mapping[str, Sequence[ModelAnswer]]) -> None:
    """Write examples with the answers of some models, atomically; other models keep theirs where examples stay.

    Args:
        examples: Without answers.
        answers: Model -> its answers, in the order of ``examples``.
    """
    known = {_key(record): record.answers for record in read_answers(path, damaged_is_none=True)}
    if known.keys() != {_key(example) for example in examples}:
        known = {}
    lines = []
    for place, example in enumerate(examples):
        record = example.model_copy(update={"answers": dict(known.get(_key(example), {}))})
        for model, own in answers.items():
            record = record.answered(model, own[place])
        # A lone surrogate, which no UTF-8 file can hold, travels escaped.
        lines.append(sealed(json.dumps(record.model_dump(mode="python"), ensure_ascii=True)))
    write_whole(path, "".join(line + "\n" for line in lines))


def read_answers(path: Path, *, damaged_is_none: bool = False) -> list[AnswerRecord]:
    """Return the examples of an answer file, none when there is no such file.

    Args:
        damaged_is_none: Return none for a damaged file too.

    Raises:
        RecordsError: A line is not what it should be.
    """
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_bytes().removesuffix(b"\n").split(b"\n"), start=1):
        try:
            found.append(AnswerRecord.model_validate(read_json(unsealed(line)[0], f"line {number}")))
        except (ValidationError, ForeignError, SealError) as error:
            if damaged_is_none:
                log.warning("%s, line %d, is damaged; the answers in it are made again or left out", path, number)
                return []
            raise RecordsError(
                f"{path}, line {number}, is not an example with answers; remove the file to report without it"
            ) from error
    return found


def _key(record: AnswerRecord) -> tuple[str, int, str]:
    return record.task, record.number, record.prompt
