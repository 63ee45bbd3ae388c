"""SOP Classes to propose in a C-GET when an archive will not say what a study holds."""

from __future__ import annotations

from typing import Final

from pynetdicom.presentation import StoragePresentationContexts

COMMON_STORAGE_CLASSES: Final = tuple(
    str(context.abstract_syntax) for context in StoragePresentationContexts
)
"""The storage classes that fit into one association, as pynetdicom chose them."""
