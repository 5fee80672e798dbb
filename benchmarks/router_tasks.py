"""Five small tasks of real text for routing: the demo's two, and three made from data that installed packages carry.

territory   Babel's tables of Unicode's CLDR: what is a country called in another language?
service     botocore's descriptions of operations: which service of AWS has this operation?
docstring   the functions of Python's standard library and their docstrings: what does this function do?

They were found by looking for text with answers among the packages that the project's extras install anyway. Each has
one fixed instruction, as the demo's tasks have; `reworded` asks the same in three other ways that no router has seen.
"""

import ast
import hashlib
import json
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

DEMO = Path(__file__).parent.parent / "recipes" / "data"
LIMIT = 1200  # examples a task
SERVICES = ("s3", "ec2", "lambda", "dynamodb", "sqs", "sns", "iam", "rds", "ecs", "kms", "glue", "athena")
LANGUAGES = ("de", "fr", "es", "it", "pl", "nl", "sv", "pt")
ASKED = {
    "sentiment": "Is the sentiment of this text positive or negative? Answer with one word.\n\n{}",
    "origin": "Where is this text from: movie review, product review, news editorial or tweet? "
    "Answer with one of these.\n\n{}",
    "territory": "What is the country or territory {} called in {}?",
    "service": "Which service of AWS has the operation that is described here? Answer with its name.\n\n{}",
    "docstring": "What does this Python function do? Answer in one line.\n\n{}",
}
REWORDED = {
    "sentiment": (
        "Does the author like this film? Reply with positive or negative.\n\n{}",
        "Classify as positive or negative:\n{}",
        "positive or negative?\n\n{}",
    ),
    "origin": (
        "Which of these does the text below come from, a film critique, product review, editorial or tweet?\n\n{}",
        "Guess the source of this snippet (movie review, product review, news editorial, tweet):\n{}",
        "source? tweet / movie review / product review / news editorial\n\n{}",
    ),
    "territory": (
        "How do you say {} in {}?",
        "{}: name of the country in {}?",
        "Translate the name of the country {} into {}.",
    ),
    "service": (
        "Name the AWS service of this API call:\n\n{}",
        "AWS service?\n{}",
        "To which Amazon web service does this belong?\n\n{}",
    ),
    "docstring": (
        "Explain briefly what the following code does.\n\n{}",
        "Summarise this function:\n{}",
        "One-line docstring please\n\n{}",
    ),
}
# what people ask that is none of the tasks
OTHER = (
    "Hello, how are you?", "Write a poem about autumn.", "What is 17 times 23?", "Give me a recipe for pancakes.",
    "Who was the first person on the moon?", "Translate 'good morning' into French.", "Summarise the plot of Hamlet.",
    "How do I fix a flat bicycle tyre?", "Tell me a joke about cats.", "What's the weather like in Paris in May?",
    "Plan a three day trip to Rome.", "Explain quantum entanglement to a child.", "I feel sad today.",
    "Write an email to my boss asking for a day off.", "What are the side effects of aspirin?", "thanks", "ok",
    "Recommend three books about the Roman empire.", "How many legs does a spider have?", "Why is the sky blue?",
    "Write a SQL query that lists all customers without orders.", "What is the best way to learn the guitar?",
    "Continue the story: Once upon a time there was a dragon", "Convert 12 miles to kilometres",
    "Draft a cover letter for a nurse.", "Compare Python and Rust.", "Who won the world cup in 1998?",
    "Can you help me with my homework?", "Give me five names for a coffee shop.", "What does 'ephemeral' mean?",
)  # fmt: skip
Example = tuple[tuple[str, ...], str]  # what the instruction is about, and the answer


def write_tasks(folder: Path) -> dict[str, list[Path]]:
    """Name -> train and test file of each task, as chats in JSON lines. A task whose package is missing is left out."""
    files = {task: [DEMO / f"{task}.train.jsonl", DEMO / f"{task}.test.jsonl"] for task in ("sentiment", "origin")}
    for task, examples in (("territory", territories), ("service", services), ("docstring", docstrings)):
        found = sorted(set(examples()), key=lambda example: hashlib.sha256(repr(example).encode()).hexdigest())[:LIMIT]
        if not found:
            continue
        tests = len(found) // 5
        files[task] = [folder / f"{task}.train.jsonl", folder / f"{task}.test.jsonl"]
        for path, part in zip(files[task], (found[tests:], found[:tests]), strict=True):
            with open(path, "w", encoding="utf-8") as file:
                for subject, answer in part:
                    chat = [("user", ASKED[task].format(*subject)), ("assistant", answer)]
                    messages = [{"role": role, "content": text} for role, text in chat]
                    file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return files


def reworded(task: str, prompt: str) -> list[str]:
    """The same question as `prompt` in other words."""
    pattern = re.escape(ASKED[task]).replace(r"\{\}", "(.*)")
    match = re.fullmatch(pattern, prompt, re.DOTALL)
    assert match is not None, prompt
    return [words.format(*match.groups()) for words in REWORDED[task]]


def territories() -> Iterator[Example]:
    try:
        from babel import Locale
    except ImportError:
        return
    english = Locale("en")
    for language in LANGUAGES:
        names = Locale(language).territories
        for code, name in english.territories.items():
            if len(code) == 2 and code in names:
                yield (name, english.languages[language]), names[code]


def services() -> Iterator[Example]:
    try:
        import botocore.session
    except ImportError:
        return
    session = botocore.session.get_session()
    for name in SERVICES:
        service = session.get_service_model(name)
        for operation in service.operation_names[:120]:
            said = re.sub(r"<[^>]+>", " ", service.operation_model(operation).documentation)
            first = re.sub(r"\s+", " ", said).strip().partition(". ")[0]
            if 20 < len(first) < 300:
                yield (first,), name


def docstrings() -> Iterator[Example]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.glob("*.py")):
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (said := ast.get_docstring(node)) and len(node.body) > 1:
                node.body = node.body[1:]
                source = ast.unparse(node)
                if 60 < len(source) < 1500:
                    yield (source,), said.partition("\n")[0]
