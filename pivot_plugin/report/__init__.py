"""One self-contained HTML page about runs: what was trained on what, how it went, what probes found, what it cost."""

from .page import write_report
from .pictures import saliency_sheet

__all__ = ["saliency_sheet", "write_report"]
