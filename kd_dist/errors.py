"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """A wrong input, said in one sentence: what is wrong and what to type next.

    Entries print it on one line from one rank and exit with code 2; anything else is a defect of ours and keeps its
    traceback.
    """
