"""What the folders for the Hugging Face Hub have in common: the front matter of a card, and licences as the Hub names
them.
"""

import argparse
import json
import re
from collections.abc import Mapping
from typing import Any


def front_matter(fields: Mapping[str, Any]) -> str:
    """YAML; the values are written as JSON, which is YAML."""
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in fields.items()), "---"])


def licence(text: str) -> str:
    """An identifier such as apache-2.0, as the type of a flag."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a licence's identifier, such as apache-2.0 or mit")
    return text
