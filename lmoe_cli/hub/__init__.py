"""The one package that talks to the Hugging Face Hub.

Files live in the ordinary Hugging Face cache. The client checks sizes only, so everything downloaded here is hashed
against what the Hub announced, and removed again when it differs.
"""

from lmoe_cli.hub.cache import (
    CachedRepository,
    cached_path,
    cached_repositories,
    damaged_repositories,
    delete,
    discard,
    is_cached,
)
from lmoe_cli.hub.download import Progress, damaged, discard_damaged, download
from lmoe_cli.hub.repository import NAME, RemoteFile, Repository, look_up, read_range

__all__ = [
    "NAME",
    "CachedRepository",
    "Progress",
    "RemoteFile",
    "Repository",
    "cached_path",
    "cached_repositories",
    "damaged",
    "damaged_repositories",
    "delete",
    "discard",
    "discard_damaged",
    "download",
    "is_cached",
    "look_up",
    "read_range",
]
