"""Functions that a user names on the command line as `my_package.my_module:function`."""

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from kd_dist.errors import UserError


def near(name: str, known: Iterable[str], shown: Callable[[str], str] = str) -> str:
    """What to add to a sentence on an unknown name: " (did you mean A, B?)" with the known names that are most like it,
    as they are to be typed; empty where none is.
    """
    found = difflib.get_close_matches(name, list(known), n=3)
    return f" (did you mean {', '.join(map(shown, found))}?)" if found else ""


def cause(error: BaseException) -> str:
    """The type and the first line of another program's error: "TypeError: build() takes 0 arguments"."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


def function_of(reference: str) -> Callable[..., Any]:
    """The function that `module:name` names, from what is installed or from the current folder.

    Raises UserError where the module or the function is not there, or the module raises as it is imported.
    """
    module_name, _, name = reference.partition(":")
    module = _imported(module_name, reference)
    found = getattr(module, name, None)
    if found is None:
        offered = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
        raise UserError(f"{reference}: {module_name} has no function {name or '(empty name)'}{near(name, offered)}.")
    if not callable(found):
        raise UserError(f"{reference} is a {type(found).__name__}; pass a function.")
    return found


def _imported(module_name: str, reference: str) -> ModuleType:
    here = os.getcwd()
    is_new = here not in sys.path and "" not in sys.path
    if is_new:  # a command that an installer made does not look there
        sys.path.append(here)
        importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise UserError(
                f"{reference}: there is no module {error.name}, neither installed nor in {here}; start the command in "
                "the folder that holds it, or set PYTHONPATH."
            ) from error
        raise UserError(f"{reference}: importing {module_name} raises {cause(error)}.") from error
    except Exception as error:
        raise UserError(f"{reference}: importing {module_name} raises {cause(error)}.") from error
    finally:
        if is_new:
            sys.path.remove(here)
