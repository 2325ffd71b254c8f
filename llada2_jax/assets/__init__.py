"""Files that ship with the package."""

from pathlib import Path

# The quickstart's autoregressive parent: a Hugging Face style checkpoint in bf16, trained by
# configs/tiny_ar.py as the first stage of `make quickstart-long`.
TINY_AR = Path(__file__).parent / "tiny_ar"
