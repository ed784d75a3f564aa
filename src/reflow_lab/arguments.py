"""Words of the verbs that are no Hydra applications."""

import argparse
from typing import NoReturn

from .errors import UserError


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as the other verbs' are."""

    def error(self, message: str) -> NoReturn:
        """Raise a `UserError` that names the verb."""
        raise UserError(f"{self.prog.removeprefix('reflow-lab ')}: {message}")
