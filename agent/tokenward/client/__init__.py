"""What applications import to get credentials from the agent, and nothing that only the agent needs."""

from tokenward.client.address import socket_path
from tokenward.client.aio import AsyncClient, AsyncCredentialHandle
from tokenward.client.credentials import Change, Credential, GrantInfo, Identity, PreviousValues, Values
from tokenward.client.sync import Client, CredentialHandle

__all__ = [
    "Client",
    "AsyncClient",
    "CredentialHandle",
    "AsyncCredentialHandle",
    "Credential",
    "PreviousValues",
    "Values",
    "Change",
    "GrantInfo",
    "Identity",
    "socket_path",
]
