"""Prompts that show one task and end in another's question, in several languages; those of a table.

An instruction line, two demonstrations, and an input that is itself an instruction: a model that goes by the context repeats
(or capitalises) the input, one that follows instructions answers it. Numerals are the same in all languages.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from unfused.data.tables import read_table

__all__ = [
    "VARIANTS",
    "Prompt",
    "begins_with",
    "built_in",
    "icl_prompts",
    "leetspeak",
    "nli_prompt",
    "pig_latin",
]


class Prompt(NamedTuple):
    """What is asked, and what an answer must begin with."""

    prompt: str
    answer: str


WORDS = {
    "en": (
        "Input",
        "Output",
        "Repeat the input.",
        "Write the input in capital letters.",
        "What is {} plus {}?",
    ),
    "fr": (
        "Entrée",
        "Sortie",
        "Répète l'entrée.",
        "Écris l'entrée en majuscules.",
        "Combien font {} plus {} ?",
    ),
    "es": (
        "Entrada",
        "Salida",
        "Repite la entrada.",
        "Escribe la entrada en mayúsculas.",
        "¿Cuánto es {} más {}?",
    ),
    "nl": (
        "Invoer",
        "Uitvoer",
        "Herhaal de invoer.",
        "Schrijf de invoer in hoofdletters.",
        "Hoeveel is {} plus {}?",
    ),
    "hu": (
        "Bemenet",
        "Kimenet",
        "Ismételd meg a bemenetet.",
        "Írd a bemenetet nagybetűkkel.",
        "Mennyi {} meg {}?",
    ),
}
"""Language -> labels of input and output, the two instructions, the sum."""
BLANKS = {
    "en": (
        "The capital of France is ____.",
        "A week has ____ days.",
        "The sun rises in the ____.",
        "Bees make ____.",
        "Snow is ____.",
        "A triangle has ____ sides.",
    ),
    "fr": (
        "La capitale de la France est ____.",
        "Une semaine a ____ jours.",
        "Le soleil se lève à l'____.",
        "Les abeilles font du ____.",
        "La neige est ____.",
        "Un triangle a ____ côtés.",
    ),
    "es": (
        "La capital de Francia es ____.",
        "Una semana tiene ____ días.",
        "El sol sale por el ____.",
        "Las abejas hacen ____.",
        "La nieve es ____.",
        "Un triángulo tiene ____ lados.",
    ),
    "nl": (
        "De hoofdstad van Frankrijk is ____.",
        "Een week heeft ____ dagen.",
        "De zon komt op in het ____.",
        "Bijen maken ____.",
        "Sneeuw is ____.",
        "Een driehoek heeft ____ zijden.",
    ),
    "hu": (
        "Franciaország fővárosa ____.",
        "Egy hét ____ napból áll.",
        "A nap ____ kel.",
        "A méhek ____ készítenek.",
        "A hó ____.",
        "Egy háromszögnek ____ oldala van.",
    ),
}
"""Sentences with a blank, in the same order in every language."""
NLI = {
    "en": "{}, question: {} True, False or Neither?",
    "fr": "{}, question : {} Vrai, faux ou ni l'un ni l'autre ?",
    "es": "{}, pregunta: {} ¿Verdadero, falso o ninguno?",
    "de": "{}, Frage: {} Wahr, falsch oder keines von beiden?",
}
NLI_ANSWERS = {
    "en": ("True", "Neither", "False"),
    "fr": ("Vrai", "Ni", "Faux"),
    "es": ("Verdadero", "Ninguno", "Falso"),
    "de": ("Wahr", "Keines", "Falsch"),
}
"""Of entailment, neutral, contradiction: XNLI's labels 0, 1, 2."""
VARIANTS = ("fr", "es", "nl", "hu", "leetspeak", "pig-latin")
LEET = str.maketrans("aeiostAEIOST", "431057431057")


def leetspeak(text: str) -> str:
    """Letters as digits that look like them; it breaks tokens, a stress case.

    Examples
    --------
    >>> leetspeak("What is 4 plus 17?")
    'Wh47 15 4 plu5 17?'
    """
    return text.translate(LEET)


def pig_latin(text: str) -> str:
    """First consonants to the end of each word, then "ay"; a stress case.

    Examples
    --------
    >>> pig_latin("Repeat the input.")
    'Epeatray ethay inputway.'
    """

    def word(match: re.Match[str]) -> str:
        found = match.group()
        head = re.match(r"(?i)(qu|[^aeiouy]|y(?=[aeiou]))*", found).group()  # type: ignore[union-attr]
        moved = found[len(head) :] + head.lower() + "ay" if head else found + "way"
        return moved.capitalize() if found[0].isupper() else moved

    return re.sub(r"[^\W\d_]+", word, text)


STRESS = {"leetspeak": leetspeak, "pig-latin": pig_latin}


