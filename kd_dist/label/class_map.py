"""Which of a teacher's classes each class of the data is.

A class map is the word `imagenet` (the data's classes are named by their synsets, such as n02086240), or a file:

- two columns of text, `class-of-the-data  teacher's-class`, one line for each class of the data;
- JSON: an object with the same;
- JSON: a list of the teacher's classes in its order, where the data's classes are found by their names.

A teacher's class is a number from 0, or a synset where the teacher has ImageNet's thousand classes.
"""

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from kd_dist.errors import UserError
from kd_dist.functions import near

IMAGENET = 1000


def synsets() -> list[str]:
    """ImageNet's thousand classes in the order of the usual networks' logits: by WordNet's numbers."""
    return resources.files("kd_dist.models").joinpath("imagenet_synsets.txt").read_text().split()


def read_class_map(source: str) -> list[tuple[str, Any]]:
    """(class of the data, teacher's class) as a class map lists them. Raises UserError where it cannot be read."""
    if source == "imagenet":
        return [(name, index) for index, name in enumerate(synsets())]
    try:
        text = Path(source).read_text()
        if Path(source).suffix != ".json":
            return _columns(text, source)
        found = json.loads(text, object_pairs_hook=lambda pairs: pairs)
    except FileNotFoundError:
        raise UserError(f"there is no class map {source}; pass a file, or imagenet.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"the class map {source} cannot be read ({error}).") from error
    if isinstance(found, list) and found and all(isinstance(each, str) for each in found):
        return [(name, index) for index, name in enumerate(found)]
    if isinstance(found, list) and found and all(isinstance(each, tuple) for each in found):
        return found
    raise UserError(f"the class map {source} is neither a JSON object nor a JSON list of names.")


def _columns(text: str, source: str) -> list[tuple[str, Any]]:
    lines = [line.rsplit(None, 1) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if bad := next((line for line in lines if len(line) != 2), None):
        raise UserError(f"the class map {source} has a line with one column ({bad[0]}); two are needed.")
    return [(name.strip(), teachers) for name, teachers in lines]


def picked(pairs: Sequence[tuple[str, Any]], source: str, classes: Sequence[str], outputs: int) -> list[int]:
    """The teacher's class, 0 to `outputs` - 1, of each of the data's classes. Raises UserError where one has none or
    two, or two have the same.
    """
    found: dict[str, int] = {}
    for name, value in pairs:
        if name in classes:
            if name in found:
                raise UserError(f"the class map {source} names {name} twice.")
            found[name] = _index(value, source, outputs)
    if missing := [name for name in classes if name not in found]:
        like = near(missing[0], [name for name, _ in pairs])
        raise UserError(
            f"the class map {source} has no line for {missing[0]}{like} of the data's {len(classes)} classes."
        )
    for name, index in found.items():
        if other := next((each for each in found if each != name and found[each] == index), None):
            raise UserError(f"the class map {source} gives {name} and {other} the same class of the teacher, {index}.")
    return [found[name] for name in classes]


def _index(value: Any, source: str, outputs: int) -> int:
    text = str(value)
    if text.isdigit() and int(text) < outputs:
        return int(text)
    if outputs == IMAGENET and text in (known := synsets()):
        return known.index(text)
    names = ", or a synset" if outputs == IMAGENET else ""
    raise UserError(
        f"the class map {source} has the class {text}, but the teacher's classes are 0 to {outputs - 1}{names}."
    )
