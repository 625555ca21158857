"""A process with the released Hub client, pointed at a Hub of ours."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.helpers import hub_server

# runs what it is sent, line by line, and answers with the value of `answer` or the error
WORKER = """
import json, logging, os, sys, io
logging.basicConfig(stream=sys.stderr, level=logging.INFO)
import pivot_plugin as pivot
from pivot_plugin.errors import PivotError
import pivot_plugin.encoders
log = io.StringIO()
logging.getLogger().addHandler(logging.StreamHandler(log))
for line in sys.stdin:
    log.truncate(0); log.seek(0)
    names = {"pivot": pivot}
    try:
        exec(json.loads(line), names)
        reply = {"answer": names.get("answer")}
    except PivotError as error:
        reply = {"error": type(error).__name__, "finding": error.finding, "remedy": error.remedy}
    except Exception as error:
        reply = {"error": type(error).__name__, "finding": repr(error), "remedy": ""}
    reply["log"] = log.getvalue()
    print("@@" + json.dumps(reply), flush=True)
"""


class Client:
    """A process with the released client, pointed at a Hub by its environment."""

    def __init__(self, url: str, home: Path, **variables: str) -> None:
        environment = {
            **os.environ,
            "HF_ENDPOINT": url,
            "HF_TOKEN": hub_server.TOKEN,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "5",
            **variables,
        }
        self._log = (home / "client.log").open("w")
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )

    def __call__(self, code: str) -> dict[str, Any]:
        """Run code; returns its `answer`, or the class, finding and remedy of its error, and what was logged."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(code) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("@@"):
                found: dict[str, Any] = json.loads(line[2:])
                return found
        raise AssertionError("the client's process ended: " + Path(self._log.name).read_text()[-2000:])

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()
