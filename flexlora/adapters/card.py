"""Writes the model card of an adapter: ``README.md`` with the fields that the Hugging Face hub reads."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

from flexlora.adapters.base_names import is_path
from flexlora.files import write_whole

CARD_FILE = "README.md"


TAGS = ("lora", "flexlora")


@dataclass(frozen=True)
class Card:
    """What a card says.

    Attributes:
        title: Its heading.
        text: Markdown below the heading.
        base_model: Name or path of the base; a path is left out of the fields.
        base_folder: Where the base lies on this machine if it does, for its licence.
        tags: Beside ``TAGS``.
        library_name: Library that loads the files.
    """

    title: str
    text: str
    base_model: str | None
    base_folder: str | None = None
    tags: tuple[str, ...] = ()
    library_name: str = "peft"

    def __str__(self) -> str:
        is_named = self.base_model is not None and not is_path(self.base_model)
        license = license_of(self.base_folder or self.base_model)
        terms: dict[str, Any] = {"license": license}
        if license is None:
            terms = {"license": "other", "license_name": "that-of-the-base-model"}
            if is_named and "/" in (self.base_model or ""):
                terms["license_link"] = f"https://huggingface.co/{self.base_model}"
        data = ModelCardData(
            base_model=self.base_model if is_named else None,
            library_name=self.library_name,
            pipeline_tag="text-generation",
            tags=[*TAGS, *self.tags],
            **terms,
        )
        return f"---\n{data.to_yaml()}\n---\n\n# {self.title}\n\n{self.text.strip()}\n"

    def write(self, folder: Path) -> None:
        """Write the card into a folder that exists."""
        write_whole(folder / CARD_FILE, str(self))


def license_of(base_model: str | None) -> str | None:
    """Return the licence on the card of a base model, in its folder or in the Hugging Face cache; None if unknown."""
    if base_model is None:
        return None
    try:
        local = Path(base_model).expanduser() / CARD_FILE
        found = local if local.is_file() else try_to_load_from_cache(base_model, CARD_FILE)
        text = Path(found).read_text(encoding="utf-8") if isinstance(found, str | Path) else ""
        if not text.startswith("---"):  # no fields, of which the library would warn
            return None
        license = ModelCard(text, ignore_metadata_errors=True).data.to_dict().get("license")
    except Exception:  # a foreign card, in whatever state
        return None
    return license if isinstance(license, str) else None


def table(rows: Iterable[Sequence[str]], headers: Sequence[str]) -> str:
    """Return a Markdown table; cells are escaped."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def loading_text(base_model: str | None) -> str:
    """Return how to load an adapter with PEFT on a base of this name."""
    name = "the base model" if base_model is None or is_path(base_model) else base_model
    return f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{name}")
model = PeftModel.from_pretrained(base, "this folder")
```"""


def plain_card(base_model: str | None, rank: int, num_modules: int) -> Card:
    """Return the card of an adapter of which nothing is known but what is written."""
    text = f"Rank {rank} in {num_modules} modules.\n\n{loading_text(base_model)}"
    return Card(f"LoRA adapter for {base_title(base_model)}", text, base_model)


def base_title(base_model: str | None) -> str:
    """Return a base model's name for a heading, without the folders of a machine."""
    if base_model is None:
        return "an unnamed base model"
    return Path(base_model).name if is_path(base_model) else base_model
