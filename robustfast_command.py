"""What the command ``robustfast`` runs. It stands outside of the package, whose import takes PyTorch's time:
an interruption meanwhile, and a PyTorch that is missing, are one line too.
"""

import sys


def main() -> None:
    try:
        from robustfast.cli import main as run
    except (KeyboardInterrupt, ModuleNotFoundError) as error:
        give_up(error)
        raise
    run()


def give_up(error: BaseException) -> None:
    """Ends the process with one line if that is why the package could not be imported."""
    if isinstance(error, KeyboardInterrupt):
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
    if isinstance(error, ModuleNotFoundError) and error.name == "torch":
        sys.exit("robustfast: PyTorch is not installed; install it with: pip install torch")
