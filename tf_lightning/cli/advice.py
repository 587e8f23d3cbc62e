"""Turns jsonargparse's reports about a configuration into one sentence with the nearest right name.

A report is a tree: it lists the errors of every type that a key accepts, each with the errors of
its arguments. Only the innermost problem is shown, with the whole key and the value.
"""

import ast
import importlib
import inspect
import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from tf_lightning.cli.classes import GROUPS
from tf_lightning.cli.named_callbacks import NAMED

# Packages whose classes may be named without their path: in a message, not in a configuration.
KNOWN_MODULES = (
    *("lightning.pytorch.callbacks", "lightning.pytorch.loggers", "callbacks.prompts"),
    *("callbacks.published_prompts", "callbacks.metrics", "callbacks.geneval"),
)
KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping of names to values",
    "NoneType": "null",
}
# A class that a key may name.
EXAMPLES = {
    "model": "tf_lightning.Transfusion",
    "data": "tf_lightning.data.Mixture",
    "trainer.logger": "lightning.pytorch.loggers.CSVLogger",
    "trainer.callbacks": "lightning.pytorch.callbacks.EarlyStopping",
}
FILE_SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".md")
MAX_SHOWN = 60  # characters of a wrong value
# The innermost problem, the most telling kind first; {1} is a name.
NO_ATTRIBUTE = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'")
NO_MODULE = re.compile(r"No module named '([\w.]+)'")
UNKNOWN = re.compile(r"(?:Option '|does not accept option '|unrecognized arguments: ?)([^'\s]*)")
REQUIRED = re.compile(
    r"following arguments are required: ([\w, .-]+)|(?:Key|Option) \"?'?([\w.]+)['\"]? is required"
)
NO_CLASS = re.compile(r"(?:Expected a dot import path string|Unexpected import path format): (.*)")
OTHER_CLASS = re.compile(r"Import path ([\w.]+) does not correspond to a subclass of (\w+)")
NO_OBJECT = re.compile(r"Not a valid subclass of (\w+)\. Got value: (.*)")
NO_FILE = re.compile(r"Unable to load config ['\"](.*?)['\"]")
SUBTYPES = re.compile(r"Subtypes: \[(.*)\]")
SIMPLE = re.compile(r"Expected an? (.+?)\. Got value: (.*)")


class Problem(NamedTuple):
    """What a report of jsonargparse complains about.

    Attributes:
        key: such as trainer.precision, without init_args; "" if unknown.
        sentence: key, value, what it must be, and advice.
    """

    key: str
    sentence: str


def find_problem(report: str, options: Iterable[str]) -> Problem:
    """Find the innermost problem of a report.

    Args:
        report: the message of jsonargparse.
        options: names of the options that the command has, without dashes.
    """
    for pattern, describe in (
        (NO_ATTRIBUTE, no_attribute),
        (UNKNOWN, unknown_option),
        (NO_MODULE, no_module),
        (REQUIRED, required_options),
        (NO_FILE, no_file),
        (NO_CLASS, no_class),
        (OTHER_CLASS, other_class),
        (NO_OBJECT, no_object),
    ):
        if found := pattern.search(report):
            key, owner = whole_key(report, found.start()), owner_of(report, found.start())
            sentence = describe(found, key, owner, list(options), report)
            return Problem(named_option(sentence) or key, sentence)
    found = SUBTYPES.search(report)
    subtypes = [*SUBTYPES.finditer(report)]
    simple = SIMPLE.search(report)
    if simple and (not found or simple.start() > subtypes[-1].start()):
        key, value = whole_key(report, simple.start()), simple[2]
        expected = describe_types(simple[1])
    elif found:
        found = subtypes[-1] if len(subtypes) > 1 else found
        key = whole_key(report, found.start())
        value = (re.search(r"Given value: (.*)", report[found.start() :]) or ["", ""])[1]
        expected = describe_types(found[1])
    else:
        return Problem("", " ".join(report.replace('Parser key "config": ', "").split()))
    return Problem(key, f"{key}={shorten(value)} must be {expected}{nearest(value, report)}")


def named_option(sentence: str) -> str:
    """Return the option that a sentence begins with, without dashes; "" if it begins otherwise."""
    found = re.match(r"(?:there is no option )?--([\w.]+)", sentence)
    return found[1] if found else ""


