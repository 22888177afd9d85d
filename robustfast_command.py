"""What the command ``robustfast`` runs. It stands outside of the package, whose import takes PyTorch's time:
an interruption meanwhile, and a PyTorch that is missing, are one line too.
"""

import sys


def main() -> None:
    try:
        from robustfast.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        sys.exit("robustfast: PyTorch is not installed; install it with: pip install torch")
    run()
