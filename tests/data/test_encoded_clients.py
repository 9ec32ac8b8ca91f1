"""Tokens in files: tokenised once, the same whoever reads them, and good as far as they are whole."""

import os

import pytest

from flexlora.data.encoded_clients import EncodedClients, encoding_name
from flexlora.data.examples import Example
from flexlora.data.prompts import encode_many

IDS = ["a", "b", "c"]


@pytest.fixture
def encode(tokenizer):
    """Returns a tokeniser of clients and the list of those it was asked for."""
    asked: list[str] = []

    def of(client_id, loss_on="answers"):
        asked.append(client_id)
        owned = [Example("Say it.", f"{client_id} {n} " * n, ("yes", "no")) for n in range(6)]
        return encode_many(owned, tokenizer, "alpaca", 64, loss_on)

    return of, asked


@pytest.mark.parametrize("loss_on", ["answers", "all"])
def test_what_is_read_is_what_was_tokenised(encode, loss_on):
    of, asked = encode
    clients = EncodedClients(IDS, lambda client_id: of(client_id, loss_on))
    first = {client_id: clients(client_id) for client_id in IDS}
    assert first == {client_id: of(client_id, loss_on) for client_id in IDS}
    assert any(example.truncated for example in first["a"]) and not all(example.truncated for example in first["a"])
    again = {client_id: clients(client_id) for client_id in reversed(IDS)}
    assert again == first and asked == IDS * 2  # Once by the clients, once by the expectation above.
    assert isinstance(again["a"][0].input_ids, tuple)


def test_large_tokens_keep_their_value():
    from flexlora.data.prompts import EncodedExample

    example = EncodedExample((7, 200_000, 1), (-100, 200_000, 1), True)
    clients = EncodedClients(["a"], lambda client_id: [example])
    assert clients("a") == clients("a") == [example]


def test_later_runs_read_what_earlier_ones_have_left(encode, tmp_path):
    of, asked = encode
    folder = tmp_path / "tokens"
    first, beside = EncodedClients(IDS, of, folder), EncodedClients(IDS, of, folder)
    wanted = [first("a"), first("b"), beside("c"), beside("a")]
    assert asked == ["a", "b", "c", "a"]
    later = EncodedClients(IDS, of, folder)
    assert [later("a"), later("b"), later("c"), later("a")] == wanted
    assert len(asked) == 4 and len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("place", [0, 5, 25, 300, -1])
@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_damaged_tokens_are_made_again(encode, tmp_path, place, damage):
    of, asked = encode
    clients = EncodedClients(IDS, of, tmp_path)
    wanted = [clients(client_id) for client_id in IDS]
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[place] ^= 0x5A
    path.write_bytes(content[:place] if damage == "truncated" else content)
    later = EncodedClients(IDS, of, tmp_path)
    assert [later(client_id) for client_id in IDS] == wanted
    assert len(asked) > 3
    asked.clear()
    assert [EncodedClients(IDS, of, tmp_path)(client_id) for client_id in IDS] == wanted
    assert [later(client_id) for client_id in IDS] == wanted and not asked


def test_a_forked_process_writes_a_file_of_its_own(encode, tmp_path):
    of, asked = encode
    clients = EncodedClients(IDS, of, tmp_path)
    clients("a")
    child = os.fork()
    if child == 0:
        clients("b")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    clients("c")
    later = EncodedClients(IDS, of, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2 and [later(client_id) for client_id in IDS] == [of(i) for i in IDS]
    assert asked == ["a", "c", *IDS]


def test_a_folder_that_cannot_be_written_to_costs_nothing_but_later_runs(encode, tmp_path, caplog):
    of, asked = encode
    (tmp_path / "file").touch()
    clients = EncodedClients(IDS, of, tmp_path / "file" / "tokens")
    assert clients("a") == clients("a") and asked == ["a"]
    assert "not kept for later runs" in caplog.text


def test_other_settings_or_another_tokenizer_have_another_name(tokenizer):
    name = encoding_name(tokenizer, ["alpaca", 64])
    assert name == encoding_name(tokenizer, ["alpaca", 64]) != encoding_name(tokenizer, ["alpaca", 65])
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{{ messages }}"
        assert encoding_name(tokenizer, ["alpaca", 64]) != name
    finally:
        tokenizer.chat_template = template


def test_no_flipped_bit_of_a_header_gives_a_client_the_tokens_of_another(encode, tmp_path):
    of, _ = encode
    clients = EncodedClients(IDS, of, tmp_path / "whole")
    wanted = [clients(client_id) for client_id in IDS]
    (path,) = (tmp_path / "whole").iterdir()
    content = path.read_bytes()
    for bit in range(8 * 24):
        folder = tmp_path / f"bit-{bit}"
        folder.mkdir()
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        (folder / path.name).write_bytes(damaged)
        later = EncodedClients(IDS, of, folder)
        assert [later(client_id) for client_id in reversed(IDS)] == wanted[::-1], f"bit {bit}"
