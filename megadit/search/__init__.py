"""Hyperparameter search on a proxy and its transfer: studies, verdicts, the target's configuration, budget, report.

Importing it loads neither torch nor optuna, so that commands answer ``--help`` at once.

======================  ============================================================
study                   what a study file says, its space, cells and runs
storage                 optuna's storage, and the acts on it of several workers
workers                 the processes that run trials, one trial, its scores
results                 what a study has found so far
selection               one point of it, by a named rule
status                  how it stands, for people
verdict                 does a base hyperparameter transfer? of studies and tables
transfer                the target's configuration, and what tuning has cost
comparison              two runs, or two sets of seeds, side by side
report                  one page of HTML, and markdown with figures
command                 what ``launch/sweep.py`` does
wording                 hyperparameters as people read them
======================  ============================================================
"""
