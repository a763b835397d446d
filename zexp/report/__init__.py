"""Comparison tables, plots and the leaderboard page of a study, from what lies in the store.

report = build(store_root, "quickstart")     # no torch; works on half a study
paths = write(report)                        # store/studies/quickstart/report/leaderboard.{html,json,md,csv,tex}
print_tables(report, console)                # the same in the terminal (rich)
report.to_json()                             # what `zexp report --json` prints
"""

from zexp.report.build import build
from zexp.report.model import Report
from zexp.report.terminal import print_tables
from zexp.report.write import write

__all__ = ["Report", "build", "print_tables", "write"]
