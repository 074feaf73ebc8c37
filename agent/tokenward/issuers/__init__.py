"""One module per kind of credential; `Issuers` picks the one for a grant."""

from tokenward.issuers.issuers import Issuers

__all__ = ["Issuers"]
