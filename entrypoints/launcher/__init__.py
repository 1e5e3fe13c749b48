"""Start of the `glm` command, installed as the package `glm_entrypoints`.

PyPI has another package whose import name is `entrypoints`, a single module. In an editable install it hides this
package, so the command cannot start from inside it.
"""

import importlib
import sys


def main() -> int:
    """Run the command line; returns its exit code, 1 if another package hides `entrypoints`."""
    package = importlib.import_module("entrypoints")
    if not hasattr(package, "__path__"):
        print(
            f"glm: {package.__file__} hides the package of this command, which has the same name; "
            "run `pip uninstall entrypoints`, or install glm-entrypoints in its own environment",
            file=sys.stderr,
        )
        return 1
    from entrypoints.__main__ import main as run

    return run()