def whole_key(report: str, end: int) -> str:
    """Join the keys that lead to a position of the report: model and lr to model.lr."""
    keys = []
    parents = r"Parser key \"([^\"]+)\":\s+(?:Problem with given class_path '([\w.]+)')?"
    for key, owner in re.findall(parents, report[:end]):
        keys += [key, *entries_of(report, key, owner)]
    # On the command line the outermost value names the whole path below the first key.
    nested = re.findall(r"Given value: NestedArg\(key='([^']+)'", report)
    if keys and nested:
        keys = [keys[0], nested[-1]]
    return ".".join(part for part in ".".join(keys).split(".") if part != "init_args")


def entries_of(report: str, key: str, owner: str) -> list[str]:
    """Return the entry of a mapping, such as of data.sources, that is of the class `owner`.

    A report leaves it out. It is known if the value that the report shows has one such entry.
    """
    begin = rf"(?:Namespace\(class_path=|{{'class_path': )'{re.escape(owner)}'"
    found = set(re.findall(rf"'([\w-]+)': {begin}", report)) - {key}
    return list(found) if owner and len(found) == 1 else []


def owner_of(report: str, end: int) -> str:
    """Return the class whose arguments the report is about at a position."""
    owners = re.findall(r"class_path '([\w.]+)'", report[:end])
    return owners[-1] if owners else ""


def no_attribute(found, key: str, owner: str, options: list[str], report: str) -> str:
    """Describe a class that its module does not have."""
    module, name = found.groups()
    near = close(name, [*dir(importlib.import_module(module)), *known_classes()])
    path = known_classes().get(near, f"{module}.{near}")
    advice = f"did you mean {path}?" if near else "check its spelling"
    return f"{key}: there is no class {name} in {module}; {advice}"


def no_module(found, key: str, owner: str, options: list[str], report: str) -> str:
    """Describe a class whose module cannot be imported."""
    if Path(owner).suffix in (".yaml", ".yml"):
        return f"{key}={owner}: there is no such file; check the path"
    if Path(owner).suffix in FILE_SUFFIXES:
        return f"{key}={owner} is a file, but must be a class; {give_class(key)}"
    near = close(owner.rpartition(".")[2], known_classes())
    if near:
        return f"{key}: there is no class {owner}; did you mean {known_classes()[near]}?"
    return (
        f"{key}: {owner or found[1]} cannot be imported because there is no module {found[1]}; "
        "install it, or start the command in the folder that holds it"
    )


def unknown_option(found, key: str, owner: str, options: list[str], report: str) -> str:
    """Describe an option that the command, or a class, does not have."""
    word = found[1]
    if not word:
        return "the command line has an empty word; leave it out"
    name = word.lstrip("-").partition("=")[0].replace(".init_args", "")
    if owner:
        prefix = key.removesuffix(name).rstrip(".")
        known = arguments_of(owner, name.rpartition(".")[0])
        # jsonargparse names the parent of a nested option in the key, or the option itself
        full = f"{prefix}.{name}" if prefix else name
        near = close(name.rpartition(".")[2], known)
        fixed = full.rpartition(".")[0] + f".{near}"
        advice = f"; did you mean --{fixed}?" if near else listing(known)
        return f"--{full} is not an option of {owner}{advice}"
    if not word.startswith("-") and Path(word).suffix in (".yaml", ".yml"):
        return f"{word} is an unexpected word; did you mean -c {word}?"
    if not word.startswith("-") and "unrecognized" in report:
        return f"{word} is an unexpected word; values follow an option, as in --model.lr 1e-3"
    roots = sorted({option.partition(".")[0] for option in options} - {"help", "print_config"})
    near = near_parent(name, roots) if "." in name and name.split(".")[0] not in roots else ""
    if near := near or close(name, options):
        return f"there is no option --{name}; did you mean --{near}?"
    return f"there is no option --{name}; options begin with {', '.join(roots)}"


def near_parent(name: str, roots: list[str]) -> str:
    """Correct the first part of an option, such as modl.lr."""
    first, _, rest = name.partition(".")
    near = close(first, roots)
    return f"{near}.{rest}" if near else ""


def required_options(found, key: str, owner: str, options: list[str], report: str) -> str:
    """Describe options without a default that are missing."""
    named = re.sub(r"\b(fit|validate|test|predict)\.", "", found[1] or found[2])
    prefix = f"--{key}." if key else "--"
    names = ", ".join(prefix + name.strip() for name in named.split(","))
    return f"{owner or 'the command'} needs {names}"


def no_file(found, key: str, owner: str, options: list[str], report: str) -> str:
    """Describe a value in place of a file of options."""
    return (
        f"--{key} {shorten(found[1])} is no file of options; give one of them, as in "
        f"--{key}.KEY VALUE"
    )


