"""The report of a run: results, summary, headline, figures, and the page that shows them."""

from esr_train.report.page import summary_table, write_report

__all__ = ["summary_table", "write_report"]
