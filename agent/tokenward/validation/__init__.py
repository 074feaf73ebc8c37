"""A new value is tried where it is used before anybody gets it: one module for each way to try one.

A new way is one dataclass in `core.model.AnyValidation` with its keys in `config`, one module here with a `check`, and
one case in `Validator`. There is no registry: all ways are known when this is type-checked.
"""

from tokenward.validation.validator import Validator

__all__ = ["Validator"]
