"""Download a ChatGLM3 checkpoint from Hugging Face or ModelScope at one commit; an interrupted download resumes.

Only one weight format is downloaded, safetensors if available, and no program code. download.json in the folder records
source, commit, sizes and SHA-256. HF_ENDPOINT and MODELSCOPE_ENDPOINT name mirrors, HF_TOKEN gives access to gated
repositories. Prints the folder.
"""

import argparse
import shlex
import sys
from pathlib import Path

from entrypoints.hub.download import KNOWN_MODELS, SOURCES, download
from entrypoints.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `glm download`."""
    parser.add_argument("model", metavar="MODEL", help=f"{', '.join(KNOWN_MODELS)}, or another ORG/NAME")
    parser.add_argument("--output-dir", type=Path, help="folder to write; if not given, models/NAME-original")
    parser.add_argument(
        "--source", choices=("auto", *SOURCES), default="auto", help=f"auto tries {', then '.join(SOURCES)}"
    )
    parser.add_argument("--revision", help="branch, tag or commit; if not given, a pinned commit or the main branch")


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Download, print the folder, and name the next command on stderr."""
    name = args.model.rpartition("/")[2]
    folder = args.output_dir or Path("models", f"{name}-original")
    download(args.model, folder, args.source, args.revision, settings)
    print(folder)
    print(f"next: glm convert {shlex.quote(str(folder))} models/{name}", file=sys.stderr)
