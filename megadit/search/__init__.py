"""Hyperparameter search on a proxy, and what is made of it: studies, verdicts, the target's configuration, reports.

Importing it loads neither torch nor optuna, so that commands answer ``--help`` at once. Whether an optimum transfers,
and what that is worth, is judged by ``megadit.transfer``, which knows scores alone.

======================  ============================================================
study                   what a study file says, its space, cells and runs
storage                 optuna's storage, and the acts on it of several workers
workers                 the processes that run trials, one trial, its scores
results                 what a study has found so far
selection               one point of it, by a named rule
status                  how it stands, for people
verify_study            a study's runs as samples for a verdict
apply                   the target's configuration, on whose word, and what the search cost
report                  one page of HTML, and markdown with figures
wording                 hyperparameters as people read them
======================  ============================================================
"""
