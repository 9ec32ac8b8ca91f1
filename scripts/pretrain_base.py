"""Pretrains the small Llama that ships with the package, from generated text and part of Natural Instructions.

    python scripts/pretrain_base.py prepare --tasks natural-instructions/tasks --work /tmp/pretrain
    python scripts/pretrain_base.py train --work /tmp/pretrain --threads 1 --compile
    python scripts/pretrain_base.py export --work /tmp/pretrain

`prepare` chooses the pretrain-only tasks, writes the documents, trains the tokenizer and packs the tokens. `train` may
be killed at any time and started again: it goes on from the last checkpoint. The learning rate is held constant after
the warm-up; creating the file COOLDOWN in the work folder (or reaching the token budget or --max-seconds) starts a
linear cool-down to zero over a share of the steps done, after which training ends. `export` copies the newest snapshot
into the package and writes the model card.
"""

import argparse
import json
import os
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flexlora.data.generated.clauses import draw_clause, pronoun, write_clause
from flexlora.data.generated.lexicon import (
    ADJECTIVES,
    CATEGORIES,
    CATEGORY_OF,
    DAYS,
    FACTS,
    LANGUAGES,
    MONTHS,
    NAMES,
    NOUNS,
    NUMBER_WORDS,
    PLURAL_CATEGORIES,
    PRAISE,
    TOPICS,
    VERBS,
    invented_words,
)
from flexlora.data.generated.recipe import capitalised, with_article
from flexlora.data.generated.scenes import SCENES, draw_scene
from flexlora.data.generated.tasks import GeneratedTask, Instance, all_tasks, split_of
from flexlora.data.pretraining import BASE_FOLDER, INSTANCES_FILE, TASKS_FILE, instance_hash

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
BOS, EOS = 1, 2
VOCAB_SIZE = 2560
CONTEXT = 512
TOKENS_PER_STEP = 4096
# Shares of the tokens: the opening phase about copying, and the text of Natural Instructions; the rest is generated.
OPENING_SHARE = 0.16
NATURAL_SHARE = 0.30
# What the prompts of federated tuning contain; pretraining on it would spoil the comparison with the base alone.
FORBIDDEN = ("### Instruction", "### Response", "### Input")


# --- documents from the generator ---------------------------------------------------------------------------------

# A document is a list of pieces of text, each with the weight of its tokens in the loss. What nobody can predict, such
# as the random words of an input, has a low weight: at this size its noise would drown what there is to learn.
Document = list[tuple[str, float]]
NOISE = 0.1

# What stands before an input, between it and its answer, and after the answer.
LAYOUTS: tuple[tuple[str, str, str], ...] = (
    ("", " -> ", "\n"),
    ("", " => ", "\n"),
    ("Q: ", "\nA: ", "\n"),
    ("In: ", "\nOut: ", "\n\n"),
    ("Input: ", "\nOutput: ", "\n\n"),
    ("Text: ", "\nAnswer: ", "\n\n"),
    ("* ", "\n  ", "\n"),
    ("", "\n", "\n\n"),
    ("Given: ", "\nResult:\n", "\n\n"),
    ("<", "> <", ">\n"),
    ("", "\n\n", "\n\n"),
    ("Read this:\n", "\n\nYour answer:\n", "\n\n"),
)


def example_pieces(instance: Instance, layout: tuple[str, str, str]) -> Document:
    """Writes one input and its answer; only the answer counts fully."""
    before, between, after = layout
    return [(before + instance["input"] + between, NOISE), (instance["output"][0] + after, 1.0)]


def few_shot_document(task: GeneratedTask, rng: random.Random) -> Document:
    """Writes a list of examples of one task, with its definition above, below or left out."""
    layout = rng.choice(LAYOUTS)
    body = [
        piece
        for instance in task.instances(rng.randint(2, 8), rng.getrandbits(32))
        for piece in example_pieces(instance, layout)
    ]
    kind = rng.random()
    if kind < 0.25:
        return body
    if kind < 0.9:
        head = rng.choice(("{}\n", "{}\n\n", "Task: {}\n", "# {}\n", "Rule: {}\n\n", "How to do it: {}\n"))
        return [(head.format(task.definition), 0.3), *body]
    return [*body, (rng.choice(("These examples show: {}\n", "Rule: {}\n")).format(task.definition), 0.5)]


