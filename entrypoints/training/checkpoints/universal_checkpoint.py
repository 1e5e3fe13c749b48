"""DeepSpeed's conversion to a universal checkpoint, as a program of its own; its pickles cannot run code."""

import pickle
import sys

from deepspeed.checkpoint import ds_to_universal

from entrypoints.checkpoint.pickle_files import format_load_error, restricted_unpickling

if __name__ == "__main__":
    try:
        with restricted_unpickling():  # DeepSpeed loads with weights_only=False
            ds_to_universal.main(ds_to_universal.parse_arguments())
    except pickle.UnpicklingError as error:
        sys.exit(f"a file {format_load_error(error)}")
