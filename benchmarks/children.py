"""Arms that live in processes of their own (other ranks, another Python environment): one line of JSON a question, one
line back.

Between two questions a child waits in a read and takes no CPU, so it can take turns with the others.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TextIO

from kd_dist.errors import UserError

ROOT = Path(__file__).parents[1]


class Child:
    """`python -m module arguments`, asked and answering by lines. Raises UserError where it ends without an answer."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str] = (),
        *,
        python: str = sys.executable,
        environment: Mapping[str, str] | None = None,
    ):
        self.module = module
        self.process = subprocess.Popen(
            [python, "-m", module, *arguments],
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def tell(self, **question: Any) -> None:
        """Ask without waiting, so that several children can work at once."""
        try:
            print(json.dumps(question), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise self._gone() from None

    def answer(self) -> dict[str, Any]:
        """Wait for the answer to the oldest question."""
        line = self.process.stdout.readline()
        if not line:
            raise self._gone()
        return json.loads(line)

    def ask(self, **question: Any) -> dict[str, Any]:
        """Ask, and wait for the answer."""
        self.tell(**question)
        return self.answer()

    def _gone(self) -> UserError:
        code = self.process.wait()
        return UserError(f"{self.module} ended with code {code} while it was measured; its own message stands above.")


def serve(answer_to: Callable[[dict[str, Any]], dict[str, Any]], answers: TextIO) -> None:
    """The child's side: answer every line of standard input until it is closed."""
    for line in sys.stdin:
        print(json.dumps(answer_to(json.loads(line))), file=answers, flush=True)


def take_standard_output() -> TextIO:
    """Standard output for answers alone: whatever else this process prints goes to standard error from now on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers
