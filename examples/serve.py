"""`transformers serve` for LongNet models: an OpenAI-compatible server with the bounded cache.

    pip install 'transformers[serving]'
    python -m examples.serve --device cpu --port 8000
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"model": "/path/to/my-longnet", "prompt": "def main(", "max_tokens": 20}'

All options of `transformers serve` are passed on. Continuous batching is refused (docs/servers.md).
"""

if not __package__:
    raise SystemExit("Run this as a module from the repository's root: python -m examples.serve")

import sys

from transformers.cli import transformers as command
from transformers.cli.serving import model_manager

from modeling_longnet import LongNetForCausalLM


def main() -> None:
    """Run the command line."""
    # The server looks the folder's class up by name in Transformers (5.24), and remote code is not there.
    model_manager.transformers.LongNetForCausalLM = LongNetForCausalLM
    sys.argv[1:1] = ["serve"]
    command.main()


if __name__ == "__main__":
    main()