def icl_prompts(
    language: str, task: str, content: str, count: int, demonstrations: int = 2, seed: int = 0
) -> list[Prompt]:
    """Prompts of one kind; the same seed gives the same contents in every language.

    Parameters
    ----------
    language : {"en", "fr", "es", "nl", "hu", "leetspeak", "pig-latin"}
    task : {"repeat", "capitalise"}
        What the context asks for.
    content : {"sum", "blank"}
        What the inputs are.
    count : int
    demonstrations : int, default=2
    seed : int, default=0

    Examples
    --------
    >>> print(icl_prompts("nl", "capitalise", "sum", 1)[0].answer)
    HOEVEEL IS 76 PLUS 58?
    """
    if language not in (*WORDS, *STRESS):
        raise ValueError(f"language={language!r}: choose one of {', '.join((*WORDS, *STRESS))}")
    if task not in ("repeat", "capitalise") or content not in ("sum", "blank"):
        raise ValueError(f"task={task!r}, content={content!r}: repeat or capitalise, and sum or blank")
    rng = np.random.default_rng([seed, task == "repeat", content == "sum"])
    base = "en" if language in STRESS else language
    spelled = STRESS.get(language, str)
    given, said, repeat, capitalise, question = map(spelled, WORDS[base])
    found = []
    for _ in range(count):
        if content == "sum":
            numbers = rng.integers(1, 100, (demonstrations + 1, 2))
            items = [question.format(*pair) for pair in numbers]
        else:
            chosen = rng.permutation(len(BLANKS[base]))[: demonstrations + 1]
            items = [spelled(BLANKS[base][i]) for i in chosen]
        wanted = [item if task == "repeat" else item.upper() for item in items]
        lines = [repeat if task == "repeat" else capitalise, ""]
        for item, answer in zip(items[:-1], wanted[:-1], strict=True):
            lines += [f"{given}: {item}", f"{said}: {answer}", ""]
        lines += [f"{given}: {items[-1]}", f"{said}:"]
        found.append(Prompt("\n".join(lines), wanted[-1]))
    return found


def nli_prompt(premise: str, hypothesis: str, label: int, language: str = "en") -> Prompt:
    """Inference as a question; labels 0 entailment, 1 neutral, 2 contradiction, as in XNLI.

    Examples
    --------
    >>> nli_prompt("It rains", "It is wet.", 0, "de")
    Prompt(prompt='It rains, Frage: It is wet. Wahr, falsch oder keines von beiden?', answer='Wahr')
    """
    if language not in NLI or label not in (0, 1, 2):
        raise ValueError(f"language={language!r}, label={label!r}: one of {', '.join(NLI)}, and 0, 1 or 2")
    return Prompt(NLI[language].format(premise, hypothesis), NLI_ANSWERS[language][label])


def begins_with(answer: str, gold: str) -> bool:
    """Whether a greedy continuation begins with the gold answer, blanks before it or not.

    A continuation that was cut short by its number of tokens counts where it is a beginning of the gold of half its length.
    """
    answer, gold = answer.strip(), gold.strip()
    return answer.startswith(gold) or (2 * len(answer) >= len(gold) > 0 and gold.startswith(answer))


def built_in(
    names: Sequence[str], count: int, seed: int
) -> tuple[list[Prompt], list[str], dict[str, list[Prompt]]]:
    """English prompts of the four kinds, their kinds, and the same in other languages."""
    if count < 1:
        raise ValueError(f"count={count}: at least 1")
    kinds = [(task, content) for task in ("repeat", "capitalise") for content in ("sum", "blank")]

    def all_of(language: str) -> list[Prompt]:
        return [p for task, content in kinds for p in icl_prompts(language, task, content, count, seed=seed)]

    labels = [f"{task} a {content}" for task, content in kinds for _ in range(count)]
    return all_of("en"), labels, {name: all_of(name) for name in names}


def read_prompts(path: Any) -> tuple[list[Prompt], list[str], dict[str, list[Prompt]]]:
    """Prompts of a table with columns prompt, answer, group (optional) and prompt:NAME, answer:NAME for each transform."""
    table = read_table(path)
    columns = {name: [row[i] or "" for row in table.rows] for i, name in enumerate(table.columns)}
    names = [c.partition(":")[2] for c in columns if c.startswith("prompt:")]
    lacking = [c for c in ("prompt", "answer", *(f"answer:{n}" for n in names)) if c not in columns]
    if lacking or not names:
        raise ValueError(f"prompts={str(path)!r} lacks the column {(lacking or ['prompt:NAME'])[0]!r}")

    def pairs(suffix: str) -> list[Prompt]:
        return [Prompt(*p) for p in zip(columns["prompt" + suffix], columns["answer" + suffix], strict=True)]

    labels = columns.get("group", ["all"] * len(table.rows))
    return pairs(""), list(labels), {name: pairs(f":{name}") for name in names}
