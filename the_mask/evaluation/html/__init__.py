"""HTML report: one file with figures, curves and the worst frames, for one run or several."""

from the_mask.evaluation.html.collect import ReportSink, RunReport
from the_mask.evaluation.html.page import write_report

__all__ = ["ReportSink", "RunReport", "write_report"]
