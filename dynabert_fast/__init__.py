"""Elastic transformers: one set of weights, many models, switched at no cost.

Importing the package imports neither torch nor transformers; its names load on first use, and
`import dynabert_fast` is enough for the Hugging Face auto classes to know the models.
"""

from __future__ import annotations
