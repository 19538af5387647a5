"""The only door to the Hugging Face Hub: references, downloads by commit, pushes in one commit, listings."""

from hf_datavec.hub.client import client, identified
from hf_datavec.hub.download import READABLE, Fetched, fetch, naming
from hf_datavec.hub.listing import Listed, vectors_of
from hf_datavec.hub.references import Reference, parse
from hf_datavec.hub.upload import push, sendable

__all__ = [
    "READABLE", "Fetched", "Listed", "Reference", "client", "fetch", "identified", "naming", "parse", "push",
    "sendable", "vectors_of",
]  # fmt: skip
