"""A bundle's tokenizer means the same to transformers and to a station without it: found out here, once.

transformers makes some tokenizers anew from vocabularies of older forms, or changes what a file says. Where its reading
of a checkpoint differs from ours, the bundle gets the files that transformers saves, which mean the same to both.
"""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from wdmoe.backbone.export.station_files import CONFIG_NAMES, small_files
from wdmoe.backbone.text.tokenizer import FileTokenizer, load_tokenizer, nothing_added
from wdmoe.errors import BundleError

log = logging.getLogger(__name__)


def station_small_files(model: Path) -> dict[str, bytes]:
    """Bundle path and bytes of every small file of a model folder that the station needs.

    Raises:
        BundleError: there is no tokenizer, or a file cannot be read.
    """
    found = dict(small_files(model))
    theirs = _transformers_tokenizer(model)
    if theirs is None or _alike(_ours(model), theirs):
        return found
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        theirs.save_pretrained(folder)
        if not _alike(_ours(folder), theirs):
            log.warning("%s: only transformers understands this tokenizer, so a station needs it too", model)
            return found
        kept = {path: data for path, data in found.items() if path.rpartition("/")[2] in CONFIG_NAMES}
        return {**kept, **dict(small_files(folder))}


def _transformers_tokenizer(model: Path) -> Any:
    """None where it cannot be loaded, or has no fast form."""
    try:
        found = AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    except Exception:  # transformers raises many kinds; who serves the bundle is told then
        log.debug("transformers does not load the tokenizer of %s", model, exc_info=True)
        return None
    return found if hasattr(found, "backend_tokenizer") else None


def _ours(folder: Path) -> FileTokenizer | None:
    try:
        return load_tokenizer(folder)
    except BundleError:
        return None


def _alike(ours: FileTokenizer | None, theirs: Any) -> bool:
    if ours is None:
        return False
    template = theirs.chat_template
    wanted = template.get("default") if isinstance(template, dict) else template
    return (
        _content(ours.backend_tokenizer) == _content(theirs.backend_tokenizer)
        and ours.special_tokens_map == theirs.special_tokens_map
        and ours.chat_template == wanted
    )


def _content(tokenizer: Tokenizer) -> dict[str, Any]:
    """All that decides ids. Limits are left out, as no prompt obeys them."""
    if tokenizer.post_processor is None:
        tokenizer.post_processor = nothing_added()
    return {**json.loads(tokenizer.to_str()), "truncation": None, "padding": None}
