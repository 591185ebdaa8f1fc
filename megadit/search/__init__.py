"""Hyperparameter search on a proxy and its transfer: studies, verdicts, the target's configuration, budget, report.

Importing it loads neither torch nor optuna, so that commands answer ``--help`` at once.
"""
