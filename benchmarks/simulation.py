"""What does simulating clients cost? Ways of training the same clients, in turns within one process.

    python benchmarks/simulation.py --batch-sizes 1,4,8 --repeats 5
    python benchmarks/simulation.py --base 64x2 --methods ours,swapped
    python benchmarks/simulation.py --base smollm2 --dtype bfloat16 --batch-sizes 1,4 --methods ours,swapped,central
    python benchmarks/simulation.py --base FOLDER --device cuda --dtype bfloat16 --clients 64 --batch-sizes 4 --profile

Every client of the generated corpus makes the same number of optimiser steps on the same examples from the same factors
in each way. Ways take turns, repeat by repeat, so that a busy machine troubles all of them; a ratio is that of two
neighbours in time. Reported: median seconds, client-steps and tokens (padding not counted) per second, and the median
ratio to ``ours`` with its smallest and largest.

    ours         the engine: groups of clients share passes, in one process a core with one thread each
    ours-1       the same in one process with one thread
    ours-alone   the same, one client at a time
    swapped      stock PEFT, one client at a time, its factors set by set_peft_model_state_dict; all cores
    swapped-1    the same with one thread
    central      stock PEFT LoRA training of the same tokens as one client in batches of --central-batch; all cores
    central-1    the same with one thread
    trainer      a transformers.Trainer for each client, as in the code released with the paper; all cores
    flower       Flower's simulation: the steps of swapped in one actor a core, with one thread, that keeps its models;
                 needs flwr[simulation] in the environment of --flower-python. A round's time, start-up not counted.

With --cpu-time the ways that use several processes cannot be measured. With --profile the ways with one thread are also
run under torch's profiler: the share of each kind of work, and the rate of the matrix products as a share of what one
thread reaches on this machine with large matrices. On a GPU it says the latter only, for the ways that are quick, as a
share of what the device reaches in the type of the base.
"""

import argparse
import atexit
import json
import os
import pickle
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from flexlora.data.pretraining import BASE_FOLDER
from flexlora.data.prompts import EncodedExample, encode_many
from flexlora.engines.base import Parcel, RoundOrder
from flexlora.engines.process_layout import choose_processes
from flexlora.engines.processes import ChildProcesses, ProcessEngine
from flexlora.engines.simulation import SimulationEngine
from flexlora.experiment.config_file import load_config
from flexlora.experiment.participants import gather_participants
from flexlora.federation.clients import ClientSpec
from flexlora.federation.messages import Broadcast, Update
from flexlora.lora.factors import Scaling
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.base_model import load_base_model, target_modules
from flexlora.training.group import TrainedClient, train_group
from flexlora.training.group_passes import GroupJob
from flexlora.training.one_client import LocalTraining

CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"
SMOLLM2 = Path(__file__).parents[1] / "models" / "smollm2-135m-instruct"
HEAD_WIDTH = 32
LEARNING_RATE = 1e-3
ALPHA = 2.0
START_SECONDS = 120
MOST_SECONDS_TO_COUNT = 5.0


@dataclass(frozen=True)
class Setting:
    """What every way trains: jobs whose examples are exactly those of all steps, in order."""

    make_network: Callable[[], PreTrainedModel]
    model: AdaptedModel
    clients: Sequence[ClientSpec]
    jobs: Sequence[GroupJob]
    training: LocalTraining
    central_batch: int
    base: str
    flower_python: str
    device: torch.device

    @property
    def num_tokens(self) -> int:
        return sum(len(example.input_ids) for job in self.jobs for example in job.examples)

    @property
    def num_steps(self) -> int:
        return sum(self.training.num_steps(len(job.examples)) for job in self.jobs)


def folder_of(base: str) -> str | None:
    """Return the folder of a base that has one; None for a random Llama of ``hidden x layers``."""
    if base in ("embedded", "smollm2"):
        return str(BASE_FOLDER if base == "embedded" else SMOLLM2)
    return base if Path(base).is_dir() else None