def mixed_document(tasks: Sequence[GeneratedTask], rng: random.Random) -> Document:
    """Writes a few examples of different tasks, each below its own definition."""
    layout = rng.choice(LAYOUTS)
    head = rng.choice(("{}\n", "Task: {}\n", "- {}\n", "Do this: {}\n", "{}\n\n"))
    pieces: Document = []
    for task in rng.sample(tasks, rng.randint(1, 5)):
        instance = rng.choice(task.instances(3, rng.getrandbits(32)))
        pieces += [(head.format(task.definition), 0.2), *example_pieces(instance, layout), ("\n", 1.0)]
    return pieces


_FACT_SENTENCES: dict[str, str] = {
    "sound": "The {k} says {v}.",
    "young": "A young {k} is called a {v}.",
    "home": "The {k} lives in the {v}.",
    "tint": "The {k} is {v}.",
    "workplace": "The {k} works at the {v}.",
    "maker": "Only the {v} makes the {k}.",
    "use": "We {v} with the {k}.",
    "worn_on": "The {k} is worn on the {v}.",
    "country": "{k} is a city in {v}.",
    "opposite": "What is {k} is not {v}.",
    "plural": "Here is one {k}, there are many {v}.",
    "past": "Today we {k}, yesterday we {v}.",
    "participle": "They {k} it now; they have {v} it before.",
    "gerund": "If you {k}, you are {v}.",
    "base form": "They {k}, and they will {v} again.",
    "third person": "I {k} and she {v}.",
    "category": "The {k} is a kind of {v}.",
}


def story_document(rng: random.Random) -> Document:
    """Writes a short made-up story about one or two people and a thing."""
    one, other = rng.sample(NAMES, 2)
    parts = [f"{one} lives with {other} near the {rng.choice(CATEGORIES['place'])}."]
    forms = ("present", "past", "future", "progressive", "perfect", "negative", "past negative", "passive", "can")
    for _ in range(rng.randint(3, 7)):
        clause = draw_clause(rng, adjective=rng.random() < 0.6)
        choice = rng.random()
        if choice < 0.4:
            one_form, other_form = rng.sample(forms, 2)
            parts += [write_clause(clause, one_form), write_clause(clause, other_form)]
        elif choice < 0.55:
            noun = rng.choice(NOUNS)
            parts.append(f"{one} saw {with_article(noun)}. {capitalised(pronoun(one))} {clause.verb[2]} the {noun}.")
        elif choice < 0.8:
            scene = rng.choice(SCENES)
            values = draw_scene(rng, scene)
            if "name" in values and values.get("friend") != one:
                values["name"] = one
            parts.append(scene.sentence.format(**values))
        elif choice < 0.85:
            parts.append(f"The {rng.choice(NOUNS)} was {rng.choice(PRAISE)}, said {other}.")
        else:
            words = rng.sample(NOUNS, 3)
            parts.append(
                f"There were three things: {words[0]}, {words[1]} and {words[2]}. "
                f"First came the {words[0]}, then the {words[1]}, last the {words[2]}."
            )
    return [(" ".join(parts) + "\n", 0.4)]


