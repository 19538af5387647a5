"""The only door to the Hugging Face Hub: references, downloads by commit, pushes in one commit, listings."""

from hf_datavec.hub.client import client
from hf_datavec.hub.download import READABLE, Fetched, fetch
from hf_datavec.hub.listing import Listed, vectors_of
from hf_datavec.hub.references import Reference, parse
from hf_datavec.hub.upload import push, sendable

__all__ = [
    "READABLE", "Fetched", "Listed", "Reference", "client", "fetch", "parse", "push", "sendable", "vectors_of",
]  # fmt: skip
