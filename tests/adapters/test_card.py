"""Cards, as the Hugging Face hub's own library reads them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from flexlora.adapters.card import Card, license_of, table
from flexlora.adapters.merge import merge
from flexlora.adapters.write import write_adapter
from flexlora.lora.factors import LoraFactors

ADAPTER = {"layer": LoraFactors(torch.ones(2, 3), torch.ones(4, 2), 1.0)}


def test_every_adapter_gets_a_card_whose_fields_the_hub_reads(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", ADAPTER, "us/llama")
    data = ModelCard.load(tmp_path / "a" / "README.md").data
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("us/llama", "peft", "text-generation")
    assert "lora" in data.tags and data.license == "other" and data.license_link == "https://huggingface.co/us/llama"


def test_a_path_of_a_machine_is_in_no_field_and_no_line(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", ADAPTER, "/secret/place/llama")
    card = ModelCard.load(tmp_path / "a" / "README.md")
    assert card.data.base_model is None and "secret" not in card.content and "llama" in card.content


def test_a_merge_names_its_adapters_by_their_last_names(
    plain: Path, tmp_path: Path, rewrite: Callable[..., Path]
) -> None:
    rewrite(plain, base_model_name_or_path="us/llama")
    merge([plain, plain], (3, 1), out=tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "us/llama" and "merge" in card.data.tags
    assert f"| {plain.name} | 3 |" in card.content and str(tmp_path) not in card.content


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\n# x", "apache-2.0"),
        ("no fields", None),
        ("---\nlicense: [mit]\n---\n", None),
        ("---\n: : :\n---\n", None),
        ("---\n- 1\n---\n", None),
    ],
)
def test_the_licence_is_that_on_the_card_of_the_base(tmp_path: Path, text: str, expected: str | None) -> None:
    (tmp_path / "README.md").write_text(text)
    assert license_of(str(tmp_path)) == expected
    data = ModelCard(str(Card("t", "x", "us/llama", str(tmp_path)))).data
    assert data.license == (expected or "other")
    assert license_of(str(tmp_path / "nowhere")) is license_of(None) is None


def test_cells_of_a_table_stay_cells() -> None:
    assert table([("a|b\nc", "<b>")], ("x", "y")).splitlines()[2] == "| a\\|b c | &lt;b> |"
