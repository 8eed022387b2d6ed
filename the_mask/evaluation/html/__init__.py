"""A report to look at: one HTML file with figures, curves and the frames that went worst, for one run or several."""

from the_mask.evaluation.html.collect import ReportSink, RunReport
from the_mask.evaluation.html.page import write_report

__all__ = ["ReportSink", "RunReport", "write_report"]
