"""A Hugging Face Hub on loopback for tests: real HTTP, real commits, real refusals, and faults on demand."""

from .repository import Commit, Entry, Repository
from .server import HubServer
from .traffic import Exchange, Fault

__all__ = ["Commit", "Entry", "Exchange", "Fault", "HubServer", "Repository"]
