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

from jsonargparse import ArgumentParser

from tf_lightning.checkpoint import RENAMED_FIELDS, RENAMED_STATES
from tf_lightning.cli.classes import GROUPS
from tf_lightning.cli.named_callbacks import NAMED
from tf_lightning.training.precision import PRECISIONS

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
PRECISION_NAMES = {  # of other programs
    **dict.fromkeys(("fp16", "float16", "half"), "16-mixed"),
    **dict.fromkeys(("fp32", "float32", "float"), "32-true"),
    **dict.fromkeys(("bfloat16", "bfloat", "amp"), "bf16-mixed"),
}
# Classes whose options may be typed without the first part of their names.
FLAT = {"trainer": "lightning.pytorch.Trainer"} | {key: EXAMPLES[key] for key in ("model", "data")}
# Options and parts of class paths of older versions: their present names.
RENAMED = {
    **RENAMED_FIELDS["transformer"],
    **RENAMED_FIELDS["linear"],
    **RENAMED_STATES,
    "in_place": "lazy_images",
    **dict.fromkeys(("mirror", "flip"), "hflip"),
    "time_shift": "timestep_shift",
    "time_distribution": "timestep_distribution",
    "measures": "metrics",
    "draw": "generate_images",
    "write": "caption_images",
    "answer": "output_modality",
    "num_pictures": "num_images",
    "autoencoder_module": "training.autoencoder",
    "shapes_sources": "tf_lightning.shapes.sources",
    "start_from": "init_from",
    "StartFrom": "InitFrom",
    "recall": "retrieval",
    "Recall": "RetrievalAccuracy",
    "PictureScores": "ImageQuality",
    "PromptFit": "CLIPScore",
    "benchmarks": "published_prompts",
    "KLAutoencoder": "LatentAutoencoder",
}
FILE_SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".md")
MAX_SHOWN = 60  # characters of a wrong value
# The innermost problem, the most telling kind first; {1} is a name.
NO_ATTRIBUTE = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'")
NO_MODULE = re.compile(r"No module named '([\w.]+)'")
UNKNOWN = re.compile(r"(?:Option '|does not accept option '|unrecognized arguments: ?)([^'\s]*)")
AMBIGUOUS = re.compile(r"ambiguous option: --([\w.]+)\S* could match ([^\n]*)")
REQUIRED = re.compile(
    r"following arguments are required: ([\w, .-]+)|(?:Key|Option) \"?'?([\w.]+)['\"]? is required"
)
NO_CLASS = re.compile(r"(?:Expected a dot import path string|Unexpected import path format): (.*)")
OTHER_CLASS = re.compile(r"Import path ([\w.]+) does not correspond to a subclass of (\w+)")
NO_OBJECT = re.compile(r"Not a valid subclass of (\w+)\. Got value: (.*)")
ABSTRACT = re.compile(r"Expected an instantiatable class, but ([\w.]+) is abstract")
SPACE = re.compile(r'Spaces not allowed in keys: "(.*)"')
NO_FILE = re.compile(r"Unable to load config ['\"](.*?)['\"]")
SUBTYPES = re.compile(r"Subtypes: \[(.*)\]")
SIMPLE = re.compile(r"Expected an? (.+?)\. Got value: (.*)")


class Problem(NamedTuple):
    """A mistake that jsonargparse reports.

    Attributes:
        key: such as trainer.precision, without init_args; "" if unknown.
        sentence: key, value, what it must be, and advice.
    """

    key: str
    sentence: str


class Finding(NamedTuple):
    """The place in a report that describes a problem.

    Attributes:
        match: the match of the problem's pattern.
        key: as in `Problem`.
        owner: path of the class whose arguments the report is about there, or "".
        options: names of the options that the command has, without dashes.
        report: the whole report.
    """

    match: re.Match
    key: str
    owner: str
    options: list[str]
    report: str


def find_problem(report: str, options: Iterable[str]) -> Problem:
    """Find the innermost problem of a report.

    Args:
        report: the message of jsonargparse.
        options: names of the options that the command has, without dashes.
    """
    for pattern, describe in (
        (NO_ATTRIBUTE, no_attribute),
        (AMBIGUOUS, ambiguous_option),
        (UNKNOWN, unknown_option),
        (NO_MODULE, no_module),
        (REQUIRED, required_options),
        (NO_FILE, no_file),
        (NO_CLASS, no_class),
        (OTHER_CLASS, other_class),
        (NO_OBJECT, no_object),
        (ABSTRACT, abstract_class),
        (SPACE, key_with_space),
    ):
        if found := pattern.search(report):
            key, owner = whole_key(report, found.start()), owner_of(report, found.start())
            sentence = describe(Finding(found, key, owner, list(options), report))
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
    advice = advise_choice(value, report)
    if key == "trainer.precision":  # Lightning has more, which `check_precision` refuses
        expected = ", ".join(PRECISIONS)
        near = PRECISION_NAMES.get(value) or nearest_name(value, PRECISIONS)
        advice = f"; did you mean {near}?" if near else ""
    return Problem(key, f"{key}={shorten(value)} must be {expected}{advice}")


