"""Generate the text that the reference model is trained and tested on, from word lists and a seed.

There are five tasks. Each is a list of `Span`s (text, loss weight), so that training can weigh predictable text and
random text differently:

- `copying`: a random sequence of words, repeated, from which induction is learnt;
- `pairs`: "brave-lamp 48213" lines and questions about them;
- `lines`: LongChat's line retrieval (Li et al. 2023), its wording kept;
- `topics`: LongChat's topic retrieval, a conversation over several topics and a question about the first;
- `stories`: ordinary sentences that state facts, and questions about the facts.

Documents of different seeds share no random state, so a test on seeds that training did not use is held out.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from eval.reference.words import ADJECTIVES, JOBS, NAMES, NOUNS, PLACES, TOPIC_FIELDS, VERBS

RANDOM_WEIGHT = 0.0
"""Loss weight of unpredictable text: names of lines and the first occurrence of their numbers."""
TEXT_WEIGHT = 0.2
"""Loss weight of ordinary, predictable text."""
ANSWER_WEIGHT = 1.0
"""Loss weight of the words of an answer."""
SCORED_WEIGHT = 4.0
"""Loss weight of scored text, which needs retrieval; the rest of an answer follows by copying."""

LINES_HEADER = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
    "'<REGISTER_CONTENT>' at the end of the line as a numerical value. Now the record start:\n\n"
)
TOPICS_HEADER = (
    "Below is a record of our previous conversation on several topics. You are the ASSISTANT, and I am the USER. "
    "At the end of the record, I will ask you to retrieve the first topic. Now the record start.\n"
)


@dataclass(frozen=True)
class Span:
    text: str
    weight: float


@dataclass(frozen=True)
class Question:
    """A question: `prompt` follows the context, `completion` is right after it, `answer` is its scored part."""

    prompt: str
    completion: str
    answer: str


@dataclass(frozen=True)
class Document:
    """A context and questions about it."""

    task: str
    context: list[Span]
    questions: list[Question]

    @property
    def text(self) -> str:
        return "".join(span.text for span in self.context)

    def spans(self) -> list[Span]:
        """Return the context followed by every question and its answer, for training."""
        spans = list(self.context)
        for question in self.questions:
            first = question.completion.rindex(question.answer)
            spans += [
                Span(question.prompt, RANDOM_WEIGHT),
                Span(question.completion[:first], ANSWER_WEIGHT),
                Span(question.answer, SCORED_WEIGHT),
                Span(question.completion[first + len(question.answer) :], ANSWER_WEIGHT),
            ]
        return spans


def line_names(rng: random.Random, count: int) -> list[str]:
    """Return `count` distinct "adjective-noun" names; nouns repeat only after all have been used."""
    names: list[str] = []
    while len(names) < count:
        part = min(count - len(names), len(NOUNS))
        nouns, adjectives = rng.sample(NOUNS, part), rng.choices(ADJECTIVES, k=part)
        names += [f"{a}-{n}" for a, n in zip(adjectives, nouns, strict=True)]
        names = list(dict.fromkeys(names))
    return names


def number(rng: random.Random) -> str:
    return str(rng.randint(10000, 99999))


def copying(rng: random.Random, words: int = 40) -> Document:
    sequence = "".join(" " + rng.choice((*ADJECTIVES, *NOUNS, *VERBS, *"0123456789")) for _ in range(words))
    context = [Span(sequence, RANDOM_WEIGHT)]
    return Document("copying", context, [Question("\n", sequence, sequence)])


def pairs(rng: random.Random, lines: int, questions: int) -> Document:
    """Generate lines in one of four forms, from the simplest (name, space, value) to the full one."""
    before, after = rng.choice(((" ", ""), (": ", ""), (" is <", ">"), (": REGISTER_CONTENT is <", ">")))
    names = rng.sample(NOUNS, lines) if rng.random() < 0.3 else line_names(rng, lines)
    digits = rng.random() < 0.5
    record = {name: number(rng) if digits else rng.choice((*VERBS, *PLACES, *JOBS)) for name in names}
    context = [Span(f"{name}{before}{value}{after}\n", RANDOM_WEIGHT) for name, value in record.items()]
    asked = []
    for name in rng.choices(names, k=questions):
        space = "" if after else " "  # a token begins with its space
        asked.append(Question(name + before.rstrip(" "), f"{space}{record[name]}{after}\n", record[name]))
    return Document("pairs", context, asked)


def distinct_numbers(rng: random.Random, count: int) -> list[str]:
    """Return numbers that differ in their first three digits, which are one token, up to 900 of them."""
    heads = rng.sample(range(100, 1000), min(count, 900)) + rng.choices(range(100, 1000), k=max(0, count - 900))
    return [f"{head}{rng.randint(0, 99):02}" for head in heads]


def lines(rng: random.Random, lines: int, questions: int, distinct: bool = False) -> Document:
    """Generate line retrieval.

    With `distinct` no two numbers share a first token, so copying a number needs only the right line.
    """
    names = line_names(rng, lines)
    numbers = distinct_numbers(rng, lines) if distinct else [number(rng) for _ in names]
    record = dict(zip(names, numbers, strict=True))
    context = [Span(LINES_HEADER, RANDOM_WEIGHT)]
    for name, value in record.items():
        context += [
            Span(f"line {name}", RANDOM_WEIGHT),
            Span(": REGISTER_CONTENT is <", TEXT_WEIGHT),
            Span(value, RANDOM_WEIGHT),
            Span(">\n", TEXT_WEIGHT),
        ]
    asked = rng.choices(list(record), k=questions)
    return Document("lines", context, [line_question(name, record[name]) for name in asked])


def line_question(name: str, value: str) -> Question:
    return Question(
        f"Tell me what is the REGISTER_CONTENT in line {name}?\n",
        f"line {name}: REGISTER_CONTENT is <{value}>\n",
        value,
    )


def topics(rng: random.Random, count: int, turns: int = 2) -> Document:
    chosen = [
        f"the {f} of {a} {n}s"
        for f, a, n in zip(
            rng.sample(TOPIC_FIELDS, count), rng.choices(ADJECTIVES, k=count), rng.sample(NOUNS, count), strict=True
        )
    ]
    context = [Span(TOPICS_HEADER, TEXT_WEIGHT)]
    for topic in chosen:
        context += [
            Span("USER: I would like to discuss the topic of ", TEXT_WEIGHT),
            Span(topic, RANDOM_WEIGHT),
            Span(".\nASSISTANT: Sure, what about ", TEXT_WEIGHT),
            Span(f"{topic}?\n", ANSWER_WEIGHT),
        ]
        for _ in range(turns):
            context += [Span(f"USER: {sentence(rng)}\nASSISTANT: {sentence(rng)}\n", TEXT_WEIGHT)]
    ordinals = ("first", "second", "third")[:count]
    asked = [(o, chosen[i]) for i, o in enumerate(ordinals)]
    rng.shuffle(asked)
    return Document(
        "topics",
        context,
        [Question(f"What is the {o} topic we discussed?\n", f"The topic is {t}.\n", t) for o, t in asked],
    )


def sentence(rng: random.Random) -> str:
    """Return one ordinary sentence."""
    a, b = rng.sample(NAMES, 2)
    adjective, other = rng.sample(ADJECTIVES, 2)
    noun, thing = rng.sample(NOUNS, 2)
    verb, again = rng.sample(VERBS, 2)
    place = rng.choice(PLACES)
    return rng.choice(
        (
            f"The {adjective} {noun} {verb} the {other} {thing} near the {place}.",
            f"{a} {verb} a {noun} because {b} {again} the {thing}.",
            f"When the {noun} was {adjective}, {a} went to the {place} with {b}.",
            f"In the {place} there is a {adjective} {noun} and a {other} {thing}.",
            f"I think that {a} {verb} the {thing}, but it was not {adjective}.",
            f"Every morning {a} {verb} the {noun} before the {thing} came to the {place}.",
            f"It was {adjective} in the {place}, so {a} {verb} the {noun} and {again} the {thing}.",
            f"{a} said to {b} that the {noun} of the {place} is more {adjective} than the {thing}.",
        )
    )


def stories(rng: random.Random, people: int, questions: int, filler: int = 2) -> Document:
    """Generate facts about people (home, job, possession) among ordinary sentences."""
    names = rng.sample(NAMES, people)
    facts: list[tuple[Question, str]] = []
    for name, place, thing in zip(names, rng.sample(PLACES, people), rng.sample(NOUNS, people), strict=True):
        job, adjective = rng.choice(JOBS), rng.choice(ADJECTIVES)
        facts += [
            (
                Question(f"Question: Where does {name} live?\n", f"Answer: {name} lives in the {place}.\n", place),
                f"{name} lives in the {place}.",
            ),
            (
                Question(f"Question: What does {name} do?\n", f"Answer: {name} works as a {job}.\n", job),
                f"{name} works as a {job}.",
            ),
            (
                Question(
                    f"Question: What does {name} keep?\n",
                    f"Answer: {name} keeps a {adjective} {thing}.\n",
                    f"{adjective} {thing}",
                ),
                f"{name} keeps a {adjective} {thing}.",
            ),
        ]
    context: list[Span] = []
    for _, fact in rng.sample(facts, len(facts)):
        part = [fact] + [sentence(rng) for _ in range(rng.randint(0, filler))]
        rng.shuffle(part)
        context.append(Span(" ".join(part) + "\n", TEXT_WEIGHT))
    return Document("stories", context, [q for q, _ in rng.choices(facts, k=questions)])


def prose(rng: random.Random, sentences: int) -> Document:
    return Document("prose", [Span(" ".join(sentence(rng) for _ in range(sentences)) + "\n", TEXT_WEIGHT)], [])
