"""Run files to figures and tables. Nothing here is computed that a file does not say.

Everything that notebooks and the command line call is a name of this package.
"""

from bunny_lora.report.axes import axes_chart, axes_table
from bunny_lora.report.choices import choice_chart, choice_grid, choice_table, read_choice
from bunny_lora.report.compare_page import write_comparison_page
from bunny_lora.report.comparison import comparison_chart, comparison_grid, comparison_table
from bunny_lora.report.data_figures import (
    characters_chart,
    contact_sheet,
    dropped_text,
    weak_spots_text,
)
from bunny_lora.report.extremes import extremes_grid, nearest_grid
from bunny_lora.report.grids import before_after_grid, checkpoint_grid, samples_grid
from bunny_lora.report.notebook import config_details, left_out
from bunny_lora.report.page import write_report
from bunny_lora.report.plot import save_figure
from bunny_lora.report.run_figure import run_figure
from bunny_lora.report.run_state import facts, read_run, run_text, working_runs
from bunny_lora.report.scores import read_result, scores_chart, scores_table
from bunny_lora.report.training_figures import loss_curve, read_log, run_summary
from bunny_lora.report.trait_scores import traits_chart, traits_table
from bunny_lora.report.trait_sheet import trait_sheet

__all__ = [
    "axes_chart",
    "axes_table",
    "before_after_grid",
    "characters_chart",
    "checkpoint_grid",
    "choice_chart",
    "choice_grid",
    "choice_table",
    "comparison_chart",
    "comparison_grid",
    "comparison_table",
    "config_details",
    "contact_sheet",
    "dropped_text",
    "extremes_grid",
    "facts",
    "left_out",
    "loss_curve",
    "nearest_grid",
    "read_choice",
    "read_log",
    "read_result",
    "read_run",
    "run_figure",
    "run_summary",
    "run_text",
    "samples_grid",
    "save_figure",
    "scores_chart",
    "scores_table",
    "trait_sheet",
    "traits_chart",
    "traits_table",
    "weak_spots_text",
    "working_runs",
    "write_comparison_page",
    "write_report",
]
