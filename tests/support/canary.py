"""Files that show whether something unpickled them."""

import os
import pickle
import re
from pathlib import Path

import torch

LEAKED_CODE = re.compile("Traceback|weights_only")


class Canary:
    """Unpickling it creates a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


def write_canary(file: Path, executed: Path, form: str = "zip") -> None:
    """Replace `file` by a pickle that creates the folder `executed`: in the format of torch.save, or alone."""
    canary = {"module": Canary(executed)}
    if form == "pickle":
        file.write_bytes(pickle.dumps(canary))
    else:
        torch.save(canary, file, _use_new_zipfile_serialization=form == "zip")