def no_class(found, key: str, owner: str, options: list[str], report: str) -> str:
    """Describe a word in place of a class, or of a file with its arguments."""
    word = found[1].strip()
    if Path(word).suffix in (".yaml", ".yml"):
        return f"{key}={word}: there is no such file; check the path"
    near = close(word, known_classes())
    if near:
        return f"{key}={shorten(word)} is not a class; did you mean {known_classes()[near]}?"
    return f"{key}={shorten(word)} is not a class; {give_class(key)}"


def other_class(found, key: str, owner: str, options: list[str], report: str) -> str:
    """Describe a class of another kind."""
    return f"{key}: {found[1]} is no {found[2]}; {give_class(key)}"


def no_object(found, key: str, owner: str, options: list[str], report: str) -> str:
    """Describe a value in place of a class with its arguments."""
    entries = re.findall(rf"'([\w-]+)': {re.escape(found[2])}[,}}]", report)
    key = ".".join([key, *entries[:1]]) if len(entries) == 1 else key
    return f"{key}={shorten(found[2])} is no {found[1]}; {give_class(key)}"


def give_class(key: str) -> str:
    """Advise how to give a class."""
    examples = EXAMPLES | {name: named.class_path for name, named in NAMED.items()}
    example = f", as in {examples[key]}" if key in examples else ""
    return f"give the path of a class{example}, or class_path and init_args in a file"


def known_classes() -> dict[str, str]:
    """Return the paths of our classes, and of Lightning's callbacks and loggers, by name."""
    others = {
        name: f"{path}.{name}"
        for path in KNOWN_MODULES
        for name, member in vars(importlib.import_module(path)).items()
        if inspect.isclass(member) and member.__module__.startswith(path)
    }
    return others | {path.rpartition(".")[2]: path for group in GROUPS.values() for path in group}


def arguments_of(owner: str, group: str = "") -> list[str]:
    """Return the names of the arguments of a class, or of a dataclass among its arguments."""
    module, _, name = owner.rpartition(".")
    try:
        parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
        for part in filter(None, group.split(".")):
            parameters = inspect.signature(parameters[part].annotation).parameters
    except (ImportError, AttributeError, KeyError, TypeError, ValueError):
        return []
    return [name for name in parameters if name not in ("self", "args", "kwargs")]


def close(word: str, known: Iterable[str]) -> str:
    """Return the nearest of the known words, or "" if none is near."""
    known = list(known)
    lower = {name.lower(): name for name in known}
    for candidates, wanted in ((known, word), (lower, word.lower())):
        if found := get_close_matches(wanted, candidates, n=1, cutoff=0.7):
            return lower.get(found[0].lower(), found[0])
    starts = [name for name in known if len(word) > 3 and name.lower().startswith(word.lower())]
    return starts[0] if len(starts) == 1 else ""


def listing(known: list[str]) -> str:
    """List the options of a class with few of them."""
    return f"; it has {', '.join(known)}" if 0 < len(known) <= 12 else ""


def describe_types(types: str) -> str:
    """Describe the types of a report: "<class 'int'>, typing.Literal['a']" to "a number or a"."""
    words = []
    for literal, kind, other in re.findall(
        r"Literal\[([^\]]*)\]|<class '([\w.]+)'>|(tuple with \d+ elements)|\w+\[[^,]*\]", types
    ):
        if literal:
            words += [str(choice) for choice in ast.literal_eval(f"[{literal}]")]
        elif kind:
            words.append(KINDS.get(kind) or with_article(kind.rpartition(".")[2]))
        elif other:
            words.append(f"a {other.replace('tuple', 'list')}")
    for kind in ("dict", "list", "tuple"):
        if f"{kind}[" in types.lower():
            words.insert(0, KINDS[kind])
    words = list(dict.fromkeys(words)) or [types]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def with_article(name: str) -> str:
    """Write "a Logger" or "an Evaluate"."""
    return f"an {name}" if name[0] in "AEIOU" else f"a {name}"


def nearest(value: str, report: str) -> str:
    """Advise the nearest of the words that a key accepts."""
    literals = ",".join(re.findall(r"Literal\[([^\]]*)\]", report))
    choices = [c for c in ast.literal_eval(f"[{literals}]") if isinstance(c, str)]
    near = close(value.strip("'\""), choices)
    return f"; did you mean {near}?" if near else ""


def shorten(value: str) -> str:
    """Cut a long value."""
    if nested := re.fullmatch(r"NestedArg\(key='[^']+', val=(.*)\)", value):
        value = nested[1]
    return value if len(value) <= MAX_SHOWN else value[: MAX_SHOWN - 3] + "..."
