"""One codec per file; `shoal.compression.codec` finds them."""