def knowledge_document(rng: random.Random) -> Document:
    """Writes sentences or lists that state the facts, kinds and rows of the lexicon."""
    kind = rng.randrange(6)
    if kind < 2:
        facts = list(_FACT_SENTENCES) if kind == 0 else [rng.choice(list(_FACT_SENTENCES))]
        pieces: Document = []
        for _ in range(rng.randint(4, 10)):
            fact = rng.choice(facts)
            key = rng.choice(list(FACTS[fact]))
            frame = capitalised(_FACT_SENTENCES[fact]).partition("{v}")
            before, after = frame[0].format(k=key), frame[2].format(k=key)
            pieces += [(before, NOISE), (FACTS[fact][key], 1.0), (after + rng.choice(" \n"), 0.3)]
        return pieces
    if kind == 2:
        names = rng.sample(list(CATEGORIES), 3)
        return [
            (f"{capitalised(PLURAL_CATEGORIES[name])}: {', '.join(rng.sample(CATEGORIES[name], 6))}\n", 0.4)
            for name in names
        ]
    if kind == 3:
        pieces = []
        for noun in rng.sample(NOUNS, rng.randint(4, 10)):
            pieces += [(f"{noun}: ", NOISE), (f"{CATEGORY_OF[noun]}\n", 1.0)]
        return pieces
    if kind == 4:
        letters = tuple("abcdefghijklmnopqrstuvwxyz")
        row = rng.choice((DAYS, MONTHS, NUMBER_WORDS, letters, tuple(map(str, range(40)))))
        start = rng.randrange(len(row) - 3)
        return [(rng.choice((" ", ", ")).join(row[start : start + 14]) + "\n", 1.0)]
    topic = rng.choice(list(TOPICS))
    words = rng.sample(TOPICS[topic], 4)
    adjective = rng.choice(ADJECTIVES)
    return [
        (
            f"{capitalised(topic)}: {words[0]} and {words[1]}, {words[2]} and {words[3]}. A {adjective} {words[0]}.\n",
            0.4,
        )
    ]


def dictionary_document(rng: random.Random) -> Document:
    """Writes part of the dictionary of a language that only pretraining knows."""
    language = rng.choice(LANGUAGES[-2:])
    words = rng.sample(list(invented_words(language).items()), rng.randint(4, 10))
    before, after = rng.choice(
        (("{e} is ", " in {l}."), ("{l}: ", ", English: {e}"), ("{e} - ", ""), ("For {e} say ", "."))
    )
    pieces: Document = [(f"{language}\n", NOISE)]
    for english, foreign in words:
        pieces += [
            (before.format(e=english, l=language), NOISE),
            (foreign, 0.5),
            (after.format(e=english, l=language) + "\n", 0.5),
        ]
    return pieces


def _any_words(rng: random.Random, num: int) -> list[str]:
    pools = (NOUNS, NAMES, ADJECTIVES, tuple(verb[0] for verb in VERBS), tuple(map(str, range(100))))
    pool = rng.choice((NOUNS, rng.choice(pools)))
    words = rng.sample(pool, min(num, len(pool)))
    if rng.random() < 0.3:
        # Words nobody has seen are copied piece by piece.
        words = [
            "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(1, 3))) for _ in words
        ]
    return words


def copy_document(rng: random.Random) -> Document:
    """Writes a list of random words or a sentence again and again: what comes next can only be copied."""
    if rng.random() < 0.3:
        text = write_clause(draw_clause(rng), rng.choice(("past", "present", "future"))) + rng.choice(
            ("", " " + story_document(rng)[0][0][:60])
        )
        texts = [text.strip()] * rng.randint(2, 4)
    else:
        words = _any_words(rng, rng.randint(2, 9))
        separators = rng.choices(
            (", ", " ", " / ", " - ", "; ", " | ", "\n", " and ", " + ", " > "), k=rng.randint(2, 4)
        )
        if rng.random() < 0.5:
            separators = [separators[0]] * len(separators)
        texts = [separator.join(words) for separator in separators]
    between = rng.choice(("\n", "\n\n", " -> ", " = ", "\nAgain: ", "\nOutput: ", "\nOut: ", "\nA: "))
    return [(texts[0] + between, NOISE), *((text + between, 1.0) for text in texts[1:])]


