"""Name the forms of an export and the orders of tokens that the user can choose.

The command line offers these names before torch is imported, so that this file imports nothing.
"""

NNSSL_FORM, HUGGINGFACE_FORM = "nnssl", "huggingface"
FORMS = (NNSSL_FORM, HUGGINGFACE_FORM)

PERMUTE, KEEP = "permute", "keep"
TOKEN_ORDERS = (PERMUTE, KEEP)
"""What an import does with a transformer's tokens."""

OURS, NNSSL_ORDER = "whd", "hwd"
"""The orders that our exports state."""
WRITTEN_ORDERS = {"nnunet": OURS, "nnssl": NNSSL_ORDER}
"""Whose readers an export is for -> how they flatten tokens."""
