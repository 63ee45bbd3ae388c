"""Data sets as bytes: identifiers, headers, levels and character sets. Pure, no I/O."""
