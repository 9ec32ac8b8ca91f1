"""A tiny random Llama and a byte-level tokenizer, made in memory; hand-made runs for records and reports."""

import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from flexlora.data.prompts import EncodedExample
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling
from flexlora.rounds.records import (
    ClientRecord,
    EvaluationRecord,
    GroupClientRecord,
    LocalClientRecord,
    LocalOnlyRecord,
    ManifestRecord,
    RankGroupRecord,
    ReferenceRunRecord,
    ReferencesRecord,
    RoundRecord,
    RoundScoreRecord,
    ScoreRecord,
    SpectrumRecord,
    TaskScoreRecord,
    append_record,
    write_manifest,
    write_references,
)
from flexlora.training.adapted_model import AdaptedModel

PAD, BOS, EOS = 0, 1, 2


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _interruptible() -> None:
    """Let the runs of tests be interrupted where the tests themselves were started in the background of a script.

    A shell starts such a program with SIGINT ignored, and its children inherit that.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what runs leave for later ones apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """One token per byte, so that any text round-trips."""
    vocabulary = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(vocabulary)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )


@pytest.fixture
def make_network() -> Callable[..., PreTrainedModel]:
    """Returns a maker of Llamas with grouped-query attention and a non-square MLP, always the same weights."""

    def make(dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa") -> PreTrainedModel:
        config = LlamaConfig(
            vocab_size=259,
            hidden_size=32,
            intermediate_size=56,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.2,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation=attn_implementation)
        return network.eval()

    return make


@pytest.fixture
def network(make_network: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return make_network()


@pytest.fixture
def model(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> AdaptedModel:
    return AdaptedModel(network, tokenizer)


@pytest.fixture(scope="session")
def scaling() -> Scaling:
    return Scaling("constant_alpha", 16.0)


@pytest.fixture(scope="session")
def random_adapter() -> Callable[..., AdapterState]:
    """Returns a maker of adapters that change something: neither factor is zero."""

    def make(
        shapes: dict[str, tuple[int, int]], ranks: dict[str, int], scaling: Scaling, seed: int = 0
    ) -> AdapterState:
        generator = torch.Generator().manual_seed(seed)
        return {
            path: LoraFactors(
                0.3 * torch.randn(rank, shapes[path][1], generator=generator),
                0.3 * torch.randn(shapes[path][0], rank, generator=generator),
                scaling(rank),
            )
            for path, rank in sorted(ranks.items())
        }

    return make


@pytest.fixture(scope="session")
def make_examples() -> Callable[..., list[EncodedExample]]:
    """Returns a maker of examples of random tokens; prompts and answers of different lengths."""

    def make(num_examples: int, seed: int = 0, longest: int = 30) -> list[EncodedExample]:
        rng = np.random.default_rng(seed)
        examples: list[EncodedExample] = []
        for _ in range(num_examples):
            prompt, answer = (rng.integers(3, 259, rng.integers(2, longest)).tolist() for _ in range(2))
            examples.append(EncodedExample((1, *prompt, *answer, 2), (*[-100] * (1 + len(prompt)), *answer, 2)))
        return examples

    return make


LEAVES = [f"self_attn.{leaf}_proj" for leaf in "qkvo"] + [f"mlp.{leaf}_proj" for leaf in ("gate", "up", "down")]
CATEGORIES = {
    "Sentiment Analysis": (3, 60),
    "Question Answering": (2, 50),
    "Text to Code": (1, 10),
    "Word Analogy": (2, 40),
}
# (plan, attention rank, FFN rank, clients)
PLANS = [("type1", 2, 2, 60), ("type2", 6, 6, 10), ("type3", 6, 16, 5), ("type4", 16, 16, 5)]


def modules(num_layers: int) -> list[str]:
    return [f"model.layers.{layer}.{leaf}" for layer in range(num_layers) for leaf in LEAVES]


def plan_ranks(num_layers: int) -> dict[str, dict[str, int]]:
    return {
        name: {m: attention if "attn" in m else ffn for m in modules(num_layers)} for name, attention, ffn, _ in PLANS
    }


def score(rouge_l: float, num_examples: int = 160, num_tasks: int = 8, loss: float | None = None) -> ScoreRecord:
    return ScoreRecord(
        rouge_l=rouge_l,
        exact_match=max(0.0, 0.8 * rouge_l - 4),
        loss=3.2 - 0.04 * rouge_l if loss is None else loss,
        num_examples=num_examples,
        num_tasks=num_tasks,
    )


def task_scores(rouge_l: float) -> dict[str, TaskScoreRecord]:
    """Return a score for each task of `CATEGORIES`, some above the mean and some below."""
    names = [
        (category, number, examples // tasks)
        for category, (tasks, examples) in CATEGORIES.items()
        for number in range(tasks)
    ]
    return {
        f"{category} {number}": TaskScoreRecord(
            rouge_l=rouge_l * (1 + 0.1 * (place - 3.5)), num_examples=examples, category=category
        )
        for place, (category, number, examples) in enumerate(names)
    }


def group_clients(rouge_l: float, base: float, count: int) -> list[GroupClientRecord]:
    return [
        GroupClientRecord(
            client_id=f"client {n}", rouge_l=rouge_l + n % 5 - 2, base_rouge_l=base + n % 3 - 1, num_examples=1 + n % 2
        )
        for n in range(count)
    ]


def evaluation(rouge_l: float, num_layers: int = 2, with_groups: bool = True) -> EvaluationRecord:
    groups = {
        name: RankGroupRecord(
            ranks=ranks,
            num_clients=30 + place,
            tasks=task_scores(rouge_l - 4 + place),
            clients=group_clients(rouge_l + 1 + place, 13 + place, 30 + place),
            unseen=score(rouge_l - 4 + place),
            own=score(rouge_l + 1 + place, 30, 3),
            base_own=score(13 + place, 30, 3),
        )
        for place, (name, ranks) in enumerate(plan_ranks(num_layers).items())
    }
    return EvaluationRecord(
        unseen=score(rouge_l),
        unseen_unweighted=score(rouge_l - 1.5),
        categories={
            name: score(rouge_l * (0.7 + 0.2 * place), examples, tasks)
            for place, (name, (tasks, examples)) in enumerate(CATEGORIES.items())
        },
        tasks=task_scores(rouge_l),
        validation_loss=score(rouge_l - 2, 50, 5).loss,
        rank_groups=groups if with_groups else {},
    )


def spectrum(place: int, server_round: int, length: int) -> SpectrumRecord:
    collapse = 0.78 ** (server_round - 1)
    growth = 1 - 0.8**server_round
    return SpectrumRecord(
        singular_values=[
            growth * (1.5 + 0.1 * place) * (1 + k) ** -0.6 * (collapse if k >= 2 else 1.0) for k in range(length)
        ],
        tail=0.01 * growth,
    )


def round_record(
    server_round: int, *, num_layers: int = 2, cohort: int = 8, length: int = 16, evaluate: bool = True
) -> RoundRecord:
    if server_round == 0:
        return RoundRecord(
            server_round=0, evaluation=evaluation(12.0, num_layers), seconds={"evaluate": 6.5, "total": 6.5}
        )
    ranks = plan_ranks(num_layers)
    population = [(name, number) for name, _, _, count in PLANS for number in range(count)]
    clients = []
    for place in range(cohort):
        plan, number = population[(server_round * 17 + place * 29) % len(population)]
        failed = (server_round, place) in {(3, 0), (7, 4)}
        size = 4 * 100 * sum(ranks[plan].values())
        clients.append(
            ClientRecord(
                client_id=f"<script>alert('{plan}-{number}')</script>" if failed else f"{plan}-{number:03d}",
                plan=plan,
                ranks=ranks[plan],
                num_examples=40 + 10 * place,
                up_bytes=0 if failed else size + 300,
                down_bytes=size,
                outcome="failed" if failed else "ok",
                stage="validate" if failed else None,
                reason="factor B of model.layers.0.mlp.up_proj holds NaN" if failed else None,
                loss=None if failed else 2.4 - 0.05 * server_round,
                steps=None if failed else 10,
            )
        )
    num_failed = sum(client.outcome == "failed" for client in clients)
    spectra = {m: spectrum(i % 7, server_round, length) for i, m in enumerate(modules(num_layers))}
    tail = 0.35 * 0.7 ** (server_round - 1)
    return RoundRecord(
        server_round=server_round,
        learning_rate=1e-3 if server_round < 8 else 5e-4,
        clients=clients,
        up_bytes=sum(client.up_bytes for client in clients),
        down_bytes=sum(client.down_bytes for client in clients),
        num_ok=len(clients) - num_failed,
        num_failed=num_failed,
        train_loss=2.5 - 0.9 * (1 - 0.8**server_round),
        spectra=spectra,
        energy_kept={"type1": 1 - tail, "type2": 1 - 0.4 * tail, "type3": 1 - 0.2 * tail, "type4": 1.0},
        energy_above_smallest=tail,
        evaluation=evaluation(12 + 30 * (1 - 0.75**server_round), num_layers) if evaluate else None,
        note="two clients shared one name" if server_round == 5 else None,
        seconds={"broadcast": 0.2, "train": 7.5 + 0.3 * server_round, "aggregate": 0.6, "checkpoint": 0.3}
        | ({"evaluate": 6.0} if evaluate else {})
        | {"total": 15.0},
    )


def with_controls(found: ReferencesRecord, num_layers: int = 2) -> ReferencesRecord:
    """Return the references with those that are off unless a configuration turns them on."""

    def run(rank: int, final: float, **own: Any) -> ReferenceRunRecord:
        scores = [RoundScoreRecord(server_round=r, unseen=score(final - 12 + r)) for r in (0, 6, 12)]
        rank_text = f"{rank} in every module"
        return ReferenceRunRecord(rank=rank_text, evaluations=scores, final=evaluation(final, num_layers), **own)

    alone = run(16, 30.0, num_clients=24, up_bytes=2_000_000)
    largest = run(16, 45.5, learning_rate=0.01, up_bytes=64_000_000)
    return found.model_copy(update={"large_clients_alone": alone, "fedit_largest_rank": largest})


def references(num_layers: int = 2) -> ReferencesRecord:
    clients = [
        LocalClientRecord(
            client_id=f"{name}-{number:03d}",
            plan=name,
            own=score(30.0 + place, 10 + 20 * number, 1),
            global_own=score(33.0 + 2 * place + number, 10 + 20 * number, 1),
            base_own=score(11.0, 10 + 20 * number, 1),
            unseen=score(17.0 + number),
        )
        for place, (name, *_) in enumerate(PLANS)
        for number in range(2)
    ]
    return ReferencesRecord(
        base=evaluation(12.0, num_layers),
        local_only=LocalOnlyRecord(
            clients=clients, own=score(31.5), global_own=score(36.5), base_own=score(11.0), unseen=score(17.5)
        ),
        fedit_smallest_rank=ReferenceRunRecord(
            rank="2 in every module",
            ranks=plan_ranks(num_layers)["type1"],
            evaluations=[
                RoundScoreRecord(server_round=r, unseen=score(12 + 22 * (1 - 0.78**r))) for r in range(0, 13, 2)
            ],
            final=evaluation(32.9, num_layers),
            up_bytes=4_000_000,
            down_bytes=4_100_000,
        ),
    )


def manifest(num_layers: int = 2, num_rounds: int = 12) -> ManifestRecord:
    return ManifestRecord(
        flexlora_version="0.1.0",
        packages={"torch": "2.9.0", "transformers": "5.0.0", "peft": "0.18.0"},
        python="3.11.7",
        platform="Linux-6.1-x86_64",
        seed=42,
        config_hash="sha256:4d5a",
        data_hashes={"generated": "sha256:" + "0123456789abcdef" * 4},
        base_model="flexlora/tiny-llama",
        num_parameters=5_900_000,
        method="flexlora",
        num_clients=80,
        num_unseen_tasks=8,
        num_rounds=num_rounds,
        cohort_size=8,
        plan_counts={name: count for name, _, _, count in PLANS},
        plan_ranks=plan_ranks(num_layers),
        warnings=["2 clients have fewer than 16 examples"],
        started="2025-01-01T10:00:00+00:00",
        seconds={"references": 61.0},
    )


@pytest.fixture
def make_manifest() -> Callable[..., ManifestRecord]:
    """The manifest of a small run of which nothing matters but the changes that are given."""

    def make(**changes: Any) -> ManifestRecord:
        plain = ManifestRecord(
            flexlora_version="0",
            python="3",
            platform="x",
            seed=0,
            config_hash="0",
            base_model="b",
            num_parameters=1,
            method="flexlora",
            num_clients=5,
            num_unseen_tasks=2,
        )
        return plain.model_copy(update=changes)

    return make


def write_run(folder: Path, records: list[RoundRecord]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for record in records:
        append_record(folder / "records.jsonl", record)
    return folder


@pytest.fixture
def records() -> list[RoundRecord]:
    """Twelve rounds; rounds 1, 4, 7, 10 were not evaluated, one client failed in rounds 3 and 7."""
    return [round_record(number, evaluate=number % 3 != 1) for number in range(13)]


@pytest.fixture
def whole_run(tmp_path: Path, records: list[RoundRecord]) -> Path:
    folder = write_run(tmp_path / "demo", records)
    write_references(folder / "references.json", references())
    write_manifest(folder / "manifest.json", manifest())
    (folder / "config.yaml").write_text("seed: 42\nrounds:\n  num_rounds: 12\ndata:\n  path: <b>data & more</b>\n")
    (folder / "adapters" / "rank-16").mkdir(parents=True)
    return folder


@pytest.fixture
def run_with_controls(whole_run: Path) -> Path:
    write_references(whole_run / "references.json", with_controls(references()))
    return whole_run


@pytest.fixture
def base_only_run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "base", [round_record(0)])


@pytest.fixture
def running_run(tmp_path: Path, records: list[RoundRecord]) -> Path:
    folder = write_run(tmp_path / "running", records[:5])
    write_manifest(folder / "manifest.json", manifest())
    with (folder / "records.jsonl").open("ab") as file:
        file.write(b'{"server_round":5,"learn')
    return folder


@pytest.fixture
def broken_numbers() -> RoundRecord:
    """A round in which everything that can be NaN or infinite is."""
    bad = ScoreRecord(rouge_l=math.nan, exact_match=math.nan, loss=math.inf, num_examples=1, num_tasks=1)
    return RoundRecord(
        server_round=1,
        learning_rate=math.inf,
        train_loss=math.nan,
        spectra={"a.q_proj": SpectrumRecord(singular_values=[math.inf, math.nan, 0.0], tail=math.nan)},
        energy_kept={"type1": math.nan},
        energy_above_smallest=-math.inf,
        evaluation=EvaluationRecord(
            unseen=bad, unseen_unweighted=bad, categories={"x": bad}, validation_loss=float("nan"), rank_groups={}
        ),
        seconds={"train": math.nan},
    )


@pytest.fixture
def large_run(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A run of (layers, rounds, clients per round), every round evaluated, ranks up to 200 recorded."""
    num_layers, num_rounds, cohort = request.param
    folder = write_run(
        tmp_path / "large",
        [
            round_record(number, num_layers=num_layers, cohort=cohort, length=200, evaluate=number % 5 == 0)
            for number in range(num_rounds + 1)
        ],
    )
    write_references(folder / "references.json", references(num_layers))
    write_manifest(folder / "manifest.json", manifest(num_layers, num_rounds))
    return folder
