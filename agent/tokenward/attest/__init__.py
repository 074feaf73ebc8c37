"""The kernel's word on who is calling: peers of a socket, facts about their processes, and what those prove."""

from tokenward.attest.attestor import Attestor
from tokenward.attest.caller import Attested, Caller
from tokenward.attest.peer import Peer, peer_of

__all__ = ["Attested", "Attestor", "Caller", "Peer", "peer_of"]