def induction_document(rng: random.Random) -> Document:
    """Writes a made-up mapping whose lines recur, so that answers can only come from the text above."""
    keys = rng.sample(NOUNS + NAMES, rng.randint(2, 6))
    values = [
        rng.choice((rng.choice(NOUNS), rng.choice(ADJECTIVES), rng.choice(VERBS)[0], str(rng.randrange(100))))
        for _ in keys
    ]
    before, between, after = rng.choice(
        (
            ("", " : ", "\n"),
            ("", " -> ", "\n"),
            ("the ", " has ", "\n"),
            ("", " ", "\n"),
            ("(", ", ", ")\n"),
            ("", " got the ", ".\n"),
            ("", "=", "; "),
        )
    )
    order = list(range(len(keys)))
    pieces: Document = []
    for turn in range(rng.randint(2, 4)):
        rng.shuffle(order)
        for place in order:
            pieces += [(before + keys[place] + between, NOISE), (values[place] + after, 1.0 if turn else NOISE)]
    return pieces


def generated_document(tasks: Sequence[GeneratedTask], rng: random.Random) -> Document:
    """Draws one document of the generated part of the mixture; `tasks` must all be of the pretrain split."""
    kind = rng.random()
    if kind < 0.36:
        return few_shot_document(rng.choice(tasks), rng)
    if kind < 0.70:
        return mixed_document(tasks, rng)
    if kind < 0.77:
        return story_document(rng)
    if kind < 0.84:
        return knowledge_document(rng)
    if kind < 0.86:
        return dictionary_document(rng)
    if kind < 0.94:
        return copy_document(rng)
    return induction_document(rng)


def first_document(tasks: Sequence[GeneratedTask], rng: random.Random) -> Document:
    """Draws one document of the opening phase, which is mostly about copying: every other skill builds on it."""
    kind = rng.random()
    if kind < 0.55:
        return copy_document(rng)
    if kind < 0.75:
        return induction_document(rng)
    return generated_document(tasks, rng)


# --- documents from Natural Instructions --------------------------------------------------------------------------