def make_network(
    base: str, attention: str, device: str = "cpu", dtype: Literal["float32", "bfloat16"] = "float32"
) -> PreTrainedModel:
    """Return the embedded base, that of a folder, or a random Llama of ``hidden x layers``."""
    folder = folder_of(base)
    if folder is not None:
        return load_base_model(folder, dtype=dtype, device=device, attn_implementation=attention)[0]
    hidden, layers = map(int, base.split("x"))
    config = LlamaConfig(
        vocab_size=2560,
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD_WIDTH,
        num_key_value_heads=max(1, hidden // HEAD_WIDTH // 2),
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    network = LlamaForCausalLM._from_config(config, attn_implementation=attention, dtype=getattr(torch, dtype))
    return network.to(device).eval()  # pyright: ignore[reportArgumentType]


def make_setting(arguments: argparse.Namespace, batch_size: int) -> Setting:
    """Return as many clients of the demo as asked for, with as many examples as their steps need."""
    small, middle, large = arguments.ranks.split(",")
    types = {
        "type1": {"attention": small, "ffn": small},
        "type2": {"attention": middle, "ffn": middle},
        "type3": {"attention": middle, "ffn": large},
        "type4": {"attention": large, "ffn": large},
    }
    config = load_config(
        CONFIG, [f"clients.distribution={arguments.distribution}", f"clients.types={json.dumps(types)}"]
    )
    participants = gather_participants(config)
    tokenizer = AutoTokenizer.from_pretrained(folder_of(arguments.base) or BASE_FOLDER)
    of_base = partial(make_network, arguments.base, arguments.attention, arguments.device, arguments.dtype)
    model = AdaptedModel(of_base(), tokenizer)
    shapes, scaling = target_modules(model.network, "all-linear"), Scaling("rslora", ALPHA)
    jobs = []
    for seed, client in enumerate(participants.clients[: arguments.clients]):
        examples = participants.corpus.clients[client.client_id].train
        wanted = [examples[index % len(examples)] for index in range(arguments.steps * batch_size)]
        encoded = encode_many(wanted, tokenizer, config.data.template, config.data.max_length)
        adapter = model.initial_adapter(client.plan.resolve(shapes), scaling, seed=0)
        jobs.append(GroupJob(Broadcast(adapter), encoded, LEARNING_RATE, seed))
    training = LocalTraining("adamw", batch_size=batch_size)
    return Setting(
        of_base,
        model,
        participants.clients[: arguments.clients],
        jobs,
        training,
        arguments.central_batch,
        arguments.base,
        arguments.flower_python,
        model.device,
    )


def ours(setting: Setting, clients_per_group: int | None) -> Callable[[], None]:
    def train() -> None:
        outcomes = train_group(setting.model, setting.jobs, setting.training, clients_per_group)
        assert all(isinstance(outcome, TrainedClient) for outcome in outcomes)

    return train


def engine(setting: Setting) -> Callable[[], None]:
    examples = {client.client_id: job.examples for client, job in zip(setting.clients, setting.jobs, strict=True)}
    parcels = {
        client.plan: Parcel(job.broadcast, "float32") for client, job in zip(setting.clients, setting.jobs, strict=True)
    }
    order = RoundOrder(
        server_round=1,
        seed=0,
        learning_rate=LEARNING_RATE,
        wire_dtype="float32",
        uplink=(),
        cohort=setting.clients,
        parcels=parcels,
    )
    children = ChildProcesses(
        setting.model,
        *choose_processes(str(setting.device), setting.model.num_parameters, None, None),
        seconds_before_children=0.0,
    )
    here = SimulationEngine(setting.model, examples.__getitem__, setting.training)
    together = ProcessEngine(here, children)

    def train() -> None:
        outcomes = list(together.train(order))
        failed = [outcome for outcome in outcomes if not isinstance(outcome, Update)]
        if failed:
            raise RuntimeError(f"{len(failed)} of {len(outcomes)} clients failed: {failed[0].reason}")

    # Children join in when they are ready: wait until all of them have.
    train()
    deadline = time.monotonic() + START_SECONDS
    while not children.are_ready():
        assert time.monotonic() < deadline, "a child process did not start"
        time.sleep(0.2)
        train()
    return train


def stock(network: PreTrainedModel, ranks: dict[str, int]) -> PeftModel:
    config = LoraConfig(
        r=max(ranks.values()), rank_pattern=ranks, lora_alpha=ALPHA, use_rslora=True, target_modules=list(ranks)
    )
    return get_peft_model(network, config).train()  # pyright: ignore[reportArgumentType]


def stock_steps(model: PeftModel, examples: Sequence[EncodedExample], batch_size: int) -> None:
    """Train as a plain loop over batches would: padding to the longest row, transformers' loss, fused AdamW."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=0.0, fused=True)
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        length = max(len(example.input_ids) for example in batch)
        tokens, labels = (
            torch.tensor([[*row, *[filler] * (length - len(row))] for row in rows], device=model.device)
            for rows, filler in (
                ([example.input_ids for example in batch], 0),
                ([example.labels for example in batch], -100),
            )
        )
        logits = model(input_ids=tokens, attention_mask=(tokens != 0).long()).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def swapped(setting: Setting) -> Callable[[], None]:
    # One stock model for each set of ranks, as a simulator of few device types would keep.
    models: dict[tuple[tuple[str, int], ...], PeftModel] = {}
    for job in setting.jobs:
        ranks = {path: factors.rank for path, factors in job.broadcast.trainable.items()}
        if tuple(ranks.items()) not in models:
            models[tuple(ranks.items())] = stock(setting.make_network(), ranks)

    def train() -> None:
        for job in setting.jobs:
            adapter = job.broadcast.trainable
            model = models[tuple((path, factors.rank) for path, factors in adapter.items())]
            set_peft_model_state_dict(model, peft_state(job))
            stock_steps(model, job.examples, setting.training.batch_size)
            # What a client would send.
            {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}

    return train


def central(setting: Setting) -> Callable[[], None]:
    largest = max(
        (job.broadcast.trainable for job in setting.jobs),
        key=lambda adapter: sum(factors.rank for factors in adapter.values()),
    )
    model = stock(setting.make_network(), {path: factors.rank for path, factors in largest.items()})
    examples = [example for job in setting.jobs for example in job.examples]
    return lambda: stock_steps(model, examples, setting.central_batch)


def trainer(setting: Setting) -> Callable[[], None]:
    models: dict[tuple[tuple[str, int], ...], PeftModel] = {}

    def collate(batch: Sequence[EncodedExample]) -> dict[str, torch.Tensor]:
        length = max(len(example.input_ids) for example in batch)
        tokens = torch.tensor([[*row.input_ids, *[0] * (length - len(row.input_ids))] for row in batch])
        labels = torch.tensor([[*row.labels, *[-100] * (length - len(row.labels))] for row in batch])
        return {"input_ids": tokens, "attention_mask": (tokens != 0).long(), "labels": labels}

    def train() -> None:
        for job in setting.jobs:
            adapter = job.broadcast.trainable
            ranks = {path: factors.rank for path, factors in adapter.items()}
            if tuple(ranks.items()) not in models:
                models[tuple(ranks.items())] = stock(setting.make_network(), ranks)
            model = models[tuple(ranks.items())]
            set_peft_model_state_dict(model, peft_state(job))
            with tempfile.TemporaryDirectory() as folder:
                arguments = TrainingArguments(
                    folder,
                    per_device_train_batch_size=setting.training.batch_size,
                    num_train_epochs=1,
                    learning_rate=LEARNING_RATE,
                    lr_scheduler_type="constant",
                    weight_decay=0.0,
                    save_strategy="no",
                    logging_strategy="no",
                    report_to="none",
                    use_cpu=setting.device.type == "cpu",
                    disable_tqdm=True,
                    remove_unused_columns=False,
                )
                one = Trainer(model, arguments, data_collator=collate, train_dataset=list(job.examples))  # type: ignore[arg-type]
                one.remove_callback(PrinterCallback)
                one.train()

    return train


def flower(setting: Setting) -> Callable[[], None]:
    folder = Path(tempfile.mkdtemp())
    go, done = folder / "go", folder / "done"
    os.mkfifo(go)
    os.mkfifo(done)
    job = {
        "base": setting.base,
        "clients": [(peft_state(job), list(job.examples)) for job in setting.jobs],
        "batch_size": setting.training.batch_size,
    }
    (folder / "job.pickle").write_bytes(pickle.dumps(job))
    script = Path(__file__).with_name("flower_round.py")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [setting.flower_python, script, folder], stdout=log, stderr=log, start_new_session=True
        )
    # Ray's processes end with the one that started them.
    atexit.register(os.killpg, process.pid, signal.SIGTERM)

    def opened(pipe: Path, flags: int) -> int:
        while process.poll() is None:
            try:
                return os.open(pipe, flags | os.O_NONBLOCK)
            except OSError:  # Nobody reads yet.
                time.sleep(0.001)
        raise RuntimeError(f"Flower's simulation has ended: see {folder / 'log'}")

    def train() -> None:
        descriptor = opened(go, os.O_WRONLY)
        os.write(descriptor, b"go")
        os.close(descriptor)
        descriptor, answer = opened(done, os.O_RDONLY), b""
        while not answer and process.poll() is None:
            try:
                answer = os.read(descriptor, 1000)
            except BlockingIOError:
                pass
            time.sleep(0.001)
        os.close(descriptor)
        assert answer == b"done", f"{answer.decode()}; see {folder / 'log'}"

    return train


def peft_state(job: GroupJob) -> dict[str, torch.Tensor]:
    """Return the factors a job starts from as PEFT names them."""
    return {
        f"base_model.model.{path}.lora_{name}.weight": getattr(factors, name)
        for path, factors in job.broadcast.trainable.items()
        for name in "AB"
    }


# Name -> what it does and how many threads it takes in this process; -1 is all cores.
METHODS: dict[str, tuple[Callable[[Setting], Callable[[], None]], int]] = {
    "ours": (engine, 1),
    "ours-1": (lambda setting: ours(setting, None), 1),
    "ours-alone": (lambda setting: ours(setting, 1), 1),
    "swapped": (swapped, -1),
    "swapped-1": (swapped, 1),
    "central": (central, -1),
    "central-1": (central, 1),
    "trainer": (trainer, -1),
    "flower": (flower, 1),
}


def measure(setting: Setting, names: Sequence[str], repeats: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Print and return the seconds of each way."""
    trainers = {name: METHODS[name][0](setting) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats + 1):
        for name, train in trainers.items():
            threads = METHODS[name][1]
            torch.set_num_threads(threads if threads > 0 else os.cpu_count() or 1)
            start = clock()
            train()
            if repeat:  # The first warms up.
                seconds[name].append(clock() - start)
    for name, own in seconds.items():
        median = statistics.median(own)
        line = f"  {name:12s}{median:9.2f} s{setting.num_steps / median:10.1f} client-steps/s"
        line += f"{setting.num_tokens / median:10.0f} tokens/s"
        if name != names[0]:
            ratios = [theirs / ours for theirs, ours in zip(own, seconds[names[0]], strict=True)]
            line += f"   {names[0]} is {statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
        print(line, flush=True)
    return seconds


def now(device: torch.device) -> float:
    """Return the time when everything launched on a device so far is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return floating-point operations per second in a large product: of one thread, or of a GPU."""
    torch.set_num_threads(1)
    size = 1536 if device.type == "cpu" else 8192
    A = torch.randn(size, size, device=device).to(dtype)
    seconds = []
    for _ in range(8):
        start = now(device)
        A @ A
        seconds.append(now(device) - start)
    return 2 * size**3 / statistics.median(seconds[3:] if device.type == "cuda" else [min(seconds)])


def shares_of_peak(setting: Setting, seconds: dict[str, list[float]]) -> dict[str, float]:
    """Print and return how near the products of each way come to the GPU's best, in the type of the base."""
    peak = matrix_peak(setting.device, setting.model.network.dtype)
    print(f"  the device reaches {peak / 1e12:.0f} TFLOP/s in a large product")
    shares = {}
    for name, own in seconds.items():
        # Counting makes a way some times slower.
        if statistics.median(own) > MOST_SECONDS_TO_COUNT:
            continue
        train = METHODS[name][0](setting)
        with FlopCounterMode(display=False) as counter:
            train()
        rate = counter.get_total_flops() / statistics.median(own)
        shares[name] = rate / peak
        print(f"  {name}: {rate / 1e12:.1f} TFLOP/s in products, {shares[name]:.1%} of the peak", flush=True)
    return shares


# Kind of work -> parts of the names of torch's operators that do it; the first that fits counts.
KINDS = {
    "matrix products": ("mm", "linear", "matmul"),
    "attention": ("scaled_dot_product", "softmax_backward", "_softmax"),
    "loss": ("nll_loss", "log_softmax", "cross_entropy"),
    "optimiser, clipping": ("adam", "sgd", "linalg_vector_norm", "foreach"),
    "copies, gathering": (
        "copy",
        "cat",
        "index",
        "stack",
        "clone",
        "embedding",
        "contiguous",
        "fill",
        "zero",
        "repeat",
    ),
    "elementwise": ("mul", "add", "div", "silu", "sub", "rsqrt", "sum", "mean", "pow", "neg", "cos", "sin", "exp"),
}


def profile(setting: Setting, names: Sequence[str]) -> None:
    """Print where the time of a way with one thread goes, and how near its products come to the machine's best."""
    peak = matrix_peak(setting.device, torch.float32)
    print(f"  one thread reaches {peak / 1e9:.0f} GFLOP/s in a large product")
    for name in names:
        train = METHODS[name][0](setting)
        torch.set_num_threads(1)
        train()
        with FlopCounterMode(display=False) as counter:
            train()
        start = time.perf_counter()
        train()
        seconds = time.perf_counter() - start
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            train()
        of_kind = dict.fromkeys(KINDS, 0.0)
        other = 0.0
        for event in profiler.key_averages():
            kind = next((kind for kind, parts in KINDS.items() if any(part in event.key for part in parts)), None)
            if kind is None:
                other += event.self_cpu_time_total
            else:
                of_kind[kind] += event.self_cpu_time_total
        in_torch = other + sum(of_kind.values())
        work = counter.get_total_flops()
        share = work / seconds / peak
        print(
            f"  {name}: {seconds:.2f} s, {work / 1e9:.1f} GFLOP in products, {work / seconds / 1e9:.0f} GFLOP/s, "
            f"{share:.0%} of the peak; {share / (of_kind['matrix products'] / in_torch):.0%} within the products"
        )
        parts = [*of_kind.items(), ("other operators", other)]
        print("    " + ", ".join(f"{kind} {spent / in_torch:.0%}" for kind, spent in parts), flush=True)


def main() -> None:
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--base",
        default="embedded",
        help="embedded, smollm2 (after make smollm2), a folder, or HIDDENxLAYERS such as 64x2",
    )
    parser.add_argument("--device", default="cpu", help="for example cuda")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the base")
    parser.add_argument("--batch-sizes", default="1,4,8")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4, help="optimiser steps of each client")
    parser.add_argument("--distribution", default="uniform", help="of the four small device types")
    parser.add_argument("--ranks", default="1,4,16", help="SMALLEST,MIDDLE,LARGEST of the device types")
    parser.add_argument("--methods", default="ours,ours-1,swapped,swapped-1,central,central-1")
    parser.add_argument("--flower-python", default=sys.executable, help="of an environment with flwr[simulation]")
    parser.add_argument("--central-batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--attention", default="sdpa", choices=("sdpa", "eager"))
    parser.add_argument("--cpu-time", action="store_true", help="count processor seconds: fairer where others are busy")
    parser.add_argument("--profile", action="store_true", help="where the time of the ways with one thread goes")
    parser.add_argument("--out", type=Path, help="append one JSON line per batch size")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu_time else partial(now, torch.device(arguments.device))
    for batch_size in map(int, arguments.batch_sizes.split(",")):
        setting = make_setting(arguments, batch_size)
        print(
            f"{arguments.base}, {setting.model.num_parameters:,} parameters; {len(setting.jobs)} clients, "
            f"{arguments.steps} steps of batch {batch_size}, {setting.num_tokens:,} tokens"
        )
        names = arguments.methods.split(",")
        seconds, shares = measure(setting, names, arguments.repeats, clock), {}
        if arguments.profile and setting.device.type == "cuda":
            shares = shares_of_peak(setting, seconds)
        elif arguments.profile:
            profile(setting, [name for name in names if METHODS[name][1] == 1 and name not in ("ours", "flower")])
        if arguments.out:
            row = {
                "part": "simulation",
                "base": arguments.base,
                "device": arguments.device,
                "dtype": arguments.dtype,
                "clients": len(setting.jobs),
                "batch_size": batch_size,
                "steps": setting.num_steps,
                "tokens": setting.num_tokens,
                "seconds": seconds,
                "share_of_peak": shares,
            }
            with arguments.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
