"""An interpreter that has imported the libraries, and runs each program it is sent in a fork of itself.

Half of what a small program costs is the import of torch and transformers, the same each time. Of this package nothing
is imported beforehand: what a command loads, and in which order, is its own.
"""

import atexit
import gc
import json
import os
import sys
import threading
import traceback

# for what they load: models, processors and trainers are lazy in transformers and TRL
import accelerate  # noqa: F401
import datasets  # noqa: F401
import peft  # noqa: F401
import sklearn.linear_model  # noqa: F401
import torchvision  # noqa: F401
from transformers import (  # noqa: F401
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2_5_VLForConditionalGeneration,
    Trainer,
)
from trl import DPOTrainer, GRPOTrainer, SFTTrainer  # noqa: F401


def next_program() -> str:
    """Take orders, one a line; returns in each fork, with its program's text.

    A program is answered by the number of its process, an empty order by that of the next process to end, and its
    status.
    """
    for line in sys.stdin:
        if order := json.loads(line):
            child = os.fork()
            if child == 0:
                return become(**order)
            print(child, flush=True)
        else:
            child, status = os.wait()
            print(child, os.waitstatus_to_exitcode(status), flush=True)
    # nobody listens any more
    os._exit(0)


def become(code: str, arguments: list[str], folder: str, environment: dict[str, str], output: list[str]) -> str:
    """Take a program's arguments, folder, variables and output files, as if started by `python -c`."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = ["", *paths, *(path for path in sys.path[1:] if path not in paths)]
    sys.argv = ["-c", *arguments]
    for stream, file in zip((0, 1, 2), (os.devnull, *output), strict=True):
        opened = os.open(file, os.O_RDWR)
        os.dup2(opened, stream)
        os.close(opened)
    # a program that is listened to while it runs
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    return code


def ended(error: BaseException | None) -> int:
    """The exit status after a program, its traceback printed."""
    if error is None:
        return 0
    if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
        return error.code or 0
    if isinstance(error, SystemExit):
        print(error.code, file=sys.stderr)
    else:
        traceback.print_exception(error)
    return 1


gc.collect()
gc.freeze()
program = next_program()
del __file__
failure = None
try:
    exec(compile(program, "<string>", "exec"), globals())
except BaseException as error:
    failure = error
status = ended(failure)
for thread in threading.enumerate():
    if thread is not threading.main_thread() and not thread.daemon:
        thread.join()
# without taking the interpreter apart: it would copy all that was imported
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(status)
