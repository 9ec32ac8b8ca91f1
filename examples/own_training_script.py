"""Takes part in a federation with a training script of one's own: three lines around a ``transformers.Trainer``.

    flexlora round init federation.yaml --out run                    # at the server
    python own_training_script.py run/broadcasts/round-0001/small clinic-a.jsonl reply
    flexlora round aggregate run reply                               # at the server

The data file has lines such as {"prompt": "...", "completion": "..."}. TRL's ``SFTTrainer`` is patched in the same way.
"""

import json
import sys
import tempfile
from pathlib import Path

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

import flexlora

BASE = flexlora.resolve_base_model("embedded")  # Yours: a folder or a hub id.


def rows(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, list[int]]]:
    """Return the examples of a file as tokens; the loss looks at completions alone."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        example = json.loads(line)
        prompt = tokenizer(example["prompt"])["input_ids"]
        answer = [*tokenizer(example["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        found.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return found


def main(broadcast: str, data: str, reply: str) -> None:
    """Train what the server sent on a file of one's own and write the reply."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                folder, num_train_epochs=2, per_device_train_batch_size=4, save_strategy="no", report_to="none"
            ),
            train_dataset=rows(Path(data), tokenizer),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            processing_class=tokenizer,
        )
        part = flexlora.patch(trainer, broadcast, client=Path(data).stem)
        trainer.train()
        part.reply(reply)


if __name__ == "__main__":
    main(*sys.argv[1:4])