def choose_tasks(folder: Path, num: int, rng: random.Random) -> list[Path]:
    """Chooses mostly-ASCII tasks, taking one task of every category in turn until there are enough."""
    by_category: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.json")):
        task = json.loads(path.read_text(encoding="utf-8"))
        text = "".join(item["input"] + item["output"][0] for item in task["Instances"][:30])
        short = sum(len(item["input"]) < 700 for item in task["Instances"]) > 0.5 * len(task["Instances"])
        if text and short and sum(character.isascii() for character in text) > 0.995 * len(text):
            by_category.setdefault(task["Categories"][0], []).append(path)
    for paths in by_category.values():
        rng.shuffle(paths)
    # Translation into English letters is rarely English, and a category must keep most of its tasks for experiments.
    quota = {name: max(0, len(paths) * 2 // 5) for name, paths in by_category.items() if name != "Translation"}
    chosen: list[Path] = []
    while len(chosen) < num and any(quota.values()):
        for name in sorted(quota):
            if quota[name] and len(chosen) < num:
                quota[name] -= 1
                chosen.append(by_category[name].pop())
    return sorted(chosen)


def natural_documents(paths: Sequence[Path], rng: random.Random) -> Iterator[Document]:
    """Yields every short enough instance of the tasks once, a few together below their definition."""
    for path in paths:
        task = json.loads(path.read_text(encoding="utf-8"))
        items = [item for item in task["Instances"] if len(item["input"]) < 900]
        rng.shuffle(items)
        definition = task["Definition"][0].strip()
        while items:
            size = 0
            before, between, after = rng.choice(LAYOUTS[2:])
            pieces: Document = []
            if rng.random() < 0.7 and len(definition) < 500:
                pieces.append((rng.choice(("{}\n", "Task: {}\n", "{}\n\n")).format(definition), 0.3))
            while items and size < 1000:
                item = items.pop()
                pieces += [
                    (before + item["input"].strip() + between, 0.5),
                    (rng.choice(item["output"]).strip() + after, 1.0),
                ]
                size += len(pieces[-2][0]) + len(pieces[-1][0])
            yield pieces


# --- tokenizer ----------------------------------------------------------------------------------------------------


def train_tokenizer(documents: Sequence[str]) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE in which digits stay apart and any text comes back exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL_TOKENS[3:],
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


# --- prepare ------------------------------------------------------------------------------------------------------


def plain(document: Document) -> str:
    """Returns the text of a document."""
    return "".join(text for text, _ in document)


def encode_document(tokenizer: Tokenizer, document: Document) -> np.ndarray:
    """Returns two rows of 16-bit numbers, the tokens with their end mark and their loss weights in hundredths."""
    encoded = tokenizer.encode(plain(document), add_special_tokens=False)
    ends = np.cumsum([len(text) for text, _ in document])
    weights = np.array([round(100 * weight) for _, weight in document], dtype=np.uint16)
    # A token that reaches over two pieces counts as part of the one in which it ends.
    last_characters = np.array([end - 1 for _, end in encoded.offsets], dtype=np.int64)
    pieces = np.minimum(np.searchsorted(ends, last_characters, side="right"), len(document) - 1)
    ids = np.array([BOS, *encoded.ids, EOS], dtype=np.uint16)
    return np.stack([ids, np.concatenate([[0], weights[pieces], [100]]).astype(np.uint16)])


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file so that it is either old or complete."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)


def prepare(tasks_folder: Path, work: Path, num_tokens: int, num_tasks: int, seed: int) -> None:
    """Writes the token stream, the tokenizer and the lists of what was used."""
    work.mkdir(parents=True, exist_ok=True)
    BASE_FOLDER.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"pretraining corpus {seed}")
    paths = choose_tasks(tasks_folder, num_tasks, rng)
    listing, hashes = {}, set()
    for path in paths:
        task = json.loads(path.read_text(encoding="utf-8"))
        listing[path.stem] = task["Categories"][0]
        hashes |= {instance_hash(task["Definition"][0], item["input"]) for item in task["Instances"]}
    (BASE_FOLDER / TASKS_FILE).write_text(json.dumps(listing, indent=1) + "\n", encoding="utf-8")
    np.save(BASE_FOLDER / INSTANCES_FILE, np.array(sorted(hashes), dtype=np.uint64))

    natural = [
        document for document in natural_documents(paths, rng) if not any(m in plain(document) for m in FORBIDDEN)
    ]
    rng.shuffle(natural)
    held_natural, natural = natural[: len(natural) // 40], natural[len(natural) // 40 :]
    pretrain = [task for task in all_tasks() if split_of(task) == "pretrain"]
    sample = [plain(generated_document(pretrain, rng)) for _ in range(9000)]
    # The words of the lexicon at the start of lines: the first word of an answer has no space before it, and should
    # be one token all the same.
    forms = [*NOUNS, *ADJECTIVES, *(form for verb in VERBS for form in verb)]
    bare_words = ["\n".join(rng.sample(forms, len(forms))) for _ in range(300)]
    if not (work / "tokenizer").exists():
        tokenizer = train_tokenizer(sample + sample + [plain(document) for document in natural] + bare_words)
        tokenizer.save_pretrained(work / "tokenizer")
    backend = Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json"))

    def encode(documents: Sequence[Document]) -> list[np.ndarray]:
        return [encode_document(backend, document) for document in documents]

    def draw(opening: bool, num: int) -> list[np.ndarray]:
        """Encodes generated documents until they hold `num` tokens; in the opening they turn from first to usual."""
        drawn: list[np.ndarray] = []
        total = 0
        while total < num:
            is_first = opening and rng.random() < 2 - 2 * total / num
            document = (first_document if is_first else generated_document)(pretrain, rng)
            drawn.append(encode_document(backend, document))
            total += drawn[-1].shape[1]
        return drawn

    natural_ids = encode(natural)
    natural_tokens = sum(ids.shape[1] for ids in natural_ids)
    first = draw(True, int(OPENING_SHARE * num_tokens))
    later: list[np.ndarray] = draw(False, int((1 - NATURAL_SHARE - OPENING_SHARE) * num_tokens))
    generated_tokens = sum(ids.shape[1] for ids in first + later)
    # Each round through the natural documents is a new shuffle; a fractional last round takes a part of them.
    epochs = NATURAL_SHARE * num_tokens / natural_tokens
    for epoch in range(int(np.ceil(epochs))):
        later += rng.sample(natural_ids, int(min(1.0, epochs - epoch) * len(natural_ids)))
    rng.shuffle(later)
    flat = np.concatenate(first + later, axis=1)
    np.save(work / "tokens.npy", flat)
    for name, documents in (
        ("natural", held_natural),
        ("generated", [generated_document(pretrain, rng) for _ in range(500)]),
    ):
        np.save(work / f"held_{name}.npy", np.concatenate(encode(documents), axis=1))
    facts = {
        "tokens": int(flat.shape[1]),
        "natural_tokens_once": natural_tokens,
        "natural_epochs": epochs,
        "generated_tokens": generated_tokens,
        "natural_tasks": len(paths),
        "seed": seed,
    }
    write_bytes(work / "corpus.json", json.dumps(facts, indent=1).encode())
    print(facts)


# --- train --------------------------------------------------------------------------------------------------------


def build_model(hidden: int, layers: int) -> LlamaForCausalLM:
    """Builds the untrained model: grouped-query attention, non-square MLP, tied embeddings."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.04,
        dtype=torch.float32,
    )
    return LlamaForCausalLM(config)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, for the matrices inside the layers.

    The update is `U V^T` of the momentum `U S V^T`, found by five Newton-Schulz steps, and scaled to the size of an
    Adam update. This model learns to copy in fewer tokens with it than with
    AdamW alone.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 0.05)
                update = orthogonalised(parameter.grad.lerp(momentum, 0.95))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * 0.2 * max(parameter.shape) ** 0.5)


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """Returns roughly `U V^T` of the matrix; its singular values end up between 0.7 and 1.2."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
    return x.T if tall else x


def token_loss(model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Returns the weighted mean next-token loss of a packed batch."""
    logits = model(input_ids=ids, use_cache=False).logits
    losses = functional.cross_entropy(logits[:, :-1].reshape(-1, VOCAB_SIZE), ids[:, 1:].reshape(-1), reduction="none")
    kept = weights[:, 1:].reshape(-1)
    return (losses * kept).sum() / kept.sum()


def batch_at(stream: np.ndarray, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cuts the tokens of one step into rows; every fourth step has rows of the whole context instead of half of it."""
    per_epoch = stream.shape[1] // TOKENS_PER_STEP
    start = step % per_epoch * TOKENS_PER_STEP
    ids, weights = stream[:, start : start + TOKENS_PER_STEP]
    length = CONTEXT if step % 4 == 3 else CONTEXT // 2
    rows = torch.from_numpy(ids.astype(np.int64)).view(-1, length)
    return rows, torch.from_numpy(weights.astype(np.float32) / 100).view(-1, length)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, work: Path) -> dict[str, float]:
    """Returns the weighted loss on documents kept out of training."""
    losses = {}
    for name in ("natural", "generated"):
        stream = np.load(work / f"held_{name}.npy")
        parts = [token_loss(model, *batch_at(stream, 4 * part + 3)).item() for part in range(6)]
        losses[name] = float(np.mean(parts))
    return losses


def save_snapshot(model: LlamaForCausalLM, work: Path, step: int) -> None:
    """Writes a usable model folder and moves the link `snapshot` to it in one step."""
    folder = work / f"snapshot-{step:06d}"
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(work / "tokenizer").save_pretrained(folder)
    link = work / "snapshot.part"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    os.replace(link, work / "snapshot")
    for old in sorted(work.glob("snapshot-*"))[:-3]:
        shutil.rmtree(old)


def train(
    work: Path,
    hidden: int,
    layers: int,
    peak: float,
    budget: int,
    max_seconds: float,
    threads: int,
    compiled: bool,
) -> None:
    """Trains, or goes on training, until the cool-down is over."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = build_model(hidden, layers)
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named.items() if p.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=peak, weight_decay=0.1),
        torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.95), weight_decay=0.01, fused=True),
    ]
    state = {"step": 0, "cooldown_from": -1, "seconds": 0.0, "last": -1}
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, content in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(content)
        state = saved["state"]
    stream = np.load(work / "tokens.npy", mmap_mode="r")
    last_planned = budget // TOKENS_PER_STEP
    # Two row lengths: two static programs run faster than one for any length.
    batch_loss = torch.compile(token_loss, dynamic=False) if compiled else token_loss
    num_parameters = sum(p.numel() for p in model.parameters())
    log = (work / "loss.log").open("a", buffering=1)
    print(f"parameters {num_parameters} planned steps {last_planned} from step {state['step']}", file=log)
    started, saved_at, logged_at, running = time.time(), time.time(), time.time(), 0.0
    earlier_seconds = state["seconds"]

    def save() -> None:
        part = checkpoint.with_suffix(".part")
        contents = [optimizer.state_dict() for optimizer in optimizers]
        torch.save({"model": model.state_dict(), "optimizers": contents, "state": state}, part)
        os.replace(part, checkpoint)
        save_snapshot(model, work, state["step"])

    while state["last"] < 0 or state["step"] < state["last"]:
        step = state["step"]
        if state["cooldown_from"] < 0 and (
            (work / "COOLDOWN").exists() or step >= 0.82 * last_planned or state["seconds"] > 0.82 * max_seconds
        ):
            state["cooldown_from"], state["last"] = step, step + max(50, int(0.22 * step))
            print(f"cool-down from step {step} to {state['last']}", file=log)
        rate = peak * min(1.0, (step + 1) / 150)
        if state["cooldown_from"] >= 0:
            rate *= (state["last"] - step) / (state["last"] - state["cooldown_from"])
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        loss = batch_loss(model, *batch_at(stream, step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        running += loss.item()
        state["step"] = step + 1
        state["seconds"] = earlier_seconds + time.time() - started
        if state["step"] % 20 == 0:
            speed = 20 * TOKENS_PER_STEP / (time.time() - logged_at)
            print(
                f"step {state['step']} loss {running / 20:.4f} lr {rate:.5f} tokens {state['step'] * TOKENS_PER_STEP} "
                f"tok/s {speed:.0f} seconds {state['seconds']:.0f}",
                file=log,
            )
            running, logged_at = 0.0, time.time()
        if time.time() - saved_at > 240:
            save()
            saved_at = time.time()
            print(f"saved step {state['step']} held-out {held_out_loss(model, work)}", file=log)
    save()
    losses = held_out_loss(model, work)
    write_bytes(work / "result.json", json.dumps({**state, "held_out": losses, "parameters": num_parameters}).encode())
    print(f"finished step {state['step']} held-out {losses}", file=log)


# --- export -------------------------------------------------------------------------------------------------------

CARD = """---
language: en
license: apache-2.0
pipeline_tag: text-generation
library_name: transformers
---

# The embedded base model

A small Llama for trying federated fine-tuning without a download. It knows a little English, the words of the generated
corpus and how to continue lists of examples; it has not been tuned to follow instructions.

| | |
|---|---|
| architecture | Llama, {parameters:,} parameters, float32 |
| layers, width | {layers} layers, hidden size {hidden}, MLP {intermediate} (gated) |
| attention | {heads} heads, {kv_heads} key-value heads, rotary positions, context {context} |
| embeddings | tied, {vocab:,} tokens |
| tokenizer | byte-level BPE, digits apart; any text round-trips; `<s>` is put in front |
| chat | tokens for user, assistant and system, in the vocabulary and the template, but never trained |
| tokens seen | {tokens:,} ({per_parameter:.1f} per parameter) |
| held-out loss | {natural:.3f} on Natural Instructions text, {generated:.3f} on generated text |

The loss is in nats per token, weighted as in training: answers count fully, what nobody can predict (the random words
of an input) a tenth, running text about half. Matrices are trained with Muon, the rest with AdamW.

## Data

About {generated_percent:.0f} % of the tokens are generated documents: lists of examples of the tasks of the generator's
`pretrain` split in many layouts, texts that repeat themselves (the opening phase is mostly these, so that the model
learns to copy), stories, facts, and two invented languages. The rest is the text of {natural_tasks} English tasks of
Super-Natural Instructions with inputs under 900 characters, read {epochs:.1f} times. None of it uses the prompts of
federated tuning ("### Instruction:", chat roles).

**What it has seen is excluded from experiments.** `{tasks_file}` names the {natural_tasks} tasks;
`{instances_file}` holds a 64-bit hash of each of their instances, so that a task is recognised whatever
its file is called (`flexlora.data.pretraining`). Of the generated corpus, `split_of(task) == "federated"` marks the
tasks it has not seen.

## Limits

Made for demonstrations and tests. It invents facts, has read crowd-sourced task text with the biases of its authors
(including tasks about offensive language), writes only short English, and is of no use as an assistant.

Made by `scripts/pretrain_base.py`; the same seed gives the same corpus. The first 340 steps of these weights came from
a trial of the optimizer on a shorter build of the opening phase, so the script repeats the recipe, not these weights.
"""


def export(work: Path) -> None:
    """Copies the newest snapshot into the package and writes the model card."""
    model = LlamaForCausalLM.from_pretrained(work / "snapshot")
    config = model.config
    state = torch.load(work / "checkpoint.pt", weights_only=True)["state"]
    corpus = json.loads((work / "corpus.json").read_text())
    losses = held_out_loss(model, work)
    parameters = sum(p.numel() for p in model.parameters())
    tokens = state["step"] * TOKENS_PER_STEP
    natural_tokens = (tokens - OPENING_SHARE * corpus["tokens"]) * NATURAL_SHARE / (1 - OPENING_SHARE)
    for path in sorted((work / "snapshot").iterdir()):
        write_bytes(BASE_FOLDER / path.name, path.read_bytes())
    card = CARD.format(
        parameters=parameters,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        context=CONTEXT,
        vocab=VOCAB_SIZE,
        tokens=tokens,
        per_parameter=tokens / parameters,
        natural=losses["natural"],
        generated=losses["generated"],
        generated_percent=100 * (1 - natural_tokens / tokens),
        natural_tasks=corpus["natural_tasks"],
        epochs=natural_tokens / corpus["natural_tokens_once"],
        tasks_file=TASKS_FILE,
        instances_file=INSTANCES_FILE,
    )
    write_bytes(BASE_FOLDER / "README.md", card.encode())
    print(f"{BASE_FOLDER}: step {state['step']}, {tokens:,} tokens, held-out {losses}")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("prepare", "train", "export"))
    parser.add_argument("--work", type=Path, required=True, help="folder for the corpus, checkpoints and snapshots")
    parser.add_argument("--tasks", type=Path, help="tasks folder of Natural Instructions (prepare)")
    parser.add_argument("--num-tasks", type=int, default=220, help="how many of its tasks become pretrain-only")
    parser.add_argument("--tokens", type=int, default=22_000_000, help="token budget")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--peak", type=float, default=6e-3, help="learning rate after the warm-up")
    parser.add_argument("--max-seconds", type=float, default=1e9, help="training time, cool-down included")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()
    if given.verb == "prepare":
        prepare(given.tasks, given.work, given.tokens, given.num_tasks, given.seed)
    elif given.verb == "export":
        export(given.work)
    else:
        train(
            given.work,
            given.hidden,
            given.layers,
            given.peak,
            given.tokens,
            given.max_seconds,
            given.threads,
            given.compile,
        )


if __name__ == "__main__":
    main()
