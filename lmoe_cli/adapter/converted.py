"""Where adapters converted from pickles are kept: in lmoe's own cache folder, under the pickle's SHA-256."""

from __future__ import annotations

from pathlib import Path

from lmoe_cli.hashes import sha256


def converted_folder(pickle: Path) -> Path:
    """The folder that holds a pickled adapter as safetensors, whether or not it exists yet.

    Args:
        pickle: An ``adapter_model.bin``. It is hashed, not unpickled.
    """
    from platformdirs import user_cache_path

    return user_cache_path("lmoe") / "converted" / sha256(pickle)