def renamed(sentence: str) -> str:
    """Return sentences with the new names of renamed keys and classes; "" if there are none.

    Args:
        sentence: what is wrong; "did you mean" and what follows is advice.
    """
    named = re.findall(r"[\w.]*\.[\w.]+", sentence.partition("did you mean")[0])
    words = dict.fromkeys(word for name in named for word in name.split(".") if word in RENAMED)
    return "".join(f" {word} is called {RENAMED[word]} now." for word in words)


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
    """Return the entry of a mapping, such as data.sources, whose class is `owner`.

    A report leaves it out. It is known if the value that the report shows has one such entry.
    """
    begin = rf"(?:Namespace\(class_path=|{{'class_path': )'{re.escape(owner)}'"
    found = set(re.findall(rf"'([\w-]+)': {begin}", report)) - {key}
    return list(found) if owner and len(found) == 1 else []


def owner_of(report: str, end: int) -> str:
    """Return the class whose arguments the report is about at a position."""
    owners = re.findall(r"class_path '([\w.]+)'", report[:end])
    return owners[-1] if owners else ""


def no_attribute(at: Finding) -> str:
    """Describe a class that its module does not have."""
    module, name = at.match.groups()
    near = nearest_name(name, [*dir(importlib.import_module(module)), *known_classes()])
    path = known_classes().get(near, f"{module}.{near}")
    advice = f"did you mean {path}?" if near else "check its spelling"
    return f"{at.key}: there is no class {name} in {module}; {advice}"


def no_module(at: Finding) -> str:
    """Describe a class whose module cannot be imported."""
    if Path(at.owner).suffix in (".yaml", ".yml"):
        return f"{at.key}={at.owner}: there is no such file; check the path"
    if Path(at.owner).suffix in FILE_SUFFIXES:
        return f"{at.key}={at.owner} is a file, but must be a class; {give_class(at.key)}"
    near = nearest_name(at.owner.rpartition(".")[2], known_classes())
    if near:
        return f"{at.key}: there is no class {at.owner}; did you mean {known_classes()[near]}?"
    return (
        f"{at.key}: {at.owner or at.match[1]} cannot be imported because there is no module "
        f"{at.match[1]}; install it, or start the command in the folder that holds it"
    )


def unknown_option(at: Finding) -> str:
    """Describe an option that the command, or a class, does not have."""
    word = at.match[1]
    if not word:
        return "the command line has an empty word; leave it out"
    dashes = re.match(r"---+|[–—]-?", word)
    if dashes:
        return f"{word} does not begin with two dashes; write --{word[dashes.end() :]}"
    name = word.lstrip("-").partition("=")[0].replace(".init_args", "")
    if at.owner:
        prefix = at.key.removesuffix(name).rstrip(".")
        known = arguments_of(at.owner, name.rpartition(".")[0])
        # jsonargparse names the parent of a nested option in the key, or the option itself
        full = f"{prefix}.{name}" if prefix else name
        near = nearest_name(name.rpartition(".")[2], known)
        fixed = full.rpartition(".")[0] + f".{near}"
        advice = f"; did you mean --{fixed}?" if near else listing(known)
        return f"--{full} is not an option of {at.owner}{advice}"
    if not word.startswith("-") and Path(word).suffix in (".yaml", ".yml"):
        return f"{word} is an unexpected word; did you mean -c {word}?"
    if not word.startswith("-") and (Path(word).suffix == ".ckpt" or Path(word).is_dir()):
        return f"{word} is an unexpected word; did you mean --ckpt_path {word}?"
    if not word.startswith("-") and "unrecognized" in at.report:
        return f"{word} is an unexpected word; values follow an option, as in --model.lr 1e-3"
    roots = sorted({option.partition(".")[0] for option in at.options} - {"help", "print_config"})
    near = near_parent(name, roots) if "." in name and name.split(".")[0] not in roots else ""
    near = near or nearest_name(name, at.options) or without_group(name)
    if near:
        return f"there is no option --{name}; did you mean --{near}?"
    return f"there is no option --{name}; options begin with {', '.join(roots)}"


def without_group(name: str) -> str:
    """Complete an option that was typed without its first part, such as lr for model.lr."""
    first = name.replace("-", "_").partition(".")[0]
    groups = (group for group, owner in FLAT.items() if first in arguments_of(owner))
    return next((f"{group}.{name.replace('-', '_')}" for group in groups), "")


def ambiguous_option(at: Finding) -> str:
    """Describe an abbreviated option that matches several."""
    name = at.match[1]
    prefix = at.key.removesuffix(name)
    full = [option.strip().removeprefix("--") for option in at.match[2].split(",")]
    full = [option for option in full if option.count(".") == name.count(".")]
    shown = ", ".join(f"--{prefix}{option}" for option in full)
    return f"--{prefix}{name} is the beginning of several options; write one of {shown}"


def near_parent(name: str, roots: list[str]) -> str:
    """Correct the first part of an option, such as modl.lr."""
    first, _, rest = name.partition(".")
    near = nearest_name(first, roots)
    return f"{near}.{rest}" if near else ""


def required_options(at: Finding) -> str:
    """Describe options without a default that are missing."""
    named = re.sub(r"\b(fit|validate|test|predict)\.", "", at.match[1] or at.match[2])
    prefix = f"--{at.key}." if at.key else "--"
    names = ", ".join(prefix + name.strip() for name in named.split(","))
    return f"{at.owner or 'the command'} needs {names}"


def no_file(at: Finding) -> str:
    """Describe a value in place of a file of options."""
    return (
        f"--{at.key} {shorten(at.match[1])} is not a file of options; give one of them, as in "
        f"--{at.key}.KEY VALUE"
    )


def no_class(at: Finding) -> str:
    """Describe a word in place of a class, or of a file with its arguments."""
    word = at.match[1].strip()
    if Path(word).suffix in (".yaml", ".yml"):
        return f"{at.key}={word}: there is no such file; check the path"
    near = nearest_name(word, known_classes())
    if near:
        return f"{at.key}={shorten(word)} is not a class; did you mean {known_classes()[near]}?"
    return f"{at.key}={shorten(word)} is not a class; {give_class(at.key)}"


def other_class(at: Finding) -> str:
    """Describe a class of another kind."""
    return f"{at.key}: {at.match[1]} is no {at.match[2]}; {give_class(at.key)}"


def no_object(at: Finding) -> str:
    """Describe a value in place of a class with its arguments."""
    if at.match[2].startswith("{'init_args."):
        return abstract_class(at)
    entries = re.findall(rf"'([\w-]+)': {re.escape(at.match[2])}[,}}]", at.report)
    key = f"{at.key}.{entries[0]}" if len(entries) == 1 else at.key
    return f"{key}={shorten(at.match[2])} is no {at.match[1]}; {give_class(at.key)}"


def abstract_class(at: Finding) -> str:
    """Describe an option of an entry that has no class, such as a source that is not there."""
    parent = at.key.rpartition(".")[0]
    return f"--{at.key}: there is no {parent}; check its name, or give {parent}.class_path"


def key_with_space(at: Finding) -> str:
    """Describe a key with a space."""
    return f"{at.key}: the key {at.match[1]!r} has a space; remove it"


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
        found = getattr(importlib.import_module(module), name)
        parameters = inspect.signature(found).parameters
        if not group and any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return ArgumentParser().add_class_arguments(found, fail_untyped=False)
        for part in filter(None, group.split(".")):
            parameters = inspect.signature(parameters[part].annotation).parameters
    except (ImportError, AttributeError, KeyError, TypeError, ValueError):
        return []
    return [name for name in parameters if name not in ("self", "args", "kwargs")]


def nearest_name(word: str, known: Iterable[str]) -> str:
    """Return the nearest of the known words, or "" if none is near."""
    known = list(known)
    lower = {name.lower(): name for name in known}
    for candidates, wanted in ((known, word), (lower, word.lower())):
        if found := get_close_matches(wanted, candidates, n=1, cutoff=0.7):
            return lower.get(found[0].lower(), found[0])
    starts = [name for name in known if len(word) > 3 and name.lower().startswith(word.lower())]
    return starts[0] if len(starts) == 1 else ""


def listing(known: list[str]) -> str:
    """Return "; it has A, B, C" for a class with few options, or ""."""
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


def advise_choice(value: str, report: str) -> str:
    """Return "; did you mean X?" with the nearest of the words that a key accepts, or ""."""
    literals = ",".join(re.findall(r"Literal\[([^\]]*)\]", report))
    choices = [c for c in ast.literal_eval(f"[{literals}]") if isinstance(c, str)]
    near = nearest_name(value.strip("'\""), choices)
    return f"; did you mean {near}?" if near else ""


def shorten(value: str) -> str:
    """Cut a long value."""
    if nested := re.fullmatch(r"NestedArg\(key='[^']+', val=(.*)\)", value):
        value = nested[1]
    return value if len(value) <= MAX_SHOWN else value[: MAX_SHOWN - 3] + "..."
